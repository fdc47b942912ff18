"""Write frames, one by one or all at once, to a video file that browsers can play."""

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
from captum_staa.layout import check_dense

# By suffix: encoder, default and worst crf, options of the encoder, options of the container. AVI does not store the
# display order of frames, so it must not contain B-frames (bf). Browsers start an MP4 sooner if its index comes first
# (faststart).
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
    """Yield a function that appends one frame, to write a video of any length with one frame in memory.

    Example:
        >>> import tempfile
        >>> from captum_staa import io
        >>> path = Path(tempfile.mkdtemp(), "clip.mp4")
        >>> with video_writer(path, fps=25) as write:
        ...     for level in range(10):
        ...         write(np.full((48, 64, 3), level, dtype=np.uint8))
        >>> io.probe(path)
        VideoInfo(num_frames=10, fps=25.0, height=48, width=64)

    The file exists and is complete if the block succeeds. Otherwise no file is left.

    Args:
        path, fps, crf, overwrite: as for :func:`write_video`.

    Raises:
        FileExistsError, FileNotFoundError, OSError: as for :func:`write_video`.
        ValueError: as for :func:`write_video`; a frame is not uint8 ``(H, W, 3)`` or differs in size from the first
            frame; or no frame was written.
    """
    av, target = import_av(), Path(path)
    if target.suffix.lower() not in _ENCODERS:
        raise ValueError(f"path must end in one of {', '.join(_ENCODERS)}, got {target.suffix!r} in {target}")
    codec, quality, worst, options, muxing = _ENCODERS[target.suffix.lower()]
    crf = quality if crf is None else crf
    if not (0 < fps < math.inf and 0 <= crf <= worst):
        raise ValueError(
            f"fps must be positive and finite, and crf from 0 to {worst} for {target}, got {fps = }, {crf = }"
        )
    shapes: list[tuple[int, ...]] = []
    with atomic(target, overwrite) as partial:
        with av.open(str(partial.absolute()), "w", options=muxing) as container:
            rate = Fraction(fps).limit_denominator(65535)
            stream = container.add_stream(codec, rate=rate, options={**options, "crf": str(crf)})
            # The color space of the conversion from RGB. Otherwise players guess it from the height, and colors shift.
            stream.codec_context.colorspace, stream.codec_context.color_range = 6, 1  # BT.601, 16..235

            def write(frame: NDArray[np.uint8]) -> None:
                shape = frame.shape
                if frame.dtype != np.uint8 or len(shape) != 3 or shape[-1] != 3 or shape != (shapes or [shape])[0]:
                    first = f" with the shape of the first frame, {shapes[0]}" if shapes else ""
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
                raise ValueError(f"at least one frame must be written to {target}, got none")
            container.mux(stream.encode())
        _check_whole(partial, len(shapes))


def write_video(
    path: FilePath, frames: NDArray[np.uint8] | Tensor, fps: float, *, crf: int | None = None, overwrite: bool = False
) -> Path:
    """Write frames to a video file that browsers can play: H.264 (.mp4, .mkv, .avi) or VP9 (.webm).

    Example:
        >>> import tempfile, numpy as np
        >>> frames = np.zeros((8, 48, 64, 3), dtype=np.uint8)
        >>> write_video(tempfile.mkdtemp() + "/clip.webm", frames, fps=12.5).name
        'clip.webm'

    Writing is atomic: the file is written under another name in the same folder and then renamed.

    Args:
        path: the file to write. Its suffix selects the format.
        frames: ``(T, H, W, 3)`` uint8 RGB. An odd height or width is extended by one pixel by repeating the last row or
            column, because the usual color format stores colors at half the resolution.
        fps: frames per second, positive.
        crf: quality from 0 (best) to 51 (worst; 63 for .webm). None is 18 (24 for .webm), which is hard to distinguish
            from the original.
        overwrite: whether an existing file may be replaced.

    Returns:
        The path of the file.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is False.
        FileNotFoundError: the folder does not exist.
        OSError: the file cannot be written, or the disk is full. No partial file is left.
        TypeError: ``frames`` is not uint8.
        ValueError: the shape of ``frames``, ``fps``, ``crf`` or the suffix is invalid.
    """
    target = Path(path)
    if isinstance(frames, Tensor):
        check_dense(frames, "frames")
        frames = frames.detach().cpu().numpy()
    frames = np.asarray(frames)
    if frames.dtype != np.uint8:
        raise TypeError(f"frames for {target} must be uint8 in 0..255, got {frames.dtype}. Scale and round them first.")
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames for {target} must be non-empty and (T, H, W, 3), got shape {frames.shape}")
    with video_writer(target, fps, crf=crf, overwrite=overwrite) as write:
        for frame in frames:
            write(frame)
    return target


def _check_whole(path: Path, count: int) -> None:
    """Raise OSError unless the file contains all frames. FFmpeg does not report a full disk when it closes a file."""
    av = import_av()
    try:
        with av.open(str(path.absolute())) as container:
            packets = container.demux(container.streams.video[0])
            complete = sum(packet.size > 0 and not packet.is_corrupt for packet in packets)
    except (av.error.FFmpegError, IndexError):
        complete = 0
    if complete < count:
        raise OSError(errno.EIO, f"only {complete} of {count} frames were written. The disk may be full", str(path))
