"""Class-specific relevance: rules that join what the output attends to with what its gradient uses."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_staa.gaussian import gaussian
from captum_staa.grid import TokenGrid


def smooth_input_gradient(product: Tensor, grid: TokenGrid) -> Tensor:
    """``|gradient x input|`` per pixel, averaged over a neighbourhood of about one tubelet.

    The sign of a single pixel's product is noise (it flips with the phase of a texture), its size is not; and what
    one tubelet holds is what the model can tell apart. The Gaussian is half a tubelet long and a quarter wide.

    Args:
        product: ``(B, T, H, W)``, gradient times input, summed over channels.
        grid: gives the size of a tubelet.
    """
    t, h, w = grid.tubelet
    return gaussian(product.abs(), (t / 2, h / 4, w / 4))


def weigh(magnitude: Tensor, attended: Tensor) -> Tensor:
    """Magnitude, times how much more than the average voxel the output attends to a place.

    Both ``(B, T, H, W)``; the result is in the units of ``magnitude``.
    """
    mean = attended.mean((1, 2, 3), keepdim=True)
    return magnitude * attended / mean.clamp(min=torch.finfo(attended.dtype).tiny)


def gradient_weighted(attention: Tensor, gradient: Tensor) -> Tensor:
    """Head mean of ``(gradient * attention)^+``: one site's matrix in the rule of Chefer et al. (ICCV 2021, eq. 5).

    Both ``(B, heads, Q, N)``; the gradient is that of the target's logit.
    """
    return (gradient.float() * attention.float()).detach().clamp(min=0).mean(1)  # in float16 it would be nothing
