"""Where spatio-temporal perturbation stands: insertion, deletion and planted truth beside other methods and controls.

    python benchmarks/perturbation_table.py                  # four clips of six models, some two hours on one core
    python benchmarks/perturbation_table.py --only resnet3d-pattern --clips 2
    python benchmarks/perturbation_table.py --write-only     # the page again, from the results at hand

Each method is written to its model's file as soon as its clips are done; a second start goes on behind it, and with
more ``--clips`` scores the further ones only.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from captum.attr import IntegratedGradients, NoiseTunnel, Saliency
from torch import Tensor
from tqdm import tqdm

from captum_staa import STAA, GradCAM, SpatioTemporalPerturbation, VideoClassifier, VideoOcclusion, baselines, metrics
from captum_staa.benchmark import PlantedClips
from captum_staa.perturbation.masks import Separate
from captum_staa.perturbation.settings import SETTINGS, Setting
from captum_staa.perturbation.smoothness import TotalVariation

MODELS = (
    "resnet3d-pattern",
    "videomae-pattern",
    "resnet3d-motion",
    "videomae-order",
    "resnet3d-order",
    "videomae-motion",
)
SEED, BATCH = 70_000, 2
CELLS, STEPS = (1, 3, 3), 128  # 16 cells along each side of a frame
FOLDER = Path(__file__).parents[1] / "docs" / "perturbation"
COLUMNS = (
    "insertion, fade",
    "deletion, fade",
    "insertion, blur",
    "deletion, blur",
    "IoU",
    "pointing",
    "joint AUROC",
    "time AUROC",
    "visible / asked",
    "CPU s",
)
Maps = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # clips, labels -> maps (B, T, H, W), visible / asked (B,)


def methods(clf: VideoClassifier) -> dict[str, Maps]:
    """By name. Gradients are taken by magnitude, as their signs flip from pixel to pixel."""
    layout = clf.layout
    size, patch = (8, 8) if clf.grid is None else clf.grid.tubelet[1:]
    integrated, noisy = IntegratedGradients(clf), NoiseTunnel(Saliency(clf))

    def plain(make: Callable[[Tensor, Tensor], Tensor], magnitude: bool = True) -> Maps:
        def maps(clips: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            found = layout.reduce(make(clips, labels).detach())
            return found.abs() if magnitude else found, torch.full((len(clips),), torch.nan)

        return maps

    def smooth_squared(clips: Tensor, labels: Tensor) -> Tensor:
        torch.manual_seed(0)  # NoiseTunnel draws from the global state
        options = {"nt_samples": 16, "nt_samples_batch_size": 2, "stdevs": 0.15}
        return noisy.attribute(clips, nt_type="smoothgrad_sq", **options, target=labels)

    def learnt(setting: str | Setting = "nested", **options: object) -> Maps:
        method = SpatioTemporalPerturbation(clf, setting=setting)

        def maps(clips: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            parts = method.attribute_parts(clips, target=labels, perturbations_per_eval=4, **options)
            return parts.joint, (parts.visible / parts.areas).mean(1)

        return maps

    early = next(name for name, _ in clf.module.named_modules() if name.endswith(("layernorm_before", "stages.0")))
    found = {
        "Saliency": plain(lambda x, y: Saliency(clf).attribute(x, target=y)),
        "IntegratedGradients (50)": plain(
            lambda x, y: integrated.attribute(x, target=y, n_steps=50, internal_batch_size=20)
        ),
        "SmoothGrad squared (16)": plain(smooth_squared),
        "GradCAM (hirescam), first block": plain(
            lambda x, y: GradCAM(clf, early, weighting="hirescam").attribute(x, target=y)
        ),
        "VideoOcclusion (4 frames x 2 x 2 patches)": plain(
            lambda x, y: VideoOcclusion(clf).attribute(
                x, (4, 2 * size, 2 * patch), (4, size, patch), target=y, perturbations_per_eval=4
            ),
            magnitude=False,
        ),
        "nested": learnt(),
        "nested, TV in space": learnt(smoothness=TotalVariation(space=0.2, time=0.0)),
        "nested, TV in time": learnt(smoothness=TotalVariation(space=0.0, time=0.5)),
        "nested, TV in both": learnt(smoothness=TotalVariation(space=0.2, time=0.5)),
        "nested, ellipsoid": learnt(smoothness="ellipsoid"),
        "nested, preserve only": learnt(objective="preserve"),
        "nested, the hint alone": learnt(iterations=0),
        "3d-ep": learnt("3d-ep"),
        "step": learnt("step"),
        "step, from the hint": learnt(replace(SETTINGS["step"], parametrisation=Separate(warm=True))),
        "2d-ep": learnt("2d-ep"),
    }
    if clf.grid is not None:
        found["STAA relevance"] = plain(lambda x, y: STAA(clf).attribute(x, target=y), magnitude=False)
    return found


def scored(clf: VideoClassifier, clips: Tensor, labels: Tensor, truth: Tensor, maps: Tensor) -> list[Tensor]:
    """``(B,)`` for each of the first eight columns."""
    found = []
    for cover in (0.0, baselines.blur(clips, clf.layout)):
        curves = metrics.causal(
            clf, clips, maps, target=labels, cells=CELLS, steps=STEPS, baselines=cover, perturbations_per_eval=8
        )
        found += [curves.insertion.score, curves.deletion.score]
    found += [metrics.iou(maps, truth), metrics.pointing_game(maps, truth)]
    return [*found, metrics.auroc(maps, truth), metrics.auroc(maps, truth, axis="time")]


def measure(model: str, count: int, path: Path) -> None:
    clf = VideoClassifier.from_pretrained(f"tiny-{model}")
    planted = PlantedClips(seed=SEED, n=count, task=model.split("-")[1])
    found: dict[str, list[list[float]]] = json.loads(path.read_text()) if path.exists() else {}

    def add(name: str, rows: list[Tensor]) -> None:
        values = torch.stack([row.double() for row in rows], 1).tolist()
        found.setdefault(name, []).extend([round(value, 5) for value in row] for row in values)
        path.with_suffix(".part").write_text(json.dumps(found, separators=(",", ":")))
        path.with_suffix(".part").replace(path)

    for name, make in tqdm(methods(clf).items(), desc=model):
        for start in range(len(found.get(name, ())), count, BATCH):
            clips, labels, truth = planted[start : min(start + BATCH, count)]
            clips = clf.layout.from_working(clips).contiguous()
            began = time.process_time()
            maps, visible = make(clips, labels)
            seconds = torch.full((len(clips),), (time.process_time() - began) / len(clips))
            add(name, [*scored(clf, clips, labels, truth, maps), visible, seconds])
            if name != "nested":
                continue
            generator = torch.Generator().manual_seed(start)
            for control, other in metrics.controls(clips, clf.layout, maps, generator).items():
                none = torch.full((len(clips),), torch.nan)
                add(control, [*scored(clf, clips, labels, truth, other), none, 0 * seconds])
            add("the truth itself", [*scored(clf, clips, labels, truth, truth.double()), none, 0 * seconds])


def page(results: dict[str, dict[str, list[list[float]]]]) -> str:
    lines = [
        "# Spatio-temporal perturbation: the table",
        "",
        "Means over planted clips, their number in each heading. Insertion (high is good) and deletion (low is good):",
        f"the area under the target's probability over {STEPS} steps, cells of 1 x 3 x 3 (16 along each side of a",
        "frame), towards zero (fade) and towards a blur. IoU at the truth's own area; pointing without tolerance. CPU",
        "seconds are per clip on one thread of a busy machine. `inverted` is of `nested`. Made by",
        "`python benchmarks/perturbation_table.py`.",
        "",
    ]
    for model, found in results.items():
        count = min(len(rows) for rows in found.values())
        lines += [f"## {model}, {count} clips", "", "| method | " + " | ".join(COLUMNS) + " |"]
        lines.append("|---" * (len(COLUMNS) + 1) + "|")
        for name, rows in found.items():
            means = [fmean(column) for column in zip(*rows[:count], strict=True)]
            lines.append(f"| {name} | " + " | ".join("–" if m != m else f"{m:.3f}" for m in means) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--only", choices=MODELS, action="append")
    parser.add_argument("--write-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Input Tensor . did not already require gradients")
    FOLDER.mkdir(exist_ok=True)
    for model in [] if arguments.write_only else arguments.only or MODELS:
        measure(model, arguments.clips, FOLDER / f"{model}.json")
    found = {model: json.loads(path.read_text()) for model in MODELS if (path := FOLDER / f"{model}.json").exists()}
    (FOLDER.parent / "perturbation_table.md").write_text(page(found))


if __name__ == "__main__":
    main()
