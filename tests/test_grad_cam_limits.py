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
def test_a_named_tuple_and_a_second_name_change_nothing(layer):
    found = GradCAM(odd(), layer, "BCTHW", weighting="layercam").attribute(CLIP, TARGETS)
    assert torch.equal(found, GradCAM(odd(), "conv", "BCTHW", weighting="layercam").attribute(CLIP, TARGETS))


def test_products_beyond_half_precision():
    model = nn.Sequential(nn.Identity(), Wrap(lambda x: 300 * (x[..., 0] - x[..., 1]).flatten(1)))
    clip = torch.full((1, 1, 1, 1, 2), 400.0, dtype=torch.float16)
    found = GradCAM(model, "0", "BCTHW", weighting="hirescam").attribute(clip)
    assert found.flatten().tolist() == [120000.0, -120000.0] and found.dtype == torch.float32


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("pool", "reaches no cell of layer 'pool' .* in clips \\[0, 1\\].*name an earlier layer"),
        ("lost", "reaches no cell of layer 'lost'"),
        ("head", r"layer 'head' gives \(2, 3\), which cannot be folded"),
        ("twice", r"called layer 'twice' 2 times, with outputs of shape \(2, 3, 2, 3, 2\)"),
        ("mask", "a tensor of torch.bool came"),
        ("list", "never called layer 'list'"),
        ("list.0", "never called"),
    ],
)
def test_layers_without_a_map_are_refused(layer, message):
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
def test_a_last_block_of_which_one_token_is_read_is_refused(name, layer):
    clf = tiny(name)
    with pytest.raises(ValueError, match=f"no cell of layer '{layer}' .or only the first.*the norm in front"):
        GradCAM(clf, layer).attribute(clip_for(clf), 1)


@pytest.mark.parametrize(
    "shape",
    [(8, 4, 12), (2, 4, 2, 2, 12), (8, 2, 2, 12), (2, 17, 12), (1, 16, 24), (1, 6, 4, 4, 4), (12, 8, 2, 2), (384,)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_shapes_that_do_not_tell_are_refused(shape):
    folded = Wrap(lambda x: torch.cat([x.flatten(), x.new_zeros(24)])[: math.prod(shape)].reshape(shape))
    model = nn.Sequential(folded, Wrap(lambda x: x.flatten()[:384].reshape(2, 4, -1).mean(2)))
    method = GradCAM(model, "0", "BCTHW", TokenGrid(4, 2, 2, tubelet=(1, 2, 2)))
    with pytest.raises(ValueError, match=r"layer '0' gives " + re.escape(str(shape)) + ", which cannot be folded"):
        method.attribute(clip_of(2, 3, 4, 4, 4), 1)


def test_nothing_is_left_behind():
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


def test_a_model_that_writes_into_its_input_does_not_write_into_the_clip():
    before, net = CLIP.clone(), odd()
    rude = GradCAM(nn.Sequential(Wrap(lambda x: x.sub_(0.5)), net), "1.conv", "BCTHW").attribute(CLIP, TARGETS)
    assert torch.equal(CLIP, before)
    assert torch.equal(rude, GradCAM(net, "conv", "BCTHW").attribute(CLIP - 0.5, TARGETS))


def test_another_thread_on_the_same_model_is_left_alone():
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


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"forward_func": lambda x: x}, TypeError, "function came"),
        ({"layer": "convs"}, ValueError, "Odd has no layer 'convs'. Similar names: 'conv'"),
        ({"layer": nn.ReLU()}, ValueError, "layer must be a part of this Odd, got a ReLU"),
        ({"layer": 3}, TypeError, "got int"),
        ({"layout": None}, ValueError, "Pass layout="),
        ({"layout": "BTCHW", "forward_func": VideoClassifier(odd(), "BCTHW")}, ValueError, "Leave layout out"),
        ({"grid": (4, 3, 2)}, TypeError, r"a TokenGrid\(...\) or None, got \(4, 3, 2\)"),
        ({"weighting": "gradcam++"}, ValueError, r"'gradcam', 'hirescam', 'layercam', got 'gradcam\+\+'"),
        ({"upsampling": "linear"}, ValueError, "'trilinear', 'nearest'"),
    ],
)
def test_wrong_options_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        GradCAM(**{"forward_func": odd(), "layer": "conv", "layout": "BCTHW", **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"inputs": CLIP[0]}, ValueError, r"\(3, 6, 9, 8\)"),
        ({"inputs": CLIP / 0}, ValueError, "nan or infinite"),
        ({"inputs": (CLIP, CLIP)}, ValueError, "GradCAM explains one clip"),
        (
            {"inputs": clip_of(1, 3, 6, 9, 5)},
            ValueError,
            r"cover \(6, 9, 8\) \(T, H, W\), but the clip has \(6, 9, 5\)",
        ),
        ({"inputs": clip_of(1, 3, 6, 18, 8)}, ValueError, "tubelet"),
        ({"target": None}, ValueError, "needs a target"),
        ({"relu": True}, TypeError, "unexpected keyword"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    method = GradCAM(odd(), "conv", "BCTHW", grid=TokenGrid(2, 3, 2, tubelet=(3, 3, 4)))
    with pytest.raises(error, match=message):
        method.attribute(**{"inputs": CLIP, "target": 0, **arguments})


def test_models_and_modes_without_a_gradient_are_refused():
    with pytest.raises(ValueError, match="GradCAM needs a gradient"), torch.inference_mode():
        GradCAM(odd(), "conv", "BCTHW").attribute(CLIP, 0)
    for function, shape in ((torch.sum, r"\(\) came"), (lambda x: (x, x), "tuple came")):
        with pytest.raises(ValueError, match=f"a row per example, 2 here, got {shape}"):
            GradCAM(nn.Sequential(odd(), Wrap(function)), "0.conv", "BCTHW").attribute(CLIP, 0)
