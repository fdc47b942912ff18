"""Video transformers written in many ways, and the contribution of their parameters, for tests of decompositions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tiny_models import randomize
from torch import Tensor, nn

from captum_staa.attention.decomposition import class_contrast
from captum_staa.attention.frozen import FrozenPatterns

WIDTH, HEADS = 16, 2


class Attention(nn.Module):
    """Self-attention, implemented in one of several ways with the same parameters."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling.startswith("mha"):
            return self.inner(x, x, x, need_weights=self.spelling == "mha weights")[0]
        qkv = F.linear(x, self.inner.in_proj_weight, self.inner.in_proj_bias).unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)
        if self.spelling == "sdpa":
            return self.inner.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        if self.spelling == "sdpa keywords":
            mask = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)
            y = F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask, dropout_p=0.0)
            return self.inner.out_proj(y.transpose(1, 2).flatten(2))
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
        pattern = (SOFTMAXES | MIXED)[self.spelling](scores)
        return self.inner.out_proj(torch.einsum("bhqk,bhkd->bqhd", pattern, v).flatten(2))


def _by_hand(scores: Tensor) -> Tensor:
    positive = (scores - scores.amax(-1, keepdim=True)).exp()
    return positive / positive.sum(-1, keepdim=True)


def mixed_heads(pattern: Tensor) -> Tensor:
    """Return ``(B, heads, Q, N)`` with heads mixed by constants and shifted, as in CaiT and DeepViT."""
    weights = torch.tensor([[0.7, -0.4], [0.5, 1.1]], dtype=pattern.dtype)
    return torch.einsum("bhqk,hg->bgqk", pattern, weights) + 0.02


def normalized_heads(pattern: Tensor) -> Tensor:
    """Return ``(B, heads, Q, N)`` with layer norm over heads."""
    shift = torch.tensor([0.3, -0.2], dtype=pattern.dtype)
    return F.layer_norm(pattern.movedim(1, -1), (HEADS,), 1 - shift, shift).movedim(-1, 1)


SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "F.softmax": lambda x: F.softmax(x, dim=-1, dtype=x.dtype),
    "torch.softmax": lambda x: torch.softmax(x, -1),
    "x.softmax": lambda x: x.softmax(-1),
    "nn.Softmax": nn.Softmax(-1),
    "special.softmax": lambda x: torch.special.softmax(x, -1),
    "_softmax": lambda x: torch._softmax(x, -1, False),
    "softmin": lambda x: F.softmin(-x, -1),
    "by hand": _by_hand,
}
MIXED: dict[str, Callable[[Tensor], Tensor]] = {  # other networks
    "mixed heads": lambda x: mixed_heads(x.softmax(-1)),
    "normalized heads": lambda x: normalized_heads(x.softmax(-1)),
}
SPELLINGS = ("sdpa", "sdpa keywords", "mha", "mha weights", *SOFTMAXES)


class RMSNormByHand(nn.RMSNorm):
    def __init__(self, width: int, root: Callable[[Tensor], Tensor]) -> None:
        super().__init__(width, eps=1e-6)
        self.root = root

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * self.root(x.pow(2).mean(-1, keepdim=True) + self.eps))


class LayerNormByHand(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
        return (x - mean) / torch.sqrt(variance + self.eps) * self.weight + self.bias


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(WIDTH),
    "layer by hand": lambda: LayerNormByHand(WIDTH),
    "rms": lambda: nn.RMSNorm(WIDTH, eps=1e-6),
    "rms by rsqrt": lambda: RMSNormByHand(WIDTH, torch.rsqrt),
    "rms by pow": lambda: RMSNormByHand(WIDTH, lambda x: x.pow(-0.5)),
    "rms by sqrt": lambda: RMSNormByHand(WIDTH, lambda x: 1 / x.sqrt()),
    "group": lambda: _OverTokens(nn.GroupNorm(2, WIDTH)),
    "instance": lambda: _OverTokens(nn.InstanceNorm1d(WIDTH, affine=True)),
    "batch": lambda: _OverTokens(nn.BatchNorm1d(WIDTH)),
}


class _OverTokens(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.mT).mT


class Mlp(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.gate, self.down = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if self.kind == "swiglu":
            return self.down(F.silu(self.gate(x)) * up)
        if self.kind == "glu":
            return self.down(F.glu(torch.cat([up, self.gate(x)], -1)))
        if self.kind == "glu in place":
            up *= self.gate(x).sigmoid()
            return self.down(up)
        return self.down(ACTIVATIONS[self.kind](up))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu by erf": lambda x: x * 0.5 * (1.0 + torch.erf(x / 2**0.5)),
    "gelu tanh": nn.GELU("tanh"),
    "gelu tanh by hand": lambda x: (
        0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))
    ),
    "silu": F.silu,
    "silu in place": nn.SiLU(inplace=True),
    "silu by sigmoid": lambda x: x * torch.sigmoid(x),
    "mish": F.mish,
    "mish by hand": lambda x: x * F.softplus(x).tanh(),
    "relu": F.relu,
    "relu squared": lambda x: F.relu(x).square(),
    "tanh": torch.tanh,
    "sigmoid": lambda x: x.sigmoid(),
    "softplus": F.softplus,
    "elu": F.elu,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
}
MLPS = (*ACTIVATIONS, "swiglu", "glu", "glu in place")


class ViT(nn.Module):
    """ViT for clips (B, 3, 8, 24, 16) with tubelets of 2 x 8 x 8 and positions. The head reads the class token."""

    def __init__(self, attention: str = "sdpa", norm: str = "layer", mlp: str = "gelu", layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Conv3d(3, WIDTH, (2, 8, 8), (2, 8, 8))
        self.cls, self.positions = nn.Parameter(torch.zeros(1, 1, WIDTH)), nn.Parameter(torch.zeros(1, 25, WIDTH))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"norm1": NORMS[norm](), "attn": Attention(attention), "norm2": NORMS[norm](), "mlp": Mlp(mlp)}
            )
            for _ in range(layers)
        )
        self.norm, self.head = NORMS[norm](), nn.Linear(WIDTH, 3)

    def forward(self, clips: Tensor) -> Tensor:
        x = self.embed(clips).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = x + block["attn"](block["norm1"](x))
            x = x + block["mlp"](block["norm2"](x))
        return self.head(self.norm(x)[:, 0])


def vit(attention: str = "sdpa", norm: str = "layer", mlp: str = "gelu", layers: int = 2) -> nn.Module:
    """Return a random ViT in float64, with the same weights for every implementation of the attention."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return randomize(ViT(attention, norm, mlp, layers), seed=3).double().requires_grad_(False)


def clips(batch: int = 2, seed: int = 5) -> Tensor:
    """Return clips for a :class:`ViT`."""
    return torch.randn(batch, 3, 8, 24, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def contrast(outputs: Tensor) -> Tensor:
    """Return the contrast of class 1."""
    return class_contrast(outputs, outputs[:, 1])


def share_of_parameters(
    model: nn.Module, embedding: nn.Module, clip: Tensor, score: Callable[[Tensor], Tensor], table: Any = None
) -> tuple[float, float]:
    """Return ``(tokens, constants)`` of one clip: gradient times value of the tokens, and of all added parameters.

    An affine function is the sum of both. Both are computed independently.

    Args:
        table: a constant tensor that the model adds to the output of the embedding, with the same layout.
    """
    added = ("bias", "cls", "cls_token", "positions", "position_embeddings", "time_embeddings", "query_tokens")
    of_embedding = set(embedding.parameters())
    parameters = [
        parameter
        for name, parameter in model.named_parameters()
        if name.split(".")[-1].endswith(added) and parameter not in of_embedding
    ]
    leaves: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[0].clone()

    handle = embedding.register_forward_hook(hook)
    try:
        for parameter in parameters:
            parameter.requires_grad_()
        with FrozenPatterns():
            outputs = model(clip)
        gradient, *gradients = torch.autograd.grad(
            score(outputs).sum(), [leaves[0], *parameters], allow_unused=True, materialize_grads=True
        )
    finally:
        handle.remove()
        model.requires_grad_(False)
    constants = sum(float((a.detach() * b).double().sum()) for a, b in zip(parameters, gradients, strict=True))
    if table is not None:
        constants += float((gradient * table).double().sum())
    return float((leaves[0].detach() * gradient).double().sum()), constants
