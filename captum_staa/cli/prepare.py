"""Before anything is explained: refuse what contradicts itself, load the model, and note what is asked of it."""

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
    """Refuse what contradicts itself, before anything is loaded."""
    if options.method not in METHODS:
        raise ValueError(f"--method is one of {', '.join(METHODS)}, got {options.method!r}")
    for method, kind in METHODS.items():
        values = {name: getattr(options, name) for name in kind.options}
        given = [f"--{name}" for name, value in values.items() if value is not None and value is not False]
        if given and method != options.method:
            raise ValueError(
                f"of --method {method}: {', '.join(given)};, got --method {options.method}; drop "
                f"{'it' if len(given) == 1 else 'them'}, or pass --method {method}"
            )
    if options.rule is not None and options.mode not in (None, "relevance"):
        raise ValueError(f"--rule {options.rule} belongs to --mode relevance, got --mode {options.mode}; drop one")
    if options.windows and options.sampling is not None:
        raise ValueError(f"--windows sees every part of the video, so drop --sampling {options.sampling}, or --windows")
    if options.stride is not None and not options.windows and options.sampling != "stride":
        raise ValueError(f"--stride {options.stride} needs --windows, or --sampling stride")
    if options.frame_stride != 1 and not options.windows:
        raise ValueError(f"--frame-stride {options.frame_stride} needs --windows; or use --sampling stride --stride N")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out names a folder, but {options.out} is a file; choose another name")


def load(name: str, device: str | None) -> VideoClassifier:
    """A classifier with its preprocessing, without the progress bars of other libraries."""
    if device is not None:
        _check_device(device)
    with _quiet_transformers():
        classifier = VideoClassifier.from_pretrained(name, device=device)
    if classifier.preprocessing is None:
        raise ValueError(
            f"{name!r} does not say how frames become its clips; put the preprocessor_config.json of its processor "
            f"next to its config.json"
        )
    return classifier


def about(method: Method, options: Options, info: VideoInfo) -> dict[str, Any]:
    """The fields of an :class:`Explanation` that do not depend on the clip."""
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
    """When these frames are shown; None where the file does not say, or gives other frames than it has times for."""
    if len(times) != info.num_frames or max(indices) >= len(times) or not np.isfinite(times).all():
        return None
    return times[indices].tolist()


def _check_device(name: str) -> None:
    try:
        torch.empty(1, device=torch.device(name))
    except (RuntimeError, AssertionError) as error:  # torch raises the latter where it was built without CUDA
        said = str(error).strip().split("\n")[0]
        raise ValueError(f"--device {name} cannot be used here ({said}); leave it out to run on the CPU") from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No "Loading weights" bar; afterwards as before."""
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
