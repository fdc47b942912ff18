"""Which block of pixels each token stands for, from how much tokens change when pixels are changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CERTAIN = 0.95  # how often a changed block must change its own token most if blocks overlap


@dataclass(frozen=True)
class Axis:
    """``count`` cells of ``side`` units that begin at ``start``, along time, height or width."""

    count: int
    side: float
    start: float = 0.0

    def lines(self, length: int) -> Tensor:
        """Return the cell of each of ``length`` pixels or frames, and -1 behind the last cell."""
        cells = ((torch.arange(length) + 0.5 - self.start) / self.side).floor().long()
        return torch.where((cells >= 0) & (cells < self.count), cells, -1)


Cells = tuple[Axis, Axis, Axis]  # of time, height and width


@dataclass
class Change:
    """How tokens change with the pixels.

    Attributes:
        whole: ``(..., P)``, the change if all pixels are changed.
        alive: ``(...)``, whether a token changes at all. Class tokens and text do not.
    """

    whole: Tensor
    alive: Tensor

    @classmethod
    def of(cls, base: Tensor, changed: Tensor) -> Change:
        whole = changed - base
        size = whole.norm(dim=-1)
        floor = max(1e-3 * float(size.max()), 1e-5 * float(base.norm(dim=-1).mean()))
        return cls(whole, size > floor)

    def along(self, change: Tensor) -> Tensor:
        """Return the share of the whole change that a change is, signed: 1 for the same one."""
        return (change * self.whole).sum(-1) / self.whole.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)

    def size(self, change: Tensor) -> Tensor:
        """Return the size of a change over that of the whole one."""
        return change.norm(dim=-1) / self.whole.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)


def ramps(size: tuple[int, int, int]) -> Tensor:
    """Return three masks ``(3, T, H, W)`` that rise along time, height and width, from 0 to 1."""
    masks = torch.ones(3, *size)
    for axis, length in enumerate(size):
        shape = [length if place == axis else 1 for place in range(3)]
        masks[axis] *= ((torch.arange(length) + 0.5) / length).view(shape)
    return masks


def lattice(centers: Tensor, length: float) -> Axis | None:
    """Return the cells whose centers are given, several times each, or None if they are not evenly spaced.

    Args:
        centers: ``(M,)`` in units of a pixel, frame or cell.
        length: of the axis.
    """
    ordered, total = centers.sort().values.double(), len(centers)
    for count in range(min(total, int(length)), 1, -1):
        if total % count:
            continue
        groups = ordered.view(count, -1)
        means = groups.mean(1)
        side = float(means[-1] - means[0]) / (count - 1)
        even = means[0] + side * torch.arange(count)
        if (
            side > 0
            and float((means - even).abs().max()) < 0.2 * side
            and float((groups - means[:, None]).std()) < 0.2 * side
        ):
            return Axis(count, side, float(means[0]) - side / 2)
    if total and float(ordered.std(unbiased=False)) < 0.15 * length:
        return Axis(1, length, 0.0)
    return None


def cells_in_pixels(found: Axis, length: int) -> list[Axis]:
    """Return the cells that a measured axis may stand for, the likeliest first.

    Measured sides are off by a part of a pixel. True ones are whole, or the length divided by the number of cells.
    """
    if found.count == 1:
        return [Axis(1, length)]
    sides = {length / found.count, *(side for side in (int(found.side), int(found.side) + 1) if side)}
    possible = [side for side in sides if side >= 1 and round(side * found.count) <= length]
    possible.sort(key=lambda side: (round(abs(side - found.side), 2), side != length / found.count))
    return [Axis(found.count, int(side) if float(side).is_integer() else side) for side in possible[:2]]


def digits(cells: Cells, size: tuple[int, int, int], base: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return masks ``(m, T, H, W)`` that number the cells of each axis.

    Returns:
        The masks, each a digit of base ``base`` as a value from 0 to 1, and for each mask its axis and what 1 is worth.
    """
    masks, meaning = [], []
    for place, (axis, length) in enumerate(zip(cells, size, strict=True)):
        lines, shape = axis.lines(length).clamp(min=0), [length if place == other else 1 for other in range(3)]
        worth = 1
        while worth < axis.count:
            masks.append((lines // worth % base / (base - 1)).view(shape).expand(size))
            meaning.append((place, worth * (base - 1)))
            worth *= base
    return (torch.stack(masks) if masks else torch.zeros(0, *size)), meaning


def read_digits(shares: Tensor, meaning: Sequence[tuple[int, int]]) -> Tensor:
    """Return the center ``(..., 3)`` of each token in units of a cell, from shares ``(m, ...)`` of the whole change."""
    centers = torch.full((*shares.shape[1:], 3), 0.5)
    for share, (place, worth) in zip(shares, meaning, strict=True):
        centers[..., place] += share.cpu() * worth
    return centers


def codes(cells: Cells, size: tuple[int, int, int], densities: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return random sets of cells, as masks ``(m, T, H, W)`` and as ``(m, t, h, w)`` booleans, each with some cell.

    A density of 0 is a single cell.
    """
    generator, shape = torch.Generator().manual_seed(0), [axis.count for axis in cells]
    chosen = torch.stack([torch.rand(shape, generator=generator) < density for density in densities])
    for one in chosen:
        if not one.any():
            one.view(-1)[int(torch.randint(one.numel(), (1,), generator=generator))] = True
    t, h, w = (axis.lines(length) for axis, length in zip(cells, size, strict=True))
    masks = chosen[:, t.clamp(min=0)][:, :, h.clamp(min=0)][:, :, :, w.clamp(min=0)]
    read = (t >= 0)[:, None, None] & (h >= 0)[:, None] & (w >= 0)
    return (masks & read).float(), chosen


@dataclass
class Positions:
    """The cell of each token of a tensor, verified by changing random sets of cells.

    Attributes:
        cells: ``(...)`` int64, index of the token's cell in ``grid``, along t, then h, then w; -1 without pixels.
        grid: the cells of the tokens, in units of the finest cells.
        certainty: how often a token with a changed cell changes more than one without, .5 to 1.
        own: share of the changes that is in the tokens of the changed cells. Less than 1 if blocks overlap.
    """

    cells: Tensor
    grid: Cells
    certainty: float
    own: float

    @property
    def certain(self) -> bool:
        """Whether the positions are verified. Without overlap, every token must answer to its own cell alone."""
        return self.certainty > 0.9999 if self.own > 0.99 else self.certainty >= CERTAIN

    @property
    def counts(self) -> tuple[int, int, int]:
        t, h, w = (axis.count for axis in self.grid)
        return t, h, w


def positions(change: Change, centers: Tensor, cells: Cells, sizes: Tensor, chosen: Tensor) -> Positions | None:
    """Return the position of each token, or None if no regular grid fits.

    Args:
        change: of the tokens.
        centers: ``(..., 3)`` of the tokens, in units of the finest cells.
        cells: the finest cells.
        sizes: ``(m, ...)``, the size of the change of each token in each random set.
        chosen: ``(m, t, h, w)``, the finest cells in each random set.
    """
    alive = change.alive.cpu()
    if not alive.any():
        return None
    axes = [lattice(centers[alive][:, place], axis.count) for place, axis in enumerate(cells)]
    if None in axes:
        return None
    grid: Cells = tuple(axes)  # type: ignore[assignment]
    index, covered = torch.zeros(alive.shape, dtype=torch.long), chosen
    for place, axis in enumerate(grid):
        line = ((centers[..., place] - axis.start) / axis.side - 0.5).round().long().clamp(0, axis.count - 1)
        index = index * axis.count + line
        of_fine = axis.lines(cells[place].count).clamp(min=0)
        covered = _any_of(covered, of_fine, axis.count, place + 1)
    expected = covered.flatten(1)[:, index]  # (m, ...)
    certainty, own = _agreement(sizes.cpu()[:, alive], expected[:, alive])
    return Positions(torch.where(alive, index, -1), grid, certainty, own)


def _any_of(chosen: Tensor, group: Tensor, count: int, dim: int) -> Tensor:
    """Return for groups of cells along an axis whether any of them is chosen."""
    shape = list(chosen.shape)
    shape[dim] = count
    return torch.zeros(shape, dtype=torch.long).index_add(dim, group, chosen.long()) > 0


def _agreement(sizes: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return how often changes of expected tokens exceed others, and their share of all; the lowest of all sets."""
    certainty, own = 1.0, 1.0
    for size, hit in zip(sizes, expected, strict=True):
        if not hit.any():
            continue
        total = float(size.square().sum())
        own = min(own, float(size[hit].square().sum()) / total if total else 0.0)
        if not hit.all():
            ranks = torch.cat([size[hit], size[~hit]]).argsort(stable=True).argsort().double()
            positive = int(hit.sum())
            wins = float(ranks[:positive].sum()) - positive * (positive - 1) / 2
            certainty = min(certainty, wins / (positive * int((~hit).sum())))
    return certainty, own
