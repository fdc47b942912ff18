"""Correlation of values and of ranks, row by row."""

from __future__ import annotations

import torch
from torch import Tensor


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """``(B,)`` of two ``(B, P)``; nan where all values of one row are equal."""
    x, y = x - x[:, :1], y - y[:, :1]  # equal values become 0 exactly, and so, below, nan
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    # one root of the product, not two: a row with itself is then 1 to the last digit
    return ((x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt()).clamp(-1, 1)


def midranks(values: Tensor) -> Tensor:
    """``(B, P)``: the rank of each value in its row; equal values share the mean of their ranks."""
    values = values.contiguous()  # searchsorted warns of others
    ordered = values.sort(dim=1).values
    return (torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)).double() / 2
