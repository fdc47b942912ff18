"""How few voxels a map has its values in, wherever they lie."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from captum_staa.layout import VideoLayout
from captum_staa.metrics._shared import metric
from captum_staa.result import Array, as_maps


@metric(higher_is_better=None, lowest=0.0, highest=1.0)
def sparsity(attributions: Array, layout: VideoLayout | str | None = None) -> Tensor:
    """Gini index of a map's magnitudes: 0 where all are equal, towards 1 where one voxel has everything.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[3.0, 3, 3, 3], [1, 2, 3, 4], [0, 0, 0, -5]]).reshape(3, 4, 1, 1)
        >>> sparsity(maps)
        tensor([0.0000, 0.2500, 0.7500], dtype=torch.float64)

    With ``c_1 <= ... <= c_N`` the magnitudes in order, ``sparsity = sum_k (2 k - N - 1) c_k / (N sum_k c_k)``. A single
    voxel has ``1 - 1 / N``: the formula is the published one, and so a map beside a copy of itself has the map's value.
    Scale cancels, places do not count. High is not good: a single voxel at random is sparse, and wrong.

    Args:
        attributions: signed, finite floats: of the clip's shape with ``layout``, or maps ``(B, T, H, W)`` without.
        layout: the order of a clip's axes, such as ``"BTCHW"``. Channels are summed first, as in pictures.

    Returns:
        ``(B,)`` float64; nan for a map of zeros, which has nothing to share out.

    Raises:
        TypeError: ``attributions`` is no tensor or array of floats.
        ValueError: its shape is another, or it holds nan or infinity.

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
    """Entropy of a map's magnitudes as shares of their sum: 0 for a single voxel, 1 where all are equal.

    Example:
        >>> import math, torch
        >>> maps = torch.tensor([[0.0, 0, 0, -5], [2, 0, 2, 0], [3, 3, 3, 3]]).reshape(3, 4, 1, 1)
        >>> complexity(maps)
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
        >>> complexity(maps) * math.log(4)  # in nats, as in the paper
        tensor([0.0000, 0.6931, 1.3863], dtype=torch.float64)

    With ``p_k = |a_k| / sum_j |a_j|`` over the ``N = T H W`` voxels, ``complexity = -sum_k p_k ln p_k / ln N``. The
    division by the highest entropy makes clips of unequal sizes comparable; it changes no comparison between maps of
    one size. ``N ** complexity`` is the number of equal voxels that would be as complex. Scale cancels. Low is not
    good: a single voxel at random is simple, and wrong.

    Args:
        attributions: signed, finite floats: of the clip's shape with ``layout``, or maps ``(B, T, H, W)`` without.
        layout: the order of a clip's axes, such as ``"BTCHW"``. Channels are summed first, as in pictures.

    Returns:
        ``(B,)`` float64; nan for a map of zeros, which has no shares, and for a clip of one voxel.

    Raises:
        TypeError: ``attributions`` is no tensor or array of floats.
        ValueError: its shape is another, or it holds nan or infinity.

    Reference:
        Bhatt, Weller and Moura, "Evaluating and Aggregating Feature-based Model Explanations", IJCAI (2020), their
        complexity, here divided by ``ln N``.
    """
    values = _magnitudes(attributions, layout)  # (B, N)
    total = values.sum(1)
    nats = total.log() - torch.xlogy(values, values).sum(1) / total
    highest = math.log(values.shape[1]) or math.nan  # of one voxel nothing can be said
    return (nats / highest).clamp(0, 1)  # rounding alone can take it outside


def _magnitudes(attributions: Array, layout: VideoLayout | str | None) -> Tensor:
    """``(B, N)``, the largest of each clip exactly 1, or nan for a clip of zeros."""
    values = as_maps(attributions, layout).flatten(1).abs()
    return values / values.amax(1, keepdim=True)
