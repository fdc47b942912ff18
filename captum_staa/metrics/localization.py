"""Does an attribution rank the places of the evidence above the others?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_staa._utils.checks import check_choice, check_sides
from captum_staa.layout import VideoLayout
from captum_staa.metrics._shared import SPANNED, Axis, metric
from captum_staa.result import Array, as_tensor


@metric(higher_is_better=True, lowest=0.0, highest=1.0)
def auroc(scores: Array, truth: Array, axis: Axis = "joint", *, layout: VideoLayout | str | None = None) -> Tensor:
    """The probability that a place inside the truth scores higher than one outside; equal scores count half.

    Example:
        >>> import torch
        >>> truth = torch.zeros(1, 4, 2, 2, dtype=torch.bool)
        >>> truth[:, 1, 0] = True  # in frame 1, the upper two pixels
        >>> auroc(truth.float(), truth), auroc(-truth.float(), truth), auroc(torch.zeros(1, 4, 2, 2), truth)
        (tensor([1.], dtype=torch.float64), tensor([0.], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))
        >>> late = torch.arange(4.0).reshape(1, 4, 1, 1).expand(1, 4, 2, 2)  # more and more towards the end
        >>> auroc(late, truth, axis="time").item()  # frame 1 beats frame 0, and loses to 2 and 3
        0.333

    Args:
        scores: signed maps ``(B, T, H, W)``, or attributions of the clip's shape with ``layout``: pass
            ``scores.abs()`` where magnitude is meant.
        truth: bool ``(B, T, H, W)``, True where the evidence is; :func:`boxes_to_truth` makes it of boxes.
        axis: what is compared. ``"joint"``, every pixel of every frame; ``"time"``, frames by the sum of their
            scores, against those that hold any truth; ``"space"``, pixels by their sum over time, likewise.
        layout: the order of a clip's axes, such as ``"BTCHW"``, where ``scores`` have five.

    Returns:
        ``(B,)`` float64, exact: a count of pairs. 0.5 is chance, 1 is best; nan where there is nothing to compare,
        because all or none of a clip's pixels (frames, places) belong to the truth.

    Raises:
        TypeError: ``truth`` is not bool.
        ValueError: the shapes differ, scores hold nan, ``axis`` is unknown, or sums over it meet both infinities.
    """
    values, inside = compared(scores, truth, axis, layout)
    areas = [auroc_of(score[place], score[~place]) for score, place in zip(values, inside, strict=True)]
    return torch.tensor(areas, dtype=torch.float64, device=values.device)


@metric(higher_is_better=True, lowest=0.0, highest=1.0)
def average_precision(
    scores: Array, truth: Array, axis: Axis = "joint", *, layout: VideoLayout | str | None = None
) -> Tensor:
    """The area under the curve of precision over recall, as a sum of steps: where truth is rare, sterner than AUROC.

    Example:
        >>> import torch
        >>> truth = torch.tensor([True, False, True, False]).reshape(1, 4, 1, 1)
        >>> scores = torch.tensor([4.0, 3.0, 2.0, 1.0]).reshape(1, 4, 1, 1)
        >>> average_precision(scores, truth).item()  # precision is 1 at the first of the truth, 2/3 at the second
        0.833

    ``AP = sum over thresholds (R_n - R_(n-1)) P_n``, with one threshold per distinct score, so that equal scores enter
    together. That is the mean, over the places of the truth, of the precision among all that score no lower. Chance is
    about the share of the places that belong to the truth.

    Args:
        scores: as for :func:`auroc`.
        truth: bool ``(B, T, H, W)``, True where the evidence is.
        axis: what is compared, as for :func:`auroc`.
        layout: the order of a clip's axes, where ``scores`` have five.

    Returns:
        ``(B,)`` float64, 1 for a perfect ranking; nan where all or none of a clip's pixels (frames, places) belong to
        the truth.

    Raises:
        TypeError, ValueError: as for :func:`auroc`.

    Reference:
        Manning, Raghavan, Schütze, "Introduction to Information Retrieval", Cambridge University Press (2008), 8.4.
    """
    values, inside = compared(scores, truth, axis, layout)
    precisions = [_one_average_precision(score, place) for score, place in zip(values, inside, strict=True)]
    return torch.tensor(precisions, dtype=torch.float64, device=values.device)


@metric(higher_is_better=True, lowest=0.0, highest=1.0)
def pointing_game(
    scores: Array,
    truth: Array,
    tolerance: Sequence[int] = (0, 0, 0),
    *,
    per: Literal["clip", "frame"] = "clip",
    layout: VideoLayout | str | None = None,
) -> Tensor:
    """Does the map's maximum lie in the truth, or no farther from it than the tolerance?

    Example:
        >>> import torch
        >>> truth = torch.zeros(1, 4, 8, 8, dtype=torch.bool)
        >>> truth[0, 1, 2, 3] = True
        >>> scores = torch.zeros(1, 4, 8, 8)
        >>> scores[0, 1, 2, 5] = 1.0  # two columns to the right
        >>> pointing_game(scores, truth).item(), pointing_game(scores, truth, tolerance=(0, 0, 2)).item()
        (0.0, 1.0)
        >>> truth[0, 2], scores[0, 2, 7, 7] = True, 0.5  # a second frame with truth, which its own maximum hits
        >>> pointing_game(scores, truth, per="frame").item()
        0.5

    Args:
        scores: signed maps ``(B, T, H, W)``, or attributions of the clip's shape with ``layout``.
        truth: bool ``(B, T, H, W)``, True where the evidence is; :func:`boxes_to_truth` makes it of boxes.
        tolerance: how far off the maximum may be: frames, pixels down or up, pixels right or left. A box, not a ball.
            ``grid.tubelet`` of a :class:`TokenGrid` allows for the size of one token.
        per: ``"clip"``, the one maximum of the clip; ``"frame"``, each frame's own, and the share that hits of the
            frames that hold truth. The others do not count.
        layout: the order of a clip's axes, such as ``"BTCHW"``, where ``scores`` have five.

    Returns:
        ``(B,)`` float64: 1 for a hit, 0 for a miss. Where several places share the maximum, the fraction of them that
        hits, so that a map without any contrast scores what chance would, not 1. nan where a clip has no truth.

    Raises:
        TypeError: ``truth`` is not bool, or a side of ``tolerance`` no whole number.
        ValueError: the shapes differ, scores hold nan, ``tolerance`` is not three numbers of at least 0, or ``per`` is
            unknown.

    Reference:
        Zhang et al., "Top-Down Neural Attention by Excitation Backprop", IJCV 126 (2018).
    """
    check_sides("tolerance", tolerance, least=0)
    check_choice("per", per, ("clip", "frame"))
    maps, truth = _checked(scores, truth, layout)
    allowed = truth[:, None].float()  # (B, 1, T, H, W)
    for axis, size in enumerate(tolerance):  # a box is dilated one side after the other
        reach = min(int(size), truth.shape[1 + axis] - 1)
        kernel, padding = [1, 1, 1], [0, 0, 0]
        kernel[axis], padding[axis] = 2 * reach + 1, reach
        allowed = F.max_pool3d(allowed, kernel, stride=1, padding=padding)
    groups = (len(maps), maps.shape[1] if per == "frame" else 1, -1)  # one maximum in each
    hits = _hits(maps.reshape(groups), allowed.reshape(groups) > 0)
    counts = truth.reshape(groups).any(2)
    return (hits * counts).sum(1) / counts.sum(1)


@metric(higher_is_better=True, lowest=0.0, highest=1.0)
def temporal_pointing(scores: Array, truth: Array, *, layout: VideoLayout | str | None = None) -> Tensor:
    """Does the frame with the largest summed score hold any truth?

    Example:
        >>> import torch
        >>> truth = torch.zeros(1, 4, 2, 2, dtype=torch.bool)
        >>> truth[:, 2:] = True  # two clips in one window: the labeled one is the second
        >>> scores = torch.zeros(1, 4, 2, 2)
        >>> scores[0, 0, 0, 0], scores[0, 3] = 3.0, 1.0  # one bright pixel in frame 0, sum 3; all of frame 3, sum 4
        >>> temporal_pointing(scores, truth).item(), pointing_game(scores, truth).item()
        (1.0, 0.0)

    Args:
        scores: signed maps ``(B, T, H, W)``, or attributions of the clip's shape with ``layout``.
        truth: bool ``(B, T, H, W)``, True where the evidence is. A frame counts as soon as one of its pixels does.
        layout: the order of a clip's axes, such as ``"BTCHW"``, where ``scores`` have five.

    Returns:
        ``(B,)`` float64: 1 for a hit, 0 for a miss, and the fraction that hits of frames whose sums are equal. nan
        where a clip has no truth.

    Raises:
        TypeError, ValueError: as for :func:`auroc`.

    Reference:
        Adel Bargal et al., "Excitation Backprop for RNNs", CVPR (2018), on pairs of joined clips.
    """
    frames, inside = compared(scores, truth, "time", layout)
    return torch.where(inside.any(1), _hits(frames, inside), torch.nan)


def compared(scores: Array, truth: Array, axis: Axis, layout: VideoLayout | str | None) -> tuple[Tensor, Tensor]:
    """What an axis compares: scores float64 and whether each is of the truth, ``(B, N)`` both; checked."""
    check_choice("axis", axis, SPANNED)
    maps, truth = _checked(scores, truth, layout)
    if dims := tuple("BTHW".index(letter) for letter in SPANNED[axis]):
        maps, truth = maps.sum(dims), truth.any(dims)
        check_sums(maps, f"axis={axis!r}")
    return maps.flatten(1), truth.flatten(1)


def _hits(values: Tensor, inside: Tensor) -> Tensor:
    """The share of the places with the highest value that lie inside: ``(..., N)`` each to ``(...)``."""
    highest = values == values.amax(-1, keepdim=True)  # several where they tie
    return (highest & inside).sum(-1).double() / highest.sum(-1)


def auroc_of(positive: Tensor, negative: Tensor) -> float:
    """Share of the pairs of scores ``(N,)`` and ``(M,)`` in which the positive one is higher.

    Ties count half. nan where there are no pairs.
    """
    negative = negative.sort().values
    pairs = len(positive) * len(negative)
    if pairs == 0:
        return float("nan")
    below = torch.searchsorted(negative, positive)
    not_above = torch.searchsorted(negative, positive, right=True)  # a tie is in this count alone: half
    return int((below + not_above).sum()) / (2 * pairs)


def _one_average_precision(scores: Tensor, inside: Tensor) -> float:
    """Of one clip, ``(N,)`` each."""
    everywhere, positive = scores.sort().values, scores[inside].sort().values
    if len(positive) in (0, len(scores)):
        return float("nan")
    retrieved = len(scores) - torch.searchsorted(everywhere, positive)  # that score no lower, at each of the truth
    relevant = len(positive) - torch.searchsorted(positive, positive)
    return float((relevant.double() / retrieved).mean())


def _checked(scores: Array, truth: Array, layout: VideoLayout | str | None) -> tuple[Tensor, Tensor]:
    """Maps float64 and truth bool, ``(B, T, H, W)`` both and on one device."""
    maps = checked_scores(scores, "scores", layout)
    return maps, checked_mask(truth, "truth", maps)


def checked_scores(scores: Array, name: str, layout: VideoLayout | str | None) -> Tensor:
    """Maps ``(B, T, H, W)`` float64 without nan. Infinity has a rank, and may stay in maps."""
    values = as_tensor(scores, name, "B, T, H, W")
    if layout is not None:
        layout = VideoLayout.of(layout)
        layout.check_values(values, name)
        return layout.reduce(values.detach().double())
    if values.ndim != 4 or 0 in values.shape:
        raise ValueError(
            f"{name} must be maps (B, T, H, W) and not empty, got shape {tuple(values.shape)}. For attributions of "
            f"the clip's shape, pass layout='BTCHW' or 'BCTHW'."
        )
    if bad := int(values.isnan().sum()):
        raise ValueError(
            f"{bad} of the {values.numel()} {name} are nan and have no rank. Replace them first, for example with "
            f"torch.nan_to_num."
        )
    return values.detach().double()


def checked_mask(mask: Array, name: str, maps: Tensor, axes: str = "BTHW") -> Tensor:
    """A bool mask that has the sizes of maps ``(B, T, H, W)``, on their device.

    Args:
        mask: what was passed.
        name: of the argument.
        maps: of :func:`checked_scores`.
        axes: axes of the mask; an axis that maps do not have may be of any size from 1 on.
    """
    named = ", ".join(axes)
    values = as_tensor(mask, name, named)
    sizes = dict(zip("BTHW", maps.shape, strict=True))
    came = dict(zip(axes, values.shape, strict=False))
    if values.ndim != len(axes) or 0 in values.shape or any(came[axis] != size for axis, size in sizes.items()):
        wanted = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
        raise ValueError(
            f"{name} must be ({named}) = ({wanted}), as the maps it is compared with, got shape {tuple(values.shape)}. "
            f"Pass the mask of the same clips, with the frames and pixels of the maps."
        )
    if values.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {values.dtype}; pass {name} > 0")
    return values.to(maps.device)


def check_sums(sums: Tensor, over: str) -> None:
    """Raise where a sum or a mean is nan, because scores without nan were infinite in both directions."""
    if bad := int(sums.isnan().sum()):
        raise ValueError(
            f"{bad} of the {sums.numel()} sums over {over} are of infinity and -infinity, and have no rank. Replace "
            f"infinite scores first, for example with torch.nan_to_num."
        )
