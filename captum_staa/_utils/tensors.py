"""Tensors: conversion to float32 or wider, the number of changes in place, and Gaussian blur over space and time."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Standard deviation, in tubelets or cells, that merges neighboring tokens of opposite signs into one object.
SPREAD = 0.75


def wide(value: Tensor) -> Tensor:
    """Return a tensor in float32, or unchanged if its dtype is wider."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def short_repr(result: Any) -> str:
    """Return the ``repr`` of a dataclass with the shapes of its tensors and arrays instead of their values."""
    shown = ((field.name, getattr(result, field.name)) for field in fields(result))
    return f"{type(result).__name__}({', '.join(f'{name}={_short(value)}' for name, value in shown)})"


def _short(value: object) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return str(tuple(value.shape))
    return f"{type(value).__name__}(...)" if is_dataclass(value) or hasattr(value, "_fields") else repr(value)


def version_of(value: Tensor) -> int | None:
    """Return how often a tensor was changed in place; None for tensors of ``inference_mode``, which do not count it."""
    return None if value.is_inference() else value._version


def without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which products on the device of a tensor keep their dtype.

    Maps are float32 also where the model, or the caller, runs under ``torch.autocast``.
    """
    device = like.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def gaussian(
    maps: Tensor,
    sigma: tuple[float, float, float],
    *,
    radius: tuple[int, int, int] | None = None,
    keep_sums: bool = False,
) -> Tensor:
    """Blur ``(B, T, H, W)`` maps along time, height and width.

    Args:
        maps: float tensor ``(B, T, H, W)``.
        sigma: standard deviation per axis ``(T, H, W)``, in frames and pixels. 0 does not blur along an axis.
        radius: half-width of the kernel per axis. The default is three standard deviations.
        keep_sums: distribute each value over its neighborhood inside the clip, so that the sum of a map stays the same,
            also at borders. If False, each result is the mean of its neighborhood, and a constant map stays constant.

    Returns:
        Blurred maps ``(B, T, H, W)``. At borders the kernel is normalized over the part inside the clip instead of
        padding with zeros, so the first and last frames are not darkened.
    """
    for axis, width in enumerate(sigma, start=1):
        if width <= 0:
            continue
        reach = max(1, int(3 * width + 0.5)) if radius is None else radius[axis - 1]
        places = torch.arange(maps.shape[axis], dtype=torch.float64)
        distance = places[:, None] - places
        kernel = torch.exp(-0.5 * (distance / width) ** 2) * (distance.abs() <= reach)  # (from, to)
        kernel = kernel / kernel.sum(1 if keep_sums else 0, keepdim=True)  # a product is faster than a convolution
        with without_autocast(maps):
            maps = (maps.movedim(axis, -1) @ kernel.to(maps)).movedim(-1, axis)
    return maps
