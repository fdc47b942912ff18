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

from captum_staa._utils.tensors import without_autocast
from captum_staa.attention.capture import AttentionCall
from captum_staa.grid import TokenGrid, TokenRows
from captum_staa.models.families import AttentionLayer, Pooling

Blocks = Sequence[Sequence[AttentionLayer]]
Rows = Mapping[AttentionLayer, TokenRows]


def blocks_of(layers: Sequence[AttentionLayer]) -> list[list[AttentionLayer]]:
    """Return the layers grouped by residual block, in the order in which they run."""
    return [list(group) for _, group in groupby(layers, key=lambda layer: layer.block)]


def output_weights(pooling: Pooling, batch: int, grid: TokenGrid, device: torch.device) -> Tensor:
    """Return the weight of each token in the head, ``(B, N)``. The weights of a pooling query are read later."""
    if isinstance(pooling, Tensor):
        return pooling.to(device).expand(batch, -1)
    if pooling == "cls":
        weights = torch.zeros(batch, grid.num_tokens, device=device)
        weights[:, 0] = 1
        return weights
    return torch.full((batch, grid.num_tokens), 1 / grid.num_tokens, device=device)


def pull(
    weights: Tensor, block: Sequence[AttentionLayer], matrices: Mapping[AttentionLayer, Tensor], rows: Rows
) -> Tensor:
    """Return the weights of the tokens before a block's attention, from the weights after it.

    Args:
        weights: ``(B, N)``.
        block: the block's layers in the order in which they run.
        matrices: head-mean matrix of each layer, ``(L, Q, N)``, or ``(L, N)`` if the weights are already pulled through
            the layer, as :meth:`TokenRows.pull` takes it.
        rows: the tokens of each layer's rows.

    Returns:
        ``(B, N)``. For divided attention, whose block attends in time and then in space, the path from a query at
        patch i of frame j to an input at patch p of frame q is unique: ``S_j[i, p] * T_p[j, q]``.
    """
    for layer in reversed(block):
        weights = rows[layer].pull(weights, matrices[layer])
    return weights


def rollout(
    weights: Tensor,
    blocks: Blocks,
    matrices: Mapping[AttentionLayer, Tensor],
    rows: Rows,
    residual: Callable[[Tensor, Tensor], Tensor] = lambda kept, pulled: (kept + pulled) / 2,
) -> Tensor:
    """Return the head's weights pulled back through all blocks, ``(B, N)``.

    Args:
        weights: ``(B, N)`` of the head.
        blocks: in the order in which they run.
        matrices, rows: as in :func:`pull`.
        residual: function of the weights before and after the pull, which models the residual connection. The default
            is their mean: attention rollout (Abnar and Zuidema, ACL 2020).
    """
    for block in reversed(blocks):
        pulled = pull(weights, block, matrices, rows)
        weights = pulled if rows[block[-1]].pools else residual(weights, pulled)
    return weights


def reader(weights: Tensor, pulled: Sequence[AttentionLayer], rows: Rows) -> Callable[[AttentionCall], Tensor]:
    """Return a reader for :func:`pull` that reads full head-mean matrices, except at some layers.

    Args:
        weights: ``(B, N)``, the head's weights of the tokens.
        pulled: the layers at which these weights are pulled while the attention is computed. They must be the last ones
            that the pull of these weights meets first.
        rows: the tokens of each layer's rows.
    """

    def read(call: AttentionCall) -> Tensor:
        if call.layer not in pulled:
            return call.head_mean()
        of_layer = rows[call.layer]
        return call.pulled(of_layer.fold(of_layer.gather(weights)))

    return read


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
            with without_autocast(self.columns):
                self.columns = call.row()[:, None] @ self.columns  # (B, 1, t)
        else:
            self.columns = (self.columns + call.carry(self.columns)) / 2

    def result(self, weights: Tensor) -> Tensor:
        """Return ``(B, t)`` for the head's weights ``(B, N)``. A pooling query has already applied its own weights."""
        if self.columns.shape[1] == 1:
            return self.columns[:, 0]
        with without_autocast(weights):
            return (weights[:, None] @ self.columns)[:, 0]


def gradient_weighted(attention: Tensor, gradient: Tensor) -> Tensor:
    """Return the head mean of ``(gradient * attention)^+``, one layer's matrix in Chefer et al. (ICCV 2021, eq. 5).

    Args:
        attention: ``(B, heads, Q, N)`` probabilities.
        gradient: ``(B, heads, Q, N)``, the gradient of the target's logit.
    """
    return (gradient.float() * attention.float()).detach().clamp(min=0).mean(1)  # products underflow in float16


def layer_sum(matrices: Mapping[AttentionLayer, Tensor], rows: Rows, batch: int) -> Tensor:
    """Return the mean over queries of each layer's matrix, on the tokens of the sequence, summed over layers.

    A layer with coarser keys, such as pooled ones, gives each of their tokens the value of the key. Nothing is carried
    from one layer to the next, so layers may run side by side and the head may read tokens of any layer.

    Args:
        matrices: of each layer, ``(L, Q, N)``, such as :func:`gradient_weighted`.
        rows: the tokens of each layer's rows.
        batch: B.

    Returns:
        ``(B, N)``.

    Reference:
        Bousselham et al., "LeGrad: An Explainability Method for Vision Transformers via Feature Formation Sensitivity",
        arXiv 2404.03214: the positive gradients of layers, without attention as a factor, each of its own layer's
        score.
    """
    return torch.stack([rows[layer].of_keys(matrix, batch) for layer, matrix in matrices.items()]).sum(0)
