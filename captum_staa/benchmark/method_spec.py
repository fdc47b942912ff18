"""What a method by name is made of: how to make it for a classifier, and why it may not apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from captum_staa import feature_masks
from captum_staa._utils.model_state import uncompiled
from captum_staa.models import VideoClassifier

End = Literal["first", "last"]
# What a block's attention reads, in TimeSformer its spatial one: the last block's output has no gradient but at the
# class token where the head reads that alone, and this norm still has one everywhere.
NORMS = ("layernorm_before", "norm1")
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def end_layer(classifier: VideoClassifier, end: End) -> str | None:
    """The name of a layer, among ``classifier.module.named_modules()``.

    Example:
        >>> clf = VideoClassifier.from_pretrained("tiny-resnet3d-pattern")
        >>> end_layer(clf, "first"), end_layer(clf, "last")
        ('stem', 'stages')
        >>> end_layer(VideoClassifier.from_pretrained("tiny-videomae-pattern"), "first")
        'videomae.encoder.layer.0.layernorm_before'

    Args:
        classifier: around any model.
        end: ``"first"`` or ``"last"``.

    Returns:
        Of a known transformer the norm in front of the attention of its first or last block. Of other models the first
        or last child with convolutions in it, of the innermost module that holds all of them, such as a stem or a
        stage. None where there is neither.
    """
    model = uncompiled(classifier.module)
    if classifier.family is not None:
        names = [name for name, _ in model.named_modules() if name.endswith(NORMS) and "predictor" not in name]
    else:
        names = _children_with_convolutions(model)
    return names[0 if end == "first" else -1] if names else None


def _children_with_convolutions(model: nn.Module) -> list[str]:
    paths = [name.split(".") for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)]
    depth = 0  # of the innermost module that holds them all
    while paths and len({tuple(path[: depth + 1]) for path in paths}) == 1 and depth + 1 < len(paths[0]):
        depth += 1
    return list(dict.fromkeys(".".join(path[: depth + 1]) for path in paths))


Call = Callable[[Tensor, int], Tensor]  # clip (1, ...), target -> attributions of its shape, or maps (1, T, H, W)
Make = Callable[[VideoClassifier, int], Call]  # with so many copies of a clip per call of the model
SAMPLES = 400  # masks that RISE draws; subsets of regions, Lime and KernelShap


class NotApplicableError(ValueError):
    """Why a method says nothing of a model; it is a fact for the table, and no failure."""


class MethodSpec(NamedTuple):
    """A method that is known by name.

    Attributes:
        make: from a classifier and its altered copies per call to the method. Raises :class:`NotApplicableError`.
        about: its settings in words, for the record.
        smoothed: whether its maps are smoothed, with their signs, by three quarters of a cell (see :func:`cell`). So
            they are where signs flip from pixel to pixel, as those of gradients do: a magnitude would not tell what
            speaks for the class from what speaks against it.
    """

    make: Make
    about: str
    smoothed: bool = False


def named_layer(classifier: VideoClassifier, end: End) -> str:
    """The layer that a Grad-CAM reads."""
    name = end_layer(classifier, end)
    if name is None:
        raise NotApplicableError(
            f"no layer of {type(classifier.module).__name__} with places in it was found; pass an instance around the "
            f"layer that you mean, as in GradCAM(classifier, layer)"
        )
    return name


def cell(classifier: VideoClassifier, clip: Tensor) -> tuple[int, int, int]:
    """Sides ``(t, h, w)`` of the model's tubelet; of a model without tokens, an eighth of the clip along each side."""
    if classifier.grid is not None:
        return classifier.grid.tubelet
    t, h, w = (-(-side // 8) for side in classifier.layout.extent(clip))
    return t, h, w


def windows(classifier: VideoClassifier, clip: Tensor) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Sides and strides ``(t, h, w)`` of an occlusion: two cells along each side, half overlapping in space.

    In time a window is no shorter than 4 frames.
    """
    size = classifier.layout.extent(clip)
    _, h, w = cell(classifier, clip)
    frames = min(4, size[0])
    return (frames, min(2 * h, size[1]), min(2 * w, size[2])), (frames, h, w)


def need_tubelets(classifier: VideoClassifier) -> None:
    """Raise where a model has none."""
    if classifier.grid is None:
        kind = type(classifier.module).__name__
        raise NotApplicableError(f"{kind} is no transformer of a known family: it has no tubelets")


def ablation(
    kind: Callable[[VideoClassifier], Any], mask: Callable[[Tensor, VideoClassifier], Tensor], *, of_tokens: bool
) -> Make:
    """One region of a feature mask at a time: a Captum-like ``FeatureAblation``, and the mask of a clip."""

    def make(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
        if of_tokens:
            need_tubelets(classifier)

        def call(clip: Tensor, target: int) -> Tensor:
            explainer = kind(classifier)  # a new one each time: a used FeatureAblation of Captum's checks no more
            regions = mask(clip, classifier)
            return explainer.attribute(
                clip, target=target, feature_mask=regions, perturbations_per_eval=perturbations_per_eval
            )

        return call

    return make


def frames(clip: Tensor, classifier: VideoClassifier) -> Tensor:
    """The feature mask of whole frames, called as that of tubelets is."""
    return feature_masks.frames(clip, classifier.layout)
