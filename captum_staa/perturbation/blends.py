"""What a mask in between does to a clip: from the clip, where it is 1, towards a clip without the evidence, where 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from captum_staa.layout import VideoLayout

Blend = Callable[[Tensor], Tensor]
"""Masks ``(P, B, T, H, W)`` to clips ``(P * B, ...)``, batch after batch."""

BlendName = Literal["fade", "mean_frame", "shuffle", "freeze", "noise", "blur", "blur_time", "blur_both"]
BLENDS: tuple[BlendName, ...] = get_args(BlendName)


class BlurPyramid:
    """Linear from level to level: a mask of ``l / (L - 1)`` shows the ``l``-th of ``L`` clips.

    Example:
        >>> levels = [torch.full((1, 1, 1, 1, 1), value) for value in (0.0, 4.0, 5.0)]
        >>> blend = BlurPyramid(levels, VideoLayout("BTCHW"))
        >>> blend(torch.tensor([0.0, 0.25, 0.5, 1.0]).view(4, 1, 1, 1, 1)).flatten()
        tensor([0., 2., 4., 5.])

    Args:
        levels: at least two clips of one shape, the last of them the clip itself.
        layout: the order of their axes.
    """

    def __init__(self, levels: Sequence[Tensor], layout: VideoLayout) -> None:
        self.layout, self.dtype = layout, levels[-1].dtype
        wide = torch.promote_types(self.dtype, torch.float32)
        self.levels = [level.detach().to(wide) for level in levels]
        self.stacked = torch.stack(self.levels) if len(levels) > 2 else None  # (L, B, ...), to look up voxel by voxel

    def __call__(self, masks: Tensor) -> Tensor:
        """Masks ``(P, B, T, H, W)`` in [0, 1] to clips ``(P * B, ...)``; differentiable, of the clip's dtype."""
        blended: Tensor = _Blended.apply(masks, self)
        return blended.flatten(0, 1).to(self.dtype)

    def between(self, masks: Tensor) -> Tensor:
        """``(P, B, ...)``."""
        steps = len(self.levels) - 1
        shown = self.layout.from_working(masks.flatten(0, 1)[:, :, None]).unflatten(0, masks.shape[:2])
        if steps == 1:
            return torch.lerp(self.levels[0], self.levels[1], shown)
        copies = [
            torch.lerp(*self._around(mask), part * steps - (part * steps).floor().clamp(0, steps - 1))
            for mask, part in zip(masks, shown, strict=True)
        ]
        return torch.stack(copies)

    def slope(self, mask: Tensor) -> Tensor:
        """How fast the clip changes with one mask ``(B, T, H, W)``; at a level, as above it."""
        below, above = self._around(mask)
        return (len(self.levels) - 1) * (above - below)

    def _around(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The levels below and above what one mask shows, voxel by voxel."""
        if self.stacked is None:
            return self.levels[0], self.levels[1]
        steps = len(self.levels) - 1
        number = (mask * steps).long().clamp_(0, steps - 1)
        which = self.layout.from_working(number[:, :, None]).expand(self.levels[0].shape)[None]
        return self.stacked.gather(0, which)[0], self.stacked.gather(0, which + 1)[0]


class _Blended(torch.autograd.Function):
    """A ladder's blend with a gradient that takes one copy after the other, in half the memory of autograd's own."""

    @staticmethod
    def forward(ctx: Any, masks: Tensor, ladder: BlurPyramid) -> Tensor:
        ctx.save_for_backward(masks)
        ctx.ladder = ladder
        return ladder.between(masks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (masks,), ladder = ctx.saved_tensors, ctx.ladder
        slopes = torch.empty_like(masks)
        for slope, mask, part in zip(slopes, masks, grad, strict=True):
            slope.copy_(ladder.layout.reduce(ladder.slope(mask) * part))
        return slopes, None
