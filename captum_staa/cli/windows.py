"""Explain a long video window by window. After Ctrl-C, the finished windows are kept."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from captum_staa import io
from captum_staa.cli.explanation import Explanation, Masks, Options
from captum_staa.cli.methods import Explained, Method
from captum_staa.cli.prepare import about, times_at
from captum_staa.models.classifier import DEFAULT_FRAMES
from captum_staa.result import VideoAttribution
from captum_staa.stream.window import Merged

MOST = 8e9  # maximum size of the maps in memory, in bytes


def explain_windows(method: Method, options: Options, info: io.VideoInfo, target: int | None) -> Explanation:
    """Return the explanation of a whole video.

    Class-specific maps need the same class for all windows. Without a target, a first pass finds the class with the
    highest mean probability over the windows.

    The map of the perturbation method sums to 1 in each window, also in windows without evidence for the class.
    Therefore each window is weighted by the probability of the class.
    """
    classifier = method.classifier
    frames = classifier.num_frames or DEFAULT_FRAMES
    span = (frames - 1) * options.frame_stride + 1
    if info.num_frames < span:
        raise ValueError(
            f"{options.video} must have at least {span} frames for a window of this model ({frames} frames with "
            f"--frame-stride {options.frame_stride}), got {info.num_frames}. Drop --windows, or decrease "
            f"--frame-stride."
        )
    step = options.stride or span
    total = count_windows(info.num_frames, span, step)
    size = classifier.image_size or (info.height, info.width)
    _check_memory(min(info.num_frames, total * frames), size, 1 + method.areas)

    def windows(what: str) -> Generator[tuple[int, NDArray[np.uint8]], None, None]:
        pieces = io.iter_windows(options.video, frames, stride=step, frame_stride=options.frame_stride)
        yield from tqdm(pieces, desc=what, total=total, unit="window", delay=0.5, leave=False)

    times = io.frame_times(options.video)  # read now: the run may take hours, and the file may be deleted meanwhile
    answers: dict[int, Tensor] = {}  # by window: probabilities (K,)
    if method.class_specific and target is None:
        with closing(windows("finding the class")) as pieces:
            for start, window in pieces:
                answers[start] = method.answer(classifier.preprocess(window))
        target = int(_mean(answers).argmax())

    merged, interrupted = Merged(), ""
    done: dict[int, Masks | None] = {}  # by window
    with closing(windows("explaining")) as pieces:
        try:
            for start, window in pieces:
                result = method.explain(classifier.preprocess(window), target)
                answers[start] = result.probabilities
                merged.add(range(start, start + span, options.frame_stride), *_weighted(result))
                done[start] = result.masks
                if result.interrupted:
                    interrupted = f"; in the last of them, {result.interrupted}"
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            if not done:
                raise
            interrupted = f"{len(done)} of {total} windows are done and kept, the others are missing{interrupted}"
    indices, (stacked, temporal) = merged.result()
    parts = VideoAttribution.from_joint(stacked[None, :, 0])
    if method.own_time:
        parts = VideoAttribution(parts.joint, parts.spatial, temporal[None])
    probabilities = _mean(answers)
    target = int(probabilities.argmax()) if target is None else target
    labels = classifier.label_names(len(probabilities))
    return Explanation(
        **about(method, options, info),
        labels=labels,
        probabilities=probabilities.tolist(),
        target=target,
        indices=indices,
        times=times_at(times, info, indices),
        parts=parts,
        apart=max(frames // 2, 1),
        sampling=f"{len(indices)} frames seen, in {len(done)} windows of {frames}, one every {step} frames",
        windows=tuple(_row(start, answers[start], labels, target, masks) for start, masks in done.items()),
        masks=_mean_masks(stacked[:, 1:], [masks for masks in done.values() if masks is not None]),
        interrupted=interrupted,
    )


def count_windows(num_frames: int, span: int, stride: int) -> int:
    """Return the number of windows of :func:`captum_staa.io.iter_windows`.

    Example:
        >>> count_windows(40, span=16, stride=16), count_windows(40, span=16, stride=8), count_windows(16, 16, 16)
        (3, 4, 1)
    """
    return math.ceil((num_frames - span) / stride) + 1


def _mean(answers: dict[int, Tensor]) -> Tensor:
    return torch.stack(list(answers.values())).mean(0)


def _weighted(result: Explained) -> tuple[Tensor, Tensor]:
    """Return the map of a window followed by its masks, ``(T, 1 + A, H, W)``, and the temporal part ``(T,)``."""
    joint, temporal = result.parts.joint[0], result.parts.temporal[0]
    if result.masks is None:
        return joint[:, None], temporal
    weight = result.probabilities[result.target]
    return torch.cat([weight * joint[:, None], result.masks.masks.transpose(0, 1)], dim=1), weight * temporal


def _mean_masks(merged: Tensor, by_window: list[Masks]) -> Masks | None:
    """Return the mean over windows; ``merged`` are the mean masks ``(T, A, H, W)``."""
    if not by_window:
        return None

    def mean(name: str) -> list[float]:
        return torch.tensor([getattr(masks, name) for masks in by_window]).mean(0).tolist()

    return replace(
        by_window[0],
        masks=merged.transpose(0, 1),
        visible=mean("visible"),
        whole=sum(masks.whole for masks in by_window) / len(by_window),
        kept=mean("kept"),
        removed=mean("removed"),
        steps=max(masks.steps for masks in by_window),
    )


def _row(start: int, probabilities: Tensor, labels: list[str], target: int, masks: Masks | None) -> dict[str, Any]:
    best = int(probabilities.argmax())
    return {
        "start": start,
        "label": labels[best],
        "probability": float(probabilities[best]),
        "target_probability": float(probabilities[target]),
        **({} if masks is None else {"perturbation": masks.scores()}),
    }


def _check_memory(frames: int, size: tuple[int, int], maps: int) -> None:
    """Raise ValueError before the first window if the maps do not fit into memory at the last one."""
    need = 2 * 4 * maps * frames * size[0] * size[1]  # bytes of float32 maps, stored by frame and then stacked
    if need > MOST:
        raise ValueError(
            f"the maps must fit into {MOST / 1e9:.0f} GB of memory, got {frames} frames of {size[0]} x {size[1]} "
            f"pixels, which need {need / 1e9:.0f} GB. Use fewer frames with --frame-stride, or split the video."
        )
