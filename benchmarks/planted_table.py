"""How well each method finds planted evidence, for every family and task: the table in docs/planted.md.

    python benchmarks/planted_table.py --clips 200            # all models shipped; about an hour on one core
    python benchmarks/planted_table.py --only videomae-pattern --clips 20
    python benchmarks/planted_table.py --write-only           # the table again, from the results at hand

Each (family, task) is written to its own JSON file as soon as it is done; a second start goes on with the others,
and `--redo STAA` runs again only the methods whose names begin so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from captum.attr import IntegratedGradients, Occlusion, Saliency
from torch import Tensor
from tqdm import tqdm

from captum_staa import STAA, Focus, GradCAM, TokenGrid, VideoClassifier, space_time
from captum_staa.attention.relevance import smooth_input_gradient
from captum_staa.benchmark import PlantedClips
from captum_staa.benchmark.layers import End, end_layer
from captum_staa.metrics import auroc, pointing_game

FAMILIES, TASKS = ("videomae", "timesformer", "vivit", "vjepa2"), ("pattern", "motion", "order")
SEED = 20_000
BATCH = 8
METRICS = ("joint", "time", "space", "joint, tubelets", "pointing")
Method = Callable[[Tensor, Tensor, Tensor], Tensor]  # (clips, labels, truth) -> maps (B, T, H, W)


def methods(clf: VideoClassifier, grid: TokenGrid) -> dict[str, Method]:
    """Maps whose higher values mean more evidence. Signed maps of other methods are taken by magnitude."""
    layout, generator = clf.layout, torch.Generator().manual_seed(0)
    gradients, occlusion, saliency = IntegratedGradients(clf), Occlusion(clf), Saliency(clf)
    _, h, w = grid.tubelet

    def staa(**options: object) -> Method:
        method = STAA(clf, **options)  # type: ignore[arg-type]
        return lambda clips, labels, truth: space_time(method.attribute(clips, target=labels), layout).joint

    def integrated(clips: Tensor, labels: Tensor, truth: Tensor) -> Tensor:
        attributions = gradients.attribute(clips, target=labels, n_steps=50, internal_batch_size=4 * BATCH)
        return space_time(attributions.float(), layout).joint.abs()

    def occluded(clips: Tensor, labels: Tensor, truth: Tensor) -> Tensor:
        window, stride = (4, 3, 2 * h, 2 * w), (4, 3, h, w)  # large enough to hide the evidence, half overlapping
        attributions = occlusion.attribute(clips, window, stride, target=labels, perturbations_per_eval=4)
        return space_time(attributions, layout).joint.abs()  # a region may also speak against

    def grad_cam(end: End, weighting: str) -> Method:
        layer = end_layer(clf, end)
        assert layer is not None
        method = GradCAM(clf, layer, weighting=weighting)  # type: ignore[arg-type]
        return lambda clips, labels, truth: method.attribute_parts(clips, target=labels).joint.abs()

    def centre(clips: Tensor, labels: Tensor, truth: Tensor) -> Tensor:
        axes = [torch.linspace(-1, 1, size) ** 2 for size in truth.shape[1:]]
        distance = axes[0][:, None, None] + axes[1][:, None] + axes[2]
        return (-distance).expand(truth.shape)

    def perfect(clips: Tensor, labels: Tensor, truth: Tensor) -> Tensor:
        return grid.to_pixels(tubelets(truth.float(), grid))

    return {
        "STAA relevance (product)": staa(mode="relevance"),
        "STAA relevance (product), Focus": staa(mode="relevance", focus=Focus()),
        "STAA relevance (gradient)": staa(mode="relevance", rule="gradient"),
        "STAA relevance (chefer)": staa(mode="relevance", rule="chefer"),
        "STAA attention, rolled out": staa(mode="attention", layers="all"),
        "STAA attention, aggregated": staa(mode="attention", layers="mean"),
        "STAA attention, last layer": staa(mode="attention", layers=[-1]),
        "STAA released": staa(mode="released"),
        "Saliency": lambda x, y, m: space_time(saliency.attribute(x, target=y), layout).joint,
        "IntegratedGradients (50)": integrated,
        "Occlusion (4 frames x 2 x 2 patches)": occluded,
        "GradCAM (hirescam), first block": grad_cam("first", "hirescam"),
        "GradCAM (layercam), first block": grad_cam("first", "layercam"),
        "GradCAM (gradcam), last block": grad_cam("last", "gradcam"),
        "random": lambda x, y, m: torch.rand(m.shape, generator=generator),
        "uniform": lambda x, y, m: torch.ones(m.shape),
        "centre": centre,
        "ceiling: perfect tubelets": perfect,
    }


def derived(grid: TokenGrid) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """Maps made from another method's maps, which are not computed again."""
    return {
        "IntegratedGradients (50), smoothed as relevance": (
            "IntegratedGradients (50)",
            lambda maps: smooth_input_gradient(maps, grid),
        ),
        "STAA relevance (product), inverted": ("STAA relevance (product)", lambda maps: -maps),
    }


def tubelets(maps: Tensor, grid: TokenGrid) -> Tensor:
    """``(B, T, H, W)`` to the mean of every tubelet, ``(B, t, h, w)``."""
    return torch.nn.functional.avg_pool3d(maps[:, None].float(), grid.tubelet)[:, 0]


def scores(maps: Tensor, truth: Tensor, grid: TokenGrid) -> dict[str, Tensor]:
    """``(B,)`` per metric; a tubelet belongs to the truth if at least half of it does."""
    coarse = tubelets(truth, grid) >= 0.5
    return {
        "joint": auroc(maps, truth),
        "time": auroc(maps, truth, axis="time"),
        "space": auroc(maps, truth, axis="space"),
        "joint, tubelets": auroc(tubelets(maps, grid), coarse),
        "pointing": pointing_game(maps, truth, tolerance=grid.tubelet),
    }


def run(family: str, task: str, count: int, redo: str) -> dict[str, dict[str, float]]:
    clf = VideoClassifier.from_pretrained(f"tiny-{family}-{task}")
    grid = clf.grid
    assert grid is not None
    planted = PlantedClips(seed=SEED, n=count, task=task)
    calls = {name: call for name, call in methods(clf, grid).items() if name.startswith(redo)}
    makers = {name: own for name, own in derived(grid).items() if name.startswith(redo)}
    found: dict[str, dict[str, list[float]]] = {
        name: {key: [] for key in (*METRICS, "forwards")} for name in (*calls, *makers)
    }
    for start in tqdm(range(0, count, BATCH), desc=f"{family}-{task}"):
        clips, labels, truth = planted[start : min(start + BATCH, count)]
        maps: dict[str, Tensor] = {}
        for name, call in calls.items():
            begin = time.perf_counter()
            with torch.no_grad():
                clf(clips)
            middle = time.perf_counter()
            maps[name] = call(clips, labels, truth)
            found[name]["forwards"].append((time.perf_counter() - middle) / (middle - begin))
        for name, (source, make) in makers.items():
            maps[name] = make(maps[source])
            found[name]["forwards"].append(found[source]["forwards"][-1])
        for name, own in maps.items():
            for key, values in scores(own, truth, grid).items():
                found[name][key] += [value for value in values.tolist() if value == value]
    return {
        name: {key: statistics.median(v) if key == "forwards" else statistics.fmean(v) for key, v in own.items()}
        for name, own in found.items()
    }


def table(results: dict[str, dict[str, dict[str, float]]], count: int) -> str:
    """Markdown: the overview of all models, then one table per model."""
    lines = [
        "# Planted evidence: what each method finds",
        "",
        f"{count} held-out clips per family and task, the models of `captum_staa.models.zoo`, AUROC per pixel of every",
        "frame (joint), per frame (time) and per place (space), joint AUROC per tubelet, the share of clips whose",
        "maximum lies within one tubelet of the evidence, and the time as a multiple of one forward (median, batches",
        f"of {BATCH}, one thread). Explanations are of the true class. Maps of Integrated Gradients, Occlusion and",
        "Grad-CAM are taken by magnitude; [`compare`](comparison_guide.md) scores Occlusion and Grad-CAM of the last",
        "layer by their signed maps, so its numbers for them are others. Made by `python benchmarks/planted_table.py`.",
        "",
        "## Joint / time AUROC per pixel, all models",
        "",
        "| method | " + " | ".join(results) + " | mean | worst |",
        "|---" * (len(results) + 3) + "|",
    ]
    found = list(next(iter(results.values())))
    names = sorted(found, key=lambda name: [name.startswith(other) for other in found].index(True))  # kin together
    for name in names:
        pairs = [(own[name]["joint"], own[name]["time"]) for own in results.values()]
        cells = [f"{joint:.3f} / {when:.3f}" for joint, when in pairs]
        mean = f"{statistics.fmean(j for j, _ in pairs):.3f} / {statistics.fmean(w for _, w in pairs):.3f}"
        worst = f"{min(joint for joint, _ in pairs):.3f} / {min(when for _, when in pairs):.3f}"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {mean} | {worst} |")
    for model, own in results.items():
        lines += ["", f"## {model}", "", "| method | " + " | ".join((*METRICS, "forwards")) + " |"]
        lines.append("|---" * (len(METRICS) + 2) + "|")
        for name in names:
            values = own[name]
            cells = [f"{values[key]:.3f}" for key in METRICS] + [f"{values['forwards']:.1f}"]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--only", action="append", help="family-task, may be given again")
    parser.add_argument("--redo", metavar="PREFIX")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    parser.add_argument("--write-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.out / "planted"
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{family}-{task}" for family in FAMILIES for task in TASKS]
    for name in [] if arguments.write_only else arguments.only or names:
        path = folder / f"{name}.json"
        if arguments.redo is not None or not path.exists():
            family, task = name.split("-")
            results = json.loads(path.read_text()) if path.exists() else {"clips": arguments.clips, "methods": {}}
            results["methods"].update(run(family, task, results["clips"], arguments.redo or ""))
            path.with_suffix(".part").write_text(json.dumps(results, indent=1))
            path.with_suffix(".part").replace(path)
    paths = {name: folder / f"{name}.json" for name in names}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    if found:
        clips = min(own["clips"] for own in found.values())
        text = table({name: own["methods"] for name, own in found.items()}, clips)
        (arguments.out / "planted.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
