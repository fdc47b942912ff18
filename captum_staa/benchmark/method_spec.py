"""Specification of a named method: how to make it for a classifier, and why it may not apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from captum_staa import feature_masks
from captum_staa._utils.model_state import uncompiled
from captum_staa.models import VideoClassifier

End = Literal["first", "last"]
# The norms in front of a block's attention (in TimeSformer, its spatial attention). If the head reads the class token
# only, the output of the last block has a gradient at that token only, but this norm has a gradient at all tokens.
NORMS = ("layernorm_before", "norm1")
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def end_layer(classifier: VideoClassifier, end: End) -> str | None:
    """Return the name of the first or last layer, as in ``classifier.module.named_modules()``.

    Example:
        >>> clf = VideoClassifier.from_pretrained("tiny-resnet3d-pattern")
        >>> end_layer(clf, "first"), end_layer(clf, "last")
        ('stem', 'stages')
        >>> end_layer(VideoClassifier.from_pretrained("tiny-videomae-pattern"), "first")
        'videomae.encoder.layer.0.layernorm_before'

    Args:
        classifier: a classifier of any architecture.
        end: ``"first"`` or ``"last"``.

    Returns:
        For a transformer of a known family, the norm in front of the attention of its first or last block. For other
        models, the first or last child that contains convolutions, such as a stem or a stage; its parent is the
        innermost module that contains all convolutions. None if there is no such layer.
    """
    model = uncompiled(classifier.module)
    if classifier.family is not None:
        names = [name for name, _ in model.named_modules() if name.endswith(NORMS) and "predictor" not in name]
    else:
        names = _children_with_convolutions(model)
    return names[0 if end == "first" else -1] if names else None


def _children_with_convolutions(model: nn.Module) -> list[str]:
    paths = [name.split(".") for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)]
    depth = 0  # of the innermost module that contains all convolutions
    while paths and len({tuple(path[: depth + 1]) for path in paths}) == 1 and depth + 1 < len(paths[0]):
        depth += 1
    return list(dict.fromkeys(".".join(path[: depth + 1]) for path in paths))


Call = Callable[[Tensor, int], Tensor]  # clip (1, ...), target -> attributions of its shape, or maps (1, T, H, W)
Make = Callable[[VideoClassifier, int], Call]  # classifier, perturbations_per_eval -> call
SAMPLES = 400  # masks of RISE; subsets of regions of Lime and KernelShap


class NotApplicableError(ValueError):
    """Raised when a method does not apply to a model. Tables show its message as a reason, not as a failure."""


class MethodSpec(NamedTuple):
    """A method that is known by name.

    Attributes:
        make: function of a classifier and ``perturbations_per_eval`` that returns the method. Raises
            :class:`NotApplicableError`.
        description: the settings of the method, for the record of a run.
        smoothed: whether signed maps are smoothed by three quarters of a cell (see :func:`cell`). This is for methods
            whose signs change from pixel to pixel, such as gradients. Absolute values would mix evidence for the class
            with evidence against it.
    """

    make: Make
    description: str
    smoothed: bool = False


def named_layer(classifier: VideoClassifier, end: End) -> str:
    """Return the name of the layer that a Grad-CAM reads.

    Raises:
        NotApplicableError: the model has no such layer.
    """
    name = end_layer(classifier, end)
    if name is None:
        raise NotApplicableError(
            f"GradCAM needs a layer with spatial positions, got {type(classifier.module).__name__}, in which none was "
            f"found. Pass an instance with the layer that you want: GradCAM(classifier, layer)"
        )
    return name


def cell(classifier: VideoClassifier, clip: Tensor) -> tuple[int, int, int]:
    """Return the sides ``(t, h, w)`` of the model's tubelet; without tokens, an eighth of the clip along each axis."""
    if classifier.grid is not None:
        return classifier.grid.tubelet
    t, h, w = (-(-side // 8) for side in classifier.layout.extent(clip))
    return t, h, w


def windows(classifier: VideoClassifier, clip: Tensor) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return sides and strides ``(t, h, w)`` of occlusion windows.

    A window covers two cells in height and in width, and overlaps the next one by half. It covers 4 frames, or all
    frames of a shorter clip.
    """
    size = classifier.layout.extent(clip)
    _, h, w = cell(classifier, clip)
    frames = min(4, size[0])
    return (frames, min(2 * h, size[1]), min(2 * w, size[2])), (frames, h, w)


def need_tubelets(classifier: VideoClassifier) -> None:
    """Raise NotApplicableError if the model does not have tubelets."""
    if classifier.grid is None:
        kind = type(classifier.module).__name__
        raise NotApplicableError(f"tubelets need a transformer of a known family, got {kind}, which has no tubelets")


def ablation(
    kind: Callable[[VideoClassifier], Any], mask: Callable[[Tensor, VideoClassifier], Tensor], *, of_tokens: bool
) -> Make:
    """Return the maker of an ablation, one region of a feature mask at a time.

    Args:
        kind: a class with the interface of Captum's ``FeatureAblation``.
        mask: function of a clip and a classifier that returns the feature mask.
        of_tokens: whether the model must have tubelets.
    """

    def make(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
        if of_tokens:
            need_tubelets(classifier)

        def call(clip: Tensor, target: int) -> Tensor:
            explainer = kind(
                classifier
            )  # a new instance per clip: after its first call, Captum's FeatureAblation skips checks
            regions = mask(clip, classifier)
            return explainer.attribute(
                clip, target=target, feature_mask=regions, perturbations_per_eval=perturbations_per_eval
            )

        return call

    return make


def frames(clip: Tensor, classifier: VideoClassifier) -> Tensor:
    """Return the feature mask of whole frames; it has the arguments of ``feature_masks.tubelets``."""
    return feature_masks.frames(clip, classifier.layout)
