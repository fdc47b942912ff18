"""Which metric can be trusted: how alike it ranks methods from clip to clip, and how well it agrees with the truth.

    python benchmarks/metric_trust.py                      # 200 clips of three models, some 80 minutes on one core
    python benchmarks/metric_trust.py --only videomae-pattern --clips 16
    python benchmarks/metric_trust.py --write-only            # the page again, from the results at hand

Every batch of clips is written as soon as it is scored; a second start goes on behind it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from torch import Tensor
from tqdm import tqdm

from captum_staa import STAA, GradCAM, VideoClassifier, VideoOcclusion, metrics
from captum_staa.benchmark import PlantedClips

MODELS = ("videomae-pattern", "timesformer-motion", "vivit-order")
SEED, BATCH, STEPS = 50_000, 10, 16
DOCS = Path(__file__).parents[1] / "docs"
Maps = dict[str, Tensor]
FAITHFUL = ("insertion", "deletion", "faithfulness", "monotonicity", "faithfulness_correlation", "aopc", "saco")
TRUE = ("auroc", "average_precision", "pointing_game", "energy_inside", "relevance_rank_accuracy")
METRICS = (*FAITHFUL, *TRUE)
Found = dict[str, list[list[float]]]  # of each method, clips x METRICS


def maps_of(clf: VideoClassifier, clips: Tensor, labels: Tensor, generator: torch.Generator) -> Maps:
    """``(B, T, H, W)`` of every method and control; gradients by magnitude, as their signs flip from pixel to pixel."""
    assert clf.grid is not None
    _, h, w = clf.grid.tubelet
    norm = next(name for name, _ in clf.module.named_modules() if name.endswith("layernorm_before"))
    gradients: dict[str, Callable[[], Tensor]] = {
        "Saliency": lambda: Saliency(clf).attribute(clips, target=labels),
        "InputXGradient": lambda: InputXGradient(clf).attribute(clips, target=labels).detach(),
        "IntegratedGradients (20)": lambda: IntegratedGradients(clf).attribute(
            clips, target=labels, n_steps=20, internal_batch_size=4 * BATCH
        ),
        "GradCAM (hirescam), first block": lambda: GradCAM(clf, norm, weighting="hirescam").attribute(
            clips, target=labels
        ),
    }
    signed: dict[str, Callable[[], Tensor]] = {
        "STAA relevance": lambda: STAA(clf).attribute(clips, target=labels),
        "STAA relevance (chefer)": lambda: STAA(clf, rule="chefer").attribute(clips, target=labels),
        "STAA attention": lambda: STAA(clf, mode="attention").attribute(clips),
        "VideoOcclusion": lambda: VideoOcclusion(clf).attribute(
            clips, (4, 2 * h, 2 * w), (4, h, w), target=labels, perturbations_per_eval=4
        ),
    }
    maps = {name: clf.layout.reduce(make()) for name, make in signed.items()}
    maps |= {name: clf.layout.reduce(make()).abs() for name, make in gradients.items()}
    return maps | metrics.controls(clips, clf.layout, maps["STAA relevance"], generator=generator)


def scores_of(clf: VideoClassifier, clips: Tensor, labels: Tensor, truth: Tensor, maps: Tensor) -> dict[str, Tensor]:
    """``(B,)`` per metric, as the metric has it."""
    # two copies of the batch per evaluation: activations of more do not fit a core's cache
    call = {"forward_func": clf, "clip": clips, "attributions": maps, "perturbations_per_eval": 2}
    curves = metrics.causal(**call, target=labels, steps=STEPS)
    return {
        "insertion": curves.insertion.score,
        "deletion": curves.deletion.score,
        "faithfulness": metrics.faithfulness(**call),
        "monotonicity": metrics.monotonicity(**call),
        "faithfulness_correlation": metrics.faithfulness_correlation(**call, target=labels, n_subsets=32),
        "aopc": metrics.aopc(**call, target=labels),
        "saco": metrics.saco(**call, target=labels),
        **{name: getattr(metrics, name)(maps, truth) for name in TRUE},
    }


def measure(model: str, count: int, path: Path) -> None:
    clf = VideoClassifier.from_pretrained(f"tiny-{model}")
    planted = PlantedClips(seed=SEED, n=count, task=model.split("-")[1])
    found: Found = json.loads(path.read_text()) if path.exists() else {}
    for start in tqdm(range(len(found.get("random", ())), count, BATCH), desc=model):
        clips, labels, truth = planted[start : min(start + BATCH, count)]
        for name, maps in maps_of(clf, clips, labels, torch.Generator().manual_seed(start)).items():
            scores = scores_of(clf, clips, labels, truth, maps)
            rows = torch.stack([scores[metric] for metric in METRICS], dim=1)  # (B, metrics)
            found.setdefault(name, []).extend([round(value, 5) for value in row] for row in rows.tolist())
        path.with_suffix(".part").write_text(json.dumps(found, separators=(",", ":")))
        path.with_suffix(".part").replace(path)


def good(metric: str) -> int:
    """1 where higher is better, else -1."""
    return 1 if getattr(metrics, metric).higher_is_better else -1


def ranks(values: Tensor) -> Tensor:
    """``(N, M)``: places within each row, equal values sharing theirs."""
    above, equal = values[:, :, None] > values[:, None], values[:, :, None] == values[:, None]
    return above.sum(2) + equal.sum(2) / 2


def agreement(scores: Tensor, truth: Tensor) -> Tensor:
    """``(N,)``: of each clip, Spearman's correlation over methods of two ``(N, M)``; nan where a score is."""
    a, b = (x - x.mean(1, keepdim=True) for x in (ranks(scores), ranks(truth)))
    values = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return values.masked_fill(scores.isnan().any(1), torch.nan)


def values_of(found: Found, metric: str, names: list[str]) -> Tensor:
    """``(N, M)``; no positive attribution at all puts none of it inside."""
    column = METRICS.index(metric)
    values = torch.tensor([[row[column] for row in found[name]] for name in names], dtype=torch.float64).T
    return values.nan_to_num(0.0) if metric == "energy_inside" else values


def page(results: dict[str, Found]) -> str:
    fewest, *_, most = sorted(len(found["random"]) for found in results.values())
    lines = [
        "# Which metric can be trusted",
        "",
        f"{most if fewest == most else f'{fewest} to {most}'} planted clips of each of {', '.join(results)}.",
        "Eight methods, and the controls random, centre and inverted; uniform has no ranks and stands in the second",
        f"tables only. {STEPS} steps, cells of a tubelet, baseline zero. Made by `python benchmarks/metric_trust.py`.",
        "",
        "Reliability: does a metric rank the methods alike on every clip? Mean Spearman over pairs of clips with its",
        "95 % bootstrap interval, Krippendorff's alpha, and the STEP paper's weighted mean. Agreement: of each clip,",
        "Spearman over methods with the joint AUROC against the planted truth; mean over clips with its 95 % interval.",
        "",
    ]
    for model, found in results.items():
        names = [name for name in found if name != "uniform"]
        table = {metric: good(metric) * values_of(found, metric, names) for metric in METRICS}
        lines += [
            f"## {model}",
            "",
            "| metric | Spearman | interval | Krippendorff | weighted | agreement with the truth |",
        ]
        lines.append("|---|---|---|---|---|---|")
        for metric, scores in table.items():
            trust = metrics.reliability(scores, random=names.index("random"), n_bootstrap=500)
            low, high = trust.spearman_interval
            agree = agreement(scores, table["auroc"])
            agree = agree[~agree.isnan()]
            mean, error = agree.mean(), 1.96 * agree.std() / len(agree) ** 0.5
            cell = "" if metric == "auroc" else f"{mean:.3f} ± {error:.3f}"
            lines.append(
                f"| {metric} | {trust.spearman:.3f} | {low:.3f} to {high:.3f} | {trust.krippendorff:.3f} "
                f"| {trust.weighted:.3f} | {cell} |"
            )
        lines += [
            "",
            "| method | " + " | ".join(METRICS) + " |",
            "|---" * (len(METRICS) + 1) + "|",
        ]
        for name in found:
            values = [values_of(found, metric, [name]).nanmean() for metric in METRICS]
            lines.append(f"| {name} | " + " | ".join("–" if v.isnan() else f"{v:.3f}" for v in values) + " |")
        lines.append("")
    return "\n".join(lines).replace("nan ± nan", "–").replace("nan to nan", "–").replace("| nan ", "| – ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--only", choices=MODELS, action="append")
    parser.add_argument("--write-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = DOCS / "metric_trust"
    folder.mkdir(exist_ok=True)
    for model in [] if arguments.write_only else arguments.only or MODELS:
        measure(model, arguments.clips, folder / f"{model}.json")
    found = {model: json.loads(path.read_text()) for model in MODELS if (path := folder / f"{model}.json").exists()}
    (DOCS / "metric_trust.md").write_text(page(found))


if __name__ == "__main__":
    main()
