"""Moving pictures: a clip and what the model used in it, as .mp4, .webm, .mkv, .avi, .webp or .gif."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import Colormap
from numpy.typing import NDArray
from PIL import Image

from captum_staa._utils.files import atomic
from captum_staa.io import video_writer
from captum_staa.layout import VideoLayout

from .figure import evenly
from .overlay import Method, overlay
from .placement import Crop, enlarged
from .saliency import Attributions, Clip, Sign

PICTURES = (".webp", ".gif")
VIDEOS = (".mp4", ".webm", ".mkv", ".avi")
GAP = 8  # pixels between the two pictures
PALETTE = 24  # frames that tell a GIF's colors


def save_animation(
    path: str | os.PathLike[str],
    clip: Clip,
    attributions: Attributions | None,
    *,
    layout: VideoLayout | str | None = None,
    fps: float = 8,
    side_by_side: bool = True,
    method: Method = "blended_heat_map",
    sign: Sign = "absolute_value",
    outlier_perc: float = 2,
    alpha_overlay: float = 0.7,
    cmap: str | Colormap | None = None,
    crop: Crop | None = None,
    index: int | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    min_size: int = 256,
    quality: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the clip with its attributions on top as a moving picture.

    Example:
        >>> import tempfile, numpy as np, torch
        >>> from PIL import Image
        >>> frames = np.random.default_rng(0).integers(0, 255, (8, 48, 64, 3), dtype=np.uint8)
        >>> path = save_animation(tempfile.mkdtemp() + "/clip.webp", frames, torch.rand(1, 8, 48, 64))
        >>> with Image.open(path) as picture:
        ...     picture.n_frames, picture.size  # the original on the left, what the model used on the right
        (8, (776, 288))

    Args:
        path: where to; the suffix chooses: ``.webp`` (small, plays in browsers and READMEs), ``.gif`` (plays
            everywhere, 256 colors), or ``.mp4``, ``.webm``, ``.mkv``, ``.avi``, which need PyAV.
        clip: as for :func:`~captum_staa.visualization.show_frames`.
        attributions: likewise.
        layout: likewise.
        fps: frames per second of the animation. Sixteen frames sampled from ten seconds last two seconds at 8.
        side_by_side: whether the untouched frames stand to the left.
        method: as for :func:`~captum_staa.visualization.show_frames`.
        sign: likewise.
        outlier_perc: likewise.
        alpha_overlay: likewise.
        cmap: likewise.
        crop: likewise.
        index: likewise.
        mean: likewise.
        std: likewise.
        min_size: frames whose shorter side has fewer pixels are enlarged to at least this.
        quality: of videos ``crf``, of .webp 0 (worst) to 100; None takes a good one; .gif has none.
        overwrite: whether an existing file may be replaced.

    Returns:
        The path written; the file appears whole or not at all. Pillow merges equal successive frames into a longer one.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is False.
        TypeError, ValueError: an argument is not as said above.
        ImportError: a video was asked for, and PyAV is not installed.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in PICTURES + VIDEOS:
        raise ValueError(f"{target} must end in {', '.join(PICTURES + VIDEOS)}, not in {suffix!r}")
    if not 0 < fps < math.inf:
        raise ValueError(f"fps must be positive and finite, got {fps!r}")
    if min_size < 0:
        raise ValueError(f"min_size is a number of pixels, at least 0, got {min_size!r}")
    drawn = overlay(
        clip,
        attributions,
        layout=layout,
        method=method,
        sign=sign,
        outlier_perc=outlier_perc,
        alpha_overlay=alpha_overlay,
        cmap=cmap,
        crop=crop,
        index=index,
        mean=mean,
        std=std,
    )

    def picture(at: int) -> NDArray[np.uint8]:
        frame = enlarged(drawn.frame(at), min_size)
        if not side_by_side:
            return frame
        gap = np.full((len(frame), GAP, 3), 255, dtype=np.uint8)
        return np.concatenate([enlarged(drawn.original[at], min_size), gap, frame], axis=1)

    total = len(drawn.original)
    if suffix in VIDEOS:
        with video_writer(target, fps, crf=quality, overwrite=overwrite) as write:
            for at in range(total):
                write(picture(at))
        return target
    with atomic(target, overwrite) as partial:
        _write_pictures(partial, picture, total, fps, quality)
    return target


class _Pictures(Image.Image):
    """A moving picture whose frames are drawn when Pillow's writers seek them, so that one at a time is in memory."""

    def __init__(self, draw: Callable[[int], Image.Image], total: int) -> None:
        super().__init__()
        self._draw, self.n_frames, self.is_animated = draw, total, total > 1
        self.seek(0)

    def seek(self, frame: int) -> None:
        if frame >= self.n_frames:
            raise EOFError(f"frame {frame} of {self.n_frames}")  # how Pillow learns that it has seen all
        drawn = self._draw(frame)
        self._at, self.im, self._mode, self._size, self.palette = frame, drawn.im, drawn.mode, drawn.size, drawn.palette

    def tell(self) -> int:
        return self._at


def _write_pictures(
    path: Path, picture: Callable[[int], NDArray[np.uint8]], total: int, fps: float, quality: int | None
) -> None:
    """An endless .webp or .gif."""
    unit = 10 if path.suffix.lower() == ".gif" else 1  # a GIF counts in hundredths of a second
    ends = np.arange(1, total + 1) * 1000 / fps / unit
    # Rounding the ends instead of the lengths keeps the whole as long as it should be. Browsers slow a GIF down whose
    # frames last less than 20 ms.
    durations = (np.diff(ends.round().astype(int), prepend=0) * unit).clip(20 if unit == 10 else 1).tolist()
    options: dict[str, Any] = {"quality": 85 if quality is None else quality, "method": 4}

    def draw(at: int) -> Image.Image:
        return Image.fromarray(picture(at))

    if unit == 10:
        # One palette for all frames, or equal evidence would get other colors in other frames. Some pixels of some
        # frames tell it.
        some = [picture(at)[::2, ::2] for at in evenly(total, PALETTE)]
        palette = Image.fromarray(np.concatenate(some)).quantize(256)
        options = {"optimize": False}

        def draw(at: int) -> Image.Image:
            return Image.fromarray(picture(at)).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)

    _Pictures(draw, total).save(path, save_all=True, duration=durations, loop=0, **options)
