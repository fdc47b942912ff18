"""What a learned mask is made of: numbers on a coarse grid, or one per region, spread over the voxels of a clip."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor

Size = tuple[int, int, int]


class Field(Protocol):
    """``n`` numbers per clip, and the voxels that they stand for.

    Attributes:
        shares: ``(1 or B, n)``, the part of the clip's volume that each number stands for; rows sum to 1. The mean of
            a spread mask is the mean of its numbers weighed by these, so that areas can be kept on the numbers alone.
        slices: how many groups of equally many numbers follow each other in time; 1 where they have no such order.
    """

    shares: Tensor
    slices: int

    def spread(self, values: Tensor) -> Tensor:
        """Numbers ``(B, P, n)`` to masks ``(B, P, T, H, W)``."""
        ...

    def gather(self, maps: Tensor) -> Tensor:
        """Maps ``(B, T, H, W)`` to numbers ``(B, n)``: means over the voxels that each stands for."""
        ...


class GridField:
    """Numbers at the middles of ``t x h x w`` equal cells, linear in between, level beyond the outermost.

    Nothing lies outside the frames, and no cell is seen in part only.

    Example:
        >>> field = GridField((1, 1, 4), (1, 1, 2))  # four pixels, two cells of two pixels
        >>> field.spread(torch.tensor([[[0.0, 1.0]]])).flatten()
        tensor([0.0000, 0.2500, 0.7500, 1.0000])
        >>> field.shares, field.gather(torch.tensor([0.0, 0.0, 1.0, 1.0]).view(1, 1, 1, 4))
        (tensor([[0.5000, 0.5000]]), tensor([[0.1250, 0.8750]]))

    Args:
        size: frames, height and width of the clip.
        cells: ``(t, h, w)``, how many along each; no more than there are frames and pixels.
        like: dtype and device of the numbers.
    """

    def __init__(self, size: Size, cells: Size, like: Tensor | None = None) -> None:
        like = torch.empty(0) if like is None else like
        self.cells = cells
        self.weights = [_linear(*pair).to(like) for pair in zip(size, cells, strict=True)]  # (pixels, cells) per axis
        self.means = [(axis / axis.sum(0)).T.contiguous() for axis in self.weights]
        t, h, w = (axis.mean(0) for axis in self.weights)
        self.shares = (t[:, None, None] * h[:, None] * w).reshape(1, -1)
        self.slices = cells[0]

    def spread(self, values: Tensor) -> Tensor:
        """Trilinear interpolation, one axis after the other."""
        return _along_axes(values.unflatten(-1, self.cells), self.weights)

    def gather(self, maps: Tensor) -> Tensor:
        """The mean of each cell, weighed as :meth:`spread` weighs it."""
        return _along_axes(maps, self.means).flatten(1)


class RegionField:
    """One number per region of a feature mask: supervoxels, tubelets, whole frames.

    Example:
        >>> field = RegionField(torch.tensor([0, 0, 0, 1]).view(1, 4, 1, 1))  # three frames, and a fourth
        >>> field.spread(torch.tensor([[[0.5, 1.0]]])).flatten(), field.shares
        (tensor([0.5000, 0.5000, 0.5000, 1.0000]), tensor([[0.7500, 0.2500]]))

    Args:
        ids: ``(1 or B, T, H, W)`` int64, 0 .. n-1. A region may be missing from a clip: its share there is 0.
        like: dtype and device of the numbers.
    """

    def __init__(self, ids: Tensor, like: Tensor | None = None) -> None:
        like = torch.empty(0) if like is None else like
        self.ids = ids.to(like.device)
        self.rows = self.ids.flatten(1)  # (1 or B, voxels)
        self.counts = torch.zeros(len(ids), int(ids.max()) + 1, dtype=like.dtype, device=like.device)
        self.counts.scatter_add_(1, self.rows, torch.ones_like(self.rows, dtype=like.dtype))
        self.shares = self.counts / prod(ids.shape[1:])
        self.slices = 1

    def spread(self, values: Tensor) -> Tensor:
        """Each voxel gets the number of its region."""
        rows = self.rows[:, None].expand(*values.shape[:2], -1)
        return values.gather(2, rows).unflatten(2, self.ids.shape[1:])

    def gather(self, maps: Tensor) -> Tensor:
        """The mean of each region, 0 where a clip has it not."""
        values = maps.flatten(1)
        sums = values.new_zeros(len(values), self.counts.shape[1])
        return sums.scatter_add(1, self.rows.expand_as(values), values) / self.counts.clamp_min(1)


def _linear(pixels: int, cells: int) -> Tensor:
    """``(pixels, cells)`` float64: how much of each cell's number a pixel gets; rows sum to 1."""
    place = ((torch.arange(pixels, dtype=torch.float64) + 0.5) * cells / pixels - 0.5).clamp(0, cells - 1)
    return (1 - (place[:, None] - torch.arange(cells)).abs()).clamp_min(0)


def _along_axes(values: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """``(..., t, h, w)`` to ``(..., T, H, W)``. Time comes first, while frames are still small."""
    time, height, width = matrices
    frames = torch.einsum("...thw,Tt->...Thw", values, time)
    return height @ frames @ width.T
