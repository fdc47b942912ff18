"""Compare learned masks of cells with masks of supervoxels and of flow tubes, on planted and on real clips.

    python benchmarks/perturbation_regions.py                     # the table, one minute of one core
    python benchmarks/perturbation_regions.py --picture nasa.mp4  # the picture as well, from this video file

It writes the table between two comments of docs/results_methods.md. The real clips are the video files in the folder
that the environment variable CAPTUM_STAA_VIDEOS names; without it, the rows of real clips are missing.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch
from evidence import Evidence, against_rivals, cell, write_between
from matplotlib.figure import Figure
from perturbation_table import curves
from torch import Tensor
from tqdm import tqdm

from captum_staa import SpatioTemporalPerturbation, VideoClassifier, feature_masks, io
from captum_staa.attr.perturbation import MaskAttribution

MODELS = ("resnet3d-motion",)
REAL = "resnet3d-motion"  # model that is run on real clips; it knows none of their classes
SEED = 24_000
COUNT = 200  # regions of a clip
DOCS = Path(__file__).parents[1] / "docs"
REGIONS: dict[str, Callable[[Tensor, VideoClassifier], Tensor | None]] = {
    "cells": lambda clip, clf: None,
    "supervoxels": lambda clip, clf: feature_masks.supervoxels(clip, clf.layout, COUNT),
    "flow tubes": lambda clip, clf: feature_masks.flow_tubes(clip, clf.layout, COUNT),
}
SHOWN = {
    "rivals": "evidence against rivals",
    "all": "against all voxels",
    "insertion": "insertion",
    "deletion": "deletion",
    "insertion, blur": "insertion, blur",
    "deletion, blur": "deletion, blur",
}


def explain(clf: VideoClassifier, clip: Tensor, target: Tensor, regions: str) -> MaskAttribution:
    mask = REGIONS[regions](clip, clf)
    method = SpatioTemporalPerturbation(clf)
    return method.attribute_maps(clip, target=target, feature_mask=mask, perturbations_per_eval=2)


def planted(model: str, count: int, regions: str) -> list[dict[str, float]]:
    clf = VideoClassifier.from_pretrained(f"tiny-{model}")
    clips = Evidence(clf, model.split("-")[1], count, SEED).planted
    found = []
    for index in range(count):
        part = slice(index, index + 1)
        clip, label, truth = clips[part]
        clip = clf.layout.from_working(clip).contiguous()
        joint = explain(clf, clip, label, regions).joint
        scores = against_rivals(joint, truth, clips.rivals(part), clips.objects(part))
        found.append({key: float(value) for key, value in scores.items()} | curves(clf, clip, label, joint))
    return found


def read(clf: VideoClassifier, path: Path) -> tuple[Tensor, Tensor]:
    """Return consecutive frames from the middle of a video file, and the class that the model gives them."""
    clip = clf.preprocess(io.read_video(path, clf.num_frames, "dense").frames)
    return clip, clf(clip).argmax(1)


def real(path: Path, regions: str) -> dict[str, float]:
    clf = VideoClassifier.from_pretrained(f"tiny-{REAL}")
    clip, target = read(clf, path)
    return curves(clf, clip, target, explain(clf, clip, target, regions).joint)


def picture(path: Path) -> None:
    """Draw the masks of cells, supervoxels and flow tubes over frames of a real clip."""
    clf = VideoClassifier.from_pretrained(f"tiny-{REAL}")
    clip, target = read(clf, path)
    frames = clf.layout.to_working(clip)[0]  # (T, C, H, W)
    frames = (frames - frames.amin()) / (frames.amax() - frames.amin())
    shown = range(1, len(frames), 4)
    figure = Figure(figsize=(7.6, 7.8), layout="constrained")
    rows = figure.subplots(1 + len(REGIONS), len(shown))
    parts = {name: explain(clf, clip, target, name) for name in REGIONS}
    for row, name in enumerate((None, *REGIONS)):
        rows[row, 0].set_ylabel(name or "clip")
        for axes, frame in zip(rows[row], shown, strict=True):
            axes.set(xticks=[], yticks=[])
            image = frames[frame].permute(1, 2, 0)
            if name is not None:
                kept = parts[name].masks[0, -2, frame, :, :, None]  # of 15 % of the clip
                image = image * (0.3 + 0.7 * kept)
            else:
                axes.set_title(f"frame {frame}", fontsize=9)
            axes.imshow(image.numpy(), interpolation="nearest")
    figure.savefig(DOCS / "images" / "perturbation_regions.webp", dpi=80, pil_kwargs={"quality": 80})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Input Tensor . did not already require gradients")
    folder = os.environ.get("CAPTUM_STAA_VIDEOS")
    videos = sorted(path for path in Path(folder).iterdir() if path.suffix != ".md") if folder else []
    lines = ["| clips | regions | " + " | ".join(SHOWN.values()) + " |", "|---" * (len(SHOWN) + 2) + "|"]
    for name in tqdm(REGIONS):
        for clips, found in (
            ("planted", [scores for model in MODELS for scores in planted(model, arguments.clips, name)]),
            ("real", [real(path, name) for path in videos]),
        ):
            if found:
                means = {key: fmean(scores[key] for scores in found) for key in SHOWN if key in found[0]}
                lines.append(f"| {clips} | {name} | " + " | ".join(cell(means, key) for key in SHOWN) + " |")
    write_between(DOCS / "results_methods.md", "perturbation_regions", "\n".join([*lines[:2], *sorted(lines[2:])]))
    if arguments.picture:
        picture(arguments.picture)


if __name__ == "__main__":
    main()
