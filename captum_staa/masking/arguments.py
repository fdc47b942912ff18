"""The arguments of Captum's perturbation methods, checked and converted: baselines, feature masks, model and target."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_staa._utils.captum import (
    BaselineType,
    ExpansionTypes,
    TargetType,
    _expand_additional_forward_args,
    _expand_target,
    _format_additional_forward_args,
    _run_forward,
    _select_targets,
)
from captum_staa._utils.checks import check_count
from captum_staa._utils.tensors import wide
from captum_staa.layout import VideoLayout, check_dense
from captum_staa.models.outputs import kind_of, log_probabilities, probabilities

# --- baselines and feature masks --------------------------------------------------------------------------------------


def baselines_for(clips: tuple[Tensor, ...], baselines: BaselineType) -> tuple[Tensor, ...]:
    """Return one baseline per input, expanded to its shape and in its dtype. None means zero."""
    values = (0,) * len(clips) if baselines is None else baselines if isinstance(baselines, tuple) else (baselines,)
    if len(values) != len(clips):
        raise ValueError(
            f"baselines must be one per input, {len(clips)}, got {len(values)}. Pass a tuple of baselines."
        )
    return tuple(_baseline_for(clip, baseline) for clip, baseline in zip(clips, values, strict=True))


def _baseline_for(clip: Tensor, baseline: object) -> Tensor:
    if isinstance(baseline, (int, float, np.integer, np.floating)):
        number = math.inf if isinstance(baseline, int) and abs(baseline) >= 2**1023 else float(baseline)
        value = torch.tensor(number, dtype=torch.promote_types(clip.dtype, torch.float64), device=clip.device)
    elif isinstance(baseline, Tensor):
        value = baseline.detach()
        fits = value.ndim == clip.ndim and all(a in (1, b) for a, b in zip(value.shape, clip.shape, strict=True))
        if value.ndim and not fits:
            raise ValueError(
                f"a baseline must have the input's shape {tuple(clip.shape)}, or size 1 along an axis, got shape "
                f"{tuple(value.shape)}. Use a function of captum_staa.baselines, which returns the input's shape."
            )
        if value.device != clip.device:
            raise ValueError(
                f"a baseline must be on the input's device {clip.device}, got {value.device}. Move it with .to(...)."
            )
        check_dense(value, "a baseline")
    else:
        raise TypeError(
            f"a baseline must be a number or a tensor, got {type(baseline).__name__}. Call a function of "
            f"captum_staa.baselines to make one."
        )
    exact = value
    value = exact.to(clip.dtype)
    if not bool(exact.isfinite().all()) or not bool(value.isfinite().all()):
        raise ValueError(
            f"baselines must not contain nan or infinity and must be finite in {clip.dtype}, at most "
            f"{_largest(clip):.4g}, got {_summary(exact)}. Replace these values."
        )
    if not clip.is_floating_point() and not bool((value == exact).all()):
        raise ValueError(
            f"a baseline for an input of {clip.dtype} must be integers within the range of this dtype, got "
            f"{_summary(exact)}. Round the baseline, or pass inputs.float()."
        )
    return value.expand_as(clip)


def _largest(clip: Tensor) -> float:
    return (torch.finfo if clip.is_floating_point() else torch.iinfo)(clip.dtype).max


def _summary(values: Tensor) -> str:
    """Return a description for messages: the number itself, or the shape and range of several numbers."""
    if values.numel() == 1:
        return f"{values.item()!r}"
    return f"a tensor of shape {tuple(values.shape)} with values from {values.min().item()} to {values.max().item()}"


def check_perturbations_per_eval(value: object) -> None:
    """Raise unless ``value`` is an integer of at least 1."""
    check_count("perturbations_per_eval", value)


def masks_for(clips: tuple[Tensor, ...], feature_mask: Tensor | tuple[Tensor, ...] | None) -> list[Tensor]:
    """Return one mask per input, with the input's number of axes. If None, each element is a feature, as in Captum."""
    if feature_mask is None:
        return _one_feature_per_element(clips)
    values: tuple[Any, ...] = feature_mask if isinstance(feature_mask, tuple) else (feature_mask,)
    if len(values) != len(clips):
        raise ValueError(f"feature_mask must be one per input, {len(clips)}, got {len(values)}. Pass a tuple of masks.")
    masks = []
    for mask, clip in zip(values, clips, strict=True):
        if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"a feature mask must be a tensor of integers, got {kind}. Convert it with .long().")
        check_dense(mask, "a feature mask")
        sides = (1,) * (clip.ndim - mask.ndim) + tuple(mask.shape)
        if len(sides) != clip.ndim or any(side not in (1, size) for side, size in zip(sides, clip.shape, strict=True)):
            raise ValueError(
                f"a feature mask must be broadcastable to its input of shape {tuple(clip.shape)}, got shape "
                f"{tuple(mask.shape)}. Use a function of captum_staa.feature_masks, which returns such masks."
            )
        masks.append(mask.detach().to(clip.device, torch.long).view(sides))
    _check_no_gaps(masks)
    return masks


def units_for(clip: Tensor, feature_mask: Tensor, layout: VideoLayout) -> Tensor:
    """Return the feature id of each voxel, ``(1 or B, T, H, W)`` int64 on the CPU. Raise if ids differ by channel."""
    (mask,) = masks_for((clip,), feature_mask)
    return without_channels(mask, clip, layout)


def without_channels(mask: Tensor, clip: Tensor, layout: VideoLayout) -> Tensor:
    """Return a mask of :func:`masks_for` as ``(1 or B, T, H, W)`` on the CPU. Raise if ids differ by channel."""
    one = mask.narrow(layout.channel, 0, 1)
    if not bool((mask == one).all()):
        raise ValueError(
            f"feature_mask must be the same for all channels, because maps have no channel axis, got a mask of shape "
            f"{tuple(mask.shape)} in layout {layout.axes} that differs between channels. Use a function of "
            f"captum_staa.feature_masks."
        )
    return layout.mask_to_working(one.cpu()).expand(-1, *layout.extent(clip))


def _check_no_gaps(masks: list[Tensor]) -> None:
    ids = torch.cat([mask.flatten() for mask in masks])
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest == 0 and highest < len(ids) and bool(torch.bincount(ids).all()):
        return
    raise ValueError(
        f"ids of a feature mask must run from 0 to n-1 without gaps, got {len(ids.unique())} ids from {lowest} to "
        f"{highest}. Renumber them with mask.unique(return_inverse=True)[1]."
    )


def _one_feature_per_element(clips: tuple[Tensor, ...]) -> list[Tensor]:
    """Return masks with a separate id for each element of an example; ids continue from one input to the next."""
    masks, first = [], 0
    for clip in clips:
        count = clip[0].numel()
        masks.append(torch.arange(first, first + count, device=clip.device).view(1, *clip.shape[1:]))
        first += count
    return masks


# --- the target's output ----------------------------------------------------------------------------------------------


class TargetScore:
    """The target's output as a function of the inputs alone.

    Copies are ordered batch after batch (a b a b), as in Captum's FeatureAblation. Targets and additional arguments are
    repeated in the same order.

    Example:
        >>> import torch
        >>> score = TargetScore(lambda x: x.sum(2), target=[0, 1], additional_forward_args=None, batch=2)
        >>> inputs = torch.arange(12.0).reshape(2, 2, 3)
        >>> score((inputs,))
        tensor([[ 3., 30.]])
        >>> score((torch.cat([inputs, 10 * inputs]),), copies=2)
        tensor([[  3.,  30.],
                [ 30., 300.]])

    Args:
        forward_func: model or function that returns one row of outputs per example.
        target: as in Captum, for the batch.
        additional_forward_args: as in Captum; tensors hold one row per example of the batch.
        batch: B, examples in the batch.
    """

    def __init__(
        self, forward_func: Callable[..., Any], target: TargetType, additional_forward_args: object, batch: int
    ) -> None:
        self.forward_func, self.target, self.batch = forward_func, target, batch
        self.extra = _format_additional_forward_args(additional_forward_args)

    def __call__(self, inputs: tuple[Tensor, ...], copies: int = 1) -> Tensor:
        """Return the scores ``(copies, B)`` in float32 or wider.

        Raises:
            ValueError: There are several classes and no target, or the model does not return one row per example.
            TypeError: The model does not return a tensor.
        """
        how = ExpansionTypes.repeat
        target, extra = self.target, self.extra
        if copies > 1:
            target = _expand_target(target, copies, expansion_type=how)
            extra = None if extra is None else _expand_additional_forward_args(extra, copies, expansion_type=how)
        answer = _run_forward(self.forward_func, inputs, None, extra)
        if not isinstance(answer, Tensor):
            raise TypeError(
                f"the model must return a tensor, got {type(answer).__name__}. Wrap it in VideoClassifier, which "
                f"returns a tensor."
            )
        answer = selected(answer, target)
        examples = copies * self.batch
        if answer.numel() != examples:
            if target is None and answer.ndim > 1 and len(answer) == examples:
                raise ValueError(
                    f"target must be a class index for outputs of shape {tuple(answer.shape)}, got None. Pass "
                    f"target=class index, or one index per example."
                )
            if answer.ndim > 1 and len(answer) == examples:
                raise ValueError(
                    f"target must select one output per example, got {target!r}, which leaves outputs of shape "
                    f"{tuple(answer.shape)}. Pass a tuple with an index for each axis after the batch."
                )
            raise ValueError(
                f"the model must return one output per example, {examples} here, got outputs of shape "
                f"{tuple(answer.shape)}. Return a row per example, not a mean over the batch."
            )
        return wide(answer.reshape(copies, self.batch))


def selected(answer: Tensor, target: TargetType) -> Tensor:
    """Return the target's output of every example, selected as in Captum.

    Raises:
        TypeError: An index is not an integer.
        ValueError: The target does not fit the outputs. Negative indices are not allowed: Captum would read -1 as the
            last class, but many data sets use -1 for a missing label.
    """
    if target is None:
        return answer
    try:
        rows = [[index(place) for place in row] for row in _rows(target)]
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"target must be a class index, a tuple of indices, or a list or tensor with one per example, got "
            f"{target!r}: {error}"
        ) from error
    sizes = answer.shape[1:]
    per_example = isinstance(target, list) or (isinstance(target, Tensor) and target.numel() != 1)
    fits = all(0 < len(row) <= len(sizes) and all(0 <= i < n for i, n in zip(row, sizes)) for row in rows)  # noqa: B905
    if not fits and answer.shape[1:] == (1,):
        raise ValueError(f"target must be 0 or None for a model with one output, got {target!r}. Leave target out.")
    if not fits or (per_example and len(rows) != len(answer)):
        raise ValueError(
            f"target must be a valid index for outputs of shape {tuple(answer.shape)}, got {target!r}. Pass an index "
            f"of at least 0 within this shape, or a list or tensor with one for each of the {len(answer)} examples."
        )
    if not per_example:
        return _select_targets(answer, tuple(rows[0]))
    # Captum gathers integers in one operation, and selects tuples one by one
    return _select_targets(answer, [row[0] for row in rows] if answer.ndim == 2 else [tuple(row) for row in rows])


def _rows(target: Any) -> list[tuple[Any, ...]]:
    """Return the indices of every example, or one row of indices for all examples."""
    if isinstance(target, Tensor):
        return [(place,) for place in (target.reshape(-1) if target.numel() == 1 else target).tolist()]
    if isinstance(target, list):
        return [row if isinstance(row, tuple) else (row,) for row in target]
    return [target if isinstance(target, tuple) else (target,)]


def with_probabilities(
    forward_func: Callable[..., Any], model: object, fix: str, *, log: bool = False
) -> Callable[..., Tensor]:
    """Return a function that returns the probabilities of the classes, or their logarithms, in float32 or wider.

    Scores, which have no probabilities, are returned unchanged.

    Args:
        forward_func: function that returns the model's outputs.
        model: the model or function that the user passed, which may know what its outputs are.
        fix: last sentence of the error message: what the caller can do if there are no probabilities.
        log: if True, return log-probabilities.

    Raises:
        ValueError: When called, if the outputs have no probabilities.
    """
    convert = log_probabilities if log else probabilities

    def composed(*inputs: Any) -> Tensor:
        outputs = forward_func(*inputs)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"the model must return a tensor, got {type(outputs).__name__}. Wrap it in VideoClassifier, which "
                f"returns a tensor."
            )
        kind = kind_of(model, outputs)
        if kind == "score":  # has no probability
            return wide(outputs)
        try:
            return convert(outputs, kind, getattr(model, "num_classes", None))
        except ValueError as error:
            raise ValueError(f"{error} {fix}") from None

    return composed
