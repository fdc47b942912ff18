"""Parametrizations: how masks are computed from the learned values, nested by one score or separately."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from captum_staa.perturbation.areas import masks_with_area, rank_penalty
from captum_staa.perturbation.mask_grid import MaskGrid

_GOLDEN = (math.sqrt(5) - 1) / 2
_LEVELS = 24  # number of areas that the map of nested masks averages over


class MaskBatch(NamedTuple):
    """Masks of one step of learning.

    Attributes:
        masks: ``(B, A, n)`` in [0, 1], differentiable with respect to the learned values.
        areas: ``(A,)``, the target area of each mask, in (0, 1).
    """

    masks: Tensor
    areas: Tensor


class Parametrization(Protocol):
    """Protocol of the computation of masks from learned values. The ``n`` values of a mask are those of a grid.

    Attributes:
        warm: if True and no initial map is passed, the initial values come from a coarse gradient estimate.
        per_frame: if True, each time slice has the area. If False, the whole volume has it.
    """

    @property
    def warm(self) -> bool: ...

    @property
    def per_frame(self) -> bool: ...

    def start(self, grid: MaskGrid, areas: Tensor, batch: int, init: Tensor | None) -> Tensor:
        """Return the initial values; ``init`` is a map ``(B, n)`` to start from, or None."""
        ...

    def optimizer(self, values: Tensor) -> torch.optim.Optimizer:
        """Return the optimizer of the values."""
        ...

    def draw(self, values: Tensor, grid: MaskGrid, areas: Tensor, step: int, progress: float) -> MaskBatch:
        """Return the masks and areas of one step; ``progress`` goes from 0 at the first step to 1 at the last."""
        ...

    def penalty(self, drawn: MaskBatch, grid: MaskGrid, step: int) -> Tensor:
        """Return the area penalty ``(B, A)`` of the masks, with the weight of this step."""
        ...

    def final(self, values: Tensor, grid: MaskGrid, areas: Tensor) -> Tensor:
        """Return the masks of the result, ``(B, A, n)``."""
        ...

    def weights(self, values: Tensor, grid: MaskGrid, areas: Tensor) -> Tensor:
        """Return one map ``(B, n)`` that combines the masks of all areas."""
        ...


@dataclass(frozen=True)
class Nested:
    """Nested masks: one score per cell, and one threshold per area. Smaller masks lie within larger ones.

    The areas are exact from the first step, so no penalty has to be balanced against the objective. Each step can use
    other areas, so cells are also ranked between the requested areas. A step takes one area from each of A equal parts
    of the range of areas, on a logarithmic scale. The position within the part advances by the golden ratio, which
    covers the range evenly and without randomness.

    Args:
        rate: step size of Adam.
        softness: width of the sigmoid in units of the scores, at the first step and at the last step.
        reach: smallest area that is learned, as a fraction of the smallest requested area.
        per_frame: if True, each time slice has the area. If False, the whole volume has it.
        warm: if True and no initial map is passed, start from a coarse gradient estimate.
    """

    rate: float = 0.3
    softness: tuple[float, float] = (1.0, 0.1)
    reach: float = 0.1
    per_frame: bool = False
    warm: bool = True

    def start(self, grid: MaskGrid, areas: Tensor, batch: int, init: Tensor | None) -> Tensor:
        """Return zeros, or half the standardized map. The factor 1/2 lets the first steps still correct the map."""
        if init is None:
            return grid.shares.new_zeros(batch, grid.shares.shape[1])
        return _standardized(init, grid.shares) / 2

    def optimizer(self, values: Tensor) -> torch.optim.Optimizer:
        """Return Adam, because the gradients of small areas are many times larger than those of large areas."""
        return torch.optim.Adam([values], lr=self.rate, betas=(0.9, 0.99))

    def draw(self, values: Tensor, grid: MaskGrid, areas: Tensor, step: int, progress: float) -> MaskBatch:
        """Return the masks of one step. Their edges become sharper as ``progress`` goes from 0 to 1."""
        low, high = self._range(areas)
        count = len(areas)
        places = (torch.arange(count, dtype=torch.float64) + step * _GOLDEN % 1) / count
        drawn = (low * (high / low) ** places).to(areas)
        softness = self.softness[0] * (self.softness[1] / self.softness[0]) ** progress
        return MaskBatch(masks_with_area(values, drawn[None], grid, softness, per_frame=self.per_frame), drawn)

    def penalty(self, drawn: MaskBatch, grid: MaskGrid, step: int) -> Tensor:
        """Return zeros, because the areas are exact."""
        return drawn.masks.new_zeros(drawn.masks.shape[:2])

    def final(self, values: Tensor, grid: MaskGrid, areas: Tensor) -> Tensor:
        """Return the masks with the final softness."""
        return masks_with_area(values, areas[None], grid, self.softness[1], per_frame=self.per_frame)

    def weights(self, values: Tensor, grid: MaskGrid, areas: Tensor) -> Tensor:
        """Return the mean of masks over 24 areas, each divided by its area: voxels of the smallest masks count most."""
        low, high = self._range(areas)
        places = torch.linspace(0, 1, _LEVELS, dtype=areas.dtype, device=areas.device)
        levels = low * (high / low) ** places
        return (self.final(values, grid, levels) / levels[:, None]).mean(1)

    def _range(self, areas: Tensor) -> tuple[float, float]:
        return self.reach * float(areas.min()), float(areas.max())


@dataclass(frozen=True)
class Separate:
    """Separate masks: one mask per area, with values clamped to [0, 1] and an area penalty whose weight grows.

    Args:
        rate: step size of SGD with momentum 0.9 and dampening 0.9.
        weight: weight of the penalty at the first step.
        growth: factor of the weight from one step to the next.
        per_frame: if True, each time slice has the area. If False, the whole volume has it.
        warm: if True and no initial map is passed, start from a coarse gradient estimate. The papers start from masks
            that keep the whole clip.

    Reference:
        Fong, Patrick and Vedaldi, ICCV 2019; Li et al., IEEE TCSVT 2021.
    """

    rate: float = 0.05
    weight: float = 300.0
    growth: float = 1.0008668
    per_frame: bool = False
    warm: bool = False

    def start(self, grid: MaskGrid, areas: Tensor, batch: int, init: Tensor | None) -> Tensor:
        """Return ones, which keep the whole clip; or, for an initial map, the highest cells of each area."""
        shape = (batch, len(areas), grid.shares.shape[1])
        if init is None:
            return grid.shares.new_ones(shape)
        return masks_with_area(_standardized(init, grid.shares), areas[None], grid, 0.5, per_frame=self.per_frame)

    def optimizer(self, values: Tensor) -> torch.optim.Optimizer:
        """Return SGD with momentum, as in the papers."""
        return torch.optim.SGD([values], lr=self.rate, momentum=0.9, dampening=0.9)

    def draw(self, values: Tensor, grid: MaskGrid, areas: Tensor, step: int, progress: float) -> MaskBatch:
        """Clamp the values to [0, 1] in place and return them as masks."""
        with torch.no_grad():
            values.clamp_(0, 1)
        return MaskBatch(values * 1, areas)

    def penalty(self, drawn: MaskBatch, grid: MaskGrid, step: int) -> Tensor:
        """Return the area term of the papers, ``(B, A)``."""
        weight = self.weight * self.growth**step
        return weight * rank_penalty(drawn.masks, drawn.areas, grid, per_frame=self.per_frame)

    def final(self, values: Tensor, grid: MaskGrid, areas: Tensor) -> Tensor:
        """Return the values clamped to [0, 1]."""
        return values.clamp(0, 1)

    def weights(self, values: Tensor, grid: MaskGrid, areas: Tensor) -> Tensor:
        """Return the sum of the masks over areas."""
        return values.clamp(0, 1).sum(1)


def _standardized(maps: Tensor, shares: Tensor) -> Tensor:
    """Return rows ``(B, n)`` of mean 0 and deviation 1, or 0 for a constant row. Regions of share 0 are ignored."""
    present = shares > 0
    count = present.sum(1, keepdim=True)
    centered = (maps - maps.where(present, 0).sum(1, keepdim=True) / count).where(present, 0)
    deviation = (centered.square().sum(1, keepdim=True) / count).sqrt()
    constant = deviation <= 1e-6 * maps.where(present, 0).abs().amax(1, keepdim=True)  # only rounding errors
    return torch.where(constant, 0, centered / deviation.where(~constant, 1))
