"""What a method by name is made of: how to make it for a classifier, and why it may not apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from captum_staa import feature_masks
from captum_staa.benchmark.layers import End, end_layer
from captum_staa.models import VideoClassifier

Call = Callable[[Tensor, int], Tensor]  # clip (1, ...), target -> attributions of its shape, or maps (1, T, H, W)
Make = Callable[[VideoClassifier, int], Call]  # with so many copies of a clip per call of the model
SAMPLES = 400  # masks that RISE draws; subsets of regions, Lime and KernelShap


class DoesNotApply(ValueError):
    """Why a method says nothing of a model; it is a fact for the table, and no failure."""


class Recipe(NamedTuple):
    """A method that is known by name.

    Attributes:
        make: from a classifier, and the copies of a clip per call of it, to the method. Raises :class:`DoesNotApply`.
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
        raise DoesNotApply(
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
        raise DoesNotApply(f"{kind} is no transformer of a known family: it has no tubelets")


def ablation(
    kind: Callable[[VideoClassifier], Any], mask: Callable[[Tensor, VideoClassifier], Tensor], *, of_tokens: bool
) -> Make:
    """One region of a feature mask at a time: a Captum-like ``FeatureAblation``, and the mask of a clip."""

    def make(classifier: VideoClassifier, copies: int) -> Call:
        if of_tokens:
            need_tubelets(classifier)

        def call(clip: Tensor, target: int) -> Tensor:
            explainer = kind(classifier)  # a new one each time: a used FeatureAblation of Captum's checks no more
            regions = mask(clip, classifier)
            return explainer.attribute(clip, target=target, feature_mask=regions, perturbations_per_eval=copies)

        return call

    return make


def frames(clip: Tensor, classifier: VideoClassifier) -> Tensor:
    """The feature mask of whole frames, called as that of tubelets is."""
    return feature_masks.frames(clip, classifier.layout)
