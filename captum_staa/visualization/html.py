"""HTML player: the clip, its explanations and a timeline in one page without external resources."""

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

TINY = 128  # frames with a shorter edge below this many pixels are stored losslessly, larger ones are compressed
ONLY = "attributions"  # the name of a single explanation


class Player(str):
    """The page as a string. A notebook shows it in a sandboxed iframe, separate from the scripts of the notebook."""

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
    """Return an HTML page that plays a clip with its explanations on top.

    Example:
        >>> import tempfile, numpy as np, torch
        >>> frames = np.full((8, 48, 64, 3), 128, dtype=np.uint8)
        >>> maps = {"STAA": torch.rand(1, 8, 48, 64), "Occlusion": torch.rand(1, 8, 48, 64)}
        >>> page = to_html(frames, maps, path=tempfile.mkdtemp() + "/clip.html", fps=25)
        >>> "http://" in page or "https://" in page  # there are no external resources
        False

    The page has menus for the explanation, the drawing method and the sign, and a slider for the opacity. The timeline
    (click or drag), the buttons and the keys (arrows, Home, End, space) select the frame or play the clip. The page
    begins with the strongest frame. It supports light and dark mode and small screens. A notebook shows the returned
    string as a player.

    Args:
        clip: the original frames ``(T, H, W, 3)`` uint8, or a clip in ``layout``.
        attributions: attributions of the clip, in one of the forms of :func:`~captum_staa.visualization.show_frames`;
            or a dict from names to attributions, which the page offers in a menu.
        layout: order of the axes of 5-D tensors, such as ``"BTCHW"``.
        path: output file; None only returns the page.
        overwrite: whether to replace an existing file.
        method: initial way to draw the attributions: ``"blended_heat_map"``, ``"heat_map"``, ``"masked_image"``,
            ``"alpha_scaling"`` or ``"original_image"``; see :func:`~captum_staa.visualization.show_frames`.
        sign: attributions to draw initially: ``"absolute_value"``, ``"positive"``, ``"negative"`` or ``"all"``.
        outlier_perc: percentage in [0, 100]: the largest values that together make up this share of the total are
            clipped to 1. Each explanation and each sign has a separate scale.
        alpha_overlay: initial maximum opacity of the heat map, in [0, 1].
        cmap: color map, or its name; None uses the default of each sign.
        crop: ``(top, left, height, width)`` in pixels of the frames: the region that the model saw.
        index: index of the clip in a batch; required if the batch has more than one clip.
        mean: mean of the clip's normalization, one number or one per channel; requires ``std``.
        std: standard deviation of the clip's normalization; requires ``mean``.
        indices: ``(T,)``, frame numbers in the video file, for the labels.
        fps: frame rate of ``indices`` (of the clip if ``indices`` is None); adds times in seconds to the labels.
        play_fps: frames per second at which the page plays.
        truth: frames that contain the evidence, as in :func:`~captum_staa.visualization.show_timeline`.
        predictions: pairs (label, probability), as returned by :meth:`VideoClassifier.predict`.
        target: label of the explained class, whose bar is colored; None uses the first prediction.
        title: title of the page.
        max_size: maximum length of the shorter side of the frames in pixels; larger frames are reduced.

    Returns:
        The page. 16 frames of 240 x 426 pixels with a smooth map of 224 x 224 take 0.7 MB, and 310 such frames 13 MB.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is False.
        FileNotFoundError: the folder of the file does not exist.
        TypeError, ValueError: an argument is invalid, or the clip and the attributions differ in the number of frames.
    """
    check_count("max_size", max_size)
    if not 0 < play_fps < math.inf:
        raise ValueError(f"play_fps must be positive and finite, got {play_fps!r}")

    def overlay_of(values: Attributions) -> Overlay:
        return overlay(
            clip,
            values,
            layout=layout,
            # "original_image" ignores attributions, but the page needs them for the other methods.
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
        named, original = attributions, next(iter(by_name(attributions, overlay_of).values())).original
    else:
        named, original = {ONLY: attributions}, overlay_of(attributions).original
    total, tall, wide = original.shape[:3]
    height, width = size_within((tall, wide), max_size)
    across, down = width / wide, height / tall
    top, left, extent_y, extent_x = (0, 0, tall, wide) if crop is None else crop
    placed = top * down, left * across, extent_y * down, extent_x * across

    explanations = []
    for name, values in named.items():
        scales = {sign_name: saliency(values, layout, sign_name, outlier_perc, index).scale for sign_name in SIGNS}
        maps = as_map(values, layout, index)
        curves = {sign_name: rounded(when(values, layout, sign_name, index)) for sign_name in SIGNS}
        explanations.append(
            {"name": name, "scales": scales, "curves": curves, **packed(maps, max(scales.values()), placed[2:])}
        )
    colors = {
        sign_name: matplotlib.colormaps.get_cmap(cmap) if cmap else default_cmap(sign_name) for sign_name in SIGNS
    }
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
        "colors": {
            sign_name: colors[sign_name](np.arange(256), bytes=True)[:, :3].ravel().tolist() for sign_name in SIGNS
        },
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
    """Return the page from its templates in the folder ``player``, with ``data`` embedded as JSON."""
    page, style, script = (
        files(__package__).joinpath("player", name).read_text("utf-8")
        for name in ("page.html", "style.css", "player.js")
    )
    # A "</script>" in a label would end the script element of the data.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return Template(page).substitute(title=escape(title), style=style, script=script, data=text)


def packed(maps: NDArray[np.float64], largest: float, size: tuple[float, float]) -> dict[str, Any]:
    """Encode signed maps ``(T, h, w)`` as a string, with one byte per cell for each sign.

    Positive and negative values are stored separately, so that both survive when a large map is reduced to the size of
    the picture. A byte is the square root of the fraction of the largest value, so that small values stay
    distinguishable even if a few values are 100 times larger.

    Args:
        maps: the values.
        largest: the largest scale with which the maps may be shown; larger values are clipped to it.
        size: height and width of the picture in pixels.

    Returns:
        A dict with ``size`` (h, w) of the stored maps, ``peaks`` (largest positive value, largest negative magnitude)
        and ``packed``, the bytes ``(2, T, h, w)`` compressed by zlib as base64.
    """
    # Divide first: float32 can represent neither 1e-50 nor 1e50.
    planes = [shrunk(np.clip(sign * maps / (largest or 1), 0, 1).astype(np.float32), size) for sign in (1, -1)]
    peaks = [float(plane.max()) for plane in planes]
    parts = [np.sqrt(plane / (peak or 1)) for plane, peak in zip(planes, peaks, strict=True)]
    codes = (255 * np.stack(parts)).round().astype(np.uint8)  # (2, T, h, w)
    return {
        "size": codes.shape[2:],
        "peaks": [peak * largest for peak in peaks],
        "packed": b64encode(zlib.compress(codes.tobytes(), 9)).decode(),
    }


def encoded(frame: NDArray[np.uint8]) -> str:
    """Return a frame ``(H, W, 3)`` as a data URI of a WebP image."""
    written = BytesIO()
    Image.fromarray(frame).save(written, "webp", lossless=min(frame.shape[:2]) < TINY, quality=85, method=4)
    return "data:image/webp;base64," + b64encode(written.getvalue()).decode()


def rounded(values: NDArray[np.float64]) -> list[float]:
    """Round to six significant digits, which is more than a curve can show."""
    return [float(f"{value:.6g}") for value in values]
