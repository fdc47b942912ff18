"""What GradCAM refuses, and what it leaves as it was: odd layers, wrong arguments, a model that raises."""

from __future__ import annotations

import math
import re
from collections import namedtuple
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from covering import in_one_case
from tiny_models import clip_for, snapshot, tiny
from torch import Tensor, nn

from captum_staa import TokenGrid, VideoClassifier
from captum_staa.attr.grad_cam import GradCAM

TARGETS = [2, 0]


def clip_of(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


CLIP = clip_of(2, 3, 6, 9, 8)

Pair = namedtuple("Pair", "tokens weights")


class Odd(nn.Module):
    """Layers that are awkward: tuples, pooled, unused, called twice, without floats, failing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.head = nn.Conv3d(3, 3, 3, 3), nn.AdaptiveAvgPool3d(1), nn.Linear(3, 3)
        self.named, self.mask, self.lost, self.twice = Wrap(lambda x: Pair(x, None)), Wrap(), Wrap(), nn.ReLU()
        self.list, self.alias, self.fails = nn.ModuleList([nn.Identity()]), self.conv, False

    def forward(self, clip: Tensor) -> Tensor:
        maps = self.twice(self.twice(self.named(self.conv(clip)).tokens))
        self.lost(maps.detach())
        self.mask(maps > 0)
        if self.fails:
            raise ZeroDivisionError
        return self.head(self.pool(maps).flatten(1))


class Wrap(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def odd() -> Odd:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Odd().double()


@pytest.mark.parametrize("layer", ["named", "alias"])
def test_named_tuple_outputs_and_layers_with_two_names(layer):
    found = GradCAM(odd(), layer, "BCTHW", weighting="layercam").attribute(CLIP, TARGETS)
    assert torch.equal(found, GradCAM(odd(), "conv", "BCTHW", weighting="layercam").attribute(CLIP, TARGETS))


def test_products_that_overflow_half_precision():
    model = nn.Sequential(nn.Identity(), Wrap(lambda x: 300 * (x[..., 0] - x[..., 1]).flatten(1)))
    clip = torch.full((1, 1, 1, 1, 2), 400.0, dtype=torch.float16)
    found = GradCAM(model, "0", "BCTHW", layer_axes="BCTHW", weighting="hirescam").attribute(clip)
    assert found.flatten().tolist() == [120000.0, -120000.0] and found.dtype == torch.float32


@in_one_case()
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("pool", r"cells of layer 'pool', got one at the first cell alone in clips \[0, 1\].*earlier layer"),
        ("lost", "cells of layer 'lost', got none in clips"),
        ("head", r"output of layer 'head' must be .*got shape \(2, 3\)"),
        ("twice", r"layer 'twice' once, got 2 calls with outputs of shape \(2, 3, 2, 3, 2\)"),
        ("mask", "got a tensor of torch.bool"),
        ("list", "must call layer 'list', got no call"),
        ("list.0", "got no call"),
    ],
)
def test_layers_without_a_map_raise(layer, message):
    model = odd()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        GradCAM(model, layer, "BCTHW").attribute(CLIP, TARGETS)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("vivit", "vivit.layers.1"),
        ("timesformer", "timesformer.encoder.layer.1"),
        ("videomae-first", "videomae.encoder.layer.1"),
    ],
)
def test_last_block_with_a_class_token_head_raises(name, layer):
    clf = tiny(name)
    with pytest.raises(
        ValueError,
        match=f"cells of layer '{layer}', got (none|one at the first cell alone).*class token.*the norm before",
    ):
        GradCAM(clf, layer).attribute(clip_for(clf), 1)


@in_one_case()
@pytest.mark.parametrize(
    "shape",
    [(8, 4, 12), (2, 4, 6, 6, 12), (8, 6, 6, 12), (2, 17, 12), (1, 16, 24), (1, 6, 4, 4, 4), (12, 8, 2, 2), (384,)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_unknown_or_ambiguous_output_shapes_raise(shape):
    folded = Wrap(lambda x: torch.cat([x.flatten(), x.new_zeros(4000)])[: math.prod(shape)].reshape(shape))
    model = nn.Sequential(folded, Wrap(lambda x: x.flatten()[:384].reshape(2, 4, -1).mean(2)))
    method = GradCAM(model, "0", "BCTHW", TokenGrid(4, 2, 2, tubelet=(1, 2, 2)))
    with pytest.raises(ValueError, match=r"layer '0' must be .*got shape " + re.escape(str(shape))):
        method.attribute(clip_of(2, 3, 4, 4, 4), 1)


def test_model_and_inputs_are_unchanged():
    model = odd()
    model.head.weight.requires_grad_(False)
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    model.train()
    before = snapshot(model)
    method = GradCAM(model, "conv", "BCTHW")
    method.attribute(CLIP, TARGETS)
    assert snapshot(model) == before
    frozen = []
    with model.head.register_forward_pre_hook(lambda *_: frozen.append(not model.head.bias.requires_grad)):
        method.attribute(CLIP, TARGETS)
    assert frozen == [True], "layers would keep what their weights' gradients need"
    model.fails = True
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        method.attribute(CLIP, TARGETS)
    assert snapshot(model) == before


def test_model_that_modifies_its_input_does_not_change_the_clip():
    before, net = CLIP.clone(), odd()
    rude = GradCAM(nn.Sequential(Wrap(lambda x: x.sub_(0.5)), net), "1.conv", "BCTHW").attribute(CLIP, TARGETS)
    assert torch.equal(CLIP, before)
    assert torch.equal(rude, GradCAM(net, "conv", "BCTHW").attribute(CLIP - 0.5, TARGETS))


def test_other_threads_on_the_same_model_are_not_affected():
    model, seen = odd(), []
    expected = GradCAM(odd(), "conv", "BCTHW").attribute(CLIP, TARGETS)

    def meanwhile(*_: Any) -> None:
        if not seen:
            seen.append(None)
            other = Thread(target=lambda: seen.append(model(CLIP)))
            other.start()
            other.join()

    handle = model.named.register_forward_hook(meanwhile)
    found = GradCAM(model, "conv", "BCTHW").attribute(CLIP, TARGETS)
    handle.remove()
    assert torch.equal(found, expected) and torch.equal(seen[1], model(CLIP))


@in_one_case()
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"forward_func": lambda x: x}, TypeError, "got function"),
        ({"layer": "convs"}, ValueError, "'convs'.*'conv'"),
        ({"layer": nn.ReLU()}, ValueError, "Odd, got a ReLU"),
        ({"layer": 3}, TypeError, "got int"),
        ({"layout": None}, ValueError, "layout="),
        (
            {"layout": "BTCHW", "forward_func": VideoClassifier(odd(), "BCTHW")},
            ValueError,
            "[Ll]eave (the )?layout out",
        ),
        ({"grid": (4, 3, 2)}, TypeError, r"a TokenGrid or None, got \(4, 3, 2\)"),
        ({"weighting": "gradcam++"}, ValueError, r"'gradcam', 'hirescam', 'layercam', got 'gradcam\+\+'"),
        ({"upsampling": "linear"}, ValueError, "'trilinear', 'nearest'"),
    ],
)
def test_invalid_options_raise(arguments, error, message):
    with pytest.raises(error, match=message):
        GradCAM(**{"forward_func": odd(), "layer": "conv", "layout": "BCTHW", **arguments})


@in_one_case()
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"inputs": CLIP[0]}, ValueError, r"\(3, 6, 9, 8\)"),
        ({"inputs": CLIP / 0}, ValueError, "nan"),
        ({"inputs": (CLIP, CLIP[:1])}, ValueError, "same batch size"),
        ({"inputs": (CLIP, CLIP[:, :, 1:])}, ValueError, r"same number of frames.*\(6, 9, 8\) and \(5, 9, 8\)"),
        (
            {"inputs": clip_of(1, 3, 6, 9, 5)},
            ValueError,
            r"cover the clip of \(6, 9, 5\) .*which covers \(6, 9, 8\)",
        ),
        ({"inputs": clip_of(1, 3, 6, 18, 8)}, ValueError, "tubelet"),
        ({"target": None}, ValueError, "target must not be None"),
        ({"relu": True}, TypeError, "unexpected keyword"),
    ],
)
def test_invalid_arguments_raise(arguments, error, message):
    method = GradCAM(odd(), "conv", "BCTHW", grid=TokenGrid(2, 3, 2, tubelet=(3, 3, 4)))
    with pytest.raises(error, match=message):
        method.attribute(**{"inputs": CLIP, "target": 0, **arguments})


def test_inference_mode_and_wrong_model_outputs_raise():
    with pytest.raises(ValueError, match="GradCAM needs a gradient"), torch.inference_mode():
        GradCAM(odd(), "conv", "BCTHW").attribute(CLIP, 0)
    for function, shape in ((torch.sum, r"\(\)"), (lambda x: (x, x), "tuple")):
        with pytest.raises(ValueError, match=f"one row per example, 2 here, got {shape}"):
            GradCAM(nn.Sequential(odd(), Wrap(function)), "0.conv", "BCTHW").attribute(CLIP, 0)
