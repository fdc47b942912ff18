"""The page of the published comparison: what to use, tables with intervals, and each model."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from captum_staa.benchmark.records import control_of

from .intervals import Scores
from .stored import joined, numbers
from .subjects import BRANCH, CNNS, LANGUAGE, SUBJECTS, TRANSFORMERS
from .words import HEAD, LEFT_OUT, SUMMARY

Runs = dict[str, dict[str, Any]]
EVERY = "All models"
# By metric: the title of its column, and whether it is of the clips of two classes.
COLUMNS = {
    "rivals": "evidence against rivals",
    "rivals_time": "in time",
    "rivals_space": "in space",
    "classes": "class A against B",
    "object_pointing": "evidence first",
    "auroc": "against all voxels",
    "insertion": "insertion",
    "deletion": "deletion",
}
ARROWS = {1: "↑", -1: "↓"}
KINDS = ("", "-slow", "-classes")  # ends of the names of runs: of one class, of slow methods, of two classes
PICTURE = "images/comparison.webp"


class Group:
    """Models whose methods are compared with each other.

    Args:
        title: heading.
        runs: by name of a model, its results on clips of one class.
        pairs: the same on clips of two classes, for the metric ``"classes"``.
    """

    def __init__(self, title: str, runs: Runs, pairs: Runs) -> None:
        self.title, self.runs = title, runs
        self.pairs = {name: pairs[name] for name in runs if name in pairs}
        names = list(dict.fromkeys(name for run in runs.values() for name in run["methods"]))
        numbered = {name for name in names for run in runs.values() if not numbers(run, "rivals", [name]).isnan().all()}
        if title == EVERY:  # only what has numbers on nearly all of them can be compared
            numbered = {name for name in numbered if self._models(name) >= len(runs) - 1}
        self.methods = sorted(
            (name for name in names if name in numbered), key=lambda name: control_of(name) is not None
        )
        self.real = [at for at, name in enumerate(self.methods) if control_of(name) is None]
        self.scores = {metric: scores for metric in COLUMNS if (scores := self._scores(metric)) is not None}

    def _models(self, method: str) -> int:
        return sum(not numbers(run, "rivals", [method]).isnan().all() for run in self.runs.values())

    def clips_of(self, method: str) -> int:
        """Return on how many clips of a model a method has numbers, at least; 0 without any."""
        counts = [int((~numbers(run, "rivals", [method]).isnan()).sum()) for run in self.runs.values()]
        return min((count for count in counts if count), default=0)

    def _scores(self, metric: str) -> Scores | None:
        runs = [run for run in (self.pairs if metric == "classes" else self.runs).values() if metric in run["values"]]
        if not runs:
            return None
        return Scores.of([numbers(run, metric, self.methods) for run in runs], runs[0]["better"][metric])

    def cost(self, method: str) -> float:
        """Return the median over models of the median over clips of the cost, in forwards; nan of a control."""
        medians = [numbers(run, "forwards", [method]).nanmedian().item() for run in self.runs.values()]
        known = [value for value in medians if value == value]
        return statistics.median(known) if known else float("nan")

    def table(self) -> Iterator[str]:
        """Yield the lines of the table of means and intervals."""
        heads = [f"{COLUMNS[metric]} {ARROWS[scores.better]}" for metric, scores in self.scores.items()]
        yield f"| method | {' | '.join(heads)} | forwards |"
        yield "|---" * (len(heads) + 2) + "|"
        bold = {metric: scores.clearly_best(self.real) for metric, scores in self.scores.items()}
        order = sorted(self.real, key=lambda at: -self.scores["rivals"].means[at].nan_to_num().item())
        for at in [*order, *(at for at in range(len(self.methods)) if at not in self.real)]:
            cells = [_cell(scores, at, bold[metric] == at) for metric, scores in self.scores.items()]
            cost = self.cost(self.methods[at])
            cells.append(f"{cost:.3g}" if cost == cost else "–")
            kind = "" if at in self.real else "control: "
            yield f"| {kind}{self.methods[at]} | {' | '.join(cells)} |"

    def ranking(self) -> Iterator[str]:
        """Yield the lines of a table: by metric the first method, how often it is first, and who is not behind it."""
        yield "| by | first | first in | not clearly behind it |"
        yield "|---|---|---|---|"
        for metric, scores in self.scores.items():
            first = max(self.real, key=lambda at: (scores.better * scores.means[at]).nan_to_num(nan=-1e9).item())
            share = scores.share_first(self.real)[self.real.index(first)].item()
            near = scores.not_behind(first, range(len(self.methods)))
            near.sort(key=lambda at: -scores.better * scores.means[at].item())
            names = ", ".join(("" if at in self.real else "control ") + self.methods[at] for at in near) or "none"
            yield f"| {COLUMNS[metric]} | {self.methods[first]} | {share:.0%} of draws | {names} |"


def write(runs: Runs, docs: Path) -> None:
    """Write docs/comparison.md with its picture, from the results by name of a model."""
    names = [name for name in runs if name in SUBJECTS]
    if not names:
        return
    plain = {name: joined(runs[name], runs[slow]) if (slow := f"{name}-slow") in runs else runs[name] for name in names}
    pairs = {name: runs[two] for name in names if (two := f"{name}-classes") in runs}
    groups = {
        title: Group(title, found, pairs)
        for title in (TRANSFORMERS, CNNS, BRANCH, LANGUAGE)
        if (found := {name: run for name, run in plain.items() if SUBJECTS[name].group == title})
    }
    every = Group(EVERY, plain, pairs)
    parts = [
        HEAD.format(
            models=len(plain),
            clips=min(len(run["clips"]) for run in plain.values()),
            pairs=min((len(run["clips"]) for run in pairs.values()), default=0),
        ),
        "## What to use",
        summary({**groups, EVERY: every}),
        f"![Evidence against rivals and cost of each method]({PICTURE})",
        "Bars are 95 % intervals. The gray line is the best control without a model.",
    ]
    for title, group in {**groups, EVERY: every}.items():
        parts += [f"## {title}", about(group), "\n".join(group.table()), "\n".join(group.ranking())]
    parts += ["## Each model", "\n".join(models(plain)), "\n".join(by_model(every, plain))]
    parts += ["## What is left out", LEFT_OUT.strip()]
    (docs / "comparison.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    save(picture([group for group in (groups.get(TRANSFORMERS), every) if group is not None]), docs / PICTURE)


def summary(groups: dict[str, Group]) -> str:
    """Return the words for practitioners, with the means of evidence against rivals and the costs."""
    short = {TRANSFORMERS: "t", CNNS: "c", BRANCH: "b", LANGUAGE: "l", EVERY: "a"}
    facts: dict[str, dict[str, float]] = {}
    for title, key in short.items():
        group = groups.get(title)
        names = group.methods if group else []
        means = group.scores["rivals"].means.tolist() if group else []
        facts[key] = defaultdict(lambda: float("nan"), zip(names, means, strict=True))
        facts[f"{key}f"] = defaultdict(lambda: float("nan"), {name: group.cost(name) for name in names if group})
    return SUMMARY.strip().format(**facts)


def about(group: Group) -> str:
    """Return the sentences above the table of a group."""
    count = len(group.runs)
    run = next(iter(group.runs.values()))
    clips = sum(len(each["clips"]) for each in group.runs.values())
    text = f"{count} model{'s' * (count > 1)}, {clips} clips"
    if group.pairs:
        two = sum(len(each["clips"]) for each in group.pairs.values())
        text += f"; *class A against B*: {len(group.pairs)} of them, {two} clips"
    text += "."
    if count == 1:
        text += " Of one model, the intervals are over clips alone: they say nothing about another model."
    elif count == 2:
        text += " Two models are few: intervals over them are coarse."
    if group.title != EVERY:
        text += f" The controls inverted, random weights and other class are those of {run['settings']['inverted']}."
    if partial := [
        f"{name} has numbers on {there} of them" for name in group.methods if (there := group._models(name)) < count
    ]:
        text += f" {'; '.join(partial)}."
    if fewer := {
        name: least for name in group.methods if 0 < (least := group.clips_of(name)) < group.clips_of("random")
    }:
        text += f" {', '.join(fewer)}: {min(fewer.values())} clips of each model."
    return text


def models(runs: Runs) -> Iterator[str]:
    """Yield the lines of the table of the models."""
    yield "| model | weights | clips whose class it answers |"
    yield "|---|---|---|"
    for name, run in runs.items():
        right = sum(explained == answered for explained, answered in run["answers"].values())
        yield f"| {name} | {SUBJECTS[name].origin} | {right} of {len(run['answers'])} |"


def by_model(every: Group, runs: Runs) -> Iterator[str]:
    """Yield the lines of a table: evidence against rivals by method and model."""
    names = list(dict.fromkeys(name for run in runs.values() for name in run["methods"]))
    yield "Evidence against rivals, the mean over the clips of each model:"
    yield ""
    yield f"| method | {' | '.join(runs)} |"
    yield "|---" * (len(runs) + 1) + "|"
    for name in sorted(names, key=lambda name: control_of(name) is not None):
        means = [numbers(run, "rivals", [name]).nanmean().item() for run in runs.values()]
        if any(value == value for value in means):
            cells = [f"{value:.3f}" if value == value else "" for value in means]
            kind = "" if control_of(name) is None else "control: "
            yield f"| {kind}{name} | {' | '.join(cells)} |"


def picture(groups: list[Group]) -> Figure:
    """Return a panel per group: evidence against rivals over cost, with intervals."""
    figure = Figure(figsize=(6.2 * len(groups), 4.6), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        scores = group.scores["rivals"]
        limits = scores.intervals
        places: list[tuple[float, float]] = []
        points = {at: (group.cost(group.methods[at]), scores.means[at].item()) for at in group.real}
        for at, (cost, mean) in sorted(points.items(), key=lambda point: point[1][1]):
            axes.plot([cost, cost], limits[at].tolist(), lw=1.2, color="#1f77b4", alpha=0.5)
            axes.plot(cost, mean, "o", ms=5, color="#1f77b4")
            beside = any(1 < other / cost < 2 and abs(height - mean) < 0.02 for other, height in points.values())
            if beside and not any(0.2 < other / cost < 1 for other, _ in points.values()):
                axes.annotate(group.methods[at], (cost, mean), (cost / 1.15, mean), fontsize=7, va="center", ha="right")
                continue
            height = mean
            while any(abs(height - other) < 0.028 for near, other in places if 0.2 < near / cost < 5):
                height += 0.004
            places.append((cost, height))
            line = {"arrowstyle": "-", "lw": 0.5, "color": "0.6"} if height - mean > 0.02 else None
            place = (cost * (1.3 if line else 1.15), height)
            axes.annotate(group.methods[at], (cost, mean), place, fontsize=7, va="center", arrowprops=line)
        free = [at for at, name in enumerate(group.methods) if name in ("random", "uniform", "center", "model-free")]
        best = max((scores.means[at].item() for at in free), default=0.5)
        axes.axhline(best, color="0.5", lw=1, ls="--")
        axes.set(xscale="log", xlabel="cost in forward passes", ylabel="evidence against rivals (.5 is chance)")
        axes.set_xlim(1, 1500)
        axes.set_title(f"{group.title} ({len(group.runs)})", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as webp, by way of the png that matplotlib writes."""
    figure.savefig(path.with_suffix(".png"), dpi=100)
    with Image.open(path.with_suffix(".png")) as image:
        image.convert("RGB").save(path, quality=80)
    path.with_suffix(".png").unlink()


def _cell(scores: Scores, at: int, bold: bool) -> str:
    mean = scores.means[at].item()
    if mean != mean:
        return "–"
    low, high = scores.intervals[at].tolist()
    text = f"{mean:.3f} ({low:.3f} to {high:.3f})"
    return f"**{text}**" if bold else text
