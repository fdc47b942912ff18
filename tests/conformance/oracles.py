"""Slow reference implementations of all methods: loops over regions, quadrature by hand, dense attention.

Each function takes a :class:`Case` and the keywords of ``attribute``. It calls only the model, and no other code of the
library (except for RISE, for the random masks).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import slow_staa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_staa import RISE

from .models import Case, Tensors

SLOW_NAMES = {"videomae-bcthw": "videomae"}  # the names in slow_staa.py


def scores(case: Case, inputs: Tensors) -> Tensor:
    """Return ``(B,)``, the logit of the target of every clip."""
    logits = case.model(*inputs)
    return torch.stack([logits[i, target] for i, target in enumerate(case.target)])


def _baselines(case: Case, baselines: Any) -> Tensors:
    per_input = baselines if isinstance(baselines, tuple) else (baselines,) * len(case.inputs)
    pairs = zip(case.inputs, per_input, strict=True)
    return tuple(torch.as_tensor(0 if b is None else b, dtype=x.dtype) for x, b in pairs)


def feature_ablation(case: Case, feature_mask: Tensor | Tensors, baselines: Any = None, **_: Any) -> Tensors:
    """Replace every feature in all inputs at once. Its voxels get the fall of the score."""
    masks = feature_mask if isinstance(feature_mask, tuple) else (feature_mask,)
    covers = _baselines(case, baselines)
    maps = tuple(torch.zeros_like(x) for x in case.inputs)
    with torch.no_grad():
        whole = scores(case, case.inputs)
        for feature in {int(i) for mask in masks for i in mask.unique()}:
            inside = [(mask == feature).expand_as(x) for mask, x in zip(masks, case.inputs, strict=True)]
            altered = tuple(torch.where(*part) for part in zip(inside, covers, case.inputs, strict=True))
            fall = (whole - scores(case, altered)).view(-1, 1, 1, 1, 1)
            for part, where in zip(maps, inside, strict=True):
                part += fall * where
    return maps


def occlusion(case: Case, sides: Sequence[int], strides: Sequence[int], baselines: Any = None) -> Tensors:
    """Slide a window ``(t, h, w)`` over every input. A voxel gets the mean fall over the windows that cover it."""
    covers, maps = _baselines(case, baselines), []
    axes = [case.layout.axes.index(axis) for axis in "THW"]
    with torch.no_grad():
        whole = scores(case, case.inputs)
        for i, clip in enumerate(case.inputs):
            total, count = torch.zeros_like(clip), torch.zeros_like(clip)
            steps = []
            for size, side, stride in zip(case.sides, sides, strides, strict=True):
                starts = [0]
                while starts[-1] + side < size:
                    starts.append(starts[-1] + stride)
                steps.append(starts)
            for starts in product(*steps):
                inside = torch.zeros_like(clip)
                box = [slice(None)] * 5
                for axis, start, side in zip(axes, starts, sides, strict=True):
                    box[axis] = slice(start, start + side)
                inside[tuple(box)] = 1
                altered = list(case.inputs)
                altered[i] = clip * (1 - inside) + covers[i] * inside
                total += (whole - scores(case, tuple(altered))).view(-1, 1, 1, 1, 1) * inside
                count += inside
            maps.append(total / count)
    return tuple(maps)


class _Mirror(nn.Module):
    """A model that returns zeros and records its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Tensors] = []

    def forward(self, *clips: Tensor) -> Tensor:
        self.shown.append(tuple(clip.clone() for clip in clips))
        return clips[0].new_zeros(len(clips[0]), 1)


def rise(case: Case, n_cells: tuple[int, int, int], keep: float, baselines: Any = None, **options: Any) -> Tensors:
    """Return the covariance of score and mask divided by the variance of the mask.

    The masks are read by running RISE on a clip of ones. The distribution of the masks is not tested here.
    """
    ones, mirror = tuple(torch.ones_like(clip[:1]) for clip in case.inputs), _Mirror()
    RISE(mirror, case.layout).attribute(ones, n_cells=n_cells, keep=keep, **options)
    masks = mirror.shown[1:]  # after the whole clip
    covers, maps = _baselines(case, baselines), tuple(torch.zeros_like(clip) for clip in case.inputs)
    with torch.no_grad():
        found = []
        for drawn_masks in masks:
            parts = zip(drawn_masks, case.inputs, covers, strict=True)
            found.append(scores(case, tuple(mask * clip + (1 - mask) * cover for mask, clip, cover in parts)))
        mean = torch.stack(found).mean(0)
        for drawn_masks, score in zip(masks, found, strict=True):
            for part, mask in zip(maps, drawn_masks, strict=True):
                part += (score - mean).view(-1, 1, 1, 1, 1) * (mask - keep)
    variance = keep * (1 - keep)
    for size, count in zip(case.sides, n_cells, strict=True):
        side = -(-size // count)  # pixels per cell; a pixel k of them away from a cell's center mixes two cells
        variance *= sum((1 - k / side) ** 2 + (k / side) ** 2 for k in range(side)) / side
    channels = [clip.shape[case.layout.channel] for clip in case.inputs]
    return tuple(part / (len(masks) - 1) / variance / count for part, count in zip(maps, channels, strict=True))


def _gradients(case: Case, inputs: Tensors) -> Tensors:
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    return torch.autograd.grad(scores(case, leaves).sum(), leaves)


def saliency(case: Case, **_: Any) -> Tensors:
    """Return the magnitude of the gradient."""
    return tuple(gradient.abs() for gradient in _gradients(case, case.inputs))


def integrated_gradients(case: Case, n_steps: int, baselines: Any = None, **_: Any) -> Tensors:
    """Return the Gauss-Legendre quadrature of the gradient between baseline and clip, times their difference."""
    covers = _baselines(case, baselines)
    total = [torch.zeros_like(x) for x in case.inputs]
    for place, weight in zip(*np.polynomial.legendre.leggauss(n_steps), strict=True):
        share = (1 + float(place)) / 2
        points = tuple(b + share * (x - b) for x, b in zip(case.inputs, covers, strict=True))
        for part, gradient in zip(total, _gradients(case, points), strict=True):
            part += gradient * float(weight) / 2
    return tuple(part * (x - b) for part, x, b in zip(total, case.inputs, covers, strict=True))


def grad_cam(case: Case, weighting: str = "gradcam", relu_attributions: bool = False, **_: Any) -> Tensors:
    """Return activation times weighted gradient, summed over channels, interpolated linearly between cell centers."""
    seen: list[Tensor] = []
    handle = case.layer_module.register_forward_hook(lambda module, args, output: seen.append(output))
    score = scores(case, tuple(clip.clone().requires_grad_() for clip in case.inputs)).sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(score, seen)
    cells, slopes = (_cells(case, part.detach().double()) for part in (seen[0], gradient))
    if weighting == "gradcam":
        slopes = slopes.mean((1, 2, 3), keepdim=True)
    elif weighting == "layercam":
        slopes = slopes.clamp(min=0)
    maps = torch.einsum("bthwc,bthwc->bthw", slopes.expand_as(cells), cells)
    return spread(case, drawn(case, maps.clamp(min=0) if relu_attributions else maps))


def drawn(case: Case, maps: Tensor) -> Tensor:
    """Interpolate cells ``(B, t, h, w)`` linearly to ``(B, T, H, W)``, each divided among its pixels."""
    maps = maps.double()
    for axis, size in enumerate(case.sides, start=1):
        count = maps.shape[axis]
        centers, pixels = (np.arange(count) + 0.5) / count, (np.arange(size) + 0.5) / size
        weights = np.stack([np.interp(pixels, centers, cell) for cell in np.eye(count)])  # (count, size)
        maps = torch.tensordot(maps, torch.from_numpy(weights), ([axis], [0])).movedim(-1, axis) * count / size
    return maps.to(case.inputs[0].dtype)


def _cells(case: Case, output: Tensor) -> Tensor:
    """Return the output of the layer as ``(B, t, h, w, C)``."""
    batch = len(case.inputs[0])
    if output.ndim == 5:
        return output.permute(0, 2, 3, 4, 1)
    if output.ndim == 4:  # frames, clip after clip
        return output.unflatten(0, (batch, -1)).permute(0, 1, 3, 4, 2)
    t, h, w = slow_staa.T, slow_staa.H, slow_staa.W
    if case.name == "timesformer":  # positions, clip after clip, each with its time steps
        return output.view(batch, h, w, t, -1).permute(0, 3, 1, 2, 4)
    return output[:, slow_staa.PREFIX.get(case.name, 0) :].view(batch, t, h, w, -1)


def spread(case: Case, joint: Tensor) -> Tensors:
    """Divide ``(B, T, H, W)`` evenly among the channels of each input."""
    channel = case.layout.axes.index("C")
    counts = [clip.shape[channel] for clip in case.inputs]
    return tuple((joint / n).unsqueeze(1).expand(-1, n, -1, -1, -1).movedim(1, channel) for n in counts)


def _as_the_model_takes_it(case: Case) -> tuple[str, Any, Tensor]:
    """Return the name in slow_staa.py, a copy of the plain model, and the clip in the layout of the model."""
    name = SLOW_NAMES.get(case.name, case.name)
    clip = case.inputs[0].transpose(1, 2) if case.name in SLOW_NAMES else case.inputs[0]
    return name, copy.deepcopy(case.model.module), clip


def staa(case: Case, mode: str, rule: str = "decomposition", **_: Any) -> Tensors:
    """Run STAA over all layers, by dense matrices or by one forward per token; see slow_staa.py."""
    name, model, clip = _as_the_model_takes_it(case)
    target = torch.tensor(case.target)
    return spread(case, slow_staa.staa(name, model, clip, target, mode=mode, rule=rule, layers="all"))


def released(case: Case, **_: Any) -> Tensors:
    """Compute the result of the authors' public code, frame by frame and pixel by pixel."""
    name, model, clip = _as_the_model_takes_it(case)
    with torch.no_grad():
        maps = slow_staa.attentions(name, model, clip)[1]
    matrix = maps[-1].mean(1)  # the last layer; with divided attention, the spatial attention is the second
    prefix, count = slow_staa.PREFIX.get(name, 0), slow_staa.H * slow_staa.W
    frames, height, width = slow_staa.TUBELET.get(name, (2, 8, 8))
    draws = torch.rand(slow_staa.T, generator=torch.Generator().manual_seed(0))
    joint = []
    for example in range(len(clip)):
        rows = []
        for step in range(slow_staa.T):
            if name == "timesformer":  # only frame 0, for every step
                first = matrix[example * slow_staa.T]
                rows.append(first[step + 1, prefix:])
            else:
                query = matrix[example][min(step + 1, matrix.shape[1] - 1)]
                rows.append(query[prefix + step * count : prefix + (step + 1) * count])
        for step in range(slow_staa.T):
            recent = torch.stack(rows[max(0, step - 4) : step + 1]).mean(0).view(1, 1, slow_staa.H, slow_staa.W)
            image = F.interpolate(recent, scale_factor=(height, width), mode="bilinear")[0, 0]
            for axis in (0, 1):  # OpenCV's kernel of seven pixels, renormalized at the border
                far = (torch.arange(image.shape[axis])[:, None] - torch.arange(image.shape[axis])).abs()
                kernel = torch.exp(-(far**2) / (2 * 1.4**2)) * (far <= 3)
                kernel = kernel / kernel.sum(1, keepdim=True)
                image = kernel @ image if axis == 0 else image @ kernel.T
            low, high = (float(np.quantile(image.numpy(), q)) for q in (0.7, 0.9))
            kept = torch.where(image >= low + float(draws[step]) * (high - low), image, 0)
            joint += [(kept - kept.min()) / (kept.max() - kept.min())] * frames
    return spread(case, torch.stack(joint).unflatten(0, (len(clip), -1)))
