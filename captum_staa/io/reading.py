"""Select frames of a video file and read them, with few frames in memory at a time."""

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
    """The result of :func:`read_video`. It unpacks as ``frames, fps, indices``."""

    frames: NDArray[np.uint8]  # (T, H, W, 3), RGB
    fps: float  # of the file, not of the selected frames; nan if the file does not say
    indices: NDArray[np.int64]  # (T,), index of each frame in the file

    def __repr__(self) -> str:
        return f"Video(frames={self.frames.shape}, fps={self.fps}, indices={self.indices.shape})"


class VideoInfo(NamedTuple):
    """The result of :func:`probe`. Height and width are those after the rotation that the file requests."""

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
    """Read selected frames of a video file. Only these frames are kept in memory.

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
        path: a file that FFmpeg can open: mp4, avi, mkv, webm, gif, ...
        num_frames: T, the number of frames. None reads all frames (with ``"stride"``, every ``stride``-th frame).
        sampling: ``"uniform"`` selects the middle frames of T equal parts of the file. ``"dense"`` selects T
            consecutive frames, from the middle of the file unless ``start`` is given. ``"stride"`` selects every
            ``stride``-th frame.
        stride: step of ``"stride"``, in frames.
        start: index of the first frame to consider. None is 0, and for ``"dense"`` with ``num_frames`` the start of the
            T frames in the middle of the file.

    Returns:
        :class:`Video`: frames ``(T, H, W, 3)`` uint8 RGB as a player shows them, the fps of the file, and the indices
        of the frames in the file. Frames are rotated and mirrored as the file requests. If the size changes within the
        file, all frames get the size of the first one. An alpha channel is dropped. The parts of ``"uniform"`` have
        equal numbers of frames, not equal durations, also if frames have different durations.

    Raises:
        FileNotFoundError: the file does not exist.
        TypeError: a number is not an integer.
        ValueError: the file is not a video, or has too few frames. The readable part of a damaged file is read, with a
            warning.
    """
    if sampling not in ("uniform", "dense", "stride") or (stride != 1 and sampling != "stride"):
        raise ValueError(
            f"sampling must be 'uniform', 'dense' or 'stride', and stride must be 1 unless sampling='stride', got "
            f"{sampling = }, {stride = }"
        )
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
        # The file is shorter than announced, but now its length is known. Select again, or raise in _choose.
        total = frame.position + 1


def iter_windows(
    path: FilePath, num_frames: int, *, stride: int | None = None, frame_stride: int = 1
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield windows of a video of any length. At most the frames that one window spans, and a copy, are in memory.

    Example:
        >>> import tempfile, numpy as np
        >>> from captum_staa import io
        >>> path = tempfile.mkdtemp() + "/clip.mp4"
        >>> _ = io.write_video(path, np.zeros((40, 48, 64, 3), dtype=np.uint8), fps=25)
        >>> [(start, frames.shape) for start, frames in iter_windows(path, num_frames=16)]
        [(0, (16, 48, 64, 3)), (16, (16, 48, 64, 3)), (24, (16, 48, 64, 3))]

    Args:
        path: as for :func:`read_video`.
        num_frames: T, the number of frames per window.
        stride: distance between the starts of consecutive windows, in frames. None is the length of a window, so that
            windows are adjacent and do not overlap. The last window ends with the last frame of the video and may
            overlap more.
        frame_stride: distance between consecutive frames of a window, in frames of the file.

    Yields:
        ``(start, frames)``: the index in the file of the window's first frame, and ``(T, H, W, 3)`` uint8 RGB.

    Raises:
        FileNotFoundError, TypeError, ValueError: as for :func:`read_video`, when the first window is requested.
    """
    check_count("num_frames", num_frames)
    check_count("frame_stride", frame_stride)
    span = (num_frames - 1) * frame_stride + 1
    step = span if stride is None else stride
    check_count("stride", step)
    held: deque[NDArray[np.uint8]] = deque(maxlen=span)
    last_yielded, start, size = -1, 0, None
    with closing(decode(path)) as decoded:
        for frame in decoded:
            held.append(frame.to_rgb(size))
            size = held[0].shape[:2]
            start = frame.position + 1 - span
            if start >= 0 and start % step == 0:
                yield start, np.stack(list(held)[::frame_stride])
                last_yielded = start
    if start < 0:
        raise ValueError(
            f"a window spans {span} frames, but {path} has only {len(held)} frames. Reduce {num_frames = } or "
            f"{frame_stride = }."
        )
    if last_yielded != start:
        yield start, np.stack(list(held)[::frame_stride])


def probe(path: FilePath) -> VideoInfo:
    """Return the number of frames, frame rate and size of a video. Only the first frame is decoded.

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
        :class:`VideoInfo`. The number of frames is read from the header, or counted if the header seems wrong.

    Raises:
        FileNotFoundError, ValueError: as for :func:`read_video`.
    """
    with closing(decode(path)) as decoded:
        first = next(decoded)
    with opened(path) as (_, stream):
        count = claimed(stream).frames
        seconds = float(stream.duration * stream.time_base) if stream.duration else math.nan
    # The headers of large AVI files and live recordings announce too few frames, those of truncated files too many. The
    # number then contradicts the duration or the size of the file.
    doubtful = abs(seconds * first.fps - count) > max(2, 0.02 * count) or count > Path(path).stat().st_size
    if count < 1 or doubtful:
        count = sum(1 for _ in packets(path))
    return VideoInfo(count, first.fps, *first.size)


def frame_times(path: FilePath) -> NDArray[np.float64]:
    """Return the time of each frame, without decoding. For variable frame rates it differs from index / fps.

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
        ``(N,)``, seconds since the first frame, by index in the file. If the file stores no times, as AVI, the values
        are index / fps, or nan if the file does not store the fps either.

    Raises:
        FileNotFoundError, ValueError: as for :func:`read_video`.
    """
    stamps = [  # not the packets themselves, because they keep their data in memory
        None if packet.pts is None else float(packet.pts * packet.time_base)
        for packet in packets(path)
        if not packet.is_discard
    ]
    if None in stamps:
        with opened(path) as (_, stream):
            return np.arange(len(stamps)) / rate(stream)
    shown = np.sort(np.array(stamps, dtype=np.float64))  # packets come in decoding order
    return shown - shown[:1]


def _stacked(kept: dict[int, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Return the frames as one array ``(T, H, W, 3)``. Each frame is freed after copying, to save memory."""
    stacked = np.empty((len(kept), *next(iter(kept.values())).shape), dtype=np.uint8)
    for at, position in enumerate(list(kept)):
        stacked[at] = kept.pop(position)
    return stacked


def _choose(
    path: Any, total: int | None, num_frames: int | None, sampling: str, stride: int, start: int | None
) -> Iterator[int]:
    """Return the indices to keep, in order. ``total`` is None if they do not depend on the length of the file."""
    begin = start or 0
    least = begin + 1 + ((num_frames or 1) - 1) * stride
    if total is not None and total < least:
        raise ValueError(
            f"{num_frames = }, {stride = }, {start = } need at least {least} frames, but {path} has {total}. Request "
            f"fewer frames or an earlier start."
        )
    if num_frames is None:
        return itertools.count(begin, stride)
    if total is not None and sampling == "uniform":
        return (begin + (2 * i + 1) * (total - begin) // (2 * num_frames) for i in range(num_frames))
    if total is not None and sampling == "dense" and start is None:
        begin = (total - num_frames) // 2
    return itertools.islice(itertools.count(begin, stride), num_frames)
