"""Tests that a call has no side effects, with or without an error, in every state of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import snapshot
from torch import Tensor

from .models import Case, Doubled, failing, fresh, watched
from .subjects import over
from .trials import Trial, as_tuple, assert_close

DIFFERENTIATES, OTHERS = ("gradient", "learning"), ("perturbation", "attention")


def unusual(case: Case) -> Case:
    """Return a model in a state that differs from all defaults."""
    case = fresh(case.name)
    parameters = list(case.model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    case.model.train()
    list(case.model.modules())[-1].eval()
    case.layer_module.register_forward_hook(lambda module, args, output: None)
    return case


@contextmanager
def unchanged(case: Case) -> Iterator[None]:
    """Check that the model, the clips, the global random state and the grad mode do not change."""
    clips = [(clip, clip.clone(), clip._version, clip.requires_grad, clip.grad) for clip in case.inputs]
    before = snapshot(case.model)
    yield
    assert snapshot(case.model) == before
    for clip, value, version, requires_grad, grad in clips:
        assert torch.equal(clip, value) and clip._version == version
        assert clip.requires_grad is requires_grad and clip.grad is grad


@over("conv", "cnn-lstm", "two-stream", "timesformer", "videomae", per="kind")
def test_call_has_no_side_effects(trial: Trial) -> None:
    own = trial.on(unusual(trial.case))
    with unchanged(own.case):
        own.attribute()


def check_failed_call(trial: Trial, call: int) -> None:
    own = trial.on(unusual(trial.case))
    error = pytest.raises(ZeroDivisionError, match=f"failed on call {call}")
    with failing(own.case.layer_module, call), unchanged(own.case), error:
        own.attribute()
    assert_close(own.attribute(), own.expected())  # and it still works


@over("conv", "two-stream", "timesformer", "vivit", per="kind")
def test_failed_forward_has_no_side_effects(trial: Trial) -> None:
    """The error in the middle of the forward reaches the caller."""
    check_failed_call(trial, call=1)


@over("conv", "two-stream", "vivit", takes="perturbations_per_eval", every_model=True)
def test_failed_later_call_has_no_side_effects(trial: Trial) -> None:
    """The error occurs while a region of the copies is replaced."""
    check_failed_call(trial, call=3)


@over("conv", "vivit", kinds=("gradient", "perturbation", "learning"), per="kind", together=True)
def test_bad_target_has_no_side_effects(trial: Trial) -> None:
    own = trial.on(unusual(trial.case))
    for target in (99, [0, 1, 2], *([None] if trial.subject.ours else [])):
        with unchanged(own.case), pytest.raises((AssertionError, IndexError, ValueError)):
            own.attribute(target=target)


@over("conv", "two-stream", "own", ours=True, per="kind")
def test_model_that_writes_into_its_input(trial: Trial) -> None:
    """The clips of the caller do not change."""
    pure, writing = (trial.on(fresh(trial.case.name).around(lambda m, w=w: Doubled(m, w))) for w in (False, True))
    with unchanged(writing.case):
        assert_close(writing.attribute(), pure.expected())


@over("conv", "two-stream", "vivit", per="kind", together=True)
def test_inputs_that_require_grad(trial: Trial) -> None:
    """Inputs are leaves with a gradient, or part of a graph."""
    expected = as_tuple(trial.attribute())
    leaves = tuple(clip.clone().requires_grad_() for clip in trial.case.inputs)
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    with unchanged(replace(trial.case, inputs=leaves)):
        found = as_tuple(trial.on(replace(trial.case, inputs=leaves)).attribute())
    assert_close(found, expected)
    assert all((leaf.grad == 1).all() for leaf in leaves)
    inside = tuple(leaf * 1 for leaf in leaves)
    found = as_tuple(trial.on(replace(trial.case, inputs=inside)).attribute())
    assert all(not part.requires_grad for part in found)
    assert_close(found, expected)


@over("conv", "two-stream", "timesformer", "vivit", per="kind", together=True)
def test_under_no_grad(trial: Trial) -> None:
    """NoiseTunnel and sensitivity_max call in this way. Captum enables gradients for some classes only."""
    expected = trial.attribute()
    with torch.no_grad(), unchanged(trial.case):
        found = trial.attribute()
        assert not torch.is_grad_enabled()
    assert_close(found, expected)


@over("conv", "two-stream", "vivit", kinds=OTHERS, per="kind", together=True)
def test_methods_without_gradients_build_no_graph(trial: Trial) -> None:
    """A graph would store all activations of the model."""
    modes = []
    handle = trial.case.layer_module.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    try:
        trial.attribute()
    finally:
        handle.remove()
    assert modes and not any(modes)


@over("conv", "timesformer", "vivit", kinds=OTHERS, per="kind")
def test_under_inference_mode(trial: Trial) -> None:
    """Without gradients, the results are the same, also for clips created in inference mode."""
    expected = trial.attribute()
    with torch.inference_mode():
        assert_close(trial.attribute(trial.case.clips), expected)
        created = trial.case.clips.clone()
        assert_close(trial.attribute(created), expected)
    assert_close(trial.attribute(created), expected)


@over("conv", "timesformer", "vivit", kinds=DIFFERENTIATES, per="kind", together=True)
def test_gradient_methods_raise_in_inference_mode(trial: Trial) -> None:
    """Outside of inference mode, clips that were created in it are accepted."""
    with torch.inference_mode():
        created = trial.case.clips.clone()
        with watched(trial.case.model) as calls, pytest.raises(ValueError, match=r"inference_mode.*no_grad"):
            trial.attribute(created)
        assert not calls
    assert_close(trial.attribute(created), trial.attribute())


@over("conv", "two-stream", "vivit", per="kind", together=True)
def test_global_random_state_is_not_used_or_changed(trial: Trial) -> None:
    found = []
    with torch.random.fork_rng():
        for seed in (0, 1):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            found.append(trial.attribute())
            assert torch.equal(torch.get_rng_state(), before)
    for first, second in zip(*map(as_tuple, found), strict=True):
        assert torch.equal(first, second)


@over("conv", "vivit", per="kind", together=True)
def test_user_hooks_still_run(trial: Trial) -> None:
    """User hooks may change the output. The explanation is for the model with its hooks."""
    own = trial.on(fresh(trial.case.name))

    def other_way_round(module: Any, args: Any, output: Tensor) -> Tensor:
        return output.flip(-1)  # doubling the output is not enough, because learned masks do not depend on the scale

    handle = own.case.layer_module.register_forward_hook(other_way_round)
    changed = own.attribute()
    assert_close(changed, own.expected())
    handle.remove()
    assert not torch.allclose(changed, own.attribute(), rtol=0.01)
    assert_close(own.attribute(), trial.attribute())
