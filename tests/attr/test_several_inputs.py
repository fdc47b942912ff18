"""Models of several inputs, RGB and optical flow: a tuple gives a tuple, and every map is that of its input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from captum.attr import LayerAttribution, LayerGradCam
from covering import in_one_case
from test_grad_cam import by_loops, pixels_of
from torch import Tensor, nn

from captum_staa import (
    STAA,
    GradCAM,
    SpatioTemporalPerturbation,
    VideoClassifier,
    VideoFeatureAblation,
    VideoLayout,
    baselines,
    feature_masks,
    metrics,
    smooth,
)

B, T, CLASSES = 2, 4, 3
LAYOUT = VideoLayout("BCTHW")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


RGB, FLOW = drawn(B, 3, T, 8, 6), drawn(B, 2, T, 8, 6, seed=1)
SMALL = drawn(B, 2, T, 4, 3, seed=2)  # flow at half the resolution
TARGET = [2, 0]


class TwoStream(nn.Module):
    """Separate streams, a layer that reads both, and a head without symmetries."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.rgb, self.flow = nn.Conv3d(3, 4, 3, (1, 2, 2), 1), nn.Conv3d(2, 4, 3, (1, 2, 2), 1)
            self.mixed = nn.Sequential(nn.Conv3d(4, 5, 1), nn.Tanh())
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(5 * T * 4 * 3, CLASSES))

    def forward(self, rgb: Tensor, flow: Tensor) -> Tensor:
        moving = nn.functional.interpolate(self.flow(flow), size=(T, 4, 3))
        return self.head(self.mixed(self.rgb(rgb).tanh() + moving))


# --- GradCAM ----------------------------------------------------------------------------------------------------------


@in_one_case()
@pytest.mark.parametrize("flow", [FLOW, SMALL])
@pytest.mark.parametrize("weighting", ["gradcam", "hirescam", "layercam"])
def test_grad_cam_resizes_the_map_of_a_layer_that_reads_both_inputs_to_each(flow: Tensor, weighting: Any) -> None:
    model = TwoStream()
    seen: list[Tensor] = []
    handle = model.mixed.register_forward_hook(lambda module, args, output: seen.append(output))
    logits = model(RGB, flow)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[0, 2] + logits[1, 0], seen)
    cells = by_loops(seen[0], gradient, weighting)
    found = GradCAM(model, "mixed", "BCTHW", weighting=weighting).attribute((RGB, flow), TARGET)
    maps = GradCAM(model, "mixed", "BCTHW", weighting=weighting).attribute_maps((RGB, flow), TARGET)
    assert isinstance(found, tuple) and isinstance(maps, tuple) and len(found) == len(maps) == 2
    for part, parts, clip in zip(found, maps, (RGB, flow), strict=True):
        expected = pixels_of(cells, LAYOUT.extent(clip), "trilinear")
        torch.testing.assert_close(part.sum(1).double(), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(parts.joint, part.sum(1), atol=1e-6, rtol=0)
        assert part.shape == clip.shape and part.std() > 0
        torch.testing.assert_close(parts.logits, logits.detach())


def test_grad_cam_of_two_inputs_is_captums_map_interpolated_to_each() -> None:
    model = TwoStream()
    theirs = LayerGradCam(model, model.mixed).attribute((RGB, SMALL), TARGET)  # (B, 1, t, h, w)
    ours = GradCAM(model, "mixed", "BCTHW", weighting="gradcam").attribute((RGB, SMALL), TARGET)
    for part, clip in zip(ours, (RGB, SMALL), strict=True):
        size = LAYOUT.extent(clip)
        pixels = LayerAttribution.interpolate(theirs, size, "trilinear") * theirs[0].numel() / torch.Size(size).numel()
        torch.testing.assert_close(part.sum(1, keepdim=True), pixels, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layer", ["rgb", "flow"])
def test_grad_cam_of_a_layer_of_one_stream_is_zero_for_the_other(layer: str) -> None:
    model = TwoStream()
    of_rgb, of_flow = GradCAM(model, layer, "BCTHW").attribute((RGB, SMALL), TARGET)
    if layer == "rgb":
        alone, other = GradCAM(model, layer, "BCTHW").attribute(RGB, TARGET, SMALL), of_flow
        assert torch.equal(of_rgb, alone)
    else:
        turned = nn.Module()
        turned.inner, turned.forward = model, lambda flow, rgb: model(rgb, flow)
        alone, other = GradCAM(turned, "inner.flow", "BCTHW").attribute(SMALL, TARGET, RGB), of_rgb
        assert torch.equal(of_flow, alone)
    assert alone.std() > 0 and not other.any()


def test_grad_cam_of_a_layer_that_is_cut_off_from_all_inputs_says_what_to_do() -> None:
    class Detached(TwoStream):
        def forward(self, rgb: Tensor, flow: Tensor) -> Tensor:
            return super().forward(rgb.detach().clamp(-1, 1), flow)

    method = GradCAM(Detached(), "rgb", "BCTHW")
    with pytest.raises(ValueError, match=r"'rgb' must depend on one of the 2 inputs.*as additional_forward_args"):
        method.attribute((RGB, FLOW), 0)
    assert method.attribute(RGB, 0, FLOW).std() > 0  # the way out


def test_maps_of_any_method_are_one_per_input() -> None:
    model = TwoStream()
    masks = feature_masks.frames((RGB, SMALL), "BCTHW")
    method = VideoFeatureAblation(model, "BCTHW")
    maps = method.attribute_maps((RGB, SMALL), target=TARGET, feature_mask=masks)
    attributions = method.attribute((RGB, SMALL), target=TARGET, feature_mask=masks)
    for part, values in zip(maps, attributions, strict=True):
        torch.testing.assert_close(part.joint, values.sum(1))
        torch.testing.assert_close(part.temporal, values.sum((1, 3, 4)))
        torch.testing.assert_close(part.logits, model(RGB, SMALL).detach())


# --- baselines, masks and smoothing -----------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {"blur": {"time": 0.5}, "freeze": {"frame": 1}}


@in_one_case()
@pytest.mark.parametrize("name", ["zero", "mean_frame", "blur", "freeze", "shuffle", "reverse", "noise"])
def test_baselines_of_a_tuple_are_those_of_its_inputs(name: str) -> None:
    make, options = getattr(baselines, name), OPTIONS.get(name, {})
    found = make((RGB, SMALL), "BCTHW", **options)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], make(RGB, "BCTHW", **options))
    if name == "noise":
        draw = torch.Generator().manual_seed(0)
        expected = [make(clip, "BCTHW", generator=draw) for clip in (RGB, SMALL)]  # one after the other
        assert torch.equal(found[1], expected[1])
    else:
        assert torch.equal(found[1], make(SMALL, "BCTHW", **options))


def test_shuffle_gives_all_inputs_of_a_clip_the_same_order() -> None:
    frames = torch.arange(8.0).view(1, 1, 8, 1, 1).expand(B, 1, 8, 2, 2).contiguous()
    two = torch.cat([frames, 10 * frames], 1)
    first, second = baselines.shuffle((frames, two), "BCTHW", generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.cat([first, 10 * first], 1), second) and not torch.equal(first[0], first[1])
    with pytest.raises(ValueError, match=r"same number.*\(2, 3, 4, 8, 6\), \(2, 2, 3, 8, 6\)"):
        baselines.shuffle((RGB, FLOW[:, :, 1:]), VideoLayout("BCTHW", channels=None))


MASKS: dict[str, Callable[[Any], Any]] = {
    "frames": lambda x: feature_masks.frames(x, "BCTHW"),
    "segments": lambda x: feature_masks.segments(x, "BCTHW", 3),
    "grid": lambda x: feature_masks.grid(x, "BCTHW", (2, 3, 2)),
    "supervoxels": lambda x: feature_masks.supervoxels(x, "BCTHW", 4),
    "flow_tubes": lambda x: feature_masks.flow_tubes(x, "BCTHW", 3),
}


@in_one_case()
@pytest.mark.parametrize("name", MASKS)
def test_ids_of_feature_masks_continue_from_one_input_to_the_next(name: str) -> None:
    first, second = MASKS[name]((RGB, SMALL))
    alone, other = MASKS[name](RGB), MASKS[name](SMALL)
    assert torch.equal(first, alone)
    for mask, expected, before in zip(second, other, first, strict=True):  # per clip
        assert torch.equal(mask, expected + before.max() + 1)
    model = TwoStream()
    attributions = VideoFeatureAblation(model, "BCTHW").attribute((RGB, SMALL), target=0, feature_mask=(first, second))
    apart = VideoFeatureAblation(model, "BCTHW").attribute(RGB, None, 0, SMALL, alone)
    torch.testing.assert_close(attributions[0], apart)


def test_tubelets_of_a_tuple_are_numbered_on() -> None:
    clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    clip = torch.rand(1, 16, 3, 48, 48)
    first, second = feature_masks.tubelets((clip, clip), clf)
    assert torch.equal(first, feature_masks.tubelets(clip, clf)) and torch.equal(second, first + 288)


def test_smooth_smooths_each_input() -> None:
    found = smooth((RGB, SMALL), "BCTHW", space=1.0, time=0.5)
    assert isinstance(found, tuple)
    for part, clip in zip(found, (RGB, SMALL), strict=True):
        assert torch.equal(part, smooth(clip, "BCTHW", space=1.0, time=0.5))


# --- metrics ----------------------------------------------------------------------------------------------------------

WEIGHTS = drawn(1, 3, T, 8, 6, seed=5), drawn(1, 2, T, 4, 3, seed=6)
CELLS = (2, 2, 3)
COVERS = (0.5, -1.0)


def linear(rgb: Tensor, flow: Tensor) -> Tensor:
    """Two outputs, of which the second is twice the first, plus 1."""
    total = sum((weight * clip).flatten(1).sum(1) for weight, clip in zip(WEIGHTS, (rgb, flow), strict=True))
    return torch.stack([total, 2 * total + 1], dim=1)


def shares() -> tuple[list[float], list[float]]:
    """What each cell adds to the first output of clip 0 against the baseline, and its mean attribution."""
    falls, means = [], []
    for weight, clip, cover, maps in zip(WEIGHTS, (RGB, SMALL), COVERS, MAPS, strict=True):
        added = (weight * (clip - cover))[0].sum(0)
        for t in range(0, T, CELLS[0]):
            for y in range(0, clip.shape[3], CELLS[1]):
                for x in range(0, clip.shape[4], CELLS[2]):
                    box = (slice(t, t + CELLS[0]), slice(y, y + CELLS[1]), slice(x, x + CELLS[2]))
                    falls.append(float(added[box].sum()))
                    means.append(float(maps[0].sum(0)[box].mean()))
    return falls, means


MAPS = drawn(B, 3, T, 8, 6, seed=7), drawn(B, 2, T, 4, 3, seed=8)
ARGUMENTS: dict[str, Any] = {"baselines": COVERS, "target": 0, "layout": "BCTHW", "cells": CELLS}


def ordered(order: str = "morf") -> list[float]:
    """The shares of the cells of both inputs in the order of their mean attribution."""
    falls, means = shares()
    return [fall for _, fall in sorted(zip(means, falls, strict=True), reverse=order == "morf")]


def test_insertion_ranks_the_cells_of_all_inputs_together() -> None:
    steps = len(ordered())
    assert steps == 2 * 4 * 2 + 2 * 2 * 1
    empty = linear(torch.full_like(RGB, COVERS[0]), torch.full_like(SMALL, COVERS[1]))[0, 0]
    for order in ("morf", "lerf"):
        expected = empty + torch.tensor([0.0, *ordered(order)]).cumsum(0)
        found = metrics.insertion(
            linear, (RGB, SMALL), MAPS, **ARGUMENTS, steps=steps, order=order, output="logit", perturbations_per_eval=3
        )
        torch.testing.assert_close(found.curve[0], expected.double(), atol=1e-4, rtol=1e-5)
        reverse = metrics.deletion(linear, (RGB, SMALL), MAPS, **ARGUMENTS, steps=steps, order=order, output="logit")
        expected = linear(RGB, SMALL)[0, 0] - torch.tensor([0.0, *ordered(order)]).cumsum(0)
        torch.testing.assert_close(reverse.curve[0], expected.double(), atol=1e-4, rtol=1e-5)


def test_aopc_and_saco_of_two_inputs_equal_sums_over_cells() -> None:
    falls = torch.tensor(ordered()).double()
    found = metrics.aopc(linear, (RGB, SMALL), MAPS, **ARGUMENTS, steps=len(falls))[0]
    torch.testing.assert_close(found, falls.cumsum(0).sum() / (len(falls) + 1), atol=1e-4, rtol=1e-5)
    means = torch.tensor(sorted(shares()[1], reverse=True)).double()
    gaps, signs = means[:, None] - means, (falls[:, None] - falls).sign()
    above = torch.ones_like(gaps).triu(1).bool()
    expected = (gaps * signs)[above].sum() / gaps[above].sum()
    found = metrics.saco(linear, (RGB, SMALL), MAPS, **ARGUMENTS, groups=len(falls))[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


JOINED: dict[str, Callable[..., Any]] = {
    "insertion": lambda *args, **more: metrics.insertion(*args, **more, steps=5).curve,
    "deletion": lambda *args, **more: metrics.deletion(*args, **more, steps=5, order="lerf").score,
    "insertion and deletion": lambda *args, **more: metrics.insertion_deletion(*args, **more, steps=5).deletion.curve,
    "faithfulness": lambda *args, target, **more: metrics.faithfulness(*args, **more),
    "monotonicity": lambda *args, target, **more: metrics.monotonicity(*args, **more),
    "correlation": metrics.faithfulness_correlation,
    "AOPC": metrics.aopc,
    "SaCo": metrics.saco,
}


@in_one_case()
@pytest.mark.parametrize("name", JOINED)
def test_metrics_with_one_mask_for_both_inputs_equal_those_of_one_clip_that_pack_splits(name: str) -> None:
    model = TwoStream()
    masks = feature_masks.grid(RGB, "BCTHW", (2, 3, 2))
    covers = (drawn(1, 3, 1, 8, 6, seed=9), 0.5)
    maps = drawn(B, 3, T, 8, 6, seed=7), drawn(B, 2, T, 8, 6, seed=8)
    apart = JOINED[name](model, (RGB, FLOW), maps, baselines=covers, target=TARGET, feature_mask=(masks,) * 2,
                         layout="BCTHW")  # fmt: skip
    together = VideoClassifier(model, "BCTHW", output="logits", pack=lambda clip: clip.split((3, 2), 1))
    cover = torch.cat([covers[0].expand(1, 3, T, 8, 6), torch.full((1, 2, T, 8, 6), 0.5)], 1)
    expected = JOINED[name](together, torch.cat([RGB, FLOW], 1), torch.cat(maps, 1), baselines=cover, target=TARGET,
                            feature_mask=masks)  # fmt: skip
    torch.testing.assert_close(apart, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0 or expected.numel() == 1


def test_controls_of_a_tuple_are_those_of_its_inputs() -> None:
    found = metrics.controls((RGB, SMALL), "BCTHW", MAPS)
    draw = torch.Generator().manual_seed(0)
    alone = [metrics.controls(clip, "BCTHW", part, draw) for clip, part in zip((RGB, SMALL), MAPS, strict=True)]
    assert list(found) == ["random", "uniform", "center", "inverted"] == list(alone[0])
    for name, maps in found.items():
        assert isinstance(maps, tuple)
        assert all(torch.equal(part, one[name]) for part, one in zip(maps, alone, strict=True)), name
    names = ("image gradient", "frame difference")
    free = metrics.model_free_controls((RGB, SMALL), "BCTHW", names)
    for i, clip in enumerate((RGB, SMALL)):
        expected = metrics.model_free_controls(clip, "BCTHW", names)
        assert all(torch.equal(free[name][i], expected[name]) for name in names)
    score = metrics.insertion(linear, (RGB, SMALL), found["random"], **ARGUMENTS, output="logit").score
    assert score.shape == (B,)


def test_sanity_checks_rank_the_values_of_all_inputs_together() -> None:
    def explain(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        leaves = tuple(clip.detach().requires_grad_() for clip in inputs)
        return torch.autograd.grad(model(*leaves)[:, 1].sum(), leaves)

    model, other = TwoStream(), TwoStream()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + torch.arange(parameter.numel()).view(parameter.shape) % 3)
    found = metrics.sanity.label_randomization(explain, model, other, (RGB, SMALL), layout="BCTHW").signed
    values = [torch.cat([part.sum(1).flatten(1) for part in explain(m, (RGB, SMALL))], 1) for m in (model, other)]
    ranks = [part.argsort(1).argsort(1).double() for part in values]  # no ties
    expected = torch.stack([torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(*ranks, strict=True)])
    torch.testing.assert_close(found, expected)
    assert metrics.sanity.randomization(explain, model, (RGB, SMALL), layout="BCTHW", layers=["head"]).signed[0, 0] < 1


# --- the classifier, and what takes one clip --------------------------------------------------------------------------


def test_a_classifier_of_two_inputs_predicts_and_converts_both() -> None:
    model = TwoStream()
    clf = VideoClassifier(model, "BCTHW", labels=["a", "b", "c"], output="logits")
    expected = model(RGB, SMALL).softmax(1)
    rows = clf.predict((RGB, SMALL), k=3)
    torch.testing.assert_close(torch.tensor([dict(row)[label] for row in rows for label in "abc"]), expected.flatten())


def test_gradients_of_all_inputs_of_a_classifier_are_contiguous_and_in_their_dtype() -> None:
    class Turned(TwoStream):
        def forward(self, rgb: Tensor, flow: Tensor) -> Tensor:
            return super().forward(*(clip.transpose(1, 2).contiguous().transpose(1, 2) for clip in (rgb, flow)))

    wide = tuple(clip.double().requires_grad_() for clip in (RGB, SMALL))  # for a float32 module
    slopes = torch.autograd.grad(VideoClassifier(Turned(), "BCTHW")(*wide)[:, 0].sum(), wide)
    assert all(slope.is_contiguous() and slope.dtype == torch.float64 for slope in slopes)
    expected = torch.autograd.grad(TwoStream().double()(*wide)[:, 0].sum(), wide)
    torch.testing.assert_close(slopes, expected, atol=1e-6, rtol=1e-4)


def test_a_known_transformer_takes_one_clip() -> None:
    with pytest.raises(ValueError, match="VideoMAEForVideoClassification takes one clip tensor, got 2 clips"):
        VideoClassifier.from_pretrained("tiny-videomae-pattern")(*[torch.rand(1, 16, 3, 48, 48)] * 2)


def test_methods_of_one_clip_name_the_way_out_for_two_inputs() -> None:
    model = TwoStream()
    with pytest.raises(ValueError, match="got a tuple of 2 inputs") as raised:
        SpatioTemporalPerturbation(model, "BCTHW").attribute((RGB, FLOW), target=0)
    advice = str(raised.value)
    clip = eval(advice[advice.index("torch.cat") : advice.index(" of Video")], {"torch": torch, "inputs": (RGB, FLOW)})
    call = advice[advice.index("VideoClassifier(") : -1]
    joined = eval(call, {"VideoClassifier": VideoClassifier, "model": model})
    torch.testing.assert_close(joined(clip), model(RGB, FLOW))
    masks = SpatioTemporalPerturbation(joined).attribute(clip, target=0, iterations=2)
    assert masks.shape == (B, 5, T, 8, 6)  # one mask in space and time for both inputs
    with pytest.raises(ValueError, match="STAA explains one clip tensor"):
        STAA(VideoClassifier.from_pretrained("tiny-videomae-pattern"), mode="attention").attribute((RGB, FLOW))


@in_one_case()
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: metrics.insertion(linear, (RGB, SMALL), MAPS[0], **ARGUMENTS),
            "attributions must be one per input, 2",
        ),
        (lambda: metrics.aopc(linear, (RGB, SMALL), MAPS[::-1], **ARGUMENTS), r"shape of the clip, \(2, 3, 4, 8, 6\)"),
        (lambda: metrics.insertion(linear, (RGB, SMALL[:1]), MAPS, **ARGUMENTS), "same batch size"),
        (lambda: metrics.auroc(MAPS, MAPS[0] > 0, layout="BCTHW"), "items one at a time"),
        (lambda: baselines.blur((RGB, SMALL / 0), "BCTHW"), r"inputs\[1\] must be finite"),
        (lambda: feature_masks.frames((RGB, SMALL[0]), "BCTHW"), r"inputs\[1\] must be a non-empty 5-D"),
        (lambda: feature_masks.grid((RGB, SMALL), "BCTHW", (2, 6, 6)), "side h"),
    ],
)
def test_wrong_tuples_raise(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
