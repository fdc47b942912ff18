"""A video file written frame by frame, so that a stream of any length needs the memory of one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from captum_staa.io import atomic

SUFFIXES = (".mp4", ".mkv")
QUALITY = "18"  # of H.264: hard to tell from the original


def import_av() -> Any:
    """PyAV, or an error that says how to get it."""
    try:
        import av
    except ImportError as error:
        raise ImportError("video needs PyAV, which is not installed: pip install captum-staa[video]") from error
    return av


@contextmanager
def video_writer(
    path: str | os.PathLike[str], fps: float, overwrite: bool = False
) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    """A function that appends one frame ``(H, W, 3)`` uint8; the file is there, whole, when the block has ended well.

    Example:
        >>> import tempfile
        >>> from captum_staa import io
        >>> path = Path(tempfile.mkdtemp(), "clip.mp4")
        >>> with video_writer(path, fps=25) as write:
        ...     for level in range(10):
        ...         write(np.full((48, 64, 3), level, dtype=np.uint8))
        >>> io.probe(path)
        VideoInfo(num_frames=10, fps=25.0, height=48, width=64)

    Args:
        path: ends in ``.mp4`` or ``.mkv``; H.264, as :func:`captum_staa.io.write_video` writes it.
        fps: frames per second, positive.
        overwrite: whether an existing file may be replaced.

    Raises:
        FileExistsError, FileNotFoundError: the file exists and ``overwrite`` is False; its folder does not exist.
        ValueError: another suffix, ``fps`` not positive, a frame of another size than the first, or no frame at all.
    """
    av, target = import_av(), Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{target} must end in {' or '.join(SUFFIXES)}, not in {target.suffix!r}")
    if not 0 < fps < math.inf:
        raise ValueError(f"fps must be positive and finite, but {fps!r} came")
    options = {"movflags": "+faststart"} if target.suffix.lower() == ".mp4" else {}
    with atomic(target, overwrite) as partial, av.open(str(partial), "w", options=options) as container:
        stream = container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(65535), options={"crf": QUALITY, "preset": "veryfast"}
        )
        size: list[tuple[int, ...]] = []

        def write(frame: NDArray[np.uint8]) -> None:
            height, width = frame.shape[:2]
            if not size:
                size.append(frame.shape)
                stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
                # What the conversion from RGB uses. Unsaid, players guess from the height and shift the colours.
                stream.codec_context.colorspace, stream.codec_context.color_range = 6, 1  # BT.601, 16..235
            if frame.shape != size[0]:
                raise ValueError(f"all frames of {target} have the first one's shape {size[0]}, but {frame.shape} came")
            even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))

        yield write
        if not size:
            raise ValueError(f"no frame was given to write to {target}")
        container.mux(stream.encode())
