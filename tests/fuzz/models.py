"""Small models for random calls: one for clips of any shape, and transformers, which accept one shape."""

from __future__ import annotations

from functools import cache

import torch
from branched_models import injected
from tiny_models import NAMES, randomize, tiny, tiny_module
from torch import Tensor, nn

from captum_staa import VideoClassifier, VideoLayout
from captum_staa.models import STABN

CLASSES = 3


class Anything(nn.Module):
    """Model for clips of any shape: logits are products of waves over time, channel and position, and their squares.

    All voxels have different weights, so that a map with swapped axes is different.
    """

    def __init__(self, axes: str) -> None:
        super().__init__()
        self.layout = VideoLayout(axes)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, clip: Tensor) -> Tensor:
        x = self.layout.to_working(clip)
        found = []
        for k in range(CLASSES):
            y = x
            for axis, speed in ((4, 0.7), (3, 1.1), (2, 1.9), (1, 0.4)):
                place = torch.arange(x.shape[axis], device=x.device)
                wave = (1 + torch.cos(speed * (place + 1) * (k + 1) + axis)).to(x.dtype)
                y = y * wave.view([-1 if i == axis else 1 for i in range(5)])
            found.append((y + 0.3 * y.square()).flatten(1).mean(1))
        return torch.stack(found, 1) * self.scale.to(x.dtype)


class Convolutions(nn.Module):
    """Two 3D convolutions and a non-linear head, for clips of any shape in any layout."""

    def __init__(self, axes: str, channels: int) -> None:
        super().__init__()
        self.layout = VideoLayout(axes)
        self.first, self.second = nn.Conv3d(channels, 4, 3, padding=1), nn.Conv3d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.layout.to_working(clip).transpose(1, 2)
        x = self.second(self.first(x).tanh())
        return self.head(x.square().mean((2, 3, 4)))


@cache
def anything(axes: str) -> Anything:
    """Return a model that all calls share. Calls must not change it."""
    return Anything(axes).eval()


@cache
def convolutions(axes: str, channels: int) -> nn.Module:
    with torch.random.fork_rng():
        return randomize(Convolutions(axes, channels), seed=0)


@cache
def transformer(name: str, axes: str = "", double: bool = False) -> VideoClassifier:
    """Return a tiny transformer of a family; with ``axes``, for clips in another layout."""
    clf = tiny(name)
    if axes:
        clf = VideoClassifier(tiny_module(name), layout=axes, image_size=clf.image_size)
    return clf.double() if double else clf


@cache
def branched() -> STABN:
    return injected("tensor")[0]


TRANSFORMERS = tuple(name for name in NAMES if name != "timesformer-joint")
