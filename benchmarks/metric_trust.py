"""Measure which metrics can be trusted: the agreement of rankings between clips, and with the truth.

    python benchmarks/metric_trust.py                      # 24 clips of four models, some 30 minutes of one core
    python benchmarks/metric_trust.py --only videomae-pattern --clips 16
    python benchmarks/metric_trust.py --write-only            # the page only, from the existing results

Every batch of clips is stored after it is scored, and a second start continues after it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from evidence import mean, smoothed, write_between
from torch import Tensor
from tqdm import tqdm

from captum_staa import STAA, GradCAM, VideoClassifier, VideoOcclusion, baselines, metrics
from captum_staa.benchmark import PlantedClips, SceneOptions
from captum_staa.benchmark.clip_runner import RandomWeights
from captum_staa.benchmark.registry import end_layer

MODELS = ("videomae-pattern", "timesformer-motion", "vivit-order", "resnet3d-motion")
SEED, BATCH, STEPS = 50_000, 8, 16
DOCS = Path(__file__).parents[1] / "docs"
INTRO = """\
{clips} clips of each of {models} models, with all methods and controls; {steps} steps, cells of a tubelet, baseline
zero unless named. Made by `python benchmarks/metric_trust.py`; `docs/metric_trust/` has the scores of all methods.
"""
Maps = dict[str, Tensor]
BASELINES = ("blur", "mean_frame")  # baselines of insertion and deletion beside zero
CURVES = ("insertion", "deletion", *(f"{kind} ({name})" for name in BASELINES for kind in ("insertion", "deletion")))
FAITHFUL = (*CURVES, "faithfulness", "monotonicity", "faithfulness_correlation", "aopc", "saco")
RIVALS, CLASSES = "evidence_against_rivals", "class_discrimination"
OTHERS = ("auroc", "average_precision", "pointing_game", "energy_pointing_game", "relevance_rank_accuracy")
METRICS = (*FAITHFUL, *OTHERS, RIVALS)  # on clips with evidence of one class
PAIRED = (*FAITHFUL, CLASSES)  # on clips with evidence of two, of which the model's answer is explained
Found = dict[str, list[list[float]]]  # of each method, clips x METRICS or PAIRED


def maps_of(clf: VideoClassifier, clips: Tensor, labels: Tensor, weights: RandomWeights, seed: int) -> Maps:
    """Return the map ``(B, T, H, W)`` of every method and control."""
    layer = end_layer(clf, "first")
    assert layer is not None
    _, h, w = (2, 8, 8) if clf.grid is None else clf.grid.tubelet
    integrated = IntegratedGradients(clf)
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "Saliency": lambda target: Saliency(clf).attribute(clips, target=target),
        "InputXGradient": lambda target: InputXGradient(clf).attribute(clips, target=target).detach(),
        "IntegratedGradients (20)": lambda target: integrated.attribute(
            clips, target=target, n_steps=20, internal_batch_size=4 * BATCH
        ),
        "GradCAM (hirescam, first layer)": lambda target: GradCAM(clf, layer).attribute(clips, target=target),
        "GradCAM (layercam, first layer)": lambda target: GradCAM(clf, layer, weighting="layercam").attribute(
            clips, target=target
        ),
        "VideoOcclusion": lambda target: VideoOcclusion(clf).attribute(
            clips, (4, 2 * h, 2 * w), (4, h, w), target=target, perturbations_per_eval=4
        ),
    }
    if clf.grid is not None:
        calls |= {
            "STAA": lambda target: STAA(clf).attribute(clips, target=target),
            "STAA (chefer)": lambda target: STAA(clf, rule="chefer").attribute(clips, target=target),
            "STAA (attention)": lambda target: STAA(clf, mode="attention").attribute(clips),
        }
    maps = {name: clf.layout.reduce(call(labels)) for name, call in calls.items()}
    for name in ("InputXGradient", "IntegratedGradients (20)", "GradCAM (hirescam, first layer)"):
        own = maps.pop(name)
        maps[f"{name}, signed, smoothed"] = smoothed(own)
        maps[f"{name}, magnitude, smoothed"] = smoothed(own.abs())
    first = "STAA" if "STAA" in maps else "VideoOcclusion"
    with torch.no_grad():
        other = clf(clips).scatter(1, labels[:, None], -torch.inf).argmax(1)
    maps[f"{first}, other class"] = clf.layout.reduce(calls[first](other))
    with weights.in_place():
        maps[f"{first}, random weights"] = clf.layout.reduce(calls[first](labels))
    generator = torch.Generator().manual_seed(seed)
    return maps | metrics.controls(clips, clf.layout, maps[first], generator=generator)


def faithful(clf: VideoClassifier, clips: Tensor, labels: Tensor, maps: Tensor) -> list[Tensor]:
    """Return ``(B,)`` for each metric of FAITHFUL."""
    # two copies of the batch per evaluation: activations of more do not fit a core's cache
    call = {"forward_func": clf, "inputs": clips, "attributions": maps, "perturbations_per_eval": 2}
    curves = []
    for baseline in (0, *(getattr(baselines, name)(clips, clf.layout) for name in BASELINES)):
        both = metrics.insertion_deletion(**call, target=labels, steps=STEPS, baselines=baseline)
        curves += [both.insertion.score, both.deletion.score]
    return [
        *curves,
        metrics.faithfulness(**call),
        metrics.monotonicity(**call),
        metrics.faithfulness_correlation(**call, target=labels, n_subsets=32),
        metrics.aopc(**call, target=labels),
        metrics.saco(**call, target=labels),
    ]


def measure(model: str, count: int, path: Path) -> None:
    clf, task = VideoClassifier.from_pretrained(f"tiny-{model}"), model.split("-")[1]
    planted, weights = PlantedClips(seed=SEED, n=count, task=task), RandomWeights(clf, seed=0)
    pairs = (
        None
        if task == "order"
        else PlantedClips(seed=SEED + 1, n=count, task=task, scene=SceneOptions(two_classes=True))
    )
    found: dict[str, Found] = json.loads(path.read_text()) if path.exists() else {"evidence": {}, "classes": {}}

    def add(kind: str, name: str, columns: list[Tensor]) -> None:
        rows = torch.stack([column.double() for column in columns], dim=1).tolist()
        found[kind].setdefault(name, []).extend([round(value, 5) for value in row] for row in rows)

    for start in tqdm(range(len(found["evidence"].get("random", ())), count, BATCH), desc=model):
        part = slice(start, min(start + BATCH, count))
        clips, labels, truth = planted[part]
        rivals, clips = planted.rivals(part), clf.layout.from_working(clips).contiguous()
        for name, maps in maps_of(clf, clips, labels, weights, start).items():
            others = [getattr(metrics, metric)(maps, truth) for metric in OTHERS]
            against = metrics.evidence_against_rivals(maps, truth, rivals)
            add("evidence", name, [*faithful(clf, clips, labels, maps), *others, against])
        if pairs is not None:
            clips, both, truths = pairs[part]
            clips = clf.layout.from_working(clips).contiguous()
            with torch.no_grad():
                first = clf(clips).gather(1, both).argmax(1, keepdim=True)  # of the two, the model's answer
            order = torch.cat([first, 1 - first], dim=1)
            both, truths = both.gather(1, order), truths[torch.arange(len(clips))[:, None], order]
            a, b = (maps_of(clf, clips, both[:, k], weights, start) for k in (0, 1))
            for name, maps in a.items():
                preferred = metrics.class_discrimination(maps, b[name], truths[:, 0], truths[:, 1])
                add("classes", name, [*faithful(clf, clips, both[:, 0], maps), preferred])
        path.with_suffix(".part").write_text(json.dumps(found, separators=(",", ":")))
        path.with_suffix(".part").replace(path)


def good(metric: str) -> int:
    """1 where higher is better, else -1."""
    return 1 if getattr(metrics, metric.split()[0]).higher_is_better else -1


def ranks(values: Tensor) -> Tensor:
    """Return ``(N, M)``, the ranks within each row. Equal values share their rank."""
    above, equal = values[:, :, None] > values[:, None], values[:, :, None] == values[:, None]
    return above.sum(2) + equal.sum(2) / 2


def agreement(scores: Tensor, truth: Tensor) -> Tensor:
    """Return ``(N,)``, Spearman's correlation over methods of two ``(N, M)`` for each clip; nan if a score is nan."""
    a, b = (x - x.mean(1, keepdim=True) for x in (ranks(scores), ranks(truth)))
    values = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return values.masked_fill(scores.isnan().any(1), torch.nan)


def values_of(found: Found, columns: tuple[str, ...], metric: str, names: list[str]) -> Tensor:
    """``(N, M)``; no positive attribution at all puts none of it inside."""
    column = columns.index(metric)
    values = torch.tensor([[row[column] for row in found[name]] for name in names], dtype=torch.float64).T
    return values.nan_to_num(0.0) if metric == "energy_pointing_game" else values


def page(results: dict[str, dict[str, Found]]) -> str:
    counts = sorted({len(found["evidence"]["random"]) for found in results.values()})
    clips = " to ".join(map(str, counts[:: max(1, len(counts) - 1)]))
    lines = [INTRO.format(clips=clips, models=len(results), steps=STEPS)]
    agreements: dict[str, dict[str, list[float]]] = {metric: {RIVALS: [], CLASSES: []} for metric in METRICS}
    stable: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for kinds in results.values():
        found, pairs = kinds["evidence"], kinds["classes"]
        names = [name for name in found if name != "uniform"]
        table = {metric: good(metric) * values_of(found, METRICS, metric, names) for metric in METRICS}
        paired = {metric: good(metric) * values_of(pairs, PAIRED, metric, names) for metric in PAIRED if pairs}
        for metric, scores in table.items():
            trust = metrics.reliability(scores, random=names.index("random"), n_bootstrap=500)
            stable[metric].append(trust.spearman)
            for key, own, truth in (
                (RIVALS, scores, table[RIVALS]),
                (CLASSES, paired.get(metric), paired.get(CLASSES)),
            ):
                if own is None or truth is None or metric == key:
                    continue
                agreements[metric][key].append(float(agreement(own, truth).nanmean()))
    ordered = sorted(
        (metric for metric in METRICS if metric != RIVALS), key=lambda each: -mean(agreements[each][RIVALS])
    )
    lines += [
        "| metric | agrees with evidence against rivals | agrees with class discrimination | same order elsewhere |"
    ]
    lines += ["|---" * 4 + "|"]
    for metric in ordered:
        values = (mean(agreements[metric][RIVALS]), mean(agreements[metric][CLASSES]), mean(stable[metric]))
        lines.append(f"| {metric} | " + " | ".join(f"{v:.3f}" if v == v else "" for v in values) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--only", choices=MODELS, action="append")
    parser.add_argument("--write-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = DOCS / "metric_trust"
    folder.mkdir(exist_ok=True)
    for model in [] if arguments.write_only else arguments.only or MODELS:
        measure(model, arguments.clips, folder / f"{model}.json")
    found = {model: json.loads(path.read_text()) for model in MODELS if (path := folder / f"{model}.json").exists()}
    write_between(DOCS / "metrics.md", "metric_trust", page(found))


if __name__ == "__main__":
    main()
