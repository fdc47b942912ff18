"""How well do the highest values of an attribution overlap with the evidence, and how clear is the contrast?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_staa._utils.checks import is_number
from captum_staa.layout import VideoLayout
from captum_staa.metrics._shared import Axis, metric
from captum_staa.metrics.localization import compared
from captum_staa.result import Array


@metric(higher_is_better=True, lowest=0.0, highest=1.0)
def iou(
    attributions: Array,
    truth: Array,
    axis: Axis = "joint",
    *,
    area: float | Sequence[float] | None = None,
    layout: VideoLayout | str | None = None,
) -> Tensor:
    """Return the intersection over union (IoU) of the truth and of the highest attributions within a given area.

    Example:
        >>> import torch
        >>> truth = torch.tensor([True, True, False, False]).reshape(1, 4, 1, 1)
        >>> attributions = torch.tensor([4.0, 2.0, 3.0, 1.0]).reshape(1, 4, 1, 1)
        >>> iou(attributions, truth).item()  # one of the two highest lies inside: 1 of 3
        0.333
        >>> iou(attributions, truth, area=[0.25, 0.5, 0.75, 1.0])  # the whole curve
        tensor([[0.5000, 0.3333, 0.6667, 0.5000]], dtype=torch.float64)

    With ``k`` voxels selected, ``P`` voxels in the truth and ``I`` in both, ``IoU = I / (k + P - I)``. Areas are used
    instead of thresholds, because a threshold on the values selects a different area on each map, and methods differ
    in their units.

    If several values are equal at the limit, each of them is selected in part, with the weight
    ``(k - number above) / number equal``, because none of them comes first. An area that is not an integer number of
    voxels is handled in the same way.

    Args:
        attributions: this, ``truth``, ``axis`` and ``layout`` are as for :func:`auroc`.
        area: fraction of the voxels (frames, pixels) to select, above 0 and at most 1, or several fractions. None
            selects as many as the truth of each clip has. Only then does a perfect map score 1.

    Returns:
        float64 ``(B,)``, or ``(B, n)`` for ``n`` areas, 0 to 1, 1 is best. nan where all or none of a clip's voxels
        (frames, pixels) belong to the truth.

    Raises:
        TypeError: ``truth`` is not bool.
        ValueError: the shapes differ, attributions contain nan, ``axis`` is unknown, or ``area`` is out of range.

    Reference:
        Jaccard, "The Distribution of the Flora in the Alpine Zone", New Phytologist 11 (1912).
    """
    several: Any = area if isinstance(area, (list, tuple, np.ndarray)) else [area]
    if area is not None and not (len(several) and all(is_number(part) and 0 < part <= 1 for part in several)):
        raise ValueError(
            f"area must be a fraction above 0 and at most 1, or a list of such fractions, got {area!r}. area=0.1 "
            f"selects the highest tenth."
        )
    areas = None if area is None else np.asarray(area, dtype=float)
    values, inside = compared(attributions, truth, axis, layout)
    size = inside.sum(1, keepdim=True).double()
    selected = size if areas is None else values.shape[1] * size.new_tensor(np.atleast_1d(areas)).expand(len(size), -1)
    both = _inside_top(values, inside, selected)
    overlap = _nan_where_trivial(both / (selected + size - both), inside)
    return overlap[:, 0] if areas is None or areas.ndim == 0 else overlap


@metric(higher_is_better=True, lowest=0.0, highest=1.0)
def relevance_rank_accuracy(
    attributions: Array, truth: Array, axis: Axis = "joint", *, layout: VideoLayout | str | None = None
) -> Tensor:
    """Return the share of the P highest attributions that lie inside the truth, where P is the size of the truth.

    Example:
        >>> import torch
        >>> truth = torch.tensor([True, True, False, False]).reshape(1, 4, 1, 1)
        >>> attributions = torch.tensor([4.0, 2.0, 3.0, 1.0]).reshape(1, 4, 1, 1)
        >>> relevance_rank_accuracy(attributions, truth).item()  # one of the two highest lies inside
        0.5

    ``r = |top-P and truth| / P``, where ``P`` is the number of voxels of the truth. It ranks maps in the same order as
    :func:`iou` at the area of the truth, ``iou = r / (2 - r)``, but it is a simple share. If several values are equal
    at the limit, the mean over all their orders is used. A constant map then scores as chance does: the share of the
    truth.

    Args:
        attributions: this and all other arguments are as for :func:`auroc`.

    Returns:
        ``(B,)`` float64, 0 to 1, 1 is best. nan where all or none of a clip's voxels (frames, pixels) belong to the
        truth.

    Raises:
        TypeError: ``truth`` is not bool.
        ValueError: the shapes differ, attributions contain nan, or ``axis`` is unknown.

    Reference:
        Arras, Osman, Samek, "CLEVR-XAI: A benchmark dataset for the ground truth evaluation of neural network
        explanations", Information Fusion 81 (2022).
    """
    values, inside = compared(attributions, truth, axis, layout)
    size = inside.sum(1, keepdim=True).double()
    return _nan_where_trivial(_inside_top(values, inside, size) / size, inside)[:, 0]


@metric(higher_is_better=True, lowest=0.0, highest=1.0)
def energy_pointing_game(
    attributions: Array, truth: Array, axis: Axis = "joint", *, layout: VideoLayout | str | None = None
) -> Tensor:
    """Return the share of the positive attribution inside the truth: the energy-based pointing game.

    Example:
        >>> import torch
        >>> truth = torch.tensor([True, True, False, False]).reshape(1, 4, 1, 1)
        >>> attributions = torch.tensor([4.0, -9.0, 1.0, 0.0]).reshape(1, 4, 1, 1)
        >>> energy_pointing_game(attributions, truth).item()  # 4 / (4 + 1); negative values count 0
        0.8

    ``sum of max(s, 0) inside / sum of max(s, 0)``. For a map without negative values, this is the relevance mass
    accuracy of Arras et al. The result depends on the values and not only on their order: an offset changes it, a
    positive factor does not.

    Args:
        attributions: signed and finite. This and all other arguments are as for :func:`auroc`. With another ``axis``
            than ``"joint"``, values are summed first, and negative sums count 0.

    Returns:
        ``(B,)`` float64, 0 to 1, 1 is best. nan where no value of a clip is positive, and where all or none of its
        voxels (frames, pixels) belong to the truth.

    Raises:
        TypeError: ``truth`` is not bool.
        ValueError: the shapes differ, attributions contain nan or infinity, or ``axis`` is unknown.

    Reference:
        Wang et al., "Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks", CVPR Workshops
        (2020).
    """
    values, inside = _finite(*compared(attributions, truth, axis, layout))
    energy = values.clamp(min=0)
    energy = energy / energy.amax(1, keepdim=True)  # keeps sums in range; a map without energy becomes nan
    return _nan_where_trivial((energy * inside).sum(1, keepdim=True) / energy.sum(1, keepdim=True), inside)[:, 0]


@metric(higher_is_better=True, lowest=float("-inf"), highest=float("inf"))
def signal_to_noise(
    attributions: Array, truth: Array, axis: Axis = "joint", *, layout: VideoLayout | str | None = None
) -> Tensor:
    """Return the signal-to-noise ratio: how far attributions inside the truth exceed the rest, in standard deviations.

    Example:
        >>> import torch
        >>> truth = torch.zeros(1, 4, 2, 2, dtype=torch.bool)
        >>> truth[:, 1] = True  # all of frame 1
        >>> attributions = torch.tensor([0.0, 9.0, 2.0, 4.0]).reshape(1, 4, 1, 1).expand(1, 4, 2, 2)
        >>> signal_to_noise(attributions, truth).item()  # (9 - 2) / sqrt(8 / 3)
        4.287

    With the values ``s`` of a clip, it is ``(mean(s inside) - mean(s outside)) / std(s outside)``. The standard
    deviation is that of a population, which divides by N. The result does not depend on a positive scale or an offset.
    Unlike :func:`auroc`, it depends on the size of differences: one strong voxel can outweigh many
    weak ones.

    Args:
        attributions: signed and finite. This and all other arguments are as for :func:`auroc`.

    Returns:
        ``(B,)`` float64, higher is better. 0 is chance, and negative values are worse than chance. Infinite where the
        map is constant outside the truth and its mean inside is different, as for the truth itself. nan where all or
        none of a clip's voxels (frames, pixels) belong to the truth, or where the map is constant outside and its mean
        inside is equal to that constant.

    Raises:
        TypeError: ``attributions`` is not a tensor or an array, or ``truth`` is not bool.
        ValueError: the shapes differ, attributions contain nan or infinity, or ``axis`` is unknown.
    """
    values, inside = _finite(*compared(attributions, truth, axis, layout))
    return torch.stack([_one_snr(row[where], row[~where]) for row, where in zip(values, inside, strict=True)])


def _finite(values: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Return the arguments, or raise if a value is infinite."""
    if bad := int(values.isinf().sum()):
        raise ValueError(
            f"attributions must be finite, because this metric computes sums and means, got infinity in {bad} of "
            f"the {values.numel()} values. Replace them, for example with torch.nan_to_num."
        )
    return values, inside


def _one_snr(inside: Tensor, outside: Tensor) -> Tensor:
    """Return the ratio of one clip, of values ``(N_in,)`` and ``(N_out,)``."""
    if not len(inside) or not len(outside):
        return inside.new_tensor(torch.nan)
    largest = torch.cat([inside, outside]).abs().amax()  # squares of 1e-200 and 1e200 would be out of range
    inside, outside = inside / largest, outside / largest
    inside, outside = inside - outside[0], outside - outside[0]  # a constant becomes exactly 0, with deviation 0
    return (inside.mean() - outside.mean()) / outside.std(correction=0)


def _inside_top(values: Tensor, inside: Tensor, sizes: Tensor) -> Tensor:
    """Return how much of the truth is among the ``sizes`` ``(B, n)`` highest values ``(B, N)``.

    Values that are equal at the limit count in part.
    """
    falling, order = (-values.contiguous()).sort(dim=1)  # negated, because searchsorted needs ascending values
    # (B, N + 1): number of voxels of the truth among the first 0 .. N
    hits = F.pad(inside.gather(1, order).double().cumsum(1), (1, 0))
    cut = falling.gather(1, sizes.ceil().long().clamp(min=1) - 1)
    above, through = (torch.searchsorted(falling, cut, right=last) for last in (False, True))
    return torch.lerp(hits.gather(1, above), hits.gather(1, through), (sizes - above) / (through - above))


def _nan_where_trivial(shares: Tensor, inside: Tensor) -> Tensor:
    """Return ``shares`` ``(B, n)`` with nan for clips of which all or none belong to the truth."""
    valid = inside.any(1) & ~inside.all(1)
    return torch.where(valid[:, None], shares, torch.nan)
