"""Frames of a file or a camera as they come, with their rate."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from captum_staa import io
from captum_staa.io.decoding import import_av

USUAL_RATE = 25.0  # frames per second, where neither file nor camera says


@dataclass(frozen=True)
class Feed:
    """Where frames come from, and what is known of them beforehand."""

    frames: Iterator[NDArray[np.uint8]]  # (H, W, 3)
    fps: float
    total: int | None  # frames to come; None where there is no end
    name: str


def is_camera(source: str) -> bool:
    """Whether this names a camera: a number, or a device.

    Example:
        >>> is_camera("0"), is_camera("/dev/video2"), is_camera("holiday.mp4")
        (True, True, False)
    """
    return not Path(source).is_file() and (source.isdecimal() or source.startswith("/dev/"))


@contextmanager
def opened(source: str, *, loop: bool = False, live: bool = False) -> Iterator[Feed]:
    """The frames of a video file or a camera, one in memory at a time.

    Args:
        source: a file; or a camera, ``/dev/video0`` or its number ``0``, which Video4Linux must know.
        loop: begin a file again at its end, without end.
        live: give a file's frames no faster than they play, as a camera would.

    Raises:
        FileNotFoundError: there is no such file or camera.
        ValueError: the file is no video, a camera was asked to loop, or cameras cannot be read on this system.
        ImportError: PyAV is not installed.
    """
    if is_camera(source):
        if loop:
            raise ValueError(f"{source} is a camera, which has no end to loop from; drop --loop")
        with _camera(source) as feed:
            yield feed
        return
    info = io.probe(source)
    fps = info.fps if math.isfinite(info.fps) and info.fps > 0 else USUAL_RATE
    frames = _file(source, loop)
    yield Feed(paced(frames, fps) if live else frames, fps, None if loop else info.num_frames, Path(source).name)


def _file(path: str, loop: bool) -> Iterator[NDArray[np.uint8]]:
    while True:
        yield from (frames[0] for _, frames in io.iter_windows(path, 1))
        if not loop:
            return


def paced(
    frames: Iterable[Any],
    fps: float,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Any]:
    """Frames no earlier than they are due; one that is late is given at once, and does not shift those after it.

    Example:
        >>> slept = []
        >>> list(paced("abc", fps=4, clock=lambda: 10.0, sleep=slept.append)), slept
        (['a', 'b', 'c'], [0.25, 0.5])
    """
    begun = None
    for index, frame in enumerate(frames):
        begun = clock() if begun is None else begun
        early = begun + index / fps - clock()
        if early > 0:
            sleep(early)
        yield frame


@contextmanager
def _camera(source: str, kind: str = "v4l2") -> Iterator[Feed]:
    """``kind`` is FFmpeg's name of what reads the device."""
    device = f"/dev/video{source}" if source.isdecimal() else source
    if kind == "v4l2" and not sys.platform.startswith("linux"):
        raise ValueError(
            f"{source} names a camera, and cameras are read through Video4Linux, which {sys.platform} lacks; read it "
            f"with a library of yours and give its frames to STAAStream"
        )
    if not Path(device).exists():
        cameras = sorted(str(path) for path in Path("/dev").glob("video*"))
        raise FileNotFoundError(
            f"there is no camera {device}; cameras here: {', '.join(cameras) or 'none'}; give one of these, or a file"
        )
    av = import_av()
    try:
        container = av.open(device, format=kind)
    except (av.error.FFmpegError, ValueError) as error:  # the latter: a build of FFmpeg without devices
        raise ValueError(f"{device} cannot be read as a camera ({error}); is another program using it?") from error
    with container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or USUAL_RATE)
        yield Feed((frame.to_ndarray(format="rgb24") for frame in container.decode(stream)), fps, None, device)
