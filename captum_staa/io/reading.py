"""Choose frames of a video file and read them, a few in memory at a time."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from captum_staa._utils.checks import check_count
from captum_staa._utils.files import FilePath
from captum_staa.io.decoding import claimed, decode, opened, packets, rate

Sampling = Literal["uniform", "dense", "stride"]


class Video(NamedTuple):
    """What :func:`read_video` returns; it unpacks as ``frames, fps, indices``."""

    frames: NDArray[np.uint8]  # (T, H, W, 3), RGB
    fps: float  # of the file, not of the frames chosen; nan where the file does not say
    indices: NDArray[np.int64]  # (T,), in the file


class VideoInfo(NamedTuple):
    """What :func:`probe` returns: height and width as shown, after the rotation that the file asks for."""

    num_frames: int
    fps: float
    height: int
    width: int


def read_video(
    path: FilePath,
    num_frames: int | None = None,
    sampling: Sampling = "uniform",
    *,
    stride: int = 1,
    start: int | None = None,
) -> Video:
    """Read some frames of a video file; only these are ever held in memory.

    Example:
        >>> import tempfile, numpy as np
        >>> from captum_staa import io
        >>> path = tempfile.mkdtemp() + "/clip.mp4"
        >>> _ = io.write_video(path, np.zeros((40, 48, 64, 3), dtype=np.uint8), fps=25)
        >>> frames, fps, indices = read_video(path, num_frames=8)
        >>> frames.shape, fps, indices.tolist()
        ((8, 48, 64, 3), 25.0, [2, 7, 12, 17, 22, 27, 32, 37])
        >>> read_video(path, num_frames=4, sampling="stride", stride=4, start=10).indices.tolist()
        [10, 14, 18, 22]

    Args:
        path: a file that FFmpeg opens: mp4, avi, mkv, webm, gif, ...
        num_frames: T, how many frames; None takes all (``"stride"``: every ``stride``-th to the end).
        sampling: ``"uniform"``, the middle frames of T equal parts of the file; ``"dense"``, T frames in a row, from
            the middle of the file unless ``start`` is given; ``"stride"``, every ``stride``-th frame.
        stride: step of ``"stride"``, in frames.
        start: first frame to consider; None is the file's first, for ``"dense"`` with ``num_frames`` the middle part.

    Returns:
        :class:`Video`: frames ``(T, H, W, 3)`` uint8 RGB as a player shows them (rotated and mirrored as the file asks;
        if the size changes within the file, all have the first frame's size; an alpha channel is dropped), fps, and
        the frames' indices in the file. Parts are equal in frames, not in seconds, also where frames last unequally.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: a number is no whole one.
        ValueError: it is no video, or shorter than asked (what a damaged file still holds is read, with a warning).
    """
    if sampling not in ("uniform", "dense", "stride") or (stride != 1 and sampling != "stride"):
        raise ValueError(f"sampling is 'uniform', 'dense' or, with a step, 'stride', got {sampling = }, {stride = }")
    check_count("start", 0 if start is None else start, least=0)
    check_count("stride", stride)
    check_count("num_frames", 1 if num_frames is None else num_frames)
    depends_on_length = num_frames is not None and (sampling == "uniform" or (sampling == "dense" and start is None))
    total = probe(path).num_frames if depends_on_length else None
    while True:
        wanted = _choose(path, total, num_frames, sampling, stride, start)
        following: int | None = next(wanted)
        kept: dict[int, NDArray[np.uint8]] = {}
        with closing(decode(path)) as decoded:
            for frame in decoded:
                if frame.position == following:
                    kept[frame.position] = frame.to_rgb(next((first.shape[:2] for first in kept.values()), None))
                    following = next(wanted, None)
                if following is None:
                    break
        if kept and (following is None or num_frames is None):
            indices = np.array(list(kept), dtype=np.int64)
            return Video(_stacked(kept), frame.fps, indices)
        total = frame.position + 1  # shorter than believed, but now known: choose again, or say that it cannot be


def iter_windows(
    path: FilePath, num_frames: int, *, stride: int | None = None, frame_stride: int = 1
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Windows over a video of any length, holding no more frames than a window spans, and the window itself.

    Example:
        >>> import tempfile, numpy as np
        >>> from captum_staa import io
        >>> path = tempfile.mkdtemp() + "/clip.mp4"
        >>> _ = io.write_video(path, np.zeros((40, 48, 64, 3), dtype=np.uint8), fps=25)
        >>> [(start, frames.shape) for start, frames in iter_windows(path, num_frames=16)]
        [(0, (16, 48, 64, 3)), (16, (16, 48, 64, 3)), (24, (16, 48, 64, 3))]

    Args:
        path: as for :func:`read_video`.
        num_frames: T, frames per window.
        stride: frames from one window's start to the next one's; None is the window's own length, so that windows
            touch without overlap. The last window ends with the video's last frame and may overlap more.
        frame_stride: frames of the file from one frame of a window to the next.

    Yields:
        ``(start, frames)``: index in the file of the window's first frame, and ``(T, H, W, 3)`` uint8 RGB.

    Raises:
        FileNotFoundError, TypeError, ValueError: as for :func:`read_video`, once the first window is asked for.
    """
    check_count("num_frames", num_frames)
    check_count("frame_stride", frame_stride)
    span = (num_frames - 1) * frame_stride + 1
    step = span if stride is None else stride
    check_count("stride", step)
    held: deque[NDArray[np.uint8]] = deque(maxlen=span)
    given, start, size = -1, 0, None
    with closing(decode(path)) as decoded:
        for frame in decoded:
            held.append(frame.to_rgb(size))
            size = held[0].shape[:2]
            start = frame.position + 1 - span
            if start >= 0 and start % step == 0:
                yield start, np.stack(list(held)[::frame_stride])
                given = start
    if start < 0:
        raise ValueError(f"{path} holds {len(held)} frames, but a window spans {span}; lower {num_frames = }")
    if given != start:
        yield start, np.stack(list(held)[::frame_stride])


def probe(path: FilePath) -> VideoInfo:
    """Length, rate and size of a video, without decoding more than its first frame.

    Example:
        >>> import tempfile, numpy as np
        >>> from captum_staa import io
        >>> path = tempfile.mkdtemp() + "/clip.mp4"
        >>> _ = io.write_video(path, np.zeros((40, 48, 64, 3), dtype=np.uint8), fps=25)
        >>> probe(path)
        VideoInfo(num_frames=40, fps=25.0, height=48, width=64)

    Args:
        path: as for :func:`read_video`.

    Returns:
        :class:`VideoInfo`, its length as the file announces it, or counted where that is missing or doubtful.

    Raises:
        FileNotFoundError, ValueError: as for :func:`read_video`.
    """
    with closing(decode(path)) as decoded:
        first = next(decoded)
    with opened(path) as (_, stream):
        count = claimed(stream).frames
        seconds = float(stream.duration * stream.time_base) if stream.duration else math.nan
    # Large AVI files and live recordings announce only a part, cut files too much: it contradicts their duration, or
    # the bytes that are there.
    doubtful = abs(seconds * first.fps - count) > max(2, 0.02 * count) or count > Path(path).stat().st_size
    if count < 1 or doubtful:
        count = sum(1 for _ in packets(path))
    return VideoInfo(count, first.fps, *first.size)


def frame_times(path: FilePath) -> NDArray[np.float64]:
    """When each frame of a file is shown, without decoding; in files of variable frame rate this is not index over fps.

    Example:
        >>> import tempfile, numpy as np
        >>> from captum_staa import io
        >>> path = tempfile.mkdtemp() + "/clip.mp4"
        >>> _ = io.write_video(path, np.zeros((4, 48, 64, 3), dtype=np.uint8), fps=25)
        >>> frame_times(path).tolist()
        [0.0, 0.04, 0.08, 0.12]

    Args:
        path: as for :func:`read_video`.

    Returns:
        ``(N,)``, seconds since the first frame, by index in the file. Where a frame has no time of its own, as in AVI,
        index over fps; nan where the file does not say that either.

    Raises:
        FileNotFoundError, ValueError: as for :func:`read_video`.
    """
    stamps = [  # and no packets, which hold their bytes
        None if packet.pts is None else float(packet.pts * packet.time_base)
        for packet in packets(path)
        if not packet.is_discard
    ]
    if None in stamps:
        with opened(path) as (_, stream):
            return np.arange(len(stamps)) / rate(stream)
    shown = np.sort(np.array(stamps, dtype=np.float64))  # they come in the order of decoding
    return shown - shown[:1]


def _stacked(kept: dict[int, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """``(T, H, W, 3)``; the single frames are given up one by one, so that they are not held twice."""
    stacked = np.empty((len(kept), *next(iter(kept.values())).shape), dtype=np.uint8)
    for at, position in enumerate(list(kept)):
        stacked[at] = kept.pop(position)
    return stacked


def _choose(
    path: Any, total: int | None, num_frames: int | None, sampling: str, stride: int, start: int | None
) -> Iterator[int]:
    """Indices to keep, in order; ``total`` is None where the choice does not depend on the file's length."""
    begin = start or 0
    least = begin + 1 + ((num_frames or 1) - 1) * stride
    if total is not None and total < least:
        asked = f"{num_frames = }, {stride = }, {start = } need {least}"
        raise ValueError(f"{path} holds {total} frames, but {asked}; ask for fewer frames or an earlier start")
    if num_frames is None:
        return itertools.count(begin, stride)
    if total is not None and sampling == "uniform":
        return (begin + (2 * i + 1) * (total - begin) // (2 * num_frames) for i in range(num_frames))
    if total is not None and sampling == "dense" and start is None:
        begin = (total - num_frames) // 2
    return itertools.islice(itertools.count(begin, stride), num_frames)
