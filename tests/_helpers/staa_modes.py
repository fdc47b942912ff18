"""The modes of STAA, and rank statistics for the tests of STAA."""

from __future__ import annotations

import torch
from torch import Tensor

LAYERS = ([-1], [0], [0, -1], "mean", "all")


TARGET = torch.tensor([2, 0])


MODES: dict[str, dict[str, str]] = {
    "attention": {"mode": "attention"},
    "decomposition": {"mode": "relevance", "rule": "decomposition"},
    "chefer": {"mode": "relevance", "rule": "chefer"},
}


def ranks(x: Tensor) -> Tensor:
    return x.flatten().argsort().argsort().double()


def spearman(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([ranks(a.float()), ranks(b.float())]))[0, 1].item()
