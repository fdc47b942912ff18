"""Maps that know nothing of the model: what every method must beat, and every metric must tell from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from captum_staa.layout import VideoLayout
from captum_staa.maps import Array, maps_of
from captum_staa.randomness import generator_or_seeded


def controls(
    clip: Tensor,
    layout: VideoLayout | str,
    attributions: Array | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Control maps for a clip: random, uniform, centre and, of an attribution, its inverse.

    Example:
        >>> clip = torch.rand(2, 3, 8, 16, 16)
        >>> maps = controls(clip, "BCTHW", attributions=torch.randn(2, 3, 8, 16, 16))
        >>> {name: tuple(control.shape) for name, control in maps.items()}
        {'random': (2, 8, 16, 16), 'uniform': (2, 8, 16, 16), 'centre': (2, 8, 16, 16), 'inverted': (2, 8, 16, 16)}
        >>> from captum_staa import metrics
        >>> truth = torch.zeros(2, 8, 16, 16, dtype=torch.bool)
        >>> truth[:, 3:5, 6:10, 6:10] = True  # the subject in the middle, as camera people like it
        >>> metrics.auroc(maps["uniform"], truth), metrics.auroc(maps["centre"], truth) > 0.9
        (tensor([0.5000, 0.5000], dtype=torch.float64), tensor([True, True]))

    - ``random``: every voxel uniform in [0, 1), drawn by itself. The metric's chance level, ties aside.
    - ``uniform``: 1 everywhere. No order at all: what a metric makes of ties alone.
    - ``centre``: ``1 - d / sqrt(3)``, with ``d`` the distance of a voxel's middle from the middle of the clip, where
      half the clip's length, height and width count 1 each. In (0, 1]; where evidence tends to lie in the middle, this
      is the map to beat, not the random one.
    - ``inverted``: minus the map. A metric that gives it the map's own score is blind to order.

    Args:
        clip: floats of five axes. Only its shape and its device count.
        layout: the order of its axes, such as ``"BTCHW"``.
        attributions: what to invert: of the clip's shape, or maps ``(B, T, H, W)``. Channels are summed.
        generator: draws the random maps; None is one seeded with 0, for this call alone. Clips are drawn one after the
            other, so one generator over several calls gives each clip the same map, however they are batched.

    Returns:
        Maps ``(B, T, H, W)`` by name, float64 on the clip's device: in float32 the voxels of a clip would often tie.

    Raises:
        TypeError: clip or attributions hold no floats, or ``generator`` is no torch.Generator.
        ValueError: their shapes do not fit the layout or each other, or they hold nan or infinity.

    Reference:
        The centre as a baseline: Judd, Ehinger, Durand and Torralba, "Learning to Predict Where Humans Look", ICCV
        (2009).
    """
    layout = VideoLayout.of(layout)
    layout.check_values(clip, "clip")
    draw = generator_or_seeded(generator)
    sizes = layout.size(clip)
    shape = tuple(sizes[axis] for axis in "BTHW")
    inverted = None if attributions is None else -maps_of(attributions, clip, layout).to(clip.device)

    noise = [torch.rand(shape[1:], generator=draw, dtype=torch.float64, device=draw.device) for _ in range(shape[0])]
    found = {
        "random": torch.stack(noise).to(clip.device),
        "uniform": torch.ones(shape, dtype=torch.float64, device=clip.device),
        "centre": _centre(*shape[1:]).to(clip.device).repeat(shape[0], 1, 1, 1),
    }
    return found if inverted is None else {**found, "inverted": inverted}


def _centre(*sizes: int) -> Tensor:
    """``(T, H, W)``."""
    middles = [(2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1 for size in sizes]  # each in (-1, 1)
    squares = torch.stack(torch.meshgrid(*middles, indexing="ij")).square()  # (3, T, H, W)
    return 1 - squares.sum(0).sqrt() / math.sqrt(len(sizes))
