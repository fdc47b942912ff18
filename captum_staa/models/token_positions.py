"""Which block of pixels each token stands for, from how much tokens change when pixels are changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

CERTAIN = 0.9  # how often a changed block must change its own token most if blocks overlap
FOLLOWS = 0.9  # the least correlation of centers with the order of cells along an axis
OFF = 0.75  # cells, by which centers must be closer to the cells that they follow
UNEVEN = 0.3  # cells, by which distances between lines of centers may differ from each other
CLOSE = 0.02  # cells or shares of a change, by which a token of one cell may be off
OWN = 0.03  # the least share of a change in the token of the changed block


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
    def of(cls, base: Tensor, changed: Tensor, rounding: float) -> Change:
        """Return the change between two forwards, in which differences up to a share ``rounding`` mean nothing."""
        whole = changed - base
        size = whole.norm(dim=-1)
        floor = max(rounding * float(size.max()), 1e-5 * float(base.norm(dim=-1).mean()))
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
        side = float(means.diff().median())
        even = side * torch.arange(count)
        even = even + (means - even).median()
        off = (means - even).abs()  # tokens at the edges may stand for fewer pixels, behind padded convolutions
        inside = count == 2 or float(off[1:-1].max()) < 0.2 * side
        close = float((groups - means[:, None]).std()) < 0.2 * side
        if side > 0 and inside and close and float(off.max()) < 0.45 * side:
            return Axis(count, side, float(even[0]) - side / 2)
    if total and float(ordered.std(unbiased=False)) < 0.15 * length:
        return Axis(1, length, 0.0)
    return None


def in_order(centers: Tensor, alive: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Cells, float] | None:
    """Return the cell of each token if they follow each other along t, then h, then w, the cells, and how closely.

    Behind convolutions that overlap much, measured centers are off by up to half a cell. Their order is certain still.

    Args:
        centers: ``(..., N, 3)`` in units of the axes' length.
        alive: ``(..., N)``, whether a token has pixels. All rows must have the same tokens.
        lengths: of the axes. Each is divided evenly.
    """
    rows = alive.reshape(-1, alive.shape[-1])
    if alive.ndim == 0 or not bool((rows == rows[:1]).all()):
        return None
    places = centers.reshape(len(rows), -1, 3)[:, rows[0]].mean(0).double()  # heads are averaged
    count, (t, h, w) = len(places), lengths
    best, found = FOLLOWS, None
    for steps in (n for n in range(1, t + 1) if count % n == 0):
        for high in (n for n in range(1, h + 1) if count // steps % n == 0):
            grid = (steps, high, count // steps // high)
            sides = h / high, w / grid[2]
            if grid[2] > w or not 0.5 <= sides[0] / sides[1] <= 2 or grid.count(1) == 3:
                continue
            expected = torch.cartesian_prod(*(torch.arange(n, dtype=torch.double) for n in grid)).view(-1, 3)
            fits = [_follows(places[:, axis], expected[:, axis]) for axis in range(3) if grid[axis] > 1]
            if min(fits) > best:
                best, found = min(fits), grid
    if found is None:
        return None
    cells = tuple(
        Axis(n, length // n if length % n == 0 else length / n) for n, length in zip(found, lengths, strict=True)
    )
    index = torch.full(alive.shape, -1)
    index[alive] = torch.arange(count).repeat(len(rows))
    return index, cells, best  # type: ignore[return-value]


def _follows(centers: Tensor, cells: Tensor) -> float:
    """Return the correlation of centers, from 0 to 1, with cells 0, 1, ...

    0 if single centers are off by a cell, as those of swapped neighbors; or if all are, as those of a model that crops.
    """
    count = int(cells.max()) + 1
    off = centers * count - 0.5 - cells
    slope, start = _line(off, cells)
    scatter = float((off - off.mean() - slope * (cells - cells.mean())).square().mean().sqrt())
    if scatter > OFF * (1 + slope):
        return 0.0
    inside = (cells > 0) & (cells < count - 1)  # centers at the edges are moved inwards where blocks overlap
    slope, start = _line(off[inside], cells[inside]) if count > 2 else (slope, start)
    ends = start - 0.5 * slope, start + (count - 0.5) * slope  # how far the first cell begins, and the last ends, away
    lines = torch.stack([off[cells == cell].mean() for cell in range(count)])
    uneven = (lines[1:-1].diff() - slope).abs()  # of the distances between lines of cells
    if max(map(abs, ends)) > OFF or bool((uneven > UNEVEN).any()):
        return 0.0
    return float(torch.corrcoef(torch.stack([centers, cells]))[0, 1])


def _line(off: Tensor, cells: Tensor) -> tuple[float, float]:
    """Return the slope of a line through offsets of cells 0, 1, ..., and its offset at cell 0."""
    places = cells - cells.mean()
    slope = float((places * off).sum() / places.square().sum().clamp(min=1e-12))
    return slope, float(off.mean() - slope * cells.mean())


def cells_in_pixels(found: Axis, length: int) -> list[Axis]:
    """Return the cells that a measured axis may stand for, the likeliest first.

    Measured sides are off by a part of a pixel. True ones are whole, or the length divided by the number of cells.
    """
    full, whole = length / found.count, int(found.side)
    if found.count == 1 or abs(found.start) > 0.5 * found.side:
        return [_axis(found.count, full)]
    sides = {full, *(side for side in (whole, whole + 1) if side >= 1 and side * found.count <= length)}
    ordered = sorted(sides, key=lambda side: (round(abs(side - found.side), 2), side != full))
    # Between few cells, the measured side is off by more; cells that fill the axis are always tried.
    near = [side for side in ordered if abs(side - found.side) < 0.75 or side == full]
    return [_axis(found.count, side) for side in near]


def _axis(count: int, side: float) -> Axis:
    return Axis(count, int(side) if float(side).is_integer() else side)


def every_second(axis: Axis, place: int, size: tuple[int, int, int]) -> Tensor:
    """Return a mask ``(T, H, W)`` of every second cell along the axis ``place`` of time, height and width."""
    lines = axis.lines(size[place])
    shape = [size[place] if place == other else 1 for other in range(3)]
    return ((lines >= 0) & (lines % 2 == 1)).float().view(shape).expand(size)


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
        certainty: how often a token with a changed cell changes more than one without, 0 to 1. Tokens next to a changed
            cell do not count, because blocks may overlap.
        own: share of the changes that is in the tokens of the changed cells. Less than 1 if blocks overlap.
        exact: ``certainty`` if tokens next to a changed cell count.
        expected, near: ``(m, ...)``, whether the cell of each token is, or is next to, one of each random set.
        ordered: whether the positions are verified by the order of the tokens' centers instead; ``certainty`` is then
            their correlation with the places of the cells. Tokens behind strided convolutions may see other cells more.
    """

    cells: Tensor
    grid: Cells
    certainty: float
    own: float
    exact: float
    expected: Tensor
    near: Tensor
    ordered: bool = False

    def check(self, change: Change, sizes: Tensor, sets: list[int]) -> None:
        """Compare with some of the random sets in another clip."""
        if self.ordered:
            return
        alive = change.alive.cpu() & (self.cells >= 0)
        sizes, expected, near = sizes.cpu()[:, alive], self.expected[sets][:, alive], self.near[sets][:, alive]
        self.certainty = min(self.certainty, _wins(sizes, expected, near))
        self.exact = min(self.exact, _wins(sizes, expected, expected))

    @property
    def certain(self) -> bool:
        """Whether the positions are verified. Without overlap, every token must answer to its own cell alone."""
        if self.ordered:
            return True
        return self.exact > 0.9999 if self.own > 0.99 else self.certainty >= CERTAIN and self.own >= OWN

    def whole(self, cells: Cells) -> Cells | None:
        """Return :attr:`grid` if each of its cells consists of whole finest ones of ``cells``, else None."""
        found: list[Axis] = []
        for axis, fine in zip(self.grid, cells, strict=True):
            full = fine.count / axis.count
            if full.is_integer() and abs(axis.side - full) < 0.3 * full:  # few cells are measured less exactly
                found.append(Axis(axis.count, int(full)))
            elif abs(axis.side - round(axis.side)) > 0.2 or abs(axis.start) > axis.side / 2:
                return None
            else:
                found.append(Axis(axis.count, round(axis.side)))
        return found[0], found[1], found[2]

    @property
    def counts(self) -> tuple[int, int, int]:
        t, h, w = (axis.count for axis in self.grid)
        return t, h, w


def positions(
    change: Change, centers: Tensor, on_ramps: Tensor | None, cells: Cells, sizes: Tensor, chosen: Tensor
) -> Positions | None:
    """Return the position of each token, or None if no regular grid fits.

    Args:
        change: of the tokens.
        centers: ``(..., 3)`` of the tokens, in units of the finest cells.
        on_ramps: the same in units of the axes' length, from ramps. A token that sees several cells has no digits: at
            the cell where a digit begins again, its center is read wrongly. On a ramp it is not.
        cells: the finest cells.
        sizes: ``(m, ...)``, the size of the change of each token in each random set.
        chosen: ``(m, t, h, w)``, the finest cells in each random set.
    """
    alive = change.alive.cpu()
    if not alive.any():
        return None
    grid = _finest(centers[alive], cells, sizes.cpu()[:, alive]) or _coarser(centers[alive], cells)
    found = None
    if grid is not None:
        index = torch.zeros(alive.shape, dtype=torch.long)
        for place, axis in enumerate(grid):
            line = ((centers[..., place] - axis.start) / axis.side - 0.5).round().long().clamp(0, axis.count - 1)
            index = index * axis.count + line
        rows = [index[alive]] if alive.ndim == 1 else [row[which] for row, which in zip(index, alive, strict=True)]
        apart = all(len(row.unique()) == len(row) for row in rows)  # two tokens of a row have different pixels
        if apart or alive.ndim == 1:
            found = _verified(sizes, *_placed(torch.where(alive, index, -1), grid, chosen))
        if apart and found is not None and found.certain:
            return found
    t, h, w = (Axis(axis.count, 1) for axis in cells)
    return found if on_ramps is None else ordered_positions(on_ramps, alive, (t, h, w), sizes, chosen) or found


def ordered_positions(on_ramps: Tensor, alive: Tensor, cells: Cells, sizes: Tensor, chosen: Tensor) -> Positions | None:
    """Return the position of each token of :func:`in_order`, or None.

    Args:
        on_ramps: ``(..., 3)``, the centers in units of the axes' length.
        alive: ``(...)``, whether a token has pixels.
        cells: that the axes consist of, in units of the finest cells.
        sizes, chosen: as for :func:`positions`.
    """
    ordered = in_order(on_ramps, alive, [axis.count for axis in cells])
    if ordered is None:
        return None
    index, (t, h, w), correlation = ordered
    sides = [axis.side * unit.side for axis, unit in zip((t, h, w), cells, strict=True)]
    grid = Axis(t.count, sides[0]), Axis(h.count, sides[1]), Axis(w.count, sides[2])
    found = _verified(sizes, *_placed(index, grid, chosen))
    return replace(found, certainty=correlation, exact=correlation, ordered=True)


def _placed(index: Tensor, grid: Cells, chosen: Tensor) -> tuple[Tensor, Cells, Tensor, Tensor]:
    """Return cells of tokens, their grid, and which tokens have, or are next to, a cell of each random set."""
    covered = chosen
    for place, axis in enumerate(grid):
        of_fine = axis.lines(chosen.shape[place + 1]).clamp(min=0)
        covered = _any_of(covered, of_fine, axis.count, place + 1)
    around, places = F.max_pool3d(covered.float()[:, None], 3, 1, 1)[:, 0] > 0, index.clamp(min=0)
    return index, grid, covered.flatten(1)[:, places], around.flatten(1)[:, places]


def same_positions(other: Positions, change: Change, sizes: Tensor) -> Positions | None:
    """Return the positions of another tensor, verified for a tensor of the same shape; None if they do not fit.

    Args:
        other: the positions.
        change: of the tokens of the tensor.
        sizes: as for :func:`positions`.
    """
    alive = change.alive.cpu()
    if alive.ndim == 1 and other.cells.ndim > 1:  # a row of tokens
        other = replace(other, cells=other.cells[0], expected=other.expected[:, 0], near=other.near[:, 0])
    if not torch.equal(other.cells >= 0, alive):
        return None
    found = _verified(sizes, other.cells, other.grid, other.expected, other.near)
    return found if found.certain else None


def _verified(sizes: Tensor, index: Tensor, grid: Cells, expected: Tensor, near: Tensor) -> Positions:
    alive = index >= 0
    seen = sizes.cpu()[:, alive], expected[:, alive]
    certainty, exact = _wins(*seen, near[:, alive]), _wins(*seen, expected[:, alive])
    return Positions(index, grid, certainty, _own(*seen), exact, expected, near)


def _finest(centers: Tensor, cells: Cells, sizes: Tensor) -> Cells | None:
    """Return the finest cells, if the tokens stand for each of them equally often, or for single ones of them.

    A layer that gets every second token looks like one of merged tokens, but each of its tokens changes as a whole, or
    not at all.
    """
    t, h, w = ((centers[:, place] - 0.5).round().long().clamp(0, axis.count - 1) for place, axis in enumerate(cells))
    times = ((t * cells[1].count + h) * cells[2].count + w).bincount()
    fits = len(times) == cells[0].count * cells[1].count * cells[2].count and bool((times == times[0]).all())
    single = bool(
        ((centers - 0.5 - torch.stack([t, h, w], 1)).abs() < CLOSE).all() and (sizes * (1 - sizes)).abs().max() < CLOSE
    )
    finest = Axis(cells[0].count, 1), Axis(cells[1].count, 1), Axis(cells[2].count, 1)
    return finest if fits or single else None


def _coarser(centers: Tensor, cells: Cells) -> Cells | None:
    t, h, w = (lattice(centers[:, place], axis.count) for place, axis in enumerate(cells))
    return None if t is None or h is None or w is None else (t, h, w)


def _any_of(chosen: Tensor, group: Tensor, count: int, dim: int) -> Tensor:
    """Return for groups of cells along an axis whether any of them is chosen."""
    shape = list(chosen.shape)
    shape[dim] = count
    return torch.zeros(shape, dtype=torch.long).index_add(dim, group, chosen.long()) > 0


def _own(sizes: Tensor, expected: Tensor) -> float:
    """Return the share of the changes in the expected tokens, the lowest of all sets; 0 if none expects a token."""
    if not expected.any():
        return 0.0
    total = sizes.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((sizes.square() * expected).sum(1) / total)[expected.any(1)].min())


def _wins(sizes: Tensor, expected: Tensor, left_out: Tensor) -> float:
    """Return how often changes of expected tokens exceed those of the tokens not left out, the lowest of all sets."""
    lowest = 1.0
    for size, hit, out in zip(sizes, expected, left_out, strict=True):
        positive, negative = size[hit], size[~out]
        if len(positive) and len(negative):
            ranks = torch.cat([positive, negative]).argsort(stable=True).argsort().double()
            wins = float(ranks[: len(positive)].sum()) - len(positive) * (len(positive) - 1) / 2
            lowest = min(lowest, wins / (len(positive) * len(negative)))
    return lowest
