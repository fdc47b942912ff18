"""The methods of ``explain``: for each method, its options, its description and how it explains one clip."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from captum_staa.attention.focus import Focus
from captum_staa.attr import STAA, AttentionBranch, SpatioTemporalPerturbation
from captum_staa.cli.explanation import Masks, Options
from captum_staa.models import VideoClassifier
from captum_staa.models.st_abn.network import st_abn_of
from captum_staa.perturbation.config import PRESETS, REGULARIZERS
from captum_staa.result import VideoAttribution

COPIES = 8  # maximum number of altered clips per forward pass: one optimization step with four areas needs 8
COPIED = 2**21  # maximum number of elements of the altered clips per forward pass


class Explained(NamedTuple):
    """The result for one clip."""

    parts: VideoAttribution  # float32 on the CPU
    probabilities: Tensor  # (K,)
    target: int
    masks: Masks | None = None  # of the perturbation method
    interrupted: str = ""  # progress of the optimization if Ctrl-C stopped it; otherwise empty


class Method:
    """Base class of the explanation methods of the command line: a method with its options, applied to one model.

    Attributes:
        options: names of the options that only this method has.
        classifier: the model.
        description: the method as Python code.
        kind: short name of the method.
        settings: options by name, if the description does not include all of them.
        class_specific: whether the maps explain one class.
        frames_per_cell: number of consecutive frames that share one value of the map.
        own_time: whether the temporal part is computed separately, and is not the sum of the map over space.
        areas: number of masks per map.
        shows_progress: whether the method shows a progress bar.
    """

    options: ClassVar[tuple[str, ...]] = ()
    description: str
    kind: str
    class_specific = True
    frames_per_cell = 1
    own_time = False
    areas = 0
    shows_progress = False

    def __init__(self, classifier: VideoClassifier, options: Options) -> None:
        self.classifier = classifier
        self.settings: dict[str, Any] = {}

    def explain(self, clip: Tensor, target: int | None) -> Explained:
        """Return the explanation of one clip for the class ``target``; None takes the most probable class."""
        raise NotImplementedError

    @torch.no_grad()
    def answer(self, clip: Tensor) -> Tensor:
        """Return the class probabilities ``(K,)`` of one clip, on the CPU."""
        logits: Tensor = self.classifier(clip)
        return logits[0].float().softmax(0).cpu()

    def _from_parts(self, attribute_maps: Any, clip: Tensor, target: int | None, **options: Any) -> Explained:
        """Return the explanation by a method that returns the logits together with its map."""
        if self.class_specific and target is None:
            target = int(self.answer(clip).argmax())
        parts = attribute_maps(clip, target=target, **options)
        probabilities = parts.logits[0].float().softmax(0).cpu()
        target = int(probabilities.argmax()) if target is None else target
        return Explained(_on_cpu(parts), probabilities, target)


class OfAttention(Method):
    """STAA: attribution from the attention of a video transformer.

    Example:
        >>> from pathlib import Path
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> OfAttention(clf, Options(Path("a.mp4"), "a-model", Path("out"), mode="attention", layers=[-1])).description
        "STAA(mode='attention', layers=[-1])"
    """

    options = ("mode", "rule", "layers", "focus")

    def __init__(self, classifier: VideoClassifier, options: Options) -> None:
        super().__init__(classifier, options)
        if classifier.family is None:
            raise ValueError(
                f"--method staa needs the attention of a video transformer (VideoMAE, TimeSformer, ViViT, V-JEPA 2, "
                f"...), got {options.model!r}, a {type(classifier.module).__name__} without supported attention. Use "
                f"--method perturbation, which works for any model."
            )
        self.explainer = STAA(
            classifier,
            mode=options.mode or "relevance",  # type: ignore[arg-type]  # STAA itself checks these three
            layers="all" if options.layers is None else options.layers,  # type: ignore[arg-type]
            focus=Focus() if options.focus else None,
            rule=options.rule or "decomposition",  # type: ignore[arg-type]
        )
        mode, rule = self.explainer.mode, self.explainer.rule
        words = [f"mode={mode!r}"]
        if mode == "relevance":
            words.append(f"rule={rule!r}")
        if mode == "attention" or rule == "chefer":  # the other settings have no layers and no focus
            words.append(f"layers={self.explainer.layers!r}")
            words += ["focus=Focus()"] if self.explainer.focus is not None else []
        self.description, self.kind = f"STAA({', '.join(words)})", self.explainer.get_name()
        self.class_specific = mode == "relevance"
        self.frames_per_cell = 1 if classifier.grid is None else int(classifier.grid.tubelet[0])

    def explain(self, clip: Tensor, target: int | None) -> Explained:
        return self._from_parts(self.explainer.attribute_maps, clip, target)


class OfBranch(Method):
    """The attention branch of an ST-ABN."""

    options = ("weighting",)

    def __init__(self, classifier: VideoClassifier, options: Options) -> None:
        super().__init__(classifier, options)
        if st_abn_of(classifier) is None:
            raise ValueError(
                f"--method attention-branch needs an ST-ABN, got {options.model!r}, a "
                f"{type(classifier.module).__name__} without an attention branch. Pass for example --model "
                f"tiny-st-abn-pattern, or a folder written by STABN.save_pretrained."
            )
        self.explainer = AttentionBranch(classifier)
        self.weighting = options.weighting or self.explainer.class_weighting
        self.description = f"AttentionBranch(st_abn).attribute(weighting={self.weighting!r})"
        self.kind = f"AttentionBranch {self.weighting}"
        self.class_specific, self.own_time = self.weighting != "gate", True

    def explain(self, clip: Tensor, target: int | None) -> Explained:
        return self._from_parts(self.explainer.attribute_maps, clip, target, weighting=self.weighting)


class OfMasks(Method):
    """Spatio-temporal perturbation: learned masks, for any model.

    Example:
        >>> from pathlib import Path
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> OfMasks(clf, Options(Path("a.mp4"), "a-model", Path("out"), areas=[0.1])).description
        "SpatioTemporalPerturbation(preset='nested').attribute(areas=[0.1])"
    """

    options = ("preset", "areas", "objective", "regularizer", "iterations")
    shows_progress = True

    def __init__(self, classifier: VideoClassifier, options: Options) -> None:
        super().__init__(classifier, options)
        name = options.preset or "nested"
        self.explainer = SpatioTemporalPerturbation(classifier, preset=name)
        values = {option: getattr(options, option) for option in self.options[1:]}
        self.overrides = {option: value for option, value in values.items() if value is not None}
        self.preset = preset = PRESETS[name].changed(**self.overrides)
        passed = [f"{option}={value!r}" for option, value in self.overrides.items()]
        call = f".attribute({', '.join(passed)})" if passed else ""
        self.description = f"SpatioTemporalPerturbation(preset={name!r}){call}"
        self.kind = self.explainer.get_name()
        self.frames_per_cell, self.areas = preset.frames, len(preset.areas)
        self.settings = {
            "preset": name,
            "objective": preset.objective,
            "regularizer": next(name for name, term in REGULARIZERS.items() if term == preset.regularizer),
            "iterations": preset.iterations,
        }

    def explain(self, clip: Tensor, target: int | None) -> Explained:
        """Return the explanation of one clip, with Captum's progress bar. Ctrl-C returns the best masks so far."""
        probabilities = self.answer(clip)
        target = int(probabilities.argmax()) if target is None else target
        parts = self.explainer.attribute_maps(
            clip, target=target, perturbations_per_eval=copies_of(clip), show_progress=True, **self.overrides
        )
        steps, preset = int(parts.history.steps[-1]), self.preset
        masks = Masks(
            masks=parts.masks[0].float().cpu(),
            areas=list(preset.areas),
            scale=preset.scale if len(probabilities) > 1 else "logit",  # as in SpatioTemporalPerturbation
            visible=parts.visible[0].tolist(),
            whole=float(parts.whole[0]),
            kept=parts.kept[0].tolist(),
            removed=parts.removed[0].tolist(),
            steps=steps,
        )
        interrupted = f"the masks are the best of {steps} steps out of {preset.iterations}" if parts.interrupted else ""
        return Explained(_on_cpu(parts), probabilities, target, masks, interrupted)


METHODS: dict[str, type[Method]] = {"staa": OfAttention, "perturbation": OfMasks, "attention-branch": OfBranch}


def copies_of(clip: Tensor) -> int:
    """Return the number of altered clips per forward pass. It changes memory and speed, but not the results.

    For the backward pass, a model stores about 100 times the size of each clip: about 1 GB for a base-size transformer
    and one clip of 16 frames of 224 x 224 pixels. A single clip of this size already uses the hardware fully, while
    small clips are several times faster in a batch.

    Example:
        >>> copies_of(torch.empty(1, 16, 3, 48, 48)), copies_of(torch.empty(1, 16, 3, 112, 112))
        (8, 3)
        >>> copies_of(torch.empty(1, 16, 3, 224, 224))
        1
    """
    return max(1, min(COPIES, COPIED // clip.numel()))


def _on_cpu(parts: VideoAttribution) -> VideoAttribution:
    return VideoAttribution(parts.joint.float().cpu(), parts.spatial.float().cpu(), parts.temporal.float().cpu())
