"""Mask grids: they expand ``n`` values per clip, one per coarse cell or region, to a mask over the clip's voxels."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from captum_staa._utils.tensors import gaussian, without_autocast

Size = tuple[int, int, int]


class MaskGrid(Protocol):
    """Protocol of a mask grid: ``n`` values per clip, and the voxels that each value covers.

    Attributes:
        size: frames, height and width of the clip.
        shares: ``(1 or B, n)``, the fraction of the clip's volume that each value covers; rows sum to 1. The mean of a
            mask over voxels is the mean of its values weighted by the shares, so the area of a mask can be computed
            from the ``n`` values.
        slices: number of time slices. The values are ordered by slice, with the same number in each. It is 1 if the
            values are not ordered by time.
    """

    size: Size
    shares: Tensor
    slices: int

    def spread(self, values: Tensor) -> Tensor:
        """Return masks ``(B, P, T, H, W)`` for values ``(B, P, n)``."""
        ...

    def gather(self, maps: Tensor) -> Tensor:
        """Return values ``(B, n)`` for maps ``(B, T, H, W)``: each is the mean over the voxels that it covers."""
        ...

    def smooth(self, values: Tensor, time: float, space: float) -> Tensor:
        """Return values ``(B, n)`` averaged over neighbors, if the grid knows them.

        The standard deviations along time, and along height and width, are in cells.
        """
        ...


class CellGrid:
    """Grid of ``t x h x w`` equal cells: linear interpolation between the cell centers, constant beyond the outermost.

    All cells lie entirely within the clip.

    Example:
        >>> grid = CellGrid((1, 1, 4), (1, 1, 2))  # four pixels, two cells of two pixels
        >>> grid.spread(torch.tensor([[[0.0, 1.0]]])).flatten()
        tensor([0.0000, 0.2500, 0.7500, 1.0000])
        >>> grid.shares, grid.gather(torch.tensor([0.0, 0.0, 1.0, 1.0]).view(1, 1, 1, 4))
        (tensor([[0.5000, 0.5000]]), tensor([[0.1250, 0.8750]]))

    Args:
        size: frames, height and width of the clip.
        cells: ``(t, h, w)``, number of cells per axis, at most one per frame or pixel.
        like: tensor with the dtype and device of the values. None means float32 on the CPU.
    """

    def __init__(self, size: Size, cells: Size, like: Tensor | None = None) -> None:
        like = torch.empty(0) if like is None else like
        self.size, self.cells = size, cells
        self.weights = [_linear(*pair).to(like) for pair in zip(size, cells, strict=True)]  # (pixels, cells) per axis
        self.means = [(axis / axis.sum(0)).T.contiguous() for axis in self.weights]
        t, h, w = (axis.mean(0) for axis in self.weights)
        self.shares = (t[:, None, None] * h[:, None] * w).reshape(1, -1)
        self.slices = cells[0]

    def spread(self, values: Tensor) -> Tensor:
        """Return masks ``(B, P, T, H, W)``: trilinear interpolation of values ``(B, P, n)``."""
        return _along_axes(values.unflatten(-1, self.cells), self.weights)

    def gather(self, maps: Tensor) -> Tensor:
        """Return the mean of maps ``(B, T, H, W)`` over each cell, ``(B, n)``, with the weights of :meth:`spread`."""
        return _along_axes(maps, self.means).flatten(1)

    def smooth(self, values: Tensor, time: float, space: float) -> Tensor:
        """Return values ``(B, n)`` blurred with these standard deviations along time, and along height and width."""
        return gaussian(values.unflatten(1, self.cells), (time, space, space)).flatten(1)


class RegionGrid:
    """Grid of one value per region of a feature mask, such as supervoxels, tubelets or whole frames.

    Example:
        >>> grid = RegionGrid(torch.tensor([0, 0, 0, 1]).view(1, 4, 1, 1))  # frames 0 to 2, and frame 3
        >>> grid.spread(torch.tensor([[[0.5, 1.0]]])).flatten(), grid.shares
        (tensor([0.5000, 0.5000, 0.5000, 1.0000]), tensor([[0.7500, 0.2500]]))

    Args:
        ids: ``(1 or B, T, H, W)`` int64, 0 .. n-1. A region that is missing from a clip has share 0 there.
        like: tensor with the dtype and device of the values. None means float32 on the CPU.
    """

    def __init__(self, ids: Tensor, like: Tensor | None = None) -> None:
        like = torch.empty(0) if like is None else like
        self.ids = ids.to(like.device)
        self.rows = self.ids.flatten(1)  # (1 or B, voxels)
        self.counts = torch.zeros(len(ids), int(ids.max()) + 1, dtype=like.dtype, device=like.device)
        self.counts.scatter_add_(1, self.rows, torch.ones_like(self.rows, dtype=like.dtype))
        self.shares = self.counts / prod(ids.shape[1:])
        self.size: Size = (ids.shape[1], ids.shape[2], ids.shape[3])
        self.slices = 1

    def spread(self, values: Tensor) -> Tensor:
        """Return masks ``(B, P, T, H, W)``: each voxel gets the value of its region, from values ``(B, P, n)``."""
        rows = self.rows[:, None].expand(*values.shape[:2], -1)
        return values.gather(2, rows).unflatten(2, self.ids.shape[1:])

    def gather(self, maps: Tensor) -> Tensor:
        """Return the mean of maps ``(B, T, H, W)`` over each region, ``(B, n)``; 0 for a region missing from a clip."""
        values = maps.flatten(1)
        sums = values.new_zeros(len(values), self.counts.shape[1])
        return sums.scatter_add(1, self.rows.expand_as(values), values) / self.counts.clamp_min(1)

    def smooth(self, values: Tensor, time: float, space: float) -> Tensor:
        """Return the values: a region is one object already."""
        return values


def _linear(pixels: int, cells: int) -> Tensor:
    """Return interpolation weights ``(pixels, cells)`` in float64, from cells to pixels; rows sum to 1."""
    place = ((torch.arange(pixels, dtype=torch.float64) + 0.5) * cells / pixels - 0.5).clamp(0, cells - 1)
    return (1 - (place[:, None] - torch.arange(cells)).abs()).clamp_min(0)


def _along_axes(values: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Return ``(..., T, H, W)`` for ``(..., t, h, w)``. Time is expanded first, while the frames are still small."""
    time, height, width = matrices
    with without_autocast(values):
        frames = torch.einsum("...thw,Tt->...Thw", values, time)
        return height @ frames @ width.T
