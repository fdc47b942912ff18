"""Nested and separate parametrizations: areas, initial values, steps, penalties and maps equal their definitions."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from covering import in_one_case
from mask_grids import MASK_GRIDS, WIDE, by_root, drawn, same
from scipy.special import logit
from torch import Tensor

from captum_staa import SpatioTemporalPerturbation
from captum_staa._utils.tensors import gaussian
from captum_staa.perturbation import PRESETS, PerturbationConfig
from captum_staa.perturbation.learning import _random_masks
from captum_staa.perturbation.mask_grid import CellGrid, MaskGrid, RegionGrid
from captum_staa.perturbation.masks import MaskBatch, Nested, Separate, rank_penalty


@pytest.fixture(params=MASK_GRIDS)
def grid(request) -> MaskGrid:
    return MASK_GRIDS[request.param]()


# --- nested masks --------------------------------------------------------------------------------------------------

REQUESTED = torch.tensor([0.1, 0.5, 0.2], dtype=torch.float64)  # not sorted


def small() -> CellGrid:
    return CellGrid((5, 2, 4), (3, 2, 2), WIDE)


def test_nested_steps_draw_areas_that_cover_the_log_range_evenly():
    grid, nested, values = small(), Nested(reach=0.1), drawn(1, 12)
    low, high, places = 0.01, 0.5, []
    for step in range(100):
        masks, areas = nested.draw(values, grid, REQUESTED, step, 0.0)
        assert masks.shape[1] == nested.masks_per_step(3) == len(areas) == 1
        places.append(math.log(areas.item() / low) / math.log(high / low))  # position on the log scale, in 0 .. 1
        same(grid.spread(masks).mean((2, 3, 4))[0], areas, 1e-6)
    assert places[0] == pytest.approx(0, abs=1e-9) and max(places) < 1
    for count in range(2, 101):  # after any number of steps
        taken = sorted(places[:count])
        gaps = count * np.diff([*taken, 1 + taken[0]])
        assert gaps.min() > 0.45 and gaps.max() < 1.9  # holds for the golden ratio only
    again = nested.draw(values, grid, REQUESTED, 7, 0.3)
    assert all(torch.equal(*pair) for pair in zip(again, nested.draw(values, grid, REQUESTED, 7, 0.3), strict=True))


def softness_of(scores: Tensor, masks: Tensor) -> list[float]:
    """The softness, computed from two cells: ``(s - s') / (logit m - logit m')``."""
    odds = logit(masks[0].numpy())
    return ((scores[0, 0] - scores[0, 1]).item() / (odds[:, 0] - odds[:, 1])).tolist()


def test_nested_softness_decreases_geometrically():
    grid, nested, values = small(), Nested(softness=(2.0, 0.5)), drawn(1, 12)
    for progress, softness in ((0.0, 2.0), (0.25, 2 * 0.25**0.25), (0.5, 1.0), (1.0, 0.5)):
        masks = nested.draw(values, grid, REQUESTED, 3, progress).masks
        assert softness_of(values, masks) == pytest.approx([softness], rel=1e-6)
    final = nested.final(values, grid, REQUESTED)
    assert softness_of(values, final) == pytest.approx([0.5] * 3, rel=1e-6)
    same(grid.spread(final).mean((2, 3, 4))[0], REQUESTED, 1e-6)
    assert torch.equal(nested.penalty(MaskBatch(final, REQUESTED), grid, 5), torch.zeros(1, 3, dtype=torch.float64))


def test_nested_starts_from_zeros_or_the_standardized_map():
    grid, nested, init = small(), Nested(), torch.stack([drawn(12), 1000 + 50 * drawn(12, seed=1)])
    assert torch.equal(nested.start(grid, REQUESTED, 2, None), torch.zeros(2, 12, dtype=torch.float64))
    found = nested.start(grid, REQUESTED, 2, init).numpy()
    values = init.numpy()
    same(torch.tensor(found), (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True))


def test_nested_map_is_the_mean_over_24_soft_masks_divided_by_their_areas(grid):
    """Thresholds are those of the cells. They are applied to the scores of voxels, whose order does not change."""
    nested, scores = Nested(softness=(1.0, 0.3), reach=0.2), drawn(2, grid.shares.shape[1])
    found = nested.combined(scores, grid, REQUESTED)
    voxels, levels = grid.spread(scores[:, None])[:, 0], np.geomspace(0.02, 0.5, 24)
    for clip in range(2):
        shares, expected = grid.shares[min(clip, len(grid.shares) - 1)], torch.zeros_like(voxels[clip])
        for level in levels:
            mask = torch.as_tensor(by_root(scores[clip], shares, level, 0.5))
            threshold = scores[clip, 0] - 0.5 * torch.logit(mask[0])
            expected += torch.sigmoid((voxels[clip] - threshold) / 0.5) / level / 24
        same(found[clip], expected, 1e-5)
        assert bool((found[clip].flatten()[voxels[clip].flatten().argsort()].diff() >= 0).all())


# --- separate masks -------------------------------------------------------------------------------------------------


def test_separate_starts_from_ones_or_the_highest_cells_of_each_area():
    grid, separate, init = small(), Separate(), 30 * drawn(2, 12)
    same(separate.start(grid, REQUESTED, 2, None), torch.ones(2, 3, 12))
    found = separate.start(grid, REQUESTED, 2, init)
    for clip, number in np.ndindex(2, 3):
        scores = (init[clip] - init[clip].mean()) / init[clip].numpy().std()
        same(found[clip, number], by_root(scores, grid.shares[0], float(REQUESTED[number]), 0.5), 1e-6)


@in_one_case()
@pytest.mark.parametrize("parametrization", [Nested(), Separate()])
@pytest.mark.parametrize("level", [0.0, 0.1, 5.0])
@pytest.mark.parametrize("cells", [1, 2])
def test_constant_initial_map_gives_uniform_masks(parametrization, level, cells):
    grid = CellGrid((1, 1, 4), (1, 1, cells))
    start = parametrization.start(grid, REQUESTED.float(), 1, torch.full((1, cells), level))
    masks = parametrization.final(start, grid, REQUESTED.float())
    same(masks, REQUESTED[None, :, None].expand(1, -1, cells), 1e-5)


def test_separate_masks_are_clamped_and_their_penalty_weight_grows():
    grid, separate = small(), Separate(weight=10.0, growth=2.0)
    values = (2 * drawn(2, 3, 12)).requires_grad_()
    clamped = values.detach().clamp(0, 1)
    assert float((values.detach() - clamped).abs().max()) > 1
    same(separate.final(values.detach(), grid, REQUESTED), clamped)
    summed = grid.spread(clamped.sum(1, keepdim=True))[:, 0]
    same(Separate(blur=0).combined(values.detach(), grid, REQUESTED), summed)
    sigma = 2 * 10 / 112  # of the shorter side, in pixels
    same(separate.combined(values.detach(), grid, REQUESTED), gaussian(summed, (0, sigma, sigma)))
    masks, areas = separate.draw(values, grid, REQUESTED, 4, 0.5)
    assert torch.equal(masks, clamped) and torch.equal(values, clamped) and torch.equal(areas, REQUESTED)
    (slope,) = torch.autograd.grad(masks.sum(), values)  # also at 0 and 1, or a full mask would never change
    assert torch.equal(slope, torch.ones_like(slope))
    for step in (0, 1, 3):
        expected = 10 * 2**step * rank_penalty(clamped, REQUESTED, grid)
        same(separate.penalty(MaskBatch(clamped, REQUESTED), grid, step), expected)


def test_nested_takes_steps_of_equal_length_and_separate_uses_sgd_with_momentum():
    grid = RegionGrid(torch.tensor([0, 1, 2, 0, 1, 1]).view(2, 3, 1, 1), WIDE)  # the second clip has two regions
    values = [torch.zeros(2, 3, requires_grad=True), torch.zeros(1, 1, 2, requires_grad=True)]
    descents = [Nested(path=2.0).descent(values[0], grid, 10), Separate(rate=0.2).descent(values[1], grid, 10)]
    slopes = torch.tensor([[3.0, -4.0, 0.0], [6.0, -8.0, 0.0]])
    expected, descent, speed = torch.zeros(2, 3), 0.0, 4.0
    for slope in (4.0, -1.0, 3.0):
        descents[0](slope * slopes)
        descents[1](torch.full((1, 1, 2), slope))
        sign = math.copysign(0.2, slope)
        expected -= sign * torch.stack([slopes[0] / math.sqrt(25 / 3), slopes[1] / math.sqrt(100 / 2)])
        speed = 0.9 * speed + 0.1 * slope  # its initial value is the first slope
        descent -= 0.2 * speed
        same(values[0].detach(), expected, 1e-6)
        same(values[1].detach(), [[[descent] * 2]], 1e-6)
    descents[0](torch.zeros(2, 3))  # clips that do not change the output
    expected -= 0.2 * torch.stack([slopes[0] / math.sqrt(25 / 3), slopes[1] / math.sqrt(100 / 2)]) / 10
    descents[0](4e-4 * slopes)  # a 10000th of the largest gradient: rounding errors
    same(values[0].detach(), expected, 1e-6)


def test_per_frame_applies_to_masks_starts_maps_and_penalty():
    grid = CellGrid((2, 1, 4), (2, 1, 4), WIDE)
    scores = torch.arange(8.0, dtype=torch.float64)[None]  # over the volume, the second frame would fill first
    areas = torch.tensor([0.25, 0.5], dtype=torch.float64)
    nested, separate = Nested(per_frame=True), Separate(per_frame=True)
    starts = separate.start(grid, areas, 1, scores)
    for masks, wanted in (
        (nested.final(scores, grid, areas), areas),
        nested.draw(scores, grid, areas, 0, 1.0),
        (starts, areas),
    ):
        same(masks.view(1, -1, 2, 4).mean(3), wanted[None, :, None].expand(1, -1, 2), 1e-6)
    frames = nested.combined(scores, grid, areas).view(1, 2, 4)
    same(frames[:, 0], frames[:, 1], 1e-5)  # the scores of the second frame are 4 higher
    step = torch.tensor([1.0, 0, 0, 0] * 2 + [1, 1, 0, 0] * 2, dtype=torch.float64).view(1, 2, 8)
    lopsided = torch.tensor([0.0, 0, 0, 0, 1, 1, 0, 0] + [0] * 4 + [1] * 4, dtype=torch.float64).view(1, 2, 8)
    same(separate.penalty(MaskBatch(step, areas), grid, 0), torch.zeros(1, 2))
    same(separate.penalty(MaskBatch(lopsided, areas), grid, 0), 300 * torch.tensor([[2 / 8, 4 / 8]]))


# --- initial values -------------------------------------------------------------------------------------------------


def initial_masks(preset: PerturbationConfig, frames: int = 4) -> Tensor:
    """The masks before the first step."""
    clip = drawn(2, frames, 3, 6, 6).float()
    weights = drawn(frames, 3, 6, 6, seed=1).float()
    method = SpatioTemporalPerturbation(lambda x: (weights * x).sum((1, 2, 3, 4)).tanh(), "BTCHW", preset=preset)
    return method.attribute_maps(clip, areas=(0.2, 0.5), iterations=0).masks


def zscores(maps: Tensor) -> Tensor:
    return (maps - maps.mean()) / maps.std(correction=0)


@pytest.mark.parametrize("windows", [0, 3])
def test_initial_map_of_a_linear_model_consists_of_its_contributions(windows):
    """The contribution of each voxel, smoothed and as it is, and those of windows of a third of each side."""
    clip, weights = drawn(1, 8, 1, 6, 6), drawn(8, 1, 6, 6, seed=1)
    own = replace(PRESETS["nested"], parametrization=Nested(windows=windows))
    method = SpatioTemporalPerturbation(lambda x: 1e-3 * (weights * x).sum((1, 2, 3, 4)), "BTCHW", preset=own)
    found = method.attribute_maps(clip, baselines=0, areas=(0.2,), iterations=0).joint
    contributions = (weights * clip)[:, :, 0]  # cells are voxels
    expected = zscores(gaussian(contributions, (1, 2, 2))) + 0.5 * zscores(contributions)
    if windows:  # removed and kept windows of a linear model change the output by the same amount
        slices = contributions.split([3, 3, 2], dim=1)
        sums = torch.stack([part.sum(1).unflatten(1, (3, 2)).unflatten(3, (3, 2)).sum((2, 4)) for part in slices], 1)
        grid = CellGrid((8, 6, 6), (3, 3, 3), sums)
        expected = zscores(expected) + 0.5 * zscores(grid.spread(2 * zscores(sums).flatten(1)[:, None])[:, 0])
    assert torch.equal(found.flatten().argsort(), expected.flatten().argsort())


def test_windows_are_removed_with_the_last_blend_and_kept_with_the_first():
    """The model counts zeros and ones of the clip ``[2, ...]``: zero, the first blend, replaces what is not kept."""
    seen: list[tuple[int, int]] = []

    def model(x):
        if not torch.is_grad_enabled() or not x.requires_grad:
            seen.append((int((x == 0).sum()), int((x == 2).sum())))
        return x.mean((1, 2, 3, 4))

    own = replace(PRESETS["nested"], parametrization=Nested(gradients=0), blends=("fade", "mean_frame"), areas=(0.2,))
    clip = torch.full((1, 4, 1, 6, 6), 2.0)
    clip[:, :2] = 4.0  # its mean frame is 3
    SpatioTemporalPerturbation(model, "BTCHW", preset=own).attribute_maps(clip, iterations=0)
    windows = seen[3 : 3 + 54]  # after the clip and two baselines
    assert all(zeros == 0 for zeros, _ in windows[:27]) and [twos for _, twos in windows[:27]] != [72] * 27
    assert all(zeros == 144 - size for (zeros, _), size in zip(windows[27:], [8] * 9 + [4] * 18, strict=True))


@pytest.mark.parametrize("size", [(1, 5, 2), (2, 7, 9)])
def test_windows_adapt_to_small_clips_and_their_cost_is_exact(size):
    calls = []
    weights = drawn(*size, seed=3).float()

    def model(x):
        calls.append(len(x))
        return (weights * x[:, :, 0]).sum((1, 2, 3))

    own = replace(PRESETS["nested"], parametrization=Nested(gradients=0), blends=("fade",))
    options = {"areas": (0.2,), "iterations": 0}
    one = SpatioTemporalPerturbation(model, "BTCHW", preset=own)
    clip = drawn(2, size[0], 1, *size[1:], seed=4).float()
    single = one.attribute_maps(clip, **options).joint
    count = math.prod(min(3, side) for side in size)
    assert sum(calls) == 2 * (2 + 2 * count + 2), "the clip, the baseline, the windows and an evaluation"
    calls.clear()
    together = one.attribute_maps(clip, perturbations_per_eval=5, **options).joint
    torch.testing.assert_close(together, single, rtol=1e-5, atol=0)
    assert len(calls) == 2 + 2 * -(-count // 5) + 1


def test_random_masks_are_reproducible_and_cover_the_range():
    grid = CellGrid((16, 48, 48), (8, 16, 16))
    masks, state = _random_masks(grid, 20, 2), torch.get_rng_state()
    assert torch.equal(masks, _random_masks(grid, 20, 2)) and torch.equal(state, torch.get_rng_state())
    assert masks.shape == (2, 20, 2048) and torch.equal(masks[0], masks[1])
    assert masks.min() < 0.1 and masks.max() > 0.9 and abs(masks.mean() - 0.5) < 0.05
    corners = masks[0, :, [0, 15, -1]].T  # of cells, where a mask has the value that was drawn
    assert corners.std(1).min() > 0.2 and corners.corrcoef().fill_diagonal_(0).abs().max() < 0.6


def test_single_frame_clip_skips_blends_with_other_frames():
    several = replace(PRESETS["nested"], blends=("fade", "shuffle", "blur", "mean_frame"))
    same(initial_masks(several, 1), initial_masks(replace(several, blends=("fade", "blur")), 1), 0)
    same(
        initial_masks(PerturbationConfig(Nested(), blends=("shuffle",)), 1),
        initial_masks(PerturbationConfig(Nested(), blends=("fade",)), 1),
        0,
    )
