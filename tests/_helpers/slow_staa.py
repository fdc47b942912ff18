"""Slow reference implementation of STAA: dense N x N matrices, explicit loops, the eager attention of the models.

It does not call the attention code of the library: no capture, no composition, no smoothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

T, H, W = 4, 3, 2  # of every tiny model
ROLES = {  # the attention layers of the tiny models in the order of execution; "+" joins two layers of one block
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
    """Return the logits, and every attention ``(B', heads, Q, N)`` as part of the graph, in the order of execution."""
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
    """Return one dense matrix ``(B, N, N)`` per block (``(B, 1, N)`` for a pooling query) of head-reduced maps."""
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
    """Return attention within frames, or within patches, as one matrix over tokens that are ordered by frame."""
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
    """Return ``(B, N)``, computed from the head back through the blocks."""
    batch = len(dense[0])
    weights = head_weights(name, batch)
    chosen = dense if isinstance(layers, str) else [dense[i] for i in sorted(i % len(dense) for i in layers)]
    if layers != "all":  # every block's own map, averaged
        maps = [m[:, 0] if m.shape[1] == 1 else torch.einsum("bi,bij->bj", weights, m) for m in chosen]
        return torch.stack(maps).mean(0)
    relevance = torch.eye(weights.shape[1]).expand(batch, -1, -1)  # R, from the first block on
    for matrix in chosen:
        if matrix.shape[1] == 1:  # the pooling query, which has no residual connection to the tokens
            return torch.bmm(matrix, relevance)[:, 0]
        step = torch.bmm(matrix, relevance)
        relevance = relevance + step if chefer else (relevance + step) / 2
    return torch.einsum("bi,bij->bj", weights, relevance)


def to_pixels(name: str, tokens: Tensor) -> Tensor:
    """Interpolate trilinearly. The weight of every token is divided among the pixels of its tubelet."""
    t, h, w = TUBELET.get(name, (2, 8, 8))
    tokens = tokens[:, PREFIX.get(name, 0) :]
    if name.startswith("timesformer"):
        grid = tokens.view(-1, H, W, T).permute(0, 3, 1, 2)
    else:
        grid = tokens.view(-1, T, H, W)
    return F.interpolate(grid[:, None], scale_factor=(t, h, w), mode="trilinear")[:, 0] / (t * h * w)


def spread(name: str, tokens: Tensor) -> Tensor:
    """Pixels ``(B, T, H, W)`` of shares ``(B, t, h, w)``: a Gaussian of 3/4 tubelet around each pixel, sum 1 inside."""
    sides = TUBELET.get(name, (2, 8, 8))
    maps = tokens / math.prod(sides)
    for axis, side in enumerate(sides, start=1):
        maps = maps.repeat_interleave(side, axis)
        sigma = 0.75 * side
        place = torch.arange(maps.shape[axis], dtype=torch.float64)
        far = (place[:, None] - place).abs()
        kernel = torch.exp(-(far**2) / (2 * sigma**2)) * (far <= max(1, int(3 * sigma + 0.5)))
        kernel = (kernel / kernel.sum(1, keepdim=True)).to(maps.dtype)  # row i: how the value of pixel i is distributed
        maps = torch.tensordot(maps, kernel, ([axis], [0])).movedim(-1, axis)
    return maps


class Playback(TorchFunctionMode):
    """Records attention patterns, scales and gates of one forward, and uses them in all others."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[Tensor] = []
        self.next = -1  # while recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = self._known(func)
        if known is None:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        if self.next < 0:
            value = func(*args, **kwargs)
            if known == "norm":
                shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
                eps = kwargs.get("eps", args[4] if len(args) > 4 else 1e-5)
                dims = tuple(range(-len(shape), 0))
                self.recorded.append((x.var(dims, unbiased=False, keepdim=True) + eps).rsqrt())
            else:
                self.recorded.append(value / x if known == "activation" else value)
            return value
        constant = self.recorded[self.next]
        self.next += 1
        if known == "constant":
            return constant
        if known == "activation":
            return x * constant
        shape, weight, bias = (
            *args[1:4],
            *(kwargs.get(key) for key in ("normalized_shape", "weight", "bias")[len(args) - 1 :]),
        )
        y = (x - x.mean(tuple(range(-len(shape), 0)), keepdim=True)) * constant
        return y * weight + bias

    @staticmethod
    def _known(func: Any) -> str | None:
        if func in (F.softmax, torch.softmax, Tensor.softmax):
            return "constant"
        if func in (torch.tanh, Tensor.tanh, torch.erf, Tensor.erf):  # the gate of a GELU that is written out
            return "constant"
        if func is F.layer_norm:
            return "norm"
        return "activation" if func in (F.gelu, torch._C._nn.gelu, F.silu) else None


def decomposed(name: str, model: nn.Module, clip: Tensor, target: Tensor) -> Tensor:
    """Return ``(B, t, h, w)``: the increase of the score if one embedding is doubled with fixed patterns."""
    embedding = next(module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d)))
    mode, doubled = Playback(), []

    def double(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not doubled:
            return None
        t, h, w = doubled
        output = output.clone()
        if output.ndim == 5:  # (B, D, t, h, w)
            output[:, :, t, h, w] *= 2
        else:  # (B * t, D, h, w)
            output.unflatten(0, (len(clip), T))[:, t, :, h, w] *= 2
        return output

    def score() -> Tensor:
        mode.next = 0 if mode.recorded else -1
        with torch.no_grad(), mode:
            logits, _ = attentions(name, model, clip)
        chosen = logits.gather(1, target[:, None])[:, 0]
        return chosen - (logits.sum(1) - chosen) / (logits.shape[1] - 1)

    handle = embedding.register_forward_hook(double)
    score()
    plain = score()
    shares = torch.zeros(len(clip), T, H, W, dtype=clip.dtype)
    for t in range(T):
        for h in range(H):
            for w in range(W):
                doubled[:] = t, h, w
                shares[:, t, h, w] = score() - plain
    handle.remove()
    return shares


def staa(name: str, model: nn.Module, clip: Tensor, target: Tensor, mode: str, rule: str, layers: Any) -> Tensor:
    """Return the map ``(B, T, H, W)`` for a clip in the layout of the model."""
    if mode == "relevance" and rule == "decomposition":
        return spread(name, decomposed(name, model.double(), clip.double(), target)).to(clip.dtype)
    logits, found = attentions(name, model, clip.clone().requires_grad_())
    if mode == "attention":
        heads = [attention.mean(1).detach() for attention in found]
        return to_pixels(name, over_layers(name, blocks(name, heads, len(clip)), layers, chefer=False))
    slopes = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), found)
    signed = [(a * g).clamp(min=0).mean(1).detach() for a, g in zip(found, slopes, strict=True)]
    return to_pixels(name, over_layers(name, blocks(name, signed, len(clip)), layers, chefer=True))
