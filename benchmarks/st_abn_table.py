"""What the gates of an ST-ABN know: planted truth, use and accuracy, beside Grad-CAM, STAA and controls.

    python benchmarks/st_abn_table.py                       # three tasks, three seeds each, some 90 minutes on one core
    python benchmarks/st_abn_table.py --task pattern --seeds 1
    python benchmarks/st_abn_table.py --write-only          # the page again, from the results at hand

For every task and seed it trains a small 3D CNN, then the same with a branch (the paper's loss), and an observer of the
shipped, frozen VideoMAE. Each (task, seed) is written as soon as it is done; a second start goes on with the
others.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from train_st_abn import LAYER, accuracy, train_joint, train_observer, train_trunk

from captum_staa import STAA, AttentionBranch, GradCAM, VideoClassifier, metrics
from captum_staa.benchmark import PlantedClips
from captum_staa.benchmark.scenes import LABELS
from captum_staa.layout import SpaceTime
from captum_staa.models import STABN

FOLDER = Path(__file__).parents[1] / "docs" / "st_abn"
SEED, CLIPS, BATCH = 90_000, 100, 10
COLUMNS = ("joint AUROC", "time AUROC, of the map", "time AUROC, of alpha", "space AUROC", "pointing")
SIGNED = (  # scored by magnitude as well: what speaks against a class is evidence, too
    "ST-ABN, grad_gate",
    "ST-ABN, class_map",
    "GradCAM (gradcam), the branch's layer",
    "GradCAM (hirescam), the branch's layer",
    "GradCAM (hirescam), the first stage",
)
Explain = Callable[[Tensor, Tensor], SpaceTime]


def rows(joint: STABN, observer: STABN) -> dict[str, tuple[str, Explain]]:
    """By name: the layout of the clips that a method takes, and the method."""
    branch = AttentionBranch(joint)

    def weighted(weighting: str) -> Explain:
        return lambda x, y: branch.attribute_parts(x, y, weighting=weighting)  # type: ignore[arg-type]

    def cam(layer: str, weighting: str) -> Explain:
        return GradCAM(joint, f"model.module.{layer}", weighting=weighting).attribute_parts  # type: ignore[arg-type]

    return {
        "ST-ABN, gate": ("BCTHW", weighted("gate")),
        "ST-ABN, grad_gate": ("BCTHW", weighted("grad_gate")),
        "ST-ABN, class_map": ("BCTHW", weighted("class_map")),
        "GradCAM (gradcam), the branch's layer": ("BCTHW", cam(joint.config.layer, "gradcam")),
        "GradCAM (hirescam), the branch's layer": ("BCTHW", cam(joint.config.layer, "hirescam")),
        "GradCAM (hirescam), the first stage": ("BCTHW", cam("stages.0", "hirescam")),
        "posthoc, of VideoMAE": ("BTCHW", AttentionBranch(observer).attribute_parts),
        "STAA relevance, VideoMAE": ("BTCHW", STAA(observer.model).attribute_parts),
    }


def scores(joint: Tensor, temporal: Tensor, truth: Tensor) -> list[Tensor]:
    """``(B,)`` for each column, of maps (B, T, H, W) and of the signal (B, T) that a method has apart."""
    alpha = temporal[:, :, None, None].expand_as(joint)
    return [
        metrics.auroc(joint, truth),
        metrics.auroc(joint, truth, axis="time"),
        metrics.auroc(alpha, truth, axis="time"),
        metrics.auroc(joint, truth, axis="space"),
        metrics.pointing_game(joint, truth, tolerance=(2, 8, 8)),
    ]


def measure(task: str, seed: int) -> dict[str, object]:
    trunk = train_trunk(task, seed)
    joint = train_joint(trunk, task, seed)
    own = {"without a branch": accuracy(trunk, task), "with the branch": accuracy(joint, task)}
    videomae = VideoClassifier.from_pretrained(f"tiny-videomae-{task}")
    observer = train_observer(videomae, LAYER, task, seed)
    return {"accuracy": own, **explained(task, seed, joint, observer)}


def explained(task: str, seed: int, joint: STABN, observer: STABN) -> dict[str, object]:
    planted = PlantedClips(SEED, CLIPS, task)
    found: dict[str, dict[str, list[float]]] = {}
    generator = torch.Generator().manual_seed(seed)
    methods = rows(joint, observer)
    for start in range(0, CLIPS, BATCH):
        clips, labels, truth = planted[start : start + BATCH]
        volumes = clips.transpose(1, 2).contiguous()
        maps: dict[str, tuple[Tensor, Tensor]] = {}
        for name, (axes, call) in methods.items():
            parts = call(volumes if axes == "BCTHW" else clips, labels)
            maps[name] = (parts.joint, parts.temporal)
            if name in SIGNED:
                maps[f"{name}, magnitude"] = (parts.joint.abs(), parts.temporal.abs())
        others = metrics.controls(clips, "BTCHW", maps["ST-ABN, grad_gate"][0], generator)
        maps |= {name: (own.float(), own.float().sum((2, 3))) for name, own in others.items()}
        for name, (joint_map, temporal) in maps.items():
            for column, values in zip(COLUMNS, scores(joint_map, temporal, truth), strict=True):
                found.setdefault(name, {}).setdefault(column, []).extend(values.tolist())
    clips, labels, _ = PlantedClips(SEED + 1, 48, task)[:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it would say stands in the table
        usage = metrics.attention_usage(joint, clips.transpose(1, 2).contiguous(), labels)
    means = {name: {column: _mean(values) for column, values in own.items()} for name, own in found.items()}
    moved = {name: float(getattr(usage, name).mean()) for name in usage.decisions}
    return {"maps": means, "usage": moved, "decisions": usage.decisions}


def _mean(values: list[float]) -> float:
    return fmean(value for value in values if value == value)


def page(results: dict[str, list[dict]]) -> str:
    lines = [
        "# ST-ABN: the table",
        "",
        f"Means over {CLIPS} planted clips and over training seeds, lowest and highest seed in brackets. Time AUROC",
        "is of the map's sum over a frame, and of the temporal signal that a method has apart (alpha). `posthoc` is of",
        "frozen models; `inverted` is of `grad_gate`. Made by `python benchmarks/st_abn_table.py`.",
    ]
    for task, runs in results.items():
        seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
        lines += ["", f"## {task}, {seeds}", "", "| map | " + " | ".join(COLUMNS) + " |", "|---" * 6 + "|"]
        for name in runs[0]["maps"]:
            cells = [_spread([run["maps"][name][column] for run in runs]) for column in COLUMNS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += ["", "| | " + " | ".join(f"seed {i + 1}" for i in range(len(runs))) + " |"]
        lines.append("|---" * (len(runs) + 1) + "|")
        for name in runs[0]["accuracy"]:
            lines.append(f"| accuracy {name} | " + " | ".join(f"{run['accuracy'][name]:.3f}" for run in runs) + " |")
        for name in runs[0]["usage"]:
            cells = [f"{run['usage'][name]:.3f} ({run['decisions'][name]:.2f})" for run in runs]
            lines.append(f"| {name.replace('_', ' ')}: change (decisions) | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    return f"{fmean(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(LABELS), action="append")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for seed in [] if arguments.write_only else range(1, arguments.seeds + 1):
        for task in arguments.task or LABELS:
            path = FOLDER / f"{task}-{seed}.json"
            if not path.exists():
                path.with_suffix(".part").write_text(json.dumps(measure(task, seed), indent=1))
                path.with_suffix(".part").replace(path)
    found = {
        task: runs
        for task in LABELS
        if (runs := [json.loads(path.read_text()) for path in sorted(FOLDER.glob(f"{task}-*.json"))])
    }
    (FOLDER.parent / "st_abn_table.md").write_text(page(found))


if __name__ == "__main__":
    main()
