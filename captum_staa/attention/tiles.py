"""What a map needs of softmax(q k^T), without ever holding the N x N matrices of all heads.

Every function takes an :class:`Operands` and agrees with the explicit matrix to rounding. The two that pass over
all rows return the attention's own output too, so their work replaces the model's instead of adding to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Floats in one tile of scores. On a CPU a tile should stay in each core's cache between its three passes (scores,
# softmax, product with the values); on an accelerator few large launches beat many small ones.
CPU_TILE_PER_THREAD = 1 << 18
DEVICE_TILE = 1 << 26


@dataclass(frozen=True)
class Operands:
    """The operands of one attention: ``softmax(cap(scale * query @ key^T) + bias) @ value``.

    Args:
        query: ``(B, heads, Q, d)``.
        key: ``(B, heads, N, d)``.
        value: ``(B, heads, N, dv)``.
        scale: factor of the scores.
        bias: additive mask, or boolean mask (True attends), broadcastable to ``(B, heads, Q, N)``.
        softcap: scores are squeezed into ``(-softcap, softcap)`` by tanh, where given.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    bias: Tensor | None = None
    softcap: float | None = None

    def probabilities(self, rows: slice = slice(None)) -> Tensor:
        """``(B, heads, R, N)`` attention probabilities of some query rows; differentiable."""
        bias = self.bias
        if bias is not None and bias.shape[-2] != 1:
            bias = bias[..., rows, :]
        scores = (self.query[:, :, rows] * self.scale) @ self.key.transpose(-2, -1)
        return _softmax(scores, bias, self.softcap)

    def row(self, index: int) -> Tensor:
        """``(B, N)``: one query's attention, averaged over heads."""
        return self.probabilities(slice(index, index + 1))[:, :, 0].float().mean(1)


def _softmax(scores: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is None:
        return scores.softmax(-1)
    if bias.dtype != torch.bool:
        return (scores + bias).softmax(-1)
    probabilities = scores.masked_fill(~bias, float("-inf")).softmax(-1)
    return probabilities.masked_fill(~bias.any(-1, keepdim=True), 0)  # a query that may attend to nothing


def attend_and_average_rows(x: Operands) -> tuple[Tensor, Tensor]:
    """The output ``(B, heads, Q, dv)``, and the column means ``(B, N)`` of the head-mean attention matrix."""
    output = _empty_output(x)
    return output.unflatten(0, x.query.shape[:2]), _row_mean(x, output)


def attend_and_average_heads(x: Operands) -> tuple[Tensor, Tensor]:
    """The output ``(B, heads, Q, dv)``, and the head-mean matrix ``(B, Q, N)``: 1/heads of the full memory."""
    output = _empty_output(x)
    return output.unflatten(0, x.query.shape[:2]), _head_mean(x, output)


def average_rows(x: Operands) -> Tensor:
    """The column means ``(B, N)`` alone, outside any graph: where the model computes its own output."""
    with torch.no_grad():
        return _row_mean(x, None)


def average_heads(x: Operands) -> Tensor:
    """The head-mean matrix ``(B, Q, N)`` alone, outside any graph: where the model computes its own output."""
    with torch.no_grad():
        return _head_mean(x, None)


def _row_mean(x: Operands, output: Tensor | None) -> Tensor:
    batch, heads, count = x.query.shape[:3]
    columns = x.query.new_zeros((batch * heads, 1, x.key.shape[2]), dtype=torch.float32)
    mean = columns.new_full((1, 1, count), 1 / count)
    for group, rows, tile in _tiles(x, output):
        columns[group] += mean[:, :, : rows.stop - rows.start] @ tile.float()
    return columns.view(batch, heads, -1).mean(1)


def _head_mean(x: Operands, output: Tensor | None) -> Tensor:
    batch, heads, count = x.query.shape[:3]
    matrix = x.query.new_zeros((batch, count, x.key.shape[2]), dtype=torch.float32)
    for group, rows, tile in _tiles(x, output, head_per_thread=False):  # heads are summed: one after the other
        for example in range(group.start // heads, (group.stop - 1) // heads + 1):
            first, last = max(group.start, example * heads), min(group.stop, (example + 1) * heads)
            own = tile[first - group.start : last - group.start].float()  # this example's heads in the tile
            matrix[example, rows].add_(own[0] if len(own) == 1 else own.sum(0), alpha=1 / heads)
    return matrix


def attend_and_carry(x: Operands, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the head-mean matrix times a few columns, both from one fused attention.

    Columns ride along as further channels of the values, so that no matrix is ever formed.

    Args:
        x: the operands.
        columns: ``(B, N, c)``.

    Returns:
        output ``(B, heads, Q, dv)`` and carried columns ``(B, Q, c)``.
    """
    heads, channels = x.query.shape[1], x.value.shape[-1]
    riders = columns.to(x.value.dtype)[:, None].expand(-1, heads, -1, -1)
    value = torch.cat([x.value, riders], -1)
    if x.softcap is not None:
        both = x.probabilities() @ value
    else:  # fused kernels want query, key and value of one width; zeros change no score
        width = max(x.query.shape[-1], value.shape[-1])
        query, key, value = (F.pad(part, (0, width - part.shape[-1])) for part in (x.query, x.key, value))
        both = F.scaled_dot_product_attention(query, key, value, x.bias, scale=x.scale)
    return both[..., :channels], both[..., channels : channels + columns.shape[-1]].float().mean(1)


def _empty_output(x: Operands) -> Tensor:
    batch, heads, count = x.query.shape[:3]
    return x.value.new_empty((batch * heads, count, x.value.shape[-1]))


def _tiles(x: Operands, output: Tensor | None, head_per_thread: bool = True) -> Iterator[tuple[slice, slice, Tensor]]:
    """Run the attention tile by tile, writing ``output`` and yielding (heads, rows, tile of probabilities)."""
    query = (x.query * x.scale).flatten(0, 1)  # (B*heads, Q, d)
    key = x.key.flatten(0, 1).transpose(1, 2).contiguous()  # (B*heads, d, N)
    value = x.value.flatten(0, 1).contiguous()  # (B*heads, N, dv)
    bias = x.bias
    if bias is not None:
        bias = bias.expand(*x.query.shape[:2], *bias.shape[-2:]).flatten(0, 1)
    heads, count = query.shape[:2]
    if query.device.type == "cpu":  # a head per thread: each core then meets the same rows in all three passes
        threads = torch.get_num_threads()
        head_step = min(heads, threads) if head_per_thread else 1
        row_step = min(count, max(1, CPU_TILE_PER_THREAD * threads // (head_step * key.shape[2])))
        if row_step == count:  # small clips: fewer, larger steps
            head_step = max(head_step, CPU_TILE_PER_THREAD * head_step // (count * key.shape[2]))
    else:
        row_step = min(count, max(1, DEVICE_TILE // key.shape[2]))
        head_step = max(1, DEVICE_TILE // (row_step * key.shape[2]))
    for first_head in range(0, heads, head_step):
        group = slice(first_head, min(first_head + head_step, heads))
        for first_row in range(0, count, row_step):
            rows = slice(first_row, min(first_row + row_step, count))
            own = None if bias is None else bias[group, rows if bias.shape[1] != 1 else slice(None)]
            tile = _softmax(query[group, rows] @ key[group], own, x.softcap)
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
    """Any operands that F.scaled_dot_product_attention takes, brought to ``(B, heads, N, d)``."""
    if query.ndim < 3:
        raise ValueError(f"queries must be (B, N, d) or (..., heads, N, d), but their shape is {tuple(query.shape)}")
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
