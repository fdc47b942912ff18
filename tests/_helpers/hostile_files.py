"""Unusual and damaged video files, made with PyAV, and the frames that a player shows."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av")

HEIGHT, WIDTH = 48, 64
COLORS = ((200, 40, 40), (40, 180, 60), (50, 60, 200), (230, 220, 120))  # of the quarters, row by row
FINE = {"crf": "4"}


def quartered(count: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Return frames in four colors, which show the orientation, with a strip whose gray level is the frame number."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    for at, color in enumerate(COLORS):
        rows = slice(None, height // 2) if at < 2 else slice(height // 2, None)
        columns = slice(None, width // 2) if at % 2 == 0 else slice(width // 2, None)
        frames[:, rows, columns] = color
    strip = slice(height // 2 - height // 8, height // 2 + height // 8)
    frames[:, strip] = (16 + 8 * np.arange(count)).astype(np.uint8)[:, None, None, None]
    return frames


def numbers(frames: np.ndarray) -> list[int]:
    """Return the frame numbers, read from the strip of each frame."""
    middle = frames.shape[1] // 2
    return np.rint((frames[:, middle - 2 : middle + 2].mean((1, 2, 3)) - 16) / 8).astype(int).tolist()


def noise(count: int, seed: int = 0) -> np.ndarray:
    """Return frames that cannot be compressed."""
    return np.random.default_rng(seed).integers(0, 256, (count, HEIGHT, WIDTH, 3), dtype=np.uint8)


def write(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    *,
    options: dict[str, str] | None = None,
    alpha: int | None = None,
    times: Sequence[int] | None = None,
    display: tuple[Any, ...] | None = None,
    colors: tuple[int, int] | None = None,
    title: str | None = None,
    container: str | None = None,
) -> Path:
    """Encode frames ``(T, H, W, 3)`` at 10 per second.

    Args:
        path: path of the file. The suffix selects the container, unless ``container`` is set.
        frames: uint8 RGB.
        codec: an encoder of FFmpeg.
        pix_fmt: the stored pixel format.
        options: options of the encoder.
        alpha: one alpha value for all pixels.
        times: display times of the frames, in milliseconds.
        display: rotation and mirroring in a player: arguments of ``set_display_rotation``.
        colors: FFmpeg's numbers of the color matrix and the color range.
        title: metadata of the stream.
        container: name of the container.
    """
    options = FINE if options is None and codec in ("libx264", "libvpx-vp9") else options or {}
    matrix, span = colors or (None, None)
    muxing = {"movflags": "+faststart"} if path.suffix == ".mp4" else {}  # the index first
    with av.open(str(path), "w", format=container, options=muxing) as file:
        stream = file.add_stream(codec, rate=Fraction(10), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if display is not None:
            stream.set_display_rotation(*display)
        if colors is not None:
            stream.codec_context.colorspace, stream.codec_context.color_range = colors
        if title is not None:
            stream.metadata["title"] = title
        for at, picture in enumerate(frames):
            if alpha is None:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            else:
                layer = np.full((*picture.shape[:2], 1), alpha, np.uint8)
                frame = av.VideoFrame.from_ndarray(np.concatenate([picture, layer], axis=2), format="rgba")
            frame = frame.reformat(format=pix_fmt, dst_colorspace=matrix, dst_color_range=span)
            frame.pts, frame.time_base = (at, Fraction(1, 10)) if times is None else (times[at], Fraction(1, 1000))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def without_frames(path: Path, codec: str = "libx264") -> Path:
    """Write a file with a declared stream without frames."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        file.start_encoding()
    return path


def png(width: int, height: int) -> bytes:
    """Return a black PNG with one bit per pixel. Large pictures have few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(((width + 7) // 8 + 1) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def corrupted(whole: bytes, seed: int) -> bytes:
    """Change up to sixteen bytes at random positions, anywhere, or within a small part such as a header."""
    draw = np.random.default_rng(seed)
    first = 0 if seed % 2 else int(draw.integers(len(whole)))
    last = min(first + (512 if seed % 3 == 0 else len(whole)), len(whole))
    damaged = bytearray(whole)
    for at in draw.integers(first, last, draw.integers(1, 17)):
        damaged[at] ^= int(draw.integers(1, 256))
    return bytes(damaged)
