"""What smoothing costs and gains in planted truth: the tables and the picture of docs/smoothing.md.

python benchmarks/smoothing_table.py                                       # ten models; some six minutes of one core
python benchmarks/smoothing_table.py --only resnet3d-motion --clips 8      # printed, not written
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from captum_staa import STAA, VideoClassifier, VideoOcclusion, smooth
from captum_staa.benchmark import PlantedClips
from captum_staa.metrics import auroc, smoothness

TRANSFORMERS, TASKS = ("videomae", "timesformer", "vivit", "vjepa2"), ("pattern", "motion")
MODELS = [f"{family}-{task}" for family in (*TRANSFORMERS, "resnet3d") for task in TASKS]
SIGMAS = ((0, 0), (2, 0), (4, 0), (4, 1), (4, 4), (8, 2), (16, 4))  # pixels, frames
METRICS = ("joint", "time", "space", "smooth in space", "smooth in time")
SEED, BATCH = 40_000, 16
OCCLUSION = (4, 16, 16)  # frames, height and width of windows side by side; large enough to hide the evidence
DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- made by benchmarks/smoothing_table.py: begin -->\n", "<!-- end -->\n"
PICTURE = """One clip, raw and smoothed; the last row is a random map, whose score on a single clip may lie far from .5:

![One clip's map raw, smoothed a little, smoothed too much, and a random map that is smooth too](images/smoothing.png)
"""

Maps = dict[str, tuple[Tensor, bool]]  # by name: (B, T, H, W) to smooth, and whether signs are dropped only then
Values = dict[tuple[str, tuple[int, int], str], list[float]]  # by name, sigma and metric: one per clip


def explained(clf: VideoClassifier, clips: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Signed attributions of the clips' shape."""
    leaf, integrated = clips.clone().requires_grad_(), IntegratedGradients(clf)
    return {
        "Saliency": Saliency(clf).attribute(leaf, target=labels, abs=False),
        "InputXGradient": InputXGradient(clf).attribute(leaf, target=labels).detach(),
        "IntegratedGradients (20)": integrated.attribute(clips, target=labels, n_steps=20, internal_batch_size=64),
        "Occlusion": VideoOcclusion(clf).attribute(clips, OCCLUSION, OCCLUSION, target=labels),
    }


def readings(clf: VideoClassifier, clips: Tensor, labels: Tensor, truth: Tensor, generator: torch.Generator) -> Maps:
    """Every map to smooth. Magnitude is taken before channels are summed, or after channels and neighbours are."""
    found: Maps = {}
    for name, attributions in explained(clf, clips, labels).items():
        found[name] = clf.layout.reduce(attributions.float().abs()), False
        found[f"{name}, signs first"] = clf.layout.reduce(attributions.float()), True
    if clf.grid is not None:
        relevance = STAA(clf).attribute_parts(clips, target=labels).joint
        found["STAA relevance"] = relevance, False
        found["STAA relevance, inverted"] = -relevance, False
        found["STAA attention"] = STAA(clf, mode="attention").attribute_parts(clips).joint, False
    axes = [torch.linspace(-1, 1, size) ** 2 for size in truth.shape[1:]]
    centre = -(axes[0][:, None, None] + axes[1][:, None] + axes[2])
    found["random"] = torch.rand(truth.shape, generator=generator), False
    found["uniform"] = torch.ones(truth.shape), False
    found["centre"] = centre.expand(truth.shape), False
    return found


def smoothed(maps: Tensor, signs_first: bool, sigma: tuple[int, int]) -> Tensor:
    """``(B, T, H, W)``; maps are clips of one channel."""
    found = smooth(maps[:, :, None], "BTCHW", *sigma)[:, :, 0]
    return found.abs() if signs_first else found


def run(model: str, count: int) -> Values:
    seed = SEED + MODELS.index(model)  # clips of its own: means over models are means of independent draws
    clf = VideoClassifier.from_pretrained(f"tiny-{model}")
    planted = PlantedClips(seed, count, task=model.split("-")[1])
    generator = torch.Generator().manual_seed(seed)
    values: Values = {}
    for start in tqdm(range(0, count, BATCH), desc=model):
        clips, labels, truth = planted[start : min(start + BATCH, count)]
        clips = clf.layout.from_working(clips)
        for name, (maps, signs_first) in readings(clf, clips, labels, truth, generator).items():
            for sigma in SIGMAS:
                own = smoothed(maps, signs_first, sigma)
                aurocs = [auroc(own, truth, axis=axis) for axis in ("joint", "time", "space")]
                for metric, scores in zip(METRICS, (*aurocs, *smoothness(own)), strict=True):
                    values.setdefault((name, sigma, metric), []).extend(scores.tolist())
    return values


def mean(values: Iterable[float]) -> str:
    """Three digits, without a minus before 0.000; a dash where there is nothing to say."""
    value = round(statistics.fmean(values), 3) + 0.0
    return "–" if math.isnan(value) else f"{value:.3f}"


def table(first: str, rows: dict[str, Callable[[tuple[int, int]], str]]) -> list[str]:
    """Markdown, one column per sigma."""
    heads = ["raw" if not any(sigma) else f"({sigma[0]}, {sigma[1]})" for sigma in SIGMAS]
    lines = [[first, *heads], ["---"] * (len(heads) + 1)]
    lines += [[name, *(cell(sigma) for sigma in SIGMAS)] for name, cell in rows.items()]
    return ["| " + " | ".join(line) + " |" for line in lines]


def pooled(results: dict[str, Values], metrics: tuple[str, ...]) -> list[str]:
    """Means over all clips of the models, a row per method."""
    names = list(dict.fromkeys(name for values in results.values() for name, _, _ in values))

    def row(name: str) -> Callable[[tuple[int, int]], str]:
        return lambda sigma: " / ".join(
            mean(value for values in results.values() for value in values[name, sigma, metric]) for metric in metrics
        )

    return table("method", {name: row(name) for name in names})


def each(results: dict[str, Values], name: str) -> list[str]:
    """One method, a row per model: joint and time AUROC."""

    def row(values: Values) -> Callable[[tuple[int, int]], str]:
        return lambda sigma: " / ".join(mean(values[name, sigma, metric]) for metric in ("joint", "time"))

    return table("model", {model: row(values) for model, values in results.items()})


def largest_error(results: dict[str, Values]) -> float:
    """Of the means over all clips: the largest standard error of an AUROC."""
    errors = []
    for key in next(iter(results.values())):
        if key[2] in ("joint", "time", "space"):
            own = [value for values in results.values() for value in values[key]]
            errors.append(statistics.stdev(own) / math.sqrt(len(own)))
    return max(errors)


def text(results: dict[str, Values], count: int) -> str:
    """Markdown: all tables, with what their readers must know."""
    t, h, w = OCCLUSION
    lines = [
        f"{count} clips per model that none was trained on, 16 frames of 48 x 48 pixels, explained for the true class.",
        "Columns are `(space, time)` in pixels and frames. Methods are smoothed by magnitude, `attributions.abs()`;",
        'those marked "signs first" sum channels and neighbours with their signs, and take the magnitude of the sums.',
        "STAA relevance keeps its signs: what speaks against the class ranks lowest.",
        f"Occlusion covers {t} frames and {h} x {w} pixels at a time. Tubelets are 8 x 8 pixels and 1 or 2 frames.",
    ]
    networks = [model for model in results if model.startswith("resnet3d")]
    transformers = [model for model in results if model not in networks]
    for heading, models in (("Transformers", transformers), ("3D residual networks", networks)):
        own = {model: results[model] for model in models}
        if not own:
            continue
        means = f"Means over {count} clips of each of {len(own)} models"
        lines += [
            "",
            f"### {heading}",
            "",
            f"{means}; the largest standard error of an AUROC is {largest_error(own):.3f}.",
        ]
        for title, metrics in (
            ("AUROC of every pixel of every frame", ("joint",)),
            ("AUROC of frames / of places", ("time", "space")),
            ("Smoothness in space / in time", ("smooth in space", "smooth in time")),
        ):
            lines += ["", f"{title}:", "", *pooled(own, metrics)]
    lines += ["", "### Each model"]
    for name in ("InputXGradient", "IntegratedGradients (20)"):
        lines += ["", f"{name}, AUROC of every pixel of every frame / of frames:", "", *each(results, name)]
    return "\n".join(lines) + "\n"


def picture(path: Path) -> None:
    """One clip's map, raw and smoothed, and a random one, in every second frame; each row on one scale."""
    clf, index, shown = VideoClassifier.from_pretrained("tiny-vjepa2-motion"), 8, range(0, 16, 2)
    planted = PlantedClips(seed=SEED, n=index + 1, task="motion")
    clip, label, truth = planted[index : index + 1]
    gradient = clf.layout.reduce(explained(clf, clip, label)["InputXGradient"].abs())
    random = torch.rand(truth.shape, generator=torch.Generator().manual_seed(0))
    rows = [
        ("|InputXGradient|\nraw", gradient),
        ("smoothed by\n4 px, 1 frame", smoothed(gradient, False, (4, 1))),
        ("smoothed by\n16 px, 4 frames", smoothed(gradient, False, (16, 4))),
        ("random, by\n4 px, 1 frame", smoothed(random, False, (4, 1))),
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
        right, when = auroc(maps, truth).item(), auroc(maps, truth, axis="time").item()
        space, time = smoothness(maps)
        numbers = (
            f"AUROC {right:.2f},\nof frames {when:.2f}\nsmooth in space {space.item():.2f},\nin time {time.item():.2f}"
        )
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
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--only", action="append", choices=MODELS, help="may be given again; printed, not written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = text({model: run(model, arguments.clips) for model in arguments.only or MODELS}, arguments.clips)
    print(found)
    if arguments.only is None:
        page = DOCS / "smoothing.md"
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        part = page.with_suffix(".part")
        part.write_text(f"{before}{BEGIN}\n{PICTURE}\n{found}\n{END}{rest.split(END)[1]}", encoding="utf-8")
        part.replace(page)
        picture(DOCS / "images" / "smoothing.png")


if __name__ == "__main__":
    main()
