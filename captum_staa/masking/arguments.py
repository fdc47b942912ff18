"""Check the arguments of perturbation methods: baselines, feature masks and perturbations_per_eval."""

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
    """Return one baseline per input, expanded to its shape and in its dtype. None means zero."""
    values = (0,) * len(clips) if baselines is None else baselines if isinstance(baselines, tuple) else (baselines,)
    if len(values) != len(clips):
        raise ValueError(
            f"baselines must be one per input, {len(clips)}, got {len(values)}. Pass a tuple of baselines."
        )
    return tuple(_baseline_for(clip, baseline) for clip, baseline in zip(clips, values, strict=True))


def _baseline_for(clip: Tensor, baseline: object) -> Tensor:
    if isinstance(baseline, (int, float, np.integer, np.floating)):
        number = math.inf if isinstance(baseline, int) and abs(baseline) >= 2**1023 else float(baseline)
        value = torch.tensor(number, dtype=torch.promote_types(clip.dtype, torch.float64), device=clip.device)
    elif isinstance(baseline, Tensor):
        value = baseline.detach()
        fits = value.ndim == clip.ndim and all(a in (1, b) for a, b in zip(value.shape, clip.shape, strict=True))
        if value.ndim and not fits:
            raise ValueError(
                f"a baseline must have the input's shape {tuple(clip.shape)}, or size 1 along an axis, got shape "
                f"{tuple(value.shape)}. Use a function of captum_staa.baselines, which returns the input's shape."
            )
        if value.device != clip.device:
            raise ValueError(
                f"a baseline must be on the input's device {clip.device}, got {value.device}. Move it with .to(...)."
            )
        check_dense(value, "a baseline")
    else:
        raise TypeError(
            f"a baseline must be a number or a tensor, got {type(baseline).__name__}. Call a function of "
            f"captum_staa.baselines to make one."
        )
    exact = value
    value = exact.to(clip.dtype)
    if not bool(exact.isfinite().all()) or not bool(value.isfinite().all()):
        raise ValueError(
            f"baselines must not contain nan or infinity and must be finite in {clip.dtype}, at most "
            f"{_largest(clip):.4g}, got {_summary(exact)}. Replace these values."
        )
    if not clip.is_floating_point() and not bool((value == exact).all()):
        raise ValueError(
            f"a baseline for an input of {clip.dtype} must be integers within the range of this dtype, got "
            f"{_summary(exact)}. Round the baseline, or pass inputs.float()."
        )
    return value.expand_as(clip)


def _largest(clip: Tensor) -> float:
    return (torch.finfo if clip.is_floating_point() else torch.iinfo)(clip.dtype).max


def _summary(values: Tensor) -> str:
    """Return a description for messages: the number itself, or the shape and range of several numbers."""
    if values.numel() == 1:
        return f"{values.item()!r}"
    return f"a tensor of shape {tuple(values.shape)} with values from {values.min().item()} to {values.max().item()}"


def check_perturbations_per_eval(value: object) -> None:
    """Raise unless ``value`` is an integer of at least 1."""
    check_count("perturbations_per_eval", value)


def masks_for(clips: tuple[Tensor, ...], feature_mask: Tensor | tuple[Tensor, ...] | None) -> list[Tensor]:
    """Return one mask per input, with the input's number of axes. If None, each element is a feature, as in Captum."""
    if feature_mask is None:
        return _one_feature_per_element(clips)
    values: tuple[Any, ...] = feature_mask if isinstance(feature_mask, tuple) else (feature_mask,)
    if len(values) != len(clips):
        raise ValueError(f"feature_mask must be one per input, {len(clips)}, got {len(values)}. Pass a tuple of masks.")
    masks = []
    for mask, clip in zip(values, clips, strict=True):
        if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"a feature mask must be a tensor of integers, got {kind}. Convert it with .long().")
        check_dense(mask, "a feature mask")
        sides = (1,) * (clip.ndim - mask.ndim) + tuple(mask.shape)
        if len(sides) != clip.ndim or any(side not in (1, size) for side, size in zip(sides, clip.shape, strict=True)):
            raise ValueError(
                f"a feature mask must be broadcastable to its input of shape {tuple(clip.shape)}, got shape "
                f"{tuple(mask.shape)}. Use a function of captum_staa.feature_masks, which returns such masks."
            )
        masks.append(mask.detach().to(clip.device, torch.long).view(sides))
    _check_no_gaps(masks)
    return masks


def units_for(clip: Tensor, feature_mask: Tensor, layout: VideoLayout) -> Tensor:
    """Return the feature id of each voxel, ``(1 or B, T, H, W)`` int64 on the CPU. Raise if ids differ by channel."""
    (mask,) = masks_for((clip,), feature_mask)
    return without_channels(mask, clip, layout)


def without_channels(mask: Tensor, clip: Tensor, layout: VideoLayout) -> Tensor:
    """Return a mask of :func:`masks_for` as ``(1 or B, T, H, W)`` on the CPU. Raise if ids differ by channel."""
    one = mask.narrow(layout.channel, 0, 1)
    if not bool((mask == one).all()):
        raise ValueError(
            f"feature_mask must be the same for all channels, because maps have no channel axis, got a mask of shape "
            f"{tuple(mask.shape)} in layout {layout.axes} that differs between channels. Use a function of "
            f"captum_staa.feature_masks."
        )
    return layout.mask_to_working(one.cpu()).expand(-1, *layout.extent(clip))


def _check_no_gaps(masks: list[Tensor]) -> None:
    ids = torch.cat([mask.flatten() for mask in masks])
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest == 0 and highest < len(ids) and bool(torch.bincount(ids).all()):
        return
    raise ValueError(
        f"ids of a feature mask must run from 0 to n-1 without gaps, got {len(ids.unique())} ids from {lowest} to "
        f"{highest}. Renumber them with mask.unique(return_inverse=True)[1]."
    )


def _one_feature_per_element(clips: tuple[Tensor, ...]) -> list[Tensor]:
    """Return masks with a separate id for each element of an example; ids continue from one input to the next."""
    masks, first = [], 0
    for clip in clips:
        count = clip[0].numel()
        masks.append(torch.arange(first, first + count, device=clip.device).view(1, *clip.shape[1:]))
        first += count
    return masks
