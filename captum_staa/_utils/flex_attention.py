"""``flex_attention`` of torch, written with ``F.scaled_dot_product_attention``, whose operands function modes see."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# What torch.nn.attention.flex_attention.flex_attention calls, where modes see it unless it is compiled.
FLEX_ATTENTION: Any = torch.ops.higher_order.flex_attention


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor],
    block_mask: Sequence[Any],
    scale: float,
    kernel_options: Any = None,
    score_buffers: Sequence[Any] = (),
    mask_buffers: Sequence[Any] = (),
) -> tuple[Tensor, ...]:
    """Compute :data:`FLEX_ATTENTION`: what its functions change in the scores is an additive mask, a constant.

    Args:
        query: ``(B, heads, Q, d)``.
        key, value: ``(B, heads, N, d)``, or with B = 1, or with fewer heads.
        score_mod: from a score, and the indices of example, head, query and key, to another score.
        block_mask: content of a ``BlockMask``. Its last value is the function from the four indices to whether the
            query attends to the key.
        scale: of the scores.
        kernel_options: not used.
        score_buffers, mask_buffers: further arguments of both functions.

    Returns:
        What torch returns: the output ``(B, heads, Q, d)``, and the logarithm to base 2 of the sums of exponentials
        and of the largest exponentials ``(B, heads, Q)``, of which old versions have only the first.
    """
    key, value = (part.expand(len(query), -1, -1, -1) for part in (key, value))
    shared = query.shape[1] // key.shape[1]
    with torch.no_grad(), _IndexByTensors():
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = query.to(wide) @ key.repeat_interleave(shared, 1).to(wide).mT * scale
        indices = [torch.arange(size, device=query.device) for size in scores.shape]
        changed = _for_each(score_mod, scores, *indices, *score_buffers)
        allowed = _for_each(lambda _, *index: block_mask[-1](*index), scores, *indices, *mask_buffers)
        changed = changed.to(wide).masked_fill(~allowed, -torch.inf)
        added = (changed - scores).to(query.dtype)
    options = {"enable_gqa": True} if shared > 1 else {}
    output = F.scaled_dot_product_attention(query, key, value, added, scale=scale, **options)
    results = output, changed.logsumexp(-1) / math.log(2), changed.amax(-1) / math.log(2)
    return results if hasattr(torch.nn.attention.flex_attention, "AuxOutput") else results[:2]


def _for_each(function: Callable[..., Tensor], scores: Tensor, *rest: Any) -> Tensor:
    """Call a function of one score and its four indices for all scores ``(B, heads, Q, N)``."""
    for axis in (4, 3, 2, 1):
        places = tuple(0 if place in (0, axis) else None for place in range(1 + len(rest)))
        function = torch.vmap(function, places)
    return function(scores, *rest)


class _IndexByTensors(TorchFunctionMode):
    """Lets functions under ``torch.vmap`` index tensors by numbers that are tensors, as ``table[head]``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if index and all(isinstance(each, Tensor) for each in index):
                return torch.ops.aten.index(args[0], index)
        return func(*args, **(kwargs or {}))
