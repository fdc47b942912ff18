"""STAA from its formulas alone: dense N x N matrices, explicit loops, the models' own eager attention. Slow on purpose.

Nothing of the library's attention code is called here: not its capture, not its composition, not its smoothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T, H, W = 4, 3, 2  # of every tiny model
ROLES = {  # the sites of the tiny models in the order in which they run; "+" joins two of one block
    "videomae": ["joint", "joint"],
    "videomae-first": ["joint", "joint"],
    "timesformer": ["temporal+spatial", "temporal+spatial"],
    "timesformer-joint": ["joint", "joint"],
    "vivit": ["joint", "joint"],
    "vjepa2": ["joint", "joint", "joint", "pool"],
    "videoprism": ["spatial", "spatial", "temporal", "pool"],
    "own": ["joint", "joint"],
}
PREFIX = {"timesformer": 1, "timesformer-joint": 1, "vivit": 1, "own": 1}
TUBELET = {"timesformer": (1, 8, 8), "timesformer-joint": (1, 8, 8), "videoprism": (1, 8, 8)}
READS = {"videomae": "mean", "vjepa2": "pool", "videoprism": "pool"}  # the others read the first token


def attentions(name: str, model: nn.Module, clip: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and every attention ``(B', heads, Q, N)`` as part of the graph, in the order in which they run."""
    found: list[Tensor] = []
    kinds = ("SelfAttention", "RopeAttention", "VivitAttention", "VideoPrismAttention", "PoolingHead", "CrossAttention")
    handles = []
    for module in model.modules():
        kind = type(module).__name__
        if kind == "TimesformerSelfAttention":
            module.forward = _timesformer_attention(module, found)  # type: ignore[method-assign]
        elif hasattr(module, "explicit"):
            module.forward = _own_attention(module, found)  # type: ignore[method-assign]
        elif kind.endswith(kinds) and "predictor" not in kind.lower():
            handles.append(module.register_forward_hook(lambda m, args, output: found.append(output[1])))
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    logits = _first(model(clip)).flatten(1)
    for handle in handles:
        handle.remove()
    for module in model.modules():
        module.__dict__.pop("forward", None)
    return logits, found


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _timesformer_attention(module: Any, found: list[Tensor]) -> Any:
    def forward(x: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        width = x.shape[-1]
        q, k, v = module.qkv(x).split(width, -1)
        q, k, v = (y.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        found.append((torch.einsum("bhqd,bhnd->bhqn", q, k) / math.sqrt(q.shape[-1])).softmax(-1))
        return (torch.einsum("bhqn,bhnd->bqhd", found[-1], v).flatten(2),)

    return forward


def _own_attention(module: Any, found: list[Tensor]) -> Any:
    def forward(x: Tensor) -> Tensor:
        if hasattr(module, "qkv"):
            v = module.qkv(x).chunk(3, -1)[2]
            out = module.out
        else:
            v = F.linear(x, module.inner.in_proj_weight, module.inner.in_proj_bias).chunk(3, -1)[2]
            out = module.inner.out_proj
        found.append(module.explicit(x))
        v = v.unflatten(-1, (found[-1].shape[1], -1))
        return out(torch.einsum("bhqn,bnhd->bqhd", found[-1], v).flatten(2))

    return forward


def blocks(name: str, maps: list[Tensor], batch: int) -> list[Tensor]:
    """One dense ``(B, N, N)`` per block (``(B, 1, N)`` for a pooling query) of head-reduced maps."""
    maps, dense = list(maps), []
    for role in ROLES[name]:
        if role in ("joint", "pool"):
            dense.append(maps.pop(0))
        elif role == "temporal+spatial":
            in_time, in_space = maps.pop(0).unflatten(0, (batch, H * W)), maps.pop(0).unflatten(0, (batch, T))
            dense.append(torch.stack([_divided(s, t) for s, t in zip(in_space, in_time, strict=True)]))
        else:
            dense.append(torch.stack([_factor(m, role) for m in maps.pop(0).unflatten(0, (batch, -1))]))
    assert not maps
    return dense


def _divided(space: Tensor, time: Tensor) -> Tensor:
    """``W[(i, j), (p, q)] = S_j[i, p] * T_p[j, q]`` with tokens patch-major, frames fastest, class token first."""
    count = H * W
    dense = torch.zeros(1 + count * T, 1 + count * T, dtype=space.dtype)

    def token(patch: int, frame: int) -> int:
        return 1 + patch * T + frame

    for j in range(T):
        dense[0, 0] += space[j, 0, 0] / T  # the class token's results are averaged over frames
        for p in range(count):
            for q in range(T):
                dense[0, token(p, q)] += space[j, 0, 1 + p] / T * time[p, j, q]
        for i in range(count):
            dense[token(i, j), 0] = space[j, 1 + i, 0]  # it skips attention in time
            for p in range(count):
                for q in range(T):
                    dense[token(i, j), token(p, q)] = space[j, 1 + i, 1 + p] * time[p, j, q]
    return dense


def _factor(matrix: Tensor, role: str) -> Tensor:
    """Attention within frames, or within patches, as one matrix over tokens that stand frame after frame."""
    count = H * W
    dense = torch.zeros(T * count, T * count, dtype=matrix.dtype)
    for a in range(T * count):
        for b in range(T * count):
            (frame_a, patch_a), (frame_b, patch_b) = divmod(a, count), divmod(b, count)
            if role == "spatial" and frame_a == frame_b:
                dense[a, b] = matrix[frame_a, patch_a, patch_b]
            if role == "temporal" and patch_a == patch_b:
                dense[a, b] = matrix[patch_a, frame_a, frame_b]
    return dense


def head_weights(name: str, batch: int) -> Tensor:
    count = PREFIX.get(name, 0) + T * H * W
    weights = torch.zeros(batch, count)
    if READS.get(name, "first") == "first":
        weights[:, 0] = 1
    else:
        weights[:] = 1 / count
    return weights


def over_layers(name: str, dense: list[Tensor], layers: Any, chefer: bool) -> Tensor:
    """``(B, N)``: from the head back through the blocks."""
    batch = len(dense[0])
    weights = head_weights(name, batch)
    chosen = dense if isinstance(layers, str) else [dense[i] for i in sorted(i % len(dense) for i in layers)]
    if layers != "all":  # every block's own map, averaged
        maps = [m[:, 0] if m.shape[1] == 1 else torch.einsum("bi,bij->bj", weights, m) for m in chosen]
        return torch.stack(maps).mean(0)
    relevance = torch.eye(weights.shape[1]).expand(batch, -1, -1)  # R, from the first block on
    for matrix in chosen:
        if matrix.shape[1] == 1:  # the pooling query, behind which there is no residual connection to the tokens
            return torch.bmm(matrix, relevance)[:, 0]
        step = torch.bmm(matrix, relevance)
        relevance = relevance + step if chefer else (relevance + step) / 2
    return torch.einsum("bi,bij->bj", weights, relevance)


def to_pixels(name: str, tokens: Tensor) -> Tensor:
    """Trilinear; every token's weight spread over its tubelet."""
    t, h, w = TUBELET.get(name, (2, 8, 8))
    tokens = tokens[:, PREFIX.get(name, 0) :]
    if name.startswith("timesformer"):
        grid = tokens.view(-1, H, W, T).permute(0, 3, 1, 2)
    else:
        grid = tokens.view(-1, T, H, W)
    return F.interpolate(grid[:, None], scale_factor=(t, h, w), mode="trilinear")[:, 0] / (t * h * w)


def blur(name: str, maps: Tensor) -> Tensor:
    """A Gaussian half a tubelet long and a quarter of one wide, renormalised at the clip's borders."""
    for axis, share in ((1, 2), (2, 4), (3, 4)):
        sigma = TUBELET.get(name, (2, 8, 8))[axis - 1] / share
        place = torch.arange(maps.shape[axis], dtype=torch.float64)
        far = (place[:, None] - place).abs()
        kernel = torch.exp(-(far**2) / (2 * sigma**2)) * (far <= max(1, int(3 * sigma + 0.5)))
        kernel = (kernel / kernel.sum(1, keepdim=True)).to(maps.dtype)
        maps = torch.tensordot(maps, kernel, ([axis], [1])).movedim(-1, axis)
    return maps


def staa(name: str, model: nn.Module, clip: Tensor, target: Tensor, mode: str, rule: str, layers: Any) -> Tensor:
    """``(B, T, H, W)`` for a clip in the model's own layout, channels on the axis of size 3."""
    channel = 1 if name == "own" else 2
    leaf = clip.clone().requires_grad_()
    logits, found = attentions(name, model, leaf)
    score = logits.gather(1, target[:, None]).sum()
    heads = [attention.mean(1).detach() for attention in found]
    attended = to_pixels(name, over_layers(name, blocks(name, heads, len(clip)), layers, chefer=False))
    if mode == "attention":
        return attended
    if rule == "chefer":
        slopes = torch.autograd.grad(score, found)
        signed = [(a * g).clamp(min=0).mean(1).detach() for a, g in zip(found, slopes, strict=True)]
        return to_pixels(name, over_layers(name, blocks(name, signed, len(clip)), layers, chefer=True))
    (gradient,) = torch.autograd.grad(score, leaf)
    magnitude = blur(name, (gradient * clip).sum(channel).abs())
    if rule == "gradient":
        return magnitude
    return magnitude * attended / attended.mean((1, 2, 3), keepdim=True)
