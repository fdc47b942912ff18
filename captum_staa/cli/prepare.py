"""From what was asked to a model and an explainer, and from a clip to its explanation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from typing import Any, NamedTuple

import torch
import tqdm.auto
from torch import Tensor

from captum_staa.attention.focus import Focus
from captum_staa.attr import STAA, SpatioTemporalPerturbation
from captum_staa.cli.explanation import Masks, Options
from captum_staa.io import VideoInfo
from captum_staa.layout import SpaceTime
from captum_staa.models import VideoClassifier
from captum_staa.perturbation.settings import SETTINGS
from captum_staa.perturbation.smoothness import SMOOTHNESS

Explainer = STAA | SpatioTemporalPerturbation

METHODS = {  # and the options that belong to each alone
    "staa": ("mode", "rule", "layers", "focus"),
    "perturbation": ("setting", "areas", "objective", "smoothness", "iterations"),
}
COPIES = 8  # of a clip per call of the model, at most: those of one step of learning with four areas
COPIED = 2**21  # numbers of a clip's copies per call, at most


class Explained(NamedTuple):
    """What came out for one clip."""

    parts: SpaceTime  # float32 on the CPU
    probabilities: Tensor  # (K,)
    target: int
    masks: Masks | None = None  # of perturbation
    interrupted: str = ""  # how far learning came, where Ctrl-C has cut it short


def check(options: Options) -> None:
    """Refuse what contradicts itself, before anything is loaded."""
    if options.method not in METHODS:
        raise ValueError(f"--method is one of {', '.join(METHODS)}, but {options.method!r} came")
    for method, names in METHODS.items():
        values = {name: getattr(options, name) for name in names}
        given = [f"--{name}" for name, value in values.items() if value is not None and value is not False]
        if given and method != options.method:
            raise ValueError(
                f"of --method {method}: {', '.join(given)}; but --method {options.method} came; drop "
                f"{'it' if len(given) == 1 else 'them'}, or pass --method {method}"
            )
    if options.rule is not None and options.mode not in (None, "relevance"):
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


def explainer_of(classifier: VideoClassifier, options: Options) -> Explainer:
    """The method that was asked for, around a model."""
    if options.method == "perturbation":
        setting = SETTINGS[options.setting or "nested"].changed(
            areas=options.areas,
            aim=options.objective,  # type: ignore[arg-type]  # the setting itself checks all of these
            scale=None,
            smoothness=options.smoothness,
            iterations=options.iterations,
        )
        return SpatioTemporalPerturbation(classifier, setting=setting)
    if classifier.family is None:
        raise ValueError(
            f"{options.model!r} is a {type(classifier.module).__name__}, which has no attention to read; --method staa "
            f"takes video transformers (VideoMAE, TimeSformer, ViViT, V-JEPA 2, ...), --method perturbation any model"
        )
    return STAA(
        classifier,
        mode=options.mode or "relevance",  # type: ignore[arg-type]  # STAA itself checks these three
        layers="all" if options.layers is None else options.layers,  # type: ignore[arg-type]
        focus=Focus() if options.focus else None,
        rule=options.rule or "product",  # type: ignore[arg-type]
    )


def describe(explainer: Explainer, options: Options) -> str:
    """The method and its options, as one would write them in Python.

    Example:
        >>> from pathlib import Path
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> asked = Options(Path("a.mp4"), "tiny-videomae-pattern", Path("out"), mode="attention", layers=[-1])
        >>> describe(explainer_of(clf, asked), asked)
        "STAA(mode='attention', layers=[-1])"
        >>> asked = Options(Path("a.mp4"), "tiny-videomae-pattern", Path("out"), "perturbation", areas=[0.1])
        >>> describe(explainer_of(clf, asked), asked)
        "SpatioTemporalPerturbation(setting='nested').attribute(areas=[0.1])"
    """
    if not isinstance(explainer, STAA):
        names = METHODS["perturbation"][1:]
        given = [f"{name}={getattr(options, name)!r}" for name in names if getattr(options, name) is not None]
        call = f".attribute({', '.join(given)})" if given else ""
        return f"SpatioTemporalPerturbation(setting={options.setting or 'nested'!r}){call}"
    words = [f"mode={explainer.mode!r}"]
    if explainer.mode == "relevance":
        words.append(f"rule={explainer.rule!r}")
    if explainer.mode != "released":  # which always reads the last layer, and is not focused
        words.append(f"layers={explainer.layers!r}")
        words += ["focus=Focus()"] if explainer.focus is not None else []
    return f"STAA({', '.join(words)})"


def settings_of(explainer: Explainer, options: Options) -> dict[str, Any]:
    """How masks were learnt, option by option, those included that were not given; of STAA its description says all."""
    if isinstance(explainer, STAA):
        return {}
    setting = explainer.setting
    return {
        "setting": options.setting or "nested",
        "objective": setting.objective.aim,
        "smoothness": next(name for name, term in SMOOTHNESS.items() if term == setting.smoothness),
        "iterations": setting.iterations,
    }


def class_specific(explainer: Explainer) -> bool:
    """Whether maps are about one class."""
    return not isinstance(explainer, STAA) or explainer.mode == "relevance"


def about(explainer: Explainer, options: Options, info: VideoInfo) -> dict[str, Any]:
    """The fields of an :class:`Explanation` that do not depend on the clip."""
    classifier = explainer.forward_func
    way = explainer.mode if isinstance(explainer, STAA) else options.setting or "nested"
    return {
        "video": options.video,
        "info": info,
        "model": options.model,
        "method": describe(explainer, options),
        "kind": f"{explainer.get_name()} {way}",
        "settings": settings_of(explainer, options),
        "class_specific": class_specific(explainer),
        "layout": classifier.layout.axes,
        "target_given": options.target is not None,
        "crop": classifier.crop_box(info.height, info.width),
    }


def frames_per_cell(explainer: Explainer) -> int:
    """How many frames in a row a map cannot tell apart."""
    if not isinstance(explainer, STAA):
        return explainer.setting.frames
    grid = explainer.forward_func.grid
    return 1 if grid is None else int(grid.tubelet[0])


def explain_clip(explainer: Explainer, clip: Tensor, target: int | None) -> Explained:
    """All about one clip; its target is the likeliest class where None was given."""
    if not isinstance(explainer, STAA):
        return _learn(explainer, clip, target)
    if class_specific(explainer) and target is None:
        target = int(answer(explainer, clip).argmax())
    parts = explainer.attribute_parts(clip, target=target)
    assert parts.logits is not None
    probabilities = parts.logits[0].float().softmax(0).cpu()
    target = int(probabilities.argmax()) if target is None else target
    return Explained(_on_cpu(parts), probabilities, target)


def _learn(explainer: SpatioTemporalPerturbation, clip: Tensor, target: int | None) -> Explained:
    """Masks, with Captum's progress bar while they are learnt; the best so far, where Ctrl-C comes in between."""
    probabilities = answer(explainer, clip)
    target = int(probabilities.argmax()) if target is None else target
    with _captum_bars_like_ours():
        parts = explainer.attribute_parts(
            clip, target=target, perturbations_per_eval=copies_of(clip), show_progress=True
        )
    steps = int(parts.history.steps[-1])
    masks = Masks(
        masks=parts.masks[0].float().cpu(),
        areas=list(explainer.setting.areas),
        scale=explainer.setting.objective.scale if len(probabilities) > 1 else "logit",  # as the method has it
        visible=parts.visible[0].tolist(),
        whole=float(parts.whole[0]),
        kept=parts.kept[0].tolist(),
        deleted=parts.deleted[0].tolist(),
        steps=steps,
    )
    asked = explainer.setting.iterations
    interrupted = f"the masks are the best of {steps} steps, and {asked} were asked" if parts.interrupted else ""
    return Explained(_on_cpu(parts), probabilities, target, masks, interrupted)


def copies_of(clip: Tensor) -> int:
    """How many altered copies of a clip go through the model at once; changes memory and speed, no number.

    For its backward pass a model keeps some hundred times a clip's own size, per copy: about a gigabyte for a base
    transformer and 16 frames of 224 x 224 pixels, which is one copy. Such clips keep a machine busy one by one, while
    small ones are several times faster together.

    Example:
        >>> copies_of(torch.empty(1, 16, 3, 48, 48)), copies_of(torch.empty(1, 16, 3, 112, 112))
        (8, 3)
        >>> copies_of(torch.empty(1, 16, 3, 224, 224))
        1
    """
    return max(1, min(COPIES, COPIED // clip.numel()))


def _on_cpu(parts: SpaceTime) -> SpaceTime:
    return SpaceTime(parts.joint.float().cpu(), parts.spatial.float().cpu(), parts.temporal.float().cpu())


@torch.no_grad()
def answer(explainer: Explainer, clip: Tensor) -> Tensor:
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


@contextmanager
def _captum_bars_like_ours() -> Iterator[None]:
    """Captum's progress bars appear after a second and vanish when done; afterwards as before."""
    bars = tqdm.auto.tqdm  # which none of ours is
    changed = {
        "__init__": partialmethod(bars.__init__, delay=1, leave=False),
        "set_postfix_str": partialmethod(bars.set_postfix_str, refresh=False),  # which would not wait for the second
    }
    own = {name: vars(bars)[name] for name in changed if name in vars(bars)}
    for name, method in changed.items():
        setattr(bars, name, method)
    try:
        yield
    finally:
        for name in changed:
            setattr(bars, name, own[name]) if name in own else delattr(bars, name)
