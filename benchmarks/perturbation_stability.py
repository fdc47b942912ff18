"""Measure how much maps change under small noise of the clip: learned masks beside other methods.

    python benchmarks/perturbation_stability.py             # two clips of a 3D CNN, half a minute of one core

It writes the table between two comments of docs/results_methods.md.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from captum.attr import IntegratedGradients, Saliency
from captum.metrics import sensitivity_max
from evidence import smoothed, write_between
from torch import Tensor
from tqdm import tqdm

from captum_staa import RISE, SpatioTemporalPerturbation, VideoClassifier, VideoOcclusion
from captum_staa.benchmark import PlantedClips
from captum_staa.perturbation import PRESETS

MODELS = ("resnet3d-motion",)
SEED = 25_000
RADIUS = 0.05  # largest change of a value, for clips in [-1, 1]
DRAWS = 3
COST = PRESETS["nested"].forwards()
PAGE = Path(__file__).parents[1] / "docs" / "results_methods.md"
Explain = Callable[[Tensor, Tensor], Tensor]  # a clip and its target -> a map (1, T, H, W)


def methods(clf: VideoClassifier) -> dict[str, Explain]:
    layout = clf.layout
    learned = SpatioTemporalPerturbation(clf)

    def nested(**options: object) -> Explain:
        return lambda x, y: learned.attribute_maps(x, target=y, perturbations_per_eval=2, **options).joint

    def integrated(x: Tensor, y: Tensor) -> Tensor:
        return layout.reduce(IntegratedGradients(clf).attribute(x, target=y, n_steps=COST // 3, internal_batch_size=4))

    def occlusion(x: Tensor, y: Tensor) -> Tensor:
        sides = tuple(-(-side // 6) for side in layout.extent(x))  # 216 windows
        return layout.reduce(VideoOcclusion(clf).attribute(x, sides, sides, target=y, perturbations_per_eval=4))

    return {
        "STEP (nested)": nested(),
        "STEP (nested), its initial map alone": nested(iterations=0),
        "RISE": lambda x, y: layout.reduce(RISE(clf).attribute(x, target=y, n_samples=COST, perturbations_per_eval=4)),
        "VideoOcclusion": occlusion,
        "IntegratedGradients": integrated,
        "IntegratedGradients, smoothed": lambda x, y: smoothed(integrated(x, y)),
        "Saliency": lambda x, y: layout.reduce(Saliency(clf).attribute(x, target=y)),
    }


def ranks(maps: Tensor) -> Tensor:
    return maps.flatten().argsort().argsort().double()


def measure(clf: VideoClassifier, clips: Tensor, labels: Tensor, explain: Explain) -> dict[str, float]:
    """Return the sensitivity, and the lowest rank correlation of a noisy clip's map with the map of the clip."""
    largest, lowest = [], []
    for clip, label in zip(clips.split(1), labels.split(1), strict=True):
        made: list[Tensor] = []

        def one_by_one(x: Any, label: Tensor = label, made: list[Tensor] = made) -> Any:
            batch = x[0] if isinstance(x, tuple) else x
            maps = torch.cat([explain(own, label) for own in batch.split(1)])
            made.extend(maps.split(1))
            return (maps,) if isinstance(x, tuple) else maps  # a tensor for a tuple would be divided frame by frame

        torch.manual_seed(0)
        change = sensitivity_max(one_by_one, clip, perturb_radius=RADIUS, n_perturb_samples=DRAWS)
        largest.append(float(change))
        first, *others = [ranks(own) for own in made]
        lowest.append(min(float(torch.corrcoef(torch.stack([first, other]))[0, 1]) for other in others))
    return {"change": fmean(largest), "ranks": fmean(lowest)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=2)
    count = parser.parse_args().clips
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Input Tensor . did not already require gradients")
    found: dict[str, list[dict[str, float]]] = {}
    for model in MODELS:
        clf = VideoClassifier.from_pretrained(f"tiny-{model}")
        clips, labels, _ = PlantedClips(SEED, count, model.split("-")[1])[:]
        clips = clf.layout.from_working(clips).contiguous()
        for name, explain in tqdm(methods(clf).items(), desc=model):
            found.setdefault(name, []).append(measure(clf, clips, labels, explain))
    lines = ["| method | `sensitivity_max` | rank correlation, lowest |", "|---|---|---|"]
    for name, values in sorted(found.items(), key=lambda each: fmean(one["change"] for one in each[1])):
        change, order = (fmean(one[key] for one in values) for key in ("change", "ranks"))
        lines.append(f"| {name} | {change:.3f} | {order:.3f} |")
    write_between(PAGE, "perturbation_stability", "\n".join(lines))


if __name__ == "__main__":
    main()
