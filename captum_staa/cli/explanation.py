"""The explanation of one video file: its options, its results and its report on the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from captum_staa.io import VideoInfo
from captum_staa.result import VideoAttribution

UNSEEN_SECONDS, UNSEEN_FRAMES = 1.0, 30  # longer gaps between the seen frames are reported, with advice
BAR = 24  # length in characters of the bar of probability 1


@dataclass(frozen=True)
class Sampling:
    """Which frames of the video are explained."""

    kind: str | None = None  # "uniform", "dense" or "stride"; None is "uniform"
    windows: bool = False  # whether the whole video is explained window by window
    stride: int | None = None  # frames between window starts, or between the frames of "stride"
    frame_stride: int = 1  # of the frames within a window


@dataclass(frozen=True)
class Options:
    """Options of ``python -m captum_staa explain``, as described by ``--help``."""

    video: Path
    model: str
    out: Path
    method: str | None = None  # None is the first of methods.DEFAULTS that applies to the model
    method_options: dict[str, Any] = field(default_factory=dict)  # by name, only those that were passed
    target: str | None = None
    versus: str | None = None  # class whose output is subtracted, or "rest"
    sampling: Sampling = Sampling()
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
    settings: dict[str, Any] = field(default_factory=dict)  # objective, regularizer and number of iterations

    def scores(self) -> dict[str, Any]:
        """Return the numbers without the masks and the settings, by area."""
        rows = zip(self.areas, self.visible, self.kept, self.removed, strict=True)
        return {
            "steps": self.steps,
            "scale": self.scale,
            "whole": self.whole,
            "areas": [dict(zip(("area", "visible", "kept", "removed"), row, strict=True)) for row in rows],
        }


@dataclass(frozen=True)
class SampledVideo:
    """T frames of a video file."""

    path: Path
    info: VideoInfo
    indices: list[int]  # (T,), frame numbers in the file
    times: list[float] | None  # (T,), seconds from the first frame of the file; None if it has no timestamps
    description: str  # of the choice of frames
    crop: tuple[float, float, float, float]  # top, left, height, width of the maps in the frames of the file
    frames: NDArray[np.uint8] | None = None  # (T, h, w, 3); None if they are read from the file again for the pictures

    @property
    def fps(self) -> float | None:
        """Frames per second from the header of the file; None if it is missing there."""
        return self.info.fps if math.isfinite(self.info.fps) and self.info.fps > 0 else None

    @property
    def constant_fps(self) -> float | None:
        """``fps`` if the frame rate is constant, so that frame i is shown at i / fps seconds; otherwise None."""
        fps = self.fps
        if fps is None or self.times is None:
            return None
        deviation = max(abs(time - index / fps) for index, time in zip(self.indices, self.times, strict=True))
        return fps if deviation < 1.5 / fps else None

    def coverage(self) -> str:
        """Return which frames were seen, with advice if much of the video was not."""
        shown = f"{len(self.indices):,} of {self.info.num_frames:,} frames".replace(",", " ") + f", {self.description}"
        gap = (self.indices[-1] - self.indices[0]) / max(len(self.indices) - 1, 1)  # in frames
        if gap <= 1:
            return shown
        fps = self.constant_fps
        if fps is None and self.times is not None:
            shown += f", from {self.times[0]:.2f} s to {self.times[-1]:.2f} s"
        seconds = 0.0 if fps is None else gap / fps
        far = gap > UNSEEN_FRAMES if fps is None else seconds > UNSEEN_SECONDS
        step = f"{gap:.0f} frames" if fps is None else f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
        return f"{shown}: one frame per {step}" + "; use --windows to explain the whole video" * far

    def moment(self, index: int) -> str:
        """Return the time of frame ``index`` such as ``"1.23 s"``, or ``"frame 37"`` without timestamps."""
        return f"frame {index}" if self.times is None else f"{self.times[self.indices.index(index)]:.2f} s"


@dataclass(frozen=True)
class Prediction:
    """What a model predicts for a video."""

    model: str
    layout: str  # order of the axes of the model input
    labels: list[str]  # (K,)
    probabilities: list[float]  # (K,); for windows, the mean over them
    windows: tuple[dict[str, Any], ...] = ()  # prediction of each window
    notice: str = ""  # what must be said with these probabilities, such as that the model is a toy model

    def top(self, count: int) -> list[tuple[int, str, float]]:
        """Return the most probable classes as (class index, label, probability)."""
        order = sorted(range(len(self.labels)), key=lambda k: -self.probabilities[k])
        return [(k, self.labels[k], self.probabilities[k]) for k in order[:count]]


@dataclass(frozen=True)
class MethodUsed:
    """The method of an explanation; as text, its name and the options that the user passed."""

    name: str
    options: dict[str, Any]
    class_specific: bool  # whether the maps explain the target, or the model without a class
    apart: int  # minimum distance between key frames, in positions
    chosen: bool = False  # whether it is the default for the model, and not a choice of the user

    def __str__(self) -> str:
        return ", ".join([self.name, *(f"{name}={value!r}" for name, value in self.options.items())])


@dataclass(frozen=True)
class Explanation:
    """Attributions of T frames of a video file, with the information needed to interpret them."""

    video: SampledVideo
    prediction: Prediction
    method: MethodUsed
    target: int  # index of the explained class
    target_given: bool  # whether the user passed --target
    maps: VideoAttribution  # joint (1, T, H, W), spatial (1, H, W), temporal (1, T), float32 on the CPU
    masks: Masks | None = None  # of learned masks
    interrupted: str = ""  # what is missing after Ctrl-C; empty if complete
    other: int | None = None  # index of the class of --versus; None without it, and for "rest"
    other_maps: VideoAttribution | None = None  # why that class and not the target, as ``maps``; None after Ctrl-C

    @property
    def classes(self) -> dict[str, VideoAttribution]:
        """The maps of the two classes of ``--versus`` by their labels; empty without it."""
        if self.other is None or self.other_maps is None:
            return {}
        return {self.label: self.maps, self.prediction.labels[self.other]: self.other_maps}

    @property
    def label(self) -> str:
        """The label of the target."""
        return self.prediction.labels[self.target]

    @property
    def probability(self) -> float:
        """The probability of the target."""
        return self.prediction.probabilities[self.target]

    @property
    def subject(self) -> str:
        """The label of the explained class, or a text for maps without a class."""
        return self.label if self.method.class_specific else "no class in particular"

    def key_frames(self, count: int = 5) -> list[KeyFrame]:
        """Return the frames with the highest temporal attribution; an empty list if none is positive."""
        temporal, video = self.maps.temporal[0].tolist(), self.video
        return [
            KeyFrame(at, video.indices[at], None if video.times is None else video.times[at], temporal[at])
            for at in strongest(temporal, count, self.method.apart)
        ]


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
    video, prediction, subject = explanation.video, explanation.prediction, explanation.subject
    info = video.info
    length = f"{info.num_frames} frames" + (
        "" if video.constant_fps is None else f", {info.num_frames / info.fps:.1f} s"
    )
    lines = [
        f"{video.path.name}: {length}, {info.width} x {info.height}",
        f"seen: {video.coverage()}",
        f"{prediction.model} answers" + (", on average over its windows," if prediction.windows else ""),
    ]
    rows = prediction.top(count)
    wide = max(len(label) for _, label, _ in rows)
    for _, label, probability in rows:
        lines.append(f"  {label:<{wide}}  {probability:6.1%}  {bar(probability, encoding)}".rstrip())
    if prediction.notice:
        lines.append(f"  {prediction.notice}")
    why = "as requested" if explanation.target_given else "the predicted class"
    given = f" ({why})" if explanation.method.class_specific else ""
    chosen = ", the default for this model" if explanation.method.chosen else ""
    lines.append(f"explained: {subject}{given}, by {explanation.method}{chosen}")
    if explanation.masks is not None:
        lines += _learned(explanation.masks, subject, bool(prediction.windows))
    key = explanation.key_frames()
    temporal = explanation.maps.temporal
    mean = float(temporal.abs().mean())
    if mean == 0:
        lines.append("strongest: no frame; the attributions are zero everywhere")
    elif not key:
        lines.append(f"strongest: no frame has evidence for {subject}, according to this method")
    else:
        key = [key[0], *(frame for frame in key[1:] if frame.temporal >= mean)]  # less is not strong
        first, *others = (f"{frame.temporal / mean:.1f} times" for frame in key)
        average = "the average magnitude of a frame" if bool((temporal < 0).any()) else "the average frame"
        times = [f"{first} {average}", *others]
        moments = [f"{video.moment(frame.index)} ({much})" for frame, much in zip(key, times, strict=True)]
        lines.append(f"strongest: {', '.join(moments)}")
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
