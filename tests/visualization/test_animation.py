"""Animations: decoded frames equal the drawn ones, the duration is exact, and no partial files are left."""

from __future__ import annotations

import os
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont, ImageSequence

from captum_staa import io
from captum_staa.visualization import Frames, Style, animation, overlay, save_animation

T, H, W = 8, 24, 32
GRAY = Frames(np.full((T, H, W, 3), 128, dtype=np.uint8), layout="BTCHW")


def block() -> torch.Tensor:
    """(1, T, 3, H, W): evidence in rows 4..7, columns 20..27; 1 per pixel in frame 2, half of that in frame 5."""
    attributions = torch.zeros(1, T, 3, H, W)
    attributions[:, 2, :, 4:8, 20:28] = 1 / 3
    attributions[:, 5, :, 4:8, 20:28] = 1 / 6
    return attributions


def decoded(path) -> np.ndarray:
    if path.suffix in (".webp", ".gif"):
        with Image.open(path) as picture:
            frames = []
            for frame in range(picture.n_frames):
                picture.seek(frame)
                frames.append(np.asarray(picture.convert("RGB")))
            return np.stack(frames)
    return io.read_video(path).frames


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv", ".avi", ".webp", ".gif"])
def test_decoded_animation_equals_overlay(tmp_path, suffix):
    if suffix not in (".webp", ".gif"):
        pytest.importorskip("av")
    levels = np.linspace(60, 120, T).astype(np.uint8)
    pixels = np.broadcast_to(levels[:, None, None, None], (T, H, W, 3))  # no two frames are equal
    clip, style = Frames(pixels, layout="BTCHW"), Style(outlier_perc=0)
    path = save_animation(block(), clip, tmp_path / f"clip{suffix}", style=style, min_size=96)
    frames = decoded(path)
    assert frames.shape == (T, 4 * H, 2 * 4 * W + 8, 3)
    left, right = frames[:, :, : 4 * W], frames[:, :, -4 * W :]
    np.testing.assert_allclose(left.mean((1, 2, 3)), levels, atol=4)  # in order
    bright = right[..., 0].astype(int) > levels[:, None, None] + 40
    assert bright.any((1, 2)).tolist() == [i in (2, 5) for i in range(T)]
    expected = overlay(block(), clip, style=style).pictures[[2, 5], 5, 23]
    np.testing.assert_allclose(right[[2, 5], 20:26, 92:98].mean((1, 2)), expected, atol=12)
    rows, columns = np.nonzero(bright[2])
    assert abs(rows.mean() - 4 * 5.5) < 2.5
    assert abs(columns.mean() - 4 * 23.5) < 2.5
    assert os.listdir(tmp_path) == [path.name]


def test_duration_equals_frames_over_fps(tmp_path):
    clip = np.random.default_rng(0).integers(0, 255, (30, H, W, 3), dtype=np.uint8)
    for suffix in (".gif", ".webp"):
        path = save_animation(np.ones((30, H, W)), clip, tmp_path / f"clip{suffix}", play_fps=30, min_size=0)
        with Image.open(path) as picture:
            total = 0
            for frame in range(picture.n_frames):
                picture.seek(frame)
                picture.load()
                total += picture.info["duration"]
        assert picture.n_frames == 30
        assert total == pytest.approx(1000, abs=1)


def test_times_of_frames_are_rounded_to_the_nearest_unit(tmp_path):
    clip = np.random.default_rng(0).integers(0, 255, (3, H, W, 3), dtype=np.uint8)
    path = save_animation(np.ones((3, H, W)), clip, tmp_path / "clip.webp", play_fps=24, min_size=0)
    durations = []
    with Image.open(path) as picture:
        for frame in range(picture.n_frames):
            picture.seek(frame)
            picture.load()
            durations.append(picture.info["duration"])
    assert durations == [42, 41, 42]  # the frames end at 41.7, 83.3 and 125 ms


@pytest.mark.parametrize(
    ("size", "min_size", "expected"),
    [
        ((24, 32), 256, (264, 352)),
        ((128, 160), 256, (256, 320)),
        ((300, 400), 256, (300, 400)),
        ((24, 32), 0, (24, 32)),
    ],
)
def test_small_clips_are_enlarged(tmp_path, size, min_size, expected):
    clip = np.zeros((2, *size, 3), dtype=np.uint8)
    path = save_animation(np.ones((2, 3, 4)), clip, tmp_path / "clip.gif", min_size=min_size, side_by_side=False)
    with Image.open(path) as picture:
        assert picture.size == expected[::-1]


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".mp4"])
def test_frames_are_drawn_one_at_a_time(tmp_path, suffix):
    """The peak memory of drawing does not grow with the number of frames."""
    if suffix == ".mp4":
        pytest.importorskip("av")

    def peak(total: int) -> int:
        clip = np.zeros((total, 48, 64, 3), dtype=np.uint8)
        clip[:, ::7] = np.arange(total, dtype=np.uint8)[:, None, None, None]  # no two frames are equal
        maps = np.zeros((total, 2, 2), dtype=np.float32)
        tracemalloc.start()
        try:
            save_animation(maps, clip, tmp_path / f"{total}{suffix}", min_size=0)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(2)  # warm-up: imports and caches
    assert peak(200) < 1.3 * peak(40)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_single_frame_is_written_as_a_picture(tmp_path, suffix):
    path = save_animation(np.ones((1, 3, 4)), GRAY[:1], tmp_path / f"one{suffix}", min_size=0, side_by_side=False)
    (frame,) = decoded(path)
    expected = overlay(np.ones((1, 3, 4)), GRAY[:1]).picture(0)
    np.testing.assert_allclose(frame, expected, atol=6)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_failed_write_leaves_no_file(tmp_path, monkeypatch, suffix):
    def fail(self, path, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_animation(block(), GRAY, tmp_path / f"clip{suffix}")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_existing_animation_is_replaced_only_with_overwrite(tmp_path, suffix):
    path = tmp_path / f"clip{suffix}"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match=rf"clip{suffix} already exists"):
        save_animation(block(), GRAY, path)
    assert path.read_text() == "precious"
    save_animation(block(), GRAY, path, overwrite=True)
    assert path.stat().st_size > 500


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("clip.mov", {}, r"path must end in one of .*clip\.mov"),
        ("c.gif", {"play_fps": 0}, "play_fps .* 0"),
        ("c.gif", {"min_size": -1}, "-1"),
    ],
)
def test_invalid_arguments_raise_value_error(tmp_path, name, options, says):
    with pytest.raises(ValueError, match=says):
        save_animation(block(), GRAY, tmp_path / name, **options)
    assert os.listdir(tmp_path) == []


def test_title_time_and_color_bar_are_burnt_in(tmp_path):
    """With a title, the picture is unchanged between a strip above and a strip below, which shows the time."""
    frames = Frames(np.full((2, 60, 300, 3), 128, np.uint8), crop=(0, 30, 60, 240), fps=2)
    maps = np.zeros((2, 6, 24))
    maps[1, 2, 3] = 4
    style = Style(sign="positive", outlier_perc=0)
    options = {"style": style, "min_size": 0, "side_by_side": False, "quality": 100}
    pictures = {}
    for name, title in (("plain", None), ("one", "waving (93 %)"), ("two", "waving (93 %)\ntoy model")):
        path = save_animation(maps, frames, tmp_path / f"{name}.webp", title=title, **options)
        with Image.open(path) as picture:
            pictures[name] = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(picture)]
    plain, one, two = pictures["plain"], pictures["one"], pictures["two"]
    assert plain[0].shape == (60, 300, 3) and one[0].shape[1] == two[0].shape[1] == 300
    line = two[0].shape[0] - one[0].shape[0]  # height of a line of text
    assert line > 10
    top = line + 6
    assert np.abs(one[1][top : top + 60] - plain[1]).max() < 40  # the picture itself, compressed once more
    above, below = one[1][:line], one[1][top + 60 :]
    assert above.min() < 100 and below.min() < 100  # text on white
    assert (
        np.abs(one[0][top + 60 : top + 60 + line] - one[1][top + 60 : top + 60 + line]).max() > 100
    )  # 0.00 and 0.50 s
    colors = style.bar_colors(np.linspace(0, 1, 200))[:, :3] * 255
    assert any(np.abs(row[50:250] - colors).mean() < 40 for row in below)  # the color bar


def test_text_of_a_title_breaks_between_words():
    font = ImageFont.load_default(13)
    lines = animation._lines("a long title of many words\nsecond", 80, font)
    assert " ".join(lines) == "a long title of many words second" and len(lines) > 2
    assert all(font.getlength(line) <= 80 for line in lines) and lines[-1] == "second"
