"""Scores: the target's output, one number per clip, for a batch of clips or for several perturbed copies of it."""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import Any

import torch
from torch import Tensor

from captum_staa._utils.captum import (
    ExpansionTypes,
    TargetType,
    _expand_additional_forward_args,
    _expand_target,
    _format_additional_forward_args,
    _run_forward,
    _select_targets,
)
from captum_staa.models.outputs import kind_of, log_probabilities, probabilities


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
            raise ValueError(
                f"the model must return one output per example, {examples} here, got outputs of shape "
                f"{tuple(answer.shape)}. Return a row per example, not a mean over the batch."
            )
        return answer.reshape(copies, self.batch).to(torch.promote_types(answer.dtype, torch.float32))


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
            return outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        try:
            return convert(outputs, kind, getattr(model, "num_classes", None))
        except ValueError as error:
            raise ValueError(f"{error} {fix}") from None

    return composed
