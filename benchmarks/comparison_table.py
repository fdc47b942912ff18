"""Compare methods on planted clips of eleven small models, with their controls: docs/comparison.md.

    python benchmarks/comparison_table.py                         # about half an hour on one core
    python benchmarks/comparison_table.py --only vivit-order      # one model, and the page from the existing results
    python benchmarks/comparison_table.py --write-only            # the page again

Every finished clip and method is stored under ``--work``, and a second start continues there. The numbers of a model
are in docs/comparison/MODEL.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from compared import page
from compared.stored import keep, kept
from compared.subjects import SUBJECTS
from torch import Tensor

from captum_staa.benchmark import MetricInput, MetricOptions, PlantedClips, SceneOptions, compare
from captum_staa.metrics import evidence_against_rivals

# The first that applies is the one whose controls are shown. The others of METHODS are variants of these, or take
# hundreds of forwards for what RISE and VideoOcclusion measure, too.
METHODS = (
    "STAA (relevance)",
    "STAA",
    "AnswerAttribution",
    "AttentionBranch (gate)",
    "AttentionBranch (grad_gate)",
    "GradCAM",
    "GradCAM (last)",
    "Saliency",
    "InputXGradient",
    "IntegratedGradients",
    "VideoOcclusion",
)
SLOW = ("RISE", "STEP (nested)")  # some hundred forwards, so they explain the first clips only
METRICS = (
    "rivals",
    "rivals_time",
    "rivals_space",
    "auroc",
    "object_pointing",
    "insertion",
    "deletion",
    "seconds",
    "forwards",
)
# Of the baselines, insertion and deletion with the mean frame agree best with known evidence (docs/metrics.md).
OPTIONS = MetricOptions(baseline="mean_frame", steps=10)
SEED = 80_000  # no option was chosen on these clips
DOCS = Path(__file__).parents[1] / "docs"
FOLDER = DOCS / "comparison"


def classes(case: MetricInput) -> Tensor:
    """Return how far the map of one class prefers its evidence to that of another class in the same clip; .5 is chance.

    For clips of two classes, whose first two objects are the evidence of the explained class and of the other one.
    """
    assert case.objects is not None
    return evidence_against_rivals(case.maps, case.objects[:, 0], case.objects[:, 1])


classes.higher_is_better = True  # type: ignore[attr-defined]


def measure(name: str, clips: int, slow: int, pairs: int, work: Path, device: str) -> None:
    """Run the comparison of one model, and continue an earlier run."""
    subject = SUBJECTS[name]
    classifier = subject.load().to(device)
    own = subject.own(classifier)
    methods = {method: own.get(method, method) for method in METHODS if method != "AnswerAttribution" or method in own}
    few = dict(zip(SLOW, SLOW, strict=True))
    runs: dict[str, tuple[PlantedClips, Any, dict[str, Any]]] = {
        "": (PlantedClips(SEED, clips, subject.task), METRICS, methods),
        "-slow": (PlantedClips(SEED, slow, subject.task), METRICS, few),
    }
    if subject.task != "order":  # which has no clips of two classes
        two = PlantedClips(SEED + 1, pairs, subject.task, scene=SceneOptions(two_classes=True))
        runs["-classes"] = (two, {"classes": classes}, methods | few)
    for kind, (planted, metrics, asked) in runs.items():
        out = work / f"{name}{kind}"
        found = compare(
            classifier,
            planted,
            asked,
            metrics,
            out=out,
            resume=True,
            metric_options=OPTIONS,
            perturbations_per_eval=16,
            model_controls=kind != "-slow",
        )
        if found.interrupted:
            raise KeyboardInterrupt
        keep(found, FOLDER / f"{name}{kind}.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--slow-clips", type=int, default=8, help=f"for {' and '.join(SLOW)}")
    parser.add_argument("--pairs", type=int, default=8, help="clips of two classes")
    parser.add_argument("--only", choices=tuple(SUBJECTS), action="append")
    parser.add_argument("--work", type=Path, default=Path("build") / "comparison")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name in [] if arguments.write_only else arguments.only or SUBJECTS:
        counts = (arguments.clips, arguments.slow_clips, arguments.pairs)
        measure(name, *counts, arguments.work, arguments.device)
    held = {f"{name}{kind}": FOLDER / f"{name}{kind}.json" for name in SUBJECTS for kind in page.KINDS}
    page.write({name: kept(path) for name, path in held.items() if path.exists()}, DOCS)


if __name__ == "__main__":
    main()
