"""The bootstrap: how a number would vary had other inputs been drawn from where these came from."""

from __future__ import annotations

import torch
from torch import Tensor


def draws(n_bootstrap: int, count: int, generator: torch.Generator) -> Tensor:
    """``(R, N)`` float64 on the CPU: how many copies of each of ``count`` inputs each draw holds, ``count`` in all."""
    copies = torch.zeros(n_bootstrap, count, dtype=torch.float64)
    if count:
        drawn = torch.randint(count, (n_bootstrap, count), generator=generator, device=generator.device).cpu()
        copies.scatter_add_(1, drawn, torch.ones_like(copies))
    return copies


def interval(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high ``(...)``, between which 95 % of the values ``(R, ...)`` of the draws lie; nan is passed over."""
    low, high = drawn.nanquantile(drawn.new_tensor([0.025, 0.975]), dim=0)
    return low, high
