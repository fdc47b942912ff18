"""A model in any state is explained in eval mode and is afterwards what it was."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
import torch
from covering import all_pairs
from model_kinds import KINDS, SIDE, B, Kind, T, Trained
from tiny_models import changes, snapshot
from torch import Tensor, nn
from torch.utils import checkpoint

from captum_staa import (
    RISE,
    STAA,
    AttentionBranch,
    GradCAM,
    SpatioTemporalPerturbation,
    STAAStream,
    VideoClassifier,
    VideoFeatureAblation,
    VideoOcclusion,
    feature_masks,
    metrics,
)
from captum_staa._utils import model_state
from captum_staa._utils.model_state import eval_mode
from captum_staa._utils.networks import networks_of
from captum_staa.attr import ReleasedSTAA
from captum_staa.models import STABN
from captum_staa.models import model_state as running_state

CLIP = KINDS["plain module"].clip
MAP = torch.rand(B, T, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
FRAMES = np.random.default_rng(0).integers(0, 255, (T + 2, SIDE, SIDE, 3), dtype=np.uint8)
CELLS = (2, 8, 8)
Call = Callable[[Any, Kind], Any]  # a model and its kind -> numbers

CALLS: dict[str, Call] = {
    "occlusion": lambda f, k: VideoOcclusion(f, **axes(f, k)).attribute(k.clip, CELLS, CELLS, target=k.target),
    "occlusion, maps": lambda f, k: (
        VideoOcclusion(f, **axes(f, k)).attribute_maps(k.clip, CELLS, CELLS, target=k.target).temporal
    ),
    "ablation": lambda f, k: VideoFeatureAblation(f, **axes(f, k)).attribute(
        k.clip, target=k.target, feature_mask=feature_masks.frames(k.clip, k.layout), perturbations_per_eval=3
    ),
    "RISE": lambda f, k: RISE(f, **axes(f, k)).attribute(k.clip, target=k.target, n_samples=4),
    "perturbation": lambda f, k: SpatioTemporalPerturbation(f, **axes(f, k)).attribute(
        k.clip, target=k.target, iterations=2, areas=(0.3,)
    ),
    "GradCAM": lambda f, k: GradCAM(f, layer_of(f, k), **axes(f, k)).attribute(k.clip, k.target),
    "GradCAM, maps": lambda f, k: (
        GradCAM(f, layer_of(f, k), **axes(f, k), weighting="layercam").attribute_maps(k.clip, k.target).joint
    ),
    "insertion": lambda f, k: metrics.insertion(f, k.clip, MAP, **options(f, k), steps=4).curve,
    "deletion": lambda f, k: metrics.deletion(f, k.clip, MAP, **options(f, k), steps=4).curve,
    "insertion and deletion": lambda f, k: (
        metrics.insertion_deletion(f, k.clip, MAP, **options(f, k), steps=3).deletion_lerf.curve
    ),
    "correlation": lambda f, k: metrics.faithfulness_correlation(f, k.clip, MAP, **options(f, k), n_subsets=4),
    "AOPC": lambda f, k: metrics.aopc(f, k.clip, MAP, **options(f, k), steps=4),
    "SaCo": lambda f, k: metrics.saco(f, k.clip, MAP, **options(f, k), groups=4),
    "randomization": lambda f, k: (
        metrics.sanity.randomization(slope(k.target), f, k.clip, layout=k.layout, layers=[""]).signed
    ),
}
OF_CLASSES: dict[str, Call] = {
    "faithfulness": lambda f, k: metrics.faithfulness(f, k.clip, MAP, **options(f, k)),
    "monotonicity": lambda f, k: metrics.monotonicity(f, k.clip, MAP, **options(f, k), fractions=(0.2, 0.5, 0.8)),
    "class sensitivity": lambda f, k: (
        metrics.sanity.class_sensitivity(
            lambda model, x, target: slope(int(target[0]))(model, x), f, k.clip, 1, others=[0], layout=k.layout
        ).signed
    ),
    "label randomization": lambda f, k: (
        metrics.sanity.label_randomization(slope(1), f, copy.deepcopy(f), k.clip, layout=k.layout).signed
    ),
}
OF_CLASSIFIERS: dict[str, Call] = {
    "predict": lambda f, k: torch.tensor([[p for _, p in row] for row in f.predict(k.clip, k=3)]),
    "versus": lambda f, k: VideoOcclusion(f.versus(0)).attribute(k.clip, CELLS, CELLS, target=k.target),
}
OF_CNNS: dict[str, Call] = {"inject": lambda f, k: injected(f, k)}
OF_TOKENS: dict[str, Call] = {
    "STAA": lambda f, k: STAA(f, mode="attention", layers=[-1]).attribute(k.clip),
    "STAA, temporal": lambda f, k: STAA(f, mode="attention").attribute_temporal(k.clip),
    "STAA (relevance)": lambda f, k: STAA(f).attribute_maps(k.clip, target=k.target).joint,
    "STAA (Chefer)": lambda f, k: STAA(f, rule="chefer").attribute(k.clip, target=k.target),
    "ReleasedSTAA": lambda f, k: ReleasedSTAA(f).attribute(k.clip),
    "stream": lambda f, k: torch.stack([result.joint for result in STAAStream(f, stride=2)(FRAMES)]),
    "stream of relevance": lambda f, k: torch.stack(
        [result.joint for result in STAAStream(f, mode="relevance", target="b")(FRAMES)]
    ),
}
OF_BRANCHES: dict[str, Call] = {
    "gates": lambda f, k: AttentionBranch(f).attribute(k.clip),
    "grad gates": lambda f, k: AttentionBranch(f).attribute(k.clip, k.target, weighting="grad_gate"),
    "class map": lambda f, k: AttentionBranch(f).attribute(k.clip, k.target, weighting="class_map"),
    "attention usage": lambda f, k: metrics.attention_usage(f, k.clip).temporal_flat,
}


def injected(model: nn.Module, kind: Kind) -> Tensor:
    """Add a branch, whose weights are random, and remove it. Its gates are not compared."""
    with torch.random.fork_rng():
        st_abn = STABN.inject(model, "norm", example=kind.clip, **axes(model, kind))
        try:
            return torch.ones_like(st_abn.explain(kind.clip).spatial_gates)
        finally:
            st_abn.remove()


def axes(model: nn.Module, kind: Kind) -> dict[str, str]:
    return {} if isinstance(model, VideoClassifier) else {"layout": kind.layout}


def options(model: nn.Module, kind: Kind) -> dict[str, Any]:
    return {"target": kind.target, "cells": CELLS, **axes(model, kind)}


def layer_of(model: nn.Module, kind: Kind) -> nn.Module:
    return next(module for name, module in model.named_modules() if name.endswith(kind.layer))


def slope(target: Any) -> Callable[[nn.Module, Tensor], Tensor]:
    def explain(model: nn.Module, clip: Tensor) -> Tensor:
        leaf = clip.detach().requires_grad_()
        outputs = model(leaf)[(slice(None), *(target if isinstance(target, tuple) else (target,)))]
        return torch.autograd.grad(outputs.sum(), leaf)[0]

    return explain


@contextmanager
def failing(model: nn.Module, kind: Kind, where: str) -> Iterator[list[str]]:
    """Raise ZeroDivisionError in the first or second forward, or in the backward; yield what was raised."""
    raised: list[str] = []
    count = 0

    def fail(*_: Any) -> None:
        raised.append(where)
        raise ZeroDivisionError(where)

    def forward(module: nn.Module, args: Any) -> None:
        nonlocal count
        count += 1
        if count == ("first forward", "second forward").index(where) + 1:
            fail()

    def backward(module: nn.Module, args: Any) -> None:
        if args[0].requires_grad:
            args[0].register_hook(fail)

    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    layer, hook = (head, backward) if where == "backward" else (layer_of(model, kind), forward)
    handle = layer.register_forward_pre_hook(hook)
    try:
        yield raised
    finally:
        handle.remove()


def rows() -> list[Any]:
    """Each call with each place where the model raises, on kinds of models in turn; slow: each call on each kind."""
    ends = ("first forward", "second forward", "backward")
    tokens, branches = ([name for name, kind in KINDS.items() if kind.has == what] for what in ("tokens", "branch"))
    classes = [name for name, kind in KINDS.items() if kind.outputs == "classes"]
    tables = (
        (CALLS, list(KINDS)),
        (OF_CLASSES, classes),
        (OF_CLASSIFIERS, [name for name in classes if name not in ("plain module", *branches)]),
        (OF_CNNS, ["plain module", "classifier"]),
        (OF_TOKENS, tokens),
        (OF_BRANCHES, branches),
    )
    quick = {
        (call, kinds[(3 * i + j) % len(kinds)], end)
        for calls, kinds in tables
        for i, call in enumerate(calls)
        for j, end in enumerate(ends)
    }
    every = {row for calls, kinds in tables for row in all_pairs([list(calls), kinds, ends])}
    return [*sorted(quick), *(pytest.param(*row, marks=pytest.mark.slow) for row in sorted(every - quick))]


@pytest.mark.filterwarnings("ignore:the probability of the target changes by at most:UserWarning")
@pytest.mark.parametrize(("call", "kind", "end"), rows())
def test_any_call_explains_a_model_in_eval_mode_and_leaves_it_unchanged(call: str, kind: str, end: str) -> None:
    """Parameters, gradients, flags, buffers, hooks, modes and random states, after a call and after one that raises."""
    run, what = (CALLS | OF_CLASSES | OF_CLASSIFIERS | OF_CNNS | OF_TOKENS | OF_BRANCHES)[call], KINDS[kind]
    model, clip = what.make(), what.clip.clone()
    with failing(model, what, end) as raised:
        before = snapshot(model)
        with pytest.raises(ZeroDivisionError) if end == "first forward" else suppress(ZeroDivisionError):
            run(model, what)
        assert changes(before, snapshot(model)) == [], f"after an error in the {end}: {raised}"
    before = snapshot(model)
    found = run(model, what)
    assert changes(before, snapshot(model)) == []
    assert torch.equal(what.clip, clip)
    torch.testing.assert_close(found, run(what.make().eval(), what), rtol=0, atol=0, equal_nan=True)


def trained() -> Trained:
    """A model in train mode with a submodule in eval mode."""
    return KINDS["plain module"].make()  # type: ignore[return-value]


def occluded(forward_func: Any) -> Tensor:
    return VideoOcclusion(forward_func, "BCTHW").attribute(CLIP, CELLS, CELLS, target=1)


def ablated(forward_func: Any) -> Tensor:
    return VideoFeatureAblation(forward_func, "BCTHW").attribute(
        CLIP, target=1, feature_mask=feature_masks.frames(CLIP, "BCTHW")
    )


WRAPS: dict[str, Callable[[Trained], Callable[..., Any]]] = {
    "lambda": lambda net: lambda x: net(x).double().float(),
    "method": lambda net: net.forward,
    "partial": lambda net: functools.partial(lambda model, x: model(x), net),
    "nested function": lambda net: (lambda inner: lambda x: inner(x))(lambda x: net(x)),
    "object": lambda net: type(
        "Call", (), {"__init__": lambda s: setattr(s, "net", net), "__call__": lambda s, x: s.net(x)}
    )(),
    "list": lambda net: (lambda nets: lambda x: sum(n(x) for n in nets))([net]),
    "default": lambda net: lambda x, model=net: model(x),
    "four deep": lambda net: (lambda calls: lambda x: calls[0](x))([functools.partial(lambda _, x: net(x), "first")]),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_the_networks_of_a_function_are_found(wrap: str) -> None:
    model = trained()
    before = snapshot(model)
    assert networks_of(WRAPS[wrap](model)) == [model]
    expected = occluded(trained().eval())
    torch.testing.assert_close(occluded(WRAPS[wrap](model)), expected)
    assert changes(before, snapshot(model)) == []


GLOBAL = trained()


def test_a_network_that_a_function_finds_among_the_globals_is_found() -> None:
    assert networks_of(lambda x: GLOBAL(x)) == [GLOBAL]


def test_as_is_keeps_dropout_for_monte_carlo_samples_and_restores_buffers() -> None:
    model = trained()
    model.drop.train()
    before = snapshot(model)
    with running_state("as_is"):
        first, second = (ablated(model) for _ in range(2))
    assert not torch.allclose(first, second)
    changed = changes(before, snapshot(model))
    assert changed == ["random state of torch"]  # which dropout draws from
    torch.testing.assert_close(ablated(model), ablated(trained().eval()))
    with pytest.raises(ValueError, match="'eval'"), running_state("train"):  # type: ignore[arg-type]
        pass


def test_modes_are_flags_alone_so_weights_that_train_and_eval_merge_stay() -> None:
    class Merging(nn.Linear):  # as loralib merges its update into the weight in eval mode
        def train(self, mode: bool = True) -> Merging:
            self.weight.data.add_(1.0 if mode else -1.0)
            return super().train(mode)

    model = Merging(2, 2)
    weight = model.weight.clone()
    with eval_mode(model):
        assert not model.training
    assert model.training
    assert torch.equal(model.weight, weight)


def test_threads_that_share_a_model_see_eval_mode_and_the_last_restores_the_buffers() -> None:
    model = trained()
    before = snapshot(model)
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with eval_mode(model):
            inside.set()
            leave.wait(10)
            model.calls += 3

    with eval_mode(model):
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait(10)
    assert not model.training
    leave.set()
    thread.join()
    assert changes(before, snapshot(model)) == []


def test_recurrent_layers_on_a_gpu_run_without_cudnn_where_a_gradient_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    enabled: list[bool] = []

    class Spy(nn.LSTM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            enabled.append(torch.backends.cudnn.enabled)
            if len(enabled) == 3:
                raise RuntimeError("stop")
            return super().forward(*args, **kwargs)

    model = nn.Sequential(Spy(2, 2))
    monkeypatch.setattr(model_state, "_on_gpu", lambda module: True)
    before = torch.backends.cudnn.enabled
    with eval_mode(model):
        model(torch.rand(1, 3, 2))
        with torch.no_grad():
            model(torch.rand(1, 3, 2))
        with pytest.raises(RuntimeError, match="stop"):
            model(torch.rand(1, 3, 2))
        assert torch.backends.cudnn.enabled == before
    assert enabled == [False, before, False]
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks
    copy.deepcopy(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_suspended_in_this_thread_alone(reentrant: bool) -> None:
    calls: dict[str, int] = {}

    def run(name: str) -> None:
        def part(x: Tensor) -> Tensor:
            calls[name] = calls.get(name, 0) + 1
            return x.square()

        x = torch.ones(2, requires_grad=True)
        checkpoint.checkpoint(part, x, use_reentrant=reentrant).sum().backward()
        assert x.grad is not None and x.grad.tolist() == [2.0, 2.0]

    before = dict(vars(checkpoint))
    with model_state.without_checkpointing():
        with model_state.without_checkpointing():
            run("inside")
        other = threading.Thread(target=run, args=("other",))
        other.start()
        other.join()
        run("still inside")
    run("outside")
    assert calls == {"inside": 1, "other": 2, "still inside": 1, "outside": 2}
    assert vars(checkpoint) == before
