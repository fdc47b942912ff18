"""Preprocessing by the user's own function: torchvision's transforms, processors, and what cannot be measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from covering import in_one_case
from torch import Tensor, nn

from captum_staa.models import VideoClassifier
from captum_staa.models.preprocessing import Preprocessing
from captum_staa.visualization import Frames

MEAN, STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)


class VideoPreset(nn.Module):
    """What torchvision's preset for video classification computes, which is an nn.Module."""

    def __init__(self, crop: tuple[int, int], resize: list[int], antialias: bool = False) -> None:
        super().__init__()
        self.crop, self.resize, self.antialias = crop, resize, antialias

    def forward(self, frames: Tensor) -> Tensor:
        height, width = frames.shape[-2:]
        size = self.resize
        if len(size) == 1:
            short = min(height, width)
            size = [int(size[0] * height / short), int(size[0] * width / short)]
        frames = F.interpolate(frames.float(), size, mode="bilinear", antialias=self.antialias).round().byte()
        top, left = (round((whole - part) / 2.0) for whole, part in zip(size, self.crop, strict=True))
        frames = frames[..., top : top + self.crop[0], left : left + self.crop[1]].float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return ((frames - mean) / std).transpose(0, 1)  # (C, T, H, W)


def wrapped(function: Any, layout: str = "BCTHW", **options: Any) -> VideoClassifier:
    return VideoClassifier(nn.Sequential(nn.Flatten(), nn.LazyLinear(2)), layout, preprocessing=function, **options)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


PRESETS = [VideoPreset((112, 112), [128, 171]), VideoPreset((224, 224), [256]), VideoPreset((56, 40), [64], True)]


@in_one_case()
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [(240, 426), (320, 180), (90, 120)])
def test_clip_is_what_the_transform_returns_and_the_box_where_it_comes_from(preset, size):
    clf = wrapped(preset, num_frames=4)
    frames = noise(4, *size)
    expected = preset(torch.from_numpy(frames).permute(0, 3, 1, 2))[None]
    assert torch.equal(clf.preprocess(frames), expected)

    resized = preset.resize if len(preset.resize) == 2 else [int(preset.resize[0] * edge / min(size)) for edge in size]
    down, right = size[0] / resized[0], size[1] / resized[1]
    offsets = [round((whole - part) / 2.0) for whole, part in zip(resized, preset.crop, strict=True)]
    box = (offsets[0] * down, offsets[1] * right, preset.crop[0] * down, preset.crop[1] * right)
    assert clf.crop_box(*size) == pytest.approx(box, abs=0.005 * max(size))
    assert not isinstance(clf.preprocessing, nn.Module) and not [
        name for name, _ in clf.named_modules() if "pre" in name
    ]


def test_crop_offset_is_that_of_the_transform_and_not_of_pillow():
    """171 columns, of which 112 are kept: torchvision begins at column 30, a Hugging Face processor at 29."""
    left = wrapped(PRESETS[0]).crop_box(128, 171)[1]
    assert left == pytest.approx(30, abs=0.2)
    assert Preprocessing(resize=(128, 171), crop=(112, 112)).crop_box(128, 171)[1] == 29


def test_frames_of_inputs_undo_a_measured_normalization():
    clf = wrapped(VideoPreset((30, 40), [30, 40]))
    frames = noise(4, 30, 40)
    found = Frames.from_inputs(clf.preprocess(frames), clf).pixels
    assert np.abs(found.astype(int) - frames.astype(int)).max() <= 1
    bgr = wrapped(lambda frames: PRESETS[0](frames).flip(0))
    red = np.zeros((2, 128, 171, 3), np.uint8)
    red[..., 0] = 200
    assert Frames.from_inputs(bgr.preprocess(red), bgr).pixels[0, 50, 50].tolist() == pytest.approx([200, 0, 0], abs=1)


@in_one_case()
@pytest.mark.parametrize("edge", [8, 32])
@pytest.mark.parametrize(
    "returned",
    [
        lambda clip: clip[None],  # with the batch axis
        lambda clip: {"pixel_values": clip[None]},  # of a processor
        lambda clip: {"labels": torch.zeros(1), "pixel_values_videos": clip[None]},
    ],
)
def test_forms_of_the_result(returned, edge):
    clf = wrapped(lambda frames: returned(frames[..., :edge, :edge] / 255), "BTCHW")
    frames = noise(4, 32, 40)
    expected = torch.from_numpy(frames).permute(0, 3, 1, 2)[None, ..., :edge, :edge] / 255
    assert torch.equal(clf.preprocess(frames), expected)
    assert clf.crop_box(32, 40) == pytest.approx((0, 0, edge, edge), abs=0.3)


def test_padding_extends_the_box_beyond_the_frame():
    clf = wrapped(lambda frames: F.pad(frames / 255, (0, 0, 10, 10)), "BTCHW")
    assert clf.crop_box(40, 60) == pytest.approx((-10, 0, 60, 60), abs=0.3)


@in_one_case()
@pytest.mark.parametrize(
    "function",
    [
        lambda frames: frames.flip(-1) / 255,
        lambda frames: torch.rand(4, 3, 20, 20) * frames[..., :20, :20],
        lambda frames: frames.roll(20, -1) / 255,
        lambda frames: frames.float() * 0,
    ],
)
def test_a_region_that_cannot_be_measured_is_an_error(function):
    clf = wrapped(function, "BTCHW", num_frames=4)
    with pytest.raises(ValueError, match=r"preprocessing must resize and crop frames.*Pass the crop by hand: Frames\("):
        clf.crop_box(60, 60)


@in_one_case()
@pytest.mark.parametrize(
    ("function", "error", "says"),
    [
        (lambda frames: frames, TypeError, r"must return a float tensor \(C, T, H, W\).*got torch.uint8"),
        (lambda frames: [1.0], TypeError, "got list.*for a processor of Hugging Face, pass lambda"),
        (lambda frames: frames / 255, ValueError, r"in the layout of the model, BCTHW.*got shape \(8, 3, 20, 20\)"),
        (lambda frames: frames[0] / 255, ValueError, r"got shape \(3, 20, 20\)"),
    ],
)
def test_results_of_another_form_are_errors(function, error, says):
    with pytest.raises(error, match=says):
        wrapped(function).preprocess(noise(8, 20, 20))


def test_what_is_not_a_function_is_refused():
    with pytest.raises(TypeError, match=r"preprocessing must be a Preprocessing or a function of frames.*got 'resize'"):
        wrapped("resize")
