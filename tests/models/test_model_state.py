"""A model in any state is explained in eval mode and is afterwards what it was."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_snapshot import same, snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captum_staa import (
    RISE,
    STAA,
    GradCAM,
    SpatioTemporalPerturbation,
    VideoClassifier,
    VideoFeatureAblation,
    VideoOcclusion,
    metrics,
)
from captum_staa._utils import model_state
from captum_staa._utils.model_state import eval_mode
from captum_staa._utils.networks import networks_of
from captum_staa.attr import ReleasedSTAA
from captum_staa.models import STABN
from captum_staa.models import model_state as running_state

CLIP = torch.rand(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
MAP = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
WINDOW = (2, 4, 4)


class Trained(nn.Module):
    """A CNN whose train mode differs from its eval mode in three ways, left in train mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.drop = nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), nn.Dropout(0.5)
        self.block, self.head = nn.Conv3d(4, 4, 3, padding=1), nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.train()
        self.drop.eval()  # a submodule with its own mode
        with torch.no_grad():
            for _ in range(3):
                self(torch.rand(4, 3, 4, 8, 8))

    def forward(self, clip: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        x = self.drop(self.norm(self.conv(clip)).relu())
        # checkpointing is active in train mode only, as in transformers
        again = self.training and torch.is_grad_enabled()
        x = checkpoint(self.block, x, use_reentrant=True) if again else self.block(x)
        return self.head(x.relu().mean((2, 3, 4)) * (1 + (torch.rand(1) if self.training else 0)))


CALLS: dict[str, Callable[[Any], Tensor]] = {
    "occlusion": lambda f: VideoOcclusion(f, "BCTHW").attribute(CLIP, WINDOW, WINDOW, target=1),
    "ablation": lambda f: VideoFeatureAblation(f, "BCTHW").attribute(CLIP, target=1),
    "RISE": lambda f: RISE(f, "BCTHW").attribute(CLIP, target=1, n_samples=8),
    "perturbation": lambda f: SpatioTemporalPerturbation(f, "BCTHW").attribute(CLIP, target=1, iterations=3),
    "insertion": lambda f: metrics.insertion(f, CLIP, MAP, target=1, layout="BCTHW", cells=WINDOW, steps=4).curve,
    "insertion and deletion": lambda f: (
        metrics.insertion_deletion(f, CLIP, MAP, target=1, layout="BCTHW", cells=WINDOW, steps=4).deletion_lerf.curve
    ),
    "faithfulness": lambda f: metrics.faithfulness(f, CLIP, MAP, target=1, layout="BCTHW", cells=(1, 2, 2)),
    "monotonicity": lambda f: metrics.monotonicity(f, CLIP, MAP, layout="BCTHW", cells=(1, 2, 2)),
    "correlation": lambda f: metrics.faithfulness_correlation(f, CLIP, MAP, target=1, layout="BCTHW", cells=(1, 2, 2)),
    "AOPC": lambda f: metrics.aopc(f, CLIP, MAP, target=1, layout="BCTHW", cells=WINDOW, steps=4),
    "SaCo": lambda f: metrics.saco(f, CLIP, MAP, target=1, layout="BCTHW", cells=WINDOW, groups=4),
}


def injected(model: nn.Module) -> Tensor:
    """Add a branch, whose weights are random, and remove it."""
    with torch.random.fork_rng():
        st_abn = STABN.inject(model, "norm", "BCTHW")
        gates = st_abn.explain(CLIP).spatial_gates
        st_abn.remove()
    return torch.ones_like(gates)


MODULE_CALLS: dict[str, Callable[[Any], Any]] = {
    "GradCAM": lambda f: GradCAM(f, "norm", layout="BCTHW").attribute(CLIP, target=1),
    "GradCAM of a classifier": lambda f: (
        GradCAM(VideoClassifier(f, "BCTHW"), "conv").attribute_maps(CLIP, target=1).joint
    ),
    "predict": lambda f: torch.tensor([[p for _, p in row] for row in VideoClassifier(f, "BCTHW").predict(CLIP, k=3)]),
    "inject": lambda f: injected(f),
    "randomization": lambda f: (
        metrics.sanity.randomization(
            lambda model, x: torch.autograd.grad(model(x.requires_grad_())[:, 1].sum(), x)[0],
            f,
            CLIP.clone(),
            layout="BCTHW",
        ).signed
    ),
}


@pytest.mark.parametrize("name", [*CALLS, *MODULE_CALLS])
def test_a_model_left_in_train_mode_is_explained_in_eval_mode_and_unchanged(name: str) -> None:
    call = (CALLS | MODULE_CALLS)[name]
    evaluated = Trained().eval()
    expected = call(evaluated)
    model = Trained()
    before = snapshot(model)
    found = call(model)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, expected)
    assert same(before, snapshot(model)) == []


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
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_the_networks_of_a_function_are_found(wrap: str) -> None:
    model = Trained()
    before = snapshot(model)
    assert networks_of(WRAPS[wrap](model)) == [model]
    expected = CALLS["occlusion"](Trained().eval())
    torch.testing.assert_close(CALLS["occlusion"](WRAPS[wrap](model)), expected)
    assert same(before, snapshot(model)) == []


GLOBAL = Trained()


def test_a_network_that_a_function_finds_among_the_globals_is_found() -> None:
    assert networks_of(lambda x: GLOBAL(x)) == [GLOBAL]


def test_transformers_with_dropout_in_train_mode_are_explained_as_in_eval_mode() -> None:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = VideoMAEConfig(
        image_size=16, patch_size=4, num_frames=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = VideoMAEForVideoClassification(config)
    clip = torch.rand(1, 4, 3, 16, 16)
    methods: list[Callable[[], Any]] = [
        lambda: STAA(model, mode="attention").attribute(clip),
        lambda: STAA(model, mode="attention").attribute_temporal(clip),
        lambda: STAA(model).attribute(clip, target=1),
        lambda: STAA(model, rule="chefer").attribute(clip, target=1),
        lambda: ReleasedSTAA(model).attribute(clip),
    ]
    expected = [method() for method in methods if model.eval() is model]
    for module in model.modules():  # as gradient_checkpointing_enable sets it, under its names of several versions
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=True)
    model.train()
    before = snapshot(model)
    for method, value in zip(methods, expected, strict=True):
        torch.testing.assert_close(method(), value)
    assert same(before, snapshot(model)) == []


def test_as_is_keeps_dropout_for_monte_carlo_samples_and_restores_buffers() -> None:
    model = Trained()
    model.drop.train()
    before = snapshot(model)
    with running_state("as_is"):
        first, second = (CALLS["ablation"](model) for _ in range(2))
    assert not torch.allclose(first, second)
    changed = same(before, snapshot(model))
    assert changed == ["random state"]  # which dropout draws from
    torch.testing.assert_close(CALLS["ablation"](model), CALLS["ablation"](Trained().eval()))
    with pytest.raises(ValueError, match="'eval'"), running_state("train"):  # type: ignore[arg-type]
        pass


def test_a_model_that_raises_is_restored() -> None:
    class Fails(Trained):
        def forward(self, clip: Tensor) -> Tensor:
            if not self.training and len(clip) > 2:
                self.calls += 5
                raise RuntimeError("no")
            return super().forward(clip)

    model = Fails()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="no"):
        VideoOcclusion(model, "BCTHW").attribute(CLIP, WINDOW, WINDOW, target=1, perturbations_per_eval=2)
    assert same(before, snapshot(model)) == []


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
    model = Trained()
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
    assert same(before, snapshot(model)) == []


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
