"""Tensors: conversion to float32 or wider, the number of changes in place, and Gaussian blur over space and time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SPREAD = (
    0.75  # standard deviation, in tubelets or cells, that merges neighboring tokens of opposite signs into one object
)


def wide(value: Tensor) -> Tensor:
    """Return a tensor in float32, or unchanged if its dtype is wider."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def version_of(value: Tensor) -> int | None:
    """Return how often a tensor was changed in place; None for tensors of ``inference_mode``, which do not count it."""
    return None if value.is_inference() else value._version


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
        steps = torch.arange(-reach, reach + 1, dtype=torch.float64)
        kernel = torch.exp(-0.5 * (steps / width) ** 2)[None, None].to(maps)
        lines = maps.movedim(axis, -1)
        flat = lines.reshape(-1, 1, lines.shape[-1])
        covered = F.conv1d(torch.ones_like(flat[:1]), kernel, padding=reach)
        if keep_sums:
            blurred = F.conv1d(flat / covered, kernel, padding=reach)
        else:
            blurred = F.conv1d(flat, kernel, padding=reach) / covered
        maps = blurred.view(lines.shape).movedim(-1, axis)
    return maps
