"""Attention focusing: suppress noise below a threshold that is computed from the map."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_staa._utils.checks import check_choice, is_number


@dataclass(frozen=True)
class Focus:
    """Suppress values below a dynamic threshold, consistently in space and time.

    The published code draws its threshold at random between two percentiles of each frame. This class computes the
    threshold from the clip: between the same percentiles, where the values of the map split best. The mean of its
    neighborhood is compared with the threshold, so an isolated voxel counts as noise. The map is multiplied by a
    smooth gate in (0, 1), so no value becomes zero and the result is deterministic.

    Example:
        >>> import torch
        >>> noise = torch.rand(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> noise[0, 2:5, 4:9, 4:9] += 2.0  # evidence
        >>> focused = Focus()(noise, neighborhood=(3, 3, 3))
        >>> inside, outside = focused[0, 3, 6, 6] / noise[0, 3, 6, 6], focused[0, 7, 15, 15] / noise[0, 7, 15, 15]
        >>> bool(inside > 0.9), bool(outside < 0.25)
        (True, True)

    Args:
        low: lower bound of the threshold, as a percentile of the clip's values, 0 to 100.
        high: upper bound of the threshold, as a percentile, ``low`` to 100.
        split: ``"otsu"`` maximizes the variance between the two sides (Otsu, 1979); ``"knee"`` takes the point of
            the sorted values farthest below their chord; ``"middle"`` takes the mean of the two percentiles.
        sharpness: slope of the gate, above 0. Its unit is the distance from the threshold to the start of the topmost
            fifth of the values above ``high``.

    Raises:
        ValueError: percentiles are out of order, ``split`` is unknown, or ``sharpness`` is not positive and finite.
        TypeError: ``low``, ``high`` or ``sharpness`` is not a number.
    """

    low: float = 70.0
    high: float = 90.0
    split: Literal["otsu", "knee", "middle"] = "otsu"
    sharpness: float = 2.0

    def __post_init__(self) -> None:
        for name in ("low", "high", "sharpness"):
            if not is_number(value := getattr(self, name)):
                raise TypeError(f"{name} must be a number, got {value!r}. Pass an int or a float.")
        if not 0 <= self.low <= self.high <= 100:
            raise ValueError(
                f"percentiles must satisfy 0 <= low <= high <= 100, got low={self.low}, high={self.high}. Use, for "
                f"example, low=70, high=90."
            )
        check_choice("split", self.split, _SPLITS)
        if not 0 < self.sharpness < inf:
            raise ValueError(f"sharpness must be positive and finite, got {self.sharpness}. Use, for example, 2.0.")

    def threshold(self, maps: Tensor) -> Tensor:
        """Return the threshold of each clip, ``(B,)``, for non-negative maps ``(B, T, H, W)``."""
        ordered = maps.flatten(1).sort(1).values
        last = ordered.shape[1] - 1
        low, high = (ordered[:, round(last * p / 100)] for p in (self.low, self.high))
        return _SPLITS[self.split](ordered, low, high).clamp(min=low, max=high)

    def __call__(self, maps: Tensor, neighborhood: tuple[int, int, int]) -> Tensor:
        """Return the focused maps, ``(B, T, H, W)``.

        Args:
            maps: non-negative, ``(B, T, H, W)``.
            neighborhood: odd sizes ``(frames, pixels, pixels)`` of the box around a voxel. Its mean is compared with
                the threshold. About one tubelet is a good choice.
        """
        smoothed = _box_mean(maps, neighborhood)
        level = self.threshold(smoothed)
        ordered = smoothed.flatten(1).sort(1).values
        # Evidence fills only a few percent of a clip. A gate that is open at `high` would also keep the halo around it.
        # So the gate is half open at a quarter of the distance from the threshold to the start of the topmost values.
        top = ordered[:, round((ordered.shape[1] - 1) * (400 + self.high) / 500)]
        # The values of a constant map differ by rounding only, and the gate must not amplify these differences.
        rounding = 1e3 * torch.finfo(maps.dtype).eps * ordered[:, -1] + torch.finfo(maps.dtype).tiny
        scale = (top - level).clamp(min=rounding)
        shape = (-1, 1, 1, 1)
        gate = torch.sigmoid(2 * self.sharpness * ((smoothed - level.view(shape)) / scale.view(shape) - 0.25))
        return maps * gate


def _otsu(ordered: Tensor, low: Tensor, high: Tensor) -> Tensor:
    count = ordered.shape[1]
    below = torch.arange(1, count, device=ordered.device, dtype=ordered.dtype)  # values below each candidate cut
    total = ordered.cumsum(1)
    mean_below = total[:, :-1] / below
    mean_above = (total[:, -1:] - total[:, :-1]) / (count - below)
    between = below * (count - below) * (mean_above - mean_below) ** 2
    inside = (ordered[:, :-1] >= low[:, None]) & (ordered[:, :-1] <= high[:, None])
    return _at(ordered, between.where(inside, between.new_tensor(-1.0)).argmax(1))


def _knee(ordered: Tensor, low: Tensor, high: Tensor) -> Tensor:
    chord = torch.linspace(0, 1, ordered.shape[1], device=ordered.device, dtype=ordered.dtype)
    span = (ordered[:, -1:] - ordered[:, :1]).clamp(min=torch.finfo(ordered.dtype).tiny)
    return _at(ordered, (chord - (ordered - ordered[:, :1]) / span).argmax(1))


def _middle(ordered: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (low + high) / 2


def _at(ordered: Tensor, index: Tensor) -> Tensor:
    return ordered.gather(1, index[:, None])[:, 0]


_SPLITS = {"otsu": _otsu, "knee": _knee, "middle": _middle}


def _box_mean(maps: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    if any(size < 1 or size % 2 == 0 for size in sizes):
        raise ValueError(f"neighborhood sizes must be odd and positive, got {sizes}. Use, for example, (3, 9, 9).")
    padding = [size // 2 for size in sizes]
    return F.avg_pool3d(maps[:, None], sizes, stride=1, padding=padding, count_include_pad=False)[:, 0]
