"""Video transformers that no family declares, written as research code writes them, for tests of discovery."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tiny_models import randomize
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

from captum_staa import TokenGrid

WIDTH, HEADS, CLASSES = 64, 2, 3
SIZE = (8, 24, 16)  # (T, H, W): t = 4, h = 3, w = 2 with tubelets of 2 x 8 x 8


class Fused(nn.Module):
    """timm: one linear layer for queries, keys and values, F.scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, h, N, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def explicit(self, x: Tensor) -> Tensor:
        """Return ``(B, h, N, N)``."""
        q, k, _ = self.parts(x)
        return (torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5).softmax(-1)


class Explicit(Fused):
    """The original VideoMAE, TimeSformer and others: softmax(q k^T) v."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        attn = self.drop((q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1))
        return self.proj((attn @ v).transpose(1, 2).flatten(2))


class SoftmaxModule(Explicit):
    """nn.Softmax as a child, as in lucidrains' repositories; heads folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.flatten(0, 1) for part in self.parts(x))  # (B * h, N, d)
        attn = self.drop(self.attend(torch.bmm(q, k.mT) * q.shape[-1] ** -0.5))
        out = torch.bmm(attn, v).unflatten(0, (-1, HEADS))
        return self.proj(out.transpose(1, 2).flatten(2))


class Einsum(Explicit):
    """einsum with heads behind the tokens, softmax in float32, and a relative position bias."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.parts(x))  # (B, N, h, d)
        scores = torch.einsum("b q h d, b k h d -> b h q k", q, k) / q.shape[-1] ** 0.5
        attn = F.softmax(scores, dim=-1, dtype=torch.float32).type_as(q)
        return self.proj(torch.einsum("bhqk,bkhd->bqhd", attn, v).flatten(2))


class Flexible(Fused):
    """``flex_attention`` with a bias per head and place in the sequence, and a mask of near tokens.

    It calls what the function of torch calls, which refuses gradients on a CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(HEADS, 32))

    def forward(self, x: Tensor) -> Tensor:
        near, bias = self._near, self.bias
        mask = create_block_mask(lambda b, h, q, k: near(q, k), None, None, x.shape[1], x.shape[1], device="cpu")
        outputs = torch.ops.higher_order.flex_attention(
            *(part.contiguous() for part in self.parts(x)),
            lambda score, b, h, q, k: score + bias[h, k],
            mask.as_tuple(),
            (WIDTH // HEADS) ** -0.5,
            {},
        )
        return self.proj(outputs[0].transpose(1, 2).flatten(2))

    def explicit(self, x: Tensor) -> Tensor:
        q, k, _ = self.parts(x)
        places = torch.arange(x.shape[1])
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5 + self.bias[:, None, : x.shape[1]]
        return scores.masked_fill(~self._near(places[:, None], places), -torch.inf).softmax(-1)

    def _near(self, q: Any, k: Any) -> Any:
        return (q < 1) | (q - k).abs() < 20


class KeysFirst(Explicit):
    """Scores with keys before queries, softmax over axis -2, heads before the batch."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(0, 1) for part in self.parts(x))  # (h, B, N, d)
        attn = (k @ q.mT * q.shape[-1] ** -0.5).softmax(-2)  # (h, B, keys, queries)
        out = attn.mT @ v
        return self.proj(out.permute(1, 2, 0, 3).flatten(2))


class MultiHead(nn.Module):
    """CLIP: nn.MultiheadAttention with time first."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.attn(x, x, x, need_weights=False)[0].transpose(0, 1)

    def explicit(self, x: Tensor) -> Tensor:
        q, k, _ = F.linear(x, self.attn.in_proj_weight, self.attn.in_proj_bias).chunk(3, -1)
        q, k = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (q, k))
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "fused": Fused,
    "flexible": Flexible,
    "explicit": Explicit,
    "softmax module": SoftmaxModule,
    "einsum": Einsum,
    "keys first": KeysFirst,
    "multi head": MultiHead,
}


class Block(nn.Module):
    def __init__(self, attention: str) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH), ATTENTION[attention](), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainViT(nn.Module):
    """Joint attention. ``prefix`` class and register tokens before the patches, ``suffix`` behind them."""

    def __init__(
        self, attention: str = "fused", prefix: int = 1, suffix: int = 0, reads: str = "cls", time_fastest: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Conv3d(3, WIDTH, (2, 8, 8), (2, 8, 8))
        self.prefix, self.suffix = (nn.Parameter(torch.zeros(1, n, WIDTH)) for n in (prefix, suffix))
        self.positions = nn.Parameter(torch.zeros(1, prefix + suffix + 24, WIDTH))
        self.blocks = nn.ModuleList(Block(attention) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
        self.reads, self.time_fastest = reads, time_fastest

    def forward(self, clip: Tensor) -> Tensor:  # (B, C, T, H, W)
        x = self.stem(clip)
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x, self.suffix.expand(len(x), -1, -1)], 1) + self.positions
        return self.head(self.pool(self.norm(self.run(x))))

    def stem(self, clip: Tensor) -> Tensor:
        """Return the patch tokens."""
        x = self.embed(clip)
        return (x.movedim(2, -1) if self.time_fastest else x).flatten(2).mT

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def pool(self, x: Tensor) -> Tensor:
        first, last = self.prefix.shape[1], x.shape[1] - self.suffix.shape[1]
        return {"cls": x[:, 0], "mean": x.mean(1), "patches": x[:, first:last].mean(1), "last": x[:, -1]}[self.reads]

    def weights(self) -> Tensor:
        """Return the weight of each token in the head."""
        prefix, suffix = self.prefix.shape[1], self.suffix.shape[1]
        weights = torch.zeros(prefix + 24 + suffix)
        part = {"cls": slice(0, 1), "mean": slice(None), "patches": slice(prefix, prefix + 24), "last": slice(-1, None)}
        weights[part[self.reads]] = 1
        return weights / weights.sum()


class Encoder(nn.Module):
    """nn.TransformerEncoder on flattened patches; the head reads the mean."""

    def __init__(self, norm_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * 2 * 8 * 8, WIDTH)
        self.positions = nn.Parameter(torch.zeros(1, 24, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, clip: Tensor) -> Tensor:  # (B, T, C, H, W)
        x = clip.unflatten(1, (4, 2)).unflatten(4, (3, 8)).unflatten(6, (2, 8))  # (B, t, 2, C, h, 8, w, 8)
        x = self.embed(x.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(4).flatten(1, 3))
        return self.head(self.encoder(x + self.positions).mean(1))


class Divided(nn.Module):
    """TimeSformer of a research repository: class token, attention in time, then in space, with einops' reshapes."""

    def __init__(self, attention: str = "explicit", batch_inside: bool = False) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, 8, 8)
        self.cls, self.positions = (
            nn.Parameter(torch.zeros(1, 1, WIDTH)),
            nn.Parameter(torch.zeros(1, 8 * 6 + 1, WIDTH)),
        )
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm_t": nn.LayerNorm(WIDTH),
                    "attn_t": ATTENTION[attention](),
                    "norm_s": nn.LayerNorm(WIDTH),
                    "attn_s": ATTENTION[attention](),
                }
            )
            for _ in range(2)
        )
        self.head, self.batch_inside = nn.Linear(WIDTH, CLASSES), batch_inside

    def forward(self, clip: Tensor) -> Tensor:  # (B, C, T, H, W)
        batch = len(clip)
        x = self.embed(clip.transpose(1, 2).flatten(0, 1)).flatten(2).mT.unflatten(0, (batch, 8)).flatten(1, 2)
        x = torch.cat([self.cls.expand(batch, -1, -1), x], 1) + self.positions  # frame by frame
        for block in self.blocks:
            cls, x = x[:, :1], x[:, 1:].unflatten(1, (8, 6))  # (B, t, n, D)
            tracks = self.folded(x.transpose(1, 2))
            x = x + self.unfolded(block["attn_t"](block["norm_t"](tracks)), batch).transpose(1, 2)
            frames = self.folded(torch.cat([cls[:, None].expand(-1, 8, -1, -1), x], 2))
            moved = self.unfolded(block["attn_s"](block["norm_s"](frames)), batch)  # (B, t, 1 + n, D)
            x = torch.cat([cls + moved[:, :, 0].mean(1, keepdim=True), (x + moved[:, :, 1:]).flatten(1, 2)], 1)
        return self.head(x[:, 0])

    def folded(self, x: Tensor) -> Tensor:
        return (x.transpose(0, 1) if self.batch_inside else x).flatten(0, 1)

    def unfolded(self, x: Tensor, batch: int) -> Tensor:
        return x.unflatten(0, (-1, batch)).transpose(0, 1) if self.batch_inside else x.unflatten(0, (batch, -1))


class FrameEncoder(nn.Module):
    """An image transformer on frames folded into the batch, each with a class token; then the mean, or attention."""

    def __init__(self, attention: str = "fused", over_time: str = "mean") -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, 8, 8)
        self.cls, self.positions = nn.Parameter(torch.zeros(1, 1, WIDTH)), nn.Parameter(torch.zeros(1, 7, WIDTH))
        self.blocks = nn.ModuleList(Block(attention) for _ in range(2))
        self.times = nn.Parameter(torch.zeros(1, 8, WIDTH))
        self.temporal = nn.ModuleList(Block(attention) for _ in range(2 if over_time == "transformer" else 0))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, clip: Tensor) -> Tensor:  # (B, T, C, H, W)
        x = self.embed(clip.flatten(0, 1)).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        x = x[:, 0].unflatten(0, (len(clip), -1))  # (B, T, D)
        if len(self.temporal):
            x = x + self.times
        for block in self.temporal:
            x = block(x)
        return self.head(self.norm(x).mean(1))


@dataclass
class Undeclared:
    """A model, the layout of its clips, its grid, and what its head reads."""

    make: Callable[[], nn.Module]
    layout: str
    grid: TokenGrid
    reads: Any
    backend: str


def _plain(attention: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: PlainViT(attention, **options)


CELL = (2, 8, 8)
MODELS: dict[str, Undeclared] = {
    "fused": Undeclared(_plain("fused"), "BCTHW", TokenGrid(4, 3, 2, 1, "thw", CELL), "cls", "sdpa"),
    "explicit": Undeclared(_plain("explicit"), "BCTHW", TokenGrid(4, 3, 2, 1, "thw", CELL), "cls", "softmax"),
    "flexible": Undeclared(_plain("flexible"), "BCTHW", TokenGrid(4, 3, 2, 1, "thw", CELL), "cls", "sdpa"),
    "softmax module, mean": Undeclared(
        _plain("softmax module", prefix=0, reads="mean"), "BCTHW", TokenGrid(4, 3, 2, 0, "thw", CELL), "mean", "softmax"
    ),
    "einsum, registers behind": Undeclared(
        _plain("einsum", suffix=2), "BCTHW", TokenGrid(4, 3, 2, 1, "thw", CELL, 2), "cls", "softmax"
    ),
    "keys first, time fastest": Undeclared(
        _plain("keys first", time_fastest=True), "BCTHW", TokenGrid(4, 3, 2, 1, "hwt", CELL), "cls", "softmax"
    ),
    "multi head, mean of patches": Undeclared(
        _plain("multi head", prefix=3, reads="patches"), "BCTHW", TokenGrid(4, 3, 2, 3, "thw", CELL), "weights", "mha"
    ),
    "fused, reads the last": Undeclared(
        _plain("fused", prefix=0, suffix=1, reads="last"),
        "BCTHW",
        TokenGrid(4, 3, 2, 0, "thw", CELL, 1),
        "weights",
        "sdpa",
    ),
    "encoder": Undeclared(Encoder, "BTCHW", TokenGrid(4, 3, 2, 0, "thw", CELL), "mean", "mha"),
    "encoder, norm last": Undeclared(
        lambda: Encoder(norm_first=False), "BTCHW", TokenGrid(4, 3, 2, 0, "thw", CELL), "mean", "mha"
    ),
    "divided": Undeclared(Divided, "BCTHW", TokenGrid(8, 3, 2, 1, "thw", (1, 8, 8)), "cls", "softmax"),
    "divided, batch inside": Undeclared(
        lambda: Divided("softmax module", batch_inside=True),
        "BCTHW",
        TokenGrid(8, 3, 2, 1, "thw", (1, 8, 8)),
        "cls",
        "softmax",
    ),
    "frames, mean": Undeclared(
        FrameEncoder,
        "BTCHW",
        TokenGrid(8, 3, 2, 1, "thw", (1, 8, 8), 7, tuple(7 * f + 1 + n for f in range(8) for n in range(6))),
        "weights",
        "sdpa",
    ),
    "frames, transformer": Undeclared(
        lambda: FrameEncoder("explicit", "transformer"),
        "BTCHW",
        TokenGrid(8, 3, 2, 8, "thw", (1, 8, 8)),
        "weights",
        "softmax",
    ),
}


def undeclared(name: str, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomize(MODELS[name].make(), seed)


def clip_of(layout: str, batch: int = 2, seed: int = 1, size: tuple[int, int, int] = SIZE) -> Tensor:
    clip = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))
    return clip if layout == "BCTHW" else clip.transpose(1, 2).contiguous()
