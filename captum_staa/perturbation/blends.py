"""Blend clips with baselines under a mask: a mask of 1 keeps the clip, a mask of 0 gives the baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from captum_staa import baselines
from captum_staa.layout import WORKING, VideoLayout

Blend = Callable[[Tensor], Tensor]
"""Function from masks ``(P, B, T, H, W)`` to clips ``(P * B, T, C, H, W)``, all clips of the first mask first."""

BlendName = Literal["fade", "mean_frame", "shuffle", "freeze", "noise", "blur", "blur_time", "blur_both", "pyramid"]
BLENDS: tuple[BlendName, ...] = get_args(BlendName)

_OF_SEVERAL_FRAMES = ("mean_frame", "shuffle", "freeze", "blur_time")
_BLURRED = {"blur": (1, 0), "blur_time": (0, 1), "blur_both": (1, 1), "pyramid": (1, 0)}  # whether to blur space, time
_LEVELS = 8  # clips in a pyramid, as in the papers
_SPACE = 20 / 112  # largest standard deviation, as a fraction of the shorter side; 20 of 112 pixels in the paper
_TIME = 1 / 4  # largest standard deviation, as a fraction of the clip's length


class BlurPyramid:
    """Blend that interpolates linearly between levels: a mask of ``l / (L - 1)`` gives the ``l``-th of ``L`` clips.

    Example:
        >>> levels = [torch.full((1, 1, 1, 1, 1), value) for value in (0.0, 4.0, 5.0)]
        >>> BlurPyramid(levels)(torch.tensor([0.0, 0.25, 0.5, 1.0]).view(4, 1, 1, 1, 1)).flatten()
        tensor([0., 2., 4., 5.])

    Args:
        levels: at least two clips ``(B, T, C, H, W)``. The first is the baseline, the last is the clip itself.
    """

    def __init__(self, levels: Sequence[Tensor]) -> None:
        self.dtype = levels[-1].dtype
        wide = torch.promote_types(self.dtype, torch.float32)
        self.levels = [level.detach().to(wide) for level in levels]
        self.stacked = torch.stack(self.levels) if len(levels) > 2 else None  # (L, B, ...), to select a level per voxel

    def __call__(self, masks: Tensor) -> Tensor:
        """Return clips ``(P * B, T, C, H, W)`` of the clip's dtype for masks ``(P, B, T, H, W)`` in [0, 1].

        Differentiable.
        """
        blended: Tensor = _Blended.apply(masks, self)
        return blended.flatten(0, 1).to(self.dtype)

    def between(self, masks: Tensor) -> Tensor:
        """Return blended clips ``(P, B, T, C, H, W)`` in float32 or wider."""
        steps = len(self.levels) - 1
        kept = masks.unsqueeze(3)  # (P, B, T, 1, H, W)
        if steps == 1:
            return torch.lerp(self.levels[0], self.levels[1], kept)
        blended = [
            torch.lerp(*self._around(mask), part * steps - (part * steps).floor().clamp(0, steps - 1))
            for mask, part in zip(masks, kept, strict=True)
        ]
        return torch.stack(blended)

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
        which = number.unsqueeze(2).expand(self.levels[0].shape)[None]  # (1, B, T, C, H, W)
        return self.stacked.gather(0, which)[0], self.stacked.gather(0, which + 1)[0]


class _Blended(torch.autograd.Function):
    """The blend of a pyramid. Its backward pass handles one mask at a time and needs half the memory of autograd."""

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
            slope.copy_((pyramid.slope(mask) * part).sum(2))
        return slopes, None


def blends_of(names: Sequence[BlendName], inputs: Tensor, baseline: Tensor | None) -> list[BlurPyramid]:
    """Return the blends of one call.

    Args:
        names: names of the blends.
        inputs: ``(B, T, C, H, W)`` floats.
        baseline: tensor of the same shape that replaces removed voxels, in place of all named blends. None means the
            named blends, and zero for ``"fade"``.
    """
    if baseline is not None:
        return [blend_of("fade", inputs, baseline)]
    if inputs.shape[1] == 1:  # no other frame can be the baseline
        names = [name for name in names if name not in _OF_SEVERAL_FRAMES] or ["fade"]
    return [blend_of(name, inputs, torch.zeros_like(inputs)) for name in names]


def blend_of(name: BlendName, inputs: Tensor, baseline: Tensor) -> BlurPyramid:
    """Return the blend of this name, with its baseline clips computed once.

    Example:
        >>> inputs = torch.rand(1, 4, 3, 8, 8)
        >>> blend = blend_of("pyramid", inputs, torch.zeros_like(inputs))
        >>> bool((blend(torch.ones(1, 1, 4, 8, 8)) == inputs).all())
        True

    Args:
        name: name of the blend.

            - ``"fade"``: blends with ``baseline``.
            - ``"mean_frame"``, ``"shuffle"``, ``"freeze"`` or ``"noise"``: blends with the baseline of this name in
              ``captum_staa.baselines``.
            - ``"blur"``: blends with blurred frames. The standard deviation is 18 % of the shorter side (20 of 112
              pixels).
            - ``"blur_time"``: blends with the clip blurred along time. The standard deviation is a quarter of the
              clip's length.
            - ``"blur_both"``: blends with the clip blurred in space and time.
            - ``"pyramid"``: a pyramid of 8 clips with blur that decreases linearly from that of ``"blur"`` to none, as
              in the papers. It takes eight times the memory and time of the other blends.

        inputs: ``(B, T, C, H, W)`` floats.
        baseline: tensor of the same shape, used by ``"fade"`` only.

    Returns:
        A :class:`BlurPyramid`.

    Reference:
        Fong, Patrick and Vedaldi, ICCV 2019, section 3.3, in space; Li et al., IEEE TCSVT 2021, for clips.
    """
    if name == "fade":
        return BlurPyramid((baseline, inputs))
    layout = VideoLayout(WORKING, channels=inputs.shape[2])
    if name not in _BLURRED:
        # one clip at a time: random draws must not depend on the position of a clip in its batch
        per_clip = [getattr(baselines, name)(clip, layout) for clip in inputs.split(1)]
        return BlurPyramid((torch.cat(per_clip), inputs))
    space, time = _BLURRED[name]
    frames, _, height, width = inputs.shape[1:]
    widest = (_SPACE * min(height, width) * space, _TIME * frames * time)
    levels = _LEVELS if name == "pyramid" else 2
    factors = [1 - level / (levels - 1) for level in range(levels - 1)]
    blurred = [baselines.blur(inputs, layout, space=factor * widest[0], time=factor * widest[1]) for factor in factors]
    return BlurPyramid((*blurred, inputs))
