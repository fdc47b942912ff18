"""What the values of a metric mean, for tables to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Axis = Literal["joint", "space", "time"]
SPANNED: dict[Axis, str] = {"joint": "", "space": "T", "time": "HW"}  # the axes of a clip that are one


Function = TypeVar("Function", bound=Callable[..., Any])


def metric(*, higher_is_better: bool | None, lowest: float, highest: float) -> Callable[[Function], Function]:
    """Says of a metric what its values mean, as attributes of the function.

    Example:
        >>> from captum_staa import metrics
        >>> metrics.auroc.higher_is_better, metrics.auroc.lowest, metrics.auroc.highest
        (True, 0.0, 1.0)

    Args:
        higher_is_better: None where neither is: the value describes a map, and does not judge it.
        lowest: no value is below.
        highest: no value is above.
    """

    def mark(function: Function) -> Function:
        marked: Any = function
        marked.higher_is_better, marked.lowest, marked.highest = higher_is_better, lowest, highest
        return function

    return mark


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """``(B,)`` of two ``(B, P)``; nan where all values of one row are equal."""
    x, y = x - x[:, :1], y - y[:, :1]  # equal values become 0 exactly, and so, below, nan
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    # one root of the product, not two: a row with itself is then 1 to the last digit
    return ((x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt()).clamp(-1, 1)


def midranks(values: Tensor) -> Tensor:
    """``(B, P)``: the rank of each value in its row; equal values share the mean of their ranks."""
    values = values.contiguous()  # searchsorted warns of others
    ordered = values.sort(dim=1).values
    return (torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)).double() / 2


def draws(n_bootstrap: int, count: int, generator: torch.Generator) -> Tensor:
    """``(R, N)`` float64 on the CPU: how many copies of each of ``count`` inputs each draw holds, ``count`` in all."""
    copies = torch.zeros(n_bootstrap, count, dtype=torch.float64)
    if count:
        drawn = torch.randint(count, (n_bootstrap, count), generator=generator, device=generator.device).cpu()
        copies.scatter_add_(1, drawn, torch.ones_like(copies))
    return copies


def interval(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high ``(...)``, between which 95 % of the values ``(R, ...)`` of the draws lie; nan is passed over."""
    low, high = drawn.nanquantile(drawn.new_tensor([0.025, 0.975]), dim=0)
    return low, high
