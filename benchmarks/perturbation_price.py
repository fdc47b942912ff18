"""Compare learned masks with other methods at the same price: 10 to 1000 forward passes per clip.

    python benchmarks/perturbation_price.py                     # two clips of three models, ten minutes of one core
    python benchmarks/perturbation_price.py --only vivit-motion
    python benchmarks/perturbation_price.py --draw-only         # the picture and the page, from the existing results

Each method is stored when it is finished, and a second start continues after it.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from captum.attr import InputXGradient, IntegratedGradients, KernelShap, Lime, NoiseTunnel
from evidence import Evidence, averaged, cell, smoothed, write_between
from matplotlib.figure import Figure
from perturbation_table import MIDDLE, Scores, measured, store
from torch import Tensor
from tqdm import tqdm

from captum_staa import RISE, SpatioTemporalPerturbation, VideoClassifier, VideoOcclusion, feature_masks, metrics
from captum_staa.perturbation import PRESETS, Nested, PerturbationConfig

MODELS = ("resnet3d-motion", "vivit-order", "vjepa2-order")
SEED = 23_000
BUDGETS = (10, 30, 100, 300, 1000)
TABLE = 300  # the price of the table
WINDOWS = {10: (2, 2, 2), 30: (3, 3, 3), 100: (4, 5, 5), 300: (5, 7, 8), 1000: (8, 11, 11)}  # of occlusion, per axis
REGIONS = (4, 4, 4)  # 4 frames by a quarter of each side, for Lime and KernelShap
DOCS = Path(__file__).parents[1] / "docs"
FOLDER = DOCS / "perturbation" / "price"
OURS = "STEP (nested)"
CONTROLS = ("random", "center", "inverted")
SHOWN = {
    "rivals": "evidence against rivals",
    "classes": "class A against B",
    "insertion": "insertion",
    "deletion": "deletion",
    "insertion, blur": "insertion, blur",
    "deletion, blur": "deletion, blur",
}
Explain = Callable[[Tensor, Tensor], Tensor]


def nested(budget: int) -> PerturbationConfig:
    """The default with fewer gradients, windows, steps and checks, or with more gradients and steps."""
    own = PRESETS["nested"]
    if budget < 100:
        few = Nested(gradients=(budget - 4) // 3, windows=0)
        return replace(own, parametrization=few, blends=("fade",), areas=(0.1,), iterations=0)
    if budget == 100:
        return replace(own, parametrization=Nested(gradients=16, windows=0), areas=(0.1,), iterations=6)
    gradients, steps = (20, 20) if budget == 300 else (40, 105)
    return replace(own, parametrization=Nested(gradients=gradients), iterations=steps)


def methods(clf: VideoClassifier, budget: int) -> dict[str, Explain]:
    layout = clf.layout

    def learned(config: PerturbationConfig) -> Explain:
        method = SpatioTemporalPerturbation(clf, preset=config)
        return lambda x, y: method.attribute_maps(x, target=y, perturbations_per_eval=2).joint

    def per_clip(attribute: Callable[[Tensor, Tensor], Tensor]) -> Explain:
        return lambda x, y: torch.cat([layout.reduce(attribute(x[i : i + 1], y[i : i + 1])) for i in range(len(x))])

    def surrogate(kind: Any) -> Explain:
        def attribute(clip: Tensor, target: Tensor) -> Tensor:
            sides = [-(-side // count) for side, count in zip(layout.extent(clip), REGIONS, strict=True)]
            mask = feature_masks.grid(clip, layout, sides)
            options = {"feature_mask": mask, "n_samples": budget, "perturbations_per_eval": 4}
            return kind(clf).attribute(clip, target=target, **options)

        return per_clip(attribute)

    def integrated(x: Tensor, y: Tensor) -> Tensor:
        found = IntegratedGradients(clf).attribute(x, target=y, n_steps=max(1, budget // 3), **MIDDLE)
        return smoothed(layout.reduce(found))

    def smooth_grad(x: Tensor, y: Tensor) -> Tensor:
        found = NoiseTunnel(InputXGradient(clf)).attribute(
            x, target=y, nt_samples=budget // 3, nt_samples_batch_size=min(budget // 3, 4), stdevs=0.3
        )
        return smoothed(layout.reduce(found))

    def occlusion(x: Tensor, y: Tensor) -> Tensor:
        sides = tuple(-(-side // count) for side, count in zip(layout.extent(x), WINDOWS[budget], strict=True))
        return layout.reduce(VideoOcclusion(clf).attribute(x, sides, sides, target=y, perturbations_per_eval=4))

    found: dict[str, Explain] = {
        OURS: learned(nested(budget)),
        "RISE": lambda x, y: layout.reduce(
            RISE(clf).attribute(x, target=y, n_samples=budget, perturbations_per_eval=4)
        ),
        "Lime": surrogate(Lime),
        "KernelShap": surrogate(KernelShap),
        "IntegratedGradients, smoothed": integrated,
        "SmoothGrad x input, smoothed": smooth_grad,
        "VideoOcclusion": occlusion,
    }
    if budget >= 100:  # a step costs 12
        found["STEP"] = learned(PRESETS["step"].changed(iterations=(budget - 20) // 13))
    return found


def measure(model: str, budget: int, count: int, path: Path) -> None:
    found: Scores = json.loads(path.read_text()) if path.exists() else {}
    clf = VideoClassifier.from_pretrained(f"tiny-{model}")
    evidence = Evidence(clf, model.split("-")[1], count, SEED)
    runs = {f"{name}: {budget}": explain for name, explain in methods(clf, budget).items()}
    if budget == BUDGETS[0]:  # the inverse is that of the cheapest map
        runs |= {name: partial(control, clf, name, runs[f"{OURS}: {budget}"]) for name in CONTROLS}
    for name, explain in runs.items():
        if name not in found:
            found |= measured(clf, evidence, partial(named, name, explain), with_controls=False)
            store(path, found)


def control(clf: VideoClassifier, name: str, explain: Explain, x: Tensor, y: Tensor) -> Tensor:
    return metrics.controls(x, clf.layout, explain(x, y))[name]


def named(name: str, explain: Explain, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {name: explain(x, y)}


def draw(found: Scores) -> None:
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    names = list(dict.fromkeys((OURS, *(key.rpartition(": ")[0] for key in found if ": " in key))))
    for axes, (key, title) in zip(figure.subplots(2, 3).flat, SHOWN.items(), strict=True):
        for name in names:
            points = [found[own] for budget in BUDGETS if (own := f"{name}: {budget}") in found]
            axes.plot(
                [point["forwards"] for point in points],
                [point[key] for point in points],
                marker="o",
                markersize=4,
                linewidth=2.5 if name == OURS else 1,
                zorder=3 if name == OURS else 2,
                label=name,
            )
        for control, style in (("random", "--"), ("center", ":")):
            axes.axhline(found[control][key], color="gray", linestyle=style, linewidth=1, label=f"{control} map")
        axes.set_xscale("log")
        axes.set_title(f"{title} ({'low' if 'deletion' in key else 'high'} is good)", fontsize=10)
        axes.set_xlabel("forward passes per clip")
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(DOCS / "images" / "perturbation_price.webp", dpi=90, pil_kwargs={"quality": 85})


def first(found: Scores) -> str:
    """Say for each column which method is first at each price, and how far ours is behind it."""
    lines = ["| forwards, first place | " + " | ".join(SHOWN.values()) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    for budget in BUDGETS:
        if f"{OURS}: {budget}" not in found:
            continue
        row = []
        for key in SHOWN:
            sign = -1 if "deletion" in key else 1
            own = {name.rpartition(": ")[0]: sign * v[key] for name, v in found.items() if name.endswith(f": {budget}")}
            best = max(own, key=own.__getitem__)
            behind = own[best] - own[OURS]
            equal = best == OURS or behind < 0.0005  # as the table shows it
            row.append("**ours**" if equal else f"{best.removesuffix(', smoothed')} ({behind:.3f})")
        lines.append(f"| {budget} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def table(found: Scores, budget: int) -> str:
    """Return the scores of the controls, and those of all methods at one price."""
    lines = ["| method | forwards | " + " | ".join(SHOWN.values()) + " |", "|---" * (len(SHOWN) + 2) + "|"]
    for name in CONTROLS:
        lines.append(f"| control: {name} | | " + " | ".join(cell(found[name], column) for column in SHOWN) + " |")
    for key, values in found.items():
        if key.endswith(f": {budget}"):
            name, price = key.rpartition(": ")[0], round(values["forwards"])
            lines.append(f"| {name} | {price} | " + " | ".join(cell(values, column) for column in SHOWN) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--only", choices=MODELS, action="append")
    parser.add_argument("--draw-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    FOLDER.mkdir(parents=True, exist_ok=True)
    runs = [] if arguments.draw_only else list(product(arguments.only or MODELS, BUDGETS))
    for model, budget in tqdm(runs):
        measure(model, budget, arguments.clips, FOLDER / f"{model}.json")
    results = {model: json.loads(path.read_text()) for model in MODELS if (path := FOLDER / f"{model}.json").exists()}
    complete = {budget for budget in BUDGETS if all(f"{OURS}: {budget}" in own for own in results.values())}
    together = averaged(
        {name: values for name, values in own.items() if name in CONTROLS or int(name.rpartition(": ")[2]) in complete}
        for own in results.values()
    )
    draw(together)
    models = f"Models: {', '.join(results)}. Who is first, and how far {OURS}, ours, is behind:"
    shown = f"All methods at {TABLE} forward passes, which is about the price of the default:"
    text = "\n\n".join((models, first(together), shown, table(together, TABLE)))
    write_between(DOCS / "results_methods.md", "perturbation_price", text)


if __name__ == "__main__":
    main()
