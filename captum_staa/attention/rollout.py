"""Composition of the attention of single layers into one map over the tokens of the clip.

Every step is a product of a row vector and a matrix. ``weights (B, N)`` give how much the output takes from each token
after a block. Pulled through the attention of the block, they give how much the output takes from each token before it.
No product of N x N matrices is computed, and divided space-time attention needs no N x N matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from captum_staa.attention.capture import AttentionCall
from captum_staa.grid import TokenGrid
from captum_staa.models.families import AttentionLayer

Blocks = Sequence[Sequence[AttentionLayer]]


def blocks_of(layers: Sequence[AttentionLayer]) -> list[list[AttentionLayer]]:
    """Return the layers grouped by residual block, in the order in which they run."""
    return [list(group) for _, group in groupby(layers, key=lambda layer: layer.block)]


def output_weights(pooling: str, batch: int, grid: TokenGrid, device: torch.device) -> Tensor:
    """Return the weight of each token in the head, ``(B, N)``. The weights of a pooling query are read later."""
    if pooling == "cls":
        weights = torch.zeros(batch, grid.num_tokens, device=device)
        weights[:, 0] = 1
        return weights
    return torch.full((batch, grid.num_tokens), 1 / grid.num_tokens, device=device)


def pull(
    weights: Tensor, block: Sequence[AttentionLayer], matrices: Mapping[AttentionLayer, Tensor], grid: TokenGrid
) -> Tensor:
    """Return the weights of the tokens before a block's attention, from the weights after it.

    Args:
        weights: ``(B, N)``.
        block: the block's layers in the order in which they run.
        matrices: head-mean matrix of each layer: joint ``(B, N, N)``, pool ``(B, 1, N)``, spatial
            ``(B*t, h*w, h*w)`` or with the class token, temporal ``(B*h*w, t, t)``. For a joint or pool layer it may
            also be ``(B, N)``, the head's weights already pulled through the layer. For a spatial layer it may hold the
            first rows only, if the weights of the other tokens are zero.
        grid: the model's grid.

    Returns:
        ``(B, N)``. For divided attention, whose block attends in time and then in space, the path from a query at
        patch i of frame j to an input at patch p of frame q is unique: ``S_j[i, p] * T_p[j, q]``.
    """
    for layer in reversed(block):
        matrix = matrices[layer]
        if layer.role in ("joint", "pool") and matrix.ndim == 2:
            weights = matrix
        elif layer.role == "pool":
            weights = matrix[:, 0]
        elif layer.role == "joint":
            weights = (weights[:, None] @ matrix)[:, 0]
        elif layer.role == "spatial":
            weights = _pull_in_space(weights, matrix, grid)
        else:
            weights = _pull_in_time(weights, matrix, grid)
    return weights


def _pull_in_space(weights: Tensor, matrix: Tensor, grid: TokenGrid) -> Tensor:
    """Pull through spatial attention. A class token is part of every frame: its results are averaged over frames."""
    batch = len(weights)
    prefix, patches = weights[:, : grid.prefix], grid.to_grid(weights).flatten(2)  # (B, prefix), (B, t, h*w)
    repeated = (prefix / grid.t)[:, None].expand(batch, grid.t, grid.prefix)
    frames = torch.cat([repeated, patches], 2).unsqueeze(2)  # (B, t, 1, prefix + h*w)
    frames = frames[..., : matrix.shape[1]]  # if only the rows of the class token were read, it holds all weight
    pulled = (frames @ matrix.unflatten(0, (batch, grid.t)))[:, :, 0]
    patches = pulled[:, :, grid.prefix :].unflatten(2, (grid.h, grid.w))
    return torch.cat([pulled[:, :, : grid.prefix].sum(1), grid.to_tokens(patches)], 1)


def _pull_in_time(weights: Tensor, matrix: Tensor, grid: TokenGrid) -> Tensor:
    """Pull through temporal attention, in which a class token has no part."""
    batch = len(weights)
    tracks = grid.to_grid(weights).flatten(2).transpose(1, 2).unsqueeze(2)  # (B, h*w, 1, t)
    pulled = (tracks @ matrix.unflatten(0, (batch, grid.h * grid.w)))[:, :, 0]
    patches = pulled.transpose(1, 2).unflatten(2, (grid.h, grid.w))
    return torch.cat([weights[:, : grid.prefix], grid.to_tokens(patches)], 1)


def rollout(
    weights: Tensor,
    blocks: Blocks,
    matrices: Mapping[AttentionLayer, Tensor],
    grid: TokenGrid,
    residual: Callable[[Tensor, Tensor], Tensor] = lambda kept, pulled: (kept + pulled) / 2,
) -> Tensor:
    """Return the head's weights pulled back through all blocks, ``(B, N)``.

    Args:
        weights: ``(B, N)`` of the head.
        blocks: in the order in which they run.
        matrices: as in :func:`pull`.
        grid: the model's grid.
        residual: function of the weights before and after the pull, which models the residual connection. The default
            is their mean: attention rollout (Abnar and Zuidema, ACL 2020).
    """
    for block in reversed(blocks):
        pulled = pull(weights, block, matrices, grid)
        weights = pulled if block[-1].role == "pool" else residual(weights, pulled)
    return weights


def light_reader(pooling: str) -> Callable[[AttentionCall], Tensor]:
    """Return a reader for the map of a single block: it reads a row, column means, or the small divided matrices."""

    def read(call: AttentionCall) -> Tensor:
        if call.layer.role == "pool":
            return call.row()
        if call.layer.role == "joint":
            return call.row() if pooling == "cls" else call.column_means()
        if call.layer.role == "spatial" and pooling == "cls":
            return call.row()[:, None]  # of every frame
        return call.head_mean()

    return read


def rollout_reader(pooling: str, last: AttentionLayer) -> Callable[[AttentionCall], Tensor]:
    """Return a reader for a rollout: it reads full matrices, and of the last layer only what the head uses."""
    light = light_reader(pooling)
    return lambda call: light(call) if call.layer == last else call.head_mean()


class TemporalCarry:
    """Reader that computes the temporal part of a rollout during the forward pass, with N x t numbers instead of N x N.

    Column j gives the share of grid step j in each token. Every block mixes the columns as it mixes the tokens, so at
    the end the head's weights give the share of each step. It works for joint attention only, optionally with a pooling
    query at the end.

    Args:
        grid: the model's grid.
        batch: B.
        device: device of the model.
    """

    def __init__(self, grid: TokenGrid, batch: int, device: torch.device) -> None:
        steps = torch.eye(grid.t, device=device)[:, :, None, None].expand(-1, -1, grid.h, grid.w)  # (t, t, h, w)
        patches = grid.to_tokens(steps).T  # (h*w*t, t): one-hot at the token's own step
        prefix = patches.new_zeros(grid.prefix, grid.t)  # a class token belongs to no frame
        self.columns = torch.cat([prefix, patches])[None].expand(batch, -1, -1)  # (B, N, t)

    def __call__(self, call: AttentionCall) -> None:
        if call.layer.role == "pool":
            self.columns = call.row()[:, None] @ self.columns  # (B, 1, t)
        else:
            self.columns = (self.columns + call.carry(self.columns)) / 2

    def result(self, weights: Tensor) -> Tensor:
        """Return ``(B, t)`` for the head's weights ``(B, N)``. A pooling query has already applied its own weights."""
        if self.columns.shape[1] == 1:
            return self.columns[:, 0]
        return (weights[:, None] @ self.columns)[:, 0]


def gradient_weighted(attention: Tensor, gradient: Tensor) -> Tensor:
    """Return the head mean of ``(gradient * attention)^+``, one layer's matrix in Chefer et al. (ICCV 2021, eq. 5).

    Args:
        attention: ``(B, heads, Q, N)`` probabilities.
        gradient: ``(B, heads, Q, N)``, the gradient of the target's logit.
    """
    return (gradient.float() * attention.float()).detach().clamp(min=0).mean(1)  # products underflow in float16
