"""Damaged video files: the readable part is returned with a warning, or an error names the file."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hostile_files import av, corrupted, noise, quartered, write

from captum_staa import io
from captum_staa.io import decoding

COUNT = 12
QUICK = {"crf": "10", "b": "0", "deadline": "realtime", "cpu-used": "8"}
# file, encoder, pixel format, options, whether the header announces the number of frames
FORMATS: dict[str, tuple[str, str, str, dict[str, str] | None, bool]] = {
    "mp4": ("a.mp4", "libx264", "yuv420p", None, True),
    "mkv": ("a.mkv", "libx264", "yuv420p", None, True),
    "avi": ("a.avi", "libx264", "yuv420p", {"bf": "0"}, True),
    "webm": ("a.webm", "libvpx-vp9", "yuv420p", QUICK, True),
    "ts": ("a.ts", "libx264", "yuv420p", None, False),
    "jpeg": ("a.avi", "mjpeg", "yuvj420p", None, True),
    "gif": ("a.gif", "gif", "rgb8", None, False),
    "png": ("a.apng", "apng", "rgba", None, False),
    "prores": ("a.mov", "prores_ks", "yuv422p10le", None, True),
    "qtrle": ("a.mov", "qtrle", "rgb24", None, True),
    "ffv1": ("a.mkv", "ffv1", "yuv444p", None, True),
    "nut": ("a.nut", "mjpeg", "yuvj420p", None, False),
}


@pytest.fixture(scope="module", params=FORMATS)
def made(request: Any, tmp_path_factory: Any) -> tuple[Path, np.ndarray, bool]:
    """An intact file, its frames, and whether its header announces their number."""
    name, codec, pix_fmt, options, announces = FORMATS[request.param]
    path = write(tmp_path_factory.mktemp("whole") / name, noise(COUNT), codec, pix_fmt, options=options)
    return path, io.read_video(path).frames, announces


def outcome(path: Path, **options: Any) -> tuple[io.Video | None, list[str]]:
    """Return the video, or None after a documented error, and the warnings, which must all be from this library."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            video = io.read_video(path, **options)
        except (ValueError, OSError) as error:
            assert path.name in str(error)  # noqa: PT017
            video = None
    messages = [str(warning.message) for warning in caught]
    assert all(text.startswith("only ") and path.name in text for text in messages), messages
    return video, messages


def check_shape(video: io.Video) -> None:
    frames, _, indices = video
    assert frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[3] == 3 and frames.size
    assert indices.shape == (len(frames),) and (np.diff(indices) > 0).all()


def test_truncated_files(made, tmp_path):
    """Frames before the cut are correct. The last frame may be incomplete."""
    whole, frames, announces = made
    content = whole.read_bytes()
    left = []
    for tenths in range(10):
        cut = tmp_path / f"cut{whole.suffix}"
        cut.write_bytes(content[: len(content) * tenths // 10])
        video, messages = outcome(cut)
        left.append(0 if video is None else len(video.frames))
        if video is None:
            continue
        check_shape(video)
        np.testing.assert_array_equal(video.frames[:-1], frames[: left[-1] - 1])
        if announces and left[-1] < COUNT - 2:
            assert messages, f"{left[-1]} of {COUNT} frames without a warning"
    assert left == sorted(left) and left[0] == 0
    assert left[-1] > COUNT // 2 or whole.suffix == ".mov"  # which has its index at the end


def test_random_changes_of_bytes(made, tmp_path):
    content = made[0].read_bytes()
    path = tmp_path / f"hit{made[0].suffix}"
    for seed in range(6):
        path.write_bytes(corrupted(content, seed))
        for options in ({}, {"num_frames": 4}):
            video, _ = outcome(path, **options)
            if video is not None:
                check_shape(video)
                assert len(video.frames) == options.get("num_frames", len(video.frames))


@pytest.mark.parametrize("num_frames", [None, 4])
def test_partially_decoded_frames_cause_a_warning(tmp_path, num_frames):
    path = write(tmp_path / "hole.mp4", quartered(COUNT))
    content = bytearray(path.read_bytes())
    at = content.index(b"mdat") + 4
    while content[at + 4] & 31 != 5:  # skip the encoder's metadata before the first frame, on which all others depend
        at += 4 + int.from_bytes(content[at : at + 4], "big")
    middle = at + 4 + int.from_bytes(content[at : at + 4], "big") // 2
    content[middle : middle + 60] = bytes(60)
    path.write_bytes(content)
    video, messages = outcome(path, num_frames=num_frames)
    assert video is None or len(video.frames) == (num_frames or COUNT)
    assert any("only a part of frame 0" in text and "The file is damaged" in text for text in messages)


@pytest.mark.skipif(int(av.__version__.split(".")[0]) < 17, reason="older FFmpeg versions use BT.601")
def test_a_frame_with_an_unknown_color_space_is_rejected(tmp_path):
    """One wrong byte in the header of a frame."""
    path = write(tmp_path / "colors.mov", quartered(3), "prores_ks", "yuv422p10le")
    content = bytearray(path.read_bytes())
    content[content.index(b"icpf", content.index(b"icpf") + 4) + 20] = 226  # the second frame's matrix
    path.write_bytes(content)
    for reader in (io.read_video, lambda path: list(io.iter_windows(path, 3))):
        with pytest.raises(ValueError, match=r"frame 1 of .*colors\.mov cannot be converted to RGB"):
            reader(path)
    assert len(io.read_video(path, 1, "dense", start=0).frames) == 1


def test_frames_before_an_unsupported_packet_are_used(made, tmp_path, monkeypatch):
    """FFmpeg raises an error between two frames. The frames before it are used."""
    real = decoding.opened

    @contextmanager
    def breaking(path: Path) -> Iterator[Any]:
        with real(path) as (container, stream):

            def demux(_: Any) -> Iterator[Any]:
                for at, packet in enumerate(container.demux(stream)):
                    if at == 3:
                        raise av.error.PatchWelcomeError(1, "not yet implemented")
                    yield packet

            yield SimpleNamespace(demux=demux), stream

    monkeypatch.setattr(decoding, "opened", breaking)
    with pytest.warns(UserWarning, match=r"only 3 frames of .* read.*\(not yet implemented\)\. The file is damaged"):
        assert len(io.frame_times(made[0])) == 3


FUZZ = """
import sys, warnings
sys.path.insert(0, {tests!r})
from pathlib import Path
from hostile_files import corrupted
from captum_staa import io
import av
av.logging.set_level(None)
whole, path = Path(sys.argv[1]), Path(sys.argv[2])
content, read = whole.read_bytes(), 0
for seed in range(1000, 1000 + int(sys.argv[3])):
    path.write_bytes(corrupted(content, seed))
    for reader in (io.probe, io.read_video, io.frame_times, lambda path: list(io.iter_windows(path, 3))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                reader(path)
                read += 1
            except (ValueError, OSError) as error:
                assert path.name in str(error), (seed, error)
print(read)
"""


@pytest.mark.slow
def test_random_changes_of_bytes_in_another_process(made, tmp_path):
    """A decoder that corrupts memory can then crash only this process."""
    code = FUZZ.format(tests=str(Path(__file__).parents[1] / "_helpers"))
    command = [sys.executable, "-c", code, str(made[0]), str(tmp_path / f"hit{made[0].suffix}"), "300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 30


def test_the_length_in_a_tag_of_matroska_is_read_in_hours_minutes_and_seconds():
    stream = SimpleNamespace(metadata={"DURATION": "01:02:03.500000000"}, frames=0)
    assert decoding.claimed(stream).seconds == 3723.5
