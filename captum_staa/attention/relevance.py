"""Attention weighted by the gradient of a class."""

from __future__ import annotations

from torch import Tensor


def gradient_weighted(attention: Tensor, gradient: Tensor) -> Tensor:
    """Head mean of ``(gradient * attention)^+``: one site's matrix in the rule of Chefer et al. (ICCV 2021, eq. 5).

    Both ``(B, heads, Q, N)``; the gradient is that of the target's logit.
    """
    return (gradient.float() * attention.float()).detach().clamp(min=0).mean(1)  # in float16 it would be nothing
