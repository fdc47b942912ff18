"""VideoLayout: conversion to the internal order and back, sums over channels, and errors for wrong axes."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from covering import in_one_case

from captum_staa import VideoAttribution, VideoLayout
from captum_staa.layout import layout_of

SIZES = {"B": 2, "T": 3, "C": 4, "H": 5, "W": 6}
LAYOUTS = ["B" + "".join(rest) for rest in itertools.permutations("TCHW")]


def numbered() -> torch.Tensor:
    """Return a (B, T, C, H, W) clip in which no two values are equal."""
    shape = [SIZES[axis] for axis in "BTCHW"]
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


@in_one_case()
@pytest.mark.parametrize("axes", LAYOUTS)
def test_to_working_and_from_working_are_inverse(axes):
    layout, clip = VideoLayout(axes), numbered()
    clip_in_layout = torch.einsum(f"BTCHW->{axes}", clip)
    assert torch.equal(layout.to_working(clip_in_layout), clip)
    assert torch.equal(layout.from_working(clip), clip_in_layout)
    assert layout.size(clip_in_layout) == SIZES
    assert clip_in_layout.shape[layout.time] == SIZES["T"]
    assert clip_in_layout.shape[layout.channel] == SIZES["C"]


@in_one_case()
@pytest.mark.parametrize("axes", LAYOUTS)
def test_from_attributions_sums_over_channels_space_and_time(axes):
    clip = numbered()
    parts = VideoAttribution.from_attributions(torch.einsum(f"BTCHW->{axes}", clip), axes.lower())
    torch.testing.assert_close(parts.joint, torch.einsum("btchw->bthw", clip))
    torch.testing.assert_close(parts.spatial, torch.einsum("btchw->bhw", clip))
    torch.testing.assert_close(parts.temporal, torch.einsum("btchw->bt", clip))
    assert parts.logits is None


@pytest.mark.parametrize("axes", ["BTCHW", "BCTHW", "BWHTC"])
def test_expand_is_the_inverse_of_reduce(axes):
    layout = VideoLayout(axes)
    maps = torch.rand(SIZES["B"], SIZES["T"], SIZES["H"], SIZES["W"])
    clip = torch.einsum(f"BTCHW->{axes}", numbered())
    spread = layout.expand(maps, clip)
    assert spread.shape == clip.shape and spread.is_contiguous()
    torch.testing.assert_close(layout.reduce(spread), maps)
    evenly = spread.movedim(layout.channel, 0)
    assert torch.equal(evenly, evenly[:1].expand_as(evenly))
    assert layout.expand(maps, clip.double()).dtype == torch.float64


def test_half_precision_is_summed_in_float32():
    ones = torch.ones(1, 4, 3, 32, 32, dtype=torch.bfloat16)
    parts = VideoAttribution.from_attributions(ones, "BTCHW")
    assert parts.temporal.tolist() == [[3072.0] * 4]  # bfloat16 cannot represent 3072 + 1
    assert VideoAttribution.from_attributions(ones.double(), "BTCHW").joint.dtype == torch.float64


def test_from_attributions_detaches():
    leaf = torch.rand(1, 2, 3, 4, 5, requires_grad=True)
    assert not VideoAttribution.from_attributions(leaf * 2, "BTCHW").joint.requires_grad


def test_from_joint_sums_over_space_and_time():
    joint = torch.rand(2, 3, 4, 5)
    parts = VideoAttribution.from_joint(joint, torch.ones(2, 7))
    assert parts.logits is not None and parts.logits.shape == (2, 7)
    torch.testing.assert_close(parts.spatial.sum((1, 2)), joint.sum((1, 2, 3)))
    torch.testing.assert_close(parts.temporal.sum(1), joint.sum((1, 2, 3)))


@in_one_case()
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: VideoLayout("BTHW"), ValueError, ["'BTHW'", "each of B, T, C, H, W once", "Use 'BTCHW'"]),
        (lambda: VideoLayout("TBCHW"), ValueError, ["'TBCHW'", "begin with B"]),
        (lambda: VideoLayout(5), TypeError, ["5", "int", "'BTCHW'"]),  # type: ignore[arg-type]
        (lambda: VideoLayout("BTCHW").size([1]), TypeError, ["inputs", "BTCHW", "list"]),  # type: ignore[arg-type]
        (
            lambda: VideoLayout("BCTHW").to_working(torch.zeros(3, 8, 4, 4)),
            ValueError,
            ["(B, C, T, H, W)", "(3, 8, 4, 4)", "inputs.unsqueeze(0)"],
        ),
        (lambda: VideoLayout("BTCHW").size(torch.zeros(1, 0, 3, 4, 4)), ValueError, ["non-empty", "(1, 0, 3, 4, 4)"]),
        (
            lambda: VideoLayout("BCTHW").expand(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 4, 4)),
            ValueError,
            ["(1, 8, 4, 4)", "(1, 3, 8, 4, 4)", "BCTHW", "(1, 3, 4, 4)"],
        ),
        (
            lambda: VideoAttribution.from_attributions(torch.zeros(8, 4, 4), "BTCHW"),
            ValueError,
            ["attributions", "(8, 4, 4)", "(B, T, C, H, W)"],
        ),
    ],
)
def test_errors_report_expected_and_received(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_swapped_axes_are_rejected():
    frames_first = torch.zeros(1, 16, 3, 8, 8)
    with pytest.raises(
        ValueError, match=r"\(1, 16, 3, 8, 8\) has 16 channels and 3 frames.*layout='BTCHW'.*inputs.transpose\(1, 2\)"
    ):
        VideoLayout("BCTHW").check(frames_first)
    VideoLayout("BTCHW").check(frames_first)
    VideoLayout("BCTHW", channels=16).check(frames_first)  # for example three frames of stacked optical flow
    with pytest.raises(ValueError, match=r"must have 3 channels.*\(1, 16, 3, 8, 8\)"):
        VideoLayout("BCTHW", channels=3).check(frames_first)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_values_are_counted_and_rejected(value):
    clip = torch.zeros(1, 3, 4, 5, 6)
    clip[0, 0, :2] = value
    with pytest.raises(
        ValueError, match=r"inputs must be finite, got 60 nan or infinite values out of 360 \(shape \(1, 3, 4, 5, 6\)\)"
    ):
        VideoLayout("BCTHW").check_values(clip)
    with pytest.raises(TypeError, match="int64"):
        VideoLayout("BCTHW").check_values(torch.zeros(1, 3, 4, 5, 6).long())


def test_a_layout_that_is_not_that_of_the_model_raises():
    model = SimpleNamespace(layout=VideoLayout("BCTHW"))
    assert layout_of(model, None) is layout_of(model, model.layout) is model.layout
    with pytest.raises(ValueError, match="layout must be 'BCTHW', the layout of the SimpleNamespace, got 'BTCHW'"):
        layout_of(model, "BTCHW")


@in_one_case()
@pytest.mark.parametrize(
    ("inputs", "advice"),
    [
        ((torch.rand(1, 3, 4, 8, 8),) * 2, "got tuple.*pack=function"),
        (np.zeros((1, 3, 4, 8, 8)), r"classifier.preprocess\(frames\), and .* torch.from_numpy"),
        ("clip.mp4", r"io.read_video\(path"),
    ],
)
def test_several_tensors_or_an_array_in_place_of_a_clip_get_advice(inputs: Any, advice: str) -> None:
    with pytest.raises(TypeError, match=f"inputs must be a tensor in layout BCTHW.*{advice}"):
        VideoLayout("BCTHW").check(inputs)


def test_frames_in_place_of_a_clip_are_to_be_preprocessed() -> None:
    with pytest.raises(ValueError, match=r"got shape \(4, 8, 8, 3\). Convert frames .* with classifier.preprocess"):
        VideoLayout("BCTHW").check(torch.zeros(4, 8, 8, 3, dtype=torch.uint8))
