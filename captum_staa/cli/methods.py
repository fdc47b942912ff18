"""The method of ``explain``: one of the registry of ``compare``, with its options, applied to clips of one model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_staa._utils.model_state import eval_mode
from captum_staa.attr import MaskAttribution, SpatioTemporalPerturbation
from captum_staa.benchmark.methods import Method, seeded
from captum_staa.benchmark.registry import METHODS, Explainer, NotApplicableError, find_method
from captum_staa.cli.explanation import Masks, MethodUsed
from captum_staa.models import VideoClassifier
from captum_staa.models.outputs import OutputKind
from captum_staa.perturbation.config import REGULARIZERS, PerturbationConfig
from captum_staa.result import VideoAttribution

# The method of explain without --method: the first that applies. On planted clips, STAA finds the evidence best in
# transformers, and GradCAM of the first layer in networks of convolutions (docs/results_truth.md).
DEFAULTS = ("STAA (relevance)", "GradCAM", "VideoOcclusion")
COPIES = 8  # maximum number of altered clips per forward pass: one optimization step with four areas needs 8
COPIED = 2**21  # maximum number of elements of the altered clips per forward pass


class Explained(NamedTuple):
    """The result for one clip."""

    maps: VideoAttribution  # float32 on the CPU
    probabilities: Tensor  # (K,)
    masks: Masks | None = None  # of learned masks
    interrupted: str = ""  # progress of the optimization if Ctrl-C stopped it; otherwise empty
    other: VideoAttribution | None = None  # with --versus LABEL, why the other class and not this one


class ClipMethod:
    """A method with its options, made for one model.

    Example:
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> str(ClipMethod(clf, "staa", {"layers": [-1]}, perturbations_per_eval=8).used)
        'STAA, layers=[-1]'

    Args:
        classifier: the model.
        name: name of the method, as for :func:`find_method`. None is the first of ``DEFAULTS`` that applies.
        options: options of the method that the user passed, by name.
        perturbations_per_eval: altered copies of a clip per call of the model.
        versus: label or index of a class whose output is subtracted, or ``"rest"``, as in ``VideoClassifier.versus``.

    Raises:
        ValueError: there is no such method, it does not apply to the model, or an option is invalid.
    """

    def __init__(
        self,
        classifier: VideoClassifier,
        name: str | None,
        options: Mapping[str, Any],
        perturbations_per_eval: int,
        versus: str | None = None,
    ) -> None:
        chosen = name is None
        name, spec = find_method(default_method(classifier) if name is None else name)
        shown = {"show_progress": True} if "show_progress" in spec.options else {}

        def made(explained: VideoClassifier) -> Method:
            call = spec.make(explained, perturbations_per_eval, **options, **shown)
            return Method(name, spec.description, call, spec.smoothed)

        explained = classifier if versus is None else classifier.versus(versus)
        try:
            self._method = made(explained)
        except NotApplicableError as error:
            raise ValueError(
                f"--method {name} does not apply to this model: {error}. Choose another method, such as "
                f"{default_method(classifier)!r}."
            ) from error
        if versus is not None and not spec.class_specific:
            raise ValueError(
                f"--versus needs a method whose maps explain a class, got --method {name}, whose maps are the same for "
                f"every class. Drop --versus, or choose another method, such as {DEFAULTS[0]!r}."
            )
        self.classifier, self._explained, self.shows_progress = classifier, explained, bool(shown)
        self._made = made
        self.other = None if versus in (None, "rest") else classifier.class_index(versus)
        call = self._method.call
        explainer = call.explainer if isinstance(call, Explainer) else None
        learned = explainer if isinstance(explainer, SpatioTemporalPerturbation) else None
        self._config = None if learned is None else learned.preset.changed(**options)
        cell = 1 if classifier.grid is None else int(classifier.grid.tubelet[0])
        apart = cell if self._config is None else self._config.cells[0]
        against = {} if versus is None else {"versus": versus}
        self.used = MethodUsed(name, {**options, **against}, spec.class_specific, apart, chosen)

    @property
    def masks(self) -> int:
        """Number of masks per map; 0 for methods that do not learn masks."""
        return 0 if self._config is None else len(self._config.areas)

    @torch.no_grad()
    def answer(self, clip: Tensor) -> Tensor:
        """Return the probabilities ``(K,)`` of one clip, or its scores if the model has none, on the CPU."""
        with eval_mode(self.classifier):
            return self._shown(self.classifier(clip))

    def _shown(self, outputs: Tensor) -> Tensor:
        return self.classifier.values(outputs)[0].float().cpu()

    def explain(self, clip: Tensor, target: int, at: int = 0) -> Explained:
        """Return the explanation of one clip. Ctrl-C during the optimization of masks returns the best so far.

        Args:
            clip: ``(1, ...)`` in the layout of the classifier.
            target: index of the class; not used by a method that is not specific to a class.
            at: position of the clip in the video, from which random draws depend.
        """
        if target == self.other:
            label = self.classifier.label_names(self.classifier.num_classes or target + 1)[target]
            raise ValueError(
                f"--versus must be a class other than the explained one, got {label!r} for both. Pass another class, "
                f"or explain another one with --target."
            )
        same_draws = partial(seeded, 0, at, self.used.name, clip.device)
        with same_draws():
            maps = self._method.maps(clip, target, self._explained)
        own = maps.logits if self._explained is self.classifier else None
        probabilities = self.answer(clip) if own is None else self._shown(own)
        explained = Explained(_on_cpu(maps), probabilities)
        if self._config is not None and isinstance(maps, MaskAttribution):
            masks = _masks(maps, self._config, self._explained.output)
            interrupted = f"the masks are the best of {masks.steps} steps out of {self._config.iterations}"
            explained = explained._replace(masks=masks, interrupted=interrupted if maps.interrupted else "")
        if self.other is None or explained.interrupted:
            return explained
        opposite = self.classifier.versus(target)
        with same_draws():
            maps = self._made(opposite).maps(clip, self.other, opposite)
        return explained._replace(other=_on_cpu(maps))


def _on_cpu(maps: VideoAttribution) -> VideoAttribution:
    return VideoAttribution(maps.joint.float().cpu(), maps.spatial.float().cpu(), maps.temporal.float().cpu())


def default_method(classifier: VideoClassifier) -> str:
    """Return the first of ``DEFAULTS`` that applies to a model.

    Example:
        >>> default_method(VideoClassifier.from_pretrained("tiny-resnet3d-pattern"))
        'GradCAM'
    """
    for name in DEFAULTS:
        try:
            METHODS[name].make(classifier, 1)
        except NotApplicableError:
            continue
        return name
    raise AssertionError("the last of DEFAULTS applies to every model")


def check_options(name: str | None, options: Mapping[str, Any]) -> None:
    """Raise ValueError unless the method has all of these options. None is a method of DEFAULTS, without options."""
    own: tuple[str, ...] = ()
    if name is not None:
        name, spec = find_method(name)
        own = spec.options
    if wrong := [option for option in options if option not in own]:
        having = [known for known, other in METHODS.items() if set(wrong) <= set(other.options)]
        given = "no --method" if name is None else f"--method {name!r}"
        raise ValueError(
            f"{', '.join(f'--{option}' for option in wrong)} can only be used with --method "
            f"{' or '.join(map(repr, having)) or 'of different kinds'}, got {given}. Drop "
            f"{'it' if len(wrong) == 1 else 'them'}, or choose another method."
        )


def copies_of(elements: int) -> int:
    """Return the number of altered clips per forward pass. It changes memory and speed, but not the results.

    For the backward pass, a model stores about 100 times the size of each clip: about 1 GB for a base-size transformer
    and one clip of 16 frames of 224 x 224 pixels. A single clip of this size already uses the hardware fully, while
    small clips are several times faster in a batch.

    Example:
        >>> copies_of(16 * 3 * 48 * 48), copies_of(16 * 3 * 112 * 112), copies_of(16 * 3 * 224 * 224)
        (8, 3, 1)

    Args:
        elements: number of elements of one clip.
    """
    return max(1, min(COPIES, COPIED // elements))


def _masks(maps: MaskAttribution, config: PerturbationConfig, output: OutputKind) -> Masks:
    """Return the masks of one clip, with the settings with which they were learned."""
    return Masks(
        masks=maps.masks[0].float().cpu(),
        areas=list(config.areas),
        scale="logit" if output == "score" else config.scale,  # as in SpatioTemporalPerturbation
        visible=maps.visible[0].tolist(),
        whole=float(maps.whole[0]),
        kept=maps.kept[0].tolist(),
        removed=maps.removed[0].tolist(),
        steps=int(maps.history.steps[-1]),
        settings={
            "objective": config.objective,
            "regularizer": next(name for name, term in REGULARIZERS.items() if type(term) is type(config.regularizer)),
            "iterations": config.iterations,
        },
    )
