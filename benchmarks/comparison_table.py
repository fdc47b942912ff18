"""Compare all methods by all metrics on planted clips of eighteen bundled models: docs/comparison.md.

    python benchmarks/comparison_table.py                        # some hours on one core
    python benchmarks/comparison_table.py --only vivit-motion    # one model, and the page from the existing results
    python benchmarks/comparison_table.py --write-only           # the page again

The perturbation presets of the papers need hundreds of steps, so they run on fewer clips (``--slow-clips``) and have a
separate table. Every finished clip and method is stored under ``--work``, and a second start continues there. The
numbers of a model are in docs/comparison/MODEL.json, and its table is docs/comparison/MODEL.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from compared import page
from compared.stored import keep, kept

from captum_staa import VideoClassifier
from captum_staa.benchmark import METHODS, METRICS, PlantedClips, compare

FAMILIES = ("videomae", "timesformer", "vivit", "vjepa2", "resnet3d", "st-abn")
TASKS = ("pattern", "motion", "order")
SLOW = ("STEP", "Extremal perturbation (3D)", "Extremal perturbation (2D)")
SHEETS = ("videomae-motion", "resnet3d-pattern")  # models whose contact sheets are on the page
SEED = 80_000
DOCS = Path(__file__).parents[1] / "docs"
FOLDER = DOCS / "comparison"


def measure(model: str, clips: int, slow_clips: int, work: Path, device: str) -> None:
    """Run both comparisons of one model, and continue earlier runs."""
    classifier = VideoClassifier.from_pretrained(f"tiny-{model}").to(device)
    task = model.rpartition("-")[2]
    fast = [name for name in METHODS if name not in SLOW]
    slow_metrics = [name for name in METRICS if name != "memory"]  # memory needs a second call
    for kind, count, methods, metrics in (
        ("", clips, fast, list(METRICS)),
        ("-papers", slow_clips, [*SLOW, "STEP (nested)"], slow_metrics),
    ):
        out = work / f"{model}{kind}"
        planted = PlantedClips(seed=SEED, n=count, task=task)
        found = compare(classifier, planted, methods, metrics, out=out, resume=out.exists())
        if found.interrupted:
            raise KeyboardInterrupt
        keep(found, FOLDER / f"{model}{kind}.json")
        if not kind and model in SHEETS:
            page.save(found.plot()["sheet"], DOCS / "images" / f"comparison-{model}.webp")


def main() -> None:
    models = [f"{family}-{task}" for family in FAMILIES for task in TASKS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--slow-clips", type=int, default=1)
    parser.add_argument("--only", choices=models, action="append")
    parser.add_argument("--work", type=Path, default=Path("build") / "comparison")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for model in [] if arguments.write_only else arguments.only or models:
        measure(model, arguments.clips, arguments.slow_clips, arguments.work, arguments.device)
    held = {name: FOLDER / f"{name}.json" for model in models for name in (model, f"{model}-papers")}
    page.write({name: kept(path) for name, path in held.items() if path.exists()}, DOCS)


if __name__ == "__main__":
    main()
