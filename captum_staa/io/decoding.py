"""Every frame of a file as FFmpeg decodes it, as a player shows it, and a word where the file is damaged."""

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

PLAYLISTS = {"hls", "dash", "concat", "imf", "sdp", "rtsp"}  # they hold no frames, but the names of other files
MOST_PIXELS = 1 << 26  # of a frame: twice 8K. A picture of a few kilobytes may claim to be as large as the memory


class Claim(NamedTuple):
    """What a header says of its stream's length; 0 where it says nothing."""

    frames: int
    seconds: float


class Quarter(NamedTuple):
    """How a decoded frame is turned to stand as a player shows it: rows and columns swapped first, then reversed."""

    swapped: bool
    upside_down: bool
    mirrored: bool


class Decoded(NamedTuple):
    """A frame as FFmpeg decodes it, and what it takes to show it."""

    path: FilePath
    fps: float  # of the file; nan where it does not say
    position: int
    frame: Any
    turn: (
        Quarter  # the first frame's: to ask each frame keeps its memory until Python looks for garbage (PyAV 16 to 18)
    )

    @property
    def size(self) -> tuple[int, int]:
        """``(H, W)`` as shown."""
        height, width = self.frame.height, self.frame.width
        return (width, height) if self.turn.swapped else (height, width)

    def to_rgb(self, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """``(H, W, 3)``, turned as the file asks, and brought to ``size`` where that is another."""
        height, width = (size or self.size)[:: -1 if self.turn.swapped else 1]
        try:
            picture: NDArray[np.uint8] = self.frame.to_ndarray(
                format="rgb24", height=height, width=width, **colors(self.frame)
            )
        except import_av().error.FFmpegError as error:
            raise ValueError(
                f"frame {self.position} of {self.path} cannot be made RGB ({error.strerror}); is the file damaged?"
            ) from error
        if self.turn.swapped:
            picture = picture.swapaxes(0, 1)
        rows, columns = (-1 if reverse else 1 for reverse in (self.turn.upside_down, self.turn.mirrored))
        return np.ascontiguousarray(picture[::rows, ::columns])


def decode(path: FilePath) -> Generator[Decoded, None, None]:
    """Every frame that decodes; at least one, else ValueError."""
    av = import_av()
    decoded, ends, fault, whole, turn = 0, 0.0, "", True, Quarter(False, False, False)
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
                if whole and frame.is_corrupt:
                    whole = False
                    warnings.warn(
                        f"only a part of frame {decoded - 1} of {path} can be read, and the frames that build on it "
                        f"show what the decoder made up; the file is damaged",
                        stacklevel=3,
                    )
                yield Decoded(path, fps, decoded - 1, frame, turn)
        except av.error.FFmpegError as error:
            fault = f" ({error.strerror})"
    if decoded == 0:
        raise ValueError(f"{path} has a video stream, but none of its frames decodes{fault}; is the file complete?")
    warn_if_short(path, decoded, ends, claim, fault)


def packets(path: FilePath) -> Generator[Any, None, None]:
    """What is stored of every frame, in the order of decoding, but not decoded; at least one, else ValueError."""
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
        raise ValueError(f"{path} has a video stream, but no frame is stored in it{fault}; is the file complete?")
    warn_if_short(path, found, ends, claim, fault)


def rate(stream: Any) -> float:
    """Frames per second as the file announces them; nan where it does not say."""
    return float(stream.average_rate or stream.guessed_rate or math.nan)


def end(shown: Any) -> float:
    """When a packet or frame ceases to be shown, in seconds; 0 where the file does not say."""
    if shown.pts is None or shown.time_base is None:
        return 0.0
    lasts = getattr(shown, "duration", None) or 0  # which frames of older PyAV do not have
    return float((shown.pts + lasts) * shown.time_base)


def claimed(stream: Any) -> Claim:
    """How long the header says the stream is. Matroska counts no frames; it has a tag such as 00:00:10.333000000."""
    parts = str(stream.metadata.get("DURATION", "")).split(":")
    try:
        seconds = sum(float(part) * unit for part, unit in zip(parts, (3600, 60, 1), strict=True))
    except ValueError:  # of another form, or garbled
        seconds = 0.0
    return Claim(int(stream.frames), seconds if math.isfinite(seconds) else 0.0)


def warn_if_short(path: Any, found: int, ends: float, claim: Claim, fault: str = "") -> None:
    """Say so where a file gives less than its header announces. Frames may last unequally, so no one counts by time."""
    says = ""
    if found < claim.frames - max(2, claim.frames // 50):  # edit lists may rightly hide a frame or two
        says = f", though its header announces {claim.frames}"
    elif not claim.frames and ends < claim.seconds - max(2 * ends / found, 0.02 * claim.seconds):
        says = f" and end at {ends:.2f} s, though its header announces {claim.seconds:.2f} s"
    if says or fault:
        warnings.warn(f"only {found} frames of {path} can be read{says}{fault}; the file is damaged", stacklevel=4)


def quarter(frame: Any) -> Quarter:
    """What the file asks of a player: one of the eight ways to lay a picture down, the nearest one."""
    side = frame.side_data.get("DISPLAYMATRIX")
    if side is None:
        return Quarter(False, False, False)
    a, b, _, c, d = np.frombuffer(bytes(side)[:36], dtype=np.int32).astype(np.int64)[:5]
    # pixel (column, row) goes to column a * column + c * row, and to row b * column + d * row
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Quarter(True, bool(b < 0), bool(c < 0))
    return Quarter(False, bool(d < 0), bool(a < 0))


def colors(frame: Any) -> dict[str, int]:
    """How luma and chroma become colors, said outright: PyAV before 17 takes every frame for BT.601, limited range."""
    if frame.format.is_rgb or "pal" in frame.format.name:
        return {}
    limited, full, bt601, unspecified = 1, 2, 5, 2
    return {
        "src_colorspace": bt601 if frame.colorspace == unspecified else frame.colorspace,
        "src_color_range": frame.color_range or limited,
        "dst_colorspace": 4,  # of no meaning for RGB, but where it is the source's the older ones look at neither
        "dst_color_range": full,
    }


@contextmanager
def opened(path: FilePath) -> Iterator[tuple[Any, Any]]:
    """The open container and its video stream, or an error that says what the file is instead."""
    av = import_av()
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist (from the folder {Path.cwd()}); check the path")
    if not file.is_file():
        kind = "a folder" if file.is_dir() else "a pipe or a device"
        raise ValueError(f"{file} is {kind}, but a video file was expected; name a file that is on the disk")
    size = file.stat().st_size
    # From 19 on PyAV replaces what no text can be made of by itself, and has no option for it.
    lenient = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    try:
        # whole, because FFmpeg takes a name such as "http:clip.mp4" or "pipe:0" for an address
        container = av.open(
            str(file.absolute()),
            options={"protocol_whitelist": "file"},  # no address that a file may name is looked up
            **lenient,
        )
    except av.error.FFmpegError as error:
        if not os.access(file, os.R_OK):
            raise PermissionError(f"{file} may not be read; ask its owner for leave") from error
        found = f"holds {size} bytes but no video ({error.strerror})" if size else "is empty (0 bytes)"
        raise ValueError(f"{file} {found}; expected a whole mp4, avi, mkv, webm, ...: copy it again") from error
    with container:
        if playlist := PLAYLISTS.intersection(container.format.name.split(",")):
            raise ValueError(
                f"{file} is a playlist ({playlist.pop()}) that names other files or addresses, which are not "
                f"opened; name the video file itself"
            )
        cover = av.stream.Disposition.attached_pic  # the picture on a song's sleeve
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            raise ValueError(f"{file} holds no video stream but {kinds}; name a whole file with moving pictures")
        if streams[0].codec_context is None:
            raise ValueError(f"{file} holds video in a coding that FFmpeg does not know; is the file's header damaged?")
        width, height = streams[0].codec_context.width, streams[0].codec_context.height
        if width * height > MOST_PIXELS:
            raise ValueError(
                f"{file} says that its frames are {height} x {width} pixels; at most {MOST_PIXELS} pixels are read"
            )
        yield container, streams[0]


def import_av() -> Any:
    """PyAV, or an error that says how to get it."""
    try:
        import av
    except ImportError as error:
        raise ImportError("video files need PyAV, which is not installed: pip install captum-staa[video]") from error
    return av
