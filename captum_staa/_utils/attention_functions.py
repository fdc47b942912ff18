"""The functions of torch that compute attention, for function modes that look for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

SOFTMAX = (
    F.softmax,
    torch.softmax,
    torch.Tensor.softmax,
    torch.special.softmax,
    torch._softmax,
    torch._safe_softmax,
    F.softmin,
)
KIND_OF: dict[Any, str] = {
    F.scaled_dot_product_attention: "sdpa",
    F.multi_head_attention_forward: "mha",
    **dict.fromkeys(SOFTMAX, "softmax"),
}


def softmax_axis(args: Any, kwargs: Any, ndim: int) -> int:
    """Return the axis, 0 to ndim - 1, of a call of a function in :data:`SOFTMAX`."""
    axis = args[1] if len(args) > 1 else kwargs.get("dim")
    if axis is None:  # the rule of F.softmax without dim, which is deprecated
        axis = 0 if ndim in (0, 1, 3) else 1
    return int(axis) % ndim
