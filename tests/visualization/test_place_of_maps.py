"""Maps are drawn where the model saw the frames: wide and tall videos, with and without the classifier."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from captum_staa import io
from captum_staa.models import VideoClassifier, VideoLanguageModel
from captum_staa.models.preprocessing import Preprocessing
from captum_staa.result import VideoAttribution
from captum_staa.visualization import (
    Frames,
    Style,
    compare_methods,
    overlay,
    save_animation,
    show_frames,
    show_slices,
    show_summary,
    show_timeline,
    to_html,
)

T, SIDE = 4, 48
NET = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 2))
CLASSIFIER = VideoClassifier(
    NET,
    layout="BCTHW",
    num_frames=T,
    image_size=(SIDE, SIDE),
    preprocessing=Preprocessing(resize=56, crop=(SIDE, SIDE)),
)
HEAT = Style(method="heat_map", cmap="gray", outlier_perc=0, show_colorbar=False)
PICTURES = {
    "frames": lambda maps, frames: show_frames(maps, frames, use_pyplot=False),
    "methods": lambda maps, frames: compare_methods({"a": maps}, frames, use_pyplot=False),
    "summary": lambda maps, frames: show_summary(maps, frames, use_pyplot=False),
    "slices": lambda maps, frames: show_slices(maps, frames, use_pyplot=False),
    "player": lambda maps, frames: to_html({"a": maps}, frames),
    "animation": lambda maps, frames: save_animation(maps, frames, Path("a.webp")),
}


def wide(height: int, width: int) -> np.ndarray:
    """Return dark frames with a bright square of an eighth of the shorter side, right above the center."""
    frames = np.full((T, height, width, 3), 20, np.uint8)
    side = min(height, width) // 8
    frames[:, height // 2 - 2 * side : height // 2 - side, width // 2 + side : width // 2 + 2 * side] = 250
    return frames


def center(picture: np.ndarray) -> tuple[float, float]:
    """Return the center of the bright pixels of a picture (H, W)."""
    rows, columns = np.nonzero(picture > picture.max() / 2)
    return rows.mean(), columns.mean()


def test_map_lies_on_its_object_with_a_video_language_model():
    """The same preprocessing crops the frames in the same way."""
    vlm = VideoLanguageModel.from_pretrained("tiny-qwen2_5_vl", preprocessing=CLASSIFIER.preprocessing)
    frames = wide(96, 170)
    seen = vlm.preprocess(frames).mean(2)
    own = Frames.from_video(frames, vlm)
    drawn = overlay(seen - seen.min(), own, style=HEAT).picture(0)
    same = overlay(seen - seen.min(), Frames.from_video(frames, CLASSIFIER), style=HEAT).picture(0)
    assert np.array_equal(drawn, same) and own.layout.axes == "BTCHW"
    vlm.preprocessing = None
    assert Frames.from_video(frames, vlm).crop is None


@pytest.mark.parametrize("size", [(96, 170), (170, 96), (120, 160), (60, 60)])
def test_map_lies_on_its_object_with_the_classifier(size):
    frames = wide(*size)
    seen = CLASSIFIER.preprocess(frames).mean(1)  # (1, T, 48, 48): a map that is bright where the model sees the square
    drawn = overlay(seen - seen.min(), Frames.from_video(frames, CLASSIFIER), style=HEAT).picture(0)
    box = CLASSIFIER.crop_box(*size)
    inside = np.zeros(size, bool)  # outside of the crop, the picture is pale
    inside[round(box[0]) : round(box[0] + box[2]), round(box[1]) : round(box[1] + box[3])] = True
    assert center(np.where(inside, drawn[..., 0], 0)) == pytest.approx(center(frames[0, ..., 0]), abs=size[0] / 60)


@pytest.mark.parametrize("picture", PICTURES)
def test_maps_of_another_aspect_ratio_need_the_classifier(picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frames, maps = wide(96, 170), torch.rand(1, T, SIDE, SIDE)
    fix = r"got attributions of 48 x 48 and frames of 96 x 170: .* Pass Frames\.from_video\(video, classifier\)"
    with pytest.raises(ValueError, match=fix):
        PICTURES[picture](maps, frames)
    assert not list(tmp_path.iterdir())
    PICTURES[picture](maps, Frames.from_video(frames, CLASSIFIER))


@pytest.mark.parametrize(
    ("cells", "size", "fits"),
    [
        ((48, 64), (96, 128), True),
        ((7, 12), (112, 200), True),  # 200 / 16, rounded down or up
        ((7, 13), (112, 200), True),
        ((2, 3), (48, 80), True),
        ((1, 1), (96, 170), True),  # one number per frame has no place
        ((48, 64), (96, 132), False),
        ((3, 3), (240, 426), False),
        ((64, 48), (96, 128), False),
    ],
)
def test_a_coarse_grid_may_miss_half_a_cell(cells, size, fits):
    maps, frames = torch.rand(1, T, *cells), np.zeros((T, *size, 3), np.uint8)
    if fits:
        overlay(maps, frames)
    else:
        with pytest.raises(ValueError, match="must have the aspect ratio"):
            overlay(maps, frames)


def test_stated_crop_of_the_whole_frame_stretches_the_map():
    maps = torch.zeros(1, T, 8, 8)
    maps[:, :, 0, 7] = 1
    drawn = overlay(maps, Frames(wide(96, 170), crop=(0, 0, 96, 170)), style=HEAT).picture(0)
    assert drawn[4, 164, 0] == 255 and drawn[4, 90, 0] == 0 and drawn[60, 164, 0] == 0


@pytest.mark.parametrize("picture", PICTURES)
def test_pictures_take_what_read_video_returns(picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels, maps = wide(48, 80), torch.rand(1, T, 24, 40)
    video = io.Video(pixels, 25.0, np.array([0, 5, 10, 15]))
    PICTURES[picture](maps, video)
    if picture == "frames":
        _, axes = show_frames(maps, video, use_pyplot=False)
        assert [text.get_text() for text in axes.texts] == ["0.00 s", "0.20 s", "0.40 s", "0.60 s"]


def test_timeline_takes_the_temporal_part():
    parts = VideoAttribution.from_attributions(torch.rand(1, T, 3, 8, 8), "BTCHW")
    curves = [
        show_timeline(values, use_pyplot=False)[1].lines[0].get_ydata().tolist()
        for values in (parts.temporal, parts.temporal[0], parts)
    ]
    assert curves[0] == curves[1] == pytest.approx(curves[2])
    two = torch.cat([parts.temporal, 2 * parts.temporal])
    _, axes = show_timeline(two, Frames(wide(8, 8), index=1), use_pyplot=False)
    assert axes.lines[0].get_ydata().tolist() == pytest.approx((2 * parts.temporal[0]).tolist())
    with pytest.raises(ValueError, match="index must be given for a batch of several clips"):
        show_timeline(two, use_pyplot=False)


def test_real_wide_clip_is_drawn_in_its_crop(shared_videos):
    pytest.importorskip("av")
    classifier = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    video = io.read_video(shared_videos / "flipping_a_pancake.mkv", 16)  # 426 x 240
    clip = classifier.preprocess(video.frames)
    maps = clip[:, :, 0] - clip.min()  # bright where the video is red and bright
    with pytest.raises(ValueError, match="frames of 240 x 426"):
        to_html(maps, video)
    frames = Frames.from_video(video, classifier)
    drawn = overlay(maps, frames, style=HEAT).picture(8)[..., 0].astype(float)
    top, left, height, width = map(round, frames.crop)
    seen = np.s_[top : top + height, left + 2 : left + width - 2]
    assert np.corrcoef(drawn[seen].ravel(), video.frames[8, ..., 0][seen].ravel())[0, 1] > 0.9
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', to_html(maps, frames), re.S)[1])
    assert data["crop"] == pytest.approx([0, 18 * 426 / 85, 240, 48 * 426 / 85]) and (
        data["height"],
        data["width"],
    ) == (240, 426)
