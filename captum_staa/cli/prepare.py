"""From what was asked to a model and an explainer, and from a clip to its explanation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from captum_staa.attention.focus import Focus
from captum_staa.attr import STAA
from captum_staa.cli.explanation import Options
from captum_staa.io import VideoInfo
from captum_staa.layout import SpaceTime
from captum_staa.models import VideoClassifier


def check(options: Options) -> None:
    """Refuse what contradicts itself, before anything is loaded."""
    if options.method != "staa":
        raise ValueError(f"--method is 'staa', but {options.method!r} came")
    if options.rule is not None and options.mode != "relevance":
        raise ValueError(f"--rule {options.rule} belongs to --mode relevance, but --mode {options.mode} came; drop one")
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


def explainer_of(classifier: VideoClassifier, options: Options) -> STAA:
    """The method that was asked for, around a model."""
    if classifier.family is None:
        raise ValueError(
            f"{options.model!r} is a {type(classifier.module).__name__}, which has no attention to read; "
            f"explain takes video transformers (VideoMAE, TimeSformer, ViViT, V-JEPA 2, ...)"
        )
    return STAA(
        classifier,
        mode=options.mode,  # type: ignore[arg-type]  # STAA itself checks these three
        layers=options.layers,  # type: ignore[arg-type]
        focus=Focus() if options.focus else None,
        rule=options.rule or "product",  # type: ignore[arg-type]
    )


def describe(explainer: STAA) -> str:
    """The method and its options, as one would write them in Python.

    Example:
        >>> describe(STAA(VideoClassifier.from_pretrained("tiny-videomae-pattern"), mode="attention", layers=[-1]))
        "STAA(mode='attention', layers=[-1])"
    """
    words = [f"mode={explainer.mode!r}"]
    if explainer.mode == "relevance":
        words.append(f"rule={explainer.rule!r}")
    if explainer.mode != "released":  # which always reads the last layer, and is not focused
        words.append(f"layers={explainer.layers!r}")
        words += ["focus=Focus()"] if explainer.focus is not None else []
    return f"STAA({', '.join(words)})"


def about(explainer: STAA, options: Options, info: VideoInfo) -> dict[str, Any]:
    """The fields of an :class:`Explanation` that do not depend on the clip."""
    classifier = explainer.forward_func
    return {
        "video": options.video,
        "info": info,
        "model": options.model,
        "method": describe(explainer),
        "kind": f"{explainer.get_name()} {explainer.mode}",
        "class_specific": explainer.mode == "relevance",
        "layout": classifier.layout.axes,
        "target_given": options.target is not None,
        "crop": classifier.crop_box(info.height, info.width),
    }


def explain_clip(explainer: STAA, clip: Tensor, target: int | None) -> tuple[SpaceTime, Tensor, int]:
    """Parts and probabilities ``(K,)`` on the CPU, and the target: the likeliest class where None was given."""
    if explainer.mode == "relevance" and target is None:
        target = int(answer(explainer, clip).argmax())
    parts = explainer.attribute_parts(clip, target=target)
    assert parts.logits is not None
    probabilities = parts.logits[0].float().softmax(0).cpu()
    target = int(probabilities.argmax()) if target is None else target
    return SpaceTime(parts.joint.cpu(), parts.spatial.cpu(), parts.temporal.cpu()), probabilities, target


@torch.no_grad()
def answer(explainer: STAA, clip: Tensor) -> Tensor:
    """Probabilities ``(K,)`` of one clip, on the CPU."""
    logits: Tensor = explainer.forward_func(clip)
    return logits[0].float().softmax(0).cpu()


def label_names(classifier: VideoClassifier, count: int) -> list[str]:
    """K names: the labels, or the class indices where there are none."""
    labels = classifier.labels or [str(index) for index in range(count)]
    if len(labels) != count:
        raise ValueError(f"the model gives {count} logits, but its config names {len(labels)} labels; mend id2label")
    return labels


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
