"""Count what remains after many calls of each method: hooks, registered functions, threads, files, objects, memory.

    python benchmarks/soak.py --calls 1000 --write    # into docs/results_models.md

Every call creates a new explainer, on one model and two alternating clips. Everything that could accumulate is counted
after a warm-up, and after every twentieth part of the calls. Garbage is collected before each count.
"""

from __future__ import annotations

import argparse
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from evidence import write_between
from torch import Tensor, nn

from captum_staa import (
    RISE,
    STAA,
    AttentionBranch,
    Focus,
    GradCAM,
    SpatioTemporalPerturbation,
    VideoClassifier,
    VideoFeatureAblation,
    VideoOcclusion,
    benchmark,
    feature_masks,
)
from captum_staa._utils import model_state
from captum_staa.attention import capture
from captum_staa.attr import ReleasedSTAA

Call = Callable[[VideoClassifier, Tensor, int], Tensor]
PLAIN, BRANCH = "tiny-videomae-pattern", "tiny-st-abn-pattern"
WARM_UP = 20  # calls
CELL = (8, 24, 24)  # frames and pixels: an eighth of the clip
LAYER = "videomae.encoder.layer.1.layernorm_before"


def _staa(**options: object) -> Call:
    return lambda clf, clip, target: STAA(clf, **options).attribute(clip, target=target)


def _branch(weighting: str) -> Call:
    return lambda clf, clip, target: AttentionBranch(clf).attribute(clip, target=target, weighting=weighting)


def _perturbation(clf: VideoClassifier, clip: Tensor, target: int) -> Tensor:
    return SpatioTemporalPerturbation(clf).attribute(
        clip, target=target, perturbations_per_eval=8, iterations=1, areas=(0.1, 0.5)
    )


def _occlusion(clf: VideoClassifier, clip: Tensor, target: int) -> Tensor:
    return VideoOcclusion(clf).attribute(clip, CELL, CELL, target=target, perturbations_per_eval=8)


def _ablation(clf: VideoClassifier, clip: Tensor, target: int) -> Tensor:
    mask = feature_masks.grid(clip, clf.layout, CELL)
    return VideoFeatureAblation(clf).attribute(clip, target=target, feature_mask=mask, perturbations_per_eval=8)


# By name: the model, and one call that creates a new explainer.
METHODS: dict[str, tuple[str, Call]] = {
    "STAA, relevance": (PLAIN, _staa()),
    "STAA, relevance by Chefer's rule": (PLAIN, _staa(rule="chefer")),
    "STAA, attention": (PLAIN, _staa(mode="attention")),
    "STAA, attention of one layer": (PLAIN, _staa(mode="attention", layers=[-1])),
    "STAA, focus": (PLAIN, _staa(mode="attention", focus=Focus())),
    "STAA, released": (PLAIN, lambda clf, clip, target: ReleasedSTAA(clf).attribute(clip)),
    "GradCAM": (PLAIN, lambda clf, clip, target: GradCAM(clf, LAYER).attribute(clip, target=target)),
    "SpatioTemporalPerturbation": (PLAIN, _perturbation),
    "VideoOcclusion": (PLAIN, _occlusion),
    "VideoFeatureAblation": (PLAIN, _ablation),
    "RISE": (PLAIN, lambda clf, clip, target: RISE(clf).attribute(clip, target=target, n_samples=8)),
    "AttentionBranch, gate": (BRANCH, _branch("gate")),
    "AttentionBranch, grad_gate": (BRANCH, _branch("grad_gate")),
    "AttentionBranch, class_map": (BRANCH, _branch("class_map")),
}


@dataclass(frozen=True)
class Held:
    """Counts of what the process holds, besides memory.

    Attributes:
        hooks: hooks of all kinds on all modules of the model.
        functions: entries in the attention and mask tables of transformers.
        routes: modules, parameters and captures that are temporarily changed.
        threads: Python threads.
        handles: open files, sockets and pipes.
        objects: objects that the garbage collector tracks, without the frozen ones.
    """

    hooks: int
    functions: int
    routes: int
    threads: int
    handles: int
    objects: int


@dataclass(frozen=True)
class Soaked:
    """Result of one method: counts after the warm-up and at the end, and the slope of memory."""

    before: Held
    after: Held
    slope: float  # KiB of resident memory per call, the line of least squares through all samples
    last: float  # the same through the second half
    seconds: float  # per call


def held(model: nn.Module) -> Held:
    """Return the current counts, after garbage collection."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for _ in range(2):
        gc.collect()
    modules = [vars(module) for module in model.modules()]
    return Held(
        hooks=sum(len(state[name]) for state in modules for name in state if name.endswith("_hooks") and state[name]),
        functions=len(AttentionInterface._global_mapping) + len(AttentionMaskInterface._global_mapping),
        routes=len(capture._routes) + len(model_state._frozen) + len(model_state._stance),
        threads=threading.active_count(),
        handles=len(os.listdir("/proc/self/fd")),
        objects=len(gc.get_objects()),
    )


def planted(classifier: VideoClassifier, count: int) -> tuple[list[Tensor], list[int]]:
    """Return clips ``(1, ...)`` in the layout of the classifier, and their labels."""
    clips, labels, _ = benchmark.PlantedClips(seed=3, n=count)[:count]
    clips = clips.transpose(1, 2).contiguous() if classifier.layout.axes == "BCTHW" else clips
    return list(clips.split(1)), labels.tolist()


def resident() -> float:
    """Return the resident memory of the process in KiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024


def soak(name: str, calls: int, warm_up: int = WARM_UP, samples: int = 20) -> Soaked:
    """Call one method ``calls`` times, after a warm-up that is not counted."""
    model, call = METHODS[name]
    classifier = VideoClassifier.from_pretrained(model)
    clips, labels = planted(classifier, 2)
    turns: Iterator[int] = iter(range(warm_up + calls))

    def several(count: int) -> None:
        for turn in (next(turns) for _ in range(count)):
            at = turn % 2
            call(classifier, clips[at], labels[at])

    several(warm_up)
    gc.collect()
    frozen = gc.get_freeze_count()
    gc.freeze()  # existing objects are not scanned again, so the collection after every sample is fast
    try:
        before, start = held(classifier), time.perf_counter()
        memory, done = [resident()], [0]
        for part in np.array_split(np.arange(calls), min(samples, calls)):
            several(len(part))
            gc.collect()
            memory.append(resident())
            done.append(int(part[-1]) + 1)
        seconds = (time.perf_counter() - start) / calls
        after = held(classifier)
    finally:
        if not frozen:
            gc.unfreeze()
    slopes = [float(np.polyfit(done[first:], memory[first:], 1)[0]) for first in (0, len(done) // 2)]
    return Soaked(before, after, slopes[0], slopes[1], seconds)


def summary(found: dict[str, Soaked]) -> str:
    """Return what has grown in any method, and the ranges of the rest."""
    changed = [
        f"{name}: {what} {getattr(one.before, what)} → {getattr(one.after, what)}"
        for name, one in found.items()
        for what in ("hooks", "functions", "threads", "handles")
        if getattr(one.before, what) != getattr(one.after, what)
    ]
    objects = max(one.after.objects - one.before.objects for one in found.values())
    slopes, last = ([getattr(one, name) for one in found.values()] for name in ("slope", "last"))
    return (
        f"{'; '.join(changed) or 'None of them has changed for any method'}. At most {objects} objects more are\n"
        f"tracked. The resident memory changes by {min(slopes):+.1f} to {max(slopes):+.1f} KiB per call, and by "
        f"{min(last):+.1f} to {max(last):+.1f} in the second half: the allocator\nkeeps freed memory and returns it in "
        "pieces."
    )


DOCS = Path(__file__).parents[1] / "docs"
TEXT = """\
Counted before and after {calls} calls of each of {methods} methods, on one model and two clips, with a new explainer in
every call: hooks on all modules, entries in the attention and mask tables of transformers, threads, open files, and
objects that Python's garbage collector tracks. {summary} A leak of one map would be {map} KiB per call. Made by
`python benchmarks/soak.py --calls {calls} --write`, with PyTorch {torch}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--write", action="store_true", help="into docs/results_models.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in options.methods:
        found[name] = soak(name, options.calls)
        print(f"{name}: {found[name]}", flush=True)
    text = TEXT.format(
        calls=options.calls,
        methods=len(found),
        torch=torch.__version__.split("+")[0],
        map=16 * 48 * 48 * 4 // 1024,
        summary=summary(found),
    )
    if options.write:
        write_between(DOCS / "results_models.md", "soak", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
