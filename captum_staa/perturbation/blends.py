"""Blend clips with baselines under a mask: a mask of 1 keeps the clip, a mask of 0 gives the baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from captum_staa.layout import VideoLayout

Blend = Callable[[Tensor], Tensor]
"""Function from masks ``(P, B, T, H, W)`` to clips ``(P * B, ...)``, all clips of the first mask first."""

BlendName = Literal["fade", "mean_frame", "shuffle", "freeze", "noise", "blur", "blur_time", "blur_both"]
BLENDS: tuple[BlendName, ...] = get_args(BlendName)


class BlurPyramid:
    """Blend that interpolates linearly between levels: a mask of ``l / (L - 1)`` gives the ``l``-th of ``L`` clips.

    Example:
        >>> levels = [torch.full((1, 1, 1, 1, 1), value) for value in (0.0, 4.0, 5.0)]
        >>> blend = BlurPyramid(levels, VideoLayout("BTCHW"))
        >>> blend(torch.tensor([0.0, 0.25, 0.5, 1.0]).view(4, 1, 1, 1, 1)).flatten()
        tensor([0., 2., 4., 5.])

    Args:
        levels: at least two clips of the same shape. The first is the baseline, the last is the clip itself.
        layout: the order of the axes of the clips.
    """

    def __init__(self, levels: Sequence[Tensor], layout: VideoLayout) -> None:
        self.layout, self.dtype = layout, levels[-1].dtype
        wide = torch.promote_types(self.dtype, torch.float32)
        self.levels = [level.detach().to(wide) for level in levels]
        self.stacked = torch.stack(self.levels) if len(levels) > 2 else None  # (L, B, ...), to select a level per voxel

    def __call__(self, masks: Tensor) -> Tensor:
        """Return clips ``(P * B, ...)`` of the clip's dtype for masks ``(P, B, T, H, W)`` in [0, 1]. Differentiable."""
        blended: Tensor = _Blended.apply(masks, self)
        return blended.flatten(0, 1).to(self.dtype)

    def between(self, masks: Tensor) -> Tensor:
        """Return blended clips ``(P, B, ...)`` in float32 or wider."""
        steps = len(self.levels) - 1
        kept = self.layout.from_working(masks.flatten(0, 1)[:, :, None]).unflatten(0, masks.shape[:2])
        if steps == 1:
            return torch.lerp(self.levels[0], self.levels[1], kept)
        copies = [
            torch.lerp(*self._around(mask), part * steps - (part * steps).floor().clamp(0, steps - 1))
            for mask, part in zip(masks, kept, strict=True)
        ]
        return torch.stack(copies)

    def slope(self, mask: Tensor) -> Tensor:
        """Return the derivative of the clip with respect to a mask ``(B, T, H, W)``; at a level, that from above."""
        below, above = self._around(mask)
        return (len(self.levels) - 1) * (above - below)

    def _around(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the levels below and above one mask ``(B, T, H, W)``, selected per voxel."""
        if self.stacked is None:
            return self.levels[0], self.levels[1]
        steps = len(self.levels) - 1
        number = (mask * steps).long().clamp_(0, steps - 1)
        which = self.layout.from_working(number[:, :, None]).expand(self.levels[0].shape)[None]
        return self.stacked.gather(0, which)[0], self.stacked.gather(0, which + 1)[0]


class _Blended(torch.autograd.Function):
    """The blend of a pyramid. Its backward pass handles one copy at a time and needs half the memory of autograd."""

    @staticmethod
    def forward(ctx: Any, masks: Tensor, pyramid: BlurPyramid) -> Tensor:
        ctx.save_for_backward(masks)
        ctx.pyramid = pyramid
        return pyramid.between(masks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (masks,), pyramid = ctx.saved_tensors, ctx.pyramid
        slopes = torch.empty_like(masks)
        for slope, mask, part in zip(slopes, masks, grad, strict=True):
            slope.copy_(pyramid.layout.reduce(pyramid.slope(mask) * part))
        return slopes, None
