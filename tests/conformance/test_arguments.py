"""Tests of targets, baselines, masks and additional arguments, in all forms that Captum accepts."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from .models import Case, Fixed, Scaled, fresh, watched
from .subjects import over
from .trials import Trial, assert_close

ONE_FOR_ALL = (1, torch.tensor(1), torch.tensor([1]), torch.tensor([1, 1]), [1, 1], (1,), [(1,), (1,)])
ONE_PER_CLIP = ([2, 0], torch.tensor([2, 0]), [(2,), (0,)])
NO_SUCH_CLASS, TOO_MANY, A_STRING = 7, ([0, 1, 2], torch.tensor([0, 1, 2])), "no label"
EXPLAIN_A_CLASS = ("gradient", "perturbation", "learning")


@over("conv", "two-stream", "vivit", per="kind")
def test_all_forms_of_a_target(trial: Trial) -> None:
    for classes, forms in (((1, 1), ONE_FOR_ALL), ((2, 0), ONE_PER_CLIP)):
        expected = trial.on(replace(trial.case, target=classes)).expected()
        for form in forms:
            assert_close(trial.attribute(target=form), expected)


@over("conv", "vivit", kinds=EXPLAIN_A_CLASS, per="kind", together=True)
def test_map_depends_on_the_target(trial: Trial) -> None:
    found, other = (trial.attribute(target=target) for target in (1, [1, 2]))
    assert_close(found[:1], other[:1])
    assert not torch.allclose(found[1], other[1], rtol=0.1)


@over("conv", "vivit", kinds=EXPLAIN_A_CLASS, per="kind", together=True)
def test_wrong_target_raises(trial: Trial) -> None:
    own = trial.on(fresh(trial.case.name))
    for target in (NO_SUCH_CLASS, *TOO_MANY, A_STRING):
        with pytest.raises((TypeError, ValueError) if trial.subject.ours else (AssertionError, IndexError, ValueError)):
            own.attribute(target=target)


@over("conv", "vivit", kinds=EXPLAIN_A_CLASS, per="kind", together=True)
def test_missing_target_raises(trial: Trial) -> None:
    own = trial.on(fresh(trial.case.name))
    with pytest.raises(ValueError if trial.subject.ours else AssertionError, match=r"(?i)target"):
        own.attribute(target=None)


@over("vivit", kinds=("attention",), together=True)
def test_attention_needs_no_target(trial: Trial) -> None:
    assert torch.equal(trial.attribute(target=None), trial.attribute())


@over("conv", "own")
def test_single_output_needs_no_target(trial: Trial) -> None:
    case = fresh(trial.case.name)
    head: nn.Linear = case.network.head
    case.network.head = single = nn.Linear(head.in_features, 1)
    others = [k for k in range(head.out_features) if k != 1]
    contrast = trial.subject.name == "STAA decomposition"  # explains the target minus the mean of the others
    with torch.no_grad():
        for own, all_classes in ((single.weight, head.weight), (single.bias, head.bias)):
            own.copy_(all_classes[1:2] - contrast * all_classes[others].mean(0, keepdim=True))
    assert_close(trial.on(case).attribute(target=None), trial.attribute(target=1))


def baselines_for(case: Case) -> dict[str, Any]:
    """Return one baseline per form. Several inputs get different baselines."""
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(clip.shape, generator=generator) for clip in case.inputs]
    if len(case.inputs) > 1:
        return {"numbers": (0.5, -1), "tensors": tuple(whole), "a tensor and a number": (whole[0][:1], 0.5)}
    return {"a number": 0.5, "one for all": whole[0][:1], "one per clip": whole[0], "a tuple": (whole[0],)}


@over("conv", "two-stream", "vivit", takes="baselines", every_model=True)
def test_baselines(trial: Trial) -> None:
    before = trial.attribute()
    for form, baselines in baselines_for(trial.case).items():
        found = trial.attribute(baselines=baselines)
        assert_close(found, trial.expected(baselines=baselines))
        assert not torch.allclose(found[0], before[0]), form


@over("conv", "vivit", takes="feature_mask", every_model=True)
def test_feature_masks(trial: Trial) -> None:
    """Masks per clip, with ids of small integer types, and broadcast along several axes."""
    (clip,), layout = trial.case.inputs, trial.case.layout
    shape = list(clip.shape)
    if trial.subject.kind == "learning":  # its maps have no channels
        shape[layout.channel] = 1
    per_clip = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(4)).expand_as(clip)
    frames = torch.arange(clip.shape[layout.time])
    frames = layout.from_working(frames.view(1, -1, 1, 1, 1))
    for mask in (per_clip, per_clip.to(torch.uint8), per_clip.to(torch.int32), per_clip[1:], frames):
        within = (
            4e-3 if trial.subject.kind == "learning" else 1e-5
        )  # with few large regions, rounding errors accumulate
        assert_close(trial.attribute(feature_mask=mask), trial.expected(feature_mask=mask), within)


@over("conv", "two-stream", "own", per="kind")
def test_additional_forward_args(trial: Trial) -> None:
    """A tensor alone, or a tensor and a number. Tensors are split into chunks together with their clips."""
    per_clip = torch.tensor([1.0, -3.0])
    scaled = trial.on(trial.case.around(lambda inner: Scaled(inner, len(trial.case.inputs))))
    for args, factors in ((per_clip, (per_clip,)), ((per_clip, 0.5), (per_clip, 0.5))):
        expected = trial.on(trial.case.around(lambda inner, own=factors: Fixed(inner, *own))).expected()
        assert_close(scaled.attribute(additional_forward_args=args), expected)
    if "perturbations_per_eval" in inspect.signature(trial.subject.method.attribute).parameters:
        assert_close(scaled.attribute(additional_forward_args=args, perturbations_per_eval=3), expected)


@over("conv", "own", per="kind", together=True)
def test_arguments_are_not_changed(trial: Trial) -> None:
    """The call does not write into the clips or other arguments."""
    passed = {"inputs": trial.case.clips, **trial.keywords, "target": torch.tensor(trial.case.target)}
    if "baselines" in trial.method.attribute.__wrapped__.__code__.co_varnames:
        passed["baselines"] = torch.full_like(trial.case.clips, 0.3)
    tensors = {name: (value, value.clone(), value._version) for name, value in passed.items() if torch.is_tensor(value)}
    with watched(trial.case.model) as calls:
        trial.method.attribute(**passed)
    assert calls
    for name, (value, before, version) in tensors.items():
        assert torch.equal(value, before) and value._version == version and not value.requires_grad, name
