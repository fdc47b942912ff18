"""One finished explanation of one video file: what was asked, what came out, and how it reads on a terminal."""

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

BAR = 24  # characters of a probability of 1


@dataclass(frozen=True)
class Options:
    """What ``python -m captum_staa explain`` was asked for; the words are those of ``--help``."""

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
    """A frame that counts: its position in the explanation, its index in the file, its time and its share."""

    position: int
    index: int
    time: float | None  # seconds; None where the file does not say
    temporal: float


@dataclass(frozen=True)
class Masks:
    """What perturbation learned, one mask for each of A areas; over a long video, means of its windows."""

    masks: Tensor  # (A, T, H, W) in [0, 1], float32 on the CPU
    areas: list[float]  # (A,), as asked
    scale: str  # of the objective: "logit" where the model's answer is one output and no probability
    visible: list[float]  # (A,), the part of the volume that each leaves
    whole: float  # the target's probability in the whole clip; or its output, by the scale
    kept: list[float]  # (A,), the same of what each mask shows
    deleted: list[float]  # (A,), the same of what it leaves
    steps: int  # of learning, when it was last looked at; the most of any window

    def scores(self) -> dict[str, Any]:
        """The numbers alone, area by area."""
        rows = zip(self.areas, self.visible, self.kept, self.deleted, strict=True)
        return {
            "steps": self.steps,
            "scale": self.scale,
            "whole": self.whole,
            "areas": [dict(zip(("area", "visible", "kept", "deleted"), row, strict=True)) for row in rows],
        }


@dataclass(frozen=True)
class Explanation:
    """Attributions of T frames of a file, and all that has to be known to read them."""

    video: Path
    info: VideoInfo
    model: str
    method: str  # how it was computed, such as "STAA(mode='relevance', rule='decomposition')"
    kind: str  # the same in two words
    settings: dict[str, Any]  # its options by name, where the description does not hold them all
    class_specific: bool  # whether the maps are about the target, or about no class in particular
    layout: str  # order of the axes of the model's clips
    labels: list[str]  # (K,)
    probabilities: list[float]  # (K,); over a long video the mean of its windows
    target: int
    target_given: bool
    indices: list[int]  # (T,), in the file
    times: list[float] | None  # (T,), seconds from the file's first frame; None where it does not say
    parts: VideoAttribution  # joint (1, T, H, W), spatial (1, H, W), temporal (1, T), float32 on the CPU
    crop: tuple[float, float, float, float]  # top, left, height, width: where the maps lie in the file's frames
    apart: int  # key frames are at least so many of the T frames apart
    sampling: str
    frames: NDArray[np.uint8] | None = None  # (T, h, w, 3); None where they are read again for the pictures
    windows: tuple[dict[str, Any], ...] = ()
    masks: Masks | None = None  # of perturbation
    interrupted: str = ""  # what was left undone, if anything

    @property
    def fps(self) -> float | None:
        """Frames per second as the file announces them; None where it does not say."""
        return self.info.fps if math.isfinite(self.info.fps) and self.info.fps > 0 else None

    @property
    def steady(self) -> float | None:
        """The same where every frame is shown at its index over it; None where frames last unequally."""
        fps = self.fps
        if fps is None or self.times is None:
            return None
        off = max(abs(time - index / fps) for index, time in zip(self.indices, self.times, strict=True))
        return fps if off < 1.5 / fps else None

    def time(self, index: int) -> float | None:
        """Seconds from the file's first frame to one of ``indices``."""
        return None if self.times is None else self.times[self.indices.index(index)]

    def top(self, count: int) -> list[tuple[int, str, float]]:
        """The likeliest classes as (class index, label, probability)."""
        order = sorted(range(len(self.labels)), key=lambda k: -self.probabilities[k])
        return [(k, self.labels[k], self.probabilities[k]) for k in order[:count]]

    def key_frames(self, count: int = 5) -> list[KeyFrame]:
        """The frames that count most; none where nothing counts."""
        temporal = self.parts.temporal[0].tolist()
        return [
            KeyFrame(at, self.indices[at], None if self.times is None else self.times[at], temporal[at])
            for at in strongest(temporal, count, self.apart)
        ]

    def subject(self) -> str:
        """What the maps are about."""
        return self.labels[self.target] if self.class_specific else "no class in particular"


def strongest(values: Sequence[float], count: int, apart: int) -> list[int]:
    """Positions of the largest values, largest first, at least ``apart`` from each other and half as large as the top.

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
    """``"1.23 s"``, or ``"frame 37"`` where the file does not say when it is shown."""
    time = explanation.time(index)
    return f"frame {index}" if time is None else f"{time:.2f} s"


def bar(share: float, encoding: str | None = "utf-8") -> str:
    """A probability as a bar.

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
    """What the terminal shows of an explanation: the answer, what was explained, and when."""
    info, indices = explanation.info, explanation.indices
    length = f"{info.num_frames} frames" + (
        "" if explanation.steady is None else f", {info.num_frames / info.fps:.1f} s"
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
        why = "as asked" if explanation.target_given else "the likeliest class"
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
        lines.append(f"when: no frame speaks for {explanation.subject()}, as far as this method tells")
    else:
        moments = [f"{moment(explanation, frame.index)} ({frame.temporal / mean:.1f}x)" for frame in key]
        span = f"{moment(explanation, indices[0])} to {moment(explanation, indices[-1])}"
        signed = " magnitude" if bool((explanation.parts.temporal < 0).any()) else ""
        lines.append(f"when: {', '.join(moments)} the mean{signed} of {len(indices)} frames from {span}")
    return "\n".join(lines)


def _learned(masks: Masks, subject: str, windows: bool) -> list[str]:
    """A table of what each mask does to the answer."""
    probable = masks.scale != "logit"

    def score(value: float) -> str:
        return f"{value:.1%}" if probable else f"{value:.4g}"

    rows = [("area asked", "visible", "kept", "deleted")]
    for area, visible, kept, deleted in zip(masks.areas, masks.visible, masks.kept, masks.deleted, strict=True):
        rows.append((f"{area:.3g}", f"{visible:.3g}", score(kept), score(deleted)))
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    off = any(abs(visible - area) > area / 2 for area, visible in zip(masks.areas, masks.visible, strict=True))
    what = f"the probability of {subject}" if probable else f"the output {subject}"
    return [
        f"masks after {masks.steps} steps; {what}{', on average over windows' if windows else ''}: "
        f"{score(masks.whole)} of the whole, and where a mask's area alone is kept, or deleted",
        *("  " + "  ".join(cell.rjust(n) for cell, n in zip(row, wide, strict=True)) for row in rows),
        *(
            ["  masks are not of the areas asked yet, and maps are blurred by that; --iterations N goes on"]
            if off
            else []
        ),
    ]
