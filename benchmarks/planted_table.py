"""Measure how well each method separates planted evidence from rivals, and classes: docs/results_truth.md.

    python benchmarks/planted_table.py                        # all bundled models; about an hour on two cores
    python benchmarks/planted_table.py --only videomae-pattern --clips 8
    python benchmarks/planted_table.py --write-only           # the page only, from the existing results

Each finished model is stored in a separate JSON file, and a second start continues with the others.
``--redo STAA`` runs only the methods whose names start with this prefix.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from evidence import BATCH, Evidence, averaged, best_control, cell, means, smoothed, write_between
from evidence import COLUMNS as SCORED
from torch import Tensor
from tqdm import tqdm

from captum_staa import RISE, STAA, GradCAM, VideoClassifier, VideoOcclusion
from captum_staa.attr import ReleasedSTAA
from captum_staa.benchmark.registry import End, end_layer

FAMILIES, TASKS = ("videomae", "timesformer", "vivit", "vjepa2", "resnet3d"), ("pattern", "motion", "order")
SEED = 20_000
COLUMNS = {**{key: title for key, title in SCORED.items() if key != "space"}, "forwards": "forwards"}
NEAR = 0.8  # of a method's advantage over chance: a control that has as much is as good
Method = Callable[[Tensor, Tensor], Tensor]  # clips in the classifier's layout, targets (B,) -> maps (B, T, H, W)
Variant = Callable[[Tensor], Tensor]
SIGNED: dict[str, Variant] = {"": lambda maps: maps}
SMOOTHED: dict[str, Variant] = {
    ", signed, smoothed": smoothed,
    ", magnitude, smoothed": lambda maps: smoothed(maps.abs()),
}


@dataclass(frozen=True)
class Row:
    """A method, and the maps that are made of its attributions without running it again.

    Attributes:
        call: the method.
        variants: what is appended to its name, and what is done to its maps. Higher values mean more evidence.
        slow: whether it takes hundreds of forwards: then it explains fewer clips.
        controls: whether the maps of random weights and of another class are scored, too.
    """

    call: Method
    variants: dict[str, Variant]
    slow: bool = False
    controls: bool = True


def methods(clf: VideoClassifier) -> dict[str, Row]:
    layout = clf.layout

    def row(
        attribute: Callable[..., Tensor], variants: dict[str, Variant] = SIGNED, slow: bool = False, **options: object
    ) -> Row:
        def call(clips: Tensor, targets: Tensor) -> Tensor:
            return layout.reduce(attribute(clips, target=targets, **options).detach().float())

        return Row(call, variants, slow)

    def cam(end: End, weighting: str, variants: dict[str, Variant] = SIGNED) -> Row:
        layer = end_layer(clf, end)
        assert layer is not None
        return row(GradCAM(clf, layer, weighting=weighting).attribute, variants)  # type: ignore[arg-type]

    found: dict[str, Row] = {}
    if clf.family is not None:
        found |= {
            "STAA (relevance)": row(STAA(clf).attribute),
            "STAA (relevance, Chefer)": row(STAA(clf, rule="chefer").attribute),
            "STAA (attention, of no class)": row(STAA(clf, mode="attention").attribute),
            "STAA (released code)": row(ReleasedSTAA(clf).attribute),
        }
    windows = {"sliding_window_shapes": (4, 16, 16), "strides": (2, 8, 8)}
    return found | {
        "GradCAM (gradcam, last layer)": cam("last", "gradcam"),
        "GradCAM (hirescam, first layer)": cam("first", "hirescam", SMOOTHED),
        "GradCAM (layercam, first layer)": cam("first", "layercam"),
        "Saliency": row(Saliency(clf).attribute),
        "InputXGradient": row(InputXGradient(clf).attribute, SMOOTHED),
        "IntegratedGradients (20)": row(
            IntegratedGradients(clf).attribute, SMOOTHED, n_steps=20, internal_batch_size=4 * BATCH
        ),
        "VideoOcclusion (4 x 16 x 16)": row(
            VideoOcclusion(clf).attribute, slow=True, perturbations_per_eval=BATCH, **windows
        ),
        "RISE (400)": row(RISE(clf).attribute, slow=True, n_samples=400, perturbations_per_eval=BATCH),
        "RISE (1000)": replace(
            row(RISE(clf).attribute, slow=True, n_samples=1000, perturbations_per_eval=BATCH), controls=False
        ),
    }


def run(family: str, task: str, clips: int, slow_clips: int, redo: str) -> dict[str, dict[str, float]]:
    clf = VideoClassifier.from_pretrained(f"tiny-{family}-{task}")
    many, few = Evidence(clf, task, clips, SEED), Evidence(clf, task, slow_clips, SEED)
    found: dict[str, dict[str, float]] = {}
    for name, row in tqdm(methods(clf).items(), desc=f"{family}-{task}", mininterval=5):
        if not name.startswith(redo):
            continue
        evidence = few if row.slow else many

        def maps(inputs: Tensor, targets: Tensor, name: str = name, row: Row = row) -> dict[str, Tensor]:
            own = row.call(inputs, targets)
            return {name + end: variant(own) for end, variant in row.variants.items()}

        cost = forwards(clf, evidence, row.call)
        found |= {each: {**own, "forwards": cost} for each, own in means(evidence.scores(maps, row.controls)).items()}
    if "known objects".startswith(redo):
        found |= means(many.known_objects())
    if not redo:
        grid = clf.grid
        perfect = (
            {} if grid is None else {"perfect tokens": lambda truth: grid.to_pixels(_per_token(truth, grid.tubelet))}
        )
        found |= means(many.without_a_model(**perfect))
    return found


def _per_token(truth: Tensor, tubelet: tuple[int, int, int]) -> Tensor:
    return F.avg_pool3d(truth[:, None].float(), tubelet)[:, 0]


def forwards(clf: VideoClassifier, evidence: Evidence, call: Method) -> float:
    """Return the processor time of one map divided by that of a forward: median of three."""
    clips, labels, _ = evidence.planted[:1]
    clips, ratios = clf.layout.from_working(clips).contiguous(), []
    with torch.no_grad():
        clf(clips)
        for _ in range(3):
            begin = time.process_time()
            for _ in range(4):
                clf(clips)
            middle = time.process_time()
            call(clips, labels)
            ratios.append(4 * (time.process_time() - middle) / (middle - begin))
    return statistics.median(ratios)


# --- the page ---------------------------------------------------------------------------------------------------------


def table(own: dict[str, dict[str, float]]) -> list[str]:
    own = best_control(own)
    lines = ["| method | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, values in sorted(own.items(), key=lambda each: -each[1]["rivals"]):
        cells = [cell(values, key, 1 if key == "forwards" else 3) for key in COLUMNS]
        lines.append(f"| {name}{_marks(values)} | " + " | ".join(cells) + " |")
    return lines


def _marks(values: dict[str, float]) -> str:
    advantage = values.get("rivals", 0.5) - 0.5
    if advantage < 0.1:
        return ""
    marks = (("random weights", "†"), ("other class", "‡"))
    return "".join(mark for key, mark in marks if values.get(key, 0.0) - 0.5 >= NEAR * advantage)


def page(found: dict[str, dict]) -> str:
    """Return the section of the page: one table for transformers and one for 3D CNNs."""
    kinds = {
        "Video transformers": [name for name in found if not name.startswith("resnet3d")],
        "3D CNNs": [name for name in found if name.startswith("resnet3d")],
    }
    clips = min(own["clips"] for own in found.values())
    slow = min(own["slow clips"] for own in found.values())
    lines = [f"{clips} clips of each model, {slow} for `VideoOcclusion` and `RISE`, which are slow."]
    for kind, names in kinds.items():
        if names:
            lines += ["", f"### {kind}: mean over {len(names)} models", ""]
            lines += table(averaged([found[name]["methods"] for name in names]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--slow-clips", type=int, default=4, help="for methods of many forwards")
    parser.add_argument("--only", action="append", metavar="FAMILY-TASK", help="may be repeated")
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
            fresh = {"clips": arguments.clips, "slow clips": arguments.slow_clips, "methods": {}}
            results = json.loads(path.read_text()) if path.exists() else fresh
            results["methods"].update(run(family, task, results["clips"], results["slow clips"], arguments.redo or ""))
            path.with_suffix(".part").write_text(json.dumps(results, indent=1) + "\n")
            path.with_suffix(".part").replace(path)
    paths = {name: folder / f"{name}.json" for name in names}
    if found := {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}:
        write_between(arguments.out / "results_truth.md", "planted_table", page(found))


if __name__ == "__main__":
    main()
