"""Large frames and long files: memory use does not grow with the length of the file."""

from __future__ import annotations

import gc
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hostile_files import av, noise, write

from captum_staa import io

HEIGHT, WIDTH = 2160, 3840
FRAME = HEIGHT * WIDTH * 3  # bytes, as RGB


def in_4k(path: Path, count: int, rate: int = 30) -> Path:
    """Write a 4K video of a bright bar that moves through ten places. The packets of ten frames are repeated."""
    packets = []
    once = path.with_name("once.mp4")
    with av.open(str(once), "w") as file:
        stream = file.add_stream("libx264", rate=Fraction(rate), options={"preset": "ultrafast", "bf": "0", "g": "10"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for at in range(10):
            picture = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
            picture[:, at * 384 : (at + 1) * 384] = 230
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    with av.open(str(once)) as source, av.open(str(path), "w") as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        packets = [bytes(packet) for packet in source.demux(source.streams.video[0]) if packet.size]
        for at in range(count):
            packet = av.Packet(packets[at % 10])
            packet.stream, packet.time_base, packet.duration = stream, Fraction(1, rate), 1
            packet.pts = packet.dts = at
            packet.is_keyframe = at % 10 == 0
            file.mux(packet)
    once.unlink()
    return path


def places(frames: np.ndarray) -> list[int]:
    """Return the position of the bar in each frame."""
    return (frames[:, HEIGHT // 2, 192::384, 0] > 128).argmax(1).tolist()


def test_read_video_keeps_one_copy_of_each_frame(tmp_path):
    """Memory is used for the selected frames, and for one frame and its copy."""
    path = in_4k(tmp_path / "large.mp4", 14)
    tracemalloc.start()
    try:
        video = io.read_video(path, num_frames=7)
        peak = tracemalloc.get_traced_memory()[1]
        assert places(video.frames) == [at % 10 for at in video.indices] == [1, 3, 5, 7, 9, 1, 3]
        del video
        tracemalloc.reset_peak()
        windows = [(start, places(frames)) for start, frames in io.iter_windows(path, 2, stride=6)]
        window_peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert windows == [(0, [0, 1]), (6, [6, 7]), (12, [2, 3])]
    assert 7 * FRAME < peak < 10 * FRAME
    assert window_peak < 7 * FRAME


def test_decoded_frames_are_freed(tmp_path):
    """Only a few of 60 frames are in memory at once, also without garbage collection."""
    path, most = write(tmp_path / "long.mp4", noise(60)), 0
    gc.collect()
    gc.disable()
    try:
        for _ in io.iter_windows(path, 2):
            most = max(most, sum(isinstance(item, av.VideoFrame) for item in gc.get_objects()))
    finally:
        gc.enable()
    assert most < 20


MEASURE = """
import resource, sys
from captum_staa import io
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
if sys.argv[2] == "read":
    video = io.read_video(sys.argv[1], num_frames=16)
    indices, count = video.indices.tolist(), len(video.frames)
else:
    indices = [start for start, frames in io.iter_windows(sys.argv[1], 4)]
print(before, peak(), indices)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "frames"), [("read", 16), ("windows", 4 + 4)])
def test_memory_of_one_minute_in_4k(tmp_path, how, frames):
    """1800 frames have 45 GB of pixels. FFmpeg also keeps frames that it decodes ahead."""
    path = in_4k(tmp_path / "minute.mp4", 1800)
    command = [sys.executable, "-c", MEASURE, str(path), how]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, check=True, cwd=Path(__file__).parents[2]
    )
    before, peak, indices = done.stdout.split(" ", 2)
    expected = [(2 * i + 1) * 1800 // 32 for i in range(16)] if how == "read" else list(range(0, 1800, 4))
    assert indices.strip() == str(expected)
    extra = float(peak) - float(before)
    assert extra < frames * FRAME / 2**20 + 700, f"{extra:.0f} MiB more than before"
