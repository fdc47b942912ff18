"""Measure what smoothness in space and in time changes in learned masks, each with its own weight.

    python benchmarks/perturbation_smoothness.py             # eight clips of a 3D CNN, a minute of one core

It writes the table between two comments of docs/results_methods.md. The models and the seed are not those on which the
defaults were chosen, except for the kind of model.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from evidence import write_between
from torch import Tensor
from tqdm import tqdm

from captum_staa import SpatioTemporalPerturbation, VideoClassifier, metrics
from captum_staa.benchmark import PlantedClips
from captum_staa.perturbation import PRESETS, Nested, PerturbationConfig, TotalVariation

MODELS = ("resnet3d-motion",)
SEED = 22_000
NOISE = 0.3  # standard deviation, for clips in [-1, 1]
PAGE = Path(__file__).parents[1] / "docs" / "results_methods.md"
Scores = tuple[Tensor, Tensor]


def smoothed(time: float, space: float, **options: object) -> PerturbationConfig:
    """Return the options of the initial map without windows, whose gradients are smoothed."""
    return replace(PRESETS["nested"], parametrization=Nested(smooth=(time, space), windows=0), iterations=0, **options)


def learned(term: TotalVariation | None) -> PerturbationConfig:
    return replace(PRESETS["nested"], regularizer=term)


WIDTHS = {"none": (0, 0), "time": (1, 0), "space": (0, 2), "time and space": (1, 2), "twice as wide": (2, 4)}
INITIAL = {name: smoothed(*width) for name, width in WIDTHS.items()}
# cells twice as high and wide, of the same length, since clips have at least 8 along time; blurs as wide in pixels
FEW = {name: smoothed(time, space / 2, cells=(4, 8)) for name, (time, space) in WIDTHS.items()}
TERMS = {
    "none": None,
    "time": TotalVariation(space=0, time=1),
    "space": TotalVariation(space=1, time=0),
    "time and space": TotalVariation(space=1, time=1),
}
LEARNED = {name: learned(term) for name, term in TERMS.items()}
COLUMNS = {
    "initial map": (INITIAL, 0.0),
    "noisy clip": (INITIAL, NOISE),
    "few cells": (FEW, 0.0),
    "learned, total variation": (LEARNED, 0.0),
}


def scores(model: str, count: int, config: PerturbationConfig, noise: float) -> Scores:
    """Evidence against rivals and against all voxels, ``(count,)`` each."""
    clf = VideoClassifier.from_pretrained(f"tiny-{model}")
    planted = PlantedClips(SEED, count, model.split("-")[1])
    clips, labels, truth = planted[:]
    clips = clips + noise * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    method = SpatioTemporalPerturbation(clf, preset=config)
    clips = clf.layout.from_working(clips).contiguous()
    maps = method.attribute_maps(clips, target=labels, perturbations_per_eval=2).joint
    rivals = planted.rivals(slice(count))
    return metrics.evidence_against_rivals(maps, truth, rivals), metrics.auroc(maps, truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=8)
    count = parser.parse_args().clips
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Input Tensor . did not already require gradients")
    runs = [(column, row) for column, (rows, _) in COLUMNS.items() for row in rows]
    found: dict[tuple[str, str], str] = {}
    for column, row in tqdm(runs):
        rows, noise = COLUMNS[column]
        rivals, everything = (
            torch.cat(part) for part in zip(*(scores(m, count, rows[row], noise) for m in MODELS), strict=True)
        )
        found[column, row] = f"{rivals.mean():.3f} / {everything.mean():.3f}"
        print(column, row, found[column, row], flush=True)
    lines = ["| smoothed along | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {row} | " + " | ".join(found.get((column, row), "") for column in COLUMNS) + " |" for row in WIDTHS]
    write_between(PAGE, "perturbation_smoothness", "\n".join(lines))


if __name__ == "__main__":
    main()
