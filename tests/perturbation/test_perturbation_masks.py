"""Nested and separate parametrizations: areas, initial values, steps, penalties and maps equal their definitions."""

from __future__ import annotations

import itertools
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
from captum_staa.perturbation import PRESETS, PerturbationConfig
from captum_staa.perturbation.mask_grid import CellGrid, MaskGrid
from captum_staa.perturbation.masks import MaskBatch, Nested, Separate, rank_penalty


@pytest.fixture(params=MASK_GRIDS)
def grid(request) -> MaskGrid:
    return MASK_GRIDS[request.param]()


# --- nested masks --------------------------------------------------------------------------------------------------

REQUESTED = torch.tensor([0.1, 0.5, 0.2], dtype=torch.float64)  # not sorted


def small() -> CellGrid:
    return CellGrid((5, 2, 4), (3, 2, 2), WIDE)


def test_nested_steps_draw_one_area_per_log_interval_and_cover_it_evenly():
    grid, nested, values = small(), Nested(reach=0.1), drawn(1, 12)
    low, high, places = 0.01, 0.5, []
    for step in range(100):
        masks, areas = nested.draw(values, grid, REQUESTED, step, 0.0)
        place = 3 * np.log(areas.numpy() / low) / math.log(high / low)  # position on the log scale, in 0 .. 3
        assert np.floor(place + 1e-9).tolist() == [0, 1, 2]
        places.append(place - np.arange(3))
        same(grid.spread(masks).mean((2, 3, 4))[0], areas, 1e-6)
    same(torch.tensor(places[0]), [0.0] * 3, 1e-9)
    for part, count in itertools.product(np.array(places).T, range(2, 101)):  # after any number of steps
        taken = sorted(part[:count] % 1)
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
        assert softness_of(values, masks) == pytest.approx([softness] * 3, rel=1e-6)
    final = nested.final(values, grid, REQUESTED)
    assert softness_of(values, final) == pytest.approx([0.5] * 3, rel=1e-6)
    same(grid.spread(final).mean((2, 3, 4))[0], REQUESTED, 1e-6)
    assert torch.equal(nested.penalty(MaskBatch(final, REQUESTED), grid, 5), torch.zeros(1, 3, dtype=torch.float64))


def test_nested_starts_from_zeros_or_half_the_standardized_map():
    grid, nested, init = small(), Nested(), torch.stack([drawn(12), 1000 + 50 * drawn(12, seed=1)])
    assert torch.equal(nested.start(grid, REQUESTED, 2, None), torch.zeros(2, 12, dtype=torch.float64))
    found = nested.start(grid, REQUESTED, 2, init).numpy()
    values = init.numpy()
    same(torch.tensor(found), (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True) / 2)


def test_nested_map_is_the_mean_over_24_masks_divided_by_their_areas(grid):
    nested, scores = Nested(softness=(1.0, 0.3), reach=0.2), drawn(2, grid.shares.shape[1])
    found = nested.weights(scores, grid, REQUESTED)
    levels = np.geomspace(0.02, 0.5, 24)
    for clip in range(2):
        shares = grid.shares[min(clip, len(grid.shares) - 1)]
        masks = [by_root(scores[clip], shares, level, 0.3) / level for level in levels]
        same(found[clip], np.mean(masks, axis=0), 1e-5)
        assert bool((found[clip, scores[clip].argsort()].diff() > 0).all())
    same((found * grid.shares).sum(1), torch.ones(2), 1e-5)


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
    same(separate.weights(values.detach(), grid, REQUESTED), clamped[:, 0] + clamped[:, 1] + clamped[:, 2])
    masks, areas = separate.draw(values, grid, REQUESTED, 4, 0.5)
    assert torch.equal(masks, clamped) and torch.equal(values, clamped) and torch.equal(areas, REQUESTED)
    (slope,) = torch.autograd.grad(masks.sum(), values)  # also at 0 and 1, or a full mask would never change
    assert torch.equal(slope, torch.ones_like(slope))
    for step in (0, 1, 3):
        expected = 10 * 2**step * rank_penalty(clamped, REQUESTED, grid)
        same(separate.penalty(MaskBatch(clamped, REQUESTED), grid, step), expected)


def test_nested_uses_adam_and_separate_uses_sgd_with_momentum():
    values = [torch.zeros(1, 2, requires_grad=True), torch.zeros(1, 1, 2, requires_grad=True)]
    optimizers = [Nested(rate=0.2).optimizer(values[0]), Separate(rate=0.2).optimizer(values[1])]
    adam, descent, first, second, speed = 0.0, 0.0, 0.0, 0.0, 4.0
    for step, slope in enumerate((4.0, -1.0, 3.0), start=1):
        for each, optimizer in zip(values, optimizers, strict=True):
            each.grad = torch.full_like(each, slope)
            optimizer.step()
        first, second = 0.9 * first + 0.1 * slope, 0.99 * second + 0.01 * slope**2
        adam -= 0.2 * (first / (1 - 0.9**step)) / math.sqrt(second / (1 - 0.99**step))
        speed = 0.9 * speed + 0.1 * slope  # its initial value is the first slope
        descent -= 0.2 * speed
        same(values[0].detach(), [[adam] * 2], 1e-6)
        same(values[1].detach(), [[[descent] * 2]], 1e-6)


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
        same(masks.view(1, 2, 2, 4).mean(3), wanted[None, :, None].expand(1, -1, 2), 1e-6)
    same(nested.weights(scores, grid, areas).view(1, 2, 4).mean(2), torch.ones(1, 2), 1e-5)
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


def test_warm_start_depends_on_the_model_and_not_on_the_area_penalty():
    heavy, light = (Separate(warm=True, weight=weight) for weight in (300.0, 0.0))
    found = initial_masks(PerturbationConfig(heavy, frames=1))
    same(found, initial_masks(PerturbationConfig(light, frames=1)), 0)
    assert found.std() > 0.1 and not torch.equal(found, initial_masks(PerturbationConfig(Separate(), frames=1)))


def test_single_frame_clip_skips_blends_with_other_frames():
    same(initial_masks(PRESETS["nested"], 1), initial_masks(replace(PRESETS["nested"], blends=("fade", "blur")), 1), 0)
    same(
        initial_masks(PerturbationConfig(Nested(), blends=("shuffle",)), 1),
        initial_masks(PerturbationConfig(Nested(), blends=("fade",)), 1),
        0,
    )
