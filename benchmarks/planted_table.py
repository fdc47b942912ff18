"""How well each method tells planted evidence from its rivals, and one class from another: docs/planted.md.

    python benchmarks/planted_table.py                        # all bundled models; about an hour on two cores
    python benchmarks/planted_table.py --only videomae-pattern --clips 8
    python benchmarks/planted_table.py --write-only           # the page again, from the results at hand

Each model is written to a JSON file of its own as soon as it is done; a second start continues with the others, and
``--redo STAA`` runs only the methods whose names begin so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from planted_text import HISTORY, INTRO
from torch import Tensor
from tqdm import tqdm

from captum_staa import RISE, STAA, GradCAM, VideoClassifier, VideoOcclusion, metrics
from captum_staa.benchmark import PlantedClips
from captum_staa.benchmark.controls import RandomWeights
from captum_staa.benchmark.layers import End, end_layer
from captum_staa.gaussian import gaussian

FAMILIES, TASKS = ("videomae", "timesformer", "vivit", "vjepa2", "resnet3d"), ("pattern", "motion", "order")
SEED = 20_000  # clips of two classes have the seed after it
BATCH = 8
COLUMNS = {
    "rivals": "evidence against rivals",
    "time": "in time",
    "all": "against all voxels",
    "pointing": "evidence first",
    "classes": "class A against B",
    "random weights": "random weights",
    "other class": "other class",
    "forwards": "forwards",
}
CHANCE = "random"
NEAR = 0.8  # of a method's advantage over chance: a control that has as much is as good
Method = Callable[[Tensor, Tensor], Tensor]  # clips in the classifier's layout, targets (B,) -> maps (B, T, H, W)
Variant = Callable[[Tensor], Tensor]
SIGNED: dict[str, Variant] = {"": lambda maps: maps}
SMOOTHED: dict[str, Variant] = {
    ", signed, smoothed": lambda maps: gaussian(maps, (1.0, 4.0, 4.0)),
    ", magnitude, smoothed": lambda maps: gaussian(maps.abs(), (1.0, 4.0, 4.0)),
}


@dataclass(frozen=True)
class Row:
    """A method, and the maps that are made of its attributions without running it again.

    Attributes:
        call: the method.
        variants: what is appended to its name, and what is done to its maps. Higher values mean more evidence.
        slow: whether it takes hundreds of forwards: then it explains fewer clips, and has no controls of its own.
    """

    call: Method
    variants: dict[str, Variant]
    slow: bool = False


def methods(clf: VideoClassifier) -> dict[str, Row]:
    layout = clf.layout

    def row(
        attribute: Callable[..., Tensor], variants: dict[str, Variant] = SIGNED, slow: bool = False, **options: object
    ) -> Row:
        def call(clips: Tensor, targets: Tensor) -> Tensor:
            return layout.reduce(attribute(clips, target=targets, **options).detach().float())

        return Row(call, variants, slow)

    def cam(end: End, weighting: str) -> Row:
        layer = end_layer(clf, end)
        assert layer is not None
        return row(GradCAM(clf, layer, weighting=weighting).attribute)  # type: ignore[arg-type]

    found: dict[str, Row] = {}
    if clf.family is not None:
        found |= {
            "STAA (relevance)": row(STAA(clf).attribute),
            "STAA (relevance, Chefer)": row(STAA(clf, rule="chefer").attribute),
            "STAA (attention, of no class)": row(STAA(clf, mode="attention").attribute),
            "STAA (released code)": row(STAA(clf, mode="released").attribute),
        }
    windows = {"sliding_window_shapes": (4, 16, 16), "strides": (2, 8, 8)}
    return found | {
        "GradCAM (gradcam, last layer)": cam("last", "gradcam"),
        "GradCAM (hirescam, last layer)": cam("last", "hirescam"),
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
    }


def mean(values: Iterable[float]) -> float:
    known = [value for value in values if value == value]
    return statistics.fmean(known) if known else float("nan")


def run(family: str, task: str, clips: int, slow_clips: int, redo: str) -> dict[str, dict[str, float]]:
    clf = VideoClassifier.from_pretrained(f"tiny-{family}-{task}")
    for parameter in clf.parameters():
        parameter.requires_grad_(False)
    weights = RandomWeights(clf, seed=0)
    found: dict[str, dict[str, float]] = {}
    for name, row in tqdm(methods(clf).items(), desc=f"{family}-{task}", mininterval=5):
        if name.startswith(redo):
            found |= _run(clf, weights, name, row, task, slow_clips if row.slow else clips)
    return found if redo else found | _controls(clf, task, clips)


def _run(
    clf: VideoClassifier, weights: RandomWeights, name: str, row: Row, task: str, count: int
) -> dict[str, dict[str, float]]:
    values: dict[str, dict[str, list[float]]] = {name + end: {key: [] for key in COLUMNS} for end in row.variants}
    planted = PlantedClips(SEED, count, task)
    pairs = None if task == "order" else PlantedClips(SEED + 1, count, task, two_classes=True)

    def variants(clips: Tensor, targets: Tensor) -> dict[str, Tensor]:
        maps = row.call(clips, targets)
        return {name + end: variant(maps) for end, variant in row.variants.items()}

    for start in range(0, count, BATCH):
        part = slice(start, min(start + BATCH, count))
        inputs, labels, truth = planted[part]
        inputs, rivals, objects = (
            clf.layout.from_working(inputs).contiguous(),
            planted.rivals(part),
            planted.objects(part),
        )
        with torch.no_grad():
            clf(inputs)
            begin = time.process_time()
            logits = clf(inputs)
            middle = time.process_time()
        own = variants(inputs, labels)
        cost = (time.process_time() - middle) / (middle - begin)
        more = {}
        if not row.slow:
            more["other class"] = variants(inputs, logits.scatter(1, labels[:, None], -torch.inf).argmax(1))
            with weights.in_place():
                more["random weights"] = variants(inputs, labels)
        if pairs is not None:
            two, both, truths = pairs[part]
            two = clf.layout.from_working(two).contiguous()
            a, b = variants(two, both[:, 0]), variants(two, both[:, 1])
        for each, maps in own.items():
            _score(values[each], maps, truth, rivals, objects)
            values[each]["forwards"].append(cost)
            for column, others in more.items():
                values[each][column] += metrics.evidence_against_rivals(others[each], truth, rivals).tolist()
            if pairs is not None:
                preferred = metrics.class_discrimination(a[each], b[each], truths[:, 0], truths[:, 1])
                values[each]["classes"] += preferred.tolist()
    return {
        each: {key: statistics.median(v) if key == "forwards" else mean(v) for key, v in own.items()}
        for each, own in values.items()
    }


def _score(own: dict[str, list[float]], maps: Tensor, truth: Tensor, rivals: Tensor, objects: Tensor) -> None:
    own["rivals"] += metrics.evidence_against_rivals(maps, truth, rivals).tolist()
    own["time"] += metrics.evidence_against_rivals(maps, truth, rivals, axis="time").tolist()
    own["all"] += metrics.auroc(maps, truth).tolist()
    own["pointing"] += metrics.object_pointing(maps, objects).tolist()


def _controls(clf: VideoClassifier, task: str, count: int) -> dict[str, dict[str, float]]:
    """Maps that know nothing of the model, and what the tokens of a transformer allow at best."""
    planted, grid = PlantedClips(SEED, count, task), clf.grid
    values: dict[str, dict[str, list[float]]] = {}
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, BATCH):
        part = slice(start, min(start + BATCH, count))
        inputs, _, truth = planted[part]
        maps = {f"control: {name}": each for name, each in metrics.model_free_controls(inputs, "BTCHW").items()}
        maps[CHANCE] = torch.rand(truth.shape, generator=generator)
        maps["uniform"] = torch.ones(truth.shape)
        if grid is not None:
            maps["perfect tokens"] = grid.to_pixels(F.avg_pool3d(truth[:, None].float(), grid.tubelet)[:, 0])
        for name, each in maps.items():
            own = values.setdefault(name, {key: [] for key in COLUMNS})
            _score(own, each, truth, planted.rivals(part), planted.objects(part))
    return {name: {key: mean(v) for key, v in own.items()} for name, own in values.items()}


# --- the page ---------------------------------------------------------------------------------------------------------


def averaged(results: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    names = dict.fromkeys(name for own in results for name in own)
    return {name: {key: mean(own[name][key] for own in results if name in own) for key in COLUMNS} for name in names}


def best_control(own: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Instead of all maps without a model, the best one for each column."""
    controls = [values for name, values in own.items() if name.startswith("control: ")]
    rest = {name: values for name, values in own.items() if not name.startswith("control: ")}
    best = {key: max((c[key] for c in controls if c[key] == c[key]), default=float("nan")) for key in COLUMNS}
    return {**rest, "best map without a model": best} if controls else rest


def table(own: dict[str, dict[str, float]]) -> list[str]:
    own = best_control(own)
    lines = ["| method | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, values in sorted(own.items(), key=lambda each: -each[1]["rivals"]):
        cells = [_cell(key, values) for key in COLUMNS]
        lines.append(f"| {name}{_marks(values)} | " + " | ".join(cells) + " |")
    return lines


def _cell(key: str, values: dict[str, float]) -> str:
    value = values[key]
    if value != value:
        return ""
    return f"{value:.1f}" if key == "forwards" else f"{value:.3f}"


def _marks(values: dict[str, float]) -> str:
    advantage = values["rivals"] - 0.5
    if advantage < 0.1:
        return ""
    marks = (("random weights", "†"), ("other class", "‡"))
    return "".join(mark for key, mark in marks if values[key] - 0.5 >= NEAR * advantage)


def page(found: dict[str, dict]) -> str:
    kinds = {
        "Video transformers": [name for name in found if not name.startswith("resnet3d")],
        "3D CNNs": [name for name in found if name.startswith("resnet3d")],
    }
    clips = min(own["clips"] for own in found.values())
    slow = min(own["slow clips"] for own in found.values())
    lines = [INTRO.strip().format(clips=clips, slow=slow), ""]
    for kind, names in kinds.items():
        if names:
            lines += [f"## {kind}: mean over {len(names)} models", ""]
            lines += [*table(averaged([found[name]["methods"] for name in names])), ""]
    lines += [HISTORY.strip(), "", "## Each model", ""]
    for name, own in found.items():
        lines += [f"### {name}", "", *table(own["methods"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--slow-clips", type=int, default=4, help="for methods of many forwards")
    parser.add_argument("--only", action="append", metavar="FAMILY-TASK", help="may be given again")
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
        (arguments.out / "planted.md").write_text(page(found))


if __name__ == "__main__":
    main()
