"""How masks come from the numbers that are learned: nested in each other by one score, or each for itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from captum_staa.perturbation.areas import masks_with_area, rank_penalty
from captum_staa.perturbation.mask_grid import Field

_GOLDEN = (math.sqrt(5) - 1) / 2
_LEVELS = 24  # areas that a nested map is made of


class MaskBatch(NamedTuple):
    """Masks of one step of learning.

    Attributes:
        masks: ``(B, A, n)``, in [0, 1], with a gradient to the values.
        areas: ``(A,)``, what they are to leave.
    """

    masks: Tensor
    areas: Tensor


class Parametrization(Protocol):
    """From learned values to masks; the numbers of a mask are those of a :class:`Field`.

    Attributes:
        warm: whether learning begins with a hint where no map is given to begin with.
        per_frame: whether each area is asked for in every slice of time, instead of over the volume.
    """

    @property
    def warm(self) -> bool: ...

    @property
    def per_frame(self) -> bool: ...

    def start(self, field: Field, areas: Tensor, batch: int, init: Tensor | None) -> Tensor:
        """Values to begin with; ``init`` ``(B, n)`` is a map to begin from."""
        ...

    def optimizer(self, values: Tensor) -> torch.optim.Optimizer:
        """What moves the values."""
        ...

    def draw(self, values: Tensor, field: Field, areas: Tensor, step: int, progress: float) -> MaskBatch:
        """The masks of a step; ``progress`` goes from 0 to 1."""
        ...

    def penalty(self, drawn: MaskBatch, field: Field, step: int) -> Tensor:
        """``(B, A)``: how far the masks are from their areas, weighed as at this step."""
        ...

    def final(self, values: Tensor, field: Field, areas: Tensor) -> Tensor:
        """``(B, A, n)``, the masks as they are handed out."""
        ...

    def weights(self, values: Tensor, field: Field, areas: Tensor) -> Tensor:
        """``(B, n)``: one map of all areas."""
        ...


@dataclass(frozen=True)
class Nested:
    """One score per cell, and for every area the threshold that leaves it: smaller masks lie within larger ones.

    Areas are met exactly from the first step on, nothing has to be weighed against them, and each step can ask for
    other areas, so that cells are put in order also between those that were asked. Steps take one area from each of
    A equal parts of the range, on a logarithmic scale, at a place that the golden ratio moves on: evenly, and without
    chance.

    Args:
        rate: step size of Adam.
        softness: width of the threshold in units of the scores, at the first step and at the last.
        reach: the smallest area that is learned, as a part of the smallest asked.
        per_frame: each area in every slice of time, instead of over the volume.
        warm: begin with a hint, where no map is given.
    """

    rate: float = 0.3
    softness: tuple[float, float] = (1.0, 0.1)
    reach: float = 0.1
    per_frame: bool = False
    warm: bool = True

    def start(self, field: Field, areas: Tensor, batch: int, init: Tensor | None) -> Tensor:
        """Zeros, or half the map in standard deviations: a hint that the first steps can still take back."""
        if init is None:
            return field.shares.new_zeros(batch, field.shares.shape[1])
        return _standardized(init, field.shares) / 2

    def optimizer(self, values: Tensor) -> torch.optim.Optimizer:
        """Adam, since gradients of small areas are many times larger than those of large ones."""
        return torch.optim.Adam([values], lr=self.rate, betas=(0.9, 0.99))

    def draw(self, values: Tensor, field: Field, areas: Tensor, step: int, progress: float) -> MaskBatch:
        """Masks that harden as learning goes on."""
        low, high = self._range(areas)
        count = len(areas)
        places = (torch.arange(count, dtype=torch.float64) + step * _GOLDEN % 1) / count
        drawn = (low * (high / low) ** places).to(areas)
        softness = self.softness[0] * (self.softness[1] / self.softness[0]) ** progress
        return MaskBatch(masks_with_area(values, drawn[None], field, softness, per_frame=self.per_frame), drawn)

    def penalty(self, drawn: MaskBatch, field: Field, step: int) -> Tensor:
        """None: areas are exact."""
        return drawn.masks.new_zeros(drawn.masks.shape[:2])

    def final(self, values: Tensor, field: Field, areas: Tensor) -> Tensor:
        """The masks at their hardest."""
        return masks_with_area(values, areas[None], field, self.softness[1], per_frame=self.per_frame)

    def weights(self, values: Tensor, field: Field, areas: Tensor) -> Tensor:
        """The mean over areas of masks that weigh the same: what only a small mask shows counts most."""
        low, high = self._range(areas)
        places = torch.linspace(0, 1, _LEVELS, dtype=areas.dtype, device=areas.device)
        levels = low * (high / low) ** places
        return (self.final(values, field, levels) / levels[:, None]).mean(1)

    def _range(self, areas: Tensor) -> tuple[float, float]:
        return self.reach * float(areas.min()), float(areas.max())


@dataclass(frozen=True)
class Separate:
    """A mask of its own for every area, its numbers held in [0, 1], its area asked for by a penalty that grows.

    Args:
        rate: step size of the descent, whose momentum and dampening are 0.9.
        weight: of the penalty at the first step.
        growth: factor of the weight from step to step.
        per_frame: each area in every slice of time, instead of over the volume.
        warm: begin with a hint, where no map is given; the papers begin with all shown.

    Reference:
        Fong, Patrick and Vedaldi, ICCV 2019; Li et al., IEEE TCSVT 2021.
    """

    rate: float = 0.05
    weight: float = 300.0
    growth: float = 1.0008668
    per_frame: bool = False
    warm: bool = False

    def start(self, field: Field, areas: Tensor, batch: int, init: Tensor | None) -> Tensor:
        """All is shown; or of a map, each area's highest cells."""
        shape = (batch, len(areas), field.shares.shape[1])
        if init is None:
            return field.shares.new_ones(shape)
        return masks_with_area(_standardized(init, field.shares), areas[None], field, 0.5, per_frame=self.per_frame)

    def optimizer(self, values: Tensor) -> torch.optim.Optimizer:
        """The papers' descent."""
        return torch.optim.SGD([values], lr=self.rate, momentum=0.9, dampening=0.9)

    def draw(self, values: Tensor, field: Field, areas: Tensor, step: int, progress: float) -> MaskBatch:
        """The values themselves, where they are in [0, 1]."""
        with torch.no_grad():
            values.clamp_(0, 1)
        return MaskBatch(values * 1, areas)

    def penalty(self, drawn: MaskBatch, field: Field, step: int) -> Tensor:
        """The papers' area term."""
        weight = self.weight * self.growth**step
        return weight * rank_penalty(drawn.masks, drawn.areas, field, per_frame=self.per_frame)

    def final(self, values: Tensor, field: Field, areas: Tensor) -> Tensor:
        """As they stand."""
        return values.clamp(0, 1)

    def weights(self, values: Tensor, field: Field, areas: Tensor) -> Tensor:
        """Their sum."""
        return values.clamp(0, 1).sum(1)


def _standardized(maps: Tensor, shares: Tensor) -> Tensor:
    """Rows ``(B, n)`` of mean 0 and deviation 1, a flat one 0; of the regions that a clip has, if others have more."""
    held = shares > 0
    count = held.sum(1, keepdim=True)
    centerd = (maps - maps.where(held, 0).sum(1, keepdim=True) / count).where(held, 0)
    deviation = (centerd.square().sum(1, keepdim=True) / count).sqrt()
    flat = deviation <= 1e-6 * maps.where(held, 0).abs().amax(1, keepdim=True)  # rounding alone
    return torch.where(flat, 0, centerd / deviation.where(~flat, 1))
