"""Does an attribution rank the voxels of the evidence above the others?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_staa._utils.checks import check_choice, check_count, check_sides
from captum_staa.layout import VideoLayout
from captum_staa.metrics._shared import SPANNED, Axis, metric
from captum_staa.result import Array, as_maps, as_tensor


@metric(higher_is_better=True, lowest=0.0, highest=1.0)
def auroc(
    attributions: Array, truth: Array, axis: Axis = "joint", *, layout: VideoLayout | str | None = None
) -> Tensor:
    """Return the AUROC: the probability that a voxel of the truth has a higher value than another. Ties count half.

    Example:
        >>> import torch
        >>> truth = torch.zeros(1, 4, 2, 2, dtype=torch.bool)
        >>> truth[:, 1, 0] = True  # in frame 1, the upper two pixels
        >>> auroc(truth.float(), truth), auroc(-truth.float(), truth), auroc(torch.zeros(1, 4, 2, 2), truth)
        (tensor([1.], dtype=torch.float64), tensor([0.], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))
        >>> late = torch.arange(4.0).reshape(1, 4, 1, 1).expand(1, 4, 2, 2)  # increases towards the end
        >>> auroc(late, truth, axis="time").item()  # frame 1 is above frame 0 and below frames 2 and 3
        0.333

    Args:
        attributions: signed, torch or numpy: maps ``(B, T, H, W)``, or in the shape of the inputs with ``layout``
            (channels are summed). Pass ``attributions.abs()`` if magnitude is meant.
        truth: bool ``(B, T, H, W)``, True where the evidence is. :func:`boxes_to_truth` converts boxes.
        axis: what is compared.

            - ``"joint"``: voxels.
            - ``"time"``: frames, by the sum of their attributions. A frame belongs to the truth if any of its pixels
              does.
            - ``"space"``: pixels, by the sum of their attributions over time. A pixel belongs to the truth if it does
              in any frame.
        layout: order of the axes of 5-D ``attributions``, such as ``"BTCHW"``.

    Returns:
        ``(B,)`` float64, an exact count of pairs. 0.5 is chance, 1 is best. nan where all or none of a clip's voxels
        (frames, pixels) belong to the truth.

    Raises:
        TypeError: ``truth`` is not bool.
        ValueError: the shapes differ, attributions contain nan, ``axis`` is unknown, or a sum over it adds infinity and
            -infinity.
    """
    values, inside = compared(attributions, truth, axis, layout)
    areas = [auroc_of(row[where], row[~where]) for row, where in zip(values, inside, strict=True)]
    return torch.tensor(areas, dtype=torch.float64, device=values.device)


@metric(higher_is_better=True, lowest=0.0, highest=1.0)
def average_precision(
    attributions: Array, truth: Array, axis: Axis = "joint", *, layout: VideoLayout | str | None = None
) -> Tensor:
    """Return the average precision, the area under the precision-recall curve; stricter than AUROC if truth is rare.

    Example:
        >>> import torch
        >>> truth = torch.tensor([True, False, True, False]).reshape(1, 4, 1, 1)
        >>> attributions = torch.tensor([4.0, 3.0, 2.0, 1.0]).reshape(1, 4, 1, 1)
        >>> average_precision(attributions, truth).item()  # precision is 1 at the first true voxel, 2/3 at the second
        0.833

    ``AP = sum over thresholds (R_n - R_(n-1)) P_n``, with recall ``R``, precision ``P`` and one threshold per distinct
    value, so that equal values are added together. This is the mean, over the voxels of the truth, of the precision
    among all voxels with at least the same value. Chance is about the share of the voxels that belong to the truth.

    Args:
        attributions: this and all other arguments are as for :func:`auroc`.

    Returns:
        ``(B,)`` float64, 1 for a perfect ranking. nan where all or none of a clip's voxels (frames, pixels) belong to
        the truth.

    Raises:
        TypeError, ValueError: as for :func:`auroc`.

    Reference:
        Manning, Raghavan, Schütze, "Introduction to Information Retrieval", Cambridge University Press (2008), 8.4.
    """
    values, inside = compared(attributions, truth, axis, layout)
    precisions = [_one_average_precision(row, where) for row, where in zip(values, inside, strict=True)]
    return torch.tensor(precisions, dtype=torch.float64, device=values.device)


@metric(higher_is_better=True, lowest=0.0, highest=1.0)
def pointing_game(
    attributions: Array,
    truth: Array,
    tolerance: Sequence[int] = (0, 0, 0),
    *,
    per: Literal["clip", "frame"] = "clip",
    layout: VideoLayout | str | None = None,
) -> Tensor:
    """Return 1 if the maximum of the map lies in the truth, or within the tolerance of it, and 0 otherwise.

    Example:
        >>> import torch
        >>> truth = torch.zeros(1, 4, 8, 8, dtype=torch.bool)
        >>> truth[0, 1, 2, 3] = True
        >>> attributions = torch.zeros(1, 4, 8, 8)
        >>> attributions[0, 1, 2, 5] = 1.0  # two columns to the right
        >>> pointing_game(attributions, truth).item(), pointing_game(attributions, truth, tolerance=(0, 0, 2)).item()
        (0.0, 1.0)
        >>> truth[0, 2], attributions[0, 2, 7, 7] = True, 0.5  # frame 2 has truth, hit by its maximum
        >>> pointing_game(attributions, truth, per="frame").item()
        0.5

    Args:
        attributions: this, ``truth`` and ``layout`` are as for :func:`auroc`.
        tolerance: ``(t, h, w)``, the largest distance of the maximum from the truth along each axis, in frames and
            pixels. ``grid.tubelet`` of a :class:`TokenGrid` allows for the size of one token.
        per: ``"clip"`` uses the maximum of the clip. ``"frame"`` uses the maximum of each frame that contains truth,
            and returns the share of these frames with a hit. Frames without truth are ignored.

    Returns:
        ``(B,)`` float64: 1 for a hit, 0 for a miss. If several voxels share the maximum, the fraction of them that are
        hits; a constant map then scores as chance does, not 1. nan where a clip has no truth.

    Raises:
        TypeError: ``truth`` is not bool, or a value of ``tolerance`` is not an int.
        ValueError: the shapes differ, attributions contain nan, ``tolerance`` is not three numbers of at least 0, or
            ``per`` is unknown.

    Reference:
        Zhang et al., "Top-Down Neural Attention by Excitation Backprop", IJCV 126 (2018).
    """
    check_sides("tolerance", tolerance, least=0)
    check_choice("per", per, ("clip", "frame"))
    maps, truth = _checked(attributions, truth, layout)
    allowed = truth[:, None].float()  # (B, 1, T, H, W)
    for axis, size in enumerate(tolerance):  # dilate by a box, one axis after the other
        reach = min(int(size), truth.shape[1 + axis] - 1)
        kernel, padding = [1, 1, 1], [0, 0, 0]
        kernel[axis], padding[axis] = 2 * reach + 1, reach
        allowed = F.max_pool3d(allowed, kernel, stride=1, padding=padding)
    groups = (len(maps), maps.shape[1] if per == "frame" else 1, -1)  # one maximum in each
    hits = _hits(maps.reshape(groups), allowed.reshape(groups) > 0)
    counts = truth.reshape(groups).any(2)
    return (hits * counts).sum(1) / counts.sum(1)


@metric(higher_is_better=True, lowest=0.0, highest=1.0)
def temporal_pointing(attributions: Array, truth: Array, *, layout: VideoLayout | str | None = None) -> Tensor:
    """Return 1 if the frame with the highest sum of attributions contains truth, and 0 otherwise.

    Example:
        >>> import torch
        >>> truth = torch.zeros(1, 4, 2, 2, dtype=torch.bool)
        >>> truth[:, 2:] = True  # two clips joined in time; the second has the label
        >>> attributions = torch.zeros(1, 4, 2, 2)
        >>> attributions[0, 0, 0, 0] = 3.0  # one pixel of frame 0: sum 3
        >>> attributions[0, 3] = 1.0  # all pixels of frame 3: sum 4
        >>> temporal_pointing(attributions, truth).item(), pointing_game(attributions, truth).item()
        (1.0, 0.0)

    Args:
        attributions: this and all other arguments are as for :func:`auroc`.

    Returns:
        ``(B,)`` float64: 1 for a hit, 0 for a miss. If several frames share the highest sum, the fraction of them that
        are hits. nan where a clip has no truth.

    Raises:
        TypeError, ValueError: as for :func:`auroc`.

    Reference:
        Adel Bargal et al., "Excitation Backprop for RNNs", CVPR (2018), on pairs of joined clips.
    """
    frames, inside = compared(attributions, truth, "time", layout)
    return torch.where(inside.any(1), _hits(frames, inside), torch.nan)


def boxes_to_truth(boxes: Array, size: tuple[int, int]) -> Tensor:
    """Return a mask of the pixels that lie in the box of their frame.

    Example:
        >>> import torch
        >>> nan = float("nan")
        >>> boxes = torch.tensor([[[1.0, 0.0, 4.0, 2.0], [nan, nan, nan, nan]]])  # the second frame has no box
        >>> truth = boxes_to_truth(boxes, size=(3, 5))
        >>> truth[0, 0].int()
        tensor([[0, 1, 1, 1, 0],
                [0, 1, 1, 1, 0],
                [0, 0, 0, 0, 0]], dtype=torch.int32)
        >>> truth[0, 1].any().item()
        False

    Boxes are half-open, as slices in Python: ``(x0, y0, x1, y1) = (1, 0, 4, 2)`` is columns 1, 2, 3 and rows 0, 1. Add
    1 to ``x1`` and ``y1`` if the annotation contains the last pixel inside. If a corner lies between pixels, a pixel
    belongs to the box if its center does: ``x0 <= x + 0.5 < x1``. Parts of a box outside the frame are cut off. For
    several boxes in a frame, combine their masks: ``boxes_to_truth(a, size) | boxes_to_truth(b, size)``.

    Args:
        boxes: ``(B, T, 4)``, ``(x0, y0, x1, y1)`` in pixels of the clip, x to the right and y down; four nan where a
            frame has no box.
        size: ``(H, W)`` of the clip in pixels.

    Returns:
        bool ``(B, T, H, W)`` on the device of ``boxes``.

    Raises:
        TypeError: ``boxes`` is neither a tensor nor an array of numbers, or a side of ``size`` is not an int.
        ValueError: ``boxes`` has another shape, has infinite values or nan beside numbers, seems to be scaled to
            0 .. 1, or a box contains no pixel, because its corners are swapped or because it lies outside the frame.
    """
    boxes = as_tensor(boxes, "boxes", "B, T, 4")
    if boxes.dtype == torch.bool:
        raise TypeError(
            f"boxes must be corners in pixels, got bool of shape {tuple(boxes.shape)}. A mask needs no conversion."
        )
    if boxes.ndim != 3 or boxes.shape[2] != 4 or 0 in boxes.shape:
        raise ValueError(f"boxes must be (B, T, 4) and not empty, got shape {tuple(boxes.shape)}.")
    sides: Any = size
    if not (isinstance(sides, (list, tuple, np.ndarray)) and len(sides) == 2):
        raise ValueError(f"size must be (H, W) of the clip in pixels, got {size!r}.")
    for axis, side in zip("HW", sides, strict=True):
        check_count(f"{axis} of {size = }", side)
    boxes = boxes.double()
    there = ~boxes.isnan().all(2)  # (B, T)
    if not bool(boxes[there].isfinite().all()):
        raise ValueError(
            f"each box must be four finite numbers, or four nan if the frame has no box, got "
            f"{_first_box(boxes, there & ~boxes.isfinite().all(2))}."
        )
    corners = boxes[there]
    if bool(((corners >= 0) & (corners <= 1)).all()) and bool((corners != corners.round()).any()):
        raise ValueError(
            f"boxes must be in pixels, got only corners between 0 and 1, such as {_first_box(boxes, there)}. Multiply "
            f"relative boxes by (W, H, W, H)."
        )
    x0, y0, x1, y1 = boxes[..., None].unbind(2)  # (B, T, 1) each; nan is neither below nor above
    y, x = (torch.arange(int(side), device=boxes.device) + 0.5 for side in size)
    rows, columns = (y0 <= y) & (y < y1), (x0 <= x) & (x < x1)  # (B, T, H), (B, T, W)
    if bool((empty := there & ~(rows.any(2) & columns.any(2))).any()):
        raise ValueError(
            f"each box must be (x0, y0, x1, y1) with x0 < x1 and y0 < y1, and contain the center of a pixel of the "
            f"{int(size[0])} x {int(size[1])} frame (H x W), got {_first_box(boxes, empty)}. Use four nan for a frame "
            f"without a box."
        )
    return rows[..., :, None] & columns[..., None, :]


def compared(attributions: Array, truth: Array, axis: Axis, layout: VideoLayout | str | None) -> tuple[Tensor, Tensor]:
    """Check the arguments and return what ``axis`` compares: values float64 and truth bool, both ``(B, N)``."""
    check_choice("axis", axis, SPANNED)
    maps, truth = _checked(attributions, truth, layout)
    if dims := tuple("BTHW".index(letter) for letter in SPANNED[axis]):
        maps, truth = maps.sum(dims), truth.any(dims)
        check_sums(maps, f"axis={axis!r}")
    return maps.flatten(1), truth.flatten(1)


def _hits(values: Tensor, inside: Tensor) -> Tensor:
    """Return the share of the positions with the highest value that lie inside, ``(...)``, of ``(..., N)`` each."""
    highest = values == values.amax(-1, keepdim=True)  # several if they tie
    return (highest & inside).sum(-1).double() / highest.sum(-1)


def auroc_of(positive: Tensor, negative: Tensor) -> float:
    """Return the share of the pairs of values ``(N,)`` and ``(M,)`` in which the positive one is higher.

    Ties count half. nan if there are no pairs.
    """
    negative = negative.sort().values
    pairs = len(positive) * len(negative)
    if pairs == 0:
        return float("nan")
    below = torch.searchsorted(negative, positive)
    not_above = torch.searchsorted(negative, positive, right=True)  # only this count includes ties: half
    return int((below + not_above).sum()) / (2 * pairs)


def _one_average_precision(values: Tensor, inside: Tensor) -> float:
    """Return the average precision of one clip, of ``(N,)`` each."""
    everywhere, positive = values.sort().values, values[inside].sort().values
    if len(positive) in (0, len(values)):
        return float("nan")
    retrieved = len(values) - torch.searchsorted(everywhere, positive)  # values that are not lower
    relevant = len(positive) - torch.searchsorted(positive, positive)
    return float((relevant.double() / retrieved).mean())


def _checked(attributions: Array, truth: Array, layout: VideoLayout | str | None) -> tuple[Tensor, Tensor]:
    """Check and return maps float64 and truth bool, both ``(B, T, H, W)`` and on one device."""
    maps = as_maps(attributions, layout, ranked=True)
    return maps, checked_mask(truth, "truth", maps)


def checked_mask(mask: Array, name: str, maps: Tensor, axes: str = "BTHW") -> Tensor:
    """Check a bool mask against maps ``(B, T, H, W)``, and return it on their device.

    Args:
        mask: the mask to check.
        name: name of the argument.
        maps: maps ``(B, T, H, W)`` of the same clips.
        axes: axes of the mask. An axis that maps do not have can have any size of at least 1.
    """
    named = ", ".join(axes)
    values = as_tensor(mask, name, named)
    sizes = dict(zip("BTHW", maps.shape, strict=True))
    got = dict(zip(axes, values.shape, strict=False))
    if values.ndim != len(axes) or 0 in values.shape or any(got[axis] != size for axis, size in sizes.items()):
        expected = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
        raise ValueError(
            f"{name} must be ({named}) = ({expected}), as the maps it is compared with, got shape "
            f"{tuple(values.shape)}. "
            f"Pass the mask of the same clips, with the frames and pixels of the maps."
        )
    if values.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {values.dtype}. Pass {name} > 0.")
    return values.to(maps.device)


def check_sums(sums: Tensor, over: str) -> None:
    """Raise if a sum or a mean is nan, because it adds infinity and -infinity."""
    if bad := int(sums.isnan().sum()):
        raise ValueError(
            f"sums over {over} must not add infinity and -infinity, which has no rank, got {bad} of the {sums.numel()} "
            f"sums that do. Replace infinite values, for example with torch.nan_to_num."
        )


def _first_box(boxes: Tensor, where: Tensor) -> str:
    clip, frame = where.nonzero()[0].tolist()
    return f"{tuple(boxes[clip, frame].tolist())} in frame {frame} of clip {clip}"
