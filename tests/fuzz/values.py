"""Random arguments: clips of unusual shapes, dtypes and memory layouts, with targets, baselines and masks."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from captum_staa import VideoLayout

from .models import CLASSES

LAYOUTS = tuple("B" + "".join(rest) for rest in permutations("TCHW"))
USUAL = ("BTCHW", "BCTHW")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MEMORY = ("contiguous", "permuted", "stepped", "expanded", "channels last", "part", "requires grad", "of a graph")

Draw = Any
layouts = st.one_of(st.sampled_from(USUAL), st.sampled_from(LAYOUTS))
seeds = st.integers(0, 2**31)


def shape(draw: Draw, most: int = 7, batch: int = 3, frames: int = 5, least: int = 1) -> dict[str, int]:
    """Return sizes by letter. Single frames and non-square frames are frequent."""
    return {
        "B": draw(st.integers(1, batch)),
        "T": draw(st.one_of(st.just(1), st.integers(1, frames))),
        "C": draw(st.integers(1, 3)),
        "H": draw(st.integers(least, most)),
        "W": draw(st.integers(least, most)),
    }


def normal(draw: Draw, *sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(draw(seeds)))


def clip_of(
    draw: Draw,
    axes: str,
    sizes: dict[str, int],
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    memory: tuple[str, ...] = MEMORY,
) -> Tensor:
    """Return a clip in a layout, with a random memory layout."""
    clip = normal(draw, *(sizes[axis] for axis in axes)).to(draw(st.sampled_from(dtypes)))
    return in_memory(draw, clip, draw(st.sampled_from(memory)))


def in_memory(draw: Draw, clip: Tensor, how: str) -> Tensor:
    """Return the same values with other strides ("expanded" repeats some of them)."""
    if how == "permuted":
        order = draw(st.permutations(range(clip.ndim)))
        return clip.permute(order).contiguous().permute([order.index(i) for i in range(clip.ndim)])
    if how == "stepped":
        return torch.stack([clip, -clip], -1).flatten(-2)[..., ::2]
    if how == "expanded":
        axis = draw(st.integers(1, clip.ndim - 1))
        return clip.narrow(axis, 0, 1).expand_as(clip)
    if how == "channels last" and clip.ndim == 5:
        return clip.to(memory_format=torch.channels_last_3d)
    if how == "part":
        return torch.cat([clip, clip], 0)[len(clip) :]
    if how == "requires grad":
        return clip.clone().requires_grad_()
    if how == "of a graph":
        return clip.clone().requires_grad_() * 1
    return clip


def target_of(draw: Draw, batch: int, classes: int = CLASSES) -> Any:
    """Return a target in one of the forms that Captum accepts."""
    per_clip = [draw(st.integers(0, classes - 1)) for _ in range(batch)]
    first = per_clip[0]
    forms = [first, torch.tensor(first), per_clip, torch.tensor(per_clip), (first,), [(i,) for i in per_clip]]
    return draw(st.sampled_from(forms))


def target_at(target: Any, i: int) -> Any:
    """Return the target of one clip of the batch."""
    if isinstance(target, list):
        return target[i : i + 1]
    return target[i : i + 1] if isinstance(target, Tensor) and target.ndim else target


def classes_of(target: Any, batch: int) -> list[int]:
    """Return the class of each clip, for all forms of a target."""
    if isinstance(target, Tensor):
        return target.reshape(-1).expand(batch).tolist() if target.numel() == 1 else target.tolist()
    if isinstance(target, list):
        return [one[0] if isinstance(one, tuple) else one for one in target]
    return [target[0] if isinstance(target, tuple) else target] * batch


def baseline_of(draw: Draw, clip: Tensor) -> Any:
    """Return a number, or a tensor with size 1 along some axes of the clip."""
    if draw(st.booleans()):
        return draw(st.sampled_from([None, 0, 1, -0.5, True, torch.tensor(0.25)]))
    sides = [draw(st.sampled_from([1, size])) for size in clip.shape]
    return normal(draw, *sides).to(clip.dtype)


def baseline_at(baseline: Any, i: int) -> Any:
    batched = isinstance(baseline, Tensor) and baseline.ndim == 5 and len(baseline) > 1
    return baseline[i : i + 1] if batched else baseline


def mask_of(draw: Draw, clip: Tensor, axes: str, channels: bool = True, batch: bool = True) -> Tensor:
    """Return ids without gaps, with size 1 along some axes, in one of the integer dtypes."""
    sides = [draw(st.sampled_from([1, size])) for size in clip.shape]
    if not batch:
        sides[0] = 1
    if not channels:
        sides[axes.index("C")] = 1
    ids = torch.randint(4, sides, generator=torch.Generator().manual_seed(draw(seeds)))
    ids = ids.unique(return_inverse=True)[1]
    return ids.to(draw(st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.int16])))


def in_axes(value: Any, axes: str, other: str) -> Any:
    """Convert a 5-D tensor from one layout to another. Other values are not changed."""
    if not isinstance(value, Tensor) or value.ndim != 5:
        return value
    return value.permute([axes.index(letter) for letter in other])


def working(clip: Tensor, axes: str) -> Tensor:
    """``(B, T, C, H, W)``."""
    return in_axes(clip, axes, "BTCHW")


def other_axes(draw: Draw, axes: str) -> str:
    return draw(st.sampled_from([one for one in LAYOUTS if one != axes]))


def wide(value: Tensor) -> Tensor:
    return value.detach().double()


def extent(clip: Tensor, axes: str) -> tuple[int, int, int]:
    return VideoLayout(axes, clip.shape[axes.index("C")]).extent(clip)
