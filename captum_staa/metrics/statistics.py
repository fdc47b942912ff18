"""How concentrated are the values of a map on few voxels? The positions of the voxels have no influence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from captum_staa.layout import VideoLayout
from captum_staa.metrics._shared import metric
from captum_staa.result import Array, as_maps


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


def _magnitudes(attributions: Array, layout: VideoLayout | str | None) -> Tensor:
    """Return the magnitudes ``(B, N)``; the largest of each clip is exactly 1. nan for a clip of zeros."""
    values = as_maps(attributions, layout).flatten(1).abs()
    return values / values.amax(1, keepdim=True)
