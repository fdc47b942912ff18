"""Reductions of softmax(q k^T) that do not keep the N x N matrices of all heads in memory.

Every function takes an :class:`Operands` and agrees with the explicit matrix up to rounding. The functions
``attend_and_...`` return the attention's output as well, so that the model does not have to compute it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_staa._utils.tensors import without_autocast

# Number of floats in one tile of scores. On a CPU, a tile should stay in the cache of each core for its three passes
# (scores, softmax, product with the values). On an accelerator, few large launches are faster than many small ones.
CPU_TILE_PER_THREAD = 1 << 18
DEVICE_TILE = 1 << 26


@dataclass(frozen=True)
class Operands:
    """Operands of one attention: ``softmax(cap(scale * query @ key^T) + bias) @ value``.

    Args:
        query: ``(B, heads, Q, d)``.
        key: ``(B, heads, N, d)``.
        value: ``(B, heads, N, dv)``.
        scale: factor of the scores.
        bias: additive mask, or boolean mask (True: attend), broadcastable to ``(B, heads, Q, N)``.
        softcap: if not None, tanh limits scores to ``(-softcap, softcap)``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    bias: Tensor | None = None
    softcap: float | None = None

    def probabilities(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Return attention probabilities ``(B, heads, R, N)`` of the given query rows; differentiable."""
        bias = self.bias
        if bias is not None and bias.shape[-2] != 1:
            bias = bias[..., rows, :]
        scores = (self.query[:, :, rows] * self.scale) @ self.key.transpose(-2, -1)
        return _softmax(scores, bias, self.softcap)

    def row(self, index: int) -> Tensor:
        """Return the attention of one query, averaged over heads, ``(B, N)``."""
        return self.probabilities(slice(index, index + 1))[:, :, 0].float().mean(1)

    def without_heads(self) -> Operands:
        """Return operands whose axis of heads, which counts rows, is moved to the batch: ``(B * rows, 1, N, d)``."""
        bias = self.bias
        if bias is not None:
            bias = bias.expand(*self.query.shape[:2], *bias.shape[-2:]).flatten(0, 1).unsqueeze(1)
        query, key, value = (part.flatten(0, 1).unsqueeze(1) for part in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value, bias=bias)


def _softmax(scores: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is None:
        return scores.softmax(-1)
    if bias.dtype != torch.bool:
        return (scores + bias).softmax(-1)
    probabilities = scores.masked_fill(~bias, float("-inf")).softmax(-1)
    return probabilities.masked_fill(~bias.any(-1, keepdim=True), 0)  # a query that may attend to nothing


def attend_and_average_rows(x: Operands, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the output ``(B, heads, Q, dv)``, and the rows of the head-mean matrix times ``weights``, ``(B, N)``.

    Args:
        x: the operands.
        weights: ``(B, Q)``, the weight of each row. None is their mean.
    """
    output = _empty_output(x)
    return output.unflatten(0, x.query.shape[:2]), _row_mean(x, output, weights)


def attend_and_average_heads(x: Operands) -> tuple[Tensor, Tensor]:
    """Return the output ``(B, heads, Q, dv)`` and the head-mean matrix ``(B, Q, N)``, in 1/heads of the full memory."""
    output = _empty_output(x)
    return output.unflatten(0, x.query.shape[:2]), _head_mean(x, output)


def average_rows(x: Operands, weights: Tensor | None = None) -> Tensor:
    """Return only the weighted rows ``(B, N)``, without a graph. The model computes its output itself."""
    with torch.no_grad():
        return _row_mean(x, None, weights)


def average_heads(x: Operands) -> Tensor:
    """Return only the head-mean matrix ``(B, Q, N)``, without a graph. The model computes its output itself."""
    with torch.no_grad():
        return _head_mean(x, None)


def _row_mean(x: Operands, output: Tensor | None, weights: Tensor | None) -> Tensor:
    batch, heads, count = x.query.shape[:3]
    columns = x.query.new_zeros((batch * heads, 1, x.key.shape[2]), dtype=torch.float32)
    if weights is None:
        weights = columns.new_full((1, count), 1 / count).expand(batch, -1)
    weights = weights.float().repeat_interleave(heads, 0)[:, None]  # (B * heads, 1, Q)
    for group, rows, tile in _tiles(x, output):
        with without_autocast(tile):
            columns[group] += weights[group, :, rows] @ tile.float()
    return columns.view(batch, heads, -1).mean(1)


def _head_mean(x: Operands, output: Tensor | None) -> Tensor:
    batch, heads, count = x.query.shape[:3]
    matrix = x.query.new_zeros((batch, count, x.key.shape[2]), dtype=torch.float32)
    for group, rows, tile in _tiles(x, output, head_per_thread=False):  # one head at a time, because heads are summed
        for example in range(group.start // heads, (group.stop - 1) // heads + 1):
            first, last = max(group.start, example * heads), min(group.stop, (example + 1) * heads)
            part = tile[first - group.start : last - group.start].float()  # the heads of this example in the tile
            matrix[example, rows].add_(part[0] if len(part) == 1 else part.sum(0), alpha=1 / heads)
    return matrix


def attend_and_carry(x: Operands, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output, and the head-mean matrix times some columns, both from one fused attention.

    The columns are appended to the values as additional channels, so that no matrix is formed.

    Args:
        x: the operands.
        columns: ``(B, N, c)``.

    Returns:
        output ``(B, heads, Q, dv)`` and carried columns ``(B, Q, c)``.
    """
    heads, channels = x.query.shape[1], x.value.shape[-1]
    appended = columns.to(x.value.dtype)[:, None].expand(-1, heads, -1, -1)
    value = torch.cat([x.value, appended], -1)
    if x.softcap is not None:
        both = x.probabilities() @ value
    else:  # fused kernels need query, key and value of equal width; zeros do not change a score
        width = max(x.query.shape[-1], value.shape[-1])
        query, key, value = (F.pad(part, (0, width - part.shape[-1])) for part in (x.query, x.key, value))
        both = F.scaled_dot_product_attention(query, key, value, x.bias, scale=x.scale)
    return both[..., :channels], both[..., channels : channels + columns.shape[-1]].float().mean(1)


def _empty_output(x: Operands) -> Tensor:
    batch, heads, count = x.query.shape[:3]
    return x.value.new_empty((batch * heads, count, x.value.shape[-1]))


def _tiles(x: Operands, output: Tensor | None, head_per_thread: bool = True) -> Iterator[tuple[slice, slice, Tensor]]:
    """Run the attention tile by tile: write ``output`` and yield (heads, rows, tile of probabilities)."""
    query = (x.query * x.scale).flatten(0, 1)  # (B*heads, Q, d)
    key = x.key.flatten(0, 1).transpose(1, 2).contiguous()  # (B*heads, d, N)
    value = x.value.flatten(0, 1).contiguous()  # (B*heads, N, dv)
    bias = x.bias
    if bias is not None:
        bias = bias.expand(*x.query.shape[:2], *bias.shape[-2:]).flatten(0, 1)
    heads, count = query.shape[:2]
    if query.device.type == "cpu":  # one head per thread, so that each core processes the same rows in all three passes
        threads = torch.get_num_threads()
        head_step = min(heads, threads) if head_per_thread else 1
        row_step = min(count, max(1, CPU_TILE_PER_THREAD * threads // (head_step * key.shape[2])))
        if row_step == count:  # small clips need fewer, larger steps
            head_step = max(head_step, CPU_TILE_PER_THREAD * head_step // (count * key.shape[2]))
    else:
        row_step = min(count, max(1, DEVICE_TILE // key.shape[2]))
        head_step = max(1, DEVICE_TILE // (row_step * key.shape[2]))
    for first_head in range(0, heads, head_step):
        group = slice(first_head, min(first_head + head_step, heads))
        for first_row in range(0, count, row_step):
            rows = slice(first_row, min(first_row + row_step, count))
            tile_bias = None if bias is None else bias[group, rows if bias.shape[1] != 1 else slice(None)]
            tile = _softmax(query[group, rows] @ key[group], tile_bias, x.softcap)
            if output is not None:
                output[group, rows] = tile @ value[group]
            yield group, rows, tile


def operands_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    softcap: float | None = None,
) -> Operands:
    """Return the operands of F.scaled_dot_product_attention, reshaped to ``(B, heads, N, d)``."""
    if query.ndim < 3:
        raise ValueError(
            f"query must be (B, N, d) or (..., heads, N, d), got shape {tuple(query.shape)}. Add a batch dimension "
            f"with query.unsqueeze(0)."
        )
    if causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if query.ndim == 3:  # a single head
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        mask = mask.unsqueeze(1) if mask is not None and mask.ndim == 3 else mask
    lead = query.shape[:-3]
    if mask is not None and mask.ndim > 4:
        mask = mask.expand(*lead, *mask.shape[-3:]).flatten(0, -4)
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:  # heads share keys and values
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    return Operands(query, key, value, query.shape[-1] ** -0.5 if scale is None else float(scale), mask, softcap)
