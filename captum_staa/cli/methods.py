"""The methods of ``explain``: for each, the options that are its own, how it is described, and one clip explained."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from captum_staa.attention.focus import Focus
from captum_staa.attr import STAA, AttentionBranch, SpatioTemporalPerturbation
from captum_staa.cli.explanation import Masks, Options
from captum_staa.models import VideoClassifier
from captum_staa.models.st_abn.network import st_abn_of
from captum_staa.perturbation.presets import PRESETS
from captum_staa.perturbation.regularizers import REGULARIZERS
from captum_staa.result import VideoAttribution

COPIES = 8  # of a clip per call of the model, at most: those of one step of learning with four areas
COPIED = 2**21  # numbers of a clip's perturbations_per_eval per call, at most


class Explained(NamedTuple):
    """What came out for one clip."""

    parts: VideoAttribution  # float32 on the CPU
    probabilities: Tensor  # (K,)
    target: int
    masks: Masks | None = None  # of perturbation
    interrupted: str = ""  # how far learning came, where Ctrl-C has cut it short


class Method:
    """One method around a model, as it was asked for on the command line.

    Attributes:
        options: names of the options that belong to it alone.
        classifier: the model.
        description: how one would write it in Python.
        kind: the same in two words.
        settings: its options by name, where the description does not hold them all.
        class_specific: whether its maps are about one class.
        frames_per_cell: how many frames in a row a map cannot tell apart.
        own_time: whether its temporal part is a signal of its own, and no sum over the map.
        areas: how many masks come with a map.
        shows_progress: whether it draws a bar of its own.
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
        """All about one clip; its target is the likeliest class where None was given."""
        raise NotImplementedError

    @torch.no_grad()
    def answer(self, clip: Tensor) -> Tensor:
        """Probabilities ``(K,)`` of one clip, on the CPU."""
        logits: Tensor = self.classifier(clip)
        return logits[0].float().softmax(0).cpu()

    def _from_parts(self, attribute_maps: Any, clip: Tensor, target: int | None, **options: Any) -> Explained:
        """Of a method that gives the model's logits with its map."""
        if self.class_specific and target is None:
            target = int(self.answer(clip).argmax())
        parts = attribute_maps(clip, target=target, **options)
        probabilities = parts.logits[0].float().softmax(0).cpu()
        target = int(probabilities.argmax()) if target is None else target
        return Explained(_on_cpu(parts), probabilities, target)


class OfAttention(Method):
    """STAA, what a transformer attends to.

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
                f"{options.model!r} is a {type(classifier.module).__name__}, which has no attention to read; --method "
                f"staa takes video transformers (VideoMAE, TimeSformer, ViViT, V-JEPA 2, ...), --method perturbation "
                f"any model"
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
        if mode == "attention" or rule == "chefer":  # the others take neither layers nor a focus
            words.append(f"layers={self.explainer.layers!r}")
            words += ["focus=Focus()"] if self.explainer.focus is not None else []
        self.description, self.kind = f"STAA({', '.join(words)})", f"{self.explainer.get_name()} {mode}"
        self.class_specific, self.own_time = mode == "relevance", mode == "released"
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
                f"{options.model!r} is a {type(classifier.module).__name__} without an attention branch; --method "
                f"attention-branch takes an ST-ABN, such as tiny-st-abn-pattern or a folder of STABN.save_pretrained"
            )
        self.explainer = AttentionBranch(classifier)
        self.weighting = options.weighting or self.explainer.class_weighting
        self.description = f"AttentionBranch(st_abn).attribute(weighting={self.weighting!r})"
        self.kind = f"AttentionBranch {self.weighting}"
        self.class_specific, self.own_time = self.weighting != "gate", True

    def explain(self, clip: Tensor, target: int | None) -> Explained:
        return self._from_parts(self.explainer.attribute_maps, clip, target, weighting=self.weighting)


class OfMasks(Method):
    """Spatio-temporal perturbation, masks learned for any model.

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
        preset = PRESETS[name].changed(
            areas=options.areas,
            aim=options.objective,  # type: ignore[arg-type]  # the preset itself checks all of these
            scale=None,
            regularizer=options.regularizer,
            iterations=options.iterations,
        )
        self.explainer = SpatioTemporalPerturbation(classifier, preset=preset)
        given = [f"{own}={getattr(options, own)!r}" for own in self.options[1:] if getattr(options, own) is not None]
        call = f".attribute({', '.join(given)})" if given else ""
        self.description = f"SpatioTemporalPerturbation(preset={name!r}){call}"
        self.kind = f"{self.explainer.get_name()} {name}"
        self.frames_per_cell, self.areas = preset.frames, len(preset.areas)
        self.settings = {
            "preset": name,
            "objective": preset.objective.aim,
            "regularizer": next(name for name, term in REGULARIZERS.items() if term == preset.regularizer),
            "iterations": preset.iterations,
        }

    def explain(self, clip: Tensor, target: int | None) -> Explained:
        """With Captum's progress bar while masks are learned; the best so far, where Ctrl-C comes in between."""
        probabilities = self.answer(clip)
        target = int(probabilities.argmax()) if target is None else target
        parts = self.explainer.attribute_maps(
            clip, target=target, perturbations_per_eval=copies_of(clip), show_progress=True
        )
        steps, preset = int(parts.history.steps[-1]), self.explainer.preset
        masks = Masks(
            masks=parts.masks[0].float().cpu(),
            areas=list(preset.areas),
            scale=preset.objective.scale if len(probabilities) > 1 else "logit",  # as the method has it
            visible=parts.visible[0].tolist(),
            whole=float(parts.whole[0]),
            kept=parts.kept[0].tolist(),
            deleted=parts.deleted[0].tolist(),
            steps=steps,
        )
        asked = preset.iterations
        interrupted = f"the masks are the best of {steps} steps, and {asked} were asked" if parts.interrupted else ""
        return Explained(_on_cpu(parts), probabilities, target, masks, interrupted)


METHODS: dict[str, type[Method]] = {"staa": OfAttention, "perturbation": OfMasks, "attention-branch": OfBranch}


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


def _on_cpu(parts: VideoAttribution) -> VideoAttribution:
    return VideoAttribution(parts.joint.float().cpu(), parts.spatial.float().cpu(), parts.temporal.float().cpu())
