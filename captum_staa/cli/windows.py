"""Explaining a long video window by window, so that Ctrl-C loses nothing that is done."""

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

MOST = 8e9  # bytes of maps that are held at most


def explain_windows(method: Method, options: Options, info: io.VideoInfo, target: int | None) -> Explanation:
    """Explain every part of a video.

    A class-specific map needs one class for all windows. Where none was asked for, a first pass finds the class that is
    likeliest on average over the windows.

    Each window of perturbation is a map that sums to 1, also one in which there is nothing of the class; so it counts
    by the class's probability in it.
    """
    classifier = method.classifier
    frames = classifier.num_frames or DEFAULT_FRAMES
    span = (frames - 1) * options.frame_stride + 1
    if info.num_frames < span:
        raise ValueError(
            f"{options.video} holds {info.num_frames} frames, but a window of this model spans {span} "
            f"({frames} frames, every {options.frame_stride}); leave --windows out, or lower --frame-stride"
        )
    step = options.stride or span
    total = count_windows(info.num_frames, span, step)
    size = classifier.image_size or (info.height, info.width)
    _check_memory(min(info.num_frames, total * frames), size, 1 + method.areas)

    def windows(what: str) -> Generator[tuple[int, NDArray[np.uint8]], None, None]:
        given = io.iter_windows(options.video, frames, stride=step, frame_stride=options.frame_stride)
        yield from tqdm(given, desc=what, total=total, unit="window", delay=0.5, leave=False)

    times = io.frame_times(options.video)  # now: the file may be gone when hours have passed
    answers: dict[int, Tensor] = {}  # by window: probabilities (K,)
    if method.class_specific and target is None:
        with closing(windows("finding the class")) as given:
            for start, window in given:
                answers[start] = method.answer(classifier.preprocess(window))
        target = int(_mean(answers).argmax())

    merged, interrupted = Merged(), ""
    done: dict[int, Masks | None] = {}  # by window
    with closing(windows("explaining")) as given:
        try:
            for start, window in given:
                found = method.explain(classifier.preprocess(window), target)
                answers[start] = found.probabilities
                merged.add(range(start, start + span, options.frame_stride), *_weighed(found))
                done[start] = found.masks
                if found.interrupted:
                    interrupted = f"; in the last of them, {found.interrupted}"
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
        sampling=f"{len(indices)} frames seen, in {len(done)} windows of {frames}, one every {step}",
        windows=tuple(_row(start, answers[start], labels, target, masks) for start, masks in done.items()),
        masks=_mean_masks(stacked[:, 1:], [masks for masks in done.values() if masks is not None]),
        interrupted=interrupted,
    )


def count_windows(num_frames: int, span: int, stride: int) -> int:
    """How many windows :func:`captum_staa.io.iter_windows` gives.

    Example:
        >>> count_windows(40, span=16, stride=16), count_windows(40, span=16, stride=8), count_windows(16, 16, 16)
        (3, 4, 1)
    """
    return math.ceil((num_frames - span) / stride) + 1


def _mean(answers: dict[int, Tensor]) -> Tensor:
    return torch.stack(list(answers.values())).mean(0)


def _weighed(found: Explained) -> tuple[Tensor, Tensor]:
    """A window's map, and behind it its masks, ``(T, 1 + A, H, W)``; and its temporal part ``(T,)``."""
    joint, temporal = found.parts.joint[0], found.parts.temporal[0]
    if found.masks is None:
        return joint[:, None], temporal
    weight = found.probabilities[found.target]
    return torch.cat([weight * joint[:, None], found.masks.masks.transpose(0, 1)], dim=1), weight * temporal


def _mean_masks(merged: Tensor, each: list[Masks]) -> Masks | None:
    """One for all windows, from masks ``(T, A, H, W)``."""
    if not each:
        return None

    def mean(name: str) -> list[float]:
        return torch.tensor([getattr(masks, name) for masks in each]).mean(0).tolist()

    return replace(
        each[0],
        masks=merged.transpose(0, 1),
        visible=mean("visible"),
        whole=sum(masks.whole for masks in each) / len(each),
        kept=mean("kept"),
        deleted=mean("deleted"),
        steps=max(masks.steps for masks in each),
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
    """Refuse before the first window what would fail at the last."""
    need = 2 * 4 * maps * frames * size[0] * size[1]  # float32, once by frame and once stacked
    if need > MOST:
        raise ValueError(
            f"the maps of {frames} frames of {size[0]} x {size[1]} pixels need {need / 1e9:.0f} GB, and "
            f"{MOST / 1e9:.0f} are allowed; see fewer frames with --frame-stride, or cut the video into parts"
        )
