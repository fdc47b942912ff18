"""Measure the effect of smoothing on planted evidence: tables of docs/results_methods.md, picture of docs/baselines.md.

python benchmarks/smoothing_table.py                                       # ten models; some ten minutes of one core
python benchmarks/smoothing_table.py --only resnet3d-motion --clips 8      # printed, not written
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from evidence import Evidence, averaged, best_control, cell, means, write_between
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from captum_staa import STAA, GradCAM, VideoClassifier, VideoOcclusion, smooth
from captum_staa.benchmark import PlantedClips
from captum_staa.benchmark.registry import end_layer
from captum_staa.metrics import evidence_against_rivals, model_free_controls, smoothness

TRANSFORMERS, TASKS = ("videomae", "timesformer", "vivit", "vjepa2"), ("pattern", "motion")
MODELS = [f"{family}-{task}" for family in (*TRANSFORMERS, "resnet3d") for task in TASKS]
SIGMAS = ((0.0, 0.0), (2.0, 0.0), (4.0, 1.0), (6.0, 1.5), (8.0, 2.0), (12.0, 3.0), (16.0, 4.0))  # pixels, frames
SEED = 40_000
OCCLUSION = (4, 16, 16)  # frames, height and width of windows side by side; large enough to hide the evidence
SHOWN = {"rivals": "Evidence against rivals", "classes": "Class A against class B"}
DOCS = Path(__file__).parents[1] / "docs"


def raw_maps(clf: VideoClassifier, clips: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return maps ``(B, T, H, W)`` by name, and controls that do not use the model."""
    integrated = IntegratedGradients(clf)
    layer = end_layer(clf, "first")
    assert layer is not None
    attributions = {
        "Saliency": Saliency(clf).attribute(clips, target=labels),
        "InputXGradient": InputXGradient(clf).attribute(clips, target=labels).detach(),
        "IntegratedGradients (20)": integrated.attribute(clips, target=labels, n_steps=20, internal_batch_size=32),
        "GradCAM (hirescam, first layer)": GradCAM(clf, layer).attribute(clips, target=labels),
        "VideoOcclusion": VideoOcclusion(clf).attribute(clips, OCCLUSION, OCCLUSION, target=labels),
    }
    if clf.grid is not None:
        attributions["STAA"] = STAA(clf).attribute(clips, target=labels)
        attributions["STAA (attention)"] = STAA(clf, mode="attention").attribute(clips)
    found = {name: clf.layout.reduce(own.float()) for name, own in attributions.items()}
    for name in ("InputXGradient", "IntegratedGradients (20)"):
        found[f"{name}, magnitude"] = clf.layout.reduce(attributions[name].float().abs())
    shape = found["Saliency"].shape
    found["random"] = torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)))
    controls = model_free_controls(clf.layout.to_working(clips), "BTCHW")
    return found | {f"control: {name}": own for name, own in controls.items()}


def smoothed(maps: Tensor, sigma: tuple[float, float]) -> Tensor:
    """Return smoothed maps ``(B, T, H, W)``, which are treated as clips with one channel."""
    return smooth(maps[:, :, None], "BTCHW", *sigma)[:, :, 0]


def run(model: str, count: int) -> dict[str, dict[str, float]]:
    clf = VideoClassifier.from_pretrained(f"tiny-{model}")

    def maps(clips: Tensor, labels: Tensor) -> dict[str, Tensor]:
        raw = raw_maps(clf, clips, labels).items()
        return {f"{name}|{sigma}": smoothed(own, sigma) for name, own in raw for sigma in SIGMAS}

    return means(Evidence(clf, model.split("-")[1], count, SEED + MODELS.index(model)).scores(maps, controls=True))


def tables(found: dict[str, dict[str, float]]) -> list[str]:
    """Return Markdown: one table per score, with a row per method and a column per sigma."""
    by_sigma = [
        best_control({name.split("|")[0]: own for name, own in found.items() if name.endswith(f"|{sigma}")})
        for sigma in SIGMAS
    ]
    heads = ["raw" if not any(sigma) else f"({sigma[0]:g}, {sigma[1]:g})" for sigma in SIGMAS]
    lines = []
    for key, title in SHOWN.items():
        lines += ["", f"{title}:", "", "| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        for name in by_sigma[0]:
            if not name.startswith("best") or key == "rivals":
                lines.append(f"| {name} | " + " | ".join(cell(own[name], key) for own in by_sigma) + " |")
    drawn = [own["random weights"] for by in by_sigma for name, own in by.items() if "random weights" in own]
    lines += ["", f"With random weights, evidence against rivals is {min(drawn):.2f} to {max(drawn):.2f} in all cells."]
    return lines


def text(results: dict[str, dict[str, dict[str, float]]], count: int) -> str:
    t, h, w = OCCLUSION
    lines = [
        f"{count} clips per model that none was trained on, 16 frames of 48 x 48 pixels, explained for the true class.",
        "Columns are `(space, time)` in pixels and frames. Maps keep their signs, except for those marked *magnitude*.",
        f"Occlusion covers {t} frames and {h} x {w} pixels at a time. Tubelets are 8 x 8 pixels and 1 or 2 frames.",
        "*Best map without a model* is the best of several in each cell, chosen with the truth, so it lies above .5.",
    ]
    networks = [model for model in results if model.startswith("resnet3d")]
    for heading, models in (
        ("Transformers", [model for model in results if model not in networks]),
        ("3D CNNs", networks),
    ):
        if models:
            lines += ["", f"### {heading}: means over {len(models)} models"]
            lines += tables(averaged(results[model] for model in models))
    return "\n".join(lines)


def picture(path: Path) -> None:
    """Draw the map of one clip, raw and smoothed, and a random map, in every second frame. Each row has one scale."""
    clf, index, shown = VideoClassifier.from_pretrained("tiny-vjepa2-motion"), 8, range(0, 16, 2)
    planted = PlantedClips(seed=SEED, n=index + 1, task="motion")
    clip, label, truth = planted[index : index + 1]
    rivals = planted.rivals(slice(index, index + 1))
    gradient = raw_maps(clf, clip, label)["InputXGradient"]
    random = torch.rand(truth.shape, generator=torch.Generator().manual_seed(0))
    rows = [
        ("InputXGradient\nraw", gradient),
        ("smoothed by\n6 px, 1.5 frames", smoothed(gradient, (6, 1.5))),
        ("smoothed by\n16 px, 4 frames", smoothed(gradient, (16, 4))),
        ("random, by\n6 px, 1.5 frames", smoothed(random, (6, 1.5))),
    ]
    figure = Figure(figsize=(11, 6.1), layout="constrained")
    grid = figure.subplots(len(rows) + 1, len(shown))
    for axis, frame in zip(grid[0], shown, strict=True):
        axis.imshow(planted.frames(index)[frame], interpolation="nearest")
        axis.set_title(f"frame {frame}", fontsize=9)
    side_texts(grid[0], "clip, truth\noutlined", "")
    for axes, (name, maps) in zip(grid[1:], rows, strict=True):
        for axis, frame in zip(axes, shown, strict=True):
            axis.imshow(maps[0, frame], vmin=maps.min(), vmax=maps.max(), cmap="viridis", interpolation="nearest")
        right, when = (
            evidence_against_rivals(maps, truth, rivals, axis=axis).item()  # type: ignore[arg-type]
            for axis in ("joint", "time")
        )
        space, time = smoothness(maps)
        numbers = f"against rivals {right:.2f},\nin time {when:.2f}\n"
        numbers += f"smooth in space {space.item():.2f},\nin time {time.item():.2f}"
        side_texts(axes, name, numbers)
    for axes in grid:
        for axis, frame in zip(axes, shown, strict=True):
            axis.set(xticks=[], yticks=[])
            if truth[0, frame].any():
                axis.contour(truth[0, frame].float(), levels=[0.5], colors="red", linewidths=1)
    scale = figure.colorbar(
        ScalarMappable(cmap="viridis"), ax=grid, location="bottom", shrink=0.3, aspect=40, ticks=[0, 1]
    )
    scale.ax.set_xticklabels(["lowest of the row", "highest of the row"], fontsize=9)
    figure.savefig(path, dpi=75, pil_kwargs={"optimize": True})


def side_texts(axes: list[Axes], left: str, right: str) -> None:
    axes[0].set_ylabel(left, fontsize=9)
    axes[-1].yaxis.set_label_position("right")
    axes[-1].set_ylabel(right, fontsize=8, rotation=0, ha="left", va="center")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--only", action="append", choices=MODELS, help="may be given again; printed, not written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {model: run(model, arguments.clips) for model in tqdm(arguments.only or MODELS)}
    if arguments.only is not None:
        print(text(found, arguments.clips))
        return
    picture(DOCS / "images" / "smoothing.png")
    write_between(DOCS / "results_methods.md", "smoothing_table", text(found, arguments.clips))


if __name__ == "__main__":
    main()
