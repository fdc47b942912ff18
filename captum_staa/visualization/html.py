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

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from captum_staa._utils.checks import check_count
from captum_staa._utils.files import atomic
from captum_staa.attr import AnswerMaps
from captum_staa.visualization.figure import CLASS_COLORS, DEFAULT_STYLE, SIGNS, Style, explained_bars
from captum_staa.visualization.frames import Frames, Pixels, check_aspect, reduced, shrunk, size_within
from captum_staa.visualization.saliency import Attributions, Classes, Maps, Truth, evidence_windows, saliency
from captum_staa.visualization.sheet import by_name
from captum_staa.visualization.words import NEEDED, word_maps, words_of

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
    attributions: Attributions | Mapping[str, Attributions | Classes] | AnswerMaps,
    frames: Frames | Pixels,
    path: str | os.PathLike[str] | None = None,
    *,
    style: Style = DEFAULT_STYLE,
    predictions: Sequence[tuple[str, float]] = (),
    target: str | None = None,
    truth: Truth | None = None,
    title: str = "What the model looked at",
    play_fps: float = 8,
    max_size: int = 360,
    overwrite: bool = False,
) -> str:
    """Return an HTML page that plays a clip with its explanations on top.

    Example:
        >>> import tempfile, torch
        >>> frames = Frames(np.full((8, 48, 64, 3), 128, dtype=np.uint8), fps=25)
        >>> maps = {"STAA": torch.rand(1, 8, 48, 64), "Occlusion": torch.rand(1, 8, 48, 64)}
        >>> page = to_html(maps, frames, tempfile.mkdtemp() + "/clip.html")
        >>> "http://" in page or "https://" in page  # there are no external resources
        False

    Two classes beside each other, with one scale, as a second dict inside the first:

        >>> classes = {"waving": torch.rand(1, 8, 48, 64), "clapping": torch.rand(1, 8, 48, 64)}
        >>> page = to_html({"STAA": classes}, frames, predictions=[("waving", 0.7), ("clapping", 0.2)])

    The answer of a video language model as words, of which each shows its map, its timeline and how much it relies on
    the video, above a heat strip of words and frames:

        >>> from captum_staa import VideoAttribution
        >>> whole = VideoAttribution.from_joint(torch.rand(2, 8, 48, 64))
        >>> numbers = {"log_probabilities": torch.zeros(2), "reliance": torch.tensor([0.0, 3.0])}
        >>> answer = AnswerMaps(whole.joint, whole.spatial, whole.temporal, tokens=("a", "dog"), **numbers)
        >>> page = to_html(answer, frames, title="What is in the video?")

    The page has menus for the explanation, the drawing method and the sign, and a slider for the opacity. The timeline
    (click or drag), the buttons and the keys (arrows, Home, End, space) select the frame or play the clip. The page
    begins with the strongest frame. It supports light and dark mode and small screens. A notebook shows the returned
    string as a player.

    Args:
        attributions: attributions of the clip, in one of the forms of :func:`~captum_staa.visualization.show_frames`;
            or a dict from names to attributions, which the page offers in a menu. Instead of the attributions of a
            name, a dict from class labels to what the method returned for these classes shows them beside each other,
            with one scale. Or :class:`~captum_staa.attr.AnswerMaps`, whose words the page offers as buttons; it begins
            with the word that relies most on the video. The up and down keys change the word.
        frames: the clip, in one of the forms of :class:`~captum_staa.visualization.Frames`.
        path: output file; None only returns the page.
        style: how to draw the attributions initially. Each explanation and each sign has a separate scale, and without
            ``cmap``, a separate color map.
        predictions: pairs (label, probability), as returned by :meth:`VideoClassifier.predict`.
        target: label of the explained class, whose bar is colored; None uses the first prediction. For several classes
            beside each other, their bars have the colors of their curves.
        truth: frames that contain the evidence, as in :func:`~captum_staa.visualization.show_timeline`.
        title: title of the page; further lines are a note below it.
        play_fps: frames per second at which the page plays.
        max_size: maximum length of the shorter side of the frames in pixels; larger frames are reduced.
        overwrite: whether to replace an existing file.

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
    clip = Frames.of(frames)
    (tall, wide), (height, width) = clip.size, size_within(clip.size, max_size)
    across, down = width / wide, height / tall
    top, left, extent_y, extent_x = (0, 0, tall, wide) if clip.crop is None else clip.crop
    placed = top * down, left * across, extent_y * down, extent_x * across

    def explanation(values: Attributions | Classes) -> dict[str, Any]:
        several = isinstance(values, Mapping)
        maps = (
            by_name(values, lambda part: Maps.of(part, clip))
            if isinstance(values, Mapping)
            else {"": Maps.of(values, clip)}
        )
        for part in maps.values():
            check_aspect((part.joint.shape[1], part.joint.shape[2]), clip)
        scales = {
            sign: max(saliency(part.joint, sign, style.outlier_perc).scale for part in maps.values()) for sign in SIGNS
        }
        bars = explained_bars(predictions, list(maps) if several else [target])
        panels = [
            {
                "name": label,
                "curves": {sign: rounded(part.per_frame(sign)) for sign in SIGNS},
                **packed(part.joint, max(scales.values()), placed[2:]),
            }
            for label, part in maps.items()
        ]
        return {"scales": scales, "bars": bars, "panels": panels}

    words: list[dict[str, Any]] = []
    if isinstance(attributions, AnswerMaps):
        words, attributions = words_of(attributions), word_maps(attributions)
    first = max(range(len(words)), key=lambda i: words[i]["reliance"], default=0)
    if isinstance(attributions, Mapping):
        made = by_name(attributions, explanation)
        explanations = [{"name": name, **entries} for name, entries in made.items()]
    else:
        explanations = [{"name": ONLY, **explanation(attributions)}]
    data = {
        "width": width,
        "height": height,
        "crop": placed,
        "cropped": clip.cropped,
        "frames": [encoded(reduced(frame, max_size)) for frame in clip.pixels],
        "labels": clip.captions(join=", "),
        "fps": play_fps,
        "start": int(np.abs([part["curves"][style.sign] for part in explanations[first]["panels"]]).max(0).argmax()),
        "first": first,
        "method": style.method,
        "sign": style.sign,
        "signs": SIGNS,
        "alpha": style.alpha_overlay,
        "classes": CLASS_COLORS,
        "colors": {sign: style.colors_of(sign)(np.arange(256), bytes=True)[:, :3].ravel().tolist() for sign in SIGNS},
        "explanations": explanations,
        "truth": evidence_windows(truth, len(clip)),
        "words": words,
        "predictions": [(str(label), float(probability)) for label, probability in predictions],
    }
    page = Player(assembled(title, data))
    if path is not None:
        with atomic(path, overwrite) as partial:
            partial.write_text(page, encoding="utf-8")
    return page


def assembled(title: str, data: dict[str, Any]) -> str:
    """Return the page from its templates in the folder ``player``, with ``data`` embedded as JSON."""
    page, style, more_style, script, more_script = (
        files(__package__).joinpath("player", name).read_text("utf-8")
        for name in ("page.html", "style.css", "words.css", "player.js", "words.js")
    )
    # A "</script>" in a label would end the script element of the data.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    first, _, note = title.partition("\n")
    return Template(page).substitute(
        title=escape(first),
        note=escape(note),
        hidden="" if note else " hidden",
        style=style + more_style,
        script=script + more_script,
        data=text,
        needed=NEEDED,
    )


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
