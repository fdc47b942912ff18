"""Regularizers: they penalize masks that are rough in space or time, and do not favor any area.

Each is a function from masks ``(B, A, T, H, W)`` in [0, 1] and their areas ``(A,)`` to penalties ``(B, A)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_staa.perturbation.areas import shared_among_equals

Regularizer = Callable[[Tensor, Tensor], Tensor]
"""Function from masks ``(B, A, T, H, W)`` and their areas ``(A,)`` to penalties ``(B, A)``."""


@dataclass(frozen=True)
class TotalVariation:
    """Total variation along lines through the clip, as a mean over lines: for a binary mask, its surface.

    Example:
        >>> masks = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(1, 1, 4, 1, 1)  # rises once in four frames
        >>> TotalVariation(space=1.0, time=3.0)(masks, torch.tensor([0.5]))
        tensor([[3.]])

    ``sum over axes of weight * mean over lines of sum |m_(i+1) - m_i|``. It does not depend on the resolution.

    Args:
        space: weight of lines along height and width.
        time: weight of lines along time.
    """

    space: float = 0.2
    time: float = 0.5

    def __call__(self, masks: Tensor, areas: Tensor) -> Tensor:
        """Return penalties ``(B, A)``."""
        return _along_lines(masks, self.space, self.time, lambda steps, size: steps.abs())


@dataclass(frozen=True)
class SquaredDifferences:
    """Squared slope along lines through the clip, as a mean over lines. Softer edges cost less.

    Example:
        >>> steps = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.25, 0.75, 1.0]]).view(1, 2, 1, 1, 4)
        >>> SquaredDifferences(space=1.0)(steps, torch.tensor([0.5, 0.5]))
        tensor([[4.0000, 1.5000]])

    ``sum over axes of weight * mean over lines of n sum (m_(i+1) - m_i)^2``. For a line of ``n`` voxels and length 1,
    this is the integral of the squared slope.

    Args:
        space: weight of lines along height and width.
        time: weight of lines along time.
    """

    space: float = 0.02
    time: float = 0.05

    def __call__(self, masks: Tensor, areas: Tensor) -> Tensor:
        """Return penalties ``(B, A)``."""
        return _along_lines(masks, self.space, self.time, lambda steps, size: size * steps.square())


@dataclass(frozen=True)
class Ellipsoid:
    """Regularizer of the STEP paper: ellipsoidal windows should be full or empty, as many full as the area allows.

    ``L = weight (1/S sum_(i <= S) (c_i - 1)^2 + 1/(W - S) sum_(i > S) c_i^2)``. Here ``c`` are the means of the mask
    over W windows in descending order. The windows are ellipsoids of ``frames`` by ``pixels``.

    Example:
        >>> masks = torch.zeros(1, 2, 8, 16, 16)
        >>> masks[:, :, :, :, :8] = 1  # the left half
        >>> masks[:, 1] = masks[:, 1, :, :, torch.randperm(16, generator=torch.Generator().manual_seed(0))]
        >>> Ellipsoid(frames=4, side=0.25)(masks, torch.tensor([0.5, 0.5]))  # one connected half, and stripes
        tensor([[0.056, 0.097]])

    Args:
        frames: length of a window along time, in frames.
        side: height and width of a window, as a fraction of the frame's shorter side. The paper uses 11 of 112 pixels.
        weight: weight of the term. The paper uses 300, after 100 steps without the term.

    Note:
        This differs from the paper's code, which is not consistent. Here a window's mean is over the voxels inside the
        clip, also at the border. Windows overlap, at a distance of half a window, so ``S = a W`` of W windows can be
        full for a mask of area ``a``. The paper's code counts windows as if they did not overlap, so its two terms
        require different areas.

    Reference:
        Li et al., "Spatio-Temporal Perturbations for Video Attribution", IEEE TCSVT (2021), equation 7.
    """

    frames: int = 8
    side: float = 11 / 112
    weight: float = 1.0

    def __call__(self, masks: Tensor, areas: Tensor) -> Tensor:
        """Return penalties ``(B, A)``."""
        means = self.windows(masks)  # (B, A, W)
        ordered = means.sort(dim=2).values
        count = ordered.shape[2]
        if count == 1:
            return torch.zeros_like(means[:, :, 0])
        full_count = (areas * count).round().clamp(1, count - 1)[:, None]  # at least one full and one empty window
        full = (torch.arange(count, device=masks.device) >= count - full_count).to(masks).expand_as(ordered)
        targets = shared_among_equals(ordered.detach(), full, torch.ones_like(full))
        high = (ordered - 1).square() * targets / full_count
        return self.weight * (high + ordered.square() * (1 - targets) / (count - full_count)).sum(2)

    def windows(self, masks: Tensor) -> Tensor:
        """Return the mean of the mask over each window, ``(B, A, W)``."""
        size = masks.shape[2:]
        pixels = max(1, round(self.side * min(size[1:])))
        sides = [min(length, limit) for length, limit in zip((self.frames, pixels, pixels), size, strict=True)]
        axes = [(2 * torch.arange(side) + 1) / side - 1 for side in sides]  # voxel centers, in -1 .. 1
        inside = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0) <= 1
        kernel = inside.to(masks)[None, None]
        stride, padding = [max(1, side // 2) for side in sides], [side // 2 for side in sides]
        sums = F.conv3d(masks.flatten(0, 1)[:, None], kernel, stride=stride, padding=padding)
        voxels = F.conv3d(torch.ones_like(masks[:1, :1]), kernel, stride=stride, padding=padding)
        return (sums / voxels.clamp_min(1)).flatten(1).unflatten(0, masks.shape[:2])


REGULARIZERS: dict[str, Regularizer | None] = {
    "none": None,
    "tv": TotalVariation(),
    "squared": SquaredDifferences(),
    "ellipsoid": Ellipsoid(),
}


def _along_lines(masks: Tensor, space: float, time: float, cost: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return the weighted sum over axes of the mean over lines of the summed costs of steps between neighbors."""
    total = masks.new_zeros(masks.shape[:2])
    for axis, weight in ((2, time), (3, space), (4, space)):
        size = masks.shape[axis]
        if weight and size > 1:
            total = total + weight * (size - 1) * cost(masks.diff(dim=axis), size).mean((2, 3, 4))
    return total
