"""Layers of every order of axes: the map of GradCAM is that of a slow formula, or the order is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from covering import in_one_case
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from captum_staa import GradCAM, TokenGrid
from captum_staa.models import STABN
from captum_staa.models.layers import LayerAxes

T, H, W = 4, 8, 8
CLIP = torch.rand(2, 3, T, H, W, generator=torch.Generator().manual_seed(0))


class Stage(nn.Module):
    """Convolves a clip to (B, C, t, h, w) = (B, C, 4, 4, 4), and returns it in another order."""

    def __init__(self, channels: int, order: Callable[[Tensor], Any], last: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, channels, (1, 2, 2), (1, 2, 2))
        self.order, self.last = order, last

    def forward(self, clip: Tensor) -> Any:
        return self.order(self.last(self.conv(clip)))


class Net(nn.Module):
    """A stage, a module that reads it (or none), and a head."""

    def __init__(self, channels: int, order: Any, back: Callable[[Any], Tensor], reader: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stage = Stage(channels, order, nn.Identity())
        self.reader, self.back, self.head = reader, back, nn.Linear(channels, 3)

    def forward(self, clip: Tensor) -> Tensor:
        features = self.back(self.stage(clip))  # (B, C, t, h, w)
        places = torch.linspace(0.5, 2, features[0, 0].numel()).view(features.shape[2:])
        return self.head((features.tanh() * places).mean((2, 3, 4)))


def true_map(net: Net, target: int) -> Tensor:
    """Return gradient times activation summed over channels, ``(B, t, h, w)``, from the features in plain order."""
    features = net.stage.conv(CLIP).detach().requires_grad_()
    ordered = net.stage.order(features)
    places = torch.linspace(0.5, 2, T * 16).view(T, 4, 4)
    output = net.head((net.back(ordered).tanh() * places).mean((2, 3, 4)))
    (gradient,) = torch.autograd.grad(output[:, target].sum(), features)
    return (gradient * features).sum(1).detach()


class Reads(nn.Module):
    """Applies a module that keeps the values, so that the place of the channels can be read from it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.module(x)


def linear(channels: int) -> nn.Module:
    return Reads(nn.Linear(channels, channels))


def conv(channels: int) -> nn.Module:
    return Reads(nn.Conv3d(channels, channels, 1))


class Case:
    def __init__(self, order: Any, back: Any, reader: Any = None, **options: Any) -> None:
        self.order, self.back, self.reader, self.options = order, back, reader, options


def through(case: Case, channels: int) -> Net:
    reader = nn.Identity() if case.reader is None else case.reader(channels)
    return Net(channels, case.order, lambda x: case.back(x, reader), reader)


CASES: dict[str, Case] = {
    "3D CNN": Case(lambda x: x, lambda x, read: read(x), conv),
    "Swin, (B, t, h, w, C)": Case(lambda x: x.movedim(1, -1), lambda x, read: read(x).movedim(-1, 1), linear),
    "Swin, read by a layer norm": Case(
        lambda x: x.movedim(1, -1), lambda x, read: read(x).movedim(-1, 1), lambda c: Reads(nn.LayerNorm(c))
    ),
    "2D CNN, (B*T, C, h, w)": Case(
        lambda x: x.transpose(1, 2).flatten(0, 1),
        lambda x, read: read(x).unflatten(0, (-1, T)).transpose(1, 2),
        lambda c: Reads(nn.Conv2d(c, c, 1)),
    ),
    "2D Swin, (B*T, h, w, C)": Case(
        lambda x: x.movedim(1, -1).flatten(0, 1), lambda x, read: read(x).unflatten(0, (-1, T)).movedim(-1, 1), linear
    ),
    "MViT, (B, 1+N, C) and (t, h, w)": Case(
        lambda x: (F.pad(x.flatten(2).transpose(1, 2), (0, 0, 1, 0)), [T, 4, 4]),
        lambda x, read: read(x[0])[:, 1:].transpose(1, 2).unflatten(2, (T, 4, 4)),
        linear,
    ),
    "ViT per frame, (B*T, 1+N, C)": Case(
        lambda x: F.pad(x.transpose(1, 2).flatten(0, 1).flatten(2).transpose(1, 2), (0, 0, 1, 0)),
        lambda x, read: read(x)[:, 1:].transpose(1, 2).unflatten(2, (4, 4)).unflatten(0, (-1, T)).transpose(1, 2),
        linear,
    ),
    "Hugging Face output": Case(
        lambda x: BaseModelOutput(last_hidden_state=x.movedim(1, -1)),
        lambda x, read: read(x.last_hidden_state).movedim(-1, 1),
        linear,
    ),
    "stated": Case(lambda x: x.movedim(1, -1), lambda x, read: x.movedim(-1, 1), layer_axes="BTHWC"),
    "stated, frames before channels": Case(
        lambda x: x.transpose(1, 2), lambda x, read: x.transpose(1, 2), layer_axes="BTCHW"
    ),
    "reshape": Case(
        lambda x: x.flip(1).movedim(1, 3), lambda x, read: x.movedim(3, 1).flip(1), reshape=lambda x: x.movedim(3, 1)
    ),
}


@in_one_case("channels")
@pytest.mark.parametrize("channels", [4, 6])  # with 4, no size tells the axes apart
@pytest.mark.parametrize("name", CASES)
def test_the_map_is_gradient_times_activation_in_the_order_of_the_layer(name: str, channels: int) -> None:
    net = through(CASES[name], channels).eval()
    found = GradCAM(net, "stage", layout="BCTHW", upsampling="nearest", **CASES[name].options)
    maps = found.attribute_maps(CLIP, target=1).joint
    expected = true_map(net, 1).repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    torch.testing.assert_close(maps, expected)


class Functional(nn.Module):
    """A channels-last stage without a module that shows it, of a shape that fits both orders."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 3, 1, 2, 2))

    def forward(self, clip: Tensor) -> Tensor:
        return F.conv3d(clip, self.weight, stride=(1, 2, 2)).movedim(1, -1)


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage = Functional()

    def forward(self, clip: Tensor) -> Tensor:
        return self.stage(clip).square().mean((1, 2, 3))


def test_an_order_that_no_module_shows_is_asked_for() -> None:
    net = Squared()
    with pytest.raises(ValueError, match=r"BCTHW or BTHWC.*layer_axes='BCTHW'"):
        GradCAM(net, "stage", layout="BCTHW").attribute(CLIP, target=1)
    with pytest.raises(ValueError, match=r"BCTHW or BTHWC.*layer_axes="):
        STABN.inject(net, "stage", "BCTHW", example=CLIP)
    with pytest.raises(ValueError, match="layer_axes must name each axis"):
        GradCAM(net, "stage", layout="BCTHW", layer_axes="BXHWC")


@in_one_case()
@pytest.mark.parametrize("before", [0, 1, 2])
def test_the_places_of_patches_among_several_other_tokens_per_frame_are_asked_for(before: int) -> None:
    # DeiT has two tokens before the patches, X-CLIP one before and one after them
    case = Case(
        lambda x: F.pad(x.transpose(1, 2).flatten(0, 1).flatten(2).transpose(1, 2), (0, 0, before, 2 - before)),
        lambda x, read: (
            read(x)[:, before : before + 16].transpose(1, 2).unflatten(2, (4, 4)).unflatten(0, (-1, T)).transpose(1, 2)
        ),
        linear,
    )
    net = through(case, 6).eval()
    message = r"4 x 4 patches per frame and 2 other.*TokenGrid\(t=4, h=4, w=4, prefix=2, tubelet=\(1, 2, 2\)\).*reshape"
    with pytest.raises(ValueError, match=message):
        GradCAM(net, "stage", "BCTHW").attribute(CLIP, target=1)

    def reshape(tokens: Tensor) -> Tensor:
        return tokens[:, before : before + 16].unflatten(1, (4, 4)).unflatten(0, (-1, T)).permute(0, 4, 1, 2, 3)

    ways: list[dict[str, Any]] = [{"reshape": reshape}]
    if before == 2:
        ways.append({"grid": TokenGrid(t=4, h=4, w=4, prefix=2, tubelet=(1, 2, 2))})
    for way in ways:
        found = GradCAM(net, "stage", "BCTHW", upsampling="nearest", **way).attribute_maps(CLIP, target=1).joint
        torch.testing.assert_close(found, true_map(net, 1).repeat_interleave(2, 2).repeat_interleave(2, 3) / 4)


def test_heads_and_positions_are_not_taken_for_the_height_and_width_of_cells() -> None:
    class Heads(nn.Module):  # the norm of queries in MViT returns (B*T, heads, N, C)
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.stage, self.head = nn.Conv2d(3, 6, 8, 8), nn.LayerNorm(3), nn.Linear(6, 3)

        def forward(self, clip: Tensor) -> Tensor:
            tokens = self.conv(clip.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)  # (B*T, 16, 6)
            heads = self.stage(tokens.unflatten(2, (2, 3)).transpose(1, 2))  # (B*T, 2, 16, 3)
            pooled = heads.square().mean(2).flatten(1)
            return self.head(pooled).unflatten(0, (-1, T)).mean(1)

    with pytest.raises(ValueError, match=r"\(8, 2, 16, 3\).*do not have the proportions of the frame.*reshape"):
        GradCAM(Heads(), "stage", "BCTHW").attribute(torch.rand(2, 3, T, 32, 32), target=1)


def test_a_recurrent_layer_gives_a_map_in_time() -> None:
    class Recurrent(nn.Module):
        def __init__(self, batch_first: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.frames, self.first = nn.Linear(3 * H * W, 5), batch_first
            self.lstm, self.head = nn.LSTM(5, 6, batch_first=batch_first), nn.Linear(6, 3)

        def forward(self, clip: Tensor) -> Tensor:
            rows = self.frames(clip.transpose(1, 2).flatten(2))
            states, _ = self.lstm(rows if self.first else rows.transpose(0, 1))
            states = states if self.first else states.transpose(0, 1)
            return self.head((states.tanh() * torch.linspace(0, 1, T)[:, None]).mean(1))

    maps = [GradCAM(Recurrent(first), "lstm", layout="BCTHW").attribute_maps(CLIP, target=1) for first in (True, False)]
    torch.testing.assert_close(maps[0].joint, maps[1].joint)
    assert bool((maps[0].temporal[:, 1:].abs() > 0).all())
    assert bool((maps[0].joint == maps[0].joint[:, :, :1, :1]).all())  # nothing is known about space
    assert bool((maps[0].temporal[:, 0].abs() < 1e-7).all())  # the weight of the first frame is 0


@in_one_case()
@pytest.mark.parametrize("pattern", ["BCTHW", "BTHWC", "BTCHW", "(BT)CHW", "(BT)HWC", "BNC", "(BT)NC", "(BN)TC", "BTC"])
@pytest.mark.parametrize("prefix", [0, 2])
def test_unfold_inverts_fold_and_keeps_the_prefix(pattern: str, prefix: int) -> None:
    axes = LayerAxes(pattern, (2, 3, 4), prefix if "N" in pattern else 0)
    sizes = {"B": 2, "C": 5, "T": 2, "H": 3, "W": 4, "N": 12 if "T" in pattern else 24}
    shape = [torch.Size([sizes[letter] for letter in group]).numel() for group in axes.groups]
    if axes.prefix:
        name = "N" if "N" in axes.groups else "T"
        shape[axes.groups.index(name)] += axes.prefix
    output = torch.rand(shape)
    features = axes.fold(output)
    assert features.shape == (2, 5, 2, *((1, 1) if pattern == "BTC" else (3, 4)))
    torch.testing.assert_close(axes.unfold(features, output), output)


def test_a_branch_on_a_channels_last_stage_is_that_on_the_same_stage_with_channels_first() -> None:
    last = through(CASES["Swin, (B, t, h, w, C)"], 4).eval()
    first = through(CASES["3D CNN"], 4).eval()
    first.stage.conv, first.head = last.stage.conv, last.head
    made = []
    for net in (last, first):
        torch.manual_seed(1)
        made.append(STABN.inject(net, "stage", "BCTHW"))
    for name in ("spatial_gates", "temporal_gates", "logits"):
        a, b = (getattr(st_abn.explain(CLIP), name) for st_abn in made)
        torch.testing.assert_close(a, b)
    torch.manual_seed(1)
    stated = STABN.inject(through(CASES["stated"], 4).eval(), "stage", "BCTHW", layer_axes="BTHWC")
    assert stated.config.layer_axes == "BTHWC"
