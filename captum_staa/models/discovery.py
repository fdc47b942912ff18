"""Find the attention layers and the token grid of any video transformer by running it.

Every attention computation is seen by a function mode. To find which token stands for which pixels, the results of all
attention are replaced by zeros, so that no token sees another one, and pixels are changed: what changes is the token of
these pixels, in every layer. What the head reads follows from the gradient with respect to the last tokens.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_staa.layout import VideoLayout
from captum_staa.models.classifier import VideoClassifier, classifier_of
from captum_staa.models.families import find_transformer
from captum_staa.models.findings import report_of
from captum_staa.models.inspection import Inspection
from captum_staa.models.probing import Probe


def inspect(
    model: nn.Module,
    inputs: Tensor,
    layout: VideoLayout | str | None = None,
    additional_forward_args: object = None,
    *,
    show_progress: bool = False,
) -> Inspection:
    """Run a video model, and return where it computes attention and which token stands for which pixels.

    Example:
        >>> import torch
        >>> from captum_staa import VideoClassifier
        >>> clf = VideoClassifier.from_pretrained("tiny-timesformer-motion")
        >>> report = inspect(clf, torch.rand(1, 16, 3, 48, 48))
        >>> report.grid
        TokenGrid(t=16, h=6, w=6, prefix=1, order='hwt', tubelet=(1, 8, 8), suffix=0)
        >>> [(found.layer.role, found.layer.backend) for found in report.attention[:2]]
        [('temporal', 'softmax'), ('spatial', 'softmax')]
        >>> report.reads, report.problems, report.differences
        ('cls', (), ())

    Args:
        model: a :class:`VideoClassifier`, or any module that takes clips.
        inputs: clips; the first one is used. Random values do as well.
        layout: order of the axes of ``inputs`` for a module. None takes that of a recognized transformer, or the place
            of the three color channels.
        additional_forward_args: further positional arguments of the model. Tensors with one row per clip are repeated.
        show_progress: whether to show a progress bar from the start. Otherwise it appears after two seconds.

    Returns:
        :class:`Inspection`. It is cached on a classifier, once per size of the clips.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the inputs are not clips in this layout, the layout is unknown, or the forward depends on chance.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module or a VideoClassifier, got {type(model).__name__}")
    classifier = classifier_of(model)
    if classifier is None:
        classifier = VideoClassifier(model, layout if layout is not None else _layout_of(model, inputs))
    classifier.layout.check_values(inputs, "inputs")
    size = classifier.layout.extent(inputs)
    cache: dict[Any, Inspection] = classifier.inspections
    if size not in cache:
        extra = _as_arguments(additional_forward_args)
        with torch.inference_mode(False), Probe(classifier, inputs, extra, show_progress).running() as probe:
            cache[size] = report_of(probe)
    return cache[size]


Needs = Literal["grid", "layers", "rollout"]


def described(
    classifier: VideoClassifier, inputs: Tensor, extra: Any = None, *, needs: Needs = "rollout"
) -> VideoClassifier:
    """Return the classifier itself if its family is known, otherwise one that shares its module, with what was found.

    A known backbone below a head that reads its tokens in another way than by their mean or the first one counts as
    unknown, because the head may have attention, too.

    Args:
        classifier: a classifier of any transformer.
        inputs: clips.
        extra: further positional arguments of the model.
        needs: what will be used. ``"grid"``: the grid of tokens alone; if there is none although there is attention,
            the classifier itself is returned, whose pixels can be decomposed. ``"layers"``: attention layers with the
            places of their tokens. ``"rollout"``: also the way from layer to layer, and what the head reads.

    Raises:
        ValueError: what is needed was not found or not verified, or the forward depends on chance.
    """
    family = classifier.family
    if family is not None and (needs == "grid" or family.pooling(classifier.transformer) is not None):
        return classifier
    unread = None
    if family is not None:  # a backbone in a module with another head
        try:
            reads = classifier.read_tokens(inputs, *_as_arguments(extra))
        except ValueError as error:  # the head may have further layers, which discovery follows
            unread = error
        else:
            known = copy.copy(classifier)
            known.family = replace(family, pooling=lambda model: reads)
            return known
    try:
        report = inspect(classifier, inputs, additional_forward_args=extra)
    except ValueError as error:
        raise unread or error from None
    fits = {"grid": True, "layers": report.placed, "rollout": report.ok}[needs]
    if not fits or not (report.attention or (needs == "grid" and report.unread)):
        raise unread or ValueError(report.refusal())
    found = copy.copy(classifier)
    found.family, found.grid, found._transformer_name = report.unverified_family(), report.grid, ""
    return found


def _as_arguments(extra: Any) -> tuple[Any, ...]:
    return () if extra is None else extra if isinstance(extra, tuple) else (extra,)


def _layout_of(model: nn.Module, inputs: Tensor) -> str:
    """Return the layout of a recognized transformer, or the one with three channels."""
    found = find_transformer(model)
    if found is not None:
        return found.family.layout
    colors = [axis for axis in (1, 2) if inputs.ndim == 5 and inputs.shape[axis] == 3]
    if len(colors) != 1:
        raise ValueError(
            f"layout is required unless exactly one of the axes 1 and 2 of inputs has three channels, got inputs of "
            f"shape {tuple(getattr(inputs, 'shape', ()))}. Pass layout='BCTHW' or 'BTCHW'."
        )
    return "BCTHW" if colors == [1] else "BTCHW"
