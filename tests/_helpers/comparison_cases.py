"""Helpers shared by the tests of the comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_staa import VideoClassifier
from captum_staa.benchmark import PlantedClips, compare

PLANTED = PlantedClips(seed=12, n=20)
CONTROLS = ("random", "uniform", "center", "model-free", "inverted", "random weights", "other class")

FAST = [  # all but those that take many forwards
    "STAA (relevance)",
    "STAA (Chefer)",
    "STAA",
    "STAA (last layer)",
    "ReleasedSTAA",
    "VideoFeatureAblation (frames)",
    "GradCAM",
    "GradCAM (layercam)",
    "GradCAM (last)",
    "Saliency",
    "InputXGradient",
    "GuidedBackprop",
    "DeepLift",
    "LayerGradCam",
    "FeatureAblation (frames)",
]


def table(found) -> dict[tuple[str, str, str], float]:
    return {row[:3]: row.value for row in found.rows if not row.reason}


def silent(*args, **options):
    return compare(*args, show_progress=False, **options)


def entry_files(folder: Path) -> list[Path]:
    return sorted((folder / "entries").glob("*.jsonl"))


def stored(folder: Path) -> list[dict[str, Any]]:
    """Return the entries in the files of a run, without any check."""
    return [json.loads(line)["entry"] for path in entry_files(folder) for line in path.read_bytes().splitlines()]


def remove_entries(folder: Path, removed: Callable[[dict[str, Any]], bool]) -> int:
    """Remove the lines of some entries from the files of a run; return their number."""
    count = 0
    for path in entry_files(folder):
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if not removed(json.loads(line)["entry"])]
        path.write_bytes(b"".join(kept))
        count += len(lines) - len(kept)
    return count


class Colors(nn.Module):
    """Model whose logits are mixtures of the mean colors."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.head = nn.Linear(3, classes, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(3)[:classes])

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs.mean((1, 3, 4)))  # (B, T, C, H, W) to (B, classes)


def scene(target: int, seed: int = 0) -> tuple[Tensor, int, Tensor, Tensor, Tensor]:
    """Return a clip of two squares that differ in color only, in front of noise; class ``k`` is channel ``k``."""
    clip = 0.1 * torch.rand(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    truth, rivals = torch.zeros(2, 1, 4, 8, 8, dtype=torch.bool)
    truth[:, 1:3, :4, :4] = True
    rivals[:, 1:3, 4:, 4:] = True
    clip[:, :, target] += truth
    clip[:, :, (target + 1) % 3] += rivals
    return clip, target, truth, rivals, torch.stack([truth, rivals], 1)


def classifier(classes: int = 3) -> VideoClassifier:
    return VideoClassifier(Colors(classes).eval(), "BTCHW")


def mixture(model: VideoClassifier):
    """Return a method whose map is the contribution of each pixel to the logit, times the number of pixels."""

    def contributions(clip: Tensor, target: int) -> Tensor:
        return torch.einsum("btchw,c->bthw", clip, model.module.head.weight[target].detach())

    return contributions


def absolute(clip: Tensor, target: int) -> Tensor:
    """Return a map that uses neither the model nor the class."""
    return clip.abs().sum(2)
