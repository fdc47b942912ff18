"""Maps ``(B, T, H, W)`` in one form, of attributions from anywhere: torch or numpy, of a clip's shape or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_staa.layout import VideoLayout, check_dense

Array = Tensor | np.ndarray[Any, Any]


def as_tensor(value: object, name: str, axes: str) -> Tensor:
    """A tensor, or a copy of a numpy array, which may be read-only or run backwards; anything else is refused."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiubc":
            raise TypeError(f"{name} must be a tensor or array of numbers ({axes}), but an array of {value.dtype} came")
        return torch.from_numpy(np.array(value, order="C"))
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor ({axes}), but {type(value).__name__} came")
    check_dense(value, name)
    return value


def as_tuple(inputs: object) -> tuple[Tensor, ...]:
    """A method's inputs, a tensor or a tuple of tensors, as a tuple."""
    clips = inputs if isinstance(inputs, tuple) else (inputs,)
    if not clips or not all(isinstance(clip, Tensor) for clip in clips):
        came = [type(clip).__name__ for clip in clips]
        raise TypeError(
            f"inputs must be a tensor, or a tuple of at least one, but {type(inputs).__name__} of {came} came"
        )
    return clips


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


def maps_of(attributions: Array, clip: Tensor, layout: VideoLayout) -> Tensor:
    """``(B, T, H, W)`` float64 of attributions of the clip's shape, or of maps."""
    wanted = tuple(layout.size(clip)[letter] for letter in "BTHW")
    shape = tuple(getattr(attributions, "shape", ()))
    if len(shape) in (4, 5) and shape not in (wanted, tuple(clip.shape)):
        raise ValueError(
            f"attributions must have the clip's shape {tuple(clip.shape)} in layout {layout.axes}, or be maps "
            f"(B, T, H, W) = {wanted}, but their shape is {shape}"
        )
    return as_maps(attributions, layout if len(shape) == 5 else None)
