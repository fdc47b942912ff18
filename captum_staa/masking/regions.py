"""Which voxels are altered together: windows that slide over a clip, or the features of a mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

Place = tuple[int, Any]
"""Which input tensor, and an index into its ``(B, ...)``."""


class Regions(Protocol):
    """Regions numbered 0 .. n-1, and the way back from one value per region to one per voxel."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def places(self, region: int) -> Iterator[Place]:
        """Where the voxels of a region lie."""
        ...

    def spread(self, values: Tensor) -> tuple[Tensor, ...]:
        """Values per region ``(n, B)`` to a map of each input's shape: the mean over the regions at each voxel."""
        ...


class Windows:
    """Boxes that slide over each of several tensors by a stride; the last one of an axis may stick out.

    Example:
        >>> import torch
        >>> windows = Windows([(5,)], [(2,)], [(2,)])  # starts at 0, 2 and 4
        >>> len(windows), [index for _, index in windows.places(2)]
        (3, [(slice(None, None, None), slice(4, 6, None))])
        >>> windows.spread(torch.tensor([[1.0], [2.0], [3.0]]))[0]
        tensor([[1., 1., 2., 2., 3.]])
        >>> overlapping = Windows([(4,)], [(2,)], [(1,)])
        >>> overlapping.spread(torch.tensor([[1.0], [2.0], [4.0]]))[0]  # the mean of the windows over a voxel
        tensor([[1.0000, 1.5000, 3.0000, 4.0000]])

    Args:
        sizes: of each tensor, its axes after the batch.
        windows: sides of the box along these axes.
        strides: steps along these axes.
    """

    def __init__(
        self, sizes: Sequence[Sequence[int]], windows: Sequence[Sequence[int]], strides: Sequence[Sequence[int]]
    ) -> None:
        # per tensor and axis, the (start, end) of every step
        self.steps = [
            [_steps(*axis) for axis in zip(size, window, stride, strict=True)]
            for size, window, stride in zip(sizes, windows, strides, strict=True)
        ]
        self.counts = [[len(axis) for axis in axes] for axes in self.steps]
        self.sizes = sizes
        self.starts = [0, *accumulate(prod(counts) for counts in self.counts)]

    def __len__(self) -> int:
        return self.starts[-1]

    def places(self, region: int) -> Iterator[Place]:
        """One box in one tensor."""
        tensor = next(i for i, end in enumerate(self.starts[1:]) if region < end)
        rest, box = region - self.starts[tensor], []
        for axis, count in zip(reversed(self.steps[tensor]), reversed(self.counts[tensor]), strict=True):
            rest, step = divmod(rest, count)
            box.append(slice(*axis[step]))
        yield tensor, (slice(None), *reversed(box))

    def spread(self, values: Tensor) -> tuple[Tensor, ...]:
        """``(B, *size)`` per tensor.

        A box is a product of intervals, so the mean over all boxes at a voxel is one small matrix per axis. They are
        multiplied in float64 on the CPU, where no setting of matmul precision reaches.
        """
        exact = values.detach().to("cpu", torch.float64)
        maps = []
        for size, axes, counts, start in zip(self.sizes, self.steps, self.counts, self.starts, strict=False):
            part = exact[start : start + prod(counts)].T.unflatten(1, counts)  # (B, n_1, ..., n_d)
            for axis, length in zip(axes, size, strict=True):
                part = torch.tensordot(part, _cover(axis, length), dims=([1], [0]))  # the first axis, done, goes last
            maps.append(part.to(values.dtype).to(values.device))
        return tuple(maps)


class Features:
    """The features of masks, each perhaps in several tensors, perhaps elsewhere in every clip.

    Example:
        >>> import torch
        >>> features = Features([torch.tensor([[0, 0, 1]]), torch.tensor([[1, 2]])], [(2, 3), (2, 2)])
        >>> len(features), [(tensor, index[1]) for tensor, index in features.places(1)]
        (3, [(0, slice(2, 3, None)), (1, slice(0, 1, None))])
        >>> features.spread(torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]))[1]
        tensor([[ 2.,  3.],
                [20., 30.]])

    Args:
        masks: ids 0 .. n-1, of as many axes as the input and broadcastable to it.
        sizes: of each input, ``(B, ...)``.
    """

    def __init__(self, masks: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> None:
        self.masks, self.sizes = masks, sizes
        self.count = 1 + max(int(mask.max()) for mask in masks)
        # voxels sorted by id once, so that a feature is a stretch of them: nothing is compared with every id
        self.order = [mask.flatten().argsort(stable=True) for mask in masks]
        counts = [torch.bincount(mask.flatten(), minlength=self.count) for mask in masks]
        self.ends = [[0, *count.cumsum(0).tolist()] for count in counts]

    def __len__(self) -> int:
        return self.count

    def places(self, region: int) -> Iterator[Place]:
        """Axes along which a mask is broadcast stay whole."""
        for tensor, (mask, order, ends) in enumerate(zip(self.masks, self.order, self.ends, strict=True)):
            voxels = order[ends[region] : ends[region + 1]]
            if len(voxels):
                index = _box(mask, voxels) or torch.unravel_index(voxels, mask.shape)
                whole = [slice(None) if side == 1 else i for side, i in zip(mask.shape, index, strict=True)]
                yield tensor, tuple(whole)

    def spread(self, values: Tensor) -> tuple[Tensor, ...]:
        """``(B, ...)`` per tensor: each voxel gets the value of its own feature in its own clip."""
        rows = values.T  # (B, n)
        maps = []
        for mask, size in zip(self.masks, self.sizes, strict=True):
            ids = mask.expand(len(rows), *mask.shape[1:])
            part = rows.take_along_dim(ids.flatten(1), 1).view(ids.shape)
            maps.append(part.expand(tuple(size)).contiguous())
        return tuple(maps)


def _steps(size: int, window: int, stride: int) -> list[tuple[int, int]]:
    """(start, end) of a window on each of its steps along one axis; slices cut the last one off at the border."""
    last = -(-(size - window) // stride)
    return [(step * stride, step * stride + window) for step in range(last + 1)]


def _cover(steps: list[tuple[int, int]], size: int) -> Tensor:
    """``(n, size)``: each column averages over the steps that cover its position."""
    cover = torch.zeros(len(steps), size, dtype=torch.float64)
    for row, (start, end) in zip(cover, steps, strict=True):
        row[start:end] = 1
    return cover / cover.sum(0)


def _box(mask: Tensor, voxels: Tensor) -> tuple[slice, ...] | None:
    """A feature's voxels as slices, which are many times faster to write than a list; None where they are no box."""
    corners = torch.unravel_index(voxels[[0, -1]], mask.shape)
    box = tuple(slice(first, last + 1) for first, last in (axis.tolist() for axis in corners))
    inside = mask[box]
    whole = inside.numel() == len(voxels) and bool((inside == inside.flatten()[0]).all())
    return box if whole else None
