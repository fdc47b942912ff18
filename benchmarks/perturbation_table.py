"""Compare spatio-temporal perturbation with other methods: planted evidence, insertion and deletion.

    python benchmarks/perturbation_table.py                  # four clips of four models, half an hour of one core
    python benchmarks/perturbation_table.py --only resnet3d-motion --clips 2
    python benchmarks/perturbation_table.py --papers         # also the presets of the papers: 400 steps each
    python benchmarks/perturbation_table.py --write-only     # the page only, from the existing results

Each method is stored in the file of its model when it is finished, and a second start continues after it.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from captum.attr import IntegratedGradients
from evidence import COLUMNS, Evidence, averaged, best_control, markdown, means, smoothed
from torch import Tensor
from tqdm import tqdm

from captum_staa import RISE, STAA, GradCAM, SpatioTemporalPerturbation, VideoClassifier, VideoOcclusion, metrics
from captum_staa.benchmark.registry import end_layer

MODELS = ("videomae-pattern", "resnet3d-motion", "timesformer-order", "vivit-motion")
SEED = 70_000
CELLS, STEPS = (1, 3, 3), 128  # 16 cells along each side of a frame
DOCS = Path(__file__).parents[1] / "docs"
FOLDER = DOCS / "perturbation"
SHOWN = {
    **{key: title for key, title in COLUMNS.items() if key not in ("space", "pointing")},
    "insertion": "insertion",
    "deletion": "deletion",
    "forwards": "forwards",
}
INTRO = """# Spatio-temporal perturbation: the table

Means over {models} bundled models, {clips} clips of each. Columns and controls as in
[planted evidence](planted.md#how-to-read-the-tables); only the default preset has controls. Insertion (high
is good) and deletion (low is good): the area under the target's probability over {steps} steps, cells of 1 x 3 x 3
pixels, towards zero. `nested` is the default. *From relevance* begins with STAA's map, or HiResCAM's of the first stage
of a CNN, in place of its warm start. Made by `python benchmarks/perturbation_table.py`.
"""
Explain = Callable[[Tensor, Tensor], Tensor]  # clips, targets -> maps (B, T, H, W)


def methods(clf: VideoClassifier, papers: bool) -> dict[str, Explain]:
    layout, integrated = clf.layout, IntegratedGradients(clf)

    def quick(clips: Tensor, targets: Tensor) -> Tensor:
        """Signed relevance at the cost of a forward and a backward."""
        if clf.grid is not None:
            return STAA(clf).attribute_maps(clips, targets).joint
        layer = end_layer(clf, "first")
        assert layer is not None
        return smoothed(GradCAM(clf, layer).attribute_maps(clips, targets).joint)

    def learned(preset: str = "nested", relevance: bool = False, **options: object) -> Explain:
        method = SpatioTemporalPerturbation(clf, preset=preset)

        def explain(clips: Tensor, targets: Tensor) -> Tensor:
            start = {"init": quick(clips, targets)} if relevance else {}
            return method.attribute_maps(clips, target=targets, perturbations_per_eval=2, **options, **start).joint

        return explain

    def times_relevance(clips: Tensor, targets: Tensor) -> Tensor:
        return learned(relevance=True)(clips, targets) * quick(clips, targets).clamp(min=0)

    _, h, w = (2, 8, 8) if clf.grid is None else clf.grid.tubelet
    found: dict[str, Explain] = {
        "nested": learned(),
        "nested, its warm start alone": learned(iterations=0),
        "nested, from relevance": learned(relevance=True),
        "nested, from relevance, times its positive part": times_relevance,
        "nested, preserve only": learned(objective="preserve"),
        "nested, towards zero alone": learned(baselines=0),
        "nested, smooth in space and time": learned(regularizer="tv"),
        "quick relevance (STAA or HiResCAM)": quick,
        "IntegratedGradients (20), signed, smoothed": lambda x, y: smoothed(
            layout.reduce(integrated.attribute(x, target=y, n_steps=20, internal_batch_size=40))
        ),
        "VideoOcclusion (4 frames x 2 x 2 cells)": lambda x, y: layout.reduce(
            VideoOcclusion(clf).attribute(x, (4, 2 * h, 2 * w), (4, h, w), target=y, perturbations_per_eval=4)
        ),
        "RISE (400)": lambda x, y: layout.reduce(
            RISE(clf).attribute(x, target=y, n_samples=400, perturbations_per_eval=8)
        ),
    }
    return found | ({"step": learned("step"), "3d-ep": learned("3d-ep")} if papers else {})


def measure(model: str, count: int, papers: bool, path: Path) -> None:
    clf, task = VideoClassifier.from_pretrained(f"tiny-{model}"), model.split("-")[1]
    evidence = Evidence(clf, task, count, SEED)
    clips, labels, _ = evidence.planted[:]
    clips = clf.layout.from_working(clips).contiguous()
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}

    def curves(maps: Tensor) -> dict[str, float]:
        both = metrics.insertion_deletion(
            clf, clips, maps, target=labels, cells=CELLS, steps=STEPS, perturbations_per_eval=8
        )
        return {"insertion": float(both.insertion.score.mean()), "deletion": float(both.deletion.score.mean())}

    with torch.no_grad():
        clf(clips)
        began = time.process_time()
        clf(clips)
        forward = time.process_time() - began
    for name, explain in tqdm(methods(clf, papers).items(), desc=model):
        if name in found:
            continue
        began = time.process_time()
        maps = explain(clips, labels)
        cost = (time.process_time() - began) / forward
        own = means(evidence.scores(lambda x, y, name=name, explain=explain: {name: explain(x, y)}, name == "nested"))
        found[name] = {**own[name], **curves(maps), "forwards": cost}
        path.with_suffix(".part").write_text(json.dumps(found, indent=1) + "\n")
        path.with_suffix(".part").replace(path)
    found |= best_control(means(evidence.without_a_model()))
    path.write_text(json.dumps(found, indent=1) + "\n")


def page(results: dict[str, dict[str, dict[str, float]]], clips: int) -> str:
    lines = [INTRO.format(models=len(results), clips=clips, steps=STEPS)]
    lines += markdown(averaged(results.values()), SHOWN)
    for model, found in results.items():
        lines += ["", f"## {model}", "", *markdown(found, SHOWN)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--only", choices=MODELS, action="append")
    parser.add_argument("--papers", action="store_true")
    parser.add_argument("--write-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Input Tensor . did not already require gradients")
    FOLDER.mkdir(exist_ok=True)
    for model in [] if arguments.write_only else arguments.only or MODELS:
        measure(model, arguments.clips, arguments.papers, FOLDER / f"{model}.json")
    found = {model: json.loads(path.read_text()) for model in MODELS if (path := FOLDER / f"{model}.json").exists()}
    (DOCS / "perturbation_table.md").write_text(page(found, arguments.clips))


if __name__ == "__main__":
    main()
