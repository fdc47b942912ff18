"""Video files: selected frames and their order, errors for files that are not videos, and atomic writing."""

from __future__ import annotations

import itertools
import os
import re
import sys
from fractions import Fraction

import numpy as np
import pytest
from covering import in_one_case, over_values

from captum_staa import io
from captum_staa.io import decoding, reading

av = pytest.importorskip("av")

FORMATS = [".mp4", ".mkv", ".avi", ".webm"]


def numbered(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Return frames whose gray level encodes their number, 4 levels apart, so that lossy coding keeps them distinct."""
    levels = (np.arange(count) * 4 + 16).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def numbers(frames: np.ndarray) -> list[int]:
    return np.rint((frames.mean((1, 2, 3)) - 16) / 4).astype(int).tolist()


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    """Files with 40 numbered frames, one per format."""
    folder = tmp_path_factory.mktemp("forty")
    return {suffix: io.write_video(folder / f"clip{suffix}", numbered(40), fps=25) for suffix in FORMATS}


@in_one_case("arguments")
@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, range(40)),
        ({"num_frames": 8}, [2, 7, 12, 17, 22, 27, 32, 37]),
        ({"num_frames": 3}, [6, 20, 33]),
        ({"num_frames": 40}, range(40)),
        ({"num_frames": 4, "start": 20}, [22, 27, 32, 37]),
        ({"num_frames": 6, "sampling": "dense"}, range(17, 23)),
        ({"num_frames": 6, "sampling": "dense", "start": 34}, range(34, 40)),
        ({"sampling": "stride", "stride": 12}, [0, 12, 24, 36]),
        ({"sampling": "stride", "stride": 3, "num_frames": 4, "start": 30}, [30, 33, 36, 39]),
    ],
)
def test_read_video_returns_the_selected_frames_in_order(forty, suffix, arguments, expected):
    frames, fps, indices = io.read_video(forty[suffix], **arguments)
    assert indices.tolist() == list(expected) == numbers(frames)
    assert frames.shape == (len(indices), 48, 64, 3)
    assert frames.dtype == np.uint8
    assert fps == pytest.approx(25, abs=0.01)


@in_one_case()
@pytest.mark.parametrize("suffix", FORMATS)
def test_probe_returns_length_rate_and_size(forty, suffix):
    assert io.probe(forty[suffix]) == (40, pytest.approx(25, abs=0.01), 48, 64)


@pytest.mark.parametrize("suffix", FORMATS)
def test_colors_and_odd_sizes_are_preserved(tmp_path, suffix):
    frames = np.full((3, 33, 47, 3), (255, 0, 0), dtype=np.uint8)
    frames[:, :, 24:] = (20, 120, 90)
    read = io.read_video(io.write_video(tmp_path / f"odd{suffix}", frames, fps=10)).frames
    assert read.shape == (3, 34, 48, 3)
    np.testing.assert_allclose(read[:, 16, 5], np.full((3, 3), (255, 0, 0)), atol=6)
    np.testing.assert_allclose(read[:, 33, 47], np.full((3, 3), (20, 120, 90)), atol=6)  # the repeated corner


def test_only_selected_frames_are_converted_to_rgb(forty, monkeypatch):
    converted = []
    to_rgb = decoding.Decoded.to_rgb
    monkeypatch.setattr(decoding.Decoded, "to_rgb", lambda frame, size: converted.append(1) or to_rgb(frame, size))
    io.read_video(forty[".mp4"], num_frames=5)
    assert len(converted) == 5


@in_one_case()
@pytest.mark.parametrize(
    ("arguments", "starts"),
    [
        ({"num_frames": 16}, [0, 16, 24]),
        ({"num_frames": 10}, [0, 10, 20, 30]),
        ({"num_frames": 40}, [0]),
        ({"num_frames": 16, "stride": 7}, [0, 7, 14, 21, 24]),
        ({"num_frames": 4, "stride": 30}, [0, 30, 36]),
        ({"num_frames": 5, "frame_stride": 4, "stride": 20}, [0, 20, 23]),
    ],
)
def test_windows_cover_the_whole_video(forty, arguments, starts):
    windows = list(io.iter_windows(forty[".mkv"], **arguments))
    step, count = arguments.get("frame_stride", 1), arguments["num_frames"]
    assert [start for start, _ in windows] == starts
    for start, frames in windows:
        assert numbers(frames) == list(range(start, start + count * step, step))


def test_windows_read_only_the_frames_they_need(forty, monkeypatch):
    """The first window is yielded as soon as its own frames are decoded."""
    frames_read = []
    decode = reading.decode
    monkeypatch.setattr(reading, "decode", lambda path: (frames_read.append(1) or item for item in decode(path)))
    next(io.iter_windows(forty[".mp4"], 8))
    assert len(frames_read) == 8


def test_iter_windows_rejects_videos_shorter_than_a_window(forty):
    with pytest.raises(ValueError, match=r"spans 41 frames.*clip\.mp4 has only 40 frames"):
        list(io.iter_windows(forty[".mp4"], 41))


@in_one_case()
@pytest.mark.parametrize(
    "arguments", [{"num_frames": 41}, {"num_frames": 41, "sampling": "dense"}, {"start": 40}, {"num_frames": 0}]
)
def test_read_video_rejects_videos_with_too_few_frames(forty, arguments):
    with pytest.raises(
        ValueError, match="num_frames must be an integer" if arguments == {"num_frames": 0} else r"clip\.mp4 has 40"
    ):
        io.read_video(forty[".mp4"], **arguments)


@in_one_case()
@pytest.mark.parametrize(
    "arguments",
    [{"sampling": "random"}, {"stride": 2}, {"sampling": "stride", "stride": 0}, {"start": -1}, {"num_frames": 2.5}],
)
def test_invalid_arguments_are_rejected(forty, arguments):
    with pytest.raises((ValueError, TypeError), match=str(next(iter(arguments.values())))):
        io.read_video(forty[".mp4"], **arguments)


def write_sound(path):
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())


@in_one_case()
@over_values
@pytest.mark.parametrize("reader", [io.probe, io.read_video, lambda path: list(io.iter_windows(path, 2))])
@pytest.mark.parametrize(
    ("name", "write", "error", "message"),
    [
        ("missing.mp4", lambda path: None, FileNotFoundError, "does not exist"),
        ("folder.mp4", lambda path: path.mkdir(), ValueError, "got a folder"),
        ("empty.mp4", lambda path: path.touch(), ValueError, r"is empty \(0 bytes\)"),
        ("text.mp4", lambda path: path.write_text("once upon a time\n" * 40), ValueError, "680 bytes but no video"),
        ("sound.mp4", write_sound, ValueError, "audio streams in"),
    ],
)
def test_files_that_are_not_videos_are_rejected(tmp_path, reader, name, write, error, message):
    write(tmp_path / name)
    with pytest.raises(error, match=message) as caught:
        reader(tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.parametrize("kept", [-4, 40])
def test_a_file_truncated_in_its_index_is_rejected(forty, tmp_path, kept):
    whole = forty[".mp4"].read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: whole.index(b"moov") + kept])
    with pytest.raises(ValueError, match=r"cut\.mp4, which contains \d+ bytes but no video|no streams in .*cut\.mp4"):
        io.read_video(cut)


@pytest.mark.parametrize("suffix", FORMATS[:3])
def test_a_truncated_file_is_read_with_a_warning(tmp_path, suffix):
    """Half of the file is missing, but its header is complete. The remaining frames are read."""
    frames = np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3), dtype=np.uint8)
    whole = io.write_video(tmp_path / f"whole{suffix}", frames, fps=25).read_bytes()
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="can be read") as warned:
        everything = io.read_video(cut)
    announced = (
        r"announces 40( \(.*\))?\." if suffix != ".mkv" else r"end at 0\.\d\d s, but its header announces 1\.60 s\."
    )
    assert re.search(rf"frames of .*cut{suffix} can be read.*{announced}", str(warned[-1].message))
    left = len(everything.frames)
    assert 10 < left < 30
    with pytest.warns(UserWarning, match="The file is damaged"):
        some = io.read_video(cut, num_frames=5)
    assert some.indices.tolist() == [(2 * i + 1) * left // 10 for i in range(5)]
    np.testing.assert_array_equal(some.frames, everything.frames[some.indices])
    with (
        pytest.warns(UserWarning, match="The file is damaged"),
        pytest.raises(ValueError, match=rf"num_frames = 38.*need at least 38 frames, but .* has {left}\."),
    ):
        io.read_video(cut, num_frames=38)


def write_stream(path, sizes, rotation=0, level=16):
    """One H.264 stream per size, one after the other in the same file."""
    parts = []
    for height, width in sizes:
        part = path.with_name(f"{height}.ts" if rotation == 0 else path.name)
        with av.open(str(part), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(10))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            if rotation:
                stream.set_display_rotation(rotation)
            for frame in numbered(3, height, width):
                frame[: height // 2] = 250  # the upper half is bright
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        parts.append(part.read_bytes())
    path.write_bytes(b"".join(parts))


def test_frames_of_another_size_are_resized_to_the_first_frame(tmp_path):
    write_stream(tmp_path / "grows.ts", [(48, 64), (96, 128)])
    frames = io.read_video(tmp_path / "grows.ts").frames
    assert frames.shape == (6, 48, 64, 3)
    assert (frames[:, 10] > 230).all()
    assert (frames[:, 40] < 60).all()


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV cannot write a rotation")
@pytest.mark.parametrize(
    ("degrees", "bright"), [(90, np.s_[:, :, :20]), (-90, np.s_[:, :, -20:]), (180, np.s_[:, -20:])]
)
def test_rotated_videos_are_read_upright(tmp_path, degrees, bright):
    """Counter-clockwise by 90 degrees, the upper half becomes the left one."""
    path = tmp_path / "turned.mp4"
    write_stream(path, [(48, 64)], rotation=degrees)
    frames = io.read_video(path).frames
    assert frames.shape[1:3] == ((64, 48) if degrees % 180 else (48, 64)) == io.probe(path)[2:]
    assert (frames[bright] > 230).all()
    assert frames.mean() < 160  # the other half is dark


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_failing_encoder_leaves_no_file(tmp_path, monkeypatch, suffix):
    def fail(*args, **kwargs):
        assert len(os.listdir(tmp_path)) == 1  # the temporary file
        raise RuntimeError("disk full")

    made = itertools.count()
    from_ndarray = av.VideoFrame.from_ndarray
    frame = type("Failing", (), {"from_ndarray": lambda *a, **k: from_ndarray(*a, **k) if next(made) < 79 else fail()})
    monkeypatch.setattr(av, "VideoFrame", frame)
    with pytest.raises(RuntimeError, match="disk full"):
        io.write_video(tmp_path / f"clip{suffix}", numbered(40).repeat(2, 0), fps=10)  # encoders buffer many frames
    assert os.listdir(tmp_path) == []


def test_write_video_does_not_overwrite_by_default(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match=r"clip\.mp4 already exists.*overwrite=True"):
        io.write_video(path, numbered(2), fps=10)
    assert path.read_text() == "precious"
    io.write_video(path, numbered(2), fps=10, overwrite=True)
    assert io.probe(path).num_frames == 2
    assert os.listdir(tmp_path) == ["clip.mp4"]


@in_one_case()
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"frames": numbered(2) / 255}, TypeError, "must be uint8.*float64"),
        ({"frames": numbered(2)[0]}, ValueError, r"\(T, H, W, 3\), got shape \(48, 64, 3\)"),
        ({"frames": numbered(2)[:0]}, ValueError, "non-empty"),
        ({"fps": 0}, ValueError, "fps = 0"),
        ({"fps": float("nan")}, ValueError, "fps = nan"),
        ({"crf": 52}, ValueError, "crf = 52"),
        ({"path": "clip.mov"}, ValueError, "'.mov'"),
        ({"path": "nowhere/clip.mp4"}, FileNotFoundError, "folder of .*nowhere"),
    ],
)
def test_write_video_rejects_invalid_arguments(tmp_path, change, error, message):
    arguments = {"path": "clip.mp4", "frames": numbered(2), "fps": 10, **change}
    arguments["path"] = tmp_path / arguments["path"]
    with pytest.raises(error, match=message) as caught:
        io.write_video(**arguments)
    assert arguments["path"].name in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_higher_crf_makes_smaller_files(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    sizes = [io.write_video(tmp_path / f"{crf}.mp4", frames, 10, crf=crf).stat().st_size for crf in (10, 40)]
    assert sizes[0] > 2 * sizes[1]


def test_without_pyav_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    for call in (lambda: io.read_video("clip.mp4"), lambda: io.write_video(tmp_path / "c.mp4", numbered(1), fps=1)):
        with pytest.raises(ImportError, match=r"pip install captum-staa\[video\]"):
            call()


@in_one_case()
@pytest.mark.parametrize(
    ("name", "count", "fps", "height", "width"),
    [
        ("nasa_13013.mp4", 325, 25, 180, 320),
        ("mmaction2_demo_arm_wrestling.mp4", 280, 28, 256, 340),
        ("flipping_a_pancake.mkv", 310, 30, 240, 426),
        ("v_ApplyEyeMakeup_g01_c01.avi", 164, 25, 240, 320),
    ],
)
def test_real_video_files(shared_videos, name, count, fps, height, width):
    assert io.probe(shared_videos / name) == (count, fps, height, width)
    video = io.read_video(shared_videos / name, num_frames=8)
    assert video.frames.shape == (8, height, width, 3)
    assert video.indices.tolist() == [(2 * i + 1) * count // 16 for i in range(8)]
    # The same frame again, read by its index.
    dense = io.read_video(shared_videos / name, num_frames=1, sampling="dense", start=int(video.indices[5]))
    np.testing.assert_array_equal(dense.frames[0], video.frames[5])
