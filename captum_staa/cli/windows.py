"""Explaining a long video window by window, so that Ctrl-C loses nothing that is done."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from captum_staa import io
from captum_staa.attr import STAA
from captum_staa.cli.explanation import Explanation, Options
from captum_staa.cli.prepare import about, answer, explain_clip, label_names
from captum_staa.layout import SpaceTime, from_joint

MOST = 8e9  # bytes of maps that are held at most


class Merged:
    """Maps of overlapping windows, merged by their mean.

    Example:
        >>> merged = Merged()
        >>> for start, level in ((0, 1.0), (2, 3.0)):
        ...     merged.add(range(start, start + 4), torch.full((4, 1, 1), level), torch.full((4,), level))
        >>> indices, joint, temporal = merged.result()
        >>> indices, temporal.tolist()
        ([0, 1, 2, 3, 4, 5], [1.0, 1.0, 2.0, 2.0, 3.0, 3.0])
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, float, int]] = {}  # by frame: sum of maps (H, W), of temporal, how many

    def add(self, indices: range, joint: Tensor, temporal: Tensor) -> None:
        """One window's ``(T, H, W)`` and ``(T,)``. Each frame's mean stays right wherever an interrupt falls."""
        for index, one, weight in zip(indices, joint, temporal.tolist(), strict=True):
            total, weights, count = self._held.get(index, (torch.zeros_like(one), 0.0, 0))
            self._held[index] = (total + one, weights + weight, count + 1)

    def result(self) -> tuple[list[int], Tensor, Tensor]:
        """Frames' indices in order, ``(T, H, W)`` and ``(T,)``."""
        held = [(index, *self._held[index]) for index in sorted(self._held)]
        joint = torch.stack([total / count for _, total, _, count in held])
        temporal = torch.tensor([weight / count for _, _, weight, count in held])
        return [index for index, *_ in held], joint, temporal


def explain_windows(explainer: STAA, options: Options, info: io.VideoInfo, target: int | None) -> Explanation:
    """Explain every part of a video.

    A class-specific map needs one class for all windows. Where none was asked for, a first pass finds the class that is
    likeliest on average over the windows.
    """
    classifier = explainer.forward_func
    frames = classifier.num_frames or 16
    span = (frames - 1) * options.frame_stride + 1
    if info.num_frames < span:
        raise ValueError(
            f"{options.video} holds {info.num_frames} frames, but a window of this model spans {span} "
            f"({frames} frames, every {options.frame_stride}); leave --windows out, or lower --frame-stride"
        )
    answers: dict[int, Tensor] = {}  # by window: probabilities (K,)
    if explainer.mode == "relevance" and target is None:
        for start, window in _windows(options, info, frames, "finding the class"):
            answers[start] = answer(explainer, classifier.preprocess(window))
        target = int(_mean(answers).argmax())

    merged, done = Merged(), []
    interrupted = ""
    try:
        for start, window in _windows(options, info, frames, "explaining"):
            clip = classifier.preprocess(window)
            if not done:
                _check_memory(clip, info, options)
            parts, probabilities, _ = explain_clip(explainer, clip, target)
            answers[start] = probabilities
            merged.add(
                range(start, start + span, options.frame_stride), parts.joint[0].float(), parts.temporal[0].float()
            )
            done.append(start)
    except KeyboardInterrupt:
        if not done:
            raise
        total = count_windows(info.num_frames, span, options.stride or span)
        interrupted = f"{len(done)} of about {total} windows are done and kept, the rest is missing"
    indices, joint, temporal = merged.result()
    parts = from_joint(joint[None])
    if explainer.mode == "released":  # its temporal part is a signal of its own, not a sum
        parts = SpaceTime(parts.joint, parts.spatial, temporal[None])
    probabilities = _mean(answers)
    target = int(probabilities.argmax()) if target is None else target
    labels = label_names(classifier, len(probabilities))
    every = f"every {options.stride or span} frames"
    return Explanation(
        **about(explainer, options, info),
        labels=labels,
        probabilities=probabilities.tolist(),
        target=target,
        indices=indices,
        parts=parts,
        apart=max(frames // 2, 1),
        sampling=f"{len(indices)} frames seen, in {len(done)} windows of {frames}, one {every}",
        windows=tuple(_row(start, answers[start], labels, target) for start in done),
        interrupted=interrupted,
    )


def count_windows(num_frames: int, span: int, stride: int) -> int:
    """How many windows :func:`captum_staa.io.iter_windows` gives.

    Example:
        >>> count_windows(40, span=16, stride=16), count_windows(40, span=16, stride=8), count_windows(16, 16, 16)
        (3, 4, 1)
    """
    return math.ceil((num_frames - span) / stride) + 1


def _windows(
    options: Options, info: io.VideoInfo, frames: int, what: str
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """The windows of the file, under a progress bar."""
    span = (frames - 1) * options.frame_stride + 1
    total = count_windows(info.num_frames, span, options.stride or span)
    windows = io.iter_windows(options.video, frames, stride=options.stride, frame_stride=options.frame_stride)
    yield from tqdm(windows, desc=what, total=total, unit="window", delay=0.5, leave=False)


def _mean(answers: dict[int, Tensor]) -> Tensor:
    return torch.stack(list(answers.values())).mean(0)


def _row(start: int, probabilities: Tensor, labels: list[str], target: int) -> dict[str, Any]:
    best = int(probabilities.argmax())
    return {
        "start": start,
        "label": labels[best],
        "probability": float(probabilities[best]),
        "target_probability": float(probabilities[target]),
    }


def _check_memory(clip: Tensor, info: io.VideoInfo, options: Options) -> None:
    """Refuse at the first window what would fail at the last."""
    height, width = clip.shape[-2:]
    step = math.gcd(options.frame_stride, options.stride or 1) if options.stride else 1
    need = info.num_frames / step * height * width * 4 * 2  # twice: as a dictionary, and stacked
    if need > MOST:
        raise ValueError(
            f"the maps of {info.num_frames} frames of {height} x {width} need {need / 1e9:.0f} GB, more than "
            f"{MOST / 1e9:.0f}; cut the video into parts, or take --frame-stride and --stride with a common divisor"
        )
