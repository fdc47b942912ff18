"""Compare spatio-temporal perturbation with other methods: planted evidence, insertion and deletion.

    python benchmarks/perturbation_table.py                  # two clips of ten models, five minutes of one core
    python benchmarks/perturbation_table.py --only resnet3d-order --clips 2
    python benchmarks/perturbation_table.py --write-only     # the page only, from the existing results

Each method is stored in the file of its model when it is finished, and a second start continues after it. The preset of
the paper is run on one model only: it costs 60 times as much as the default. Six models have the default and
its initial map only.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from captum.attr import IntegratedGradients
from evidence import COLUMNS, Evidence, averaged, best_control, markdown, means, smoothed, write_between
from torch import Tensor
from tqdm import tqdm

from captum_staa import (
    RISE,
    STAA,
    GradCAM,
    SpatioTemporalPerturbation,
    VideoClassifier,
    baselines,
    metrics,
)
from captum_staa.benchmark.registry import end_layer
from captum_staa.perturbation import PRESETS, Ellipsoid, Nested, PerturbationConfig

MODELS = ("resnet3d-order", "vjepa2-order", "vivit-order", "videomae-motion")
PUBLISHED = MODELS[:1]  # without clips of two classes, so that each map is made once
MORE = (
    "resnet3d-motion",
    "timesformer-pattern",
    "timesformer-order",
    "videomae-pattern",
    "vivit-motion",
    "vjepa2-motion",
)
SEED = 21_000
CELLS, STEPS = (1, 3, 3), 32  # 16 cells along each side of a frame
COST = PRESETS["nested"].forwards()
DOCS = Path(__file__).parents[1] / "docs"
FOLDER = DOCS / "perturbation"
SHOWN = {
    **{key: title for key, title in COLUMNS.items() if key not in ("space", "pointing")},
    "insertion": "insertion",
    "deletion": "deletion",
    "insertion, blur": "insertion, blur",
    "deletion, blur": "deletion, blur",
    "forwards": "forwards",
}
INTRO = """\
Means over {models} bundled models, then over four of them, then of one with the presets of the paper; {clips} clips
of each, so differences of .03 say nothing. Columns and controls as in [planted
evidence](results_truth.md#how-to-read-the-tables); only the default on the four models has controls. Insertion (high
is good) and deletion (low is good): the area under the target's probability over {steps} steps, cells of 1 x 3 x 3
pixels, towards zero and towards a blur. Forwards: a gradient counts as three. `nested` is the default, `thorough` has
105 steps. `STEP` is the method as published, with 1200 steps; the other rows of STEP each change one thing more. Made
by `python benchmarks/perturbation_table.py`; `docs/perturbation/` has all models.
"""
# Captum's default, Gauss-Legendre, puts points next to the baseline, where the 3D CNN has gradients without bounds.
MIDDLE: Any = {"method": "riemann_middle", "internal_batch_size": 4}
CONTROL = "best map without a model"
BEGUN = "nested, begun from STAA (relevance) or HiResCAM"
FEW = ("nested", "nested, its initial map alone")
NAMES = (
    *FEW,
    BEGUN,
    "STAA (relevance) or HiResCAM",
    CONTROL,
    "RISE",
    "IntegratedGradients",
    "nested, thorough",
)
SHORT = PRESETS["step"].changed(iterations=300)
PAPER = {
    "STEP": PRESETS["step"],
    "STEP, 300 steps": SHORT,
    "STEP, 300 steps, no regularizer": PRESETS["3d-ep"].changed(iterations=300),
    "STEP, 300 steps, regularizer from the first step": SHORT.changed(regularizer=Ellipsoid(weight=300.0)),
    "STEP, 300 steps, baseline zero": SHORT.changed(blends=("fade",)),
}
THOROUGH = replace(PRESETS["nested"], parametrization=Nested(gradients=40), iterations=105)
Maps = Callable[[Tensor, Tensor], dict[str, Tensor]]  # clips, targets -> maps (B, T, H, W) by name
Scores = dict[str, dict[str, float]]


def methods(clf: VideoClassifier) -> dict[str, Maps]:
    """Return functions that each give one or several maps, by the names of these maps."""
    layout = clf.layout

    def quick(clips: Tensor, targets: Tensor) -> Tensor:
        """Signed relevance at the cost of a forward and a backward."""
        if clf.grid is not None:
            return STAA(clf, mode="relevance").attribute_maps(clips, targets).joint
        layer = end_layer(clf, "first")
        assert layer is not None
        return smoothed(GradCAM(clf, layer).attribute_maps(clips, targets).joint)

    def learned(name: str, preset: str | PerturbationConfig = "nested", begun: bool = False, **options: object) -> Maps:
        method = SpatioTemporalPerturbation(clf, preset=preset)

        def explain(clips: Tensor, targets: Tensor) -> dict[str, Tensor]:
            init = quick(clips, targets) if begun else None
            parts = method.attribute_maps(clips, target=targets, perturbations_per_eval=2, init=init, **options)
            return {name: parts.joint}

        return explain

    def integrated(clips: Tensor, targets: Tensor) -> dict[str, Tensor]:
        method = IntegratedGradients(clf)
        maps = layout.reduce(method.attribute(clips, target=targets, n_steps=COST // 3, **MIDDLE))
        return {
            f"IntegratedGradients ({COST // 3})": maps,
            f"IntegratedGradients ({COST // 3}), smoothed": smoothed(maps),
        }

    return {
        "nested": learned("nested"),
        "nested, its initial map alone": learned("nested, its initial map alone", iterations=0),
        BEGUN: learned(BEGUN, begun=True),
        "nested, thorough": learned("nested, thorough", THOROUGH),
        **{name: learned(name, preset) for name, preset in PAPER.items()},
        "STAA (relevance) or HiResCAM": lambda x, y: {"STAA (relevance) or HiResCAM": quick(x, y)},
        "IntegratedGradients": integrated,
        "RISE": lambda x, y: {
            f"RISE ({COST})": layout.reduce(RISE(clf).attribute(x, target=y, n_samples=COST, perturbations_per_eval=4))
        },
    }


@contextmanager
def counted(clf: VideoClassifier) -> Iterator[list[int]]:
    """Count the clips that the model is run on in the block. With a gradient they count as three."""
    total, forward = [0], clf.forward

    def count(*arguments: Tensor) -> Tensor:
        total[0] += len(arguments[0]) * (3 if torch.is_grad_enabled() else 1)
        return forward(*arguments)

    clf.forward = count
    try:
        yield total
    finally:
        clf.forward = forward


def curves(clf: VideoClassifier, clips: Tensor, labels: Tensor, maps: Tensor) -> dict[str, float]:
    found = {}
    for name, baseline in (("", 0), (", blur", baselines.blur(clips, clf.layout))):
        options = {"target": labels, "cells": CELLS, "steps": STEPS, "perturbations_per_eval": 4}
        both = metrics.insertion_deletion(clf, clips, maps, baselines=baseline, **options)
        found[f"insertion{name}"] = float(both.insertion.score.mean())
        found[f"deletion{name}"] = float(both.deletion.score.mean())
    return found


def measured(clf: VideoClassifier, evidence: Evidence, explain: Maps, with_controls: bool) -> Scores:
    """Return the scores and the cost of every map that a function gives. The maps are made once for all scores."""
    clips, labels, _ = evidence.planted[:]
    clips = clf.layout.from_working(clips).contiguous()
    torch.manual_seed(0)  # Captum's Lime, KernelShap and NoiseTunnel use torch's global random state
    with counted(clf) as total:
        maps = explain(clips, labels)
    forwards = total[0] / len(clips)

    def reused(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        same = x.shape == clips.shape and torch.equal(x, clips) and torch.equal(y, labels)
        return maps if same and not with_controls else explain(x, y)  # a control has other weights

    scores = means(evidence.scores(reused, with_controls))
    return {
        name: {**scores[name], **curves(clf, clips, labels, map_), "forwards": forwards} for name, map_ in maps.items()
    }


def store(path: Path, found: Scores) -> None:
    path.with_suffix(".part").write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".part").replace(path)


def measure(model: str, name: str, count: int, path: Path) -> None:
    """Measure one method, or the maps without a model, unless the file has it already."""
    found: Scores = json.loads(path.read_text()) if path.exists() else {}
    if name in found or (name == "RISE" and f"RISE ({COST})" in found):
        return
    if name == "IntegratedGradients" and any(known.startswith(name) for known in found):
        return
    clf, task = VideoClassifier.from_pretrained(f"tiny-{model}"), model.split("-")[1]
    evidence = Evidence(clf, task, count, SEED)
    if name == CONTROL:
        found |= best_control(means(evidence.without_a_model()))
    else:
        found |= measured(clf, evidence, methods(clf)[name], name == "nested" and model in MODELS)
    store(path, found)


def named(model: str) -> tuple[str, ...]:
    """Return the names of the methods that are run on a model."""
    return (*NAMES, *(PAPER if model in PUBLISHED else ())) if model in MODELS else FEW


def page(results: dict[str, Scores], clips: int) -> str:
    """Return means over all models, over those with all methods, and over those with the presets of the paper."""
    lines = [INTRO.format(models=len(results), clips=clips, steps=STEPS)]
    for models in (tuple(results), MODELS, PUBLISHED):
        group = {model: results[model] for model in models if model in results}
        shared = set.intersection(*(set(found) for found in group.values()))  # means over the same models
        means_of = {name: own for name, own in averaged(group.values()).items() if name in shared}
        if len(lines) > 1:
            lines += ["", f"Means over {', '.join(group)}:" if len(group) > 1 else f"Of {models[0]} alone:", ""]
        lines += markdown(means_of, SHOWN)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--only", choices=(*MODELS, *MORE), action="append")
    parser.add_argument("--write-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Input Tensor . did not already require gradients")
    FOLDER.mkdir(exist_ok=True)
    chosen = [] if arguments.write_only else arguments.only or (*MODELS, *MORE)
    runs = [(model, name) for model in chosen for name in named(model)]
    for model, name in tqdm(runs):
        measure(model, name, arguments.clips, FOLDER / f"{model}.json")
    found = {
        model: json.loads(path.read_text()) for model in (*MODELS, *MORE) if (path := FOLDER / f"{model}.json").exists()
    }
    write_between(DOCS / "results_methods.md", "perturbation_table", page(found, arguments.clips))


if __name__ == "__main__":
    main()
