"""Tests of the public interface of a class: its bases, the order of its arguments, its names, and its copies."""

from __future__ import annotations

import copy
import inspect
from types import FunctionType

import pytest
import torch
from captum.attr import (
    Attribution,
    FeatureAblation,
    GradientAttribution,
    IntegratedGradients,
    Occlusion,
    PerturbationAttribution,
)
from tiny_models import randomize

from captum_staa import VideoAttribution

from .models import fresh, watched
from .subjects import over
from .trials import Trial, assert_close


@over("conv", "vivit", per="class", together=True)
def test_bases_and_forward_func(trial: Trial) -> None:
    method = trial.method
    assert isinstance(method, Attribution)
    assert not isinstance(method, GradientAttribution) or trial.subject.kind == "gradient"
    assert isinstance(method, PerturbationAttribution) == issubclass(trial.subject.counterpart, PerturbationAttribution)
    assert method.forward_func is trial.case.model
    assert not trial.subject.ours or not isinstance(method, (FeatureAblation, Occlusion)), (
        "they change in every release"
    )


@over("conv", "vivit", per="class", together=True)
def test_noise_tunnel_finds_the_undecorated_method(trial: Trial) -> None:
    """NoiseTunnel calls ``attribute.__wrapped__``."""
    undecorated = trial.method.attribute.__wrapped__
    found = undecorated(trial.method, trial.case.clips, **trial.keywords)
    assert torch.equal(found, trial.attribute())


@over("conv", "vivit", per="class", together=True)
def test_attribute_future_raises(trial: Trial) -> None:
    with pytest.raises(NotImplementedError, match=f"attribute_future.*{trial.subject.method.__name__}"):
        trial.method.attribute_future()


@over("conv", "vivit", per="class", together=True)
def test_arguments_have_captums_order(trial: Trial) -> None:
    ours = inspect.signature(trial.method.attribute).parameters.values()
    captums = inspect.signature(trial.subject.counterpart.attribute).parameters
    positional = [p for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    names = [p.name for p in positional]
    assert names == [name for name in captums if name in names], "not Captum's names in Captum's order"
    assert names[0] == "inputs" and "target" in names
    for parameter in positional:
        assert parameter.default == captums[parameter.name].default, parameter
    rest = [p for p in ours if p not in positional]
    assert all(p.kind is p.KEYWORD_ONLY for p in rest), "no *args, no **kwargs"
    if trial.subject.ours:
        shown = trial.subject.kind in ("perturbation", "learning")
        assert any(p.name == "show_progress" for p in ours) is shown, "only where there is progress to show"


@over("conv", "vivit", per="class", together=True)
def test_unknown_keyword_raises_type_error(trial: Trial) -> None:
    """A misspelled keyword such as ``feature_masks=`` must not run without the mask."""
    with watched(trial.case.model) as calls, pytest.raises(TypeError, match="feature_masks"):
        trial.attribute(feature_masks=None)
    assert not calls


@over("conv", "vivit", per="class", together=True)
def test_own_arguments_are_keyword_only(trial: Trial) -> None:
    parameters = list(inspect.signature(trial.method.attribute).parameters.values())
    by_position = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    more = [None] * len(by_position)
    if len(by_position) < len(parameters):
        with pytest.raises(TypeError, match="positional argument"):
            trial.method.attribute(trial.case.clips, *more)


@over("conv", "vivit", per="class", together=True)
def test_convergence_delta(trial: Trial) -> None:
    method = trial.method
    accepted = "return_convergence_delta" in inspect.signature(method.attribute).parameters
    assert method.has_convergence_delta() is accepted
    if accepted:
        found, delta = trial.attribute(return_convergence_delta=True)
        with torch.no_grad():
            ends = [trial.case.model(clips) for clips in (trial.case.clips, torch.zeros_like(trial.case.clips))]
        rows = torch.arange(len(delta))
        gain = (ends[0] - ends[1])[rows, list(trial.case.target)]
        torch.testing.assert_close(delta, found.flatten(1).sum(1) - gain, rtol=0, atol=1e-5)


@over("conv", "vivit", per="class", together=True)
def test_multiplies_by_inputs(trial: Trial) -> None:
    """``infidelity`` needs to know whether an attribution is a share of the output (True) or a slope (False)."""
    shares = (PerturbationAttribution, IntegratedGradients)
    assert trial.method.multiplies_by_inputs is issubclass(trial.subject.counterpart, shares)
    assert isinstance(inspect.getattr_static(trial.subject.method, "multiplies_by_inputs"), property)


@over("conv", "vivit", ours=True, per="class", together=True)
def test_get_name_is_the_name_in_tables(trial: Trial) -> None:
    """That of the class, or of the method of a paper, followed by its rule."""
    name = trial.method.get_name().split(" (")[0]  # without the rule
    class_name = trial.subject.method.__name__
    assert name == {"SpatioTemporalPerturbation": "STEP"}.get(class_name, class_name)
    assert isinstance(inspect.getattr_static(trial.subject.method, "get_name"), FunctionType), "of the instance"


@over("conv", "vivit", has="attribute_maps", per="kind", together=True)
def test_attribute_maps_equals_attribute(trial: Trial) -> None:
    """``attribute_maps`` takes the same arguments."""
    rich, plain = (inspect.signature(getattr(trial.method, name)) for name in ("attribute_maps", "attribute"))
    assert rich.parameters == plain.parameters or list(rich.parameters) == ["inputs", "args", "kwargs"]
    parts = trial.method.attribute_maps(trial.case.clips, **trial.keywords)
    expected = VideoAttribution.from_attributions(trial.attribute(), trial.case.layout)
    assert_close(parts.joint, expected.joint)
    assert_close(parts.spatial, expected.spatial)


@over("conv", "vivit", per="kind")
def test_copies(trial: Trial) -> None:
    own = trial.on(fresh(trial.case.name))
    method = own.method
    expected = method.attribute(own.case.clips, **own.keywords)
    shallow, deep = copy.copy(method), copy.deepcopy(method)
    assert shallow.forward_func is method.forward_func and deep.forward_func is not method.forward_func
    for other in (shallow, deep):
        assert torch.equal(other.attribute(own.case.clips, **own.keywords), expected)
    randomize(
        own.case.model, seed=5
    )  # scaling the weights is not enough, because learned masks do not depend on the scale
    assert torch.equal(deep.attribute(own.case.clips, **own.keywords), expected)
    assert not torch.allclose(shallow.attribute(own.case.clips, **own.keywords), expected)
