"""Measure how often the bundled models are right on baselines of planted clips, for docs/results_methods.md.

    python benchmarks/baseline_table.py             # a quarter of an hour on one core
    python benchmarks/baseline_table.py --figure    # the picture only

Random baselines draw from a generator seeded with 0, so a second run gives the same numbers.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from captum.attr import IntegratedGradients
from evidence import Evidence, averaged, best_control, cell, means, smoothed, write_between
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from captum_staa import VideoClassifier, VideoLayout, baselines
from captum_staa.benchmark import PlantedClips, SceneOptions

FAMILIES, TASKS = ("videomae", "timesformer", "vivit", "vjepa2", "resnet3d"), ("pattern", "motion", "order")
SEED = 30_000
BATCH = 50
EXPLAINED = 4  # clips per model
PICTURED, FRAMES = 69, range(4, 12)  # a clip whose two patches cross no border, and when both are there
DOCS = Path(__file__).parents[1] / "docs"
NEED_TRUTH = ("the clip itself", "freeze, a frame with evidence")  # rows that are not baselines for explanations
Maker = Callable[[Tensor, VideoLayout, Tensor], Tensor]  # (clips, layout, truth (B, T, H, W)) -> like clips


def makers() -> dict[str, Maker]:
    """Return the rows of the tables. Random baselines continue to draw from batch to batch."""
    draws = torch.Generator().manual_seed(0)

    def freeze_evidence(clips: Tensor, layout: VideoLayout, truth: Tensor) -> Tensor:
        """Freeze each clip at a random frame with evidence, which must not reveal the class."""
        showing = [own.flatten(1).any(1).nonzero().flatten() for own in truth]
        frames = [int(own[torch.randint(len(own), (), generator=draws)]) for own in showing]
        return torch.cat([baselines.freeze(clips[i : i + 1], layout, frame=frame) for i, frame in enumerate(frames)])

    return {
        "the clip itself": lambda clips, layout, truth: clips,
        "zero": lambda clips, layout, truth: baselines.zero(clips, layout),
        "noise": lambda clips, layout, truth: baselines.noise(clips, layout, generator=draws),
        "blur": lambda clips, layout, truth: baselines.blur(clips, layout),
        "blur(space=0, time=4)": lambda clips, layout, truth: baselines.blur(clips, layout, space=0, time=4),
        "mean_frame": lambda clips, layout, truth: baselines.mean_frame(clips, layout),
        "freeze": lambda clips, layout, truth: baselines.freeze(clips, layout),
        "freeze, a frame with evidence": freeze_evidence,
        "shuffle": lambda clips, layout, truth: baselines.shuffle(clips, layout, generator=draws),
        "reverse": lambda clips, layout, truth: baselines.reverse(clips, layout),
    }


@torch.no_grad()
def answers(family: str, task: str, count: int) -> dict[str, tuple[float, float]]:
    """Return, per baseline, the accuracy and the mean probability of the predicted class."""
    clf = VideoClassifier.from_pretrained(f"tiny-{family}-{task}")
    planted = PlantedClips(SEED, count, task)
    rows = makers()
    right, sure = dict.fromkeys(rows, 0.0), dict.fromkeys(rows, 0.0)
    for start in tqdm(range(0, count, BATCH), desc=f"{family}-{task}"):
        clips, labels, truth = planted[start : start + BATCH]
        clips = clf.layout.from_working(clips)
        for name, make in rows.items():
            top = clf(make(clips, clf.layout, truth)).softmax(1).max(1)
            right[name] += float((top.indices == labels).sum())
            sure[name] += float(top.values.sum())
    return {name: (right[name] / count, sure[name] / count) for name in rows}


def found(family: str, task: str) -> dict[str, dict[str, float]]:
    """Return, per baseline, how Integrated Gradients, signed and smoothed, separate evidence from rivals."""
    clf = VideoClassifier.from_pretrained(f"tiny-{family}-{task}")
    evidence = Evidence(clf, task, EXPLAINED, SEED)
    rows, integrated = makers(), IntegratedGradients(clf)

    def maps(clips: Tensor, labels: Tensor) -> dict[str, Tensor]:
        own = {}
        for name, make in rows.items():
            if name not in NEED_TRUTH:
                attributions = integrated.attribute(
                    clips, baselines=make(clips, clf.layout, clips), target=labels, n_steps=16, internal_batch_size=64
                )
                own[name] = smoothed(clf.layout.reduce(attributions))
        return own

    return best_control(means(evidence.scores(maps, controls=True)) | means(evidence.without_a_model()))


def column_means(results: Iterable[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """Return the means over families, per baseline."""
    each = list(results)
    return {name: tuple(map(statistics.fmean, zip(*(own[name] for own in each), strict=True))) for name in makers()}


def answer_table(results: dict[str, dict[str, tuple[float, float]]], count: int) -> list[str]:
    """Markdown: a row per baseline, a column per task, each the mean over families."""
    chances = {task: 1 / len(PlantedClips(SEED, 1, task).labels) for task in results}
    lines = [
        f"Accuracy over {count} clips, mean of {len(FAMILIES)} models; in brackets the mean probability of the answer:",
        "",
        "| | "
        + " | ".join(f"{task}, chance {chance:.2f}".replace(" 0", " ") for task, chance in chances.items())
        + " |",
        "|---" * (len(results) + 1) + "|",
    ]
    for name in makers():
        cells = [f"{own[name][0]:.3f} ({own[name][1]:.2f})" for own in results.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def found_table(results: dict[str, list[dict[str, dict[str, float]]]]) -> list[str]:
    """Markdown: a row per baseline, a column per task, each the mean over families."""
    means_of = {task: averaged(models) for task, models in results.items()}
    ranges = {
        key: [own[key] for found in means_of.values() for own in found.values() if cell(own, key)]
        for key in ("random weights", "other class")
    }
    controls = "; ".join(f"{key}: {min(own):.2f} to {max(own):.2f}" for key, own in ranges.items())
    lines = [
        "### What Integrated Gradients from each baseline find",
        "",
        f"Maps keep their signs and are smoothed; {EXPLAINED} clips per model, means over five models. Columns as in",
        f"[planted evidence](results_truth.md#how-to-read-the-tables). {controls.capitalize()}.",
        "",
        "| evidence against rivals; class A against B | " + " | ".join(results) + " |",
        "|---" * (len(results) + 1) + "|",
    ]
    for name in means_of[next(iter(results))]:
        cells = [[cell(found[name], key) for key in ("rivals", "classes")] for found in means_of.values()]
        lines.append(f"| {name} | " + " | ".join("; ".join(filter(None, own)) for own in cells) + " |")
    return lines


def draw(path: Path) -> None:
    """Draw every baseline of one clip, one row each, with frame numbers if the order of frames changes."""
    clip, _, truth = PlantedClips(SEED, PICTURED + 1, "motion", scene=SceneOptions(noise=0.02, contrast=0.4))[PICTURED:]
    count, layout = clip.shape[1], VideoLayout("BTCHW")
    numbers = torch.arange(count, dtype=torch.float32).reshape(1, count, 1, 1, 1)
    names = [name for name in makers() if "evidence" not in name]
    figure = Figure(figsize=(6.6, 6.9), layout="constrained")
    grid = figure.subplots(len(names), len(FRAMES))
    for line, name in zip(grid, names, strict=True):
        pictures = (makers()[name](clip, layout, truth)[0].movedim(1, -1) / 2 + 0.5).clamp(0, 1)
        sources = makers()[name](numbers, layout, truth).flatten().tolist()
        for axes, frame in zip(line, FRAMES, strict=True):
            axes.imshow(pictures[frame])
            axes.set(xticks=[], yticks=[])
            if name in ("freeze", "shuffle", "reverse"):
                axes.text(0.04, 0.05, f"{sources[frame]:.0f}", transform=axes.transAxes, fontsize=6.5, color="white")
            if name == names[0]:
                axes.set_title(f"frame {frame}", fontsize=8)
        line[0].set_ylabel(name.replace("(", "\n("), rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=110)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--figure", action="store_true", help="draw the picture only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draw(DOCS / "images" / "baselines.png")
    if not arguments.figure:
        right = {task: column_means(answers(family, task, arguments.clips) for family in FAMILIES) for task in TASKS}
        lines = answer_table(right, arguments.clips)
        lines += found_table({task: [found(family, task) for family in FAMILIES] for task in TASKS})
        write_between(DOCS / "results_methods.md", "baseline_table", "\n".join(lines))


if __name__ == "__main__":
    main()
