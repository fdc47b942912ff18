"""A player in one file: the clip, its explanations and a timeline, for any browser, with nothing to fetch."""

from __future__ import annotations

import json
import math
import os
import zlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from io import BytesIO
from string import Template
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import Colormap
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from captum_staa._utils.checks import check_count
from captum_staa._utils.files import atomic
from captum_staa.layout import VideoLayout

from .comparison import by_name
from .figure import explained_bar, frame_labels
from .overlay import Method, Overlay, default_cmap, overlay
from .placement import Crop, reduced, shrunk, size_within
from .saliency import SIGNS, Attributions, Clip, Sign, as_map, evidence_windows, saliency, when

TINY = 128  # pixels of the shorter edge; smaller frames keep every pixel as it is, larger ones are compressed
ONLY = "attributions"  # the name of a single explanation


class Player(str):
    """The page as text, which a notebook shows as it is: in a frame of its own, apart from the notebook's scripts."""

    def _repr_html_(self) -> str:
        return (
            '<iframe title="player" sandbox="allow-scripts" style="width: 100%; height: 46rem; border: 0" '
            f'srcdoc="{escape(self)}"></iframe>'
        )


def to_html(
    clip: Clip,
    attributions: Attributions | Mapping[str, Attributions],
    *,
    layout: VideoLayout | str | None = None,
    path: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    method: Method = "blended_heat_map",
    sign: Sign = "absolute_value",
    outlier_perc: float = 2,
    alpha_overlay: float = 0.7,
    cmap: str | Colormap | None = None,
    crop: Crop | None = None,
    index: int | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    indices: Sequence[int] | None = None,
    fps: float | None = None,
    play_fps: float = 8,
    truth: Tensor | NDArray[np.bool_] | Sequence[tuple[int, int]] | None = None,
    predictions: Sequence[tuple[str, float]] = (),
    target: str | None = None,
    title: str = "What the model looked at",
    max_size: int = 360,
) -> str:
    """Make a page that plays a clip under its explanations.

    Example:
        >>> import tempfile, numpy as np, torch
        >>> frames = np.full((8, 48, 64, 3), 128, dtype=np.uint8)
        >>> maps = {"STAA": torch.rand(1, 8, 48, 64), "Occlusion": torch.rand(1, 8, 48, 64)}
        >>> page = to_html(frames, maps, path=tempfile.mkdtemp() + "/clip.html", fps=25)
        >>> "http://" in page or "https://" in page  # all is inside
        False

    The page switches between explanations, ways of drawing and signs, fades the overlay, and goes through the frames
    by a click or a drag on the timeline, by its buttons, or by keys: arrows, Home, End, and space to play. It begins
    with the strongest frame. It follows the reader's light or dark setting and fits a phone. A notebook shows the
    returned text as a player.

    Args:
        clip: as for :func:`~captum_staa.visualization.show_frames`.
        attributions: as there; or a dict of names and attributions, between which the page switches.
        layout: as there.
        path: where to write the page; None only returns it.
        overwrite: whether an existing file may be replaced.
        method: as there, to begin with.
        sign: as there, to begin with.
        outlier_perc: as there; each explanation and each sign has a scale of its own.
        alpha_overlay: as there, to begin with.
        cmap: as there; None takes the sign's own.
        crop: as there, in pixels of ``clip``.
        index: as there.
        mean: as there.
        std: as there.
        indices: ``(T,)``, the frames' numbers in their file, for the labels.
        fps: frames per second that ``indices`` (or the frames) count; with it the labels have seconds, too.
        play_fps: frames per second at which the page plays.
        truth: when the evidence is there, as for :func:`~captum_staa.visualization.show_timeline`.
        predictions: pairs (label, probability), as :meth:`VideoClassifier.predict` returns them.
        target: label of the class that was explained, whose bar is colored; None is the first.
        title: over all.
        max_size: frames whose shorter side has more pixels are reduced to this.

    Returns:
        The page, whole: 16 frames of 240 x 426 with a smooth map of 224 x 224 take 0.7 MB, and 310 of them 13 MB.

    Raises:
        FileExistsError, FileNotFoundError: the file exists and ``overwrite`` is False; its folder does not exist.
        TypeError, ValueError: an argument is not as said above; the numbers of frames differ.
    """
    check_count("max_size", max_size)
    if not 0 < play_fps < math.inf:
        raise ValueError(f"play_fps must be positive and finite, got {play_fps!r}")

    def laid(values: Attributions) -> Overlay:
        return overlay(
            clip,
            values,
            layout=layout,
            # This one would do without attributions, but the page holds them all the same.
            method="heat_map" if method == "original_image" else method,
            sign=sign,
            outlier_perc=outlier_perc,
            alpha_overlay=alpha_overlay,
            cmap=cmap,
            crop=crop,
            index=index,
            mean=mean,
            std=std,
        )

    if isinstance(attributions, Mapping):
        named, original = attributions, next(iter(by_name(attributions, laid).values())).original
    else:
        named, original = {ONLY: attributions}, laid(attributions).original
    total, tall, wide = original.shape[:3]
    height, width = size_within((tall, wide), max_size)
    across, down = width / wide, height / tall
    top, left, extent_y, extent_x = (0, 0, tall, wide) if crop is None else crop
    placed = top * down, left * across, extent_y * down, extent_x * across

    explanations = []
    for name, values in named.items():
        scales = {each: saliency(values, layout, each, outlier_perc, index).scale for each in SIGNS}
        maps = as_map(values, layout, index)
        curves = {each: rounded(when(values, layout, each, index)) for each in SIGNS}
        explanations.append(
            {"name": name, "scales": scales, "curves": curves, **packed(maps, max(scales.values()), placed[2:])}
        )
    colors = {each: matplotlib.colormaps.get_cmap(cmap) if cmap else default_cmap(each) for each in SIGNS}
    data = {
        "width": width,
        "height": height,
        "crop": placed,
        "frames": [encoded(reduced(frame, max_size)) for frame in original],
        "labels": frame_labels(total, indices, fps, join=", "),
        "fps": play_fps,
        "start": int(np.abs(explanations[0]["curves"][sign]).argmax()),
        "method": method,
        "sign": sign,
        "signs": SIGNS,
        "alpha": alpha_overlay,
        "colors": {each: colors[each](np.arange(256), bytes=True)[:, :3].ravel().tolist() for each in SIGNS},
        "explanations": explanations,
        "truth": evidence_windows(truth, total),
        "predictions": [(str(label), float(probability)) for label, probability in predictions],
        "explained": explained_bar(predictions, target),
    }
    page = Player(assembled(title, data))
    if path is not None:
        with atomic(path, overwrite) as partial:
            partial.write_text(page, encoding="utf-8")
    return page


def assembled(title: str, data: dict[str, Any]) -> str:
    """The page from its parts in the folder ``player``, with what it shows as JSON inside."""
    page, style, script = (
        files(__package__).joinpath("player", name).read_text("utf-8")
        for name in ("page.html", "style.css", "player.js")
    )
    # A "</script>" in somebody's label would end the block that holds it.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return Template(page).substitute(title=escape(title), style=style, script=script, data=text)


def packed(maps: NDArray[np.float64], largest: float, room: tuple[float, float]) -> dict[str, Any]:
    """Signed maps ``(T, h, w)`` as text, a byte per cell for what is positive and one for what is negative.

    They are apart so that maps that are larger than the picture keep both when they are reduced to it. Bytes are square
    roots of parts of the largest value, so that small values stay apart even where a few are a hundred times as large.

    Args:
        maps: the values.
        largest: of the scales under which they may be shown; what lies beyond it is shown like it.
        room: height and width of the picture, in pixels.
    """
    # Divided first: float32 holds neither 1e-50 nor 1e50.
    planes = [shrunk(np.clip(sign * maps / (largest or 1), 0, 1).astype(np.float32), room) for sign in (1, -1)]
    peaks = [float(plane.max()) for plane in planes]
    parts = [np.sqrt(plane / (peak or 1)) for plane, peak in zip(planes, peaks, strict=True)]
    codes = (255 * np.stack(parts)).round().astype(np.uint8)  # (2, T, h, w)
    return {
        "size": codes.shape[2:],
        "peaks": [peak * largest for peak in peaks],
        "packed": b64encode(zlib.compress(codes.tobytes(), 9)).decode(),
    }


def encoded(frame: NDArray[np.uint8]) -> str:
    """A frame ``(H, W, 3)`` as a WebP, as a data URI."""
    written = BytesIO()
    Image.fromarray(frame).save(written, "webp", lossless=min(frame.shape[:2]) < TINY, quality=85, method=4)
    return "data:image/webp;base64," + b64encode(written.getvalue()).decode()


def rounded(values: NDArray[np.float64]) -> list[float]:
    """Six significant digits, which is more than a curve shows."""
    return [float(f"{value:.6g}") for value in values]
