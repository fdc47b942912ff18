"""What the values of a metric mean, for tables to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

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
