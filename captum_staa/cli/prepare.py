"""Steps before an explanation: check the options, load the model and collect what does not depend on the clip."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from captum_staa.cli.explanation import Options
from captum_staa.cli.methods import METHODS, Method
from captum_staa.io import VideoInfo
from captum_staa.models import VideoClassifier


def check(options: Options) -> None:
    """Raise ValueError if options contradict each other, before the model is loaded."""
    if options.method not in METHODS:
        raise ValueError(f"--method must be one of {', '.join(METHODS)}, got {options.method!r}")
    for method, kind in METHODS.items():
        values = {name: getattr(options, name) for name in kind.options}
        passed = [f"--{name}" for name, value in values.items() if value is not None and value is not False]
        if passed and method != options.method:
            raise ValueError(
                f"{', '.join(passed)} can only be used with --method {method}, got --method {options.method}. Drop "
                f"{'it' if len(passed) == 1 else 'them'}, or pass --method {method}."
            )
    if options.rule is not None and options.mode not in (None, "relevance"):
        raise ValueError(
            f"--rule {options.rule} can only be used with --mode relevance, got --mode {options.mode}. Drop --rule or "
            f"--mode."
        )
    if options.windows and options.sampling is not None:
        raise ValueError(
            f"--windows cannot be combined with --sampling, because it uses all of the video, got --sampling "
            f"{options.sampling}. Drop --sampling {options.sampling}, or --windows."
        )
    if options.stride is not None and not options.windows and options.sampling != "stride":
        raise ValueError(
            f"--stride needs --windows or --sampling stride, got --stride {options.stride} without them. Pass one of "
            f"them, or drop --stride."
        )
    if options.frame_stride != 1 and not options.windows:
        raise ValueError(
            f"--frame-stride needs --windows, got --frame-stride {options.frame_stride} without it. Pass --windows, or "
            f"use --sampling stride --stride N."
        )
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out must be a folder, got the file {options.out}. Choose another name.")


def load(name: str, device: str | None) -> VideoClassifier:
    """Return the classifier. It must have a preprocessing; the progress bars of transformers are hidden."""
    if device is not None:
        _check_device(device)
    with _quiet_transformers():
        classifier = VideoClassifier.from_pretrained(name, device=device)
    if classifier.preprocessing is None:
        raise ValueError(
            f"--model must be a model with a preprocessing of frames, got {name!r} without one. Copy the "
            f"preprocessor_config.json of its processor next to its config.json."
        )
    return classifier


def about(method: Method, options: Options, info: VideoInfo) -> dict[str, Any]:
    """Return the fields of an :class:`Explanation` that do not depend on the clip."""
    return {
        "video": options.video,
        "info": info,
        "model": options.model,
        "method": method.description,
        "kind": method.kind,
        "settings": method.settings,
        "class_specific": method.class_specific,
        "layout": method.classifier.layout.axes,
        "target_given": options.target is not None,
        "crop": method.classifier.crop_box(info.height, info.width),
    }


def times_at(times: NDArray[np.float64], info: VideoInfo, indices: list[int]) -> list[float] | None:
    """Return the times of these frames in seconds; None if the timestamps of the file are missing or incomplete."""
    if len(times) != info.num_frames or max(indices) >= len(times) or not np.isfinite(times).all():
        return None
    return times[indices].tolist()


def _check_device(name: str) -> None:
    try:
        torch.empty(1, device=torch.device(name))
    except (RuntimeError, AssertionError) as error:  # a torch build without CUDA raises AssertionError
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"--device must be an available device, got {name!r}, which cannot be used here ({reason}). Drop --device "
            f"to run on the CPU."
        ) from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide the progress bars of transformers, such as "Loading weights", and restore the setting afterwards."""
    try:
        from transformers.utils import logging
    except ImportError:
        yield
        return
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
