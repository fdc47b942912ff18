"""Modules of the kinds that transformers are built of, against a slow formula: with all patterns, scales and ratios of
one run, each token is doubled alone, and the change of the score is its contribution. No autograd and no function mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from covering import in_one_case
from tiny_models import randomize
from torch import Tensor, nn

from captum_staa.attention.decomposition import decompose

WIDTH, HEADS, SIDES = 8, 2, (2, 4, 4)  # 32 tokens
TOKENS = math.prod(SIDES)


class Tape:
    """The values of the first run, which all later runs use."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.next: Iterator[Tensor] | None = None

    def __call__(self, value: Tensor) -> Tensor:
        if self.next is not None:
            return next(self.next)
        self.kept.append(value)
        return value


# --- parts of the slow formulas ---------------------------------------------------------------------------------------


def linear(x: Tensor, layer: Any) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def layer_norm(x: Tensor, layer: Any, tape: Tape) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered * tape(((centered**2).mean(-1, keepdim=True) + layer.eps) ** -0.5) * layer.weight + layer.bias


def rms_norm(x: Tensor, weight: Tensor, tape: Tape) -> Tensor:
    return x * tape(((x**2).mean(-1, keepdim=True) + 1e-6) ** -0.5) * weight


def softmax(scores: Tensor) -> Tensor:
    return scores.exp() / scores.exp().sum(-1, keepdim=True)


def gelu(x: Tensor, tape: Tape) -> Tensor:
    return x * tape(0.5 * (1 + torch.erf(x / 2**0.5)))


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(-2, -3)


def joined(x: Tensor) -> Tensor:
    return x.transpose(-2, -3).flatten(-2)


# --- modules, each with its slow formula `explicit` -------------------------------------------------------------------


class Multihead(nn.Module):
    """nn.MultiheadAttention, and nn.TransformerEncoderLayer, which has a fused path in eval mode."""

    def __init__(self, need_weights: bool, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, add_bias_kv=not batch_first)
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, activation="gelu", batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.attention.batch_first else x.transpose(0, 1)
        y = self.attention(y, y, y, need_weights=self.need_weights)[0]
        return self.layer(x + (y if self.attention.batch_first else y.transpose(0, 1)))

    def explicit(self, x: Tensor, tape: Tape) -> Tensor:
        x = x + self._attended(x, self.attention, tape)
        layer = self.layer
        x = layer_norm(x + self._attended(x, layer.self_attn, tape), layer.norm1, tape)
        return layer_norm(x + linear(gelu(linear(x, layer.linear1), tape), layer.linear2), layer.norm2, tape)

    def _attended(self, x: Tensor, attention: Any, tape: Tape) -> Tensor:
        q, k, v = (x @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, -1)
        if attention.bias_k is not None:
            k, v = (
                torch.cat([y, b[0].expand(len(x), 1, -1)], 1) for y, b in ((k, attention.bias_k), (v, attention.bias_v))
            )
        q, k, v = map(heads, (q, k, v))
        return linear(joined(tape(softmax(q @ k.mT / q.shape[-1] ** 0.5)) @ v), attention.out_proj)


class Decoder(nn.Module):
    """A block of a language model: RMSNorm by hand, rotary positions, grouped queries with a norm, causal, SwiGLU."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, size) for size in (16, 8, 8, WIDTH))
        self.out = nn.Linear(16, WIDTH, bias=False)
        self.norms = nn.ParameterList([torch.ones(WIDTH), torch.ones(4), torch.ones(4), torch.ones(WIDTH)])
        self.gate, self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        angles = torch.arange(TOKENS)[:, None] / torch.tensor([1.0, 30.0])
        self.register_buffer("angles", angles.double())

    def forward(self, x: Tensor) -> Tensor:
        def norm(x: Tensor, weight: Tensor) -> Tensor:
            return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

        y = norm(x, self.norms[0])
        q, k, v = self.q(y), self.k(y), self.v(y)
        q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in (q, k, v))
        q, k = self._rotated(norm(q, self.norms[1])), self._rotated(norm(k, self.norms[2]))
        causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
        if self.kind == "is_causal":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.4)
        elif self.kind == "mask":
            y = F.scaled_dot_product_attention(q, k, v, causal, 0.0, enable_gqa=True, scale=0.4)
        else:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            scores = torch.matmul(q, k.transpose(2, 3)) * 0.4
            scores = scores + torch.zeros_like(scores).masked_fill(~causal, torch.finfo(x.dtype).min)
            y = F.dropout(F.softmax(scores, dim=-1, dtype=torch.float64), 0.5, self.training) @ v
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = norm(x, self.norms[3])
        if self.kind == "mask":  # GEGLU in one matrix
            up, gate = torch.cat([self.up(y), self.gate(y)], -1).chunk(2, -1)
            return x + self.down(up * F.gelu(gate))
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def _rotated(self, x: Tensor) -> Tensor:
        if self.kind == "is_causal":  # as complex numbers
            turns = torch.polar(torch.ones_like(self.angles), self.angles)
            return torch.view_as_real(
                torch.view_as_complex(x.unflatten(-1, (2, 2)).mT.contiguous()) * turns
            ).mT.flatten(-2)
        first, second = x.chunk(2, -1)
        both = torch.cat([self.angles, self.angles], -1)
        return x * both.cos() + torch.cat([-second, first], -1) * both.sin()

    def explicit(self, x: Tensor, tape: Tape) -> Tensor:
        y = rms_norm(x, self.norms[0], tape)
        q, k, v = (heads(linear(y, layer), layer.out_features // 4) for layer in (self.q, self.k, self.v))

        def turned(x: Tensor) -> Tensor:
            a, b = x[..., :2], x[..., 2:]
            cos, sin = self.angles.cos(), self.angles.sin()
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        q, k = turned(rms_norm(q, self.norms[1], tape)), turned(rms_norm(k, self.norms[2], tape))
        scores = 0.4 * q @ torch.stack([k[:, i // 2] for i in range(4)], 1).mT
        later = torch.arange(TOKENS)[:, None] < torch.arange(TOKENS)
        pattern = tape(softmax(scores.masked_fill(later, -torch.inf)))
        x = x + linear(joined(pattern @ torch.stack([v[:, i // 2] for i in range(4)], 1)), self.out)
        y = rms_norm(x, self.norms[3], tape)
        gate, up = linear(y, self.gate), linear(y, self.up)
        ratio = 0.5 * (1 + torch.erf(gate / 2**0.5)) if self.kind == "mask" else 1 / (1 + (-gate).exp())
        return x + linear((tape(ratio * up) * gate + tape(ratio * gate) * up) / 2, self.down)  # each factor has a half


class Windows(nn.Module):
    """Swin: shifted windows with a relative position bias, cosine attention (version 2), patch merging."""

    def __init__(self, cosine: bool) -> None:
        super().__init__()
        self.cosine, self.qkv, self.out = cosine, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.merge = nn.LayerNorm(WIDTH), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.merged_norm = nn.LayerNorm(4 * WIDTH)
        self.bias = nn.Parameter(torch.zeros(HEADS, 8, 8))
        self.logit_scale = nn.Parameter(torch.zeros(HEADS, 1, 1))

    def _windows(self, x: Tensor) -> Tensor:
        """(B, 2, 4, 4, D) to (B * 4, 8, D)"""
        return x.unflatten(2, (2, 2)).unflatten(4, (2, 2)).permute(0, 2, 4, 1, 3, 5, 6).flatten(0, 2).flatten(1, 3)

    def _back(self, x: Tensor) -> Tensor:
        return (
            x.unflatten(1, (2, 2, 2)).unflatten(0, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, SIDES)
        y = torch.roll(x if self.cosine else self.norm(x), (-1, -1), (2, 3))
        y = self._windows(y)
        q, k, v = self.qkv(y).reshape(len(y), 8, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        if self.cosine:
            attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
            attn = attn * torch.clamp(self.logit_scale, max=math.log(100.0)).exp()
        else:
            attn = q.mul(q.shape[-1] ** -0.5).matmul(k.transpose(-2, -1))
        attn = attn + 16 * torch.sigmoid(self.bias).unsqueeze(0)
        y = self.out(
            F.dropout(nn.Softmax(dim=-1)(attn), 0.3, False).matmul(v).transpose(1, 2).reshape(len(y), 8, WIDTH)
        )
        y = torch.roll(self._back(y), (1, 1), (2, 3))
        x = x + (self.norm(y) if self.cosine else y)
        x = torch.cat([x[..., i::2, j::2, :] for j in (0, 1) for i in (0, 1)], -1)
        return self.merge(self.merged_norm(x)).flatten(1, 3)

    def explicit(self, x: Tensor, tape: Tape) -> Tensor:
        x = x.unflatten(1, SIDES)
        y = (x if self.cosine else layer_norm(x, self.norm, tape)).roll((-1, -1), (2, 3))
        q, k, v = linear(self._windows(y), self.qkv).chunk(3, -1)
        q, k, v = heads(q), heads(k), heads(v)
        scores = q @ k.mT
        if self.cosine:
            scores = scores / (q**2).sum(-1, keepdim=True) ** 0.5 / (k**2).sum(-1)[..., None, :] ** 0.5
            scores = scores * self.logit_scale.exp()
        else:
            scores = scores / q.shape[-1] ** 0.5
        pattern = tape(softmax(scores + 16 / (1 + (-self.bias).exp())))
        y = self._back(linear(joined(pattern @ v), self.out)).roll((1, 1), (2, 3))
        x = x + (layer_norm(y, self.norm, tape) if self.cosine else y)
        x = torch.cat([x[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return linear(layer_norm(x, self.merged_norm, tape), self.merge).flatten(1, 3)


class Pooled(nn.Module):
    """MViT: queries, keys, values pooled by convolutions with norms, positions relative to queries, a pooled skip."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.pools = nn.ModuleList(
            nn.Conv3d(4, 4, 3, stride, 1, groups=4, bias=False) for stride in ((1, 2, 2), (1, 2, 1), (1, 2, 1))
        )
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(3))
        self.relative = nn.Parameter(torch.zeros(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).reshape(len(x), TOKENS, 3, HEADS, 4).transpose(1, 3).unbind(dim=2)
        q, k, v = (self._pooled(*part) for part in zip(parts, self.pools, self.norms, strict=True))
        attn = torch.matmul(0.5 * q, k.transpose(2, 3))
        attn = attn + torch.einsum("bhqd,kd->bhqk", q, self.relative)
        y = torch.matmul(attn.softmax(dim=-1), v)
        y.add_(q)  # the residual pool
        y = self.out(y.transpose(1, 2).reshape(len(x), -1, WIDTH))
        skip = F.max_pool3d(x.transpose(1, 2).unflatten(2, SIDES), (1, 3, 3), (1, 2, 2), (0, 1, 1))
        return y + skip.flatten(2).transpose(1, 2)

    def _pooled(self, x: Tensor, pool: nn.Module, norm: nn.Module) -> Tensor:
        y = pool(x.flatten(0, 1).transpose(1, 2).unflatten(2, SIDES)).flatten(2).transpose(1, 2)
        return F.gelu(norm(y.unflatten(0, (-1, HEADS))))

    def explicit(self, x: Tensor, tape: Tape) -> Tensor:
        pooled, parts = [], linear(layer_norm(x, self.norm, tape), self.qkv).chunk(3, -1)
        for part, pool, norm in zip(parts, self.pools, self.norms, strict=True):
            volume = F.pad(heads(part).mT.unflatten(-1, SIDES), (1, 1) * 3)  # (B, heads, 4, 4, 6, 6)
            blocks = volume.unfold(3, 3, pool.stride[0]).unfold(4, 3, pool.stride[1]).unfold(5, 3, pool.stride[2])
            y = (blocks * pool.weight[:, 0, None, None, None]).sum((-1, -2, -3)).flatten(3).mT
            pooled.append(gelu(layer_norm(y, norm, tape), tape))
        q, k, v = pooled
        pattern = tape(softmax(q @ k.mT / 2 + q @ self.relative.T))
        y = linear(joined(pattern @ v + q), self.out)
        volume = F.pad(x.mT.unflatten(-1, SIDES), (1, 1, 1, 1), value=-torch.inf)
        blocks = volume.unfold(3, 3, 2).unfold(4, 3, 2).flatten(-2)
        best = tape(blocks.argmax(-1, keepdim=True))
        return y + blocks.gather(-1, best)[..., 0].flatten(2).mT


class Trunk(nn.Module):
    """Layer scale, group and batch norm, stochastic depth and dropout in eval mode, squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.group, self.batch = nn.GroupNorm(2, WIDTH), nn.BatchNorm1d(WIDTH)
        self.up, self.down, self.squeeze = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.drop = nn.Sequential(nn.Dropout(0.5), nn.Dropout1d(0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.group(x.transpose(1, 2)).transpose(1, 2)
        y = self.drop(self.down(F.hardswish(self.up(y))))
        if self.training:
            y = y * torch.empty(len(y), 1, 1).bernoulli_(0.8)
        x = x + self.scale * y
        x = self.batch(x.transpose(1, 2)).transpose(1, 2)
        return x * torch.sigmoid(self.squeeze(x.mean(1, keepdim=True)))

    def explicit(self, x: Tensor, tape: Tape) -> Tensor:
        grouped = x.mT.unflatten(1, (2, -1))  # (B, 2, 4, N)
        centered = grouped - grouped.mean((2, 3), keepdim=True)
        scale = tape(((centered**2).mean((2, 3), keepdim=True) + 1e-5) ** -0.5)
        y = (centered * scale).flatten(1, 2).mT * self.group.weight + self.group.bias
        y = linear(y, self.up)
        y = linear(y * tape((y + 3).clamp(0, 6) / 6), self.down)
        x = x + self.scale * y
        batch = self.batch
        x = (x - batch.running_mean) / (batch.running_var + batch.eps) ** 0.5 * batch.weight + batch.bias
        return x * tape(1 / (1 + (-linear(x.mean(1, keepdim=True), self.squeeze)).exp()))


class Recurrent(nn.Module):
    """Recurrent layers over tokens, as frame encoders pool over time."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 6, 2, batch_first=True, bidirectional=True, dropout=0.5, proj_size=4)
        self.gru, self.rnn = nn.GRU(WIDTH, WIDTH), nn.RNN(WIDTH, WIDTH, nonlinearity=kind, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :6]
        y = self.rnn(self.gru(self.lstm(x)[0].transpose(0, 1))[0])[0].transpose(0, 1)
        return torch.cat([y, self.lstm(x)[1][1].flatten(0, 1)[:1, None, :1].expand(-1, 1, WIDTH)], 1)

    def explicit(self, x: Tensor, tape: Tape) -> Tensor:
        x = x[0, :6]
        y, cell = self._lstm(x, tape)
        y = self._rnn(self._gru(y, tape), tape)
        return torch.cat([y, cell.expand(1, WIDTH)])[None]

    def _lstm(self, x: Tensor, tape: Tape) -> tuple[Tensor, Tensor]:
        cells = []
        for layer in (0, 1):
            ways = []
            for way in ("", "_reverse"):
                kind = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
                u, w, a, b, r = (getattr(self.lstm, f"{name}_l{layer}{way}") for name in kind)
                h, c, steps = torch.zeros(4).double(), torch.zeros(6).double(), []
                for step in x.flip(0) if way else x:
                    i, f, g, o = (u @ step + a + w @ h + b).chunk(4)
                    c = c * tape(torch.special.expit(f)) + g * tape(torch.special.expit(i) * g.tanh() / g)
                    h = r @ (c * tape(torch.special.expit(o) * c.tanh() / c))
                    steps.append(h)
                ways.append(torch.stack(steps).flip(0) if way else torch.stack(steps))
                cells.append(c)
            x = torch.cat(ways, 1)
        return x, cells[0][0]

    def _gru(self, x: Tensor, tape: Tape) -> Tensor:
        layer, h, steps = self.gru, torch.zeros(WIDTH).double(), []
        for step in x:
            a, b = layer.weight_ih_l0 @ step + layer.bias_ih_l0, layer.weight_hh_l0 @ h + layer.bias_hh_l0
            (r, z, n), (of_r, of_z, of_n) = a.chunk(3), b.chunk(3)
            kept = tape(torch.special.expit(z + of_z))
            reset = tape(torch.special.expit(r + of_r))
            if not steps:  # it multiplies a constant here, and is not a gate
                reset = 0.5 + (r + of_r) * tape((torch.special.expit(r + of_r) - 0.5) / (r + of_r))
            n = n + reset * of_n
            h = (1 - kept) * n * tape(n.tanh() / n) + kept * h
            steps.append(h)
        return torch.stack(steps)

    def _rnn(self, x: Tensor, tape: Tape) -> Tensor:
        layer, h, steps = self.rnn, torch.zeros(WIDTH).double(), []
        for step in x:
            h = layer.weight_ih_l0 @ step + layer.weight_hh_l0 @ h
            h = h * tape(h.tanh() / h if layer.nonlinearity == "tanh" else (h > 0).double())
            steps.append(h)
        return torch.stack(steps)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "nn.MultiheadAttention with weights": lambda: Multihead(True, True),
    "nn.MultiheadAttention, sequence first": lambda: Multihead(False, False),
    "decoder": lambda: Decoder("explicit"),
    "decoder, is_causal": lambda: Decoder("is_causal"),
    "decoder, mask and GEGLU": lambda: Decoder("mask"),
    "Swin": lambda: Windows(False),
    "Swin, version 2": lambda: Windows(True),
    "MViT": Pooled,
    "trunk": Trunk,
    "recurrent, tanh": lambda: Recurrent("tanh"),
    "recurrent, relu": lambda: Recurrent("relu"),
}


class Model(nn.Module):
    """Pixels are embedded, positions added, and the mean of the last tokens is classified."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.positions, self.part = nn.Parameter(torch.zeros(TOKENS, WIDTH)), MODULES[kind]()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(self.embed(x) + self.positions).mean(1))

    @torch.no_grad()
    def explicit(self, tokens: Tensor, tape: Tape) -> Tensor:
        logits = linear(self.part.explicit(tokens + self.positions, tape).mean(1), self.head)
        return logits[:, 1] - logits[:, 0]


@in_one_case()
@pytest.mark.parametrize("kind", MODULES)
def test_contributions_are_what_doubling_a_token_adds(kind):
    with torch.random.fork_rng():
        model = randomize(Model(kind), 4, spread=0.5).double().eval()
    for buffers in (module.__dict__["_buffers"] for module in model.modules() if isinstance(module, nn.BatchNorm1d)):
        buffers["running_mean"] += 0.3
        buffers["running_var"] *= 1.7
    x = torch.randn(1, TOKENS, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    result = decompose(model, x, lambda outputs: outputs[:, 1] - outputs[:, 0], tokens=model.embed)
    assert result.nonlinear == () and abs(float(result.remainder)) < 1e-10
    tokens, tape = model.embed(x).detach(), Tape()
    plain = model.explicit(tokens, tape)
    torch.testing.assert_close(result.score, plain, rtol=0, atol=1e-10)
    changes = []
    for n in range(TOKENS):
        doubled = tokens.clone()
        doubled[:, n] *= 2
        tape.next = iter(tape.kept)
        changes.append(model.explicit(doubled, tape) - plain)
    changes = torch.stack(changes, 1)
    torch.testing.assert_close(result.contributions.sum(2), changes, rtol=0, atol=1e-10)
    assert changes.abs().max() > 1e-2  # a check of nothing otherwise
    tape.next = iter(tape.kept)
    torch.testing.assert_close(result.constants, model.explicit(0 * tokens, tape), rtol=0, atol=1e-10)
