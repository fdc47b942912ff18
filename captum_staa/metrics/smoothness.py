"""How similar are neighboring voxels in space and in time? This describes a map and does not rate it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from captum_staa._utils import notebook
from captum_staa.layout import VideoLayout
from captum_staa.metrics._shared import metric
from captum_staa.result import Array, as_maps


class Smoothness(NamedTuple):
    """Class that holds the autocorrelation of neighbors, one value per clip.

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


def _autocorrelation(maps: Tensor, variance: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return 1 minus Geary's C, ``(B,)``, over all pairs of neighbors along the axes."""
    differences = torch.cat([maps.diff(dim=axis).flatten(1) for axis in axes], dim=1)  # (B, pairs)
    return 1 - differences.square().mean(1) / (2 * variance)
