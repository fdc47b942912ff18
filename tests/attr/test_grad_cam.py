"""GradCAM is its formula, cell by cell, for every kind of layer; and Captum's where Captum has one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import LayerAttribution, LayerGradCam, NoiseTunnel
from covering import in_one_case
from tiny_models import SIZE, clip_for, randomize, tiny, tiny_module
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from captum_staa import TokenGrid, VideoClassifier, VideoLayout
from captum_staa.attr.grad_cam import GradCAM
from captum_staa.benchmark import PlantedClips
from captum_staa.metrics import auroc

WEIGHTINGS = ("gradcam", "hirescam", "layercam")
TARGETS = [2, 0]


class Net(nn.Module):
    """A 3D CNN of (B, C, T, H, W), or of (B, T, C, H, W): 5 channels in 3 x 3 x 2 cells in the middle."""

    def __init__(self, axes: str = "BCTHW", in_place: bool = False) -> None:
        super().__init__()
        self.channel = axes.index("C")
        self.first = nn.Conv3d(3, 5, (2, 3, 3), (2, 3, 3))
        self.act = nn.ReLU(inplace=in_place)
        self.last = nn.Conv3d(5, 4, (2, 1, 2))
        self.head = nn.Linear(4, 3)

    def rest(self, maps: Tensor) -> Tensor:
        return self.head(self.last(self.act(maps)).sigmoid().square().mean((2, 3, 4)))

    def forward(self, clip: Tensor, factor: Tensor | None = None) -> Tensor:
        logits = self.rest(self.first(clip.movedim(self.channel, 1)))
        return logits if factor is None else logits * factor[:, None]


def net(**options: Any) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(**options).double()


def clip_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CLIP = clip_of(2, 3, 6, 10, 8)  # 3 x 3 x 2 cells; in height a cell is not an integer number of pixels


def stretched(cells: int, pixels: int, mode: str) -> Tensor:
    """(pixels, cells): what each pixel takes of each cell along one axis, from the positions of their centers."""
    share = torch.zeros(pixels, cells, dtype=torch.float64)
    for pixel in range(pixels):
        place = (pixel + 0.5) * cells / pixels - 0.5
        if mode == "nearest":
            share[pixel, min(int(place + 0.5), cells - 1)] = 1
        else:
            place = min(max(place, 0.0), cells - 1.0)
            low = min(int(place), cells - 1)
            share[pixel, low] += 1 - (place - low)
            share[pixel, min(low + 1, cells - 1)] += place - low
    return share


def pixels_of(maps: Tensor, size: tuple[int, ...], mode: str) -> Tensor:
    """Maps (B, t, h, w) over the clip, each cell's value shared out among its pixels."""
    shares = [stretched(cells, pixels, mode) for cells, pixels in zip(maps.shape[1:], size, strict=True)]
    volume = math.prod(size) / math.prod(maps.shape[1:])
    return torch.einsum("btyx,Tt,Yy,Xx->bTYX", maps.double(), *shares) / volume


def by_loops(activation: Tensor, gradient: Tensor, weighting: str, relu: bool = False) -> Tensor:
    """The formula, for (B, C, t, h, w): one cell and channel after the other."""
    activation, gradient = activation.detach(), gradient.detach()
    batch, channels, *cells = activation.shape
    maps = torch.zeros(batch, *cells, dtype=torch.float64)
    for place in torch.ones(cells).nonzero().tolist():
        for b in range(batch):
            total = 0.0
            for c in range(channels):
                here = float(gradient[(b, c, *place)])
                if weighting == "gradcam":
                    here = float(gradient[b, c].double().mean())
                if weighting == "layercam":
                    here = max(here, 0.0)
                total += here * float(activation[(b, c, *place)])
            maps[(b, *place)] = max(total, 0.0) if relu else total
    return maps


def assert_close(found: Tensor, expected: Tensor, within: float = 1e-10) -> None:
    assert expected.abs().max() > 0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=within * expected.abs().max().item())


@in_one_case("relu", "upsampling")
@pytest.mark.parametrize("upsampling", ["trilinear", "nearest"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_grad_cam_equals_the_formula_on_a_split_network(weighting, relu, upsampling):
    model = net()
    activation = model.first(CLIP).detach().requires_grad_()
    logits = model.rest(activation)
    (gradient,) = torch.autograd.grad(logits[0, 2] + logits[1, 0], activation)
    expected = pixels_of(by_loops(activation, gradient, weighting, relu), (6, 10, 8), upsampling)
    method = GradCAM(model, "first", "BCTHW", weighting=weighting, upsampling=upsampling)
    parts = method.attribute_maps(CLIP, TARGETS, relu_attributions=relu)
    assert_close(parts.joint, expected)
    assert_close(parts.temporal, expected.sum((2, 3)))
    torch.testing.assert_close(parts.logits, logits.detach())
    found = method.attribute(CLIP, TARGETS, relu_attributions=relu)
    assert found.is_contiguous() and not found.requires_grad
    assert_close(found, (expected / 3)[:, None].expand(-1, 3, -1, -1, -1))


@in_one_case()
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layer", ["first", "act", "last"])
def test_grad_cam_equals_captums_layer_grad_cam(layer, relu):
    model = net()
    theirs = LayerGradCam(model, getattr(model, layer)).attribute(CLIP, TARGETS, relu_attributions=relu).detach()
    cells = theirs[0, 0].numel() / CLIP[0, 0].numel()
    theirs = LayerAttribution.interpolate(theirs, (6, 10, 8), "trilinear")[:, 0] * cells
    ours = GradCAM(model, getattr(model, layer), "BCTHW", weighting="gradcam")
    ours = ours.attribute(CLIP, TARGETS, relu_attributions=relu)
    assert_close(ours.sum(1), theirs)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_result_does_not_depend_on_the_layout(weighting):
    one = GradCAM(net(), "first", "BCTHW", weighting=weighting).attribute(CLIP, TARGETS)
    twin = GradCAM(net(axes="BTCHW"), "first", VideoLayout("BTCHW"), weighting=weighting)
    found = twin.attribute(CLIP.transpose(1, 2), TARGETS)
    assert found.is_contiguous() and torch.equal(found.transpose(1, 2), one)


def test_layer_output_modified_in_place_is_read_before_the_change():
    before = GradCAM(net(), "first", "BCTHW", weighting="hirescam").attribute(CLIP, TARGETS)
    after = GradCAM(net(in_place=True), "first", "BCTHW", weighting="hirescam").attribute(CLIP, TARGETS)
    assert torch.equal(after, before)


@in_one_case()
@pytest.mark.parametrize("upsampling", ["trilinear", "nearest"])
@pytest.mark.parametrize("weighting", ["hirescam", "gradcam"])
def test_hirescam_sums_to_the_output_of_a_linear_head_on_a_mean(weighting, upsampling):
    layers = (nn.Conv3d(3, 6, (2, 3, 3), (2, 3, 3)), nn.Tanh(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 3))
    model, clip = randomize(nn.Sequential(*layers), seed=0).double(), CLIP[..., :9, :6]
    logits = model(clip).detach()
    method = GradCAM(model, "1", "BCTHW", weighting=weighting, upsampling=upsampling)
    found = method.attribute(clip, TARGETS).sum((1, 2, 3, 4))
    assert_close(found, torch.stack([logits[0, 2], logits[1, 0]]) - model[4].bias.detach()[TARGETS])


class CNNLSTM(nn.Module):
    """(B, T, C, H, W), frame by frame through a 2D CNN: all at once, or in a loop."""

    def __init__(self, loop: bool) -> None:
        super().__init__()
        self.loop = loop
        self.cnn = nn.Sequential(nn.Conv2d(3, 4, 3, 3), nn.ReLU())
        self.lstm = nn.LSTM(24, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def rest(self, maps: Tensor) -> Tensor:
        return self.head(self.lstm(maps.flatten(2))[0][:, -1])

    def forward(self, clip: Tensor) -> Tensor:
        if self.loop:
            return self.rest(torch.stack([self.cnn(frame) for frame in clip.unbind(1)], 1))
        return self.rest(self.cnn(clip.flatten(0, 1)).unflatten(0, clip.shape[:2]))


@in_one_case()
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_2d_convolutions_over_frames(weighting, loop):
    model, clip = randomize(CNNLSTM(loop), seed=0).double(), clip_of(2, 4, 3, 9, 6)
    maps = torch.stack([model.cnn(frame) for frame in clip.unbind(1)], 1).detach().requires_grad_()
    logits = model.rest(maps)  # of (B, T, C, h, w)
    (gradient,) = torch.autograd.grad(logits[0, 2] + logits[1, 0], maps)
    expected = by_loops(maps.transpose(1, 2), gradient.transpose(1, 2), weighting)
    found = GradCAM(model, "cnn", "BTCHW", weighting=weighting).attribute_maps(clip, TARGETS).joint
    assert_close(found, pixels_of(expected, (4, 9, 6), "trilinear"))


def test_unused_frames_of_a_loop_get_zero():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cnn = nn.Conv2d(3, 3, 3, 3)

        def forward(self, clip: Tensor) -> Tensor:
            return [self.cnn(frame) for frame in clip.unbind(1)][2].mean((2, 3))

    method = GradCAM(Last(), "cnn", "BTCHW", weighting="hirescam", upsampling="nearest")
    found = method.attribute_maps(clip_of(2, 4, 3, 9, 6).float(), 0)
    assert (found.temporal != 0).tolist() == [[False, False, True, False]] * 2


# Where the token of a cell (t, y, x) of clip b stands in a layer's output, in a grid of 4 x 3 x 2.
PLACES: dict[str, Callable[[int, int, int, int], tuple[int, int]]] = {
    "thw": lambda b, t, y, x: (b, t * 6 + y * 2 + x),
    "thw after a class token": lambda b, t, y, x: (b, 1 + t * 6 + y * 2 + x),
    "hwt after a class token": lambda b, t, y, x: (b, 1 + (y * 2 + x) * 4 + t),
    "hwt": lambda b, t, y, x: (b, (y * 2 + x) * 4 + t),
    "frames": lambda b, t, y, x: (b * 4 + t, y * 2 + x),
    "frames, each after a class token": lambda b, t, y, x: (b * 4 + t, 1 + y * 2 + x),
    "places": lambda b, t, y, x: (b * 6 + y * 2 + x, t),
}
TOKENS = [
    ("videomae", "videomae.encoder.layer.0", "thw"),
    ("videomae", "videomae.encoder.layer.1.layernorm_before", "thw"),
    ("videomae-first", "videomae.encoder.layer.1.layernorm_before", "thw"),
    ("timesformer", "timesformer.encoder.layer.0", "hwt after a class token"),
    ("timesformer", "timesformer.encoder.layer.1.temporal_dense", "hwt"),
    ("timesformer", "timesformer.encoder.layer.1.temporal_layernorm", "places"),
    ("timesformer", "timesformer.encoder.layer.1.temporal_attention", "places"),
    ("timesformer", "timesformer.encoder.layer.1.layernorm_before", "frames, each after a class token"),
    ("timesformer-joint", "timesformer.encoder.layer.1.layernorm_before", "hwt after a class token"),
    ("vivit", "vivit.layers.1.layernorm_before", "thw after a class token"),
    ("vjepa2", "vjepa2.encoder.layer.1", "thw"),
    ("vjepa2", "vjepa2.encoder.layer.1.norm1", "thw"),
    ("videoprism", "vision_model.spatial_layers.1", "frames"),
    ("videoprism", "vision_model.temporal_layers.0", "places"),
]


@pytest.mark.parametrize(("name", "layer", "order"), TOKENS)
def test_tokens_are_placed_as_in_the_model(name, layer, order):
    """Against the whole graph, without a cut, and an index for every token."""
    clf = tiny(name).double()
    clip, kept = clip_for(clf, dtype=torch.float64), []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = clf.module.get_submodule(layer).register_forward_hook(keep)
    logits = clf(clip)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[0, 2] + logits[1, 0], kept)

    def cells(tokens: Tensor) -> Tensor:
        grid = torch.zeros(2, tokens.shape[-1], 4, 3, 2, dtype=torch.float64)
        for b, t, y, x in torch.ones(2, 4, 3, 2).nonzero().tolist():
            grid[b, :, t, y, x] = tokens[PLACES[order](b, t, y, x)]
        return grid

    activation, gradient = cells(kept[0]), cells(gradient)
    products = activation * gradient
    before_a_norm = products.sum(1).abs().max() < 1e-3 * products.abs().sum(1).max()
    for weighting in [each for each in WEIGHTINGS if not (before_a_norm and each == "hirescam")]:
        expected = pixels_of(by_loops(activation, gradient, weighting), (clf.num_frames, *SIZE), "trilinear")
        found = GradCAM(clf, layer, weighting=weighting).attribute_maps(clip, TARGETS)
        assert_close(found.joint, expected, within=1e-6)  # a mean of gradients cancels
        torch.testing.assert_close(found.logits, logits.detach())


def test_grid_argument_replaces_the_grid_of_the_family():
    clf = tiny("vivit")
    clip, layer = clip_for(clf), "vivit.layers.1.layernorm_before"
    expected = GradCAM(clf, layer, upsampling="nearest").attribute(clip, TARGETS)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_module("vivit")

        def forward(self, x: Tensor) -> Tensor:
            return self.model(pixel_values=x).logits

    bare = GradCAM(Logits(), "model." + layer, "BTCHW", clf.grid, upsampling="nearest")
    torch.testing.assert_close(bare.attribute(clip, TARGETS), expected)
    with pytest.raises(ValueError, match=r"got shape \(2, 25, 24\).*Pass grid=captum_staa.models.inspect"):
        GradCAM(Logits(), "model." + layer, "BTCHW").attribute(clip, TARGETS)
    turned = TokenGrid(4, 3, 2, prefix=1, order="hwt", tubelet=(2, 8, 8))
    assert not torch.allclose(GradCAM(clf, layer, grid=turned, upsampling="nearest").attribute(clip, TARGETS), expected)


def test_pixels_outside_the_tokens_get_zero():
    clf = VideoClassifier(tiny_module("vivit"), image_size=SIZE)
    grid = TokenGrid(4, 3, 2, prefix=1, tubelet=(2, 7, 7))
    method = GradCAM(clf, "vivit.layers.0.layernorm_after", grid=grid)
    found = method.attribute_maps(clip_for(clf), TARGETS).joint
    assert not found[:, :, 21:].any() and not found[..., 14:].any() and found[:, :, 20, 13].all()


def test_clips_of_a_batch_are_independent():
    clf = tiny("timesformer")
    clip, layer = clip_for(clf, batch=3), "timesformer.encoder.layer.1.layernorm_before"
    together = GradCAM(clf, layer).attribute(clip, [2, 0, 1])
    alone = [GradCAM(clf, layer).attribute(clip[i : i + 1], t) for i, t in enumerate([2, 0, 1])]
    assert_close(together, torch.cat(alone).double(), within=1e-5)


def test_additional_forward_args_reach_the_model():
    factor = torch.tensor([2.0, -3.0], dtype=torch.float64, requires_grad=True)
    plain = GradCAM(net(), "first", "BCTHW").attribute(CLIP, 1)
    found = GradCAM(net(), "first", "BCTHW").attribute((CLIP,), 1, factor)
    assert isinstance(found, tuple) and factor.grad is None
    assert_close(found[0], plain * factor.detach().view(-1, 1, 1, 1, 1))


def test_gradients_are_enabled_inside_and_half_precision_gives_float32():
    clf = tiny("vivit")
    clip, method = clip_for(clf), GradCAM(clf, "vivit.layers.0.layernorm_after")
    with torch.no_grad():
        assert torch.equal(method.attribute(clip, 1), method.attribute(clip.requires_grad_(), 1))
        tunnel = NoiseTunnel(method).attribute(clip, nt_samples=2, stdevs=0.0, target=1)
    assert clip.grad is None
    assert_close(tunnel, method.attribute(clip.detach(), 1).double(), within=1e-5)
    half = GradCAM(tiny("vivit").half(), "vivit.layers.0.layernorm_after").attribute(clip.detach().half(), 1)
    assert half.dtype == torch.float32
    similar = torch.nn.functional.cosine_similarity(half.flatten(), method.attribute(clip.detach(), 1).flatten(), 0)
    assert similar > 0.99


@pytest.mark.parametrize("half", [False, True])
def test_hirescam_raises_for_a_layer_that_only_a_norm_reads(half):
    """Gradient times activation is zero there: what is left is rounding."""
    clf = tiny("vivit").half() if half else tiny("vivit")
    clip = clip_for(clf).to(next(clf.parameters()).dtype)
    with pytest.raises(ValueError, match=r"layer 'vivit.layers.0'.*clips \[0, 1\].*weighting='gradcam'"):
        GradCAM(clf, "vivit.layers.0").attribute(clip, 1)
    for layer, weighting in (("vivit.layers.0", "gradcam"), ("vivit.layers.1.layernorm_before", "hirescam")):
        assert GradCAM(clf, layer, weighting=weighting).attribute(clip, 1).any()


@pytest.mark.parametrize(
    ("name", "layer", "joint", "time"),
    [("tiny-resnet3d-pattern", "stem", 0.94, 0.88), ("tiny-videomae-pattern", "videomae.encoder.layer.0", 0.7, 0.65)],
)
def test_planted_evidence_is_found(name, layer, joint, time):
    clf = VideoClassifier.from_pretrained(name)
    clips, labels, truth = PlantedClips(seed=77, n=40)[:40]
    clips = clf.layout.from_working(clips).contiguous()
    maps = GradCAM(clf, layer, weighting="layercam").attribute_maps(clips, labels).joint
    assert auroc(maps, truth).mean() > joint
    assert auroc(maps, truth, axis="time").mean() > time


def test_the_weighting_is_in_the_name_unless_it_is_the_default() -> None:
    names = [GradCAM(net(), "first", "BCTHW", weighting=w).get_name() for w in ("hirescam", "layercam", "gradcam")]
    assert names == ["GradCAM", "GradCAM (layercam)", "GradCAM (gradcam)"]


def test_a_clip_with_swapped_axes_is_reported_as_such_and_not_as_a_wrong_grid() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = VideoMAEConfig(image_size=8, patch_size=4, num_frames=4, **sizes)
    clf = VideoClassifier(VideoMAEForVideoClassification(config))
    with pytest.raises(ValueError, match=r"axes of the clip are swapped: got 4 channels and 3 frames"):
        GradCAM(clf, "videomae.encoder.layer.0").attribute(torch.rand(1, 3, 4, 8, 8), target=1)
