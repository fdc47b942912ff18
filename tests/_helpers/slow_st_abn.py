"""Slow reference implementation of ST-ABN from the paper's formulas, cell by cell, with the weights of a branch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_staa import TokenGrid


@dataclass
class SlowGates:
    """M ``(B, t, h, w)``, alpha ``(B, t)``, the evidence ``(B, K', t, h, w)`` and the branch's logits ``(B, K)``."""

    spatial: Tensor
    temporal: Tensor
    evidence: Tensor
    logits: Tensor


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """Apply BatchNorm with its running statistics, or GroupNorm with the statistics of the groups of each clip."""
    if isinstance(module, nn.BatchNorm3d):
        mean, variance = (each.view(1, -1, 1, 1, 1) for each in (module.running_mean, module.running_var))
    else:
        parts = x.unflatten(1, (module.num_groups, -1)).flatten(2)
        side = x.shape[1] // module.num_groups
        mean, variance = (
            each.repeat_interleave(side, 1).view(len(x), -1, 1, 1, 1)
            for each in (parts.mean(2), parts.var(2, unbiased=False))
        )
    scaled = (x - mean) / (variance + module.eps).sqrt()
    return scaled * module.weight.view(1, -1, 1, 1, 1) + module.bias.view(1, -1, 1, 1, 1)


def conv(module: nn.Module, x: Tensor) -> Tensor:
    """A convolution of stride 1 over the last axes of x, tap by tap; around the edge lie zeros, or the edge again."""
    weight, sizes = module.weight, x.shape[2:]
    pads = [side // 2 for side in weight.shape[2:]]
    mode = {"zeros": "constant", "replicate": "replicate"}[module.padding_mode]
    wide = F.pad(x, [pad for pad in reversed(pads) for _ in range(2)], mode=mode) if any(pads) else x
    total = x.new_zeros(len(x), len(weight), *sizes)
    for tap in product(*map(range, weight.shape[2:])):
        window = wide[(..., *(slice(at, at + size) for at, size in zip(tap, sizes, strict=True)))]
        total = total + torch.einsum("bc...,oc->bo...", window, weight[(..., *tap)])
    return total if module.bias is None else total + module.bias.view(1, -1, *[1] * len(sizes))


def fixed_time(head: nn.Module, maps: Tensor) -> Tensor:
    """``sigmoid(W2 relu(W1 GAP(relu(conv_T(relu(BN(conv3x3x3(A))))))))``, with the steps as conv_T's channels."""
    squeezed = norm(head.norm, conv(head.squeeze, maps)).clamp(min=0)[:, 0]  # (B, t, h, w)
    first, _, second = head.weigh
    rows = []
    for clip in squeezed:
        steps = [sum(w * step for w, step in zip(row[:, 0, 0], clip, strict=True)) for row in head.mix.weight]
        pooled = torch.stack([step.clamp(min=0).mean() for step in steps])
        hidden = (first.weight @ pooled + first.bias).clamp(min=0)
        rows.append(second.weight @ hidden + second.bias)
    return 1 / (1 + (-torch.stack(rows)).exp())


def any_time(head: nn.Module, maps: Tensor) -> Tensor:
    """The mean and the largest value of every step and channel, then two convolutions over time."""
    squeezed = norm(head.norm, conv(head.squeeze, maps)).clamp(min=0)
    pooled = torch.cat([squeezed.flatten(3).mean(3), squeezed.flatten(3).max(3).values], 1)
    return 1 / (1 + (-conv(head.weigh, conv(head.mix, pooled).clamp(min=0))[:, 0]).exp())


def gates(branch: nn.Module, features: Tensor) -> SlowGates:
    """What a branch in eval mode says of features ``(B, C, t, h, w)``; its body is taken as it is."""
    body = branch.body(features)
    maps = norm(branch.maps_norm, conv(branch.to_maps, norm(branch.body_norm, body))).clamp(min=0)  # A
    spatial = conv(branch.to_spatial, maps)
    spatial = (spatial if isinstance(branch.spatial_norm, nn.Identity) else norm(branch.spatial_norm, spatial))[:, 0]
    head = branch.to_temporal
    evidence = conv(branch.to_evidence, maps)
    return SlowGates(
        spatial=1 / (1 + (-spatial).exp()),
        temporal=fixed_time(head, maps) if hasattr(head, "steps") else any_time(head, maps),
        evidence=evidence,
        logits=sum(parts(branch, evidence)) + branch.classify.bias,
    )


def parts(branch: nn.Module, evidence: Tensor) -> list[Tensor]:
    """What every map and step adds to the branch's logits, ``(B, K)`` each: the head's rows run over steps first."""
    steps, length, added = branch.steps, evidence.shape[2], []
    for k, bin_ in product(range(evidence.shape[1]), range(steps)):
        inside = slice(bin_ * length // steps, math.ceil((bin_ + 1) * length / steps))
        mean = evidence[:, k, inside].flatten(1).mean(1)
        added.append(mean[:, None] * branch.classify.weight[:, k * steps + bin_])
    return added


def mechanism(module: nn.Module, kind: str, g: Tensor, spatial: Tensor, temporal: Tensor) -> Tensor:
    """The gated features, channel by channel; M and alpha are ``(B, t, h, w)``, or alpha is ``(B, t)``."""
    if kind == "observe":
        return g
    alpha = temporal[..., None, None].expand_as(spatial) if temporal.ndim == 2 else temporal
    if kind == "bottleneck":
        gate = spatial * alpha
        return torch.stack([gate * g[:, c] + (1 - gate) * mean for c, mean in enumerate(module.mean)], 1)
    count, weight = g.shape[1], module.mix.weight[..., 0, 0, 0]
    channels = []
    for out in range(count):
        of_space, of_time = (torch.einsum("c,bcthw->bthw", row, g) for row in weight[out].split(count))
        channels.append(((1 + spatial) if kind == "mix" else spatial) * of_space + alpha * of_time)
    mixed = torch.stack(channels, 1)
    return norm(module.norm, mixed).clamp(min=0) if kind == "mix" else g + mixed


def place(grid: TokenGrid, t: int, y: int, x: int) -> int:
    """Return the index of the token of a cell after the prefix."""
    return (t * grid.h + y) * grid.w + x if grid.order == "thw" else (y * grid.w + x) * grid.t + t


def to_cells(output: Tensor, grid: TokenGrid | None) -> Tensor:
    """Convert features, tokens with or without a prefix, or frames to ``(B, C, t, h, w)``, cell by cell."""
    if output.ndim == 5:
        return output
    assert grid is not None
    if output.ndim == 4:
        return torch.stack([output[at : at + grid.t].movedim(0, 1) for at in range(0, len(output), grid.t)])
    prefix = output.shape[1] - grid.t * grid.h * grid.w
    cells = [output[:, prefix + place(grid, *cell)] for cell in product(*map(range, grid.shape))]
    return torch.stack(cells, 2).unflatten(2, grid.shape)


def from_cells(cells: Tensor, output: Tensor, grid: TokenGrid | None) -> Tensor:
    """Convert cells back to the form of ``output``, and keep its prefix."""
    if output.ndim == 5:
        return cells
    assert grid is not None
    if output.ndim == 4:
        return torch.cat([clip.movedim(1, 0) for clip in cells])
    replaced = output.clone()
    prefix = output.shape[1] - grid.t * grid.h * grid.w
    for t, y, x in product(*map(range, grid.shape)):
        replaced[:, prefix + place(grid, t, y, x)] = cells[:, :, t, y, x]
    return replaced
