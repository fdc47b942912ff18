"""Small hierarchies, built as torchvision's: MViT 2 (pooled queries, keys and residuals) and Swin 3D."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Steps = tuple[int, int, int]


class PooledAttention(nn.Module):
    """Queries, keys and values behind strided depthwise convolutions; the class token passes them by."""

    graph = False  # whether ``matrix`` keeps its autograd graph

    def __init__(self, width: int, heads: int, of_queries: Steps, of_keys: Steps) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        side = width // heads
        self.pools = nn.ModuleList(
            nn.Conv3d(side, side, 3, steps, 1, groups=side, bias=False) for steps in (of_queries, of_keys, of_keys)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(side) for _ in range(3))
        self.matrix = torch.empty(0)  # (B, heads, Q, N), of the last forward

    def forward(self, x: Tensor, grid: Steps) -> tuple[Tensor, Steps]:
        parts = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, h, 1 + N, d)
        (q, size), (k, _), (v, _) = (
            self.pooled(part, grid, pool, norm) for part, pool, norm in zip(parts, self.pools, self.norms, strict=True)
        )
        attention = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(-1)
        self.matrix = attention if self.graph else attention.detach()
        out = attention @ v
        out = torch.cat([out[:, :, :1], out[:, :, 1:] + q[:, :, 1:]], 2)  # MViT 2: residual queries, but not the class
        return self.proj(out.transpose(1, 2).flatten(2)), size

    def pooled(self, part: Tensor, grid: Steps, pool: nn.Module, norm: nn.Module) -> tuple[Tensor, Steps]:
        cls, patches = part[:, :, :1], part[:, :, 1:]
        small = pool(patches.flatten(0, 1).mT.unflatten(2, grid))  # (B * h, d, t, h, w)
        patches = small.flatten(2).mT.unflatten(0, part.shape[:2])
        return norm(torch.cat([cls, patches], 2)), tuple(small.shape[2:])


class PooledBlock(nn.Module):
    def __init__(self, width: int, heads: int, of_queries: Steps, of_keys: Steps) -> None:
        super().__init__()
        self.attn = PooledAttention(width, heads, of_queries, of_keys)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        kernel = tuple(step + 1 if step > 1 else step for step in of_queries)
        self.skip = nn.MaxPool3d(kernel, of_queries, tuple(side // 2 for side in kernel))

    def forward(self, x: Tensor, grid: Steps) -> tuple[Tensor, Steps]:
        y, size = self.attn(self.norm1(x), grid)
        patches = self.skip(x[:, 1:].mT.unflatten(2, grid)).flatten(2).mT
        x = torch.cat([x[:, :1], patches], 1) + y
        return x + self.mlp(self.norm2(x)), size


class MViT(nn.Module):
    """(B, C, T, H, W), overlapping tubelets of 3 x 7 x 7 at steps of 2 x 4 x 4, and one halving of the patches."""

    def __init__(self, width: int = 32, classes: int = 3, size: Steps = (8, 32, 32), layers: int = 3) -> None:
        super().__init__()
        t, h, w = (side // step for side, step in zip(size, (2, 4, 4), strict=True))
        self.embed = nn.Conv3d(3, width, (3, 7, 7), (2, 4, 4), (1, 3, 3))
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + t * h * w, width))
        steps = [((1, 1, 1), (1, 4, 4)), ((1, 2, 2), (1, 2, 2)), ((1, 1, 1), (1, 2, 2))]
        self.blocks = nn.ModuleList(PooledBlock(width, 2, *steps[min(n, 2)]) for n in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def patches(self, clip: Tensor) -> Tensor:
        """Return the patch embeddings ``(B, D, t, h, w)``."""
        return self.embed(clip)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.patches(clip)
        grid = tuple(x.shape[2:])
        x = torch.cat([self.cls.expand(len(x), -1, -1), x.flatten(2).mT], 1) + self.positions
        for block in self.blocks:
            x, grid = block(x, grid)
        return self.head(self.norm(x)[:, 0])


class WindowAttention(nn.Module):
    graph = False

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(heads, size, size))
        self.matrix = torch.empty(0)  # (B * windows, heads, n, n), of the last forward

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * q.shape[-1] ** -0.5 + self.bias
        if mask is not None:  # (windows, n, n)
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        attention = scores.softmax(-1)
        self.matrix = attention if self.graph else attention.detach()
        return self.proj((attention @ v).transpose(1, 2).flatten(2))


class WindowBlock(nn.Module):
    """Attention within windows of ``window`` patches, shifted by half of it in every second block."""

    def __init__(self, width: int, heads: int, window: Steps, shifted: bool) -> None:
        super().__init__()
        self.window, self.shift = window, tuple(side // 2 if shifted else 0 for side in window)
        self.attn = WindowAttention(width, heads, window[0] * window[1] * window[2])
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def windows(self, x: Tensor) -> Tensor:
        """Return ``(B * windows, n, D)`` from ``(B, t, h, w, D)``, shifted."""
        x = x.roll([-side for side in self.shift], (1, 2, 3))
        for axis, side in zip((3, 2, 1), reversed(self.window), strict=True):
            x = x.unflatten(axis, (-1, side))
        return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(0, 3)

    def forward(self, x: Tensor) -> Tensor:
        t, h, w = (side // step for side, step in zip(x.shape[1:4], self.window, strict=True))
        y = self.attn(self.windows(self.norm1(x)), self.mask(x) if any(self.shift) else None)
        y = y.unflatten(0, (-1, t, h, w)).unflatten(4, self.window).permute(0, 1, 4, 2, 5, 3, 6, 7)
        y = y.flatten(5, 6).flatten(3, 4).flatten(1, 2).roll(self.shift, (1, 2, 3))
        x = x + y
        return x + self.mlp(self.norm2(x))

    def mask(self, x: Tensor) -> Tensor:
        """Return -100 between patches that are in one window only because of the shift, ``(windows, n, n)``."""
        regions = torch.zeros(1, *x.shape[1:4], 1)
        for axis, (side, shift) in enumerate(zip(self.window, self.shift, strict=True)):
            length = x.shape[axis + 1]
            line = torch.zeros(length)
            line[:shift] = 2  # comes to the last window by the shift
            line[shift : length - side + shift] = 0
            line[length - side + shift :] = 1
            shape = [length if place == axis else 1 for place in range(3)]
            regions = regions * 3 + line.view(1, *shape, 1)
        of_window = self.windows(regions)[..., 0]  # (windows, n)
        return -100.0 * (of_window[:, :, None] != of_window[:, None]).to(x)


class Swin(nn.Module):
    """(B, C, T, H, W), tubelets of 2 x 4 x 4, windows, shifted windows, and one merging of 2 x 2 patches."""

    def __init__(self, width: int = 32, classes: int = 3, window: Steps = (2, 4, 4)) -> None:
        super().__init__()
        self.embed, self.norm0 = nn.Conv3d(3, width, (2, 4, 4), (2, 4, 4)), nn.LayerNorm(width)
        self.first = nn.ModuleList(WindowBlock(width, 2, window, shifted) for shifted in (False, True))
        self.merge, self.merge_norm = nn.Linear(4 * width, width, bias=False), nn.LayerNorm(4 * width)
        self.second = nn.ModuleList(WindowBlock(width, 2, (window[0], 2, 2), shifted) for shifted in (False, True))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.norm0(self.embed(clip).movedim(1, -1))  # (B, t, h, w, D)
        for block in self.first:
            x = block(x)
        quads = [x[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        x = self.merge(self.merge_norm(torch.cat(quads, -1)))
        for block in self.second:
            x = block(x)
        return self.head(self.norm(x).mean((1, 2, 3)))
