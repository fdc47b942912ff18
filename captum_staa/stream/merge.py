"""The one rule by which maps of overlapping windows become one map per frame: their mean."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Merged:
    """What several windows say of each frame, merged by the mean over the windows that saw it.

    Example:
        >>> merged = Merged()
        >>> for start, level in ((0, 1.0), (2, 3.0)):
        ...     merged.add(range(start, start + 4), torch.full((4, 1, 1), level), torch.full((4,), level))
        >>> indices, (joint, temporal) = merged.result()
        >>> indices, temporal.tolist()
        ([0, 1, 2, 3, 4, 5], [1.0, 1.0, 2.0, 2.0, 3.0, 3.0])
        >>> merged.take(3)[1].item(), merged.count(3), len(merged)
        (2.0, 0, 5)
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[int, tuple[Tensor, ...]]] = {}  # by frame: how many windows, and their sums

    def __len__(self) -> int:
        return len(self._held)

    def add(self, indices: Iterable[int], *parts: Tensor) -> None:
        """One window's parts, each ``(T, ...)``. Each frame's mean stays right wherever an interrupt falls."""
        for index, *ones in zip(indices, *parts, strict=True):
            count, sums = self._held.get(index, (0, ()))
            added = tuple(total + one for total, one in zip(sums, ones, strict=True)) if count else tuple(ones)
            self._held[index] = (count + 1, added)

    def count(self, index: int) -> int:
        """How many windows saw this frame."""
        return self._held[index][0] if index in self._held else 0

    def mean(self, index: int) -> tuple[Tensor, ...]:
        """One frame's parts, each without the axis of time."""
        count, sums = self._held[index]
        return tuple(total / count for total in sums)

    def take(self, index: int) -> tuple[Tensor, ...]:
        """:meth:`mean`, and forget the frame."""
        parts = self.mean(index)
        del self._held[index]
        return parts

    def result(self) -> tuple[list[int], list[Tensor]]:
        """All frames' indices in order, and each part ``(frames, ...)``."""
        indices = sorted(self._held)
        return indices, [torch.stack(part) for part in zip(*map(self.mean, indices), strict=True)]
