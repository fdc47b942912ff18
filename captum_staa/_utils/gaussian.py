"""The one Gaussian blur over space and time that methods, baselines and users' maps share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SPREAD = 0.75  # standard deviation, in tubelets or cells, that gathers neighbors of opposite signs into one object


def gaussian(
    maps: Tensor,
    sigma: tuple[float, float, float],
    *,
    radius: tuple[int, int, int] | None = None,
    keep_sums: bool = False,
) -> Tensor:
    """Blur ``(B, T, H, W)`` maps along time, height and width.

    Args:
        maps: any float tensor of four axes.
        sigma: standard deviation per axis ``(T, H, W)``, in frames and pixels; 0 leaves an axis alone.
        radius: half-width of the kernel per axis; three standard deviations by default.
        keep_sums: spread each value over its neighborhood inside the clip, so that the sum of a map stays the same,
            also at borders. Otherwise each result is the mean of its neighborhood, and a constant map stays constant.

    Returns:
        Blurred maps. What lies outside the clip is unknown, not zero: at borders the kernel is normalized over what it
        covers, so the first and last frames lose nothing.
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
