"""Decode the frames of a video file with FFmpeg, orient them as a player does, and warn if the file is damaged."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from captum_staa._utils.files import FilePath

PLAYLISTS = {"hls", "dash", "concat", "imf", "sdp", "rtsp"}  # they contain names of other files instead of frames
# Maximum size of a frame, twice 8K: the header of a tiny file may claim a picture that fills all memory.
MOST_PIXELS = 1 << 26


class Claim(NamedTuple):
    """The length of a stream according to its header. 0 if the header does not say."""

    frames: int
    seconds: float


class Quarter(NamedTuple):
    """How to orient a decoded frame as a player shows it: first swap rows and columns, then reverse them."""

    swapped: bool
    upside_down: bool
    mirrored: bool


class Decoded(NamedTuple):
    """A frame as FFmpeg decodes it, and what is needed to convert it to RGB."""

    path: FilePath
    fps: float  # of the file; nan if it does not say
    position: int
    frame: Any
    turn: (
        Quarter  # of the first frame. Reading it from each frame keeps its memory until garbage collection (PyAV 16-18)
    )

    @property
    def size(self) -> tuple[int, int]:
        """``(H, W)`` after the rotation."""
        height, width = self.frame.height, self.frame.width
        return (width, height) if self.turn.swapped else (height, width)

    def to_rgb(self, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """Return the frame as ``(H, W, 3)`` RGB, oriented as the file requests, and resized to ``size`` if given."""
        height, width = (size or self.size)[:: -1 if self.turn.swapped else 1]
        try:
            picture: NDArray[np.uint8] = self.frame.to_ndarray(
                format="rgb24", height=height, width=width, **colors(self.frame)
            )
        except import_av().error.FFmpegError as error:
            raise ValueError(
                f"frame {self.position} of {self.path} cannot be converted to RGB ({error.strerror}). Check whether "
                f"the file is damaged."
            ) from error
        if self.turn.swapped:
            picture = picture.swapaxes(0, 1)
        rows, columns = (-1 if reverse else 1 for reverse in (self.turn.upside_down, self.turn.mirrored))
        return np.ascontiguousarray(picture[::rows, ::columns])


def decode(path: FilePath) -> Generator[Decoded, None, None]:
    """Yield every frame that can be decoded.

    Raises:
        FileNotFoundError, ValueError: as :func:`opened` does, or no frame can be decoded.
    """
    av = import_av()
    decoded, ends, fault, intact, turn = 0, 0.0, "", True, Quarter(False, False, False)
    with opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
        fps = rate(stream)
        claim = claimed(stream)
        try:
            for frame in container.decode(stream):
                if decoded == 0:
                    turn = quarter(frame)
                decoded += 1
                ends = max(ends, end(frame))
                if intact and frame.is_corrupt:
                    intact = False
                    warnings.warn(
                        f"only a part of frame {decoded - 1} of {path} can be read. The decoder guessed the rest, "
                        f"also in later frames that depend on it. The file is damaged.",
                        stacklevel=3,
                    )
                yield Decoded(path, fps, decoded - 1, frame, turn)
        except av.error.FFmpegError as error:
            fault = f" ({error.strerror})"
    if decoded == 0:
        raise ValueError(
            f"none of the frames of the video stream in {path} can be decoded{fault}. "
            f"Check whether the file is complete."
        )
    warn_if_short(path, decoded, ends, claim, fault)


def packets(path: FilePath) -> Generator[Any, None, None]:
    """Yield the encoded packet of every frame, in decoding order, without decoding it.

    Raises:
        FileNotFoundError, ValueError: as :func:`opened` does, or there are no packets.
    """
    av = import_av()
    found, ends, fault = 0, 0.0, ""
    with opened(path) as (container, stream):
        claim = claimed(stream)
        try:
            for packet in container.demux(stream):
                if packet.size > 0:
                    found += 1
                    ends = max(ends, end(packet))
                    yield packet
        except av.error.FFmpegError as error:
            fault = f" ({error.strerror})"
    if found == 0:
        raise ValueError(f"the video stream in {path} contains no frames{fault}. Check whether the file is complete.")
    warn_if_short(path, found, ends, claim, fault)


def rate(stream: Any) -> float:
    """Return the frames per second according to the header, or nan if it does not say."""
    return float(stream.average_rate or stream.guessed_rate or math.nan)


def end(shown: Any) -> float:
    """Return when a packet or frame stops being shown, in seconds, or 0 if the file does not say."""
    if shown.pts is None or shown.time_base is None:
        return 0.0
    duration = getattr(shown, "duration", None) or 0  # frames of older PyAV versions lack it
    return float((shown.pts + duration) * shown.time_base)


def claimed(stream: Any) -> Claim:
    """Return the length of a stream according to its header.

    Matroska does not store a number of frames. It has a tag such as 00:00:10.333000000.
    """
    parts = str(stream.metadata.get("DURATION", "")).split(":")
    try:
        seconds = sum(float(part) * unit for part, unit in zip(parts, (3600, 60, 1), strict=True))
    except ValueError:  # another format, or damaged
        seconds = 0.0
    return Claim(int(stream.frames), seconds if math.isfinite(seconds) else 0.0)


def warn_if_short(path: Any, found: int, ends: float, claim: Claim, fault: str = "") -> None:
    """Warn if a file contains fewer frames than its header announces, or ends earlier.

    The number of frames is not derived from the duration, because frames may have different durations.
    """
    announced = ""
    if found < claim.frames - max(2, claim.frames // 50):  # edit lists may hide a few frames in an intact file
        announced = f", but its header announces {claim.frames}"
    elif not claim.frames and ends < claim.seconds - max(2 * ends / found, 0.02 * claim.seconds):
        announced = f" and end at {ends:.2f} s, but its header announces {claim.seconds:.2f} s"
    if announced or fault:
        warnings.warn(
            f"only {found} frames of {path} can be read{announced}{fault}. The file is damaged.", stacklevel=4
        )


def quarter(frame: Any) -> Quarter:
    """Return the orientation that the file requests, rounded to the nearest of the eight with right angles."""
    side = frame.side_data.get("DISPLAYMATRIX")
    if side is None:
        return Quarter(False, False, False)
    a, b, _, c, d = np.frombuffer(bytes(side)[:36], dtype=np.int32).astype(np.int64)[:5]
    # pixel (column, row) moves to column a * column + c * row and to row b * column + d * row
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Quarter(True, bool(b < 0), bool(c < 0))
    return Quarter(False, bool(d < 0), bool(a < 0))


def colors(frame: Any) -> dict[str, int]:
    """Return explicit options for the color conversion. PyAV before 17 treats every frame as BT.601, limited range."""
    if frame.format.is_rgb or "pal" in frame.format.name:
        return {}
    limited, full, bt601, unspecified = 1, 2, 5, 2
    return {
        "src_colorspace": bt601 if frame.colorspace == unspecified else frame.colorspace,
        "src_color_range": frame.color_range or limited,
        "dst_colorspace": 4,  # without effect for RGB, but older PyAV ignores both color spaces if they are equal
        "dst_color_range": full,
    }


@contextmanager
def opened(path: FilePath) -> Iterator[tuple[Any, Any]]:
    """Open a video file and yield its container and its first video stream.

    Raises:
        FileNotFoundError: the file does not exist.
        PermissionError: the file may not be read.
        ValueError: it is not a video file. The message says what it is.
    """
    av = import_av()
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist (relative to {Path.cwd()}). Check the path.")
    if not file.is_file():
        kind = "a folder" if file.is_dir() else "a pipe or a device"
        raise ValueError(f"path must be a video file on the disk, got {kind}: {file}")
    size = file.stat().st_size
    # PyAV 19 and later always replace text that cannot be decoded, and lack the option.
    lenient = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    try:
        # absolute, because FFmpeg interprets a name such as "http:clip.mp4" or "pipe:0" as an address
        container = av.open(
            str(file.absolute()),
            options={"protocol_whitelist": "file"},  # FFmpeg must not open addresses that a file contains
            **lenient,
        )
    except av.error.FFmpegError as error:
        if not os.access(file, os.R_OK):
            raise PermissionError(
                f"{file} cannot be read because of its permissions. Change them with chmod."
            ) from error
        found = f"contains {size} bytes but no video ({error.strerror})" if size else "is empty (0 bytes)"
        raise ValueError(
            f"path must be a complete video file (mp4, avi, mkv, webm, ...), got {file}, which {found}. Copy it again."
        ) from error
    with container:
        if playlist := PLAYLISTS.intersection(container.format.name.split(",")):
            raise ValueError(
                f"path must be a video file, got a playlist ({playlist.pop()}): {file}. The files and addresses in a "
                f"playlist are not opened. Pass the path of the video file itself."
            )
        cover = av.stream.Disposition.attached_pic  # the cover picture of an audio file
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "no"
            raise ValueError(f"path must be a file with a video stream, got {kinds} streams in {file}")
        if streams[0].codec_context is None:
            raise ValueError(f"FFmpeg does not know the video codec of {file}. Check whether the header is damaged.")
        width, height = streams[0].codec_context.width, streams[0].codec_context.height
        if width * height > MOST_PIXELS:
            raise ValueError(
                f"frames must have at most {MOST_PIXELS} pixels, got {height} x {width} in the header of {file}"
            )
        yield container, streams[0]


def import_av() -> Any:
    """Return the module ``av`` of PyAV, or raise an ImportError that says how to install it."""
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "reading and writing video files requires PyAV. Install it with: pip install captum-staa[video]"
        ) from error
    return av
