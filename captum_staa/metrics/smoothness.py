"""How alike are neighbors, in space and in time? A property of a map, and no proof of its truth."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from captum_staa._utils import notebook
from captum_staa.layout import VideoLayout
from captum_staa.metrics._shared import metric
from captum_staa.result import Array, as_maps


class Smoothness(NamedTuple):
    """Likeness of neighbors, one value per clip.

    Attributes:
        space: ``(B,)`` float64, of pixels beside or above each other in a frame.
        time: ``(B,)`` float64, of the same pixel in two successive frames.
    """

    space: Tensor
    time: Tensor

    def _repr_html_(self) -> str:
        return notebook.block(
            "Smoothness", notebook.by_clip({"space": self.space.tolist(), "time": self.time.tolist()})
        )


@metric(higher_is_better=None, lowest=float("-inf"), highest=1.0)
def smoothness(attributions: Array, layout: VideoLayout | str | None = None) -> Smoothness:
    """Lag-one autocorrelation of a map: 1 where neighbors are equal, 0 for white noise, about -1 for a checkerboard.

    Example:
        >>> import torch
        >>> noise = torch.randn(1, 16, 48, 48, generator=torch.Generator().manual_seed(0))
        >>> space, time = smoothness(noise)
        >>> abs(space.item()) < 0.02, abs(time.item()) < 0.02
        (True, True)
        >>> still = noise[:, :1].expand(1, 16, 48, 48)  # the same noise in every frame
        >>> round(smoothness(still).space.item(), 1), smoothness(still).time.item()
        (0.0, 1.0)
        >>> attributions = torch.arange(8.0).reshape(1, 1, 8, 1, 1).expand(1, 3, 8, 4, 4)  # as of a 3D CNN: a slow rise
        >>> smoothness(attributions, "BCTHW")
        Smoothness(space=tensor([1.], dtype=torch.float64), time=tensor([0.9055], dtype=torch.float64))

    With ``d`` the differences of neighbors and ``s²`` the unbiased variance of the whole clip,
    ``smoothness = 1 - mean(d²) / (2 s²)``: one less Geary's contiguity ratio C; along time, half of von Neumann's ratio
    takes the place of C. Why this one:

    - Scale and offset cancel, so that methods whose units differ can be compared; total variation cannot.
    - Signs count: a map that flips its sign from pixel to pixel is rough, although its magnitude is flat.
    - If all voxels of a clip change places at random, the mean is 0 exactly, whatever the values and the size.
    - Space and time are measured on one scale, the contrast of the clip, so that the two can be compared.

    High is not good. A blurred random map is smooth and worthless, and a true map has sharp borders: read this beside a
    metric of truth, such as :func:`auroc`.

    Args:
        attributions: signed, finite floats: of the clip's shape with ``layout``, or maps ``(B, T, H, W)`` without.
            Pass ``attributions.abs()`` where magnitude is meant.
        layout: the order of a clip's axes, such as ``"BTCHW"``. Channels are summed, as in pictures.

    Returns:
        :class:`Smoothness`, no value above 1. nan where nothing can be said: both for a clip without any contrast,
        ``time`` for a single frame, ``space`` for a single pixel.

    Raises:
        TypeError: ``attributions`` is no tensor of floats.
        ValueError: its shape is another, or it holds nan or infinity.

    Reference:
        Geary, "The Contiguity Ratio and Statistical Mapping", The Incorporated Statistician 5 (1954). Von Neumann,
        "Distribution of the Ratio of the Mean Square Successive Difference to the Variance", Annals of Mathematical
        Statistics 12 (1941).
    """
    maps = as_maps(attributions, layout)
    maps = maps - maps[:, :1, :1, :1]  # no contrast at all becomes exactly 0, and so, below, nan
    maps = maps / maps.abs().amax((1, 2, 3), keepdim=True)  # the squares of 1e-200 and 1e200 are out of range
    deviations = maps - maps.mean((1, 2, 3), keepdim=True)
    variance = deviations.square().sum((1, 2, 3)) / (maps[0].numel() - 1)
    return Smoothness(space=_likeness(maps, variance, axes=(2, 3)), time=_likeness(maps, variance, axes=(1,)))


def _likeness(maps: Tensor, variance: Tensor, axes: tuple[int, ...]) -> Tensor:
    """One less Geary's C, ``(B,)``, over all pairs of neighbors along the axes."""
    differences = torch.cat([maps.diff(dim=axis).flatten(1) for axis in axes], dim=1)  # (B, pairs)
    return 1 - differences.square().mean(1) / (2 * variance)
