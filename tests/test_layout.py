"""Layouts carry clips there and back, and split attributions into where and when."""

from __future__ import annotations

import itertools

import pytest
import torch

from captum_staa import VideoAttribution, VideoLayout

SIZES = {"B": 2, "T": 3, "C": 4, "H": 5, "W": 6}
WORDS = ["B" + "".join(rest) for rest in itertools.permutations("TCHW")]


def numbered() -> torch.Tensor:
    """A (B, T, C, H, W) clip in which no two values are equal."""
    shape = [SIZES[axis] for axis in "BTCHW"]
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


@pytest.mark.parametrize("word", WORDS)
def test_there_and_back(word):
    layout, clip = VideoLayout(word), numbered()
    mine = torch.einsum(f"BTCHW->{word}", clip)
    assert torch.equal(layout.to_working(mine), clip)
    assert torch.equal(layout.from_working(clip), mine)
    assert layout.size(mine) == SIZES
    assert mine.shape[layout.time] == SIZES["T"]
    assert mine.shape[layout.channel] == SIZES["C"]


@pytest.mark.parametrize("word", WORDS)
def test_space_time_sums(word):
    clip = numbered()
    parts = VideoAttribution.from_attributions(torch.einsum(f"BTCHW->{word}", clip), word.lower())
    torch.testing.assert_close(parts.joint, torch.einsum("btchw->bthw", clip))
    torch.testing.assert_close(parts.spatial, torch.einsum("btchw->bhw", clip))
    torch.testing.assert_close(parts.temporal, torch.einsum("btchw->bt", clip))
    assert parts.logits is None


@pytest.mark.parametrize("word", ["BTCHW", "BCTHW", "BWHTC"])
def test_expand_is_the_inverse_of_reduce(word):
    layout = VideoLayout(word)
    maps = torch.rand(SIZES["B"], SIZES["T"], SIZES["H"], SIZES["W"])
    clip = torch.einsum(f"BTCHW->{word}", numbered())
    spread = layout.expand(maps, clip)
    assert spread.shape == clip.shape and spread.is_contiguous()
    torch.testing.assert_close(layout.reduce(spread), maps)
    evenly = spread.movedim(layout.channel, 0)
    assert torch.equal(evenly, evenly[:1].expand_as(evenly))
    assert layout.expand(maps, clip.double()).dtype == torch.float64


def test_half_precision_is_summed_in_float32():
    ones = torch.ones(1, 4, 3, 32, 32, dtype=torch.bfloat16)
    parts = VideoAttribution.from_attributions(ones, "BTCHW")
    assert parts.temporal.tolist() == [[3072.0] * 4]  # bfloat16 has no 3072 + 1
    assert VideoAttribution.from_attributions(ones.double(), "BTCHW").joint.dtype == torch.float64


def test_no_part_keeps_a_graph():
    leaf = torch.rand(1, 2, 3, 4, 5, requires_grad=True)
    assert not VideoAttribution.from_attributions(leaf * 2, "BTCHW").joint.requires_grad


def test_marginals_of_a_joint_map():
    joint = torch.rand(2, 3, 4, 5)
    parts = VideoAttribution.from_joint(joint, torch.ones(2, 7))
    assert parts.logits is not None and parts.logits.shape == (2, 7)
    torch.testing.assert_close(parts.spatial.sum((1, 2)), joint.sum((1, 2, 3)))
    torch.testing.assert_close(parts.temporal.sum(1), joint.sum((1, 2, 3)))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: VideoLayout("BTHW"), ValueError, ["'BTHW'", "each of B, T, C, H, W once", "use 'BTCHW'"]),
        (lambda: VideoLayout("TBCHW"), ValueError, ["'TBCHW'", "begins with B"]),
        (lambda: VideoLayout(5), TypeError, ["5", "int", "'BTCHW'"]),  # type: ignore[arg-type]
        (lambda: VideoLayout("BTCHW").size([1]), TypeError, ["inputs", "BTCHW", "list"]),  # type: ignore[arg-type]
        (
            lambda: VideoLayout("BCTHW").to_working(torch.zeros(3, 8, 4, 4)),
            ValueError,
            ["BCTHW", "(3, 8, 4, 4)", "clip[None]"],
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
            ["attributions", "(8, 4, 4)", "BTCHW"],
        ),
    ],
)
def test_errors_say_what_came_and_what_was_meant(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_axes_named_in_the_wrong_order_are_refused():
    frames_first = torch.zeros(1, 16, 3, 8, 8)
    with pytest.raises(ValueError, match=r"\(1, 16, 3, 8, 8\) would have 16 channels, 3 frames.*layout='BTCHW'"):
        VideoLayout("BCTHW").check(frames_first)
    VideoLayout("BTCHW").check(frames_first)
    VideoLayout("BCTHW", channels=16).check(frames_first)  # three frames of stacked flow
    with pytest.raises(ValueError, match=r"must have 3 channels.*\(1, 16, 3, 8, 8\)"):
        VideoLayout("BCTHW", channels=3).check(frames_first)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_counted_and_refused(value):
    clip = torch.zeros(1, 3, 4, 5, 6)
    clip[0, 0, :2] = value
    with pytest.raises(ValueError, match=r"60 of the 360 values of inputs \(shape \(1, 3, 4, 5, 6\)\)"):
        VideoLayout("BCTHW").check_values(clip)
    with pytest.raises(TypeError, match="int64"):
        VideoLayout("BCTHW").check_values(torch.zeros(1, 3, 4, 5, 6).long())
