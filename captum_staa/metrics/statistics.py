"""What the values of a map look like: how they stand out, and how many of them there are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from captum_staa.layout import VideoLayout
from captum_staa.maps import Array, as_maps, as_tensor
from captum_staa.metrics._metric import metric


@metric(higher_is_better=True, lowest=float("-inf"), highest=float("inf"))
def snr(scores: Array, truth: Array) -> Tensor:
    """Signal-to-noise ratio: how far the truth rises above the rest, in standard deviations of the rest.

    Example:
        >>> import torch
        >>> truth = torch.zeros(1, 4, 2, 2, dtype=torch.bool)
        >>> truth[:, 1] = True  # all of frame 1
        >>> scores = torch.tensor([0.0, 9.0, 2.0, 4.0]).reshape(1, 4, 1, 1).expand(1, 4, 2, 2)
        >>> snr(scores, truth).item()  # (9 - 2) / sqrt(8 / 3)
        4.287

    With ``s`` the scores of a clip, ``snr = (mean(s inside) - mean(s outside)) / std(s outside)``. All voxels outside
    are there, none is a sample of others, so the deviation divides by their number. Positive scale and offset cancel.
    Unlike :func:`~captum_staa.metrics.auroc`, it asks by how much: one strong voxel can outweigh many weak ones.

    Args:
        scores: signed, finite maps ``(B, T, H, W)``: pass ``maps.abs()`` where magnitude is meant.
        truth: bool ``(B, T, H, W)``, True where the evidence is.

    Returns:
        ``(B,)`` float64. 0 is chance, negative is worse. Infinite where a map is constant outside the truth and
        another inside, as the truth itself is; nan where nothing can be said: all or none of a clip is truth, or its
        map has the same constant outside as it has inside on average.

    Raises:
        TypeError: ``scores`` is no tensor or array of floats, or ``truth`` none of bool.
        ValueError: the shapes differ, or scores hold nan or infinity.
    """
    maps = as_maps(scores)
    truth = as_tensor(truth, "truth", "B, T, H, W")
    if truth.dtype != torch.bool:
        raise TypeError(f"truth must be bool, but {truth.dtype} came; pass truth > 0")
    if truth.shape != maps.shape:
        raise ValueError(
            f"scores and truth must both be (B, T, H, W), but {tuple(maps.shape)} and {tuple(truth.shape)} came; "
            f"space_time(attributions, layout).joint has this shape"
        )
    inside = truth.to(maps.device)
    return torch.stack([_one_snr(values[where], values[~where]) for values, where in zip(maps, inside, strict=True)])


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


def _one_snr(inside: Tensor, outside: Tensor) -> Tensor:
    """Of one clip, ``(N_in,)`` and ``(N_out,)``."""
    if not len(inside) or not len(outside):
        return inside.new_tensor(torch.nan)
    largest = torch.cat([inside, outside]).abs().amax()  # the squares of 1e-200 and 1e200 are out of range
    inside, outside = inside / largest, outside / largest
    inside, outside = inside - outside[0], outside - outside[0]  # a constant becomes exactly 0, deviation and all
    return (inside.mean() - outside.mean()) / outside.std(correction=0)


def _magnitudes(attributions: Array, layout: VideoLayout | str | None) -> Tensor:
    """``(B, N)``, the largest of each clip exactly 1, or nan for a clip of zeros."""
    values = as_maps(attributions, layout).flatten(1).abs()
    return values / values.amax(1, keepdim=True)
