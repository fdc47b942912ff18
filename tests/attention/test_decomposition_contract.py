"""What a decomposition accepts, refuses and leaves as it was."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
from covering import in_one_case
from frozen_models import ViT, clips, contrast, vit
from tiny_models import clip_for, randomize, snapshot, tiny
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captum_staa import STAA
from captum_staa.attention.decomposition import decompose, decompose_classifier, rest_contrast


class Wrapped(nn.Module):
    """A :class:`ViT` inside a module that does something to it."""

    def __init__(self, run: Any, **options: Any) -> None:
        super().__init__()
        self.vit, self.run = vit(**options), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.vit, x)


class Listed(nn.Module):
    def forward(self, x: Tensor) -> list[int]:
        return [len(x)]


@in_one_case()
@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda model, x: model(torch.stack([x, x.flip(1)]).flatten(0, 1)).softmax(-1).unflatten(0, (2, -1)).mean(0),
            r"got probabilities of shape \(2, 3\)",
        ),
        (lambda model, x: model(x).detach(), "through differentiable operations"),
        (lambda model, x: torch.no_grad()(model)(x), "through differentiable operations"),
        (lambda model, x: model(x) + model(x[:1]), "give tensors of one shape, got 2 runs of Conv3d with shapes"),
        (lambda model, x: x.flatten(1)[:, :3], "tokens must run in a forward, .*got 0 runs of Conv3d"),
        (lambda model, x: model(x) and None, "Boolean value"),
    ],
)
def test_models_that_cannot_be_decomposed_raise(run, message):
    model = Wrapped(run)
    before = snapshot(model)
    for weight in (0.0, 0.5):
        with pytest.raises((ValueError, RuntimeError), match=message):
            decompose(model, clips(), contrast, tokens=model.vit.embed, pattern_weight=weight)
    assert snapshot(model) == before


def test_outputs_and_embeddings_must_be_tensors():
    model = Wrapped(lambda model, x: {"logits": model(x)})
    with pytest.raises(TypeError, match="forward_func must return a tensor, got dict"):
        decompose(model, clips(), contrast, tokens=model.vit.embed)
    model = nn.Sequential(nn.MaxPool3d((8, 24, 16), return_indices=True))
    with pytest.raises(TypeError, match="forward_func must return a tensor, got tuple"):
        decompose(model, clips(), contrast)
    model = Wrapped(lambda model, x: model(x))
    model.vit.embed = nn.Sequential(model.vit.embed, Listed())
    with pytest.raises(TypeError, match="tokens must return a floating-point tensor, got list without one at Listed"):
        decompose(model, clips(), contrast, tokens=model.vit.embed[1])
    with pytest.raises(TypeError, match="tokens must take a floating-point tensor, got tuple without one at Listed"):
        decompose(lambda x: model.vit.embed[1](x.int()), clips(), contrast, tokens=model.vit.embed[1], side="input")


def test_log_softmax_gives_the_same_contributions():
    model = Wrapped(lambda model, x: model(x).log_softmax(-1))
    plain = decompose(model.vit, clips(), contrast, tokens=model.vit.embed)
    result = decompose(model, clips(), contrast, tokens=model.vit.embed)
    assert result.nonlinear == ()
    torch.testing.assert_close(result.contributions, plain.contributions)


@pytest.mark.parametrize("where", ["tokens", "pixels"])
def test_model_and_inputs_are_unchanged(where):
    clf = tiny("vivit").train()
    for module in clf.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    inputs = clip_for(clf)
    before, copy = snapshot(clf), inputs.clone()
    with torch.no_grad():
        under_no_grad = decompose_classifier(clf, inputs, contrast, where=where)
    assert snapshot(clf) == before and torch.equal(inputs, copy)
    parts = (under_no_grad.contributions, under_no_grad.constants, under_no_grad.score, under_no_grad.outputs)
    assert not any(part.requires_grad for part in parts)
    torch.testing.assert_close(under_no_grad.outputs, tiny("vivit")(inputs).detach())  # in eval mode
    again = decompose_classifier(clf, inputs.requires_grad_(), contrast, where=where)
    assert torch.equal(again.contributions, under_no_grad.contributions) and inputs.grad is None
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        decompose_classifier(clf, inputs, contrast, where=where)

    def fails(logits: Tensor) -> Tensor:
        raise KeyError("a score of the user")

    with pytest.raises(KeyError, match="a score of the user"):
        decompose_classifier(clf, inputs, fails, where=where)
    assert snapshot(clf) == before


def test_models_may_modify_inputs_and_embeddings_in_place():
    def run(model: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        return model(x)

    class Adds(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.embed, self.head, self.in_place = nn.Linear(4, 6), nn.Linear(6, 3), in_place

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            if self.in_place:
                x += 1
                return self.head(x)
            return self.head(x + 1)

    model = Wrapped(run)
    for embedding in (None, model.vit.embed):
        inputs = clips()
        result = decompose(model, inputs, contrast, tokens=embedding)
        assert torch.equal(inputs, clips())
        expected = decompose(model.vit, 2 * inputs, contrast, tokens=embedding)
        torch.testing.assert_close(result.contributions, expected.contributions)
    linear = randomize(Adds(True), 0)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    result = decompose(linear, x, contrast, tokens=linear.embed)
    linear.in_place = False
    torch.testing.assert_close(result.contributions, decompose(linear, x, contrast, tokens=linear.embed).contributions)


@pytest.mark.parametrize("kind", ["compiled", "compiled inside", "exported", "checkpointed"])
def test_compiled_exported_and_checkpointed_models(kind):
    model = vit()
    tokens = None if kind == "exported" else model.embed  # its operators are in no module
    expected = decompose(model, clips(), contrast, tokens=tokens)
    run: Any = model
    if kind == "compiled":
        run = torch.compile(model, backend="eager")
    elif kind == "exported":
        run = torch.export.export(model, (clips(),)).module()
    for block in model.blocks:
        if kind == "compiled inside":
            block["mlp"] = torch.compile(block["mlp"], backend="eager")
            block["attn"].forward = torch.compile(block["attn"].forward, backend="eager")
        elif kind == "checkpointed":
            block["attn"].forward = partial(checkpoint, block["attn"].forward, use_reentrant=False)
            block["mlp"].forward = partial(checkpoint, block["mlp"].forward, use_reentrant=False)
    result = decompose(run, clips(), contrast, tokens=tokens)
    assert result.nonlinear == () and abs(float(result.remainder)) < 1e-10
    torch.testing.assert_close(result.contributions, expected.contributions)


def test_other_threads_on_the_same_model_are_not_affected():
    model = vit()
    inputs, answers = clips(), []
    expected = model(inputs)
    main = threading.current_thread()

    def other() -> None:
        with torch.no_grad():
            answers.append(model(inputs))

    def meanwhile(module: nn.Module, args: Any) -> None:
        if threading.current_thread() is main:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    handle = model.head.register_forward_pre_hook(meanwhile)
    result = decompose(model, inputs, contrast, tokens=model.embed)
    handle.remove()
    torch.testing.assert_close(answers, [expected])
    torch.testing.assert_close(result.outputs, expected)


def test_additional_forward_args_reach_the_model():
    class Scaled(ViT):
        def forward(self, clips: Tensor, factor: float) -> Tensor:
            return factor * super().forward(clips)

    model = randomize(Scaled(), 3).double()
    once, thrice = (decompose(model, clips(), contrast, factor, tokens=model.embed) for factor in (1.0, 3.0))
    torch.testing.assert_close(thrice.contributions, 3 * once.contributions)


@pytest.mark.parametrize("name", ["vivit", "timesformer"])
def test_a_class_against_the_rest_sums_to_its_logit_minus_the_weighted_mean_of_the_others(name):
    """Weights are the softmax of the others, frozen; no warning about an operation without a rule."""
    clf = tiny(name)
    clip, target = clip_for(clf), torch.tensor([2, 0])
    joint = STAA(clf.versus("rest"), pattern_weight=0).attribute_maps(clip, target)

    def score(logits: Tensor) -> Tensor:
        others = torch.stack([logits[0, [0, 1]], logits[1, [1, 2]]])
        return torch.stack([logits[0, 2], logits[1, 0]]) - (others.detach().softmax(1) * others).sum(1)

    expected = decompose_classifier(clf, clip, score)
    torch.testing.assert_close(joint.joint.sum((1, 2, 3)), expected.contributions.flatten(1).sum(1))
    torch.testing.assert_close(joint.logits, clf.versus("rest")(clip).detach())
    assert float(expected.remainder.abs()) < 1e-4


def test_the_gradient_of_a_class_against_the_rest_is_that_of_the_log_odds():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    chosen = torch.tensor([1, 0, 4, 2])
    own = nn.functional.one_hot(chosen, 5).bool()
    odds = logits[own] - logits.masked_fill(own, -torch.inf).logsumexp(1)
    found = rest_contrast(logits, chosen)
    expected, gradient = (torch.autograd.grad(values.sum(), logits)[0] for values in (odds, found))
    torch.testing.assert_close(gradient, expected)
    weights = logits.detach().masked_fill(own, -torch.inf).softmax(1)
    entropy = -torch.special.xlogy(weights, weights).sum(1)
    torch.testing.assert_close((found - odds).detach(), entropy)
