"""Blends, objectives and presets equal values that are computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from covering import in_one_case
from drawn import drawn, same, uniform
from torch import Tensor

from captum_staa import SpatioTemporalPerturbation, baselines
from captum_staa.perturbation import (
    PRESETS,
    Ellipsoid,
    Nested,
    PerturbationConfig,
    Separate,
    SquaredDifferences,
    TotalVariation,
)
from captum_staa.perturbation.blends import BLENDS, BlurPyramid, blend_of
from captum_staa.perturbation.config import OBJECTIVES, REGULARIZERS, losses


@in_one_case()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [2, 3, 5, 8])
def test_blur_pyramid_is_exact_at_every_level_and_keeps_the_dtype(levels, dtype):
    clips = [(100 * drawn(2, 3, 1, 2, 2, seed=level)).to(dtype) for level in range(levels)]
    wide = torch.promote_types(dtype, torch.float32)
    for level, clip in enumerate(clips):
        blended = BlurPyramid(clips)(torch.full((1, 2, 3, 2, 2), level / (levels - 1), dtype=wide))
        assert blended.dtype == dtype and torch.equal(blended, clip)


@pytest.mark.parametrize("levels", [2, 3, 8])
def test_blur_pyramid_is_linear_between_levels_and_returns_batch_after_batch(levels):
    clips, masks = [drawn(2, 3, 2, 4, 2, seed=level) for level in range(levels)], uniform(3, 2, 3, 4, 2)
    blended, expected = BlurPyramid(clips)(masks), np.zeros((6, 3, 2, 4, 2))
    for number, clip, t, y, x in np.ndindex(*masks.shape):
        place = float(masks[number, clip, t, y, x]) * (levels - 1)
        below = min(math.floor(place), levels - 2)
        for c in range(2):
            low, high = (float(clips[level][clip, t, c, y, x]) for level in (below, below + 1))
            expected[2 * number + clip, t, c, y, x] = low + (place - below) * (high - low)
    same(blended, expected)


@pytest.mark.parametrize("levels", [2, 8])
def test_blend_gradients_equal_finite_differences(levels):
    pyramid = BlurPyramid([drawn(2, 2, 3, 1, 3, seed=level) for level in range(levels)])
    assert torch.autograd.gradcheck(pyramid, (0.05 + 0.9 * uniform(3, 2, 2, 1, 3)).requires_grad_())


def test_gradient_at_a_level_is_the_one_above_and_at_the_last_level_the_one_below():
    """Optimization starts at the ends: everything is kept, or everything is removed."""
    levels = [torch.full((1, 1, 1, 1, 1), value) for value in (0.0, 4.0, 5.0)]
    masks = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1, 1).requires_grad_()
    BlurPyramid(levels)(masks).sum().backward()
    assert masks.grad.flatten().tolist() == [8.0, 2.0, 2.0]


def ends(name: str, clip: Tensor) -> tuple[BlurPyramid, Tensor, Tensor]:
    """The blend, the clip with everything removed, and the clip with everything kept."""
    blend = blend_of(name, clip, torch.full_like(clip, -3.0))
    masks = torch.zeros_like(clip[None, :, :, 0])
    return blend, blend(masks), blend(masks + 1)


@pytest.mark.parametrize("name", [name for name in BLENDS if not name.startswith(("blur", "pyramid"))])
def test_blend_goes_from_the_baseline_of_its_name_to_the_clip(name):
    clip = drawn(2, 5, 4, 6, 7).float()
    blend, removed, kept = ends(name, clip)
    per_clip = [
        torch.full_like(one, -3.0) if name == "fade" else getattr(baselines, name)(one, "BTCHW")
        for one in clip[:, None]
    ]
    expected = torch.cat(per_clip)  # random draws do not depend on the position of a clip in the batch
    assert torch.equal(removed, expected) and torch.equal(kept, clip) and len(blend.levels) == 2
    assert not torch.equal(removed, clip)


@pytest.mark.parametrize(
    ("name", "space", "time", "levels"),
    [("blur", 1, 0, 2), ("blur_time", 0, 1, 2), ("blur_both", 1, 1, 2), ("pyramid", 1, 0, 8)],
)
def test_blur_decreases_linearly_from_level_to_level(name, space, time, levels):
    """The largest deviations are 20 of 112 pixels, as in the paper, and a quarter of the clip's length."""
    for clip in (drawn(1, 6, 2, 14, 9).float(), drawn(1, 6, 2, 9, 14).float()):
        blend, removed, kept = ends(name, clip)
        assert len(blend.levels) == levels and torch.equal(kept, clip)
        for level, blurred in enumerate(blend.levels[:-1]):
            part = (levels - 1 - level) / (levels - 1)
            expected = baselines.blur(clip, "BTCHW", space=space * part * 9 * 20 / 112, time=time * part * 6 / 4)
            same(blurred, expected, 1e-6)
        assert torch.equal(removed, blend.levels[0])
        apart = [float((blurred - clip).square().mean()) for blurred in blend.levels]
        assert apart == sorted(apart, reverse=True) and apart[-1] == 0 < apart[-2]


BY_HAND = {  # p, and p0 of the baseline: the loss if the selection is kept, and if it is removed
    "odds": (lambda p, p0: -math.log(p), lambda p, p0: math.log(1 + p / (1 - p) * (1 - p0) / p0)),
    "log_probability": (lambda p, p0: -math.log(p), lambda p, p0: -math.log(1 - p)),
    "margin": (lambda p, p0: -math.log(p / (1 - p)), lambda p, p0: math.log(p / (1 - p))),
    "logit": (lambda p, p0: -math.log(p / (1 - p)), lambda p, p0: math.log(p / (1 - p))),  # of any output
}


@pytest.mark.parametrize("scale", BY_HAND)
def test_losses_equal_the_formulas(scale):
    p, p0 = [[0.9, 1e-3], [0.2, 0.999], [0.5, 0.04]], [0.01, 0.3]
    logs, baseline_scores = (torch.tensor(values, dtype=torch.float64).logit() for values in (p, p0))
    logs.requires_grad_()
    removed = torch.tensor([False, True, True])
    found = losses(scale, logs, removed, baseline_scores)
    for (row, column), loss in np.ndenumerate(found.detach().numpy()):
        assert loss == pytest.approx(BY_HAND[scale][int(removed[row])](p[row][column], p0[column]), rel=1e-8)
    (slope,) = torch.autograd.grad(found.sum(), logs)  # kept scores should rise, removed scores should fall
    assert bool((torch.where(removed[:, None], slope, -slope) > 0).all())
    assert torch.autograd.gradcheck(lambda s: losses(scale, s, removed, baseline_scores), logs)


def test_objectives_define_the_kinds_of_perturbed_clips():
    assert OBJECTIVES == {"preserve": (False,), "delete": (True,), "dual": (False, True)}


@in_one_case()
@pytest.mark.parametrize("scale", BY_HAND)
@pytest.mark.parametrize("score", [-1e4, 0.0, 1e4])
def test_losses_and_gradients_are_finite_for_certain_models(scale, score):
    odds = torch.full((2, 1), score, requires_grad=True)
    found = losses(scale, odds, torch.tensor([False, True]), torch.tensor([score]))
    (slope,) = torch.autograd.grad(found.sum(), odds)
    assert bool(found.isfinite().all()) and bool(slope.isfinite().all())
    if score > -1:
        assert float(slope[1]) > 0  # the score without the selection should fall, even if the model is certain


@in_one_case()
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"areas": []}, ["areas", "at least one", "[]"]),
        ({"areas": (0.2, 1.0)}, ["areas", "(0, 1)", "(0.2, 1.0)"]),
        ({"areas": (0.0,)}, ["areas", "(0.0,)"]),
        ({"areas": (0.1, math.nan)}, ["areas", "nan"]),
        ({"areas": 1.5}, ["areas", "1.5"]),
        ({"cells": (0, 16)}, ["cells", "at least 1", "got 0"]),
        ({"cells": (2, 0)}, ["cells", "at least 1", "got 0"]),
        ({"iterations": -1}, ["iterations", "at least 0", "-1"]),
        ({"blends": ("blur", "smear")}, ["blends", "'smear'", "'mean_frame'"]),
        ({"blends": ()}, ["blends", "()"]),
    ],
)
def test_invalid_option_raises_value_error_with_its_name(fields, words):
    for make in (lambda: PerturbationConfig(Nested(), **fields), lambda: replace(PRESETS["step"], **fields)):
        with pytest.raises(ValueError) as caught:
            make()
        assert not [word for word in words if word not in str(caught.value)], str(caught.value)


@pytest.mark.parametrize("fields", [{"iterations": 2.5}, {"iterations": True}])
def test_option_of_wrong_type_raises_type_error_with_its_name(fields):
    ((name, value),) = fields.items()
    with pytest.raises(TypeError, match=f"{name} .* of at least .*, got {value!r} of type"):
        PerturbationConfig(Nested(), **fields)


@in_one_case()
@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"objective": "save"}, ValueError, ["objective", "'save'", "'dual'"]),
        ({"scale": "db"}, ValueError, ["scale", "'db'", "'margin'"]),
        ({"regularizer": "rough"}, ValueError, ["regularizer", "'rough'", "'ellipsoid'"]),
        ({"regularizer": 3}, TypeError, ["regularizer", "int"]),
        ({"areas": (2.0,)}, ValueError, ["areas", "2.0"]),
    ],
)
def test_invalid_change_raises_error_with_its_name(fields, error, words):
    with pytest.raises(error) as caught:
        PRESETS["nested"].changed(**fields)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def test_changed_replaces_only_arguments_that_are_not_none():
    step = PRESETS["step"]
    assert step.changed(areas=None, objective=None, scale=None, regularizer=None, iterations=None) == step
    assert step.changed(objective="dual", scale=None) == replace(step, objective="dual")
    words = {"none": None, "tv": TotalVariation(), "squared": SquaredDifferences(), "ellipsoid": Ellipsoid(8, 11 / 112)}
    assert words == REGULARIZERS
    for name, term in words.items():
        assert step.changed(regularizer=name) == replace(step, regularizer=term)
    own = TotalVariation(1.0, 3.0)
    assert step.changed(regularizer=own).regularizer is own
    changed = step.changed(areas=[0.3], iterations=0)  # 0 is a value, None is not
    assert changed == replace(step, areas=(0.3,), iterations=0) and changed.areas == (0.3,)
    assert PerturbationConfig(Nested(), areas=0.25).areas == (0.25,)


def test_presets_of_the_papers_have_their_values():
    step, three, two = (PRESETS[name] for name in ("step", "3d-ep", "2d-ep"))
    assert step == replace(three, regularizer=Ellipsoid(frames=8, side=11 / 112, weight=300, start=100))
    assert two == replace(three, parametrization=Separate(per_frame=True))
    assert three.parametrization == Separate(rate=0.05, weight=300.0, growth=1.0008668, per_frame=False, blur=10 / 112)
    assert three.areas == (0.05, 0.1, 0.15, 0.5) and (three.objective, three.scale) == ("preserve", "log_probability")
    assert (three.regularizer, three.blends, three.iterations) == (None, ("pyramid",), 1200)
    assert three.cells == (1, 16)  # 16 cells are 112 / 7
    assert PRESETS["nested"].parametrization == Nested() and PRESETS["nested"].objective == "dual"
    assert set(PRESETS) == {"nested", "step", "3d-ep", "2d-ep"}


def test_only_the_preset_of_the_paper_is_named_step():
    def name(preset):
        return SpatioTemporalPerturbation(lambda clip: clip, "BTCHW", preset=preset).get_name()

    assert [name(key) for key in ("step", "nested")] == ["STEP", "STEP (nested)"]
    assert [name(key) for key in ("3d-ep", "2d-ep")] == ["Extremal perturbation (3D)", "Extremal perturbation (2D)"]
    assert (
        name(PRESETS["step"]) == name(replace(PRESETS["step"], regularizer=Ellipsoid(weight=300, start=100))) == "STEP"
    )
    assert name(PRESETS["step"].changed(iterations=10)) == "STEP (custom)"
