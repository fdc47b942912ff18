"""Read and write video files, a few frames in memory at a time."""

from __future__ import annotations

import itertools
import math
import os
import uuid
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

FilePath = str | os.PathLike[str]
Sampling = Literal["uniform", "dense", "stride"]

# Encoder, usual and worst quality, its options, the container's, by suffix. AVI knows no order of showing, so no
# B-frames (bf) in it; browsers start to play an MP4 sooner whose index comes first (faststart).
_ENCODERS: dict[str, tuple[str, int, int, dict[str, str], dict[str, str]]] = {
    ".mp4": ("libx264", 18, 51, {}, {"movflags": "+faststart"}),
    ".mkv": ("libx264", 18, 51, {}, {}),
    ".avi": ("libx264", 18, 51, {"bf": "0"}, {}),
    ".webm": ("libvpx-vp9", 24, 63, {"deadline": "good", "cpu-used": "4", "b": "0"}, {}),
}


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
        >>> path = tempfile.mkdtemp() + "/clip.mp4"
        >>> _ = write_video(path, np.zeros((40, 48, 64, 3), dtype=np.uint8), fps=25)
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
        :class:`Video`: frames ``(T, H, W, 3)`` uint8 RGB as a player shows them (rotated as the file asks; if the size
        changes within the file, all have the first frame's size), fps, and the frames' indices in the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no video, or shorter than asked (what a damaged file still holds is read, with a warning).
    """
    if sampling not in ("uniform", "dense", "stride") or (stride != 1 and sampling != "stride"):
        raise ValueError(
            f"sampling is 'uniform', 'dense' or, with a step, 'stride', but {sampling = }, {stride = } came"
        )
    _check(0, start=start or 0)
    _check(1, stride=stride, num_frames=1 if num_frames is None else num_frames)
    depends_on_length = num_frames is not None and (sampling == "uniform" or (sampling == "dense" and start is None))
    total = probe(path).num_frames if depends_on_length else None
    while True:
        wanted = _choose(path, total, num_frames, sampling, stride, start)
        following: int | None = next(wanted)
        kept: dict[int, NDArray[np.uint8]] = {}
        for fps, position, frame in _decode(path):  # noqa: B007
            if position == following:
                kept[position] = _to_rgb(frame, next((first.shape[:2] for first in kept.values()), None))
                following = next(wanted, None)
            if following is None:
                break
        if kept and (following is None or num_frames is None):
            return Video(np.stack(list(kept.values())), fps, np.array(list(kept), dtype=np.int64))
        total = position + 1  # shorter than believed, but now known: choose again, or say that it cannot be


def iter_windows(
    path: FilePath, num_frames: int, *, stride: int | None = None, frame_stride: int = 1
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Windows over a video of any length, holding no more than one window of frames.

    Example:
        >>> import tempfile, numpy as np
        >>> path = tempfile.mkdtemp() + "/clip.mp4"
        >>> _ = write_video(path, np.zeros((40, 48, 64, 3), dtype=np.uint8), fps=25)
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
        FileNotFoundError, ValueError: as for :func:`read_video`, once the first window is asked for.
    """
    span = (num_frames - 1) * frame_stride + 1
    step = span if stride is None else stride
    _check(1, num_frames=num_frames, frame_stride=frame_stride, stride=step)
    held: deque[NDArray[np.uint8]] = deque(maxlen=span)
    given, start, size = -1, 0, None
    for _, position, frame in _decode(path):
        held.append(_to_rgb(frame, size))
        size = held[0].shape[:2]
        start = position + 1 - span
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
        >>> path = tempfile.mkdtemp() + "/clip.mp4"
        >>> _ = write_video(path, np.zeros((40, 48, 64, 3), dtype=np.uint8), fps=25)
        >>> probe(path)
        VideoInfo(num_frames=40, fps=25.0, height=48, width=64)

    Args:
        path: as for :func:`read_video`.

    Returns:
        :class:`VideoInfo`, its length as the file announces it, or counted where that is missing or doubtful.

    Raises:
        FileNotFoundError, ValueError: as for :func:`read_video`.
    """
    fps, _, first = next(_decode(path))
    height, width = (first.width, first.height) if first.rotation % 180 else (first.height, first.width)
    with _opened(path) as (container, stream):
        count = claimed = _claimed(stream, fps)
        seconds = float(stream.duration * stream.time_base) if stream.duration else math.nan
        # Large AVI files and live recordings announce only a part, cut files too much: it contradicts their duration.
        if stream.frames < 1 or abs(seconds * fps - count) > max(2, 0.02 * count):
            count = sum(packet.size > 0 for packet in container.demux(stream))
            _warn_if_short(path, count, claimed)
    return VideoInfo(count, fps, height, width)


def write_video(
    path: FilePath, frames: NDArray[np.uint8] | Tensor, fps: float, *, crf: int | None = None, overwrite: bool = False
) -> Path:
    """Write frames to a video file that browsers play: H.264 (.mp4, .mkv, .avi) or VP9 (.webm).

    Example:
        >>> import tempfile, numpy as np
        >>> frames = np.zeros((8, 48, 64, 3), dtype=np.uint8)
        >>> write_video(tempfile.mkdtemp() + "/clip.webm", frames, fps=12.5).name
        'clip.webm'

    The file appears whole or not at all: it is written under another name in the same folder and then renamed.

    Args:
        path: where to; the suffix chooses the format.
        frames: ``(T, H, W, 3)`` uint8 RGB. An odd height or width grows by one pixel, its last row or column repeated,
            because the players' common colour format halves both.
        fps: frames per second, positive.
        crf: quality; 0 is best, 51 (.webm: 63) worst; None takes 18 (24), hard to tell from the original.
        overwrite: whether an existing file may be replaced.

    Returns:
        The path written.

    Raises:
        FileExistsError, FileNotFoundError: the file exists and ``overwrite`` is False; the folder does not exist.
        TypeError, ValueError: ``frames``, ``fps``, ``crf`` or the suffix is not as said above.
    """
    av = _import_av()
    target = Path(path)
    if target.suffix.lower() not in _ENCODERS:
        raise ValueError(f"{target} must end in {', '.join(_ENCODERS)} to choose a format, not in {target.suffix!r}")
    codec, quality, worst, options, muxing = _ENCODERS[target.suffix.lower()]
    frames = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else np.asarray(frames)
    if frames.dtype != np.uint8:
        raise TypeError(f"frames for {target} must be uint8 in 0..255, but {frames.dtype} came; scale and round first")
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames for {target} must be (T, H, W, 3) and not empty, but their shape is {frames.shape}")
    crf = quality if crf is None else crf
    if not (0 < fps < math.inf and 0 <= crf <= worst):
        raise ValueError(f"{target} needs 0 < fps < inf and 0 <= crf <= {worst}, but {fps = }, {crf = } came")
    height, width = frames.shape[1:3]
    with atomic(target, overwrite) as partial, av.open(str(partial), "w", options=muxing) as container:
        rate = Fraction(fps).limit_denominator(65535)
        stream = container.add_stream(codec, rate=rate, options={**options, "crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        # What the conversion from RGB uses. Unsaid, players guess from the height and shift the colours.
        stream.codec_context.colorspace, stream.codec_context.color_range = 6, 1  # BT.601, 16..235
        for frame in frames:
            even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode())
    return target


@contextmanager
def atomic(path: FilePath, overwrite: bool = False) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` if the block ends well, and is removed if it does not."""
    target = Path(path)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; pass overwrite=True to replace it, or choose another name")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder of {target} does not exist; create it first")
    partial = target.with_name(f".{target.stem[:64]}.{uuid.uuid4().hex}{target.suffix}")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


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


def _decode(path: FilePath) -> Iterator[tuple[float, int, Any]]:
    """``(fps, position, frame)`` of every frame that decodes; at least one, else ValueError."""
    av = _import_av()
    decoded, fault = 0, ""
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        fps = float(stream.average_rate or stream.guessed_rate or math.nan)
        claimed = _claimed(stream, fps)
        try:
            for frame in container.decode(stream):
                decoded += 1
                yield fps, decoded - 1, frame
        except av.error.FFmpegError as error:
            fault = f" ({error.strerror})"
    if decoded == 0:
        raise ValueError(f"{path} has a video stream, but none of its frames decodes{fault}; is the file complete?")
    _warn_if_short(path, decoded, claimed, fault)


def _claimed(stream: Any, fps: float) -> int:
    """Frames that the header announces; 0 where it does not say."""
    tag = str(stream.metadata.get("DURATION", ""))  # Matroska's, such as 00:00:10.333000000
    if stream.frames or tag.count(":") != 2 or math.isnan(fps):
        return int(stream.frames)
    return round(sum(float(part) * unit for part, unit in zip(tag.split(":"), (3600, 60, 1), strict=True)) * fps)


def _warn_if_short(path: Any, found: int, claimed: int, fault: str = "") -> None:
    if fault or found < claimed - max(2, claimed // 50):  # edit lists may rightly hide a frame or two
        says = f", though its header announces {claimed}" if claimed else ""
        warnings.warn(f"only {found} frames of {path} can be read{says}{fault}; the file is damaged", stacklevel=4)


def _to_rgb(frame: Any, size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """A decoded frame as ``(H, W, 3)``, turned as the file asks, and brought to ``size`` where that is another."""
    turns = round(frame.rotation / 90) % 4  # counter-clockwise quarter turns
    height, width = (size or (None, None))[:: -1 if turns % 2 else 1]
    picture = frame.to_ndarray(format="rgb24", height=height, width=width)
    return np.ascontiguousarray(np.rot90(picture, turns))


@contextmanager
def _opened(path: FilePath) -> Iterator[tuple[Any, Any]]:
    """The open container and its video stream, or an error that says what the file is instead."""
    av = _import_av()
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist (from the folder {Path.cwd()}); check the path")
    if not file.is_file():
        raise ValueError(f"{file} is a folder, but a video file was expected; name one of the files in it")
    size = file.stat().st_size
    try:
        container = av.open(str(file))
    except av.error.FFmpegError as error:
        found = f"holds {size} bytes but no video ({error.strerror})" if size else "is empty (0 bytes)"
        raise ValueError(f"{file} {found}; expected a whole mp4, avi, mkv, webm, ...: copy it again") from error
    with container:
        cover = av.stream.Disposition.attached_pic  # the picture on a song's sleeve
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            raise ValueError(f"{file} holds no video stream but {kinds}; name a whole file with moving pictures")
        yield container, streams[0]


def _check(least: int, **values: int) -> None:
    for name, value in values.items():
        if int(value) != value or value < least:
            raise ValueError(f"{name} must be a whole number, at least {least}, but {value!r} came")


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("video files need PyAV, which is not installed: pip install captum-staa[video]") from error
    return av
