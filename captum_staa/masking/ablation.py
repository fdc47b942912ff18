"""Ablation: how much the score decreases when a region is replaced by the baseline.

A region is a set of voxels that are replaced together: a position of a sliding window (:class:`Windows`), or a feature
of a mask (:class:`Features`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from captum_staa._utils.tensors import version_of

Score = Callable[[tuple[Tensor, ...], int], Tensor]
Place = tuple[int, Any]
"""The number of an input tensor, and an index into this tensor ``(B, ...)``."""


class Regions(Protocol):
    """Protocol of regions numbered 0 .. n-1, and of the map from one value per region to one value per voxel."""

    def __len__(self) -> int:
        """Return the number of regions."""
        ...

    def places(self, region: int) -> Iterator[Place]:
        """Yield the locations of the voxels of a region."""
        ...

    def spread(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return a map of each input's shape for values ``(n, B)``: at each voxel, the mean over its regions."""
        ...


class Windows:
    """Boxes that slide over each of several tensors by a stride. The last box of an axis may exceed the tensor.

    Example:
        >>> import torch
        >>> windows = Windows([(5,)], [(2,)], [(2,)])  # starts at 0, 2 and 4
        >>> len(windows), [index for _, index in windows.places(2)]
        (3, [(slice(None, None, None), slice(4, 6, None))])
        >>> windows.spread(torch.tensor([[1.0], [2.0], [3.0]]))[0]
        tensor([[1., 1., 2., 2., 3.]])
        >>> overlapping = Windows([(4,)], [(2,)], [(1,)])
        >>> overlapping.spread(torch.tensor([[1.0], [2.0], [4.0]]))[0]  # mean over the windows that contain a voxel
        tensor([[1.0000, 1.5000, 3.0000, 4.0000]])

    Args:
        sizes: size of each tensor, without the batch axis.
        windows: sides of the box along these axes, one sequence per tensor.
        strides: strides along these axes, one sequence per tensor.
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
        """Yield one box in one tensor."""
        tensor = next(i for i, end in enumerate(self.starts[1:]) if region < end)
        rest, box = region - self.starts[tensor], []
        for axis, count in zip(reversed(self.steps[tensor]), reversed(self.counts[tensor]), strict=True):
            rest, step = divmod(rest, count)
            box.append(slice(*axis[step]))
        yield tensor, (slice(None), *reversed(box))

    def spread(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return a map ``(B, *size)`` per tensor: at each voxel, the mean over its boxes.

        A box is a product of intervals, so the mean over boxes factorizes into one small matrix per axis. The product
        is computed in float64 on the CPU, where settings of the matmul precision have no effect.
        """
        exact = values.detach().to("cpu", torch.float64)
        maps = []
        for size, axes, counts, start in zip(self.sizes, self.steps, self.counts, self.starts, strict=False):
            part = exact[start : start + prod(counts)].T.unflatten(1, counts)  # (B, n_1, ..., n_d)
            for axis, length in zip(axes, size, strict=True):
                part = torch.tensordot(part, _averaging(axis, length), dims=([1], [0]))  # moves this axis to the end
            maps.append(part.to(values.dtype).to(values.device))
        return tuple(maps)


class Features:
    """Features of masks. A feature may span several tensors and may have another location in each clip.

    Example:
        >>> import torch
        >>> features = Features([torch.tensor([[0, 0, 1]]), torch.tensor([[1, 2]])], [(2, 3), (2, 2)])
        >>> len(features), [(tensor, index[1]) for tensor, index in features.places(1)]
        (3, [(0, slice(2, 3, None)), (1, slice(0, 1, None))])
        >>> features.spread(torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]))[1]
        tensor([[ 2.,  3.],
                [20., 30.]])

    Args:
        masks: ids 0 .. n-1, one tensor per input, with the input's number of axes and broadcastable to it.
        sizes: size of each input, ``(B, ...)``.
    """

    def __init__(self, masks: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> None:
        self.masks, self.sizes = masks, sizes
        self.count = 1 + max(int(mask.max()) for mask in masks)
        # Sort the voxels by id once. Each feature is then a contiguous range, and needs no comparison over all voxels.
        self.order = [mask.flatten().argsort(stable=True) for mask in masks]
        counts = [torch.bincount(mask.flatten(), minlength=self.count) for mask in masks]
        self.ends = [[0, *count.cumsum(0).tolist()] for count in counts]

    def __len__(self) -> int:
        return self.count

    def places(self, region: int) -> Iterator[Place]:
        """Yield the locations of a feature. Axes along which the mask is broadcast are selected whole."""
        for tensor, (mask, order, ends) in enumerate(zip(self.masks, self.order, self.ends, strict=True)):
            voxels = order[ends[region] : ends[region + 1]]
            if len(voxels):
                index = _box(mask, voxels) or torch.unravel_index(voxels, mask.shape)
                whole = [slice(None) if side == 1 else i for side, i in zip(mask.shape, index, strict=True)]
                yield tensor, tuple(whole)

    def spread(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return a map ``(B, ...)`` per tensor: each voxel gets the value of its feature in its clip."""
        rows = values.T  # (B, n)
        maps = []
        for mask, size in zip(self.masks, self.sizes, strict=True):
            ids = mask.expand(len(rows), *mask.shape[1:])
            part = rows.take_along_dim(ids.flatten(1), 1).view(ids.shape)
            maps.append(part.expand(tuple(size)).contiguous())
        return tuple(maps)


@torch.no_grad()
def ablate(
    score: Score,
    inputs: tuple[Tensor, ...],
    baselines: tuple[Tensor, ...],
    regions: Regions,
    perturbations_per_eval: int,
    tick: Callable[[], object],
) -> Tensor:
    """Return the decrease of the score for every region and example.

    The batch of copies is allocated once. For each region, only its voxels are written, and restored afterwards. The
    cost outside the model is therefore proportional to the size of the region and not to the size of the clip.

    Args:
        score: function from inputs of ``copies * B`` examples and ``copies`` to scores ``(copies, B)``.
        inputs: tensors ``(B, ...)``. The model receives copies, never these tensors.
        baselines: replacement values, one tensor per input, of the same shape.
        regions: the sets of voxels that are replaced together.
        perturbations_per_eval: regions per call of the model. It changes memory and time, not the result.
        tick: called after every call of the model.

    Returns:
        ``(n, B)``, the score of the unperturbed inputs minus the score without the region.
    """
    count = len(regions)
    copies = min(perturbations_per_eval, count)
    batch = [_copies(value.detach(), copies) for value in inputs]  # (copies, B, ...)

    def write(values: tuple[Tensor, ...], chunk: list[list[Place]]) -> None:
        for row, places in enumerate(chunk):
            for tensor, where in places:
                batch[tensor][row][where] = values[tensor][where]

    def call(rows: int) -> Tensor:
        """Return the scores ``(rows, B)`` of the first copies. Restore the copies if the model wrote into them."""
        before = [version_of(copy) for copy in batch]
        some = tuple(copy[:rows].flatten(0, 1) for copy in batch)
        value = score(some, rows).clone()  # the model's output may be a view of its input
        for copy, original, version in zip(batch, inputs, before, strict=True):
            if version is None or version_of(copy) != version:
                copy.copy_(original)
        tick()
        return value

    whole = call(1)
    decreases = []
    for first in range(0, count, copies):
        chunk = [list(regions.places(region)) for region in range(first, min(first + copies, count))]
        write(baselines, chunk)
        decreases.append(whole - call(len(chunk)))
        write(inputs, chunk)
    return torch.cat(decreases)


def _copies(value: Tensor, count: int) -> Tensor:
    """Return copies ``(count, ...)`` with the axes in the same order in memory as those of ``value``.

    If ``value`` is a permuted view of a clip, the model then gets the copies in its own order without another copy.
    """
    strides = torch.empty_like(value).stride()
    batch = torch.empty_strided(
        (count, *value.shape), (value.numel(), *strides), dtype=value.dtype, device=value.device
    )
    return batch.copy_(value)


def _steps(size: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Return (start, end) of each step of a window along one axis. Slices cut the last step off at the border."""
    last = -(-(size - window) // stride)
    return [(step * stride, step * stride + window) for step in range(last + 1)]


def _averaging(steps: list[tuple[int, int]], size: int) -> Tensor:
    """Return a matrix ``(n, size)`` whose columns average over the steps that contain a position."""
    weights = torch.zeros(len(steps), size, dtype=torch.float64)
    for row, (start, end) in zip(weights, steps, strict=True):
        row[start:end] = 1
    return weights / weights.sum(0)


def _box(mask: Tensor, voxels: Tensor) -> tuple[slice, ...] | None:
    """Return a feature's voxels as slices, which are much faster to write than indices. None if they are not a box."""
    corners = torch.unravel_index(voxels[[0, -1]], mask.shape)
    box = tuple(slice(first, last + 1) for first, last in (axis.tolist() for axis in corners))
    inside = mask[box]
    whole = inside.numel() == len(voxels) and bool((inside == inside.flatten()[0]).all())
    return box if whole else None
