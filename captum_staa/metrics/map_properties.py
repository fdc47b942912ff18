"""Properties of a map that describe it and do not rate it: smoothness, sparsity and complexity."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from captum_staa._utils import notebook
from captum_staa.layout import VideoLayout
from captum_staa.metrics._shared import metric
from captum_staa.result import Array, as_maps


class Smoothness(NamedTuple):
    """Autocorrelation of neighbors, one value per clip.

    Attributes:
        space: ``(B,)`` float64, of horizontal and vertical neighbors within a frame.
        time: ``(B,)`` float64, of the same pixel in consecutive frames.
    """

    space: Tensor
    time: Tensor

    def _repr_html_(self) -> str:
        return notebook.block(
            "Smoothness", notebook.by_clip({"space": self.space.tolist(), "time": self.time.tolist()})
        )


@metric(higher_is_better=None, lowest=float("-inf"), highest=1.0)
def smoothness(attributions: Array, layout: VideoLayout | str | None = None) -> Smoothness:
    """Return the lag-1 autocorrelation of a map: 1 if neighbors are equal, 0 for noise, about -1 for a checkerboard.

    Example:
        >>> import torch
        >>> noise = torch.randn(1, 16, 48, 48, generator=torch.Generator().manual_seed(0))
        >>> space, time = smoothness(noise)
        >>> abs(space.item()) < 0.02, abs(time.item()) < 0.02
        (True, True)
        >>> still = noise[:, :1].expand(1, 16, 48, 48)  # the same noise in every frame
        >>> round(smoothness(still).space.item(), 1), smoothness(still).time.item()
        (0.0, 1.0)
        >>> attributions = torch.arange(8.0).reshape(1, 1, 8, 1, 1).expand(1, 3, 8, 4, 4)  # rises slowly over time
        >>> smoothness(attributions, "BCTHW")
        Smoothness(space=tensor([1.], dtype=torch.float64), time=tensor([0.9055], dtype=torch.float64))

    ``smoothness = 1 - mean(d²) / (2 s²)``, with the differences ``d`` of neighbors and the unbiased variance ``s²`` of
    the whole clip. This is 1 minus Geary's contiguity ratio C; along time, C is half of von Neumann's ratio. It is used
    for these reasons:

    - It does not depend on scale and offset, so methods with different units can be compared. Total variation does.
    - It depends on signs: a map whose sign alternates from pixel to pixel is rough, although its magnitude is constant.
    - The mean over all permutations of the voxels of a clip is exactly 0, for all values and sizes.
    - Space and time have the same scale, the variance of the clip, so the two can be compared.

    Higher is not better. A blurred random map is smooth but useless, and a correct map has sharp borders. Report it
    beside a metric that uses ground truth, such as :func:`auroc`.

    Args:
        attributions: signed, finite floats: in the clip's shape with ``layout``, or maps ``(B, T, H, W)``.
            Pass ``attributions.abs()`` if magnitude is meant.
        layout: order of the axes of 5-D ``attributions``, such as ``"BTCHW"``. Channels are summed.

    Returns:
        :class:`Smoothness`, values of at most 1. Both are nan for a constant clip, ``time`` is nan for a single frame,
        and ``space`` is nan for a single pixel.

    Raises:
        TypeError: ``attributions`` is not a tensor of floats.
        ValueError: ``attributions`` has another shape, or contains nan or infinity.

    Reference:
        Geary, "The Contiguity Ratio and Statistical Mapping", The Incorporated Statistician 5 (1954). Von Neumann,
        "Distribution of the Ratio of the Mean Square Successive Difference to the Variance", Annals of Mathematical
        Statistics 12 (1941).
    """
    maps = as_maps(attributions, layout)
    maps = maps - maps[:, :1, :1, :1]  # a constant map becomes exactly 0, which gives nan below
    maps = maps / maps.abs().amax((1, 2, 3), keepdim=True)  # squares of 1e-200 and 1e200 would be out of range
    deviations = maps - maps.mean((1, 2, 3), keepdim=True)
    variance = deviations.square().sum((1, 2, 3)) / (maps[0].numel() - 1)
    return Smoothness(
        space=_autocorrelation(maps, variance, axes=(2, 3)), time=_autocorrelation(maps, variance, axes=(1,))
    )


@metric(higher_is_better=None, lowest=0.0, highest=1.0)
def sparsity(attributions: Array, layout: VideoLayout | str | None = None) -> Tensor:
    """Return the Gini index of the magnitudes of a map: 0 if all are equal, close to 1 if only one voxel is not 0.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[3.0, 3, 3, 3], [1, 2, 3, 4], [0, 0, 0, -5]]).reshape(3, 4, 1, 1)
        >>> sparsity(maps)
        tensor([0.0000, 0.2500, 0.7500], dtype=torch.float64)

    With the sorted magnitudes ``c_1 <= ... <= c_N``, ``sparsity = sum_k (2 k - N - 1) c_k / (N sum_k c_k)``. Its
    maximum is ``1 - 1 / N``, for a single voxel, as in the published formula. Two copies of a map side by side have the
    same value as the map. The result does not depend on scale or positions. Higher is not better: a single random voxel
    is sparse and wrong.

    Args:
        attributions: signed, finite floats: in the clip's shape with ``layout``, or maps ``(B, T, H, W)``.
        layout: order of the axes of 5-D ``attributions``, such as ``"BTCHW"``. Channels are summed first.

    Returns:
        ``(B,)`` float64; nan for a map of zeros.

    Raises:
        TypeError: ``attributions`` is not a tensor or an array of floats.
        ValueError: ``attributions`` has another shape, or contains nan or infinity.

    Reference:
        Hurley and Rickard, "Comparing Measures of Sparsity", IEEE Transactions on Information Theory 55 (2009), their
        Gini index. Used on attributions by Chalasani et al., "Concise Explanations of Neural Networks using Adversarial
        Training", ICML (2020).
    """
    values = _magnitudes(attributions, layout).sort(1).values  # (B, N)
    count = values.shape[1]
    places = torch.arange(1, count + 1, dtype=torch.float64, device=values.device)
    return (values * (2 * places - count - 1)).sum(1) / (count * values.sum(1))


@metric(higher_is_better=None, lowest=0.0, highest=1.0)
def complexity(attributions: Array, layout: VideoLayout | str | None = None) -> Tensor:
    """Return the normalized entropy of the magnitudes of a map: 0 for a single voxel, 1 if all are equal.

    Example:
        >>> import math, torch
        >>> maps = torch.tensor([[0.0, 0, 0, -5], [2, 0, 2, 0], [3, 3, 3, 3]]).reshape(3, 4, 1, 1)
        >>> complexity(maps)
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
        >>> complexity(maps) * math.log(4)  # in nats, as in the paper
        tensor([0.0000, 0.6931, 1.3863], dtype=torch.float64)

    With ``p_k = |a_k| / sum_j |a_j|`` over ``N = T H W`` voxels, ``complexity = -sum_k p_k ln p_k / ln N``. Division by
    the highest entropy makes clips of different sizes comparable. ``N ** complexity`` is the number of equal voxels
    with the same complexity. The result does not depend on scale. Lower is not better: a single random voxel has low
    complexity and is wrong.

    Args:
        attributions: signed, finite floats: in the clip's shape with ``layout``, or maps ``(B, T, H, W)``.
        layout: order of the axes of 5-D ``attributions``, such as ``"BTCHW"``. Channels are summed first.

    Returns:
        ``(B,)`` float64; nan for a map of zeros and for a clip of one voxel.

    Raises:
        TypeError: ``attributions`` is not a tensor or an array of floats.
        ValueError: ``attributions`` has another shape, or contains nan or infinity.

    Reference:
        Bhatt, Weller and Moura, "Evaluating and Aggregating Feature-based Model Explanations", IJCAI (2020), their
        complexity, here divided by ``ln N``.
    """
    values = _magnitudes(attributions, layout)  # (B, N)
    total = values.sum(1)
    nats = total.log() - torch.xlogy(values, values).sum(1) / total
    highest = math.log(values.shape[1]) or math.nan  # undefined for one voxel
    return (nats / highest).clamp(0, 1)  # only rounding errors leave this range


def _autocorrelation(maps: Tensor, variance: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return 1 minus Geary's C, ``(B,)``, over all pairs of neighbors along the axes."""
    differences = torch.cat([maps.diff(dim=axis).flatten(1) for axis in axes], dim=1)  # (B, pairs)
    return 1 - differences.square().mean(1) / (2 * variance)


def _magnitudes(attributions: Array, layout: VideoLayout | str | None) -> Tensor:
    """Return the magnitudes ``(B, N)``; the largest of each clip is exactly 1. nan for a clip of zeros."""
    values = as_maps(attributions, layout).flatten(1).abs()
    return values / values.amax(1, keepdim=True)
