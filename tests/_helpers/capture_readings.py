"""Readings for the tests of capture, and the explicit attention of every layer as the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from tiny_models import (
    CallsSdpa,
)
from torch import Tensor, nn
from transformers.models.timesformer.modeling_timesformer import TimesformerSelfAttention

from captum_staa import VideoClassifier
from captum_staa.attention.capture import AttentionCall, capture
from captum_staa.models import AttentionLayer

READINGS: dict[str, Callable[[AttentionCall], Tensor]] = {
    "row": lambda call: call.row(),
    "column_means": lambda call: call.column_means(),
    "head_mean": lambda call: call.head_mean(),
    "probabilities": lambda call: call.probabilities(),
}


OF_FULL: dict[str, Callable[[Tensor], Tensor]] = {  # the same, from explicit probabilities (B, h, Q, N)
    "row": lambda full: full.mean(1)[:, 0],
    "column_means": lambda full: full.mean((1, 2)),
    "head_mean": lambda full: full.mean(1),
    "probabilities": lambda full: full,
}


def layers_of(clf: VideoClassifier) -> list[AttentionLayer]:
    return list(clf.family.attention(clf.module))


def read(clf: VideoClassifier, clip: Tensor, reading: str = "head_mean", **options: Any) -> tuple[Tensor, dict]:
    logits = torch.empty(0)
    with capture(clf.module, layers_of(clf), READINGS[reading], **options) as readings:
        logits = clf(clip)
    return logits, readings


@contextmanager
def probabilities_of(clf: VideoClassifier) -> Iterator[dict[str, Tensor]]:
    """Yield the explicit attention of every layer, read by separate hooks and the eager code of the models."""
    model, found, handles = clf.module, {}, []
    if hasattr(model, "set_attn_implementation") and "Timesformer" not in type(model).__name__:
        model.set_attn_implementation("eager")

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(module, TimesformerSelfAttention):
                q, k, _ = module.qkv(args[0]).unflatten(-1, (3, module.num_heads, -1)).movedim(-3, 0).transpose(-2, -3)
                found[name] = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
            elif isinstance(module, CallsSdpa):
                found[name] = module.explicit(args[0])
            elif isinstance(module, nn.MultiheadAttention):
                x = args[0] if module.batch_first else args[0].transpose(0, 1)
                q, k, _ = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
                q, k = (y.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for y in (q, k))
                found[name] = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
            else:
                found[name] = output[1]  # transformers' attention modules return (output, weights)

        return hook

    for layer in layers_of(clf):
        handles.append(model.get_submodule(layer.module).register_forward_hook(keep(layer.module)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Boom(Exception):
    pass


def boom(*args: Any) -> None:
    raise Boom


def explicit_sdpa(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None, causal: bool) -> Tensor:
    scores = torch.einsum("...qd,...nd->...qn", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        bias = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
    return scores.softmax(-1).nan_to_num(0)
