"""What every metric shares: maps in one form, and what its values mean, for tables to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from captum_staa.layout import VideoLayout

Array = Tensor | np.ndarray[Any, Any]
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


def as_tensor(value: object, name: str, axes: str) -> Tensor:
    """A tensor, or a copy of a numpy array, which may be read-only or run backwards; anything else is refused."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value, order="C"))
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor ({axes}), but {type(value).__name__} came")
    return value


def as_maps(attributions: Array, layout: VideoLayout | str | None = None) -> Tensor:
    """``(B, T, H, W)`` float64 of attributions of a clip's shape with ``layout``, or of maps without; checked."""
    attributions = as_tensor(attributions, "attributions", "B, T, H, W")
    if layout is not None:
        layout = VideoLayout.of(layout)
        layout.check_values(attributions, "attributions")
        return layout.reduce(attributions.detach().double())
    if attributions.ndim != 4 or 0 in attributions.shape:
        raise ValueError(
            f"without a layout, attributions must be maps (B, T, H, W) and not empty, but their shape is "
            f"{tuple(attributions.shape)}; pass layout='BTCHW' or 'BCTHW' for attributions of a clip's shape"
        )
    if not attributions.is_floating_point():
        raise TypeError(f"attributions must hold floats, but {attributions.dtype} came; pass truth.float() for a mask")
    if bad := int(attributions.numel() - attributions.isfinite().sum()):
        raise ValueError(
            f"{bad} of the {attributions.numel()} values of attributions (shape {tuple(attributions.shape)}) are nan "
            f"or infinite, which no metric can weigh; mend them first, as with torch.nan_to_num"
        )
    return attributions.detach().double()
