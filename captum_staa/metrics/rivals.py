"""Metrics that compare the evidence with rivals: objects that look alike but do not decide the class."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_staa._utils.checks import check_choice
from captum_staa.layout import VideoLayout
from captum_staa.metrics._shared import SPANNED, Axis, metric
from captum_staa.metrics.localization import auroc_of, check_sums, checked_mask
from captum_staa.result import Array, as_maps


@metric(higher_is_better=True, lowest=0.0, highest=1.0)
def evidence_against_rivals(
    attributions: Array,
    truth: Array,
    rivals: Array,
    axis: Axis = "joint",
    *,
    layout: VideoLayout | str | None = None,
) -> Tensor:
    """Return the AUROC of the attribution between evidence and rivals; all other voxels are ignored.

    Example:
        >>> import torch
        >>> truth = torch.tensor([True, True, False, False, False]).reshape(1, 1, 1, 5)
        >>> rivals = torch.tensor([False, False, True, True, False]).reshape(1, 1, 1, 5)
        >>> attributions = torch.tensor([4.0, 1.0, 3.0, 1.0, 9.0]).reshape(1, 1, 1, 5)
        >>> evidence_against_rivals(attributions, truth, rivals).item()  # 4 > 3, 4 > 1, 1 < 3, 1 = 1
        0.625

    A map that marks everything that moves, or everything of high contrast, finds the evidence against an empty
    background. It scores 0.5 here if rivals move as much and have the same contrast.

    Args:
        attributions: signed maps ``(B, T, H, W)``, or attributions in the clip's shape with ``layout``. Pass
            ``attributions.abs()`` if magnitude is meant.
        truth: bool ``(B, T, H, W)``, True where the evidence is.
        rivals: bool ``(B, T, H, W)``, True where rivals are. No voxel is in both masks.
        axis: what is compared.

            - ``"joint"``: voxels of evidence with voxels of rivals.
            - ``"space"``: positions, by the mean of the map over the frames that show evidence, or a rival, there. Only
              frames that contain evidence count.
            - ``"time"``: frames, by the mean of the map over the pixels of evidence and rivals in the frame. Frames
              that contain evidence are compared with frames that contain rivals only.
        layout: order of the axes of 5-D ``attributions``, such as ``"BTCHW"``.

    Returns:
        ``(B,)`` float64: the probability that evidence scores higher than a rival, where ties count half. 0.5 is
        chance, 1 is best. nan where a clip has nothing to compare.

    Raises:
        TypeError: ``truth`` or ``rivals`` is not bool.
        ValueError: the shapes differ, the masks overlap, ``attributions`` contain nan, or ``axis`` is unknown.
    """
    check_choice("axis", axis, SPANNED)
    maps = as_maps(attributions, layout, ranked=True)
    truth, rivals = checked_mask(truth, "truth", maps), checked_mask(rivals, "rivals", maps)
    if both := int((truth & rivals).sum()):
        raise ValueError(
            f"truth and rivals must not overlap, got {both} voxels that are in both. Pass rivals & ~truth if these "
            f"voxels are evidence."
        )
    groups = {"joint": _voxels, "space": _positions, "time": _frames}[axis]
    areas = []
    for values, evidence, others in zip(maps, truth, rivals, strict=True):  # (T, H, W) each
        positive, negative = groups(values, evidence, others)
        check_sums(torch.cat([positive, negative]), f"{axis=}")
        areas.append(auroc_of(positive, negative))
    return torch.tensor(areas, dtype=torch.float64, device=maps.device)


@metric(higher_is_better=True, lowest=0.0, highest=1.0)
def object_pointing(attributions: Array, objects: Array, *, layout: VideoLayout | str | None = None) -> Tensor:
    """Return 1 where the evidence has the highest mean attribution of all objects, 0 where a rival has.

    Example:
        >>> import torch
        >>> objects = torch.eye(3, dtype=torch.bool).reshape(1, 3, 1, 1, 3)  # three objects of one pixel
        >>> attributions = torch.tensor([2.0, 1.0, 2.0]).reshape(1, 1, 1, 3)
        >>> object_pointing(attributions, objects).item()  # a tie of the evidence and one rival
        0.5

    Args:
        attributions: signed maps ``(B, T, H, W)``, or attributions in the clip's shape with ``layout``. Pass
            ``attributions.abs()`` if magnitude is meant.
        objects: bool ``(B, K, T, H, W)``, the voxels of each object. Object 0 is the evidence, the others are rivals.
            An object without voxels in a clip is ignored in that clip.
        layout: order of the axes of 5-D ``attributions``, such as ``"BTCHW"``.

    Returns:
        ``(B,)`` float64: 1, 0, or one part of the number of objects that share the highest mean. Chance is 1 divided by
        the number of objects. nan where object 0 has no voxels, or where no rival has any.

    Raises:
        TypeError: ``objects`` is not bool.
        ValueError: the shapes differ, or ``attributions`` contain nan.
    """
    maps = as_maps(attributions, layout, ranked=True)
    objects = checked_mask(objects, "objects", maps, "BKTHW")
    return torch.stack([_one_pointing(values, masks) for values, masks in zip(maps, objects, strict=True)])


@metric(higher_is_better=True, lowest=0.0, highest=1.0)
def class_discrimination(
    attributions_a: Array,
    attributions_b: Array,
    truth_a: Array,
    truth_b: Array,
    *,
    layout: VideoLayout | str | None = None,
) -> Tensor:
    """Return how well the maps for two classes tell the evidence of one class from that of the other.

    Example:
        >>> import torch
        >>> truth_a = torch.tensor([True, True, False, False]).reshape(1, 4, 1, 1)
        >>> for_a = torch.tensor([3.0, 2.0, 1.0, 0.0]).reshape(1, 4, 1, 1)
        >>> class_discrimination(for_a, -for_a, truth_a, ~truth_a).item()
        1.0
        >>> class_discrimination(for_a, for_a, truth_a, ~truth_a).item()  # a map that does not depend on the class
        0.5

    The mean of two AUROCs: of the map for class A, between the voxels of A (positive) and the voxels of B; and of the
    map for class B, between the voxels of B (positive) and the voxels of A. All other voxels, and voxels of both
    classes, are ignored.

    Args:
        attributions_a: signed maps ``(B, T, H, W)`` for class A, or attributions in the clip's shape with ``layout``.
            Pass ``attributions_a.abs()`` if magnitude is meant.
        attributions_b: the same for class B, of the same clips.
        truth_a: bool ``(B, T, H, W)``, True where the evidence of class A is.
        truth_b: bool ``(B, T, H, W)``, True where the evidence of class B is.
        layout: order of the axes of 5-D attributions, such as ``"BTCHW"``.

    Returns:
        ``(B,)`` float64. 0.5 for maps that do not depend on the class, 1 is best. nan where a clip has no evidence of
        one of the classes.

    Raises:
        TypeError: ``truth_a`` or ``truth_b`` is not bool.
        ValueError: the shapes differ, or attributions contain nan.
    """
    maps_a = as_maps(attributions_a, layout, name="attributions_a", ranked=True)
    maps_b = as_maps(attributions_b, layout, name="attributions_b", ranked=True).to(maps_a.device)
    if maps_a.shape != maps_b.shape:
        raise ValueError(
            f"attributions_a and attributions_b must have the same shape, got maps {tuple(maps_a.shape)} and "
            f"{tuple(maps_b.shape)} (B, T, H, W). Explain the same clips for both classes."
        )
    truth_a, truth_b = checked_mask(truth_a, "truth_a", maps_a), checked_mask(truth_b, "truth_b", maps_a)
    only_a, only_b = truth_a & ~truth_b, truth_b & ~truth_a
    areas = [
        (auroc_of(for_a[a], for_a[b]) + auroc_of(for_b[b], for_b[a])) / 2
        for for_a, for_b, a, b in zip(maps_a, maps_b, only_a, only_b, strict=True)
    ]
    return torch.tensor(areas, dtype=torch.float64, device=maps_a.device)


# Each function returns the values of the evidence (N,) and those of rivals (M,) in one clip (T, H, W).


def _voxels(values: Tensor, truth: Tensor, rivals: Tensor) -> tuple[Tensor, Tensor]:
    return values[truth], values[rivals]


def _positions(values: Tensor, truth: Tensor, rivals: Tensor) -> tuple[Tensor, Tensor]:
    frames = truth.any((1, 2))
    if not bool(frames.any()):
        return values[truth], values[truth]
    groups = []
    for mask in (truth[frames], rivals[frames]):
        low, high = values[frames].where(mask, torch.inf).amin(0), values[frames].where(mask, -torch.inf).amax(0)
        means = values[frames].where(mask, 0).sum(0) / mask.sum(0)
        groups.append(means.clamp(low, high)[mask.any(0)])  # the mean of equal values is exactly that value
    return groups[0], groups[1]


def _frames(values: Tensor, truth: Tensor, rivals: Tensor) -> tuple[Tensor, Tensor]:
    with_evidence, objects = truth.any((1, 2)), truth | rivals
    only_rivals = rivals.any((1, 2)) & ~with_evidence
    groups = [[_mean(values[t][objects[t]]) for t in frames.nonzero()[:, 0]] for frames in (with_evidence, only_rivals)]
    positive, negative = (torch.stack(means) if means else values.new_empty(0) for means in groups)
    return positive, negative


def _one_pointing(values: Tensor, objects: Tensor) -> Tensor:
    """Return the score of one clip, of values ``(T, H, W)`` and objects ``(K, T, H, W)``."""
    visible = objects.any((1, 2, 3))
    if not bool(visible[0]) or int(visible.sum()) < 2:
        return values.new_tensor(torch.nan)
    means = torch.stack([_mean(values[mask]) for mask in objects[visible]])
    check_sums(means, "objects")
    highest = means == means.max()  # several if they tie
    return highest[0].double() / highest.sum()


def _mean(values: Tensor) -> Tensor:
    """Return the mean of ``(N,)``. The mean of equal values is exactly that value, so that equal objects tie."""
    return values.mean() if bool(values.min() < values.max()) else values[0]
