"""Smoothing, as a step after any method: what a neighborhood in space and time says together."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_staa._utils.checks import is_number
from captum_staa._utils.gaussian import gaussian
from captum_staa.layout import VideoLayout


def smooth(attributions: Tensor, layout: VideoLayout | str, space: float = 4.0, time: float = 1.0) -> Tensor:
    """Attributions of any method, Captum's included, averaged over a Gaussian neighborhood.

    A single pixel's gradient is mostly noise; what a neighborhood holds together is not. Half the side of a patch in
    space and half a tubelet in time is a good start. Sharp true borders blur by as much.

    Example:
        >>> import torch
        >>> attributions = torch.zeros(1, 3, 9, 33, 33)
        >>> attributions[:, :, 4, 16, 16] = 1.0
        >>> smoothed = smooth(attributions, "BCTHW", space=2.0, time=1.0)
        >>> smoothed.shape == attributions.shape, bool(smoothed[0, 0, 4, 16, 16] < 0.02)
        (True, True)
        >>> round(float(smoothed.sum()), 3)  # away from borders, nothing is lost
        3.0

    Args:
        attributions: signed, of the clip's shape. Pass ``attributions.abs()`` where magnitude is meant: the signs of
            neighboring pixels cancel otherwise.
        layout: the order of its axes, such as ``"BCTHW"``.
        space: standard deviation along height and width, pixels; 0 leaves them alone.
        time: standard deviation along time, frames; 0 leaves it alone.

    Returns:
        A contiguous tensor of the same shape and dtype, each channel by itself. What lies outside the clip is
        unknown, not zero: a constant stays constant up to the border.

    Raises:
        ValueError: ``attributions`` is not five-dimensional, holds nan or infinity, or a deviation is negative.
        TypeError: ``attributions`` is no tensor of floats.
    """
    layout = VideoLayout.of(layout)
    layout.check_values(attributions, "attributions")
    if not all(is_number(width) and 0 <= width < float("inf") for width in (space, time)):
        raise ValueError(f"standard deviations are finite and at least 0, got {space = }, {time = }")
    wide = torch.promote_types(attributions.dtype, torch.float32)
    frames = layout.to_working(attributions.detach().to(wide)).transpose(1, 2)  # (B, C, T, H, W)
    blurred = gaussian(frames.flatten(0, 1), (time, space, space)).view(frames.shape)
    smoothed = layout.from_working(blurred.transpose(1, 2))
    # A copy also where neither axis was blurred: writing into the result must not change what was passed.
    return smoothed.to(attributions.dtype, copy=True, memory_format=torch.contiguous_format)
