"""Parts that several metrics use: the range and direction of a metric, correlations, ranks, bootstrap draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Axis = Literal["joint", "space", "time"]
BLOCK = 2**21  # numbers, 16 MiB
SPANNED: dict[Axis, str] = {"joint": "", "space": "T", "time": "HW"}  # axes of the inputs that one cell spans


Function = TypeVar("Function", bound=Callable[..., Any])


def metric(*, higher_is_better: bool | None, lowest: float, highest: float) -> Callable[[Function], Function]:
    """Return a decorator that stores the range and the direction of a metric as attributes of the function.

    Example:
        >>> from captum_staa import metrics
        >>> metrics.auroc.higher_is_better, metrics.auroc.lowest, metrics.auroc.highest
        (True, 0.0, 1.0)

    Args:
        higher_is_better: None if neither higher nor lower is better: the value describes a map and does not rate it.
        lowest: lower bound of the values.
        highest: upper bound of the values.
    """

    def mark(function: Function) -> Function:
        marked: Any = function
        marked.higher_is_better, marked.lowest, marked.highest = higher_is_better, lowest, highest
        return function

    return mark


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Return Pearson's correlation of the rows of two ``(B, P)``, ``(B,)``; nan if all values of a row are equal."""
    x, y = x - x[:, :1], y - y[:, :1]  # equal values become exactly 0, which gives nan below
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    # one square root of the product, not two: the correlation of a row with itself is then exactly 1
    return ((x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt()).clamp(-1, 1)


def midranks(values: Tensor) -> Tensor:
    """Return the rank of each value in its row, ``(B, P)``; equal values share the mean of their ranks."""
    values = values.contiguous()  # searchsorted warns otherwise
    ordered = values.sort(dim=1).values
    return (torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)).double() / 2


def draws_in_blocks(n_bootstrap: int, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the copies of each input in each bootstrap draw, in blocks ``(R, N)`` float64 on the CPU.

    All blocks together have ``n_bootstrap`` rows, each with the sum ``count``. A block has at most ``BLOCK`` numbers,
    because there may be many inputs.
    """
    size = max(1, min(n_bootstrap, BLOCK // max(count, 1)))
    for start in range(0, n_bootstrap, size):
        copies = torch.zeros(min(size, n_bootstrap - start), count, dtype=torch.float64)
        if count:
            drawn = torch.randint(count, tuple(copies.shape), generator=generator, device=generator.device).cpu()
            copies.scatter_add_(1, drawn, torch.ones_like(copies))
        yield copies


def interval(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bounds ``(...)`` between which 95 % of the values ``(R, ...)`` of the draws lie; nan is ignored."""
    low, high = drawn.nanquantile(drawn.new_tensor([0.025, 0.975]), dim=0)
    return low, high
