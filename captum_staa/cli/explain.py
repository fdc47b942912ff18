"""``python -m captum_staa explain``: explain the prediction of a model for a video file; write numbers and pictures."""

from __future__ import annotations

import math
import sys
import time
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
from captum_staa.cli import INTERRUPTED
from captum_staa.cli.explanation import Explanation, Masks, Options, Prediction, SampledVideo, report
from captum_staa.cli.loading import load
from captum_staa.cli.methods import ClipMethod, Explained, check_options, copies_of
from captum_staa.cli.output import refuse_to_overwrite, write
from captum_staa.models import VideoClassifier
from captum_staa.models.classifier import DEFAULT_FRAMES
from captum_staa.result import VideoAttribution
from captum_staa.stream.run import Merged

SAMPLING = {
    "uniform": "spread evenly over the video",
    "dense": "consecutive frames from its middle",
    "stride": "every {stride} frames from its start",
}
MOST = 8e9  # maximum size of the maps of all windows in memory, in bytes


def run(options: Options, top: int = 5) -> int:
    """Explain a video, print a report with the ``top`` classes, and write the files. Return the exit code."""
    started = time.perf_counter()
    explanation = explain(options)
    print(report(explanation, top, sys.stdout.encoding), flush=True)
    if explanation.interrupted:
        print(f"interrupted: {explanation.interrupted}", file=sys.stderr)
    files = write(explanation, options.out, overwrite=options.overwrite)
    print(f"written to {options.out}: {', '.join(path.name for path in files)} ({time.perf_counter() - started:.1f} s)")
    return INTERRUPTED if explanation.interrupted else 0


def explain(options: Options) -> Explanation:
    """Return the explanation of one video file. Only a progress bar is printed, and no files are written.

    Args:
        options: the options of the command.

    Returns:
        The explanation. It is partial after Ctrl-C during the optimization of masks, or after Ctrl-C once the first
        of several windows is finished.

    Raises:
        ValueError, OSError: the file, the model, the target or an option is invalid. FileExistsError if the folder
            contains an earlier explanation and ``overwrite`` is False.
        KeyboardInterrupt: Ctrl-C before there is a result to keep.
    """
    _check(options)
    info = io.probe(options.video)
    refuse_to_overwrite(options.out, options.overwrite)
    form = "{desc} (step {n_fmt} of {total_fmt}, {elapsed})"
    with tqdm(total=3, initial=1, delay=1, leave=False, bar_format=form, desc="loading the model") as steps:
        classifier = load(options.model, options.device)
        copies = copies_of(3 * (classifier.num_frames or DEFAULT_FRAMES) * math.prod(_size(classifier, info)))
        method = ClipMethod(classifier, options.method, options.method_options, copies, options.versus)
        target = None if options.target is None else classifier.class_index(options.target)
        if options.sampling.windows:
            steps.close()
            return _explain_windows(method, options, info, target)
        steps.set_description_str("reading the video", refresh=False)
        steps.update()
        sampling, step = options.sampling.kind or "uniform", options.sampling.stride or 1
        video = io.read_video(
            options.video,
            classifier.num_frames or DEFAULT_FRAMES,
            sampling,  # type: ignore[arg-type]  # read_video checks it
            stride=step if sampling == "stride" else 1,
        )
        times = io.frame_times(options.video)
        clip = classifier.preprocess(video.frames)
        steps.set_description_str("explaining", refresh=False)
        steps.update()
        if method.shows_progress:
            steps.close()
        if target is None:
            target = int(method.answer(clip).argmax())
        result = method.explain(clip, target)
    return Explanation(
        video=SampledVideo(
            path=options.video,
            info=info,
            indices=video.indices.tolist(),
            times=_times_at(times, info, video.indices.tolist()),
            description=SAMPLING[sampling].format(stride=step),
            crop=classifier.crop_box(info.height, info.width),
            frames=video.frames,
        ),
        prediction=_prediction(options, classifier, result.probabilities),
        method=method.used,
        target=target,
        target_given=options.target is not None,
        maps=result.maps,
        masks=result.masks,
        interrupted=result.interrupted,
        other=method.other,
        other_maps=result.other,
    )


def _explain_windows(method: ClipMethod, options: Options, info: io.VideoInfo, target: int | None) -> Explanation:
    """Return the explanation of a whole video.

    Class-specific maps need the same class for all windows. Without a target, a first pass finds the class with the
    highest mean probability over the windows.

    The map of learned masks sums to 1 in each window, also in windows without evidence for the class. Therefore each
    window is weighted by the probability of the class.
    """
    classifier, frame_stride = method.classifier, options.sampling.frame_stride
    frames = classifier.num_frames or DEFAULT_FRAMES
    span = (frames - 1) * frame_stride + 1
    if info.num_frames < span:
        raise ValueError(
            f"{options.video} must have at least {span} frames for a window of this model ({frames} frames with "
            f"--frame-stride {frame_stride}), got {info.num_frames}. Drop --windows, or decrease --frame-stride."
        )
    step = options.sampling.stride or span
    total = count_windows(info.num_frames, span, step)
    maps = 1 + method.masks + (method.other is not None)
    _check_memory(min(info.num_frames, total * frames), _size(classifier, info), maps)

    def windows(what: str) -> Generator[tuple[int, NDArray[np.uint8]], None, None]:
        pieces = io.iter_windows(options.video, frames, stride=step, frame_stride=frame_stride)
        yield from tqdm(pieces, desc=what, total=total, unit="window", delay=0.5, leave=False)

    times = io.frame_times(options.video)  # read now: the run may take hours, and the file may be deleted meanwhile
    answers: dict[int, Tensor] = {}  # by window: probabilities (K,)
    if method.used.class_specific and target is None:
        with closing(windows("finding the class")) as pieces:
            for start, window in pieces:
                answers[start] = method.answer(classifier.preprocess(window))
        target = int(_mean(answers).argmax())

    merged, opposed, interrupted = Merged(), Merged(), ""
    done: dict[int, Masks | None] = {}  # by window
    with closing(windows("explaining")) as pieces:
        try:
            for start, window in pieces:
                result = method.explain(classifier.preprocess(window), target or 0, start)
                answers[start] = result.probabilities
                merged.add(range(start, start + span, frame_stride), *_weighted(result, target or 0))
                if result.other is not None:
                    opposed.add(
                        range(start, start + span, frame_stride), result.other.joint[0], result.other.temporal[0]
                    )
                done[start] = result.masks
                if result.interrupted:
                    interrupted = f"; in the last of them, {result.interrupted}"
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            if not done:
                raise
            interrupted = f"{len(done)} of {total} windows are done and kept, the others are missing{interrupted}"
    indices, (stacked, temporal) = merged.result()
    joint = stacked[None, :, 0]
    probabilities = _mean(answers)
    target = int(probabilities.argmax()) if target is None else target
    prediction = _prediction(options, classifier, probabilities)
    other = None
    if len(opposed) == len(indices):  # not after Ctrl-C, between the two classes of a window
        _, (against, when) = opposed.result()
        other = VideoAttribution(against[None], against[None].sum(1), when[None])
    rows = [_row(start, answers[start], prediction.labels, target, masks) for start, masks in done.items()]
    return Explanation(
        video=SampledVideo(
            path=options.video,
            info=info,
            indices=indices,
            times=_times_at(times, info, indices),
            description=f"in {len(done)} windows of {frames}, one every {step} frames",
            crop=classifier.crop_box(info.height, info.width),
        ),
        prediction=replace(prediction, windows=tuple(rows)),
        method=replace(method.used, apart=max(frames // 2, 1)),
        target=target,
        target_given=options.target is not None,
        maps=VideoAttribution(joint, joint.sum(1), temporal[None]),
        masks=_mean_masks(stacked[:, 1:], [masks for masks in done.values() if masks is not None]),
        interrupted=interrupted,
        other=method.other,
        other_maps=other,
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


def _weighted(result: Explained, target: int) -> tuple[Tensor, Tensor]:
    """Return the map of a window followed by its masks, ``(T, 1 + A, H, W)``, and the temporal part ``(T,)``."""
    joint, temporal = result.maps.joint[0], result.maps.temporal[0]
    if result.masks is None:
        return joint[:, None], temporal
    # a score is not a probability, so all windows count equally
    weight = result.probabilities[target] if result.masks.scale != "logit" else 1.0
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


def _check(options: Options) -> None:
    """Raise ValueError if options contradict each other, before the model is loaded."""
    check_options(options.method, options.method_options)
    sampling = options.sampling
    if sampling.windows and sampling.kind is not None:
        raise ValueError(
            f"--windows cannot be combined with --sampling, because it uses all of the video, got --sampling "
            f"{sampling.kind}. Drop --sampling {sampling.kind}, or --windows."
        )
    if sampling.stride is not None and not sampling.windows and sampling.kind != "stride":
        raise ValueError(
            f"--stride needs --windows or --sampling stride, got --stride {sampling.stride} without them. Pass one of "
            f"them, or drop --stride."
        )
    if sampling.frame_stride != 1 and not sampling.windows:
        raise ValueError(
            f"--frame-stride needs --windows, got --frame-stride {sampling.frame_stride} without it. Pass --windows, "
            f"or use --sampling stride --stride N."
        )
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out must be a folder, got the file {options.out}. Choose another name.")


def _prediction(options: Options, classifier: VideoClassifier, probabilities: Tensor) -> Prediction:
    labels = classifier.label_names(len(probabilities))
    return Prediction(options.model, classifier.layout.axes, labels, probabilities.tolist(), notice=classifier.notice)


def _size(classifier: VideoClassifier, info: io.VideoInfo) -> tuple[int, int]:
    """Return height and width of the input of the model, in pixels."""
    return classifier.image_size or (info.height, info.width)


def _times_at(times: NDArray[np.float64], info: io.VideoInfo, indices: list[int]) -> list[float] | None:
    """Return the times of these frames in seconds; None if the timestamps of the file are missing or incomplete."""
    if len(times) != info.num_frames or max(indices) >= len(times) or not np.isfinite(times).all():
        return None
    return times[indices].tolist()
