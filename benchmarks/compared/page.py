"""The page of the published comparison: tables, pictures, and where this library's own methods lose."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from captum_staa.benchmark import Comparison
from captum_staa.benchmark.records import CONTROLS
from captum_staa.benchmark.scoring import COSTS

from .stored import together

GROUPS = {
    "Transformers": ("videomae", "timesformer", "vivit", "vjepa2"),
    "3D CNN": ("resnet3d",),
    "ST-ABN": ("st-abn",),
}
OURS = {
    "STAA": ("STAA (relevance)", "STAA"),
    "STEP": ("STEP (nested)",),
    "ST-ABN": ("AttentionBranch (gate)", "AttentionBranch (grad_gate)", "AttentionBranch (class_map)"),
}
SLOW_ONES = ("Occlusion", "VideoOcclusion", "KernelShap", "IntegratedGradients")
CLAIMED = 0.03  # of the time of "traditional methods"; Wang and Liu
TRUTH = (
    "auroc",
    "auroc_time",
    "auroc_space",
    "iou",
    "pointing_game",
    "insertion",
    "deletion",
    "aopc",
    "saco",
    "forwards",
)
DRAWS = 1000

HEAD = """# The comparison

All methods by all metrics, on planted clips of {models} shipped models, {clips} clips each. What the names mean:
[Comparing methods](comparison_guide.md) for methods, controls and marks, [Metrics](metrics.md) for metrics,
[Planted evidence](results_truth.md#planted-clips) for the clips. Made by

```console
python benchmarks/comparison_table.py
```

Every model is right on its task, so where the evidence is planted is where a faithful map should be; but a model need
not use all of it, and on `order` it may answer from a part. Times are of one thread of a busy CPU;
`forwards` are multiples of a plain forward that ran right before; times are medians, all other values are means
over clips. In tables bold is the best method that is no control, ↑ means high is good, and ↓ low.
"""


def write(runs: dict[str, dict[str, Any]], docs: Path) -> None:
    """docs/comparison.md with its pictures, and docs/comparison/MODEL.md."""
    plain = {name: run for name, run in runs.items() if not name.endswith("-papers")}
    if not plain:
        return
    clips = min(len(run["clips"]) for run in plain.values())
    parts = [HEAD.format(models=len(plain), clips=clips)]
    groups = {
        title: found
        for title, families in GROUPS.items()
        if (found := {name: run for name, run in plain.items() if name.rpartition("-")[0] in families})
    }
    whole = {title: together(found) for title, found in groups.items()}
    parts += ["## Where this library's methods lose", *losses(whole)]
    parts += ["## Under three percent?", *claim(plain)]
    for title, results in whole.items():
        slug = title.lower().replace(" ", "-")
        parts += [f"## {title}", f"{len(groups[title])} models, {len(results.clips)} clips."]
        parts.append(table(title, results, TRUTH))
        for kind, figure in results.plot().items():
            picture = f"images/comparison-{slug}-{kind}.webp"
            save(figure, docs / picture)
            parts.append(f"![{title}: {kind}]({picture})")
    for picture in sorted((docs / "images").glob("comparison-*-*.webp")):
        model = picture.stem.removeprefix("comparison-")
        if model in plain:
            parts.append(f"![The methods on one clip of {model}](images/{picture.name})")
    parts += ["## The papers' perturbation", *papers(runs)]
    parts += ["## Model by model", "All metrics, with 95 % intervals:", ""]
    for name, run in plain.items():
        (docs / "comparison" / f"{name}.md").write_text(f"# {name}\n\n{together({name: run}).to_markdown()}")
        parts.append(f"- [{name}](comparison/{name}.md)")
    parts.append("```{toctree}\n:hidden:\n:glob:\n\ncomparison/*\n```")
    (docs / "comparison.md").write_text("\n\n".join(parts).replace("\n\n- ", "\n- ") + "\n")


def table(title: str, results: Comparison, metrics: tuple[str, ...]) -> str:
    """The main metrics, without intervals and with what holds of this table alone; the rest is in each model's own."""
    narrow = Comparison(
        rows=[row for row in results.rows if row.metric in metrics or row.reason],
        methods=results.methods,
        metrics=[name for name in metrics if name in results.metrics],
        better=results.better,
        settings=results.settings,
        answers=results.answers,
    )
    body, _, notes = narrow.to_markdown(intervals=False).partition("\n\n")
    return f"{body}\n\n{title}: {' '.join(notes.splitlines()[1:])}"


def losses(groups: dict[str, Comparison]) -> Iterator[str]:
    """By group and metric: the first, and how far behind it each of ours is; with its interval over clips."""
    yield (
        "By metric, the method that is first, and the best variant of each of ours: its mean, its place, and by how\n"
        "much it is behind. **Bold** where the 95 % interval of that distance (drawn over clips, for both at once)\n"
        "excludes zero: there it loses. Perturbation is called STEP here and the branch ST-ABN, as in their papers."
    )
    for title, results in groups.items():
        means = results.means()
        kin = {kind: names for kind, names in OURS.items() if set(names) & set(results.methods)}
        lines = [f"| {title} | first | " + " | ".join(kin) + " |", "|---" * (len(kin) + 2) + "|"]
        for metric in (name for name in results.metrics if results.better[name] and name not in COSTS):
            sign = results.better[metric]
            real = {name: own[metric] for name, own in means.items() if name not in CONTROLS}
            known = {name: mean.value for name, mean in real.items() if 2 * mean.clips > len(results.clips)}
            order = sorted(known, key=lambda name: -sign * known[name])
            cells = [f"{order[0]} {known[order[0]]:.3f}" if order else "no number on most clips"]
            for variants in kin.values():
                own = next((name for name in order if name in variants), None)
                cells.append("–" if own is None else _place(results, metric, own, order))
            lines.append(f"| {metric} | " + " | ".join(cells) + " |")
        yield "\n".join(lines)


def _place(results: Comparison, metric: str, own: str, order: list[str]) -> str:
    mean, place = results.means()[own][metric].value, order.index(own) + 1
    name = f" {own[own.index('(') :]}" if "(" in own else ""
    columns = results.values(metric)
    behind = results.better[metric] * (
        columns[:, results.methods.index(order[0])] - columns[:, results.methods.index(own)]
    )
    if behind.nanmean() < 5e-4:  # itself, or another that looks equal
        return f"{mean:.3f}{name}, first"
    low, high = _interval(behind)
    text = f"{mean:.3f}{name}, no. {place}, by {behind.nanmean():.3f} ({low:.3f} to {high:.3f})"
    return f"**{text}**" if low > 0 else text


def _interval(values: Tensor) -> tuple[float, float]:
    values = values[~values.isnan()]
    drawn = torch.randint(len(values), (DRAWS, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def claim(runs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """STAA's time over that of slower methods, on the same clips."""
    yield (
        f"The paper says that STAA takes under {CLAIMED:.0%} of the time of traditional methods. Its time over theirs\n"
        f"on the same clips, the median of each model; {CLAIMED:.0%} is {CLAIMED}, what is above is bold. Occlusion\n"
        "has some hundred windows here, KernelShap 400 samples, Integrated Gradients 50 steps; fewer would cost less,\n"
        "and say less."
    )
    heads = [f"{mode} / {slow}" for mode in OURS["STAA"] for slow in SLOW_ONES]
    lines = ["| model | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for model, run in runs.items():
        if not any(value is not None for value in _column(run, "STAA")):
            continue
        cells = []
        for mode in OURS["STAA"]:
            for slow in SLOW_ONES:
                ratio = statistics.median(
                    ours / theirs for ours, theirs in zip(_column(run, mode), _column(run, slow), strict=True)
                )
                cells.append(f"{ratio:.4f}" if ratio <= CLAIMED else f"**{ratio:.4f}**")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    yield "\n".join(lines)


def _column(run: dict[str, Any], method: str) -> list[float]:
    at = run["methods"].index(method)
    return [row[at] for row in run["values"]["seconds"]]


def papers(runs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The settings step and 3d-ep beside this library's own, on the few clips that they were given."""
    slow = {name.removesuffix("-papers"): run for name, run in runs.items() if name.endswith("-papers")}
    if not slow:
        yield "Not measured."
        return
    clips = min(len(run["clips"]) for run in slow.values())
    many = f"{clips} clip{'s' * (clips > 1)} of each of {len(slow)} models"
    yield f"Rebuilt from their formulas, {many}; `seconds` of one thread."
    yield table("The papers' settings", together(slow), (*TRUTH, "seconds"))


def save(figure: Figure, path: Path) -> None:
    """As webp, by way of the png that matplotlib writes."""
    figure.savefig(path.with_suffix(".png"), dpi=100)
    with Image.open(path.with_suffix(".png")) as picture:
        picture.save(path, quality=80)
    path.with_suffix(".png").unlink()
