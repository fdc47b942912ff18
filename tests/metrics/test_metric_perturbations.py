"""Perturbations for Captum's metrics: their values, and Captum's two metrics computed without Captum."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from captum.attr import IntegratedGradients, Occlusion
from captum.metrics import infidelity, sensitivity_max
from covering import in_one_case
from torch import Tensor, nn

from captum_staa import baselines
from captum_staa.metrics.noise import (
    Perturbation,
    brightness_flicker,
    frame_drop,
    frame_shuffle,
    tubelet_noise,
)

SHAPE = (2, 5, 3, 6, 7)  # (B, T, C, H, W): all sizes differ, so that swapped axes are found
LAYOUT = "BTCHW"
CELLS = (2, 4, 3)


def every() -> dict[str, Perturbation]:
    return {
        "noise": tubelet_noise(LAYOUT, CELLS, 0.3),
        "flicker": brightness_flicker(LAYOUT, 0.3),
        "drop": frame_drop(LAYOUT, 0.4, baseline=0.25),
        "shuffle": frame_shuffle(LAYOUT, 3),
    }


every_one = pytest.mark.parametrize("name", every())


def drawn(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def curved() -> nn.Module:
    """A nonlinear network with fixed weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE[1:]), 6), nn.Tanh(), nn.Linear(6, 3))


# --- the form of each ---------------------------------------------------------------------------------------------


def test_noise_is_one_number_per_tubelet():
    clip = drawn()
    change, perturbed = tubelet_noise(LAYOUT, CELLS, 0.3).for_infidelity(multiply_by_inputs=False)(clip)
    torch.testing.assert_close(clip - change, perturbed)
    seen = set()
    for b, t, y, x in product(range(2), range(0, 5, 2), range(0, 6, 4), range(0, 7, 3)):
        cell = change[b, t : t + 2, :, y : y + 4, x : x + 3]
        assert float(cell.max() - cell.min()) < 1e-6
        seen.add(round(float(cell.mean()), 5))
    assert len(seen) == 2 * 3 * 2 * 3  # each cell of each clip has a different number


def test_noise_has_the_requested_standard_deviation():
    clip = torch.ones(1, 2000, 1, 1, 1)  # as many draws as frames
    for perturbation in (tubelet_noise(LAYOUT, (1, 1, 1), 0.3), brightness_flicker(LAYOUT, 0.3)):
        change = perturbation.for_infidelity(multiply_by_inputs=False)(clip)[0]
        assert float(change.std()) == pytest.approx(0.3, rel=4 / math.sqrt(2 * 2000))
        assert abs(float(change.mean())) < 4 * 0.3 / math.sqrt(2000)


def test_flicker_adds_one_number_per_frame():
    clip = drawn()
    change = brightness_flicker(LAYOUT, 0.3).for_infidelity(multiply_by_inputs=False)(clip)[0]
    frames = change.flatten(2)
    assert float((frames - frames[..., :1]).abs().max()) < 1e-6
    assert len({round(value, 5) for value in frames[..., 0].flatten().tolist()}) == 10


@in_one_case()
@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.2, 1), (0.4, 2), (0.75, 4), (1, 5)])
def test_frame_drop_replaces_only_whole_frames(share, count):
    clip = drawn()
    taken, perturbed = frame_drop(LAYOUT, share, 0.25).for_infidelity(multiply_by_inputs=True)(clip)
    for b in range(2):
        dropped = [t for t in range(5) if bool((perturbed[b, t] == 0.25).all())]
        assert len(dropped) == count
        for t in range(5):
            assert bool((taken[b, t] == float(t in dropped)).all())
            assert t in dropped or torch.equal(perturbed[b, t], clip[b, t])


def test_frame_drop_draws_all_frames_equally_often():
    clip = torch.ones(400, 5, 1, 1, 1)
    taken = frame_drop(LAYOUT, 0.4).for_infidelity(multiply_by_inputs=True)(clip)[0]
    assert float((taken.mean(0) - 0.4).abs().max()) < 4 * math.sqrt(0.24 / 400)


def test_frame_drop_computes_a_baseline_per_clip_in_all_layouts():
    clip = drawn()
    for layout in ("BTCHW", "BCTHW"):
        moved = clip if layout == "BTCHW" else clip.transpose(1, 2)
        perturb = frame_drop(layout, 1, baselines.mean_frame).for_infidelity(multiply_by_inputs=False)
        expected = clip.mean(1, keepdim=True).expand_as(clip)
        found = perturb(moved)[1]
        torch.testing.assert_close(found if layout == "BTCHW" else found.transpose(1, 2), expected)


def test_frame_shuffle_keeps_frames_within_their_window():
    clip = torch.arange(5.0).view(1, 5, 1, 1, 1).expand(300, 5, 1, 2, 2) + 10 * torch.arange(300.0).view(-1, 1, 1, 1, 1)
    perturbed = frame_shuffle(LAYOUT, 3).for_infidelity(multiply_by_inputs=False)(clip)[1]
    orders = [tuple(int(v) % 10 for v in row) for row in perturbed[:, :, 0, 1, 1].tolist()]
    assert perturbed.div(10, rounding_mode="floor")[:, 0, 0, 0, 0].tolist() == list(
        range(300)
    )  # frames stay in their clip
    assert all(sorted(order[:3]) == [0, 1, 2] and sorted(order[3:]) == [3, 4] for order in orders)
    assert len(set(orders)) == 6 * 2  # all orders occur


@in_one_case()
@every_one
def test_layouts_give_the_same_perturbation(name):
    def other(perturbation: Perturbation) -> Perturbation:
        return Perturbation(type(perturbation.layout)("BCTHW"), perturbation.alter)

    clip = drawn()
    for multiply in (False, True):
        here = every()[name].for_infidelity(multiply_by_inputs=multiply)(clip)
        there = other(every()[name]).for_infidelity(multiply_by_inputs=multiply)(clip.transpose(1, 2))
        for mine, theirs in zip(here, there, strict=True):
            torch.testing.assert_close(mine, theirs.transpose(1, 2), rtol=0, atol=0)
            assert mine.is_contiguous() and theirs.is_contiguous()


# --- the two forms ------------------------------------------------------------------------------------------------


@in_one_case()
@every_one
@pytest.mark.parametrize("multiply", [False, True])
def test_infidelity_equals_its_formula(name, multiply):
    """Yeh et al., definition 2.1: the mean of (sum(I * A) - (f(x) - f(x - change)))²."""
    model, clip, target = curved(), drawn(), torch.tensor([1, 2])
    method = IntegratedGradients(model, multiply_by_inputs=multiply)
    baseline = None if name == "drop" else 0.5
    attributions = method.attribute(clip, target=target, baselines=0.25 if name == "drop" else 0.5, n_steps=8)
    perturb = every()[name].for_infidelity(multiply_by_inputs=method.multiplies_by_inputs)
    found = infidelity(model, perturb, clip, attributions, baselines=baseline, target=target, n_perturb_samples=4)

    again = every()[name].for_infidelity(multiply_by_inputs=multiply)
    for b in range(2):
        errors = []
        for _ in range(4):
            perturbed = again(clip[b : b + 1], None if baseline is None else 0.5)[1][0]
            change = clip[b] - perturbed
            if multiply:
                change = change / (clip[b] - (0.25 if name == "drop" else 0.5))
            with torch.no_grad():
                fall = (model(clip[b : b + 1]) - model(perturbed[None]))[0, target[b]]
            errors.append(((change * attributions[b]).sum() - fall) ** 2)
        assert float(found[b]) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-3, abs=1e-6), b


def test_infidelity_of_occlusion_is_exact_where_inputs_equal_the_baseline():
    """Occlusion attributes also to black pixels of a frame: the whole frame was removed."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE[1:]), 1))
    clip = drawn().where(drawn(1) > 0, 0.0)
    occlusion = Occlusion(model)
    attributions = occlusion.attribute(clip, (1, *SHAPE[2:])) / math.prod(SHAPE[2:])
    drop = frame_drop(LAYOUT, 0.4).for_infidelity(multiply_by_inputs=occlusion.multiplies_by_inputs)
    assert float(infidelity(model, drop, clip, attributions).max()) < 1e-8


@in_one_case()
@every_one
def test_sensitivity_equals_its_formula(name):
    model, clip = curved(), drawn(shape=(1, *SHAPE[1:]))
    method = IntegratedGradients(model)
    options = {"target": 1, "n_steps": 4}
    found = sensitivity_max(method.attribute, clip, every()[name].for_sensitivity(), 0.2, 3, **options)
    perturb, original = every()[name].for_sensitivity(), method.attribute(clip, **options)
    changes = [method.attribute(perturb(clip, 0.2), **options) - original for _ in range(3)]
    expected = max(float(change.norm() / original.norm()) for change in changes)
    assert found.tolist() == pytest.approx([expected], rel=1e-4)
    assert expected > 1e-3


@in_one_case()
@every_one
def test_the_radius_bounds_the_change_and_only_scales_it(name):
    clip = drawn().double()
    whole = every()[name].for_infidelity(multiply_by_inputs=False)(clip)[1] - clip
    for radius in (1e-3, 0.3, 100.0):
        change = every()[name].for_sensitivity()(clip, radius) - clip
        for b in range(2):
            factor = min(1.0, radius / float(whole[b].abs().max()))
            torch.testing.assert_close(change[b], whole[b] * factor, rtol=1e-9, atol=1e-12)
            assert float(change[b].abs().max()) <= radius * (1 + 1e-9)


@in_one_case()
@every_one
def test_draws_are_repeatable_and_independent_of_global_state(name):
    clip, state = torch.cat([drawn()[:1]] * 4), torch.random.get_rng_state()
    kept = clip.clone()
    perturb = every()[name].for_sensitivity()
    first, second = perturb(clip, 9.0), perturb(clip, 9.0)
    assert torch.equal(first, every()[name].for_sensitivity()(clip, 9.0))
    assert not torch.equal(first, second)  # otherwise Captum's chunks would repeat the same samples
    assert not all(torch.equal(first[0], row) for row in first)
    assert torch.equal(clip, kept) and torch.equal(state, torch.random.get_rng_state())


def test_a_generator_is_used_and_chunks_of_one_clip_do_not_change_results():
    def noise(seed: int) -> Perturbation:
        return tubelet_noise(LAYOUT, CELLS, 0.3, torch.Generator().manual_seed(seed))

    model, clip = curved(), drawn(shape=(1, *SHAPE[1:]))

    def score(perturbation: Perturbation, most: int | None) -> float:
        form = perturbation.for_infidelity(multiply_by_inputs=False)
        found = infidelity(model, form, clip, clip, target=0, n_perturb_samples=6, max_examples_per_batch=most)
        return float(found)

    assert score(noise(0), None) == pytest.approx(score(noise(0), 4), rel=1e-5)
    assert score(noise(0), None) == pytest.approx(score(tubelet_noise(LAYOUT, CELLS, 0.3), 1), rel=1e-5)
    assert score(noise(0), None) != pytest.approx(score(noise(1), None), rel=1e-3)


@in_one_case()
@every_one
def test_tuples_and_dtypes_without_gradients(name):
    clips = (drawn(), drawn(3)[:, :4])  # two pathways of unequal length, as SlowFast has them
    for perturb in (every()[name].for_infidelity(multiply_by_inputs=True), every()[name].for_sensitivity()):
        options = (0.5,) if perturb.__qualname__.startswith("Perturbation.for_sens") else ()
        found = perturb(clips, *options)
        for part in found if not options else (found,):
            assert isinstance(part, tuple) and [p.shape for p in part] == [c.shape for c in clips]
        for dtype in (torch.bfloat16, torch.float64):
            clip = drawn().to(dtype).requires_grad_()
            found = perturb(clip, *options)
            for part in found if not options else (found,):
                assert part.dtype == dtype and part.shape == clip.shape and not part.requires_grad


# --- invalid arguments --------------------------------------------------------------------------------------------


@in_one_case()
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: tubelet_noise(LAYOUT, (2, 2), 0.1), ValueError, "(2, 2)"),
        (lambda: tubelet_noise(LAYOUT, (0, 2, 2), 0.1), ValueError, "t of cells = (0, 2, 2)"),
        (lambda: tubelet_noise(LAYOUT, CELLS, 0.0), ValueError, "got 0.0"),
        (lambda: tubelet_noise("BTHW", CELLS, 0.1), ValueError, "'BTHW'"),
        (lambda: brightness_flicker(LAYOUT, math.nan), ValueError, "got nan"),
        (lambda: brightness_flicker(LAYOUT, 0.1, generator=3), TypeError, "got 3"),
        (lambda: frame_drop(LAYOUT, 0.0), ValueError, "share=0.25"),
        (lambda: frame_drop(LAYOUT, 1.5), ValueError, "got 1.5"),
        (lambda: frame_drop(LAYOUT, 0.5, math.inf), ValueError, "got inf"),
        (lambda: frame_drop(LAYOUT, 0.5, torch.zeros(SHAPE)), TypeError, "Tensor"),
        (lambda: frame_shuffle(LAYOUT, 1), ValueError, "got 1"),
        (lambda: frame_shuffle(LAYOUT, 2.5), TypeError, "got 2.5"),
        (lambda: every()["noise"].for_infidelity(multiply_by_inputs=1), TypeError, "got 1"),
        (lambda: every()["noise"].for_sensitivity()(drawn(), 0.0), ValueError, "got 0.0"),
        (lambda: every()["noise"].for_sensitivity()(drawn()[0], 0.1), ValueError, "(5, 3, 6, 7)"),
        (lambda: every()["noise"].for_sensitivity()((drawn(), drawn() / 0), 0.1), ValueError, "inputs[1]"),
        (lambda: tubelet_noise(LAYOUT, (6, 1, 1), 1).for_sensitivity()(drawn(), 0.1), ValueError, "got 6"),
        (lambda: frame_shuffle(LAYOUT, 6).for_sensitivity()(drawn(), 0.1), ValueError, "number of frames, 5, got 6"),
        (
            lambda: every()["drop"].for_infidelity(multiply_by_inputs=True)(drawn(), 0.5),
            ValueError,
            "baselines of infidelity must be None",
        ),
        (
            lambda: frame_drop(LAYOUT, 0.5, lambda clip, layout: clip[:, :2]).for_sensitivity()(drawn(), 0.1),
            ValueError,
            "(1, 2, 3, 6, 7)",
        ),
    ],
)
def test_invalid_arguments_raise(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)
