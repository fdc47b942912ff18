"""One number per clip: the target's output, for a batch of clips or for several altered copies of it."""

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


class TargetScore:
    """The target's output as a function of the inputs alone.

    Copies lie batch after batch (a b a b), as in Captum's FeatureAblation; targets and further arguments follow.

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
        forward_func: gives one row of outputs per example.
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
        """``(copies, B)`` in float32 at least.

        Raises:
            ValueError: there are several classes and no target, or the model gives no row per example.
        """
        how = ExpansionTypes.repeat
        target, extra = self.target, self.extra
        if copies > 1:
            target = _expand_target(target, copies, expansion_type=how)
            extra = None if extra is None else _expand_additional_forward_args(extra, copies, expansion_type=how)
        answer = _run_forward(self.forward_func, inputs, None, extra)
        if not isinstance(answer, Tensor):
            raise TypeError(f"the model must return a tensor, got {type(answer).__name__}; VideoClassifier does")
        answer = selected(answer, target)
        examples = copies * self.batch
        if answer.numel() != examples:
            if target is None and answer.ndim > 1 and len(answer) == examples:
                raise ValueError(
                    f"the model gives outputs of shape {tuple(answer.shape)}, so one must be chosen: pass target=class "
                    f"index (or one per example)"
                )
            raise ValueError(
                f"the model must give one output per example, {examples} here, but outputs of shape "
                f"{tuple(answer.shape)} came; return a row per example, not a mean over the batch"
            )
        return answer.reshape(copies, self.batch).to(torch.promote_types(answer.dtype, torch.float32))


def selected(answer: Tensor, target: TargetType) -> Tensor:
    """The target's output of every example, as Captum selects it.

    Raises:
        TypeError: an index is no whole number.
        ValueError: the target does not fit the outputs. An index counts from 0: Captum would read -1 as the last class,
            which in many data sets means that there is none.
    """
    if target is None:
        return answer
    try:
        rows = [[index(place) for place in row] for row in _rows(target)]
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"a target is a class index, a tuple of indices, or a list or tensor with one per example, but {target = } "
            f"came: {error}"
        ) from error
    sizes = answer.shape[1:]
    each = isinstance(target, list) or (isinstance(target, Tensor) and target.numel() != 1)
    fits = all(0 < len(row) <= len(sizes) and all(0 <= i < n for i, n in zip(row, sizes)) for row in rows)  # noqa: B905
    if not fits or (each and len(rows) != len(answer)):
        raise ValueError(
            f"{target = } fits no outputs of shape {tuple(answer.shape)}: pass an index of at least 0 that lies within "
            f"them, or a list or tensor with one for each of the {len(answer)} examples"
        )
    if not each:
        return _select_targets(answer, tuple(rows[0]))
    # Captum gathers whole numbers at once, and picks tuples one by one
    return _select_targets(answer, [row[0] for row in rows] if answer.ndim == 2 else [tuple(row) for row in rows])


def _rows(target: Any) -> list[tuple[Any, ...]]:
    """The indices of every example, or those of all of them."""
    if isinstance(target, Tensor):
        return [(place,) for place in (target.reshape(-1) if target.numel() == 1 else target).tolist()]
    if isinstance(target, list):
        return [row if isinstance(row, tuple) else (row,) for row in target]
    return [target if isinstance(target, tuple) else (target,)]


def over_classes(
    forward_func: Callable[..., Any], function: Callable[[Tensor], Tensor], way_out: str
) -> Callable[..., Tensor]:
    """The model followed by a function of its logits ``(B, K)``, such as a softmax, in float32 at least.

    Raises:
        ValueError: when called: the model gives no logits of several classes; the text ends in ``way_out``.
    """

    def composed(*inputs: Any) -> Tensor:
        logits = forward_func(*inputs)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
            came = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"a probability is a softmax over logits (B, K) of several classes, but the model gives {came}; "
                f"{way_out}"
            )
        return function(logits.to(torch.promote_types(logits.dtype, torch.float32)))

    return composed
