"""Small networks and clips for the tests of ST-ABN."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import randomize
from torch import Tensor, nn

from captum_staa.models.resnet3d import SlowResNet


def seeded(make: Any, *args: Any, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*args, **options)


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and running statistics, which a new network has at 0 and 1, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    randomize(model, seed, 0.2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(generator=generator).mul_(0.2)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model


def slow_resnet(classes: int = 5, **options: Any) -> SlowResNet:
    return seeded(SlowResNet, classes, layers=(1, 1, 1, 1), width=4, **options)


def clips_of(frames: int, side: int, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, frames, side, side, generator=torch.Generator().manual_seed(seed))
