"""Maps of the authors' public code (VideoXAI, October 2024), reimplemented from its description for comparison.

Its four defects are kept on purpose. :class:`captum_staa.STAA` lists them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from captum_staa._utils.gaussian import gaussian
from captum_staa.grid import TokenGrid

OPENCV_SIGMA = 1.4  # default of OpenCV for a 7 x 7 kernel
MOVING_AVERAGE = 5  # frames
EMA = 0.3


def released_maps(
    matrix: Tensor, role: str, batch: int, grid: TokenGrid, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the spatial map of every frame, and the "temporal attention".

    Args:
        matrix: head-mean matrix of the last layer's spatial attention ``(B*t, n, n)``; for joint attention
            and pooling queries, which the authors do not support, ``(B, Q, N)`` with the same indices.
        role: role of the attention layer of ``matrix``.
        batch: B.
        grid: the model's grid.
        generator: draws the random thresholds, one per step of time, shared by all clips.

    Returns:
        ``(B, t, H, W)`` in [0, 1], normalized per frame, and ``(B, t)`` in [0, 1].
    """
    rows = _rows(matrix, role, batch, grid)  # (B, t, h, w)
    weights = rows.flatten(2).mean(2)  # (B, t): the mean of a softmax row, which is constant but for special tokens
    smoothed = torch.stack([rows[:, max(0, i + 1 - MOVING_AVERAGE) : i + 1].mean(1) for i in range(grid.t)], 1)
    size = grid.pixels[1:]
    pixels = torch.nn.functional.interpolate(smoothed, size=size, mode="bilinear", align_corners=False)
    pixels = gaussian(pixels, (0, OPENCV_SIGMA, OPENCV_SIGMA), radius=(0, 3, 3))
    low, high = (torch.quantile(pixels.flatten(2), p, dim=2) for p in (0.7, 0.9))
    draw = torch.rand(grid.t, generator=generator, device=generator.device).to(
        low
    )  # independent of the position in the batch
    threshold = low + draw * (high - low)
    kept = pixels.where(pixels >= threshold[..., None, None], pixels.new_zeros(()))
    return _min_max(kept, (2, 3)), _min_max(_moving(weights), (1,))


def _rows(matrix: Tensor, role: str, batch: int, grid: TokenGrid) -> Tensor:
    """Return ``m_i(p) = S[0, i + 1, p]``: always frame 0, and its (i+1)-th token as the query instead of frame i."""
    steps = torch.arange(grid.t, device=matrix.device)
    if role == "spatial":
        first = matrix.unflatten(0, (batch, grid.t))[:, 0]  # (B, n, n): frame 0 alone
        queries = (steps + 1).clamp(max=first.shape[1] - 1)
        return first[:, queries, grid.prefix :].unflatten(2, (grid.h, grid.w))
    queries = (steps + 1).clamp(max=matrix.shape[1] - 1)
    return grid.to_grid(matrix[:, queries])[:, steps, steps]  # query token i+1, keys of grid step i


def _moving(values: Tensor) -> Tensor:
    average = [values[:, 0]]
    for step in range(1, values.shape[1]):
        average.append(EMA * values[:, step] + (1 - EMA) * average[-1])
    return torch.stack(average, 1)


def _min_max(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    low, high = values.amin(axes, keepdim=True), values.amax(axes, keepdim=True)
    return (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)
