"""Attention of single layers composed into one map over the tokens of the clip.

Everything is a row vector times a matrix: ``weights (B, N)`` say how much the output takes from each token after a
block, and pulling them through the block's attention says how much it takes from each token before it. No N x N
product is formed, and divided space-time attention needs no N x N matrix at all.
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


def blocks_of(sites: Sequence[AttentionLayer]) -> list[list[AttentionLayer]]:
    """Sites grouped by residual block, in the order in which they run."""
    return [list(group) for _, group in groupby(sites, key=lambda site: site.block)]


def output_weights(pooling: str, batch: int, grid: TokenGrid, device: torch.device) -> Tensor:
    """``(B, N)``: what the head takes from each token. A pooling query's own weights are read, not known before."""
    if pooling == "cls":
        weights = torch.zeros(batch, grid.num_tokens, device=device)
        weights[:, 0] = 1
        return weights
    return torch.full((batch, grid.num_tokens), 1 / grid.num_tokens, device=device)


def pull(
    weights: Tensor, block: Sequence[AttentionLayer], matrices: Mapping[AttentionLayer, Tensor], grid: TokenGrid
) -> Tensor:
    """Weights of tokens after a block's attention to weights of tokens before it.

    Args:
        weights: ``(B, N)``.
        block: the block's sites in the order in which they run.
        matrices: head-mean matrix of each site: joint ``(B, N, N)``, pool ``(B, 1, N)``, spatial
            ``(B*t, h*w, h*w)`` or with the class token, temporal ``(B*h*w, t, t)``. A joint or pool site may instead
            hold ``(B, N)``, the head's weights pulled through it already; a spatial site its first rows only, where the
            other tokens' weights are zero.
        grid: the model's grid.

    Returns:
        ``(B, N)``. For divided attention, whose block attends in time and then in space, the path from a query at
        patch i of frame j to an input at patch p of frame q is unique: ``S_j[i, p] * T_p[j, q]``.
    """
    for site in reversed(block):
        matrix = matrices[site]
        if site.role in ("joint", "pool") and matrix.ndim == 2:
            weights = matrix
        elif site.role == "pool":
            weights = matrix[:, 0]
        elif site.role == "joint":
            weights = (weights[:, None] @ matrix)[:, 0]
        elif site.role == "spatial":
            weights = _pull_in_space(weights, matrix, grid)
        else:
            weights = _pull_in_time(weights, matrix, grid)
    return weights


def _pull_in_space(weights: Tensor, matrix: Tensor, grid: TokenGrid) -> Tensor:
    """A class token takes part in every frame, and its results are averaged over frames."""
    batch = len(weights)
    prefix, patches = weights[:, : grid.prefix], grid.to_grid(weights).flatten(2)  # (B, prefix), (B, t, h*w)
    repeated = (prefix / grid.t)[:, None].expand(batch, grid.t, grid.prefix)
    frames = torch.cat([repeated, patches], 2).unsqueeze(2)  # (B, t, 1, prefix + h*w)
    frames = frames[..., : matrix.shape[1]]  # where the class token's rows alone were read, it holds all weight
    pulled = (frames @ matrix.unflatten(0, (batch, grid.t)))[:, :, 0]
    patches = pulled[:, :, grid.prefix :].unflatten(2, (grid.h, grid.w))
    return torch.cat([pulled[:, :, : grid.prefix].sum(1), grid.to_tokens(patches)], 1)


def _pull_in_time(weights: Tensor, matrix: Tensor, grid: TokenGrid) -> Tensor:
    """A class token skips attention in time."""
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
    """Pull the head's weights back through all blocks.

    Args:
        weights: ``(B, N)`` of the head.
        blocks: in the order in which they run.
        matrices: as in :func:`pull`.
        grid: the model's grid.
        residual: joins what the residual connection keeps with what the attention pulled. The default adds the
            identity and renormalizes: attention rollout (Abnar and Zuidema, ACL 2020).
    """
    for block in reversed(blocks):
        pulled = pull(weights, block, matrices, grid)
        weights = pulled if block[-1].role == "pool" else residual(weights, pulled)
    return weights


def light_reader(pooling: str) -> Callable[[AttentionCall], Tensor]:
    """Reads what one block's own map needs, and no more: a row, column means, or the small divided matrices."""

    def read(call: AttentionCall) -> Tensor:
        if call.site.role == "pool":
            return call.row()
        if call.site.role == "joint":
            return call.row() if pooling == "cls" else call.column_means()
        if call.site.role == "spatial" and pooling == "cls":
            return call.row()[:, None]  # of every frame
        return call.head_mean()

    return read


def rollout_reader(pooling: str, last: AttentionLayer) -> Callable[[AttentionCall], Tensor]:
    """Reads the matrices that a rollout multiplies; of the last block only what the head takes from it."""
    light = light_reader(pooling)
    return lambda call: light(call) if call.site == last else call.head_mean()


class TemporalCarry:
    """Reads the rollout of time alone, forwards, while the model runs: N x t numbers instead of N x N.

    Column j of what is carried says how much each token owes to grid step j of the clip. Every block mixes it as it
    mixes the tokens themselves, so at the end the head's weights give the clip's share per step. Only for joint
    attention (and a pooling query at its end).

    Args:
        grid: the model's grid.
        batch: B.
        device: of the model.
    """

    def __init__(self, grid: TokenGrid, batch: int, device: torch.device) -> None:
        steps = torch.eye(grid.t, device=device)[:, :, None, None].expand(-1, -1, grid.h, grid.w)  # (t, t, h, w)
        patches = grid.to_tokens(steps).T  # (h*w*t, t): one-hot at the token's own step
        prefix = patches.new_zeros(grid.prefix, grid.t)  # a class token shows no frame
        self.columns = torch.cat([prefix, patches])[None].expand(batch, -1, -1)  # (B, N, t)

    def __call__(self, call: AttentionCall) -> None:
        if call.site.role == "pool":
            self.columns = call.row()[:, None] @ self.columns  # (B, 1, t)
        else:
            self.columns = (self.columns + call.carry(self.columns)) / 2

    def result(self, weights: Tensor) -> Tensor:
        """``(B, t)`` for the head's weights ``(B, N)``; a pooling query has put its own in already."""
        if self.columns.shape[1] == 1:
            return self.columns[:, 0]
        return (weights[:, None] @ self.columns)[:, 0]


def gradient_weighted(attention: Tensor, gradient: Tensor) -> Tensor:
    """Head mean of ``(gradient * attention)^+``: one site's matrix in the rule of Chefer et al. (ICCV 2021, eq. 5).

    Both ``(B, heads, Q, N)``; the gradient is that of the target's logit.
    """
    return (gradient.float() * attention.float()).detach().clamp(min=0).mean(1)  # in float16 it would be nothing
