"""The pictures of an explanation, drawn over the file's own frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from captum_staa import io
from captum_staa.cli.explanation import Explanation
from captum_staa.layout import SpaceTime
from captum_staa.visualization import save_animation, show_frames, show_timeline

EDGE = 360  # pixels of the shorter edge of the frames in pictures, at most
MOVING = 360  # frames of a moving picture, at most
SHEET = 24  # frames of a sheet, at most
SLOWEST, FASTEST = 4.0, 30.0  # frames per second
DPI = 150


def draw(
    explanation: Explanation, overlay: Path, sheet: Path, timeline: Path, *, overwrite: bool, truth: Tensor | None
) -> None:
    """Write the three pictures.

    Args:
        explanation: what to draw.
        overlay: the moving picture.
        sheet: the contact sheet.
        timeline: the curve over time with key frames.
        overwrite: whether these may be replaced.
        truth: bool ``(T,)``, shaded in the timeline.
    """
    total, fps = len(explanation.indices), explanation.fps
    shown = thinned(total, MOVING)
    frames = frames_of(explanation, shown)
    joint = explanation.parts.joint[0][shown]
    indices = [explanation.indices[at] for at in shown]
    scale = frames.shape[1] / explanation.info.height, frames.shape[2] / explanation.info.width
    top, left, height, width = explanation.crop
    crop = (top * scale[0], left * scale[1], height * scale[0], width * scale[1])

    save_animation(overlay, frames, joint, crop=crop, fps=play_rate(indices, fps), overwrite=overwrite)
    title = title_of(explanation)
    few = strongest_of_parts(explanation.parts.temporal[0][shown].numpy(), SHEET)
    figure, _ = show_frames(
        frames[few], joint[few], crop=crop, indices=[indices[at] for at in few], fps=fps, title=title, use_pyplot=False
    )
    with io.atomic(sheet, overwrite) as partial:
        figure.savefig(partial, dpi=DPI)
    temporal = explanation.parts.temporal[:, shown]
    figure, _ = show_timeline(
        SpaceTime(explanation.parts.joint, explanation.parts.spatial, temporal),
        clip=frames,
        fps=fps,
        indices=indices,
        truth=None if truth is None else truth[shown].numpy(),
        title=title,
        use_pyplot=False,
    )
    with io.atomic(timeline, overwrite) as partial:
        figure.savefig(partial, dpi=DPI)


def thinned(total: int, most: int) -> list[int]:
    """Positions of at most ``most`` of ``total`` frames, at equal steps.

    Example:
        >>> thinned(5, most=8), thinned(10, most=4)
        ([0, 1, 2, 3, 4], [0, 3, 6, 9])
    """
    return list(range(0, total, math.ceil(total / most)))


def strongest_of_parts(values: NDArray[np.floating], parts: int) -> list[int]:
    """Positions of the largest value in each of at most this many equal parts.

    Example:
        >>> strongest_of_parts(np.array([0.0, 5.0, 1.0, 0.0, 0.0, 3.0]), parts=2)
        [1, 5]
    """
    split = np.array_split(np.arange(len(values)), min(parts, len(values)))
    return [int(part[values[part].argmax()]) for part in split]


def frames_of(explanation: Explanation, shown: Sequence[int]) -> NDArray[np.uint8]:
    """The frames at these positions, no larger than a picture needs; one file frame in memory at a time."""
    if explanation.frames is not None:
        return np.stack([shrunk(explanation.frames[at]) for at in shown])
    wanted = {explanation.indices[at] for at in shown}
    last = max(wanted)
    found = []
    for index, frame in io.iter_windows(explanation.video, 1):
        if index in wanted:
            found.append(shrunk(frame[0]))
        if index == last:
            break
    return np.stack(found)


def shrunk(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``(H, W, 3)`` with a shorter edge of at most ``EDGE`` pixels."""
    height, width = frame.shape[:2]
    factor = EDGE / min(height, width)
    if factor >= 1:
        return frame
    size = max(round(width * factor), 1), max(round(height * factor), 1)
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))


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
