"""The pictures of an explanation, drawn over the file's own frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from captum_staa import io
from captum_staa._utils.files import atomic
from captum_staa.cli.explanation import Explanation
from captum_staa.result import VideoAttribution
from captum_staa.visualization import save_animation, show_frames, show_timeline, to_html
from captum_staa.visualization.placement import Crop, reduced
from captum_staa.visualization.saliency import Attributions, Sign, key_frames

EDGE = 360  # pixels of the shorter edge of the frames in pictures, at most
MOVING = 360  # frames of a moving picture, at most
SHEET = 24  # frames of a sheet, at most
PAGE_FRAMES, PAGE_BYTES = 120, 8_000_000  # of the player, at most
PAGE_EDGE = 240  # pixels of the shorter edge of its frames, where it would be too large otherwise
PAGE_CLASSES = 5  # that it names, beside the one explained
SLOWEST, FASTEST = 4.0, 30.0  # frames per second
DPI = 150
SIGN: Sign = "positive"  # what speaks for the class: magnitudes would show evidence for other classes as well


def draw(
    explanation: Explanation,
    overlay: Path,
    player: Path,
    sheet: Path,
    timeline: Path,
    *,
    truth: Tensor | None,
) -> None:
    """Write the pictures, which are not there yet.

    Args:
        explanation: what to draw.
        overlay: the moving picture.
        player: the page.
        sheet: the contact sheet.
        timeline: the curve over time with key frames.
        truth: bool ``(T,)``, shaded in the timeline and on the page.
    """
    total, fps = len(explanation.indices), explanation.steady  # else labels would be false seconds
    shown = thinned(total, MOVING)
    frames = frames_of(explanation, shown)
    joint = explanation.parts.joint[0][shown]
    indices = [explanation.indices[at] for at in shown]
    scale = frames.shape[1] / explanation.info.height, frames.shape[2] / explanation.info.width
    top, left, height, width = explanation.crop
    crop = (top * scale[0], left * scale[1], height * scale[0], width * scale[1])

    save_animation(overlay, frames, joint, sign=SIGN, crop=crop, fps=play_rate(indices, explanation.fps))
    title = title_of(explanation)
    few = key_frames(explanation.parts.temporal[0][shown].numpy(), SHEET)
    figure, _ = show_frames(
        frames[few],
        joint[few],
        sign=SIGN,
        crop=crop,
        indices=[indices[at] for at in few],
        fps=fps,
        title=title,
        use_pyplot=False,
    )
    with atomic(sheet) as partial:
        figure.savefig(partial, dpi=DPI)
    temporal = explanation.parts.temporal[:, shown]
    figure, _ = show_timeline(
        VideoAttribution(explanation.parts.joint, explanation.parts.spatial, temporal),
        clip=frames,
        fps=fps,
        indices=indices,
        truth=None if truth is None else truth[shown].numpy(),
        title=title,
        use_pyplot=False,
    )
    with atomic(timeline) as partial:
        figure.savefig(partial, dpi=DPI)
    text = page(explanation, shown, frames, crop, truth)
    with atomic(player) as partial:
        partial.write_text(text, encoding="utf-8")


def page(
    explanation: Explanation, shown: Sequence[int], frames: NDArray[np.uint8], crop: Crop, truth: Tensor | None
) -> str:
    """The player: the strongest frame of each of at most ``PAGE_FRAMES`` equal parts of the clip.

    Where that takes more than ``PAGE_BYTES``, frames are reduced to a shorter edge of ``PAGE_EDGE`` pixels; where it is
    not enough, the parts are fewer and longer. Perturbation's masks are explanations of their own, one per area.

    Args:
        explanation: what to show.
        shown: positions in it that may be shown.
        frames: those at these positions, ``(len(shown), H, W, 3)``.
        crop: of the frames, which the maps cover.
        truth: bool ``(T,)``.
    """
    parts, masks = explanation.parts, explanation.masks
    label, probability = explanation.labels[explanation.target], explanation.probabilities[explanation.target]
    predictions = [(name, share) for _, name, share in explanation.top(PAGE_CLASSES)]
    if explanation.class_specific and (label, probability) not in predictions:
        predictions.append((label, probability))

    def made(few: Sequence[int], edge: int) -> str:
        at = [shown[position] for position in few]
        maps: dict[str, Attributions] = {
            explanation.kind: VideoAttribution(parts.joint[:, at], parts.spatial, parts.temporal[:, at])
        }
        if masks is not None:
            maps |= {f"mask, area {area:g}": mask[at] for area, mask in zip(masks.areas, masks.masks, strict=True)}
        indices = [explanation.indices[position] for position in at]
        return to_html(
            frames[few],
            maps,
            sign=SIGN,
            crop=crop,
            indices=indices,
            fps=explanation.steady,
            play_fps=play_rate(indices, explanation.fps),
            truth=None if truth is None else truth[at].numpy(),
            predictions=predictions,
            target=label if explanation.class_specific else "",  # an empty one is among no labels: no bar is colored
            title=title_of(explanation),
            max_size=edge,
        )

    values, edge = parts.temporal[0][shown].numpy(), EDGE
    few = key_frames(values, PAGE_FRAMES)
    while len(text := made(few, edge)) > PAGE_BYTES and len(few) > 1:
        if edge > PAGE_EDGE:
            edge = PAGE_EDGE
        else:
            few = key_frames(values, max(int(0.9 * len(few) * PAGE_BYTES / len(text)), 1))
    return text


def thinned(total: int, most: int) -> list[int]:
    """Positions of at most ``most`` of ``total`` frames, at equal steps.

    Example:
        >>> thinned(5, most=8), thinned(10, most=4)
        ([0, 1, 2, 3, 4], [0, 3, 6, 9])
    """
    return list(range(0, total, math.ceil(total / most)))


def frames_of(explanation: Explanation, shown: Sequence[int]) -> NDArray[np.uint8]:
    """The frames at these positions, no larger than a picture needs; one file frame in memory at a time."""
    if explanation.frames is not None:
        return np.stack([reduced(explanation.frames[at], EDGE) for at in shown])
    wanted = {explanation.indices[at] for at in shown}
    last = max(wanted)
    found = []
    for index, frame in io.iter_windows(explanation.video, 1):
        if index in wanted:
            found.append(reduced(frame[0], EDGE))
        if index == last:
            break
    return np.stack(found)


def play_rate(indices: Sequence[int], fps: float | None) -> float:
    """As fast as the file where that can be watched; a few frames out of a long file are shown more slowly one by one.

    Example:
        >>> play_rate(range(50), fps=25.0), play_rate([0, 50, 100], fps=25.0), play_rate([3, 4], fps=None)
        (25.0, 4.0, 4.0)
    """
    if fps is None or len(indices) < 2:
        return SLOWEST
    real = fps * (len(indices) - 1) / (indices[-1] - indices[0])
    return min(max(real, SLOWEST), FASTEST)


def title_of(explanation: Explanation) -> str:
    """One line over each picture."""
    name = explanation.labels[explanation.target]
    probability = explanation.probabilities[explanation.target]
    about = f"{name} ({probability:.0%})" if explanation.class_specific else "no class in particular"
    return f"{about}, {explanation.kind}, {explanation.video.name}"
