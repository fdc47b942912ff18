"""Write frames, one by one or all at once, to a video file that browsers play."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from captum_staa._utils.files import FilePath, atomic
from captum_staa.io.decoding import import_av

# Encoder, usual and worst quality, its options, the container's, by suffix. AVI knows no order of showing, so no
# B-frames (bf) in it; browsers start to play an MP4 sooner whose index comes first (faststart).
_ENCODERS: dict[str, tuple[str, int, int, dict[str, str], dict[str, str]]] = {
    ".mp4": ("libx264", 18, 51, {}, {"movflags": "+faststart"}),
    ".mkv": ("libx264", 18, 51, {}, {}),
    ".avi": ("libx264", 18, 51, {"bf": "0"}, {}),
    ".webm": ("libvpx-vp9", 24, 63, {"deadline": "good", "cpu-used": "4", "b": "0"}, {}),
}


@contextmanager
def video_writer(
    path: FilePath, fps: float, *, crf: int | None = None, overwrite: bool = False
) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    """A function that appends one frame: a video of any length is written in the memory of one.

    Example:
        >>> import tempfile
        >>> from captum_staa import io
        >>> path = Path(tempfile.mkdtemp(), "clip.mp4")
        >>> with video_writer(path, fps=25) as write:
        ...     for level in range(10):
        ...         write(np.full((48, 64, 3), level, dtype=np.uint8))
        >>> io.probe(path)
        VideoInfo(num_frames=10, fps=25.0, height=48, width=64)

    The file is there, and whole, when the block has ended well; otherwise nothing of it is left.

    Args:
        path, fps, crf, overwrite: as for :func:`write_video`.

    Raises:
        What :func:`write_video` raises; and ValueError for a frame that is not uint8 ``(H, W, 3)`` of the first one's
        size, or if there was none.
    """
    av, target = import_av(), Path(path)
    if target.suffix.lower() not in _ENCODERS:
        raise ValueError(f"{target} must end in {', '.join(_ENCODERS)} to choose a format, not in {target.suffix!r}")
    codec, quality, worst, options, muxing = _ENCODERS[target.suffix.lower()]
    crf = quality if crf is None else crf
    if not (0 < fps < math.inf and 0 <= crf <= worst):
        raise ValueError(f"{target} needs 0 < fps < inf and 0 <= crf <= {worst}, got {fps = }, {crf = }")
    shapes: list[tuple[int, ...]] = []
    with atomic(target, overwrite) as partial:
        with av.open(str(partial.absolute()), "w", options=muxing) as container:
            rate = Fraction(fps).limit_denominator(65535)
            stream = container.add_stream(codec, rate=rate, options={**options, "crf": str(crf)})
            # What the conversion from RGB uses. Unsaid, players guess from the height and shift the colors.
            stream.codec_context.colorspace, stream.codec_context.color_range = 6, 1  # BT.601, 16..235

            def write(frame: NDArray[np.uint8]) -> None:
                shape = frame.shape
                if frame.dtype != np.uint8 or len(shape) != 3 or shape[-1] != 3 or shape != (shapes or [shape])[0]:
                    first = f" of the first one's shape {shapes[0]}" if shapes else ""
                    raise ValueError(
                        f"a frame for {target} must be uint8 (H, W, 3){first}, got {frame.dtype} of shape {shape}"
                    )
                height, width = shape[:2]
                if not shapes:
                    stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
                even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
                shapes.append(shape)

            yield write
            if not shapes:
                raise ValueError(f"no frame was given to write to {target}")
            container.mux(stream.encode())
        _check_whole(partial, len(shapes))


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
            because the players' common color format halves both.
        fps: frames per second, positive.
        crf: quality; 0 is best, 51 (.webm: 63) worst; None takes 18 (24), hard to tell from the original.
        overwrite: whether an existing file may be replaced.

    Returns:
        The path written.

    Raises:
        FileExistsError, FileNotFoundError: the file exists and ``overwrite`` is False; the folder does not exist.
        OSError: it cannot be written, or the disk is full; nothing of it is left then.
        TypeError, ValueError: ``frames``, ``fps``, ``crf`` or the suffix is not as said above.
    """
    target = Path(path)
    frames = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else np.asarray(frames)
    if frames.dtype != np.uint8:
        raise TypeError(f"frames for {target} must be uint8 in 0..255, got {frames.dtype}; scale and round first")
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames for {target} must be (T, H, W, 3) and not empty, but their shape is {frames.shape}")
    with video_writer(target, fps, crf=crf, overwrite=overwrite) as write:
        for frame in frames:
            write(frame)
    return target


def _check_whole(path: Path, count: int) -> None:
    """FFmpeg says nothing of a disk that fills up while it closes a file, so look what is there; without decoding."""
    av = import_av()
    try:
        with av.open(str(path.absolute())) as container:
            packets = container.demux(container.streams.video[0])
            whole = sum(packet.size > 0 and not packet.is_corrupt for packet in packets)
    except (av.error.FFmpegError, IndexError):
        whole = 0
    if whole < count:
        raise OSError(errno.EIO, f"only {whole} of {count} frames arrived on the disk, which may be full", str(path))
