"""Where frames come from, a file or a camera, and how they are read: on demand, or in a thread that never waits."""

from __future__ import annotations

import math
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from captum_staa import io
from captum_staa.io.decoding import import_av
from captum_staa.models.preprocessing import as_frames

USUAL_RATE = 25.0  # frames per second if the file or camera does not state a rate
TIMEOUT = 5.0  # seconds to wait for the next frame of a source when the stream is closed


@dataclass(frozen=True)
class Arrived:
    """A frame, its index in the stream, and its arrival time."""

    index: int
    frame: NDArray[np.uint8]  # (H, W, 3)
    time: float  # seconds of time.perf_counter


class Source(Protocol):
    """Source of the frames of a run."""

    count: int  # frames that have arrived
    error: BaseException | None  # the exception that the iterable of frames raised after its last frame

    def take(self) -> deque[Arrived]:
        """Return frames in order, at least one; empty at the end of the stream."""

    def stop(self) -> None:
        """Stop reading frames."""

    def join(self) -> None:
        """Wait until the reading thread has ended."""


class Waiting:
    """Source that reads each frame on demand, so that no frame is dropped; the iterable waits."""

    def __init__(self, frames: Iterable[Any]) -> None:
        self.count, self.error = 0, None  # type: int, BaseException | None
        self._arrivals = _arrivals(frames)

    def take(self) -> deque[Arrived]:
        try:
            arrived = deque([next(self._arrivals)])
        except StopIteration:
            return deque()
        except Exception as error:  # the run raises it again after the frames before it
            self.error = error
            return deque()
        self.count += 1
        return arrived

    def stop(self) -> None:
        pass

    def join(self) -> None:
        pass


class Dropping:
    """Source that reads in a thread without waiting, keeps the newest frames, and drops older frames."""

    def __init__(self, frames: Iterable[Any], maxlen: int) -> None:
        self.count, self.error = 0, None  # type: int, BaseException | None
        self._arrivals = _arrivals(frames)
        self._queue: deque[Arrived] = deque(maxlen=maxlen)
        self._changed = threading.Condition()
        self._done = False
        self._thread = threading.Thread(target=self._read, name="captum_staa stream", daemon=True)

    def take(self) -> deque[Arrived]:
        with self._changed:
            if self._thread.ident is None and not self._done:
                self._thread.start()
            while not self._queue and not self._done:
                self._changed.wait()
            taken = deque(self._queue)
            self._queue.clear()
        return taken

    def stop(self) -> None:
        with self._changed:
            self._done = True
            self._changed.notify_all()

    def join(self) -> None:
        self.stop()
        if self._thread.ident is None:
            return
        self._thread.join(TIMEOUT)
        if self._thread.is_alive():
            warnings.warn(
                f"the source of a closed stream must return its next frame within {TIMEOUT:.0f} s, got no frame, so "
                f"the reading thread still runs. Close the source to end it.",
                ResourceWarning,
                stacklevel=3,
            )

    def _read(self) -> None:
        try:
            for arrived in self._arrivals:
                with self._changed:
                    if self._done:
                        return
                    self._queue.append(arrived)
                    self.count = arrived.index + 1
                    self._changed.notify_all()
        except BaseException as error:  # the run raises it again in the thread of its caller
            self.error = error
        finally:
            self.stop()


def _arrivals(frames: Iterable[Any]) -> Iterator[Arrived]:
    """Yield each frame checked and copied, because cameras often return the same buffer for every frame."""
    size: tuple[int, ...] | None = None
    for index, item in enumerate(frames):
        frame = np.array(as_frames(item, f"frame {index} of the stream", "H, W, 3"), order="C")
        if size is not None and frame.shape != size:
            raise ValueError(
                f"frame {index} of the stream must be {size[0]} x {size[1]} pixels like the frames before it, got "
                f"{frame.shape[0]} x {frame.shape[1]}. Resize the frames to one size, or start a new stream."
            )
        size = frame.shape
        yield Arrived(index, frame, time.perf_counter())


@dataclass(frozen=True)
class Feed:
    """A source of frames, with its frame rate, length and name."""

    frames: Iterator[NDArray[np.uint8]]  # (H, W, 3)
    fps: float
    total: int | None  # number of frames; None if it is endless
    name: str


def is_camera(source: str) -> bool:
    """Return whether a string names a camera: a number or a device.

    Example:
        >>> is_camera("0"), is_camera("/dev/video2"), is_camera("holiday.mp4")
        (True, True, False)
    """
    return not Path(source).is_file() and (source.isdecimal() or source.startswith("/dev/"))


@contextmanager
def opened(source: str, *, loop: bool = False, live: bool = False) -> Iterator[Feed]:
    """Open a video file or a camera, and yield its frames as a :class:`Feed`, one in memory at a time.

    Args:
        source: a path of a file, or a Video4Linux camera such as ``/dev/video0`` or its number ``0``.
        loop: whether to repeat a file endlessly.
        live: whether to yield the frames of a file at its frame rate, like a camera.

    Raises:
        FileNotFoundError: the file or camera does not exist.
        ValueError: the file is not a video, ``loop`` is True for a camera, or cameras cannot be read on this system.
        ImportError: PyAV is not installed.
    """
    if is_camera(source):
        if loop:
            raise ValueError(
                f"the source must be a file to repeat it with --loop, got the camera {source}. Leave out --loop."
            )
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
    """Yield frames at a frame rate. A late frame is yielded at once and does not delay the frames after it.

    Example:
        >>> slept = []
        >>> list(paced("abc", fps=4, clock=lambda: 10.0, sleep=slept.append)), slept
        (['a', 'b', 'c'], [0.25, 0.5])
    """
    start = None
    for index, frame in enumerate(frames):
        start = clock() if start is None else start
        early = start + index / fps - clock()
        if early > 0:
            sleep(early)
        yield frame


@contextmanager
def _camera(source: str, kind: str = "v4l2") -> Iterator[Feed]:
    """Open a camera; ``kind`` is FFmpeg's name of the input format."""
    device = f"/dev/video{source}" if source.isdecimal() else source
    if kind == "v4l2" and not sys.platform.startswith("linux"):
        raise ValueError(
            f"cameras must be read through Video4Linux, which needs Linux, got the camera {source} on {sys.platform}. "
            f"Read it with another library, and pass its frames to STAAStream."
        )
    if not Path(device).exists():
        cameras = sorted(str(path) for path in Path("/dev").glob("video*"))
        raise FileNotFoundError(
            f"the camera must be one of those connected ({', '.join(cameras) or 'none'}), got {device}, which does not "
            f"exist. Pass one of them, or a file."
        )
    av = import_av()
    try:
        container = av.open(device, format=kind)
    except (av.error.FFmpegError, ValueError) as error:  # the latter: a build of FFmpeg without devices
        raise ValueError(
            f"{device} must be a camera that FFmpeg can read, got the error: {error}. Close programs that use it."
        ) from error
    with container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or USUAL_RATE)
        yield Feed((frame.to_ndarray(format="rgb24") for frame in container.decode(stream)), fps, None, device)
