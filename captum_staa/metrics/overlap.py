"""How much of what an attribution marks is the evidence, how much of the evidence does it mark, and how clearly?"""

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
    scores: Array,
    truth: Array,
    axis: Axis = "joint",
    *,
    area: float | Sequence[float] | None = None,
    layout: VideoLayout | str | None = None,
) -> Tensor:
    """Intersection over union of the truth and the highest scores, as many as an area holds.

    Example:
        >>> import torch
        >>> truth = torch.tensor([True, True, False, False]).reshape(1, 4, 1, 1)
        >>> scores = torch.tensor([4.0, 2.0, 3.0, 1.0]).reshape(1, 4, 1, 1)
        >>> iou(scores, truth).item()  # of the two highest, one lies inside: 1 of 3
        0.333
        >>> iou(scores, truth, area=[0.25, 0.5, 0.75, 1.0])  # the whole curve
        tensor([[0.5000, 0.3333, 0.6667, 0.5000]], dtype=torch.float64)

    With ``k`` places kept, ``P`` in the truth and ``I`` in both, ``IoU = I / (k + P - I)``. Areas take the place of
    thresholds because a threshold on the scores means another area on every map, and no two methods share a unit.

    Where scores are equal at the cut, each is kept in part, ``(k - places above) / places equal``, so that no order
    among them is made up; the same holds for an area that is no whole number of places.

    Args:
        scores: signed maps ``(B, T, H, W)``, or attributions of the clip's shape with ``layout``.
        truth: bool ``(B, T, H, W)``, True where the evidence is; :func:`boxes_to_truth` makes it of boxes.
        axis: what is compared. ``"joint"``, every pixel of every frame; ``"time"``, frames by the sum of their
            scores, and those that hold any truth; ``"space"``, pixels by their sum over time, likewise.
        area: the fraction of the places to keep, above 0 and at most 1, or several. None keeps as many as the truth
            has, clip by clip: only then a perfect map scores 1.
        layout: the order of a clip's axes, such as ``"BTCHW"``, where ``scores`` have five.

    Returns:
        float64 ``(B,)``, or ``(B, n)`` for ``n`` areas; nan where all or none of a clip's places belong to the truth.

    Raises:
        TypeError: ``truth`` is not bool.
        ValueError: the shapes differ, scores hold nan, ``axis`` is unknown, or ``area`` is out of range.

    Reference:
        Jaccard, "The Distribution of the Flora in the Alpine Zone", New Phytologist 11 (1912).
    """
    several: Any = area if isinstance(area, (list, tuple, np.ndarray)) else [area]
    if area is not None and not (len(several) and all(is_number(part) and 0 < part <= 1 for part in several)):
        raise ValueError(f"area is a fraction of the places, above 0 and at most 1, or several, got {area!r}")
    areas = None if area is None else np.asarray(area, dtype=float)
    values, inside = compared(scores, truth, axis, layout)
    size = inside.sum(1, keepdim=True).double()
    kept = size if areas is None else values.shape[1] * size.new_tensor(np.atleast_1d(areas)).expand(len(size), -1)
    both = _inside_top(values, inside, kept)
    overlap = _where_told(both / (kept + size - both), inside)
    return overlap[:, 0] if areas is None or areas.ndim == 0 else overlap


@metric(higher_is_better=True, lowest=0.0, highest=1.0)
def relevance_rank_accuracy(
    scores: Array, truth: Array, axis: Axis = "joint", *, layout: VideoLayout | str | None = None
) -> Tensor:
    """The share of the highest scores, as many as the truth has places, that lie inside it.

    Example:
        >>> import torch
        >>> truth = torch.tensor([True, True, False, False]).reshape(1, 4, 1, 1)
        >>> scores = torch.tensor([4.0, 2.0, 3.0, 1.0]).reshape(1, 4, 1, 1)
        >>> relevance_rank_accuracy(scores, truth).item()  # of the two highest, one lies inside
        0.5

    ``|top-P and truth| / P`` with ``P`` the places of the truth. It orders maps as :func:`iou` at the truth's own area
    does, ``iou = r / (2 - r)``, but is a plain share. Where scores are equal at the cut, the mean over all orders of
    them counts, so that a constant map scores the share of the truth, as chance does.

    Args:
        scores: signed maps ``(B, T, H, W)``, or attributions of the clip's shape with ``layout``.
        truth: bool ``(B, T, H, W)``, True where the evidence is.
        axis: what is compared, as for :func:`iou`.
        layout: the order of a clip's axes, where ``scores`` have five.

    Returns:
        ``(B,)`` float64; nan where all or none of a clip's places belong to the truth.

    Raises:
        TypeError: ``truth`` is not bool.
        ValueError: the shapes differ, scores hold nan, or ``axis`` is unknown.

    Reference:
        Arras, Osman, Samek, "CLEVR-XAI: A benchmark dataset for the ground truth evaluation of neural network
        explanations", Information Fusion 81 (2022).
    """
    values, inside = compared(scores, truth, axis, layout)
    size = inside.sum(1, keepdim=True).double()
    return _where_told(_inside_top(values, inside, size) / size, inside)[:, 0]


@metric(higher_is_better=True, lowest=0.0, highest=1.0)
def energy_pointing_game(
    scores: Array, truth: Array, axis: Axis = "joint", *, layout: VideoLayout | str | None = None
) -> Tensor:
    """The share of the positive attribution that lies inside the truth: the energy-based pointing game.

    Example:
        >>> import torch
        >>> truth = torch.tensor([True, True, False, False]).reshape(1, 4, 1, 1)
        >>> scores = torch.tensor([4.0, -9.0, 1.0, 0.0]).reshape(1, 4, 1, 1)
        >>> energy_pointing_game(scores, truth).item()  # 4 of 4 + 1; what speaks against the target counts 0
        0.8

    ``sum of max(s, 0) inside / sum of max(s, 0)``. Of a map without negative values this is the relevance mass accuracy
    of Arras et al. It depends on the values, and not on their order alone: an offset changes it; a positive factor
    does not.

    Args:
        scores: signed, finite maps ``(B, T, H, W)``, or attributions of the clip's shape with ``layout``.
        truth: bool ``(B, T, H, W)``, True where the evidence is.
        axis: what is compared, as for :func:`iou`. Scores are summed first, and what is then negative counts 0.
        layout: the order of a clip's axes, where ``scores`` have five.

    Returns:
        ``(B,)`` float64; nan where no score of a clip is positive, and where all or none of its places belong to the
        truth.

    Raises:
        TypeError: ``truth`` is not bool.
        ValueError: the shapes differ, scores hold nan or infinity, or ``axis`` is unknown.

    Reference:
        Wang et al., "Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks", CVPR Workshops
        (2020).
    """
    values, inside = _finite(*compared(scores, truth, axis, layout))
    energy = values.clamp(min=0)
    energy = energy / energy.amax(1, keepdim=True)  # sums stay in range, and a map without any energy becomes nan
    return _where_told((energy * inside).sum(1, keepdim=True) / energy.sum(1, keepdim=True), inside)[:, 0]


@metric(higher_is_better=True, lowest=float("-inf"), highest=float("inf"))
def signal_to_noise(
    scores: Array, truth: Array, axis: Axis = "joint", *, layout: VideoLayout | str | None = None
) -> Tensor:
    """Signal-to-noise ratio: how far the truth rises above the rest, in standard deviations of the rest.

    Example:
        >>> import torch
        >>> truth = torch.zeros(1, 4, 2, 2, dtype=torch.bool)
        >>> truth[:, 1] = True  # all of frame 1
        >>> scores = torch.tensor([0.0, 9.0, 2.0, 4.0]).reshape(1, 4, 1, 1).expand(1, 4, 2, 2)
        >>> signal_to_noise(scores, truth).item()  # (9 - 2) / sqrt(8 / 3)
        4.287

    With ``s`` the scores of a clip, it is ``(mean(s inside) - mean(s outside)) / std(s outside)``. All places outside
    are there, none is a sample of others, so the deviation divides by their number. Positive scale and offset cancel.
    Unlike :func:`~captum_staa.metrics.auroc`, it asks by how much: one strong voxel can outweigh many weak ones.

    Args:
        scores: signed, finite maps ``(B, T, H, W)``, or attributions of the clip's shape with ``layout``: pass
            ``maps.abs()`` where magnitude is meant.
        truth: bool ``(B, T, H, W)``, True where the evidence is.
        axis: what is compared, as for :func:`iou`.
        layout: the order of a clip's axes, where ``scores`` have five.

    Returns:
        ``(B,)`` float64. 0 is chance, negative is worse. Infinite where a map is constant outside the truth and
        another inside, as the truth itself is; nan where nothing can be said: all or none of a clip's places belong to
        the truth, or its map has the same constant outside as it has inside on average.

    Raises:
        TypeError: ``scores`` is no tensor or array, or ``truth`` none of bool.
        ValueError: the shapes differ, scores hold nan or infinity, or ``axis`` is unknown.
    """
    values, inside = _finite(*compared(scores, truth, axis, layout))
    return torch.stack([_one_snr(row[where], row[~where]) for row, where in zip(values, inside, strict=True)])


def _finite(values: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """The same, where no value is infinite."""
    if bad := int(values.isinf().sum()):
        raise ValueError(
            f"{bad} of the {values.numel()} scores are infinite, and have no share or mean; mend them first, as with "
            f"torch.nan_to_num"
        )
    return values, inside


def _one_snr(inside: Tensor, outside: Tensor) -> Tensor:
    """Of one clip, ``(N_in,)`` and ``(N_out,)``."""
    if not len(inside) or not len(outside):
        return inside.new_tensor(torch.nan)
    largest = torch.cat([inside, outside]).abs().amax()  # the squares of 1e-200 and 1e200 are out of range
    inside, outside = inside / largest, outside / largest
    inside, outside = inside - outside[0], outside - outside[0]  # a constant becomes exactly 0, deviation and all
    return (inside.mean() - outside.mean()) / outside.std(correction=0)


def _inside_top(values: Tensor, inside: Tensor, sizes: Tensor) -> Tensor:
    """How much of the truth is among the ``sizes`` (B, n) highest of the values (B, N); places equal at the cut count
    in part."""
    falling, order = (-values.contiguous()).sort(dim=1)  # negated, because searchsorted wants rising values
    found = F.pad(
        inside.gather(1, order).double().cumsum(1), (1, 0)
    )  # (B, N + 1): of the truth, among the first so many
    cut = falling.gather(1, sizes.ceil().long().clamp(min=1) - 1)
    above, through = (torch.searchsorted(falling, cut, right=last) for last in (False, True))
    return torch.lerp(found.gather(1, above), found.gather(1, through), (sizes - above) / (through - above))


def _where_told(shares: Tensor, inside: Tensor) -> Tensor:
    """nan for the clips, rows of ``(B, n)``, whose places all or none belong to the truth: any map does as well."""
    told = inside.any(1) & ~inside.all(1)
    return torch.where(told[:, None], shares, torch.nan)
