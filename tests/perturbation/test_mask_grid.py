"""Mask grids and area constraints equal loops over voxels and a root finder."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from covering import in_one_case
from mask_grids import AREAS, MASK_GRIDS, WIDE, by_root, drawn, regions, same, still, uniform
from torch import Tensor

from captum_staa.attr.perturbation import _grid
from captum_staa.perturbation import PRESETS
from captum_staa.perturbation.mask_grid import CellGrid, MaskGrid, RegionGrid
from captum_staa.perturbation.masks import masks_with_area, rank_penalty

SIZES = [  # cells that divide the size, cells that do not, one per pixel, one for the clip
    ((4, 6, 8), (2, 3, 2)),
    ((5, 4, 7), (3, 3, 3)),
    ((3, 2, 4), (3, 2, 4)),
    ((4, 3, 5), (1, 1, 1)),
    ((1, 7, 2), (1, 4, 1)),
]


@pytest.fixture(params=MASK_GRIDS)
def grid(request) -> MaskGrid:
    return MASK_GRIDS[request.param]()


# --- grids -------------------------------------------------------------------------------------------------------


def hat(pixels: int, cells: int) -> list[list[tuple[int, float]]]:
    """For each pixel: the neighboring cells and their interpolation weights."""
    found = []
    for pixel in range(pixels):
        place = min(max((pixel + 0.5) * cells / pixels - 0.5, 0.0), cells - 1.0)
        below = math.floor(place)
        found.append([(below, 1 - place + below)] + ([(below + 1, place - below)] if place > below else []))
    return found


def parts(size, cells):
    """Yield each voxel, each cell with a weight for it, and the weight."""
    axes = [hat(*pair) for pair in zip(size, cells, strict=True)]
    for t, y, x in np.ndindex(*size):
        for (i, a), (j, b), (k, c) in itertools.product(axes[0][t], axes[1][y], axes[2][x]):
            yield (t, y, x), (i * cells[1] + j) * cells[2] + k, a * b * c


@in_one_case()
@pytest.mark.parametrize(("size", "cells"), SIZES)
def test_cell_grid_spread_equals_voxel_loop_and_torch_interpolate(size, cells):
    values = drawn(2, 3, math.prod(cells))
    found = CellGrid(size, cells, WIDE).spread(values)
    expected = np.zeros((2, 3, *size))
    for voxel, cell, share in parts(size, cells):
        expected[(..., *voxel)] += share * values[:, :, cell].numpy()
    same(found, expected)
    same(found, F.interpolate(values.unflatten(2, cells), size, mode="trilinear", align_corners=False))


@in_one_case()
@pytest.mark.parametrize(("size", "cells"), SIZES)
def test_cell_grid_gather_equals_weighted_mean_by_loop(size, cells):
    maps = drawn(2, *size)
    sums, weights = np.zeros((2, math.prod(cells))), np.zeros(math.prod(cells))
    for voxel, cell, share in parts(size, cells):
        sums[:, cell] += share * maps[(slice(None), *voxel)].numpy()
        weights[cell] += share
    grid = CellGrid(size, cells, WIDE)
    same(grid.gather(maps), sums / weights)
    same(grid.shares[0], weights / math.prod(size))
    assert grid.slices == cells[0]


def test_cell_grid_with_one_cell_per_pixel_is_the_identity():
    maps = drawn(1, 3, 2, 4)
    grid = CellGrid((3, 2, 4), (3, 2, 4), WIDE)
    assert torch.equal(grid.spread(maps.flatten(1)[:, None])[:, 0], maps)
    assert torch.equal(grid.gather(maps), maps.flatten(1))


def test_mean_of_a_mask_equals_the_mean_of_its_values_weighted_by_shares(grid):
    values = drawn(2, 4, grid.shares.shape[1])
    same(grid.spread(values).mean((2, 3, 4)), (values * grid.shares[:, None]).sum(2))
    same(grid.shares.sum(1), torch.ones(len(grid.shares)))


def test_gather_is_the_normalized_adjoint_of_spread(grid):
    """The adjoint is computed by autograd. A constant map gives the constant, or 0 for a missing region."""
    values = drawn(2, 1, grid.shares.shape[1]).requires_grad_()
    spread = grid.spread(values)
    maps = drawn(*spread.shape, seed=1)
    (slope,) = torch.autograd.grad(spread, values, maps)
    same(slope[:, 0], grid.gather(maps[:, 0]) * grid.shares * maps[0].numel())
    same(grid.gather(torch.full_like(maps[:, 0], 7.0)), 7.0 * (grid.shares > 0).expand(2, -1))


@pytest.mark.parametrize("name", ["one mask", "a mask per clip"])
def test_region_grid_equals_loops(name):
    grid = MASK_GRIDS[name]()
    n = grid.shares.shape[1]
    values, size = drawn(2, 3, n), tuple(grid.ids.shape[1:])
    maps = drawn(2, *size, seed=3)
    spread, gathered = grid.spread(values), grid.gather(maps)
    for clip in range(2):
        ids = grid.ids[min(clip, len(grid.ids) - 1)]
        members: list[list[float]] = [[] for _ in range(n)]
        for voxel in np.ndindex(*size):
            region = int(ids[voxel])
            members[region].append(float(maps[(clip, *voxel)]))
            assert torch.equal(spread[(clip, slice(None), *voxel)], values[clip, :, region])
        same(gathered[clip], [sum(each) / len(each) if each else 0.0 for each in members])
        same(grid.shares[min(clip, len(grid.ids) - 1)], [len(each) / ids.numel() for each in members])
    assert grid.slices == 1


def test_grids_have_the_requested_dtype():
    ids = torch.arange(4).view(1, 4, 1, 1)
    for like, dtype in ((WIDE, torch.float64), (None, torch.float32)):
        for grid in (CellGrid((4, 2, 2), (2, 1, 2), like), RegionGrid(ids, like)):
            assert grid.shares.dtype == grid.spread(grid.shares[:, None]).dtype == dtype
    assert RegionGrid(ids.expand(3, -1, -1, -1)).spread(torch.eye(4)[None].expand(3, -1, -1)).shape == (3, 4, 4, 1, 1)


# --- areas --------------------------------------------------------------------------------------------------------


@in_one_case()
@pytest.mark.parametrize("softness", [0.02, 0.3, 5.0])
def test_masks_with_area_have_exact_areas_and_equal_a_root_finder(grid, softness):
    scores = 3 * drawn(2, grid.shares.shape[1])
    found = masks_with_area(scores, AREAS[None], grid, softness)
    same(grid.spread(found).mean((2, 3, 4)), AREAS.expand(2, -1), 1e-6)
    for clip, (number, area) in itertools.product(range(2), enumerate(AREAS.tolist())):
        shares = grid.shares[min(clip, len(grid.shares) - 1)]
        same(found[clip, number], by_root(scores[clip], shares, area, softness), 1e-6)


def test_areas_are_exact_in_single_precision():
    grid, areas = CellGrid((4, 8, 8), (4, 8, 8)), AREAS[None].float()
    found = masks_with_area(drawn(3, 256, dtype=torch.float32), areas, grid, 0.1)
    same(found.mean(2), areas.expand(3, -1), 2e-6)


def test_masks_with_area_take_areas_per_clip():
    grid, scores = regions(), drawn(2, 5)
    areas = torch.tensor([[0.1, 0.6], [0.8, 0.3]], dtype=torch.float64)
    found = masks_with_area(scores, areas, grid, 0.2)
    same(grid.spread(found).mean((2, 3, 4)), areas, 1e-6)


def test_per_frame_each_slice_has_the_area():
    grid = CellGrid((4, 3, 6), (4, 3, 3), WIDE)
    scores = 3 * drawn(2, 36) + torch.arange(4.0, dtype=torch.float64).repeat_interleave(9)
    found = masks_with_area(scores, AREAS[None], grid, 0.2, per_frame=True)
    same(grid.spread(found).mean((3, 4)), AREAS[:, None].expand(2, -1, 4), 1e-6)
    shares = grid.shares[0, :9]
    for clip, number, t in np.ndindex(2, len(AREAS), 4):
        cells = slice(9 * t, 9 * t + 9)
        same(found[clip, number, cells], by_root(scores[clip, cells], shares, float(AREAS[number]), 0.2), 1e-6)


def test_per_frame_unequal_slices_have_the_area():
    """Five frames in three slices: the outer two have 32 % of the clip each, the middle one has 36 %."""
    grid = CellGrid((5, 1, 4), (3, 1, 4), WIDE)
    found = masks_with_area(drawn(1, 12), AREAS[None], grid, 0.2, per_frame=True)
    means = (found * grid.shares[:, None]).unflatten(2, (3, 4)).sum(3) / grid.shares.view(3, 4).sum(1)
    same(means, AREAS[None, :, None].expand(1, -1, 3), 1e-6)


def test_rank_penalty_per_frame_is_zero_for_a_step_in_each_unequal_slice():
    grid = CellGrid((5, 1, 4), (3, 1, 4), WIDE)
    steps = torch.tensor([1.0, 0, 0, 0] * 3, dtype=torch.float64)[None, None]  # a quarter of each slice
    same(rank_penalty(steps, torch.tensor([0.25], dtype=torch.float64), grid, per_frame=True), [[0.0]])


def test_masks_are_nested_and_increase_with_the_scores(grid):
    scores = drawn(1, grid.shares.shape[1], seed=4)
    found = masks_with_area(scores, AREAS[None], grid, 0.5)
    assert bool((found.diff(dim=1) > 0).all())
    assert bool((found[0][:, scores[0].argsort()].diff(dim=1) > 0).all())
    raised = scores.clone()
    raised[:, 2] += 1.0
    change = masks_with_area(raised, AREAS[None], grid, 0.5) - found
    others = torch.arange(scores.shape[1]) != 2
    moved = change[grid.shares[:, 2] > 0] if len(grid.shares) > 1 else change
    assert bool((moved[:, :, 2] > 0).all()) and bool((moved[:, :, others] < 0).all())


def test_adding_a_constant_to_all_scores_does_not_change_masks(grid):
    scores = drawn(2, grid.shares.shape[1])
    same(masks_with_area(scores + 41.5, AREAS[None], grid, 0.3), masks_with_area(scores, AREAS[None], grid, 0.3), 1e-6)


def test_equal_scores_share_the_area():
    grid = CellGrid((1, 2, 2), (1, 2, 2), WIDE)
    areas = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    found = masks_with_area(torch.tensor([[1.0, 1, 0, 0], [5, 5, 5, 5]], dtype=torch.float64), areas, grid, 0.01)
    same(found, [[[0.5, 0.5, 0, 0], [1, 1, 0.5, 0.5]], [[0.25] * 4, [0.75] * 4]], 1e-6)


@in_one_case()
@pytest.mark.parametrize("per_frame", [False, True])
def test_mask_gradients_equal_finite_differences_and_keep_the_area(grid, per_frame):
    scores, areas = drawn(2, grid.shares.shape[1]).requires_grad_(), AREAS[None, 1:4]

    def masks(values: Tensor) -> Tensor:
        return masks_with_area(values, areas, grid, 0.5, per_frame=per_frame)

    assert torch.autograd.gradcheck(masks, scores, eps=1e-3, atol=2e-4, rtol=1e-3)
    volume = (masks(scores) * grid.shares[:, None]).sum(2)
    (slope,) = torch.autograd.grad(volume, scores, torch.ones_like(volume), retain_graph=True)
    same(slope, torch.zeros_like(slope))
    (slope,) = torch.autograd.grad(
        masks(scores)[:, :, 0].sum(), scores
    )  # one cell: constant if all scores increase equally
    assert float(slope.abs().max()) > 0.01
    same(slope.sum(1), torch.zeros(2))


def test_gradients_of_binary_masks_are_finite():
    """If scores are far apart, all slopes are 0 in floating point. The result must not be 0 / 0."""
    scores = torch.tensor([[0.0, 0.0, 1e3, 1e3]], requires_grad=True)
    masks = masks_with_area(scores, torch.tensor([[0.5]]), CellGrid((1, 1, 4), (1, 1, 4)), 1e-9)
    masks[0, 0, 3].backward()
    same(masks, [[[0.0, 0, 1, 1]]])
    assert bool(scores.grad.isfinite().all())


# --- the papers' area term -----------------------------------------------------------------------------------------


def papers_term(values: list[float], area: float) -> float:
    """The squared distance of sorted pixels from a step after ``(1 - a) n`` of them."""
    zeros = round((1 - area) * len(values))
    return sum((value - (place >= zeros)) ** 2 for place, value in enumerate(sorted(values))) / len(values)


def of_shares(values: list[float], shares: list[float], area: float) -> float:
    """Sorted cells: the target of each is the fraction of the cell above ``1 - a`` of the volume."""
    total, before = 0.0, 0.0
    for value, share in sorted(zip(values, shares, strict=True)):
        if share:
            beyond = max(0.0, before + share - max(before, 1 - area))
            total += share * (value - beyond / share) ** 2
        before += share
    return total


@in_one_case()
@pytest.mark.parametrize("per_frame", [False, True])
def test_equal_cells_are_asked_for_the_papers_step(per_frame):
    grid = CellGrid((4, 2, 5), (4, 1, 5), WIDE)
    values, areas = uniform(2, 4, 20), torch.tensor([0.2, 0.4, 0.8, 0.53], dtype=torch.float64)
    found = rank_penalty(values, areas, grid, per_frame=per_frame)
    for clip, number in np.ndindex(2, 4):
        groups = (values[clip, number].view(4, 5) if per_frame else values[clip, number].view(1, 20)).tolist()
        if number < 3:
            terms = [papers_term(group, float(areas[number])) for group in groups]
        else:  # the step is within a cell
            terms = [of_shares(group, [1 / len(group)] * len(group), float(areas[number])) for group in groups]
        same(found[clip, number], sum(terms) / len(terms))


def test_unequal_shares_by_a_loop_and_by_pixels(grid):
    n = grid.shares.shape[1]
    values = uniform(2, len(AREAS), n, seed=5)
    found = rank_penalty(values, AREAS, grid)
    for clip, number in np.ndindex(2, len(AREAS)):
        shares = grid.shares[min(clip, len(grid.shares) - 1)]
        same(found[clip, number], of_shares(values[clip, number].tolist(), shares.tolist(), float(AREAS[number])))
    one = still()  # in ascending order 6, 1, 3 and 2 voxels: these steps fall between two cells
    values = torch.tensor([0.1, 0.6, 0.9, 0.3], dtype=torch.float64).expand(1, 3, 4)
    areas = torch.tensor([2 / 12, 5 / 12, 6 / 12], dtype=torch.float64)
    pixels = one.spread(values).flatten(2)[0]
    expected = [papers_term(row.tolist(), float(area)) for row, area in zip(pixels, areas, strict=True)]
    same(rank_penalty(values, areas, one)[0], expected)


def test_a_region_that_a_clip_lacks_costs_nothing_also_right_at_the_step():
    grid = RegionGrid(torch.tensor([[0, 1, 2, 2], [0, 0, 2, 2]]).view(2, 4, 1, 1), WIDE)
    values = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64).expand(2, 1, 3)
    expected = [[0.25 * 0.1**2 + 0.25 * 0.2**2 + 0.5 * 0.3**2], [0.5 * 0.1**2 + 0.5 * 0.3**2]]
    same(rank_penalty(values, torch.tensor([0.5], dtype=torch.float64), grid), expected)


def test_gradients_of_the_area_term_are_finite_differences(grid):
    values = (torch.randperm(2 * 3 * grid.shares.shape[1], generator=torch.Generator().manual_seed(6)) + 1.0).double()
    values = (values / values.numel()).view(2, 3, -1).requires_grad_()  # all different, so the order does not change
    for per_frame in (False, True):
        assert torch.autograd.gradcheck(lambda v, p=per_frame: rank_penalty(v, AREAS[:3], grid, per_frame=p), values)


def test_there_is_at_most_one_cell_per_pixel():
    config = replace(PRESETS["nested"], cells=(2, 11))
    grid = _grid(torch.zeros(1, 5, 3, 12, 9), config, None, torch.zeros(()))
    assert grid.cells == (5, 12, 9)


@in_one_case()
@pytest.mark.parametrize(
    ("size", "cells"),
    [
        ((16, 48, 48), (8, 16, 16)),
        ((100, 27, 48), (50, 16, 28)),  # squares of 1.7 pixels
        ((10, 224, 398), (8, 16, 28)),  # at least 8 along time
        ((4, 112, 56), (4, 32, 16)),
        ((64, 8, 6), (32, 8, 6)),
    ],
)
def test_cells_are_squares_of_two_frames_and_short_clips_have_eight_along_time(size, cells):
    frames, height, width = size
    assert _grid(torch.zeros(1, frames, 1, height, width), PRESETS["nested"], None, torch.zeros(())).cells == cells
