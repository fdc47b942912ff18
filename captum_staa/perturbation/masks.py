"""Masks computed from the learned values: parametrizations, nested or separate, and the constraint on their areas.

Areas are exact, by a threshold on scores, or approximate, by a penalty on sorted values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_staa._utils.tensors import gaussian
from captum_staa.perturbation.mask_grid import MaskGrid

_GOLDEN = (math.sqrt(5) - 1) / 2
_LEVELS = 24  # number of areas that the map of nested masks averages over
_HALVINGS = 30  # steps of the bisection for the threshold of an area
_DETAIL = 0.5  # weight of the gradients as they are in the initial map, beside their smoothed form
_COARSE = 0.5  # weight of the changes by windows in the initial map, beside these gradients
_SOFT = 0.5  # softness of the masks that the map of nested masks averages over: softer, so that no two voxels tie


class MaskBatch(NamedTuple):
    """Masks of one step of learning.

    Attributes:
        masks: ``(B, A, n)`` in [0, 1], differentiable with respect to the learned values.
        areas: ``(A,)``, the target area of each mask, in (0, 1).
    """

    masks: Tensor
    areas: Tensor


Descent = Callable[[Tensor], None]
"""Function that changes the learned values in place by one step, from their gradient. torch.optim would import torch's
compiler at the first step."""


class Parametrization(Protocol):
    """Protocol of the computation of masks from learned values. The ``n`` values of a mask are those of a grid.

    Attributes:
        gradients: number of random masks whose gradients give the initial map, if none is passed. 0 means no such map.
        windows: number of windows along each axis that are removed and kept for the initial map. 0 means none.
        per_frame: if True, each time slice has the area. If False, the whole volume has it.
    """

    @property
    def gradients(self) -> int: ...

    @property
    def windows(self) -> int: ...

    @property
    def per_frame(self) -> bool: ...

    def initial(self, slopes: Tensor, changes: Tensor, grid: MaskGrid) -> Tensor:
        """Return the initial map ``(B, n)``.

        Args:
            slopes: ``(B, n)``, mean gradients of the score with respect to the cells.
            changes: ``(B, n)``, how much the windows around a cell change the score. Zeros if there are no windows.
            grid: the cells.
        """
        ...

    def start(self, grid: MaskGrid, areas: Tensor, batch: int, init: Tensor | None) -> Tensor:
        """Return the initial values; ``init`` is a map ``(B, n)`` to start from, or None."""
        ...

    def descent(self, values: Tensor, grid: MaskGrid, iterations: int) -> Descent:
        """Return the function that takes the steps of an optimization of so many iterations."""
        ...

    def masks_per_step(self, areas: int) -> int:
        """Return how many masks a step learns, for a number of requested areas."""
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

    def combined(self, values: Tensor, grid: MaskGrid, areas: Tensor) -> Tensor:
        """Return one map ``(B, T, H, W)``, not negative, that combines the masks of all areas."""
        ...


@dataclass(frozen=True)
class Nested:
    """Nested masks: one score per cell, and one threshold per area. Smaller masks lie within larger ones.

    The areas are exact from the first step, so no penalty has to be balanced against the objective. A step learns one
    area between the smallest and the largest. On a logarithmic scale, the areas advance by the golden ratio, which
    covers the range evenly and without randomness. So cells are also ranked between the requested areas.

    Args:
        path: length of all steps together. The length of a step is the root mean square of the change, in units of the
            standard deviation of the initial scores. A short path refines the initial map, and keeps what it says about
            cells that hardly change the output.
        softness: width of the sigmoid in units of the scores, at the first step and at the last step.
        reach: smallest area that is learned, as a fraction of the smallest requested area.
        per_frame: if True, each time slice has the area. If False, the whole volume has it.
        gradients: number of random masks whose gradients give the initial map, if none is passed. 0 means none: without
            windows, masks start from equal scores.
        smooth: standard deviations, in cells along time and in space, of the blur of these gradients. A gradient
            changes its sign within an object. Its mean over the object tells whether the object is evidence.
        windows: number of windows along each axis. Each is removed once and kept once, and the changes of the score are
            added to the smoothed gradients. A gradient is the effect of a small change. A window shows the effect of a
            large one. 0 means none.
    """

    path: float = 0.6
    softness: tuple[float, float] = (1.0, 0.1)
    reach: float = 0.1
    per_frame: bool = False
    gradients: int = 20
    smooth: tuple[float, float] = (1.0, 2.0)
    windows: int = 3

    def initial(self, slopes: Tensor, changes: Tensor, grid: MaskGrid) -> Tensor:
        """Return the gradients plus 0.5 of the changes, both standardized.

        Smoothed gradients find objects, and 0.5 of the gradients as they are rank the cells of an object. The changes
        tell which of the objects matter as a whole.
        """
        density = slopes / grid.shares.clamp_min(torch.finfo(slopes.dtype).tiny)
        smoothed = standardized(grid.smooth(density, *self.smooth), grid.shares)
        gradients = smoothed + _DETAIL * standardized(density, grid.shares)
        return standardized(gradients, grid.shares) + _COARSE * standardized(changes, grid.shares)

    def start(self, grid: MaskGrid, areas: Tensor, batch: int, init: Tensor | None) -> Tensor:
        """Return zeros, or the standardized map."""
        if init is None:
            return grid.shares.new_zeros(batch, grid.shares.shape[1])
        return standardized(init, grid.shares)

    def descent(self, values: Tensor, grid: MaskGrid, iterations: int) -> Descent:
        """Return gradient descent with steps of equal length: gradients of small areas are many times larger."""
        return EqualSteps(values, self.path / max(1, iterations), (grid.shares > 0).sum(1, keepdim=True))

    def masks_per_step(self, areas: int) -> int:
        """Return 1."""
        return 1

    def draw(self, values: Tensor, grid: MaskGrid, areas: Tensor, step: int, progress: float) -> MaskBatch:
        """Return the mask of one step. Its edges become sharper as ``progress`` goes from 0 to 1."""
        low, high = self._range(areas)
        drawn = areas.new_tensor([low * (high / low) ** (step * _GOLDEN % 1)])
        softness = self.softness[0] * (self.softness[1] / self.softness[0]) ** progress
        return MaskBatch(masks_with_area(values, drawn[None], grid, softness, per_frame=self.per_frame), drawn)

    def penalty(self, drawn: MaskBatch, grid: MaskGrid, step: int) -> Tensor:
        """Return zeros, because the areas are exact."""
        return drawn.masks.new_zeros(drawn.masks.shape[:2])

    def final(self, values: Tensor, grid: MaskGrid, areas: Tensor) -> Tensor:
        """Return the masks with the final softness."""
        return masks_with_area(values, areas[None], grid, self.softness[1], per_frame=self.per_frame)

    def combined(self, values: Tensor, grid: MaskGrid, areas: Tensor) -> Tensor:
        """Return the mean of masks over 24 areas, each divided by its area: voxels of the smallest masks count most.

        Thresholds are applied after scores are spread, so voxels keep the order of their interpolated scores.
        """
        low, high = self._range(areas)
        places = torch.linspace(0, 1, _LEVELS, dtype=areas.dtype, device=areas.device)
        levels = low * (high / low) ** places
        thresholds = _thresholds(values, levels[None], grid, _SOFT, per_frame=self.per_frame)  # (B, 24, n)
        total = torch.zeros(len(values), *grid.size, dtype=values.dtype, device=values.device)
        for level, threshold in zip(levels, thresholds.unbind(1), strict=True):
            total += (grid.spread((values - threshold)[:, None])[:, 0] / _SOFT).sigmoid() / level
        return total / _LEVELS

    def _range(self, areas: Tensor) -> tuple[float, float]:
        return self.reach * float(areas.min()), float(areas.max())


class EqualSteps:
    """Gradient descent in which all steps of a clip have the same root mean square over its cells.

    Steps are shorter for gradients below 1/1000 of the largest one so far, which masks with hard edges have: these
    consist of rounding errors.

    Example:
        >>> values = torch.zeros(1, 2)
        >>> EqualSteps(values, 0.5, torch.tensor([[2]]))(torch.tensor([[3.0, -4.0]]))  # of size 5 / sqrt(2)
        >>> values / 2**0.5
        tensor([[-0.3000,  0.4000]])

    Args:
        values: ``(B, n)``.
        rate: root mean square of a step.
        counts: ``(1 or B, 1)``, number of cells of each clip. Other cells have a gradient of 0.
    """

    def __init__(self, values: Tensor, rate: float, counts: Tensor) -> None:
        self.values, self.rate, self.counts = values, rate, counts
        self.largest = torch.zeros_like(values[:, :1])

    @torch.no_grad()
    def __call__(self, slope: Tensor) -> None:
        """Take a step. Clips whose gradient is 0 do not change."""
        size = (slope.square().sum(1, keepdim=True) / self.counts).sqrt()
        self.largest = self.largest.maximum(size)
        size = size.maximum(self.largest / 1000)
        self.values -= self.rate * slope / size.where(size > 0, 1)


class Momentum:
    """Gradient descent with momentum 0.9 and dampening 0.9: a moving average of the gradients.

    Example:
        >>> values = torch.zeros(1)
        >>> descent = Momentum(values, 1.0)
        >>> descent(torch.tensor([1.0]))
        >>> descent(torch.tensor([0.0]))
        >>> values  # steps of 1 and 0.9
        tensor([-1.9000])
    """

    def __init__(self, values: Tensor, rate: float) -> None:
        self.values, self.rate = values, rate
        self.speed: Tensor | None = None

    @torch.no_grad()
    def __call__(self, slope: Tensor) -> None:
        """Take a step."""
        self.speed = slope if self.speed is None else torch.lerp(slope, self.speed, 0.9)
        self.values -= self.rate * self.speed


@dataclass(frozen=True)
class Separate:
    """Separate masks: one mask per area, with values clamped to [0, 1] and an area penalty whose weight grows.

    Args:
        rate: step size of gradient descent with momentum 0.9 and dampening 0.9.
        weight: weight of the penalty at the first step.
        growth: factor of the weight from one step to the next.
        per_frame: if True, each time slice has the area. If False, the whole volume has it.
        blur: standard deviation of the spatial blur of the map, as a fraction of the shorter side; 0 means no blur.

    Reference:
        Fong, Patrick and Vedaldi, ICCV 2019; Li et al., IEEE TCSVT 2021.
    """

    rate: float = 0.05
    weight: float = 300.0
    growth: float = 1.0008668
    per_frame: bool = False
    blur: float = 10 / 112

    @property
    def gradients(self) -> int:
        """0: the papers start from masks that keep the whole clip."""
        return 0

    @property
    def windows(self) -> int:
        """0, for the same reason."""
        return 0

    def initial(self, slopes: Tensor, changes: Tensor, grid: MaskGrid) -> Tensor:
        """Return the gradients."""
        return slopes

    def start(self, grid: MaskGrid, areas: Tensor, batch: int, init: Tensor | None) -> Tensor:
        """Return ones, which keep the whole clip; or, for an initial map, the highest cells of each area."""
        shape = (batch, len(areas), grid.shares.shape[1])
        if init is None:
            return grid.shares.new_ones(shape)
        return masks_with_area(standardized(init, grid.shares), areas[None], grid, 0.5, per_frame=self.per_frame)

    def descent(self, values: Tensor, grid: MaskGrid, iterations: int) -> Descent:
        """Return gradient descent with momentum, as in the papers."""
        return Momentum(values, self.rate)

    def masks_per_step(self, areas: int) -> int:
        """Return the number of areas: all masks are learned at the same time."""
        return areas

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

    def combined(self, values: Tensor, grid: MaskGrid, areas: Tensor) -> Tensor:
        """Return the sum of the masks over areas, blurred within frames."""
        sigma = self.blur * min(grid.size[1:])
        return gaussian(grid.spread(values.clamp(0, 1).sum(1, keepdim=True))[:, 0], (0.0, sigma, sigma))


def standardized(maps: Tensor, shares: Tensor) -> Tensor:
    """Return rows ``(B, n)`` of mean 0 and deviation 1, or 0 for a constant row. Regions of share 0 are ignored."""
    present = shares > 0
    count = present.sum(1, keepdim=True)
    centered = (maps - maps.where(present, 0).sum(1, keepdim=True) / count).where(present, 0)
    deviation = (centered.square().sum(1, keepdim=True) / count).sqrt()
    constant = deviation <= 1e-6 * maps.where(present, 0).abs().amax(1, keepdim=True)  # only rounding errors
    return torch.where(constant, 0, centered / deviation.where(~constant, 1))


# --- areas --------------------------------------------------------------------------------------------------------


def masks_with_area(
    scores: Tensor, areas: Tensor, grid: MaskGrid, softness: float, *, per_frame: bool = False
) -> Tensor:
    """Return nested masks of exactly these areas: a sigmoid of the scores minus a threshold, one threshold per area.

    Example:
        >>> from captum_staa.perturbation.mask_grid import RegionGrid
        >>> grid = RegionGrid(torch.arange(4).view(1, 1, 2, 2))
        >>> scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
        >>> masks_with_area(scores, torch.tensor([[0.5, 0.25]]), grid, softness=0.01)
        tensor([[[1., 1., 0., 0.],
                 [1., 0., 0., 0.]]])

    The threshold is a differentiable function of the scores. Adding a constant to all scores does not change the masks.

    Args:
        scores: ``(B, n)``, one score per cell or region of the grid.
        areas: ``(1 or B, A)``, fractions of the clip's volume, in (0, 1).
        grid: gives the share of the volume that each score covers.
        softness: width of the sigmoid, in units of the scores. At 1/100 of the spread of the scores, the sigmoid is
            almost a step function.
        per_frame: if True, each time slice has the area. If False, the whole volume has it.

    Returns:
        Masks ``(B, A, n)`` in [0, 1].
    """
    thresholds = _thresholds(scores, areas, grid, softness, per_frame=per_frame)
    return ((scores[:, None] - thresholds) / softness).sigmoid()


def _thresholds(scores: Tensor, areas: Tensor, grid: MaskGrid, softness: float, *, per_frame: bool) -> Tensor:
    """Return the thresholds ``(B, A, n)`` of :func:`masks_with_area`, equal in all cells of a volume or slice."""
    slices = grid.slices if per_frame else 1
    values = scores.unflatten(1, (slices, -1))[:, None]  # (B, 1, slices, n / slices)
    shares = _shares(grid, slices)[:, None]
    wanted = areas[..., None, None]  # (1 or B, A, 1, 1)
    with torch.no_grad():
        low, high = (
            end.expand(-1, areas.shape[1], -1, -1)
            for end in (values.amin(3, keepdim=True) - 20 * softness, values.amax(3, keepdim=True) + 20 * softness)
        )
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            large = (((values - middle) / softness).sigmoid() * shares).sum(3, keepdim=True) > wanted
            low, high = middle.where(large, low), high.where(large, middle)
        threshold = (low + high) / 2
        # The derivative of the threshold follows from the constant area: sum of shares * slope * (dv - dt) = 0.
        mask = ((values - threshold) / softness).sigmoid()
        slope = mask * (1 - mask) * shares
        slope = slope / slope.sum(3, keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
    moving = threshold + (slope * (values - values.detach())).sum(3, keepdim=True)
    return moving.expand(-1, -1, -1, values.shape[3]).flatten(2)


def rank_penalty(values: Tensor, areas: Tensor, grid: MaskGrid, *, per_frame: bool = False) -> Tensor:
    """Return the squared distance of sorted masks from a step function of this area; 0 for a binary mask of the area.

    Example:
        >>> from captum_staa.perturbation.mask_grid import RegionGrid
        >>> grid = RegionGrid(torch.arange(4).view(1, 1, 2, 2))
        >>> masks = torch.tensor([[[0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]])
        >>> rank_penalty(masks, torch.tensor([0.25, 0.25]), grid)  # exact; three of four cells are 1 too high
        tensor([[0.0000, 0.7500]])

    ``R = sum over cells of share * (m - r)^2``. Here ``m`` are the mask values in ascending order, and ``r`` is 0 for
    the first ``1 - a`` of the volume and 1 for the rest. For cells of equal size, this is the mean in the papers.

    Args:
        values: masks ``(B, A, n)`` in [0, 1].
        areas: ``(A,)``, fractions of the clip's volume, in (0, 1).
        grid: gives the share of the volume that each value covers.
        per_frame: if True, sort within each time slice. If False, sort over the whole volume.

    Returns:
        Penalties ``(B, A)``, at least 0.

    Reference:
        Fong, Patrick and Vedaldi, "Understanding Deep Networks via Extremal Perturbations and Smooth Masks", ICCV 2019,
        equation 3.
    """
    slices = grid.slices if per_frame else 1
    parts = values.unflatten(2, (slices, -1))  # (B, A, slices, n / slices)
    shares = _shares(grid, slices)[:, None].expand_as(parts)
    ordered, order = parts.sort(dim=3)
    widths = shares.gather(3, order)
    filled = widths.cumsum(3) - (1 - areas[:, None, None])  # volume of the slice above 1 - a
    # The target of a cell that straddles the step is the fraction of the cell above the step.
    template = (filled / widths.clamp_min(torch.finfo(widths.dtype).tiny)).clamp(0, 1)
    shared = shared_among_equals(ordered.detach(), template, widths)
    return (widths * (ordered.square() - 2 * ordered * shared + template.square())).sum(3).mean(2)


def shared_among_equals(ordered: Tensor, template: Tensor, widths: Tensor) -> Tensor:
    """Return the template with the targets of equal values replaced by their mean.

    The order of equal values after a sort is arbitrary. Without the mean, this order alone would pull some of them to 0
    and others to 1. Masks that start at 1 everywhere would then depend on the sort and not on the model.

    Args:
        ordered: ``(..., n)``, values in ascending order.
        template: ``(..., n)``, the target of each value.
        widths: ``(..., n)``, the weight of each value.

    Returns:
        Targets ``(..., n)``.
    """
    nearly = 1e-6 * ordered.abs().amax(-1, keepdim=True)  # interpolation separates equal values by rounding errors
    ends = [
        torch.searchsorted(ordered.contiguous(), (ordered + shift).contiguous(), right=right)
        for shift, right in ((-nearly, False), (nearly, True))
    ]

    def between(values: Tensor) -> Tensor:
        sums = F.pad(values.cumsum(-1), (1, 0))
        first, last = (sums.gather(-1, end) for end in ends)
        return last - first

    return between(widths * template) / between(widths).clamp_min(torch.finfo(widths.dtype).tiny)


def _shares(grid: MaskGrid, slices: int) -> Tensor:
    """Return shares ``(1 or B, slices, n / slices)``, normalized so that each slice sums to 1."""
    shares = grid.shares.unflatten(1, (slices, -1))
    return shares / shares.sum(2, keepdim=True)
