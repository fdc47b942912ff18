"""Slow reference of attention rollout on the models of undeclared_models.py: explicit matrices, dense blocks.

Nothing of the library is used. The dense matrices number tokens as each model's author would: see ``blocks``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from undeclared_models import HEADS, Divided, Encoder, FrameEncoder, MultiHead, PlainViT


@contextmanager
def explicit_attention(model: nn.Module) -> Iterator[list[Tensor]]:
    """Run every attention with its explicit matrix, and yield the matrices ``(L, h, Q, N)`` of a forward."""
    found: list[Tensor] = []

    def of_mha(mha: nn.MultiheadAttention, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, mha.in_proj_weight, mha.in_proj_bias).chunk(3, -1)  # x: (B, N, D)
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (q, k, v))
        found.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))
        return mha.out_proj((found[-1] @ v).transpose(1, 2).flatten(2))

    def replaced(module: Any) -> Any:
        if isinstance(module, MultiHead):
            return lambda x: of_mha(module.attn, x)
        if isinstance(module, nn.MultiheadAttention):
            return lambda x, *rest, **options: (of_mha(module, x), None)

        def forward(x: Tensor) -> Tensor:
            found.append(module.explicit(x))
            return module.proj((found[-1] @ module.parts(x)[2]).transpose(1, 2).flatten(2))

        return forward

    inside = [m for m in model.modules() if hasattr(m, "explicit")]
    inside += [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)] if isinstance(model, Encoder) else []
    for module in inside:
        module.forward = replaced(module)  # type: ignore[method-assign]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield found
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module in inside:
            del module.forward


def blocks(model: nn.Module, maps: list[Tensor], batch: int) -> list[Tensor]:
    """Return one dense matrix ``(B, N, N)`` per residual block, from head-reduced maps ``(L, Q, N)``."""
    if isinstance(model, (PlainViT, Encoder)):
        return maps
    if isinstance(model, Divided):  # class token, then frame by frame
        rows = [
            m.unflatten(0, (-1, batch)).transpose(0, 1) if model.batch_inside else m.unflatten(0, (batch, -1))
            for m in maps
        ]
        return [_divided(time, space) for time, space in zip(rows[::2], rows[1::2], strict=True)]
    assert isinstance(model, FrameEncoder)  # class token of frame f: 7 f, its patches: 7 f + 1 ...
    dense = []
    for m in maps:
        matrix = torch.eye(56).repeat(batch, 1, 1)
        if m.shape[-1] == 7:
            for f, of_frame in enumerate(m.unflatten(0, (batch, 8)).unbind(1)):
                matrix[:, 7 * f : 7 * f + 7, 7 * f : 7 * f + 7] = of_frame
        else:
            matrix[:, ::7, ::7] = m
        dense.append(matrix)
    return dense


def _divided(time: Tensor, space: Tensor) -> Tensor:
    """``time (B, 6, 8, 8)``, ``space (B, 8, 7, 7)``: the path from (f, p) to (g, q) is unique, by the track of q."""
    dense = torch.zeros(len(time), 49, 49)
    for f in range(8):
        for g in range(8):
            for q in range(6):
                dense[:, 0, 1 + 6 * g + q] += space[:, f, 0, 1 + q] / 8 * time[:, q, f, g]
                for p in range(6):
                    dense[:, 1 + 6 * f + p, 1 + 6 * g + q] = space[:, f, 1 + p, 1 + q] * time[:, q, f, g]
        dense[:, 0, 0] += space[:, f, 0, 0] / 8
        for p in range(6):
            dense[:, 1 + 6 * f + p, 0] = space[:, f, 1 + p, 0]
    return dense


def head(model: nn.Module) -> Tensor:
    """Return what the head takes from each token, ``(N,)``."""
    if isinstance(model, PlainViT):
        return model.weights()
    if isinstance(model, Encoder):
        return torch.full((24,), 1 / 24)
    weights = torch.zeros(49 if isinstance(model, Divided) else 56)
    if isinstance(model, Divided):
        weights[0] = 1
    else:
        weights[::7] = 1 / 8
    return weights


def to_pixels(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the weights ``(B, N)`` spread evenly over the pixels of their tokens, ``(B, T, H, W)``."""
    if isinstance(model, PlainViT):
        first = model.prefix.shape[1]
        patches = tokens[:, first : first + 24]
        patches = patches.view(-1, 3, 2, 4).movedim(-1, 1) if model.time_fastest else patches.view(-1, 4, 3, 2)
    elif isinstance(model, Encoder):
        patches = tokens.view(-1, 4, 3, 2)
    elif isinstance(model, Divided):
        patches = tokens[:, 1:].view(-1, 8, 3, 2)
    else:
        patches = tokens.view(-1, 8, 7)[:, :, 1:].unflatten(2, (3, 2))
    frames = 8 // patches.shape[1]
    return torch.kron(patches.contiguous(), torch.ones(1, frames, 8, 8)) / (frames * 64)


def attention_map(model: nn.Module, clip: Tensor, layers: Any = "all", target: int | None = None) -> Tensor:
    """Return attention rollout; with a target, by Chefer's rule."""
    with explicit_attention(model) as found:
        logits = model(clip)
        maps = [attention.mean(1).detach() for attention in found]
        if target is not None:
            gradients = torch.autograd.grad(logits[:, target].sum(), found)
            maps = [(a * g).clamp(min=0).mean(1).detach() for a, g in zip(found, gradients, strict=True)]
    dense = blocks(model, maps, len(clip))
    weights = head(model).expand(len(clip), -1)[:, None]
    if layers == "all":
        for matrix in reversed(dense):
            weights = weights + weights @ matrix if target is not None else (weights + weights @ matrix) / 2
    else:
        chosen = dense if layers == "mean" else [dense[index] for index in layers]
        if isinstance(model, FrameEncoder):  # attention in time is among class tokens, and sees no pixels
            chosen = chosen[:2]
        weights = sum(weights @ matrix for matrix in chosen) / len(chosen)  # type: ignore[assignment]
    return to_pixels(model, weights[:, 0])
