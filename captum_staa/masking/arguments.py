"""What a perturbation needs to be told, checked: baselines, feature masks, how many at once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_staa._utils.captum import BaselineType
from captum_staa._utils.checks import check_count
from captum_staa.layout import VideoLayout, check_dense


def baselines_for(clips: tuple[Tensor, ...], baselines: BaselineType) -> tuple[Tensor, ...]:
    """What replaces each voxel: one tensor per input, of its shape, dtype and device. None stands for zero."""
    each = (0,) * len(clips) if baselines is None else baselines if isinstance(baselines, tuple) else (baselines,)
    if len(each) != len(clips):
        raise ValueError(f"baselines must be one per input, {len(clips)}, got {len(each)} beside these inputs")
    return tuple(_baseline_for(clip, baseline) for clip, baseline in zip(clips, each, strict=True))


def _baseline_for(clip: Tensor, baseline: object) -> Tensor:
    if isinstance(baseline, (int, float, np.integer, np.floating)):
        number = math.inf if isinstance(baseline, int) and abs(baseline) >= 2**1023 else float(baseline)
        value = torch.tensor(number, dtype=torch.promote_types(clip.dtype, torch.float64), device=clip.device)
    elif isinstance(baseline, Tensor):
        value = baseline.detach()
        fits = value.ndim == clip.ndim and all(a in (1, b) for a, b in zip(value.shape, clip.shape, strict=True))
        if value.ndim and not fits:
            raise ValueError(
                f"a baseline must have the input's shape {tuple(clip.shape)}, or 1 where it is the same for all, but "
                f"{tuple(value.shape)} came; captum_staa.baselines makes some"
            )
        if value.device != clip.device:
            raise ValueError(f"a baseline lies on {value.device}, its input on {clip.device}; move it with .to(...)")
        check_dense(value, "a baseline")
    else:
        raise TypeError(f"a baseline is a number or a tensor, got {type(baseline).__name__}")
    given = value
    value = given.to(clip.dtype)
    if not bool(given.isfinite().all()) or not bool(value.isfinite().all()):
        raise ValueError(
            f"baselines hold no nan or infinity, and are finite in {clip.dtype}, up to {_largest(clip):.4g}, but "
            f"{_glimpse(given)} came"
        )
    if not clip.is_floating_point() and not bool((value == given).all()):
        raise ValueError(
            f"a baseline of an input of {clip.dtype} is of whole numbers within its range, got {_glimpse(given)}; "
            f"round it, or explain inputs.float()"
        )
    return value.expand_as(clip)


def _largest(clip: Tensor) -> float:
    return (torch.finfo if clip.is_floating_point() else torch.iinfo)(clip.dtype).max


def _glimpse(values: Tensor) -> str:
    """A number as it is, of more the shape and the range."""
    if values.numel() == 1:
        return f"{values.item()!r}"
    return f"one of shape {tuple(values.shape)} with values from {values.min().item()} to {values.max().item()}"


def check_perturbations_per_eval(value: object) -> None:
    """Raise unless it is a whole number of at least 1."""
    check_count("perturbations_per_eval", value)


def masks_for(clips: tuple[Tensor, ...], feature_mask: Tensor | tuple[Tensor, ...] | None) -> list[Tensor]:
    """One mask per input, of as many axes; without any, every number of an example is a feature, as in Captum."""
    if feature_mask is None:
        return _every_number(clips)
    given: tuple[Any, ...] = feature_mask if isinstance(feature_mask, tuple) else (feature_mask,)
    if len(given) != len(clips):
        raise ValueError(f"feature_mask must be one per input, {len(clips)}, got {len(given)} beside these inputs")
    masks = []
    for mask, clip in zip(given, clips, strict=True):
        if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"a feature mask is a tensor of whole numbers, got {kind}; convert it with .long()")
        check_dense(mask, "a feature mask")
        sides = (1,) * (clip.ndim - mask.ndim) + tuple(mask.shape)
        if len(sides) != clip.ndim or any(side not in (1, size) for side, size in zip(sides, clip.shape, strict=True)):
            raise ValueError(
                f"a feature mask must be broadcastable to its input of shape {tuple(clip.shape)}, but its shape is "
                f"{tuple(mask.shape)}; captum_staa.feature_masks makes some"
            )
        masks.append(mask.detach().to(clip.device, torch.long).view(sides))
    _refuse_gaps(masks)
    return masks


def units_for(clip: Tensor, feature_mask: Tensor, layout: VideoLayout) -> Tensor:
    """Which feature each voxel belongs to, whatever the channel: ``(1 or B, T, H, W)`` int64 on the CPU."""
    (mask,) = masks_for((clip,), feature_mask)
    one = mask.narrow(layout.channel, 0, 1)
    if not bool((mask == one).all()):
        raise ValueError(
            f"feature_mask must not tell channels apart, as maps have none, but of shape {tuple(mask.shape)} in layout "
            f"{layout.axes} it does; pass one of captum_staa.feature_masks"
        )
    return layout.to_working(one.cpu().expand(-1, *_with_one_channel(clip, layout)))[:, :, 0]


def _with_one_channel(clip: Tensor, layout: VideoLayout) -> list[int]:
    sizes = {**layout.size(clip), "C": 1}
    return [sizes[axis] for axis in layout.axes[1:]]


def _refuse_gaps(masks: list[Tensor]) -> None:
    ids = torch.cat([mask.flatten() for mask in masks])
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest == 0 and highest < len(ids) and bool(torch.bincount(ids).all()):
        return
    raise ValueError(
        f"ids of a feature mask run from 0 to n-1 without gaps, but {len(ids.unique())} ids from {lowest} to {highest} "
        f"came; mask.unique(return_inverse=True)[1] renumbers them"
    )


def _every_number(clips: tuple[Tensor, ...]) -> list[Tensor]:
    """Ids for every number of an example, one input after the other."""
    masks, first = [], 0
    for clip in clips:
        count = clip[0].numel()
        masks.append(torch.arange(first, first + count, device=clip.device).view(1, *clip.shape[1:]))
        first += count
    return masks
