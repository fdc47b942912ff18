"""Slow formulas for answers of video language models: frozen module by module, eager attention, changed features."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_staa.models import AnswerClassifier


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a language model with patterns, scales and gates as constants, module by module."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    def attend(module, query, key, value, attention_mask, scaling=None, **options):
        repeats = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(repeats, 1) for part in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        if query.shape[2] > 1 and getattr(module, "is_causal", False):
            scores = scores.masked_fill(~torch.ones(scores.shape[2:], dtype=torch.bool).tril(), -torch.inf)
        return (scores.softmax(-1).detach() @ value).transpose(1, 2).contiguous(), None

    def rms_norm(self, x):
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        return self.weight * (x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt().detach())

    def layer_norm(self, x):
        centered = (x - x.mean(-1, keepdim=True)).contiguous()
        scale = (x.var(-1, unbiased=False, keepdim=True) + self.eps).rsqrt().detach()
        return centered * scale * self.weight + self.bias

    def gated(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        gate = gate * (F.silu(gate) / gate).detach()
        return self.down_proj((gate * up.detach() + gate.detach() * up) / 2)

    def activation(self, x):
        return x * (type(self).forward(self, x) / x).detach()

    AttentionInterface.register("slow_frozen", attend)
    AttentionMaskInterface.register("slow_frozen", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = copy.deepcopy(model)
    model.set_attn_implementation("slow_frozen")
    for module in list(model.modules()):
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = MethodType(rms_norm, module)
        elif isinstance(module, nn.LayerNorm):
            module.forward = MethodType(layer_norm, module)
        elif all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj")):
            module.forward = MethodType(gated, module)
        elif "GELU" in kind:
            module.forward = MethodType(activation, module)
    return model


def relevance(classifier: AnswerClassifier, clip: Tensor, token: int) -> Tensor:
    """Gradient times input ``(B, T, H, W)`` of a token's contrast in the frozen copy. Token n is the whole answer."""
    vlm = copy.copy(classifier.vlm)
    vlm._modules = {**vlm._modules, "model": frozen_copy(vlm.model)}
    leaf = clip.clone().requires_grad_()
    logits = vlm.answer_logits(leaf, classifier.prompt_for(clip), classifier.answer)
    scores = [_contrast(logits[:, i], int(own), classifier.versus_ids[i]) for i, own in enumerate(classifier.answer)]
    score = sum(scores) if token == len(scores) else scores[token]
    return (torch.autograd.grad(score.sum(), leaf)[0] * clip).sum(2)


def _contrast(logits: Tensor, own: int, others: Tensor) -> Tensor:
    if len(others) == 0:
        others = torch.tensor([i for i in range(logits.shape[1]) if i != own])
    return logits[:, own] - logits[:, others].mean(1)


def merged(maps: Tensor, patch: int) -> Tensor:
    """Spread each value of ``(B, T, H, W)`` over its neighborhood of 2.5 frames and .75 patches, keeping sums."""

    def kernel(size: int, width: float) -> Tensor:  # (from, to)
        distance = (torch.arange(size)[:, None] - torch.arange(size)).double()
        weights = torch.exp(-((distance / width) ** 2) / 2) * (distance.abs() <= int(3 * width + 0.5))
        return weights / weights.sum(1, keepdim=True)

    sides = zip(maps.shape[1:], (2.5, 0.75 * patch, 0.75 * patch), strict=True)
    return torch.einsum("bthw,tT,hH,wW->bTHW", maps.double(), *(kernel(*side) for side in sides)).to(maps)


@torch.no_grad()
def attention(classifier: AnswerClassifier, clip: Tensor, token: int) -> Tensor:
    """Mean over heads and layers of the eager attention of a token to each video token, ``(B, t, h, w)``."""
    vlm = copy.copy(classifier.vlm)
    model = copy.deepcopy(vlm.model)
    model.set_attn_implementation("eager")
    prompt, count = classifier.prompt_for(clip), len(classifier.answer)
    weights = model(**vlm.inputs(clip, prompt, classifier.answer[:-1]), output_attentions=True).attentions
    rows = torch.stack(weights).mean((0, 2))[:, -count:]  # (B, n, L)
    rows = torch.cat([rows, rows.mean(1, keepdim=True)], 1)
    return rows[:, token][:, prompt.at].unflatten(1, prompt.tokens.shape)


@torch.no_grad()
def step_removed(classifier: AnswerClassifier, clip: Tensor, step: int, replacement: str) -> Tensor:
    """Outputs for one clip ``(n + 1,)`` while what the vision tower returns is changed for the tokens of one step."""
    vlm, tokens = classifier.vlm, classifier.prompt_for(clip).tokens

    def change(rows: Tensor) -> Tensor:
        grid = rows[: tokens.count].view(tokens.t, tokens.h * tokens.w, -1).clone()
        others = [i for i in range(tokens.t) if i != step]
        if replacement == "mean":
            grid[step] = grid[others].mean(0)
        elif replacement == "zero":
            grid[step] = 0
        else:
            grid[step] = grid[step - 1] if step else grid[1]
        return torch.cat([grid.flatten(0, 1), rows[tokens.count :]])

    core, name = vlm.model.model, f"get_{vlm.family.modality}_features"
    original = getattr(core, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        output = made.pooler_output
        if isinstance(output, Tensor):
            made.pooler_output = change(output.flatten(0, 1)).view(output.shape)
        else:
            made.pooler_output = [change(output[0])]
        if made.get("deepstack_features"):
            made.deepstack_features = [[change(layer[0])] for layer in made.deepstack_features]
        return made

    setattr(core, name, patched)
    try:
        return classifier(clip)[0]
    finally:
        delattr(core, name)
