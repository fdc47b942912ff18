"""Animations of a clip with its attributions, as .mp4, .webm, .mkv, .avi, .webp or .gif."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from captum_staa._utils.files import atomic
from captum_staa.io import video_writer
from captum_staa.visualization.figure import DEFAULT_STYLE, Style, evenly
from captum_staa.visualization.frames import Frames, Pixels, enlarged
from captum_staa.visualization.overlay import Overlay, overlay
from captum_staa.visualization.saliency import Attributions

PICTURES = (".webp", ".gif")
VIDEOS = (".mp4", ".webm", ".mkv", ".avi")
GAP = 8  # pixels between the two pictures, and beside a text
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")  # has more letters than Pillow's font
TEXT, LEADING = 13, 6  # height of a line of text and of the space between lines, in pixels
INK = (26, 26, 26)  # color of the text
PALETTE = 24  # number of frames from which the color palette of a GIF is computed


def save_animation(
    attributions: Attributions | None,
    frames: Frames | Pixels,
    path: str | os.PathLike[str],
    *,
    style: Style = DEFAULT_STYLE,
    title: str | None = None,
    play_fps: float = 8,
    side_by_side: bool = True,
    min_size: int = 256,
    quality: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an animation of the clip with its attributions on top, and return its path.

    Example:
        >>> import tempfile, numpy as np, torch
        >>> from PIL import Image
        >>> pixels = np.random.default_rng(0).integers(0, 255, (8, 48, 64, 3), dtype=np.uint8)
        >>> path = save_animation(torch.rand(1, 8, 48, 64), pixels, tempfile.mkdtemp() + "/clip.webp")
        >>> with Image.open(path) as picture:
        ...     picture.n_frames, picture.size  # original frames on the left, attributions on the right
        (8, (776, 288))

    Args:
        attributions: attributions of the clip, in one of the forms of :func:`~captum_staa.visualization.show_frames`;
            None with ``Style(method="original_image")``.
        frames: the clip, in one of the forms of :class:`~captum_staa.visualization.Frames`.
        path: output file. The suffix selects the format: ``.webp`` (small, for browsers and READMEs), ``.gif`` (256
            colors), or ``.mp4``, ``.webm``, ``.mkv``, ``.avi``, which need PyAV.
        style: how to draw the attributions.
        title: text above the pictures, of one or more lines. With a title, the time of the frame and the color bar are
            drawn below the pictures, so that the file explains itself.
        play_fps: frames per second of the animation. For example, 16 frames at 8 fps play for two seconds.
        side_by_side: whether to show the original frames on the left.
        min_size: minimum length of the shorter side in pixels; smaller frames are enlarged.
        quality: ``crf`` of a video, or 0 (worst) to 100 of a ``.webp``; None uses a high quality. Ignored for ``.gif``.
        overwrite: whether to replace an existing file.

    Returns:
        The path of the file. After an error, no partial file is left. Pillow merges equal successive frames of a
        ``.webp`` or ``.gif`` into one longer frame.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is False.
        TypeError, ValueError: an argument is invalid.
        ImportError: ``path`` is a video, and PyAV is not installed.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in PICTURES + VIDEOS:
        raise ValueError(f"path must end in one of {', '.join(PICTURES + VIDEOS)}, got {str(target)!r}")
    if not 0 < play_fps < math.inf:
        raise ValueError(f"play_fps must be positive and finite, got {play_fps!r}")
    if min_size < 0:
        raise ValueError(f"min_size must be a number of pixels of at least 0, got {min_size!r}")
    drawn = overlay(attributions, frames, style=style)
    original, captions = drawn.frames.pixels, drawn.frames.captions(join=", ")

    def picture(at: int) -> NDArray[np.uint8]:
        frame = enlarged(drawn.picture(at), min_size)
        if side_by_side:
            gap = np.full((len(frame), GAP, 3), 255, dtype=np.uint8)
            frame = np.concatenate([enlarged(original[at], min_size), gap, frame], axis=1)
        return frame if title is None else labeled(frame, title, captions[at], drawn)

    total = len(original)
    if suffix in VIDEOS:
        with video_writer(target, play_fps, crf=quality, overwrite=overwrite) as write:
            for at in range(total):
                write(picture(at))
        return target
    with atomic(target, overwrite) as partial:
        _write_pictures(partial, picture, total, play_fps, quality)
    return target


def labeled(frame: NDArray[np.uint8], title: str, caption: str, drawn: Overlay) -> NDArray[np.uint8]:
    """Return a picture ``(h, w, 3)`` with its title above, and its time and the color bar below."""
    width, font = frame.shape[1], ImageFont.truetype(str(FONT), TEXT)
    colors = drawn.style.bar_colors if drawn.saliency is not None else None
    above, step = (
        _lines(title, width - 2 * GAP, font),
        TEXT + LEADING,
    )  # the picture begins below the lines of the title
    below = [caption, *(_lines(drawn.caption, width - 2 * GAP, font) if drawn.saliency is not None else [])]
    rows = len(above) + len(below) + (colors is not None)
    page = Image.new("RGB", (width, rows * step + len(frame) + 2 * LEADING), "white")
    draw = ImageDraw.Draw(page)
    for row, text in enumerate(above):
        draw.text((GAP, row * step + LEADING // 2), text, fill=INK, font=font)
    top = len(above) * step + LEADING
    page.paste(Image.fromarray(frame), (0, top))
    top += len(frame)
    for row, text in enumerate(below):
        draw.text((GAP, top + (row + (row > 0 and colors is not None)) * step), text, fill=INK, font=font)
    if colors is not None:
        left, right = ("−full" if drawn.style.limits[0] < 0 else "0"), "full"
        begin, end = (2 * GAP + math.ceil(draw.textlength(text, font)) for text in (left, right))
        ramp = colors(np.linspace(0, 1, max(width - begin - end, 1)))[None, :, :3]
        bar = (ramp * 255).round().astype(np.uint8).repeat(TEXT - 4, axis=0)
        page.paste(Image.fromarray(bar), (begin, top + step + 4))
        draw.text((GAP, top + step), left, fill=INK, font=font)
        draw.text((width - end + GAP, top + step), right, fill=INK, font=font)
    return np.asarray(page)


def _lines(text: str, width: int, font: Any) -> list[str]:
    """Break a text into lines of at most ``width`` pixels, between words."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        lines.append("")
        for word in paragraph.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and font.getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
    return lines


class _Pictures(Image.Image):
    """Animated PIL image that draws each frame when Pillow seeks it, so that only one frame is in memory."""

    def __init__(self, draw: Callable[[int], Image.Image], total: int) -> None:
        super().__init__()
        self._draw, self.n_frames, self.is_animated = draw, total, total > 1
        self.seek(0)

    def seek(self, frame: int) -> None:
        if frame >= self.n_frames:
            raise EOFError(f"frame {frame} of {self.n_frames}")  # tells Pillow that there are no more frames
        drawn = self._draw(frame)
        self._at, self.im, self._mode, self._size, self.palette = frame, drawn.im, drawn.mode, drawn.size, drawn.palette

    def tell(self) -> int:
        return self._at


def _write_pictures(
    path: Path, picture: Callable[[int], NDArray[np.uint8]], total: int, fps: float, quality: int | None
) -> None:
    """Write a .webp or .gif that repeats forever."""
    unit = 10 if path.suffix.lower() == ".gif" else 1  # a GIF stores durations in units of 10 ms
    ends = np.arange(1, total + 1) * 1000 / fps / unit
    # Rounding the end times instead of the durations keeps the total duration exact. Browsers slow down a GIF with
    # frames shorter than 20 ms.
    durations = (np.diff(ends.round().astype(int), prepend=0) * unit).clip(20 if unit == 10 else 1).tolist()
    options: dict[str, Any] = {"quality": 85 if quality is None else quality, "method": 4}

    def draw(at: int) -> Image.Image:
        return Image.fromarray(picture(at))

    if unit == 10:
        # All frames share one palette, so that equal values have equal colors. It is computed from a subsample.
        sample = [picture(at)[::2, ::2] for at in evenly(total, PALETTE)]
        palette = Image.fromarray(np.concatenate(sample)).quantize(256)
        options = {"optimize": False}

        def draw(at: int) -> Image.Image:
            return Image.fromarray(picture(at)).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)

    _Pictures(draw, total).save(path, save_all=True, duration=durations, loop=0, **options)
