"""Measure everything that depends on a GPU, in one command and under ten minutes: docs/results_models.md.

    python benchmarks/gpu.py                  # on any machine with CUDA
    python benchmarks/gpu.py --dry-run        # the same code on the CPU, with tiny models, in seconds; writes no page

``cost``: time and memory of each method on a VideoMAE of the size of base with random weights, one clip of 16 x 224 x
224, relative to a plain forward; in float32, bfloat16 and float16. ``batch``: altered clips per second, by
``perturbations_per_eval``. ``streams``: frames per second with and without an explanation. ``agreement``: maps of the
bundled models on the GPU, in each precision, against those of the CPU in float32.

Each table is measured until its share of ``--minutes`` is used up, and says what is left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import precision
import stream
import torch
from evidence import write_between
from torch import Tensor

from captum_staa import SpatioTemporalPerturbation, VideoClassifier, VideoOcclusion
from captum_staa.benchmark import PlantedClips
from captum_staa.benchmark.clip_runner import with_cost

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AGREEING = ("videomae", "timesformer", "resnet3d", "st-abn")
SHARES = {"cost": 0.5, "batch": 0.1, "streams": 0.15, "agreement": 0.25}
BATCHES = (1, 4, 16, 64)
ROUNDS = 3
PAGE = Path(__file__).parents[1] / "docs" / "results_models.md"
TEXT = """{machine}. Made by `python benchmarks/gpu.py`.

### Cost on a GPU

A VideoMAE of the size of base with random weights, one clip of 16 x 224 x 224. Times are medians of {rounds} calls and
are relative to a plain forward of the same precision, which takes the milliseconds in the first row. Memory is the peak
above the model and the clip, relative to that of the forward.

{cost}

### Altered clips per second

`VideoOcclusion` by `perturbations_per_eval`, in bfloat16.

{batch}

### Streams on a GPU

{streams}

### Agreement with the CPU

Spearman's rank correlation of the map of each method with that of the CPU in float32, on planted clips: the mean and,
in parentheses, the lowest. Equal maps have 1.

{agreement}
"""
Rows = Iterator[str]


def cost_rows(device: str, dry: bool) -> Rows:
    """Yield the rows of costs: relative time, and relative memory in parentheses, by precision."""
    name = "tiny-videomae-pattern" if dry else "base"
    dtypes = {kind: DTYPES[kind] for kind in ("float32", "bfloat16")} if dry else DTYPES
    classifiers = {kind: stream.build(name, device)[0].to(dtype) for kind, dtype in dtypes.items()}
    yield "| | " + " | ".join(classifiers) + " |"
    yield "|---" * (len(classifiers) + 1) + "|"
    clips = {kind: clip_of(clf, device) for kind, clf in classifiers.items()}
    plain = {kind: seconds(partial(forward, clf, clips[kind])) for kind, clf in classifiers.items()}
    yield "| forward, ms | " + " | ".join(f"{1000 * plain[kind]:.1f}" for kind in classifiers) + " |"
    calls = {kind: costly(clf, dry) for kind, clf in classifiers.items()}
    for method in next(iter(calls.values())):
        cells = []
        for kind, clf in classifiers.items():
            call = calls[kind][method]
            try:
                costs = [
                    with_cost(partial(call, clips[kind]), clf, clips[kind], memory=True)[1]
                    for _ in range(1 if dry else ROUNDS + 1)
                ]
            except Exception as error:  # one precision that a method refuses must not end the run
                cells.append(type(error).__name__)
                continue
            time_ratio, memory = (
                statistics.median(getattr(c, of) for c in costs[-ROUNDS:]) for of in ("forwards", "memory")
            )
            cells.append(f"{time_ratio:.1f} ({memory:.1f})")
        yield f"| {method} | {' | '.join(cells)} |"


def costly(clf: VideoClassifier, dry: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the methods whose cost is measured, as functions of a clip."""
    side = 24 if dry else 32
    steps: dict[str, Any] = {"iterations": 1} if dry else {}
    given = {
        name: call for name, call in precision.methods(clf).items() if name.startswith(("STAA", "Saliency", "Grad"))
    }
    return {
        **{name: lambda clip, call=call: call(clip, 0) for name, call in given.items()},
        "VideoOcclusion": lambda clip: VideoOcclusion(clf).attribute(
            clip, (4, 2 * side, 2 * side), (4, side, side), target=0, perturbations_per_eval=16
        ),
        "STEP (nested)": lambda clip: SpatioTemporalPerturbation(clf, preset="nested").attribute(
            clip, target=0, perturbations_per_eval=8, **steps
        ),
    }


def batch_rows(device: str, dry: bool) -> Rows:
    """Yield the rows of altered clips per second."""
    clf = stream.build("tiny-videomae-pattern" if dry else "base", device)[0].to(torch.bfloat16)
    clip, side = clip_of(clf, device), 24 if dry else 28
    sides = (4, side, side)
    count = 1
    for length, window in zip(clf.layout.extent(clip), sides, strict=True):
        count *= -(-length // window)
    yield "| perturbations_per_eval | altered clips per second | peak memory, MiB |"
    yield "|---|---|---|"
    for batch in BATCHES[:1] if dry else BATCHES:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()

        def call(batch: int = batch) -> Tensor:
            return VideoOcclusion(clf).attribute(clip, sides, sides, target=0, perturbations_per_eval=batch)

        spent = seconds(call)
        peak = f"{torch.cuda.max_memory_allocated() / 2**20:.0f}" if device == "cuda" else "–"
        yield f"| {batch} | {count / spent:.1f} | {peak} |"


def stream_rows(device: str, dry: bool) -> Rows:
    """Yield the rows of frame rates."""
    yield "| model | layers | stride | model only, frames/s | explained, frames/s | ratio | spread | forward only |"
    yield "|---|---|---|---|---|---|---|---|"
    for layers in ("all", "-1"):
        name, rounds = ("tiny-videomae-pattern", 1) if dry else ("base", 5)
        yield from stream.rates(name, device, [0] if dry else [0, 4], 2, rounds, layers)


def agreement_rows(device: str, dry: bool) -> Rows:
    """Yield the rows of rank correlations with the maps of the CPU in float32, by model, method and precision."""
    yield "| model | method | " + " | ".join(DTYPES) + " |"
    yield "|---" * (len(DTYPES) + 2) + "|"
    count = 1 if dry else 4
    for model in AGREEING[:1] if dry else AGREEING:
        name = f"tiny-{model}-pattern"
        clips, labels, _ = PlantedClips(seed=12, n=count)[:count]
        cpu = VideoClassifier.from_pretrained(name)
        clips = cpu.layout.from_working(clips)
        there = {
            kind: precision.methods(VideoClassifier.from_pretrained(name, device=device, dtype=dtype))
            for kind, dtype in DTYPES.items()
        }
        for method, call in precision.methods(cpu).items():
            if dry and not method.startswith(("STAA", "Saliency")):
                continue
            wanted = [precision._map(call(clips[i : i + 1], labels[i : i + 1]), cpu) for i in range(count)]
            cells = []
            for kind, dtype in DTYPES.items():
                try:
                    found = [
                        there[kind][method](clips[i : i + 1].to(device, dtype), labels[i : i + 1]).cpu()
                        for i in range(count)
                    ]
                except Exception as error:
                    cells.append(type(error).__name__)
                    continue
                each = [
                    float(precision._spearman(precision._map(one.float(), cpu), other))
                    for one, other in zip(found, wanted, strict=True)
                ]
                cells.append(f"{sum(each) / count:.4f} ({min(each):.4f})")
            yield f"| {model} | {method} | {' | '.join(cells)} |"


def clip_of(clf: VideoClassifier, device: str) -> Tensor:
    """Return a random clip of the size and the precision of a model."""
    size = clf.image_size[0] if clf.image_size else 48
    clip = torch.randn(1, clf.num_frames or 16, 3, size, size, generator=torch.Generator().manual_seed(0))
    parameter = next(clf.parameters())
    return clf.layout.from_working(clip).contiguous().to(device, parameter.dtype)


@torch.no_grad()
def forward(clf: VideoClassifier, clip: Tensor) -> Tensor:
    return clf(clip)


def seconds(call: Callable[[], Tensor]) -> float:
    """Return the median time of a call; the first call warms up."""
    found = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        result = call()
        if result.is_cuda:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


TABLES: dict[str, Callable[[str, bool], Rows]] = {
    "cost": cost_rows,
    "batch": batch_rows,
    "streams": stream_rows,
    "agreement": agreement_rows,
}


def measured(table: str, device: str, dry: bool, limit: float) -> str:
    """Return a table; it ends early, with a remark, after ``limit`` seconds."""
    end, rows = time.monotonic() + limit, []
    print(f"\n{table}\n", flush=True)
    for row in TABLES[table](device, dry):
        rows.append(row)
        print(row, flush=True)
        if time.monotonic() > end:
            rows.append(f"\nStopped after {limit:.0f} s; the rows that would follow are missing. Use more `--minutes`.")
            print(rows[-1], flush=True)
            break
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU; writes no page")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop before this time")
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("gpu.py needs a CUDA device, and torch finds none. Try it on the CPU with --dry-run.")
    device = "cpu" if options.dry_run else "cuda"
    tables = dict.fromkeys(TABLES, "Not measured.")
    for table in options.tables:
        tables[table] = measured(table, device, options.dry_run, SHARES[table] * options.minutes * 60)
    if not options.dry_run:
        machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
        write_between(PAGE, "gpu", TEXT.format(machine=machine, rounds=ROUNDS, **tables))


if __name__ == "__main__":
    main()
