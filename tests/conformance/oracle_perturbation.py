"""Slow reference implementation of learned masks: dense interpolation, bisection, and both optimizers written out.

It computes in float64 with one call of the model per mask. It does not use ``captum_staa.perturbation``. The baselines
are those of ``captum_staa.baselines``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from captum_staa import baselines as baseline_functions

from .models import Case, Tensors

Cell = tuple[int, int]
"""Frames per cell, and number of cells along each side."""
SPACE = 20 / 112  # largest blur, as a fraction of the shorter side
PATH = 0.6  # length of all steps
GRADIENTS = 5  # random masks of the warm start
DESCENT, WEIGHT = 0.5, 3.0  # SGD rate and area weight: with the papers' values, few steps barely depend on the model
ACROSS = 6  # cells along each side
BLENDS = ("fade", "shuffle")


class Scene:
    """Score and baselines of a case, and the expansion of cells ``(B, n)`` to voxels ``(B, V)``."""

    def __init__(self, case: Case, cell: Cell, names: Sequence[str], levels: int, baselines: Any, mask: Any) -> None:
        self.model = copy.deepcopy(case.model).double()
        self.clip, self.layout, self.target = case.inputs[0].double(), case.layout, case.target
        self.sides = t, h, w = case.sides
        if mask is None:
            side = max(1.0, min(h, w) / cell[1])
            self.counts = (min(t, max(8, math.ceil(t / cell[0]))), round(h / side), round(w / side))
            dense = interpolation(self.sides, self.counts)[None]  # (1, V, n)
        else:
            self.counts = None
            ids = self.layout.to_working(mask.expand(self.clip.shape[0], *self.clip.shape[1:]))[:, :, 0].flatten(1)
            dense = (ids[..., None] == torch.arange(int(ids.max()) + 1)).double()  # (B, V, n)
        self.dense = dense.expand(len(self.clip), -1, -1)
        self.shares = self.dense.mean(1)  # (B, n)
        self.pyramids = [
            self._levels_of(name, levels, baselines) for name in (names if baselines is None else ["fade"])
        ]

    def _levels_of(self, name: str, levels: int, baselines: Any) -> list[Tensor]:
        if name == "fade":
            given = baselines[0] if isinstance(baselines, tuple) else baselines
            return [torch.as_tensor(0.0 if given is None else given).double().expand_as(self.clip), self.clip]
        if name != "blur":
            make = getattr(baseline_functions, name)
            return [torch.cat([make(clip[None], self.layout) for clip in self.clip]), self.clip]  # clip by clip
        widest = SPACE * min(self.sides[1:])
        steps = [1 - level / (levels - 1) for level in range(levels - 1)]
        return [*(baseline_functions.blur(self.clip, self.layout, space=widest * step) for step in steps), self.clip]

    def score(self, cells: Tensor, pyramid: list[Tensor]) -> Tensor:
        """The target's output under masks ``(B, n)``: a value of ``l / (L - 1)`` gives the ``l``-th level."""
        kept = torch.einsum("bvn,bn->bv", self.dense, cells).view(-1, *self.sides)[:, :, None]
        kept = self.layout.from_working(kept).expand_as(self.clip) * (len(pyramid) - 1)
        below = kept.detach().floor().clamp(0, len(pyramid) - 2).long()
        low, high = (torch.stack(pyramid).gather(0, (below + k)[None])[0] for k in (0, 1))
        clip = low + (kept - below) * (high - low)
        logits = self.model(clip)
        return torch.stack([logits[i, target] for i, target in enumerate(self.target)])

    def loss(self, cells: Tensor, pyramid: list[Tensor], dual: bool) -> Tensor:
        """``(B,)``."""
        loss = -self.score(cells, pyramid)
        return loss + self.score(1 - cells, pyramid) if dual else loss

    def warm_start(self) -> Tensor:
        """``(B, n)``: the sum of gradients at random masks, smoothed over cells, plus 0.5 of it as it is, plus 0.5 of
        the changes by windows.
        """
        slope = torch.zeros_like(self.shares)
        coarse = tuple(min(2, side) for side in self.sides)
        draws = torch.rand(1, GRADIENTS, math.prod(coarse), generator=torch.Generator().manual_seed(0))[0].double()
        for number, draw in enumerate(draws):
            field = interpolation(self.sides, coarse) @ draw
            cells = (torch.einsum("bvn,v->bn", self.dense, field) / self.dense.sum(1).clamp(min=1e-9)).requires_grad_()
            slope += torch.autograd.grad(self.score(cells, self.pyramids[number % len(self.pyramids)]).sum(), cells)[0]
        present = self.shares > 0
        density = torch.where(present, slope / self.shares, 0)
        gradients = standardized(self.smooth(density), present) + 0.5 * standardized(density, present)
        return standardized(gradients, present) + 0.5 * standardized(self.windows(), present)

    def windows(self) -> Tensor:
        """``(B, n)``: for a third of each axis, the standardized score of what it shows minus that of all the rest."""
        counts = tuple(min(3, side) for side in self.sides)
        kept, removed = [], []
        for place in product(*(range(count) for count in counts)):
            box = torch.zeros(self.sides, dtype=torch.double)
            axes = zip(place, self.sides, counts, strict=True)
            box[tuple(slice(-(-i * n // c), -(-(i + 1) * n // c)) for i, n, c in axes)] = 1
            kept.append(self.seen(box, self.pyramids[0]))
            removed.append(self.seen(1 - box, self.pyramids[-1]))
        scores = [torch.stack(own, dim=1) for own in (kept, removed)]
        high, low = (standardized(own, torch.ones_like(own, dtype=torch.bool)) for own in scores)
        voxels = (high - low) @ interpolation(self.sides, counts).T  # (B, V)
        return torch.einsum("bvn,bv->bn", self.dense, voxels) / self.dense.sum(1).clamp(min=1e-9)

    def seen(self, box: Tensor, pyramid: list[Tensor]) -> Tensor:
        """The target's output ``(B,)`` for the clip within a box ``(T, H, W)`` of ones, and the baseline outside."""
        clip = torch.where(self.layout.from_working(box[None, :, None]) > 0, pyramid[-1], pyramid[0])
        logits = self.model(clip)
        return torch.stack([logits[i, target] for i, target in enumerate(self.target)])

    def smooth(self, cells: Tensor) -> Tensor:
        """A Gaussian of 1 cell along time and 2 along height and width; regions are not smoothed."""
        if self.counts is None:
            return cells
        lines = []
        for count, sigma in zip(self.counts, (1, 2, 2), strict=True):
            far = torch.arange(count)[:, None] - torch.arange(count)
            kernel = torch.exp(-((far / sigma) ** 2) / 2) * (far.abs() <= max(1, int(3 * sigma + 0.5)))
            lines.append((kernel / kernel.sum(1, keepdim=True)).double())
        return cells @ torch.kron(torch.kron(lines[0], lines[1]), lines[2]).T

    def maps(self, cells: Tensor) -> Tensor:
        """Maps ``(B, T, H, W)`` of cells ``(B, n)``."""
        return torch.einsum("bvn,bn->bv", self.dense, cells).view(-1, *self.sides)

    def spread(self, maps: Tensor, dtype: torch.dtype) -> Tensors:
        """Attributions with sum 1 per clip, equal in all channels."""
        maps = maps / maps.sum((1, 2, 3), keepdim=True)
        count = self.clip.shape[self.layout.channel]
        return (self.layout.from_working((maps / count)[:, :, None].expand(-1, -1, count, -1, -1)).to(dtype),)


def nested(
    case: Case, areas: Sequence[float], iterations: int, baselines: Any = None, feature_mask: Any = None, **_: Any
) -> Tensors:
    """One score per cell, initialized by gradients and windows, learned for both aims by steps of equal length."""
    scene = Scene(case, (2, ACROSS), BLENDS, 2, baselines, feature_mask)
    present = scene.shares > 0
    values = standardized(scene.warm_start(), present)
    low, high = 0.1 * min(areas), max(areas)

    def energy(values: Tensor) -> Tensor:
        found = torch.zeros(len(values), dtype=torch.double)
        for area, pyramid in product(areas, scene.pyramids):
            found += scene.loss(masks_with_area(values, scene.shares, area, 0.1), pyramid, dual=True)
        return found / len(areas) / len(scene.pyramids)

    start, before, largest = values, energy(values), torch.zeros(len(values), 1).double()
    for step in range(iterations):
        leaf = values.clone().requires_grad_()
        area, softness = low * (high / low) ** (step * (5**0.5 - 1) / 2 % 1), 0.1 ** (step / max(1, iterations - 1))
        cells = masks_with_area(leaf, scene.shares, area, softness)
        (slope,) = torch.autograd.grad(scene.loss(cells, scene.pyramids[step % len(scene.pyramids)], True).sum(), leaf)
        size = (slope.square().sum(1, keepdim=True) / present.sum(1, keepdim=True)).sqrt()
        largest = torch.maximum(largest, size)
        values = values - PATH / iterations * slope / torch.maximum(size, largest / 1000)
    best = torch.where((energy(values) < before)[:, None], values, start)
    levels = [low * (high / low) ** (k / 23) for k in range(24)]
    maps = torch.zeros_like(scene.maps(best))
    for level in levels:
        threshold = thresholds(best, scene.shares, level, 0.5)
        maps += ((scene.maps(best) - threshold[:, None, None, None]) / 0.5).sigmoid() / level
    return scene.spread(maps, case.inputs[0].dtype)


def standardized(values: Tensor, present: Tensor) -> Tensor:
    """Rows ``(B, n)`` of mean 0 and deviation 1 over the regions that are present in a clip, and 0 elsewhere."""
    rows = []
    for row, here in zip(values, present, strict=True):
        own = row[here]
        rows.append(torch.zeros_like(row).masked_scatter(here, (own - own.mean()) / own.std(correction=0)))
    return torch.stack(rows)


def thresholds(values: Tensor, shares: Tensor, area: float, softness: float) -> Tensor:
    """``(B,)``: what must be subtracted from the scores so that the mean of the sigmoid is the area."""
    low, high = values.amin(1) - 40 * softness, values.amax(1) + 40 * softness
    for _ in range(80):
        middle = (low + high) / 2
        large = (shares * ((values - middle[:, None]) / softness).sigmoid()).sum(1) > area
        low, high = torch.where(large, middle, low), torch.where(large, high, middle)
    return low


def masks_with_area(values: Tensor, shares: Tensor, area: float, softness: float) -> Tensor:
    """Masks of this area. The threshold is found by bisection; one Newton step at the root makes it differentiable."""

    def left(threshold: Tensor) -> Tensor:
        return (shares * ((values - threshold[:, None]) / softness).sigmoid()).sum(1)

    with torch.no_grad():
        low = thresholds(values, shares, area, softness)
    at = low.clone().requires_grad_()
    with torch.enable_grad():
        (fall,) = torch.autograd.grad(left(at).sum(), at)
    at = low - (left(low) - area) / fall.clamp(max=-1e-300)
    return ((values - at[:, None]) / softness).sigmoid()


def step(
    case: Case, areas: Sequence[float], iterations: int, baselines: Any = None, feature_mask: Any = None, **_: Any
) -> Tensors:
    """One mask per area, by the papers' SGD for "preserve", starting from :func:`ramp`, with a final blur."""
    scene = Scene(case, (1, ACROSS), ["blur"], 8, baselines, feature_mask)
    windows = ellipsoids(scene.sides)  # (W, V)
    (pyramid,), count = scene.pyramids, len(windows)

    def energy(values: Tensor, weight: float, with_windows: bool = True) -> Tensor:
        """``(B,)``, the mean over areas."""
        found = []
        for area, cells in zip(areas, values, strict=True):
            full_count = min(max(round(area * count), 1), count - 1)
            sums = torch.einsum("bvn,bn->bv", scene.dense, cells) @ windows.T
            means = sums / windows.sum(1).clamp(min=1)
            full = torch.stack([_full(row, full_count) for row in means.detach()])
            rough = (full * (means - 1).square()).sum(1) / full_count
            rough = rough + ((1 - full) * means.square()).sum(1) / (count - full_count)
            targets = torch.stack([_targets(*row, area) for row in zip(cells, scene.shares, strict=True)])
            far = (scene.shares * (cells - targets).square()).sum(1)
            found.append(scene.loss(cells, pyramid, dual=False) + rough * with_windows + weight * far)
        return torch.stack(found).mean(0)

    values = ramp(scene.shares.shape[1]).expand(len(areas), *scene.shares.shape)
    start, before, speed = values, energy(values, WEIGHT), None
    for number in range(iterations):
        leaf = values.clamp(0, 1).requires_grad_()
        total = energy(leaf, WEIGHT * 1.0008668**number, number >= 1).sum()  # the windows count from the second step
        (slope,) = torch.autograd.grad(len(areas) * total, leaf)
        speed = slope if speed is None else 0.9 * speed + 0.1 * slope
        values = leaf.detach() - DESCENT * speed
    after = energy(values.clamp(0, 1), WEIGHT)
    best = torch.where((after < before)[:, None], values.clamp(0, 1), start)
    maps, sigma = scene.maps(best.sum(0)), 10 / 112 * min(scene.sides[1:])
    for axis in (2, 3):
        far = torch.arange(maps.shape[axis])[:, None] - torch.arange(maps.shape[axis])
        kernel = torch.exp(-((far / sigma) ** 2) / 2) * (far.abs() <= max(1, int(3 * sigma + 0.5)))
        kernel = (kernel / kernel.sum(1, keepdim=True)).double()
        maps = torch.tensordot(maps, kernel, ([axis], [1])).movedim(-1, axis)
    return scene.spread(maps, case.inputs[0].dtype)


def ramp(count: int) -> Tensor:
    """Initial values that are all different. The order of equal values would depend on rounding."""
    return 0.45 + 0.1 * (torch.arange(count, dtype=torch.double) * (5**0.5 - 1) / 2 % 1)


def _targets(values: Tensor, widths: Tensor, area: float) -> Tensor:
    """Targets ``(n,)``: for values in ascending order, the fraction of each cell above ``1 - area``."""
    targets, low = torch.zeros_like(values), 0.0
    for place in values.argsort().tolist():
        width = float(widths[place])
        targets[place] = min(max((low + width - (1 - area)) / width, 0.0), 1.0) if width else 0.0
        low += width
    return targets.detach()


def _full(means: Tensor, full_count: int) -> Tensor:
    """``(W,)``: 1 for the highest windows, 0 for the others. Equal windows at the boundary share the rest."""
    above = (means > means[:, None] + 1e-6).sum(1)
    equal = ((means - means[:, None]).abs() <= 1e-6).sum(1)
    return ((full_count - above) / equal).clamp(0, 1)


def ellipsoids(sides: tuple[int, int, int]) -> Tensor:
    """Return ``(W, V)``, 1 inside each ellipsoid of 8 frames by 11/112 of a side, half overlapping, past borders."""
    pixels = max(1, round(11 / 112 * min(sides[1:])))
    lengths = [min(8, sides[0]), pixels, pixels]
    starts = []
    for size, length in zip(sides, lengths, strict=True):
        stride = max(1, length // 2)
        starts.append(range(-(length // 2), size + length // 2 - length + 1, stride))
    offsets = []
    for offset in product(*map(range, lengths)):
        radii = [(k - (length - 1) / 2) / (length / 2) for k, length in zip(offset, lengths, strict=True)]
        if sum(radius**2 for radius in radii) <= 1:
            offsets.append(offset)
    rows = torch.zeros(math.prod(map(len, starts)), *sides, dtype=torch.double)
    for row, corner in zip(rows, product(*starts), strict=True):
        for offset in offsets:
            place = [a + b for a, b in zip(corner, offset, strict=True)]
            if all(0 <= at < size for at, size in zip(place, sides, strict=True)):
                row[tuple(place)] = 1
    return rows.flatten(1)


def interpolation(sides: tuple[int, ...], counts: tuple[int, ...]) -> Tensor:
    """``(V, n)``: from cells to voxels."""
    time, height, width = (_hats(size, count) for size, count in zip(sides, counts, strict=True))
    return torch.kron(torch.kron(time, height), width)


def _hats(pixels: int, cells: int) -> Tensor:
    """``(pixels, cells)``: linear between the centers of cells, constant beyond the outermost."""
    found = torch.zeros(pixels, cells, dtype=torch.double)
    for pixel in range(pixels):
        place = min(max((pixel + 0.5) / pixels * cells - 0.5, 0.0), cells - 1.0)
        left = min(int(place), max(cells - 2, 0))
        found[pixel, left] = 1 - (place - left)
        if cells > 1:
            found[pixel, left + 1] = place - left
    return found
