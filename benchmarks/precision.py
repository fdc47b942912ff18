"""Measure how maps depend on precision, batches, chunks and threads, and the memory for a long clip.

    python benchmarks/precision.py                     # all three tables of docs/results_models.md
    python benchmarks/precision.py half --clips 8      # one of them
    python benchmarks/precision.py same
    python benchmarks/precision.py long

``half``: model and clip cast to bfloat16 and to float16; Spearman's rank correlation of each map ``(T, H, W)`` with
that of float32, as the mean over clips and the lowest. ``same``: the largest difference over the map's largest
magnitude. ``long``: peak resident memory of a call on one clip of 64 frames of 224 x 224, in a separate process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
from collections.abc import Callable
from typing import Any

import torch
import transformers
from captum.attr import IntegratedGradients, Saliency
from torch import Tensor

from captum_staa import (
    RISE,
    STAA,
    AttentionBranch,
    GradCAM,
    SpatioTemporalPerturbation,
    VideoAttribution,
    VideoClassifier,
    VideoFeatureAblation,
    VideoOcclusion,
    feature_masks,
)
from captum_staa.benchmark import PlantedClips
from captum_staa.benchmark.registry import named_layer
from captum_staa.metrics._shared import midranks, pearson
from captum_staa.models.resnet3d import ResNet3D
from captum_staa.models.st_abn.network import st_abn_of

MODELS = ("videomae", "timesformer", "vivit", "vjepa2", "resnet3d", "st-abn")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
KEPT = 0.995  # rows whose lowest rank correlation is at least this are left out of the table
Call = Callable[[Tensor, Any], Tensor]


def methods(clf: VideoClassifier, perturbations_per_eval: int = 8) -> dict[str, Call]:
    """Return all methods that apply to a model, as functions of a clip and its target."""
    found: dict[str, Call] = {}
    if clf.family is not None:
        found["STAA (relevance)"] = lambda x, y: STAA(clf).attribute(x, y)
        found["STAA (relevance, chefer)"] = lambda x, y: STAA(clf, rule="chefer").attribute(x, y)
        found["STAA (attention)"] = lambda x, y: STAA(clf, mode="attention").attribute(x)
        found["STAA (attention, last layer)"] = lambda x, y: STAA(clf, mode="attention", layers=[-1]).attribute(x)
    found["Saliency"] = lambda x, y: Saliency(clf).attribute(x.clone().requires_grad_(), target=y)
    found["IntegratedGradients (10 steps)"] = lambda x, y: IntegratedGradients(clf).attribute(
        x, target=y, n_steps=10, internal_batch_size=perturbations_per_eval
    )
    branch = None if st_abn_of(clf) is None else AttentionBranch(clf)
    for weighting in ("gate", "class_map") if branch else ():
        found[f"AttentionBranch ({weighting})"] = lambda x, y, w=weighting: branch.attribute(x, y, weighting=w)
    for end, weighting in () if branch else (("first", "hirescam"), ("last", "gradcam")):
        cam = GradCAM(clf, named_layer(clf, end), weighting=weighting)  # type: ignore[arg-type]
        found[f"GradCAM ({weighting}, {end} layer)"] = lambda x, y, cam=cam: cam.attribute(x, y)
    found["VideoFeatureAblation (frames)"] = lambda x, y: VideoFeatureAblation(clf).attribute(
        x, target=y, feature_mask=feature_masks.frames(x, clf.layout), perturbations_per_eval=perturbations_per_eval
    )
    found["VideoOcclusion"] = lambda x, y: VideoOcclusion(clf).attribute(
        x, (4, 16, 16), (4, 8, 8), target=y, perturbations_per_eval=perturbations_per_eval
    )
    found["RISE (50 masks)"] = lambda x, y: RISE(clf).attribute(
        x, target=y, perturbations_per_eval=perturbations_per_eval, n_samples=50
    )
    if isinstance(clf.module, ResNet3D):  # the method is the same on other models, but slower
        found["SpatioTemporalPerturbation (10 steps)"] = lambda x, y: SpatioTemporalPerturbation(clf).attribute(
            x, target=y, perturbations_per_eval=perturbations_per_eval, iterations=10
        )
    return found


def half(count: int, models: list[str]) -> list[str]:
    """Return the table of rank correlations, with one column per model."""
    cells: dict[str, dict[str, str]] = {}
    lowest: dict[str, float] = {}  # rank correlation of each method
    for model in models:
        name = f"tiny-{model}-pattern"
        clf = VideoClassifier.from_pretrained(name)
        clips, labels, _ = PlantedClips(seed=12, n=count)[:count]
        clips = clf.layout.from_working(clips)
        for method, call in methods(clf).items():
            wanted = [_map(call(clips[i : i + 1], labels[i : i + 1]), clf) for i in range(count)]
            entries = []
            for dtype in DTYPES.values():
                cast = methods(VideoClassifier.from_pretrained(name, dtype=dtype))[method]
                try:
                    given = [cast(clips[i : i + 1].to(dtype), labels[i : i + 1]) for i in range(count)]
                except Exception as error:
                    entries.append(type(error).__name__)
                    lowest[method] = 0.0
                    continue
                each = [float(_spearman(_map(x, clf), y)) for x, y in zip(given, wanted, strict=True)]
                entries.append(f"{sum(each) / count:.3f} ({min(each):.3f})")
                lowest[method] = min(lowest.get(method, 1.0), *each)
            cells.setdefault(method, {})[model] = " · ".join(entries)
            print(method, model, cells[method][model], flush=True)
    rows = ["| | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    return rows + [
        f"| {method} | " + " | ".join(of.get(model, "") for model in models) + " |"
        for method, of in cells.items()
        if round(lowest[method], 3) < KEPT
    ]


def same() -> list[str]:
    """Return the table of differences between equivalent calls."""
    clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    clips, labels, _ = PlantedClips(seed=12, n=3)[:3]
    rows = ["| | again | clip alone | chunks of 3 | two threads |", "|---|---|---|---|---|"]
    for method, call in methods(clf).items():
        torch.set_num_threads(1)
        first = call(clips, labels)
        again = call(clips, labels)
        alone = torch.cat([call(clips[i : i + 1], labels[i : i + 1]) for i in range(3)])
        chunks = methods(clf, 3)[method](clips, labels)
        torch.set_num_threads(2)
        threads = call(clips, labels)
        entries = [_apart(other, first) for other in (again, alone, chunks, threads)]
        rows.append(f"| {method} | " + " | ".join(entries) + " |")
        print(rows[-1], flush=True)
    torch.set_num_threads(1)
    return rows


def long() -> list[str]:
    """Return the table of memory. The model is a small VideoMAE: 2 layers of width 96, 6272 tokens."""
    ways = {
        "plain forward": torch.no_grad()(lambda clf, x: clf(x)),
        "forward and backward": lambda clf, x: Saliency(clf).attribute(x.requires_grad_(), target=0),
        "STAA (attention, last layer)": lambda clf, x: STAA(clf, mode="attention", layers=[-1]).attribute(x),
        "STAA (attention)": lambda clf, x: STAA(clf, mode="attention").attribute(x),
        "STAA attribute_temporal": lambda clf, x: STAA(clf, mode="attention").attribute_temporal(x),
        "STAA (relevance)": lambda clf, x: STAA(clf).attribute(x, 0),
        "GradCAM (hirescam, first layer)": lambda clf, x: GradCAM(
            clf, "videomae.encoder.layer.0.layernorm_before", weighting="hirescam"
        ).attribute(x, 0),
        "VideoOcclusion (8 windows)": lambda clf, x: VideoOcclusion(clf).attribute(
            x, (8, 224, 224), (8, 224, 224), target=0
        ),
    }
    rows = ["| | peak, MiB | above the model and the clip, MiB |", "|---|---|---|"]
    context: Any = multiprocessing.get_context("fork")
    for name, way in ways.items():
        here, there = context.Pipe(duplex=False)
        child = context.Process(target=_peak, args=(way, there))
        child.start()
        before, after = here.recv()
        child.join()
        rows.append(f"| {name} | {after:.0f} | {after - before:.0f} |")
        print(rows[-1], flush=True)
    return rows


def _peak(way: Callable[[VideoClassifier, Tensor], Any], parent: Any) -> None:
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(
        num_frames=64,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=384,
        num_labels=400,
    )
    clf = VideoClassifier(transformers.VideoMAEForVideoClassification(config).eval())
    clip = torch.randn(1, 64, 3, 224, 224)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    way(clf, clip)
    parent.send((before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def _map(attributions: Tensor, clf: VideoClassifier) -> Tensor:
    return VideoAttribution.from_attributions(attributions, clf.layout).joint.flatten(1)


def _spearman(found: Tensor, wanted: Tensor) -> Tensor:
    return pearson(midranks(found.double()), midranks(wanted.double()))


def _apart(found: Tensor, wanted: Tensor) -> str:
    if torch.equal(found, wanted):
        return "equal"
    return f"{float((found - wanted).abs().max() / wanted.abs().max()):.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="*", metavar="TABLE", help="half, same, long; all by default")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--clips", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    made = {"half": lambda: half(arguments.clips, arguments.models), "same": same, "long": long}
    tables = {name: made[name]() for name in arguments.table or made}
    for name, rows in tables.items():
        print(f"\n{name}\n\n" + "\n".join(rows))


if __name__ == "__main__":
    main()
