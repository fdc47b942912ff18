"""Mask grids, random values and comparisons shared by the tests of learned masks."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import expit
from torch import Tensor

from captum_staa.perturbation.mask_grid import CellGrid, RegionGrid

WIDE = torch.empty(0, dtype=torch.float64)
AREAS = torch.tensor([0.004, 0.05, 0.3, 0.5, 0.93], dtype=torch.float64)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(found: Tensor, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=0, atol=tolerance)


def regions() -> RegionGrid:
    """Two clips of 2 x 3 x 4 voxels: one has five unequal regions; in the other, regions 1 and 3 are missing."""
    first = [0] * 11 + [1] * 6 + [2] * 4 + [3] + [4] * 2
    second = [4, 2, 0, 0, 2, 4] * 4
    return RegionGrid(torch.tensor([first, second]).view(2, 2, 3, 4), WIDE)


def still() -> RegionGrid:
    """One mask for all clips: twelve voxels in regions of 6, 3, 2 and 1 voxels."""
    return RegionGrid(torch.tensor([0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 3]).view(1, 3, 2, 2), WIDE)


MASK_GRIDS = {
    "grid": lambda: CellGrid((4, 3, 6), (2, 3, 3), WIDE),
    "uneven grid": lambda: CellGrid((5, 4, 6), (3, 2, 4), WIDE),
    "one mask": still,
    "a mask per clip": regions,
}


def by_root(scores: Tensor, shares: Tensor, area: float, softness: float) -> np.ndarray:
    """The sigmoid whose weighted mean is the area, ``(n,)``, by a root finder."""
    values, weights = scores.detach().numpy(), shares.numpy()

    def excess(threshold: float) -> float:
        return float((weights * expit((values - threshold) / softness)).sum() / weights.sum()) - area

    low, high = values.min() - 40 * softness, values.max() + 40 * softness
    return expit((values - brentq(excess, low, high, xtol=1e-14)) / softness)
