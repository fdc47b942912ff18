"""The table of subjects: every Attribution class of the library, and four classes of Captum, with their test data.

A new class needs one entry in :data:`SUBJECTS`, and an oracle in oracles.py. Every test then runs on it. The tests of
Captum's classes have the marker ``captum``: they show that the tests are right, and what a version of Captum does.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from captum.attr import FeatureAblation, IntegratedGradients, LayerGradCam, Occlusion, Saliency
from covering import all_pairs
from torch import Tensor

from captum_staa import RISE, STAA, SpatioTemporalPerturbation, VideoClassifier
from captum_staa.attr import (
    AnswerAttribution,
    AttentionBranch,
    GradCAM,
    ReleasedSTAA,
    StepAblation,
    VideoFeatureAblation,
    VideoOcclusion,
)
from captum_staa.perturbation import PRESETS, Ellipsoid, Nested, PerturbationConfig, Separate
from captum_staa.perturbation.mask_grid import MaskGrid

from . import oracle_answer, oracle_perturbation, oracle_st_abn, oracles
from .models import ANSWERING, BRANCHED, LANGUAGE, LAYERS, MODELS, TRANSFORMERS, Case, Tensors
from .trials import KINDS, Keywords, Subject, Trial

# Learning takes about a hundred times as long as a gradient, so its tests on other models are marked as slow.
QUICK = ("conv", "conv-btchw", "cnn-lstm")
ONE_CLIP = tuple(name for name in MODELS if name != "two-stream")


def window(case: Case) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return eight windows and their strides. In height the windows overlap, and the last one is cut off."""
    t, h, w = case.sides
    return (t // 2, 2 * h // 3, w // 2), (t // 2, h // 2, w // 2)


def _per_input(case: Case, value: Any) -> Any:
    return value if len(case.inputs) == 1 else (value,) * len(case.inputs)


def _video_windows(case: Case) -> Keywords:
    sides, strides = window(case)
    return {"sliding_window_shapes": _per_input(case, sides), "strides": _per_input(case, strides)}


def _captum_windows(case: Case) -> Keywords:
    """Return windows in Captum's form: one size for each axis after the batch."""

    def full(sides: tuple[int, int, int], clip: Tensor, whole: bool) -> tuple[int, ...]:
        channels = clip.shape[case.layout.channel] if whole else 1
        named = dict(zip("THWC", (*sides, channels), strict=True))
        return tuple(named[axis] for axis in case.layout.axes[1:])

    sides, strides = window(case)
    windows = tuple(full(sides, clip, True) for clip in case.inputs)
    steps = tuple(full(strides, clip, False) for clip in case.inputs)
    return {
        "sliding_window_shapes": windows if len(windows) > 1 else windows[0],
        "strides": steps if len(steps) > 1 else steps[0],
    }


def _occluded(case: Case, baselines: Any = None, **_: Any) -> Tensors:
    return oracles.occlusion(case, *window(case), baselines)


def _masks(case: Case) -> Keywords:
    """Return five random features, the same in all channels. Of two inputs, the first lacks 3 and 4, the second 0."""
    generator = torch.Generator().manual_seed(2)
    masks = []
    for low, high in ((0, 5),) if len(case.inputs) == 1 else ((0, 3), (1, 5)):
        mask = torch.randint(low, high, (1, *case.sides), generator=generator)
        masks.append(case.layout.from_working(mask[:, :, None]))  # (1, T, 1, H, W) and its permutations
    return {"feature_mask": tuple(masks) if len(masks) > 1 else masks[0]}


def _axes(case: Case) -> Any:
    """Return the layout, if the model has none."""
    return None if isinstance(case.model, VideoClassifier) else case.layout


def _staa(name: str, oracle: Callable[..., Tensors], **options: Any) -> Subject:
    return Subject(
        name=f"STAA {name}",
        method=STAA,
        kind="gradient" if options["mode"] == "relevance" else "attention",
        counterpart=LayerGradCam,
        make=lambda case: STAA(case.model, **options),
        oracle=lambda case, **more: oracle(case, **options, **more),
        models=TRANSFORMERS,
        inside=True,
    )


def _grad_cam(weighting: Literal["gradcam", "hirescam", "layercam"]) -> Subject:
    return Subject(
        name=f"GradCAM {weighting}",
        method=GradCAM,
        kind="gradient",
        counterpart=LayerGradCam,
        make=lambda case: GradCAM(case.model, case.layer_module, _axes(case), weighting=weighting),
        oracle=lambda case, **more: oracles.grad_cam(case, weighting, **more),
        inside=True,
    )


def _attention_branch(weighting: str, exempt: str = "") -> Subject:
    return Subject(
        name=f"AttentionBranch {weighting}",
        method=AttentionBranch,
        kind="attention" if weighting == "gate" else "gradient",
        counterpart=LayerGradCam,
        make=lambda case: AttentionBranch(case.model),
        oracle=getattr(oracle_st_abn, weighting),
        keywords=lambda case: {"weighting": weighting},
        models=tuple(LAYERS),
        needs=BRANCHED,
        exempt={"test_single_output_needs_no_target": exempt} if exempt else {},
        inside=True,
    )


class _FromARamp(Separate):
    """The papers' masks, but not starting from all ones, whose order would depend on rounding."""

    def start(self, grid: MaskGrid, areas: Tensor, batch: int, init: Tensor | None) -> Tensor:
        return oracle_perturbation.ramp(grid.shares.shape[1]).to(grid.shares).repeat(batch, len(areas), 1)


LEARNING = {
    "nested": replace(
        PRESETS["nested"],
        parametrization=Nested(gradients=oracle_perturbation.GRADIENTS),
        scale="logit",
        blends=oracle_perturbation.BLENDS,
        cells=(2, oracle_perturbation.ACROSS),
    ),
    "step": replace(
        PRESETS["step"],
        parametrization=_FromARamp(oracle_perturbation.DESCENT, oracle_perturbation.WEIGHT),
        scale="logit",
        regularizer=Ellipsoid(start=1),
        cells=(1, oracle_perturbation.ACROSS),
    ),
}


def _perturbation(
    name: str, preset: PerturbationConfig, oracle: Callable[..., Tensors], models: tuple[str, ...]
) -> Subject:
    return Subject(
        name=f"SpatioTemporalPerturbation {name}",
        method=SpatioTemporalPerturbation,
        kind="learning",
        counterpart=FeatureAblation,
        make=lambda case: SpatioTemporalPerturbation(case.model, _axes(case), preset=preset),
        oracle=oracle,
        keywords=lambda case: {"areas": (0.2, 0.5), "iterations": 3},
        models=models,
    )


PROMPT_INSIDE = "the prompt is part of the classifier"
OF_AN_ANSWER = {
    "test_additional_forward_args": PROMPT_INSIDE,
    "test_single_output_needs_no_target": "an answer has a token and a whole",
    "test_layout_does_not_change_results": "language models have one layout",
    "test_wrong_clip_size_raises": "language models take any number of frames",
    "test_model_that_writes_into_its_input": "the clip is packed before the model gets it",
    "test_one_output_for_the_batch_raises": PROMPT_INSIDE,
    "test_plain_functions": PROMPT_INSIDE,
    "test_traced_models": PROMPT_INSIDE,
    "test_traced_transformers": PROMPT_INSIDE,
    "test_traced_classifiers": PROMPT_INSIDE,
    "test_compiled_classifiers": PROMPT_INSIDE,
    "test_chunk_size_limits_clips_per_call": "steps are removed from features, not from clips",
    "test_progress_bar_counts_the_calls": "the tower runs without the classifier, see test_step_ablation.py",
    "test_one_forward_is_enough": "the language model is called, see test_answer.py",
}


def _answer(mode: Literal["relevance", "attention"]) -> Subject:
    options: dict[str, Any] = {"pattern_weight": 0} if mode == "relevance" else {}
    return Subject(
        name=f"AnswerAttribution {mode}",
        method=AnswerAttribution,
        kind="gradient" if mode == "relevance" else "attention",
        counterpart=LayerGradCam,
        make=lambda case: AnswerAttribution(case.model, mode=mode, **options),
        oracle=getattr(oracle_answer, mode),
        models=tuple(LANGUAGE),
        needs=ANSWERING,
        exempt=OF_AN_ANSWER | ({} if mode == "relevance" else {"test_attention_needs_no_target": "it is of a token"}),
        inside=True,
    )


OURS = (
    _staa("decomposition", oracles.staa, mode="relevance", rule="decomposition", pattern_weight=0),
    _staa("chefer", oracles.staa, mode="relevance", rule="chefer"),
    _staa("attention", oracles.staa, mode="attention"),
    Subject(
        name="ReleasedSTAA",
        method=ReleasedSTAA,
        kind="attention",
        counterpart=LayerGradCam,
        make=lambda case: ReleasedSTAA(case.model),
        oracle=oracles.released,
        models=TRANSFORMERS,
        inside=True,
    ),
    Subject(
        name="VideoOcclusion",
        method=VideoOcclusion,
        kind="perturbation",
        counterpart=Occlusion,
        make=lambda case: VideoOcclusion(case.model, _axes(case)),
        oracle=_occluded,
        keywords=_video_windows,
    ),
    Subject(
        name="VideoFeatureAblation",
        method=VideoFeatureAblation,
        kind="perturbation",
        counterpart=FeatureAblation,
        make=lambda case: VideoFeatureAblation(case.model, _axes(case)),
        oracle=oracles.feature_ablation,
        keywords=_masks,
    ),
    Subject(
        name="RISE",
        method=RISE,
        kind="perturbation",
        counterpart=FeatureAblation,
        make=lambda case: RISE(case.model, _axes(case)),
        oracle=oracles.rise,
        keywords=lambda case: {"n_samples": 7, "n_cells": (2, 3, 2), "keep": 0.4},
    ),
    _perturbation("nested", LEARNING["nested"], oracle_perturbation.nested, ONE_CLIP),
    _perturbation("step", LEARNING["step"], oracle_perturbation.step, ("conv", "conv-btchw", "cnn-lstm", "vivit")),
    _grad_cam("gradcam"),
    _grad_cam("hirescam"),
    _grad_cam("layercam"),
    _answer("relevance"),
    _answer("attention"),
    Subject(
        name="StepAblation",
        method=StepAblation,
        kind="perturbation",
        counterpart=FeatureAblation,
        make=lambda case: StepAblation(case.model),
        oracle=oracle_answer.steps,
        models=tuple(LANGUAGE),
        needs=ANSWERING,
        exempt=OF_AN_ANSWER,
        inside=True,
    ),
    _attention_branch("gate"),
    _attention_branch("grad_gate"),
    _attention_branch("class_map", "the branch has its own classes, which do not change"),
)

LEFT_REQUIRING = "requires_grad of the clip stays set"
MAP_PER_CLASS = "it returns one map per class, of another shape"

CAPTUMS = (  # the failures listed here are failures of Captum 0.9
    Subject(
        name="Saliency",
        method=Saliency,
        kind="gradient",
        counterpart=Saliency,
        make=lambda case: Saliency(case.model),
        oracle=oracles.saliency,
        fails={
            "test_gradient_methods_raise_in_inference_mode": "a RuntimeError of autograd comes through",
            "test_failed_forward_has_no_side_effects": LEFT_REQUIRING,
            "test_bad_target_has_no_side_effects": LEFT_REQUIRING,
        },
        warns="Input Tensor . did not already require gradients",
    ),
    Subject(
        name="IntegratedGradients",
        method=IntegratedGradients,
        kind="gradient",
        counterpart=IntegratedGradients,
        make=lambda case: IntegratedGradients(case.model),
        oracle=oracles.integrated_gradients,
        keywords=lambda case: {"n_steps": 3},
        fails={
            "test_gradient_methods_raise_in_inference_mode": "a RuntimeError of autograd comes through",
            "test_inputs_that_require_grad": "the result stays part of the graph of such a clip",
        },
    ),
    Subject(
        name="FeatureAblation",
        method=FeatureAblation,
        kind="perturbation",
        counterpart=FeatureAblation,
        make=lambda case: FeatureAblation(case.model),
        oracle=oracles.feature_ablation,
        keywords=_masks,
        exempt={"test_attribute_future_raises": "it has them"},
        fails={
            "test_missing_target_raises": MAP_PER_CLASS,
            "test_unknown_keyword_raises_type_error": "its **kwargs accept misspelled names",
            "test_arguments_have_captums_order": "it takes **kwargs",
        },
    ),
    Subject(
        name="Occlusion",
        method=Occlusion,
        kind="perturbation",
        counterpart=Occlusion,
        make=lambda case: Occlusion(case.model),
        oracle=_occluded,
        keywords=_captum_windows,
        fails={
            "test_missing_target_raises": MAP_PER_CLASS,
            "test_progress_bar_counts_the_calls": "its total counts voxels instead of windows",
            "test_double_precision": "its result is float32",
        },
    ),
)

SUBJECTS = (*OURS, *CAPTUMS)


def over(
    *models: str,
    ours: bool = False,
    kinds: tuple[str, ...] = KINDS,
    takes: str = "inputs",
    has: str = "attribute",
    per: Literal["mode", "kind", "class"] = "mode",
    every_model: bool = False,
    together: bool = False,
    slow: tuple[str, ...] = (),
    **values: Iterable[Any],
) -> Any:
    """Run a test with the argument ``trial`` for every subject, on one of the models in turn.

    The turn depends on the test and the subject. So a test sees all its models, a subject is tested on all models that
    it can explain, and every test runs on every subject. Tests of Captum's classes have the marker ``captum``.

    Args:
        *models: names of cases; all models if there is none.
        ours: leave out Captum's classes.
        kinds: only subjects of these kinds.
        takes: only subjects whose ``attribute`` has this argument.
        has: only subjects that have this method.
        per: which subjects run: every mode of every class, or one mode in turn of each kind of a class, or of each
            class. The latter are for tests of what all modes share.
        every_model: all models instead of one of them.
        together: all subjects of the library in one case, for fast tests that ask one question. A failure names the
            subject and the model.
        slow: subjects whose cases have the marker ``slow``.
        **values: values of other arguments of the test, which Captum's code depends on. One combination runs by
            default. All pairs of models and values run with the marker ``captum``.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        line, found = test.__name__, []
        turn = zlib.crc32(line.encode())
        groups: dict[Any, list[Subject]] = {}
        for subject in SUBJECTS:
            can = hasattr(subject.method, has) and takes in inspect.signature(subject.method.attribute).parameters
            known = not models or set(models) & set(subject.models)
            if subject.kind in kinds and can and known and (subject.ours or not ours) and line not in subject.exempt:
                key = {"mode": subject.name, "kind": (subject.method, subject.kind), "class": subject.method}[per]
                groups.setdefault(key, []).append(subject)
        for at, group in enumerate(groups.values(), start=turn):
            subject = group[at % len(group)]
            marks = [] if subject.ours else [pytest.mark.captum]
            if subject.name in slow:
                marks.append(pytest.mark.slow)
            if line in subject.fails:
                marks.append(pytest.mark.xfail(reason=subject.fails[line], strict=True))
            if subject.warns:
                marks.append(pytest.mark.filterwarnings(f"ignore:{subject.warns}:UserWarning"))
            known = [model for model in subject.models if not models or model in models]
            long = [model for model in known if subject.kind == "learning" and model not in QUICK]
            for names, mark in (([name for name in known if name not in long], []), (long, [pytest.mark.slow])):
                rows = all_pairs([names, *map(list, values.values())]) if names else []
                for i, row in enumerate(rows):
                    default = every_model or i == at // len(group) % len(rows)
                    if default or values:
                        more = [] if default else [pytest.mark.captum]
                        name, *others = row
                        trial = subject.on(name)
                        label = "-".join([str(trial), *map(str, others)])
                        found.append(pytest.param(trial, *others, id=label, marks=[*marks, *mark, *more]))
        if not together:
            return pytest.mark.parametrize(("trial", *values), found)(test)
        unmarked = tuple(case.values[0] for case in found if not case.marks)
        marked = [pytest.param(case.values, id=case.id, marks=case.marks) for case in found if case.marks]
        return pytest.mark.parametrize("trials", [pytest.param(unmarked, id="all"), *marked])(_for_each(test))

    return decorate


def _for_each(test: Callable[..., None]) -> Callable[..., None]:
    """Return a test that runs ``test`` on each trial of a tuple."""

    def run(trials: tuple[Trial, ...]) -> None:
        for trial in trials:
            try:
                test(trial)
            except (Exception, pytest.fail.Exception) as error:
                raise AssertionError(f"{trial}: {error}") from error

    run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
    run.pytestmark = list(getattr(test, "pytestmark", []))  # type: ignore[attr-defined]
    return run
