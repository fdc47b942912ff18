"""The explanation of one video file: its options, its results and its report on the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from captum_staa.io import VideoInfo
from captum_staa.result import VideoAttribution

BAR = 24  # length in characters of the bar of probability 1


@dataclass(frozen=True)
class Options:
    """Options of ``python -m captum_staa explain``, as described by ``--help``."""

    video: Path
    model: str
    out: Path
    method: str = "staa"
    mode: str | None = None
    rule: str | None = None
    layers: str | list[int] | None = None
    focus: bool = False
    preset: str | None = None
    areas: list[float] | None = None
    objective: str | None = None
    regularizer: str | None = None
    iterations: int | None = None
    weighting: str | None = None
    target: str | None = None
    sampling: str | None = None
    windows: bool = False
    stride: int | None = None
    frame_stride: int = 1
    top: int = 5
    device: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class KeyFrame:
    """One of the frames with the highest temporal attribution."""

    position: int  # in the explanation, 0..T-1
    index: int  # in the video file
    time: float | None  # seconds; None if the file has no timestamps
    temporal: float  # the temporal attribution of the frame


@dataclass(frozen=True)
class Masks:
    """The learned masks of the perturbation method, one for each of A areas. For windows, the mean over them."""

    masks: Tensor  # (A, T, H, W) in [0, 1], float32 on the CPU
    areas: list[float]  # (A,), the requested areas as fractions of the volume
    scale: str  # of the objective: "logit" if the model has a single output, which is not a probability
    visible: list[float]  # (A,), the fraction of the volume that each mask shows
    whole: float  # score of the target for the whole clip: its probability, or its output if scale is "logit"
    kept: list[float]  # (A,), the score if only the area of each mask is kept
    removed: list[float]  # (A,), the score if the area of each mask is removed
    steps: int  # optimization steps of these masks; for windows, the maximum over them

    def scores(self) -> dict[str, Any]:
        """Return the numbers without the masks, by area."""
        rows = zip(self.areas, self.visible, self.kept, self.removed, strict=True)
        return {
            "steps": self.steps,
            "scale": self.scale,
            "whole": self.whole,
            "areas": [dict(zip(("area", "visible", "kept", "removed"), row, strict=True)) for row in rows],
        }


@dataclass(frozen=True)
class Explanation:
    """Attributions of T frames of a video file, with the information needed to interpret them."""

    video: Path
    info: VideoInfo
    model: str
    method: str  # how it was computed, such as "STAA(mode='relevance', rule='decomposition')"
    kind: str  # short name of the method, such as "STAA (relevance)"
    settings: dict[str, Any]  # options by name, if ``method`` does not include all of them
    class_specific: bool  # whether the maps explain the target, or the model without a class
    layout: str  # order of the axes of the model input
    labels: list[str]  # (K,)
    probabilities: list[float]  # (K,); for windows, the mean over them
    target: int  # index of the explained class
    target_given: bool  # whether the user passed --target
    indices: list[int]  # (T,), frame numbers in the file
    times: list[float] | None  # (T,), seconds from the first frame of the file; None if it has no timestamps
    parts: VideoAttribution  # joint (1, T, H, W), spatial (1, H, W), temporal (1, T), float32 on the CPU
    crop: tuple[float, float, float, float]  # top, left, height, width of the maps in the frames of the file
    apart: int  # minimum distance between key frames, in positions
    sampling: str  # description of the sampled frames
    frames: NDArray[np.uint8] | None = None  # (T, h, w, 3); None if they are read from the file again for the pictures
    windows: tuple[dict[str, Any], ...] = ()  # prediction of each window
    masks: Masks | None = None  # of the perturbation method
    interrupted: str = ""  # what is missing after Ctrl-C; empty if complete

    @property
    def fps(self) -> float | None:
        """Frames per second from the header of the file; None if it has no frame rate."""
        return self.info.fps if math.isfinite(self.info.fps) and self.info.fps > 0 else None

    @property
    def constant_fps(self) -> float | None:
        """``fps`` if the frame rate is constant, so that frame i is shown at i / fps seconds; otherwise None."""
        fps = self.fps
        if fps is None or self.times is None:
            return None
        deviation = max(abs(time - index / fps) for index, time in zip(self.indices, self.times, strict=True))
        return fps if deviation < 1.5 / fps else None

    def time(self, index: int) -> float | None:
        """Return the seconds from the first frame of the file to frame ``index``, one of ``indices``."""
        return None if self.times is None else self.times[self.indices.index(index)]

    def top(self, count: int) -> list[tuple[int, str, float]]:
        """Return the most probable classes as (class index, label, probability)."""
        order = sorted(range(len(self.labels)), key=lambda k: -self.probabilities[k])
        return [(k, self.labels[k], self.probabilities[k]) for k in order[:count]]

    def key_frames(self, count: int = 5) -> list[KeyFrame]:
        """Return the frames with the highest temporal attribution; an empty list if none is positive."""
        temporal = self.parts.temporal[0].tolist()
        return [
            KeyFrame(at, self.indices[at], None if self.times is None else self.times[at], temporal[at])
            for at in strongest(temporal, count, self.apart)
        ]

    def subject(self) -> str:
        """Return the label of the explained class, or a text for maps without a class."""
        return self.labels[self.target] if self.class_specific else "no class in particular"


def strongest(values: Sequence[float], count: int, apart: int) -> list[int]:
    """Return the positions of the largest positive values, largest first.

    They are at least ``apart`` positions from each other, and at least half as large as the largest value.

    Example:
        >>> strongest([0.0, 5.0, 4.9, 0.1, 3.0, 1.0], count=3, apart=2)
        [1, 4]
        >>> strongest([0.0, 0.0], count=3, apart=1)
        []
    """
    chosen: list[int] = []
    for at in sorted(range(len(values)), key=lambda i: -values[i]):
        if len(chosen) == count or values[at] <= 0 or (chosen and values[at] < values[chosen[0]] / 2):
            break
        if all(abs(at - other) >= apart for other in chosen):
            chosen.append(at)
    return chosen


def moment(explanation: Explanation, index: int) -> str:
    """Return the time of a frame such as ``"1.23 s"``, or ``"frame 37"`` if the file has no timestamps."""
    time = explanation.time(index)
    return f"frame {index}" if time is None else f"{time:.2f} s"


def bar(share: float, encoding: str | None = "utf-8") -> str:
    """Return a text bar for a probability.

    Example:
        >>> bar(0.25), bar(0.25, encoding="ascii")
        ('██████', '######')
    """
    try:
        "█".encode(encoding or "ascii")
        block = "█"
    except (UnicodeEncodeError, LookupError):
        block = "#"
    return block * round(share * BAR)


def report(explanation: Explanation, count: int, encoding: str | None = "utf-8") -> str:
    """Return the report for the terminal: the prediction, the explained class and the key frames."""
    info, indices = explanation.info, explanation.indices
    length = f"{info.num_frames} frames" + (
        "" if explanation.constant_fps is None else f", {info.num_frames / info.fps:.1f} s"
    )
    lines = [
        f"{explanation.video.name}: {length}, {info.width} x {info.height}; {explanation.sampling}",
        f"{explanation.model} answers" + (", on average over its windows," if explanation.windows else ""),
    ]
    rows = explanation.top(count)
    wide = max(len(label) for _, label, _ in rows)
    for _, label, probability in rows:
        lines.append(f"  {label:<{wide}}  {probability:6.1%}  {bar(probability, encoding)}".rstrip())
    if explanation.class_specific:
        why = "as requested" if explanation.target_given else "the likeliest class"
        lines.append(f"explained: {explanation.subject()} ({why}), by {explanation.method}")
    else:
        lines.append(f"explained: {explanation.subject()}, by {explanation.method}")
    if explanation.masks is not None:
        lines += _learned(explanation.masks, explanation.subject(), bool(explanation.windows))
    key = explanation.key_frames()
    mean = float(explanation.parts.temporal.abs().mean())
    if mean == 0:
        lines.append("when: in no frame; the attributions are zero everywhere")
    elif not key:
        lines.append(f"when: no frame has evidence for {explanation.subject()}, according to this method")
    else:
        moments = [f"{moment(explanation, frame.index)} ({frame.temporal / mean:.1f}x)" for frame in key]
        span = f"{moment(explanation, indices[0])} to {moment(explanation, indices[-1])}"
        signed = " magnitude" if bool((explanation.parts.temporal < 0).any()) else ""
        lines.append(f"when: {', '.join(moments)} the mean{signed} of {len(indices)} frames from {span}")
    return "\n".join(lines)


def _learned(masks: Masks, subject: str, windows: bool) -> list[str]:
    """Return a table of the scores of each mask."""
    probable = masks.scale != "logit"

    def score(value: float) -> str:
        return f"{value:.1%}" if probable else f"{value:.4g}"

    rows = [("area", "visible", "kept", "removed")]
    for area, visible, kept, removed in zip(masks.areas, masks.visible, masks.kept, masks.removed, strict=True):
        rows.append((f"{area:.3g}", f"{visible:.3g}", score(kept), score(removed)))
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    off = any(abs(visible - area) > area / 2 for area, visible in zip(masks.areas, masks.visible, strict=True))
    what = f"the probability of {subject}" if probable else f"the output {subject}"
    return [
        f"masks after {masks.steps} steps; {what}{', on average over windows' if windows else ''}: "
        f"{score(masks.whole)} for the whole clip; in the table, if only the area of a mask is kept, or removed",
        *("  " + "  ".join(cell.rjust(n) for cell, n in zip(row, wide, strict=True)) for row in rows),
        *(
            ["  the masks have not reached the requested areas yet, which blurs the maps; increase --iterations N"]
            if off
            else []
        ),
    ]
