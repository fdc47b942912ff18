"""Gaussian smoothing of attributions in space and time, as a step after any method."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_staa._utils.checks import is_number
from captum_staa._utils.tensors import gaussian, wide
from captum_staa.layout import VideoLayout
from captum_staa.result import Inputs, for_each


def smooth(attributions: Inputs, layout: VideoLayout | str, space: float = 6.0, time: float = 1.5) -> Inputs:
    """Return attributions averaged over a Gaussian neighborhood in space and time.

    The gradient of a single pixel is mostly noise, and its mean over a neighborhood is less noisy. Three quarters of a
    patch in space and of a tubelet in time are good starting values: the defaults are those of 8 x 8 pixels and 2
    frames. Sharp borders are blurred as well.

    Example:
        >>> import torch
        >>> attributions = torch.zeros(1, 3, 9, 33, 33)
        >>> attributions[:, :, 4, 16, 16] = 1.0
        >>> smoothed = smooth(attributions, "BCTHW", space=2.0, time=1.0)
        >>> smoothed.shape == attributions.shape, bool(smoothed[0, 0, 4, 16, 16] < 0.02)
        (True, True)
        >>> round(float(smoothed.sum()), 3)  # away from borders, the sum is kept
        3.0

    Args:
        attributions: attributions of any method, Captum's methods included, of the clip's shape, or a tuple of them
            (RGB and flow). Signs are kept: the mean shows what a neighborhood adds to the class. A magnitude
            (``attributions.abs()``) does not depend on the class.
        layout: the order of the axes, such as ``"BCTHW"``.
        space: standard deviation along height and width, in pixels, at least 0. With 0, these axes are not smoothed.
        time: standard deviation along time, in frames, at least 0. With 0, this axis is not smoothed.

    Returns:
        Contiguous, of the same shape and dtype, a tuple for a tuple. Each channel is smoothed separately. Values
        outside the clip are ignored instead of counted as zero, so a constant stays constant up to the border.

    Raises:
        ValueError: ``attributions`` is not a 5-D tensor, holds nan or infinity, or a deviation is negative.
        TypeError: ``attributions`` is not a tensor of floats.
    """
    if not all(is_number(width) and 0 <= width < float("inf") for width in (space, time)):
        raise ValueError(
            f"space and time must be finite numbers of at least 0, got {space = }, {time = }. Pass 0 to leave an axis "
            f"unchanged."
        )

    def smoothed(values: Tensor, layout: VideoLayout) -> Tensor:
        frames = layout.to_working(wide(values.detach())).transpose(1, 2)  # (B, C, T, H, W)
        blurred = gaussian(frames.flatten(0, 1), (time, space, space)).view(frames.shape)
        # Copy in any case: writing into the result must not change the argument.
        return layout.from_working(blurred.transpose(1, 2)).to(
            values.dtype, copy=True, memory_format=torch.contiguous_format
        )

    return for_each(attributions, layout, smoothed, "attributions")
