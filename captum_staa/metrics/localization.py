"""Does an attribution lie where the evidence is known to be?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_staa.metrics._metric import metric

Axis = Literal["joint", "time", "space"]
_SUMMED: dict[str, tuple[int, ...]] = {"joint": (), "time": (2, 3), "space": (1,)}


@metric(higher_is_better=True, lowest=0.0, highest=1.0)
def auroc(scores: Tensor, truth: Tensor, axis: Axis = "joint") -> Tensor:
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
        scores: signed maps ``(B, T, H, W)``: pass ``maps.abs()`` where magnitude is meant.
        truth: bool ``(B, T, H, W)``, True where the evidence is.
        axis: what is compared. ``"joint"``, every pixel of every frame; ``"time"``, frames by the sum of their
            scores, against those that hold any truth; ``"space"``, pixels by their sum over time, likewise.

    Returns:
        ``(B,)`` float64, exact: a count of pairs. 0.5 is chance, 1 is best; nan where there is nothing to compare,
        because all or none of a clip's pixels (frames, places) belong to the truth.

    Raises:
        TypeError: ``truth`` is not bool.
        ValueError: the shapes differ, scores hold nan, or ``axis`` is unknown.
    """
    _check(scores, truth)
    if axis not in _SUMMED:
        raise ValueError(f"axis is one of {', '.join(map(repr, _SUMMED))}, but {axis!r} came")
    if dims := _SUMMED[axis]:
        scores, truth = scores.double().sum(dims), truth.flatten(2).any(2) if axis == "time" else truth.any(1)
    values = [_one_auroc(score, inside) for score, inside in zip(scores.flatten(1), truth.flatten(1), strict=True)]
    return torch.tensor(values, dtype=torch.float64, device=scores.device)


@metric(higher_is_better=True, lowest=0.0, highest=1.0)
def pointing_game(scores: Tensor, truth: Tensor, tolerance: Sequence[int] = (0, 0, 0)) -> Tensor:
    """Does the map's maximum lie in the truth, or no farther from it than the tolerance?

    Example:
        >>> import torch
        >>> truth = torch.zeros(1, 4, 8, 8, dtype=torch.bool)
        >>> truth[0, 1, 2, 3] = True
        >>> scores = torch.zeros(1, 4, 8, 8)
        >>> scores[0, 1, 2, 5] = 1.0  # two columns to the right
        >>> pointing_game(scores, truth).item(), pointing_game(scores, truth, tolerance=(0, 0, 2)).item()
        (0.0, 1.0)

    Args:
        scores: signed maps ``(B, T, H, W)``.
        truth: bool ``(B, T, H, W)``, True where the evidence is.
        tolerance: how far off the maximum may be: frames, pixels down or up, pixels right or left. A box, not a ball.

    Returns:
        ``(B,)`` float64: 1 for a hit, 0 for a miss. Where several places share the maximum, the fraction of them that
        hits, so that a map without any contrast scores what chance would, not 1. nan where a clip has no truth.

    Raises:
        TypeError: ``truth`` is not bool.
        ValueError: the shapes differ, scores hold nan, or ``tolerance`` is not three whole numbers of at least 0.
    """
    _check(scores, truth)
    if len(tolerance) != 3 or any(int(size) != size or size < 0 for size in tolerance):
        raise ValueError(
            f"tolerance is (frames, pixels in height, pixels in width), whole and at least 0, but {tolerance!r} came"
        )
    allowed = truth[:, None].float()  # (B, 1, T, H, W)
    for axis, size in enumerate(int(size) for size in tolerance):  # a box is dilated one side after the other
        reach = min(size, truth.shape[1 + axis] - 1)
        kernel, padding = [1, 1, 1], [0, 0, 0]
        kernel[axis], padding[axis] = 2 * reach + 1, reach
        allowed = F.max_pool3d(allowed, kernel, stride=1, padding=padding)
    flat, inside = scores.flatten(1), allowed.flatten(1).double()
    highest = (flat == flat.amax(1, keepdim=True)).double()  # (B, T * H * W), several where they tie
    share = (highest * inside).sum(1) / highest.sum(1)
    return torch.where(truth.flatten(1).any(1), share, torch.nan)


def _one_auroc(scores: Tensor, inside: Tensor) -> float:
    """Of one clip, ``(N,)`` each."""
    positive, negative = scores[inside].contiguous(), scores[~inside].sort().values
    pairs = len(positive) * len(negative)
    if pairs == 0:
        return float("nan")
    below = torch.searchsorted(negative, positive)
    not_above = torch.searchsorted(negative, positive, right=True)  # a tie is in this count alone: half
    return int((below + not_above).sum()) / (2 * pairs)


def _check(scores: Tensor, truth: Tensor) -> None:
    for name, value in (("scores", scores), ("truth", truth)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor (B, T, H, W), but {type(value).__name__} came")
    if scores.ndim != 4 or scores.shape != truth.shape or 0 in scores.shape:
        raise ValueError(
            f"scores and truth must both be (B, T, H, W) and not empty, but {tuple(scores.shape)} and "
            f"{tuple(truth.shape)} came; space_time(attributions, layout).joint has this shape"
        )
    if truth.dtype != torch.bool:
        raise TypeError(f"truth must be bool, but {truth.dtype} came; pass truth > 0")
    if bool(scores.isnan().any()):
        raise ValueError(f"{int(scores.isnan().sum())} of the {scores.numel()} scores are nan and have no rank")
