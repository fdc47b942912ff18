"""Estimate the cost of a comparison of twenty thousand clips from the cost of one clip: docs/cost.md.

    python benchmarks/comparison_scale.py                    # takes some minutes
    python benchmarks/comparison_scale.py --entries 20000    # really reads the results of so many clips

Forwards and backwards are counted, not timed, on a VideoMAE with the tokens of base (16 x 224 x 224, tubelets of
2 x 16 x 16) but few channels. Files, and the time and memory of reading all of them at the end, are measured on
copies of real results.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from evidence import write_between  # beside this file
from torch import Tensor
from tqdm import tqdm

from captum_staa import VideoClassifier
from captum_staa.benchmark import METRICS, MetricInput, PlantedClips, compare
from captum_staa.benchmark.clips import described, source_of
from captum_staa.benchmark.methods import made
from captum_staa.benchmark.records import CONTROLS, OTHER_CLASS, RANDOM_WEIGHTS, SETTINGS, Storage
from captum_staa.benchmark.scoring import DEFAULT, baseline_of

CLIPS, GPUS = 20_000, 8
METHODS = (
    "STAA (relevance)",
    "STAA",
    "GradCAM",
    "SmoothGrad",
    "IntegratedGradients",
    "VideoOcclusion",
    "KernelShap",
    "STEP (nested)",
)
COPIES = 8
AGAIN = (RANDOM_WEIGHTS, OTHER_CLASS)  # controls that run the first method again
BACKWARD = 2  # a backward takes as long as this many forwards
FORWARD_MS = 10.0  # of one clip on one GPU; an assumption, because no GPU was available
MODEL = "tiny-videomae-pattern"  # its results are copied
COPIED = [*METHODS[:-1], "Saliency"]  # replaces the slowest method; the form of the results is the same
PAGE = Path(__file__).parents[1] / "docs" / "cost.md"


TEXT = """The cost of `compare` for {clips} clips, {methods} methods and the default metrics on {gpus} GPUs, estimated
from the cost of one clip. Made by

```console
python benchmarks/comparison_scale.py --entries {sample}
```

### Time

Counts for one clip of 16 x 224 x 224 and a VideoMAE with the tokens of the base size. A backward counts as two
forwards.

| | forwards | backwards | as forwards |
|---|---|---|---|
{rows}
| {again} | | | {again_units} |
| metrics of {methods} methods and {controls} controls | {metrics} | 0 | {metrics} |
| **one clip** | | | **{total}** |

Assume that a forward of one clip takes {milliseconds:.0f} ms. This is an **assumption**, because no GPU was
available. Run ten clips of your own first, and read `seconds` and `forwards`. With this assumption, one clip takes
{seconds:.0f} s, all clips take {hours:.0f} hours on one GPU, and **{each:.0f} hours** on {gpus} GPUs. Clips are
divided evenly, and no process waits for another before the end.

Metrics take {metric_share:.0%} of the time, the three most expensive methods {dear_share:.0%}. To save time, first
use fewer `steps` and fewer of the metrics that change the clip.

### Disk

There are {entries:.0f} files per clip (methods, controls, the clip itself) of {size:.0f} bytes on average: {files}
files, {gib:.1f} GiB, or {blocks:.1f} GiB on a disk with blocks of 4 KiB. Writing one file took {write:.2f} ms. Maps
are stored for the first clip only. At the end, `rows.csv` has {csv:.0f} MiB and `comparison.json` has {json:.0f} MiB.

### Memory

At the end, every process reads all files. With {sample} clips, reading took {read:.0f} s, the tables took
{tables:.0f} s, and the memory was {mib:.0f} MiB. In proportion, {clips} clips need {read_all:.1f} minutes for
reading, {tables_all:.1f} minutes for the tables, and {gib_each:.1f} GiB **in each process**, which is {gib_all:.0f}
GiB on a machine with {gpus} processes.

A GPU needs memory for the model, and for {copies} changed clips (`perturbations_per_eval`) with their activations.
With gradients, the activations need about 14 times the memory of a plain forward for VideoMAE-base.
STAA stores a matrix of tokens by tokens for each layer, 12 x 9.4 MiB.

### Network

Processes exchange a few short messages at the start and at the end. Each clip is read once, by one process. A video
of Kinetics has about 1 to 3 MB, so {clips} videos have 20 to 60 GB. Over {each:.0f} hours, this is at most a few MB
per second. The results, {gib:.1f} GiB, are written once, and read once by each process at the end.

### Limits

- The number of files: check whether the shared disk has {files} free inodes, and how fast it opens small files.
- In the last step, each process holds all results in memory. For ten times as many clips, run parts of them into
  separate folders, and join their `rows.csv`.
- Each process decodes videos between the calls of the model. Compared with thousands of forwards, the time for
  decoding is negligible. With STAA only, and no metric that changes the clip, it is not negligible.
"""


class Counted:
    """Class that counts the clips in forwards and backwards of a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.forwards = self.backwards = 0
        model.register_forward_pre_hook(self._begin, with_kwargs=True)  # STAA by attention ends a forward early
        model.register_forward_hook(self._end)

    def _begin(self, module: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        self.forwards += len(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    def _end(self, module: torch.nn.Module, args: tuple[Tensor, ...], output: dict[str, Tensor]) -> None:
        if output["logits"].requires_grad:
            output["logits"].register_hook(lambda grad: self._back(len(grad)))

    def _back(self, clips: int) -> None:
        self.backwards += clips

    def during(self, call: Callable[[], object]) -> tuple[int, int]:
        self.forwards = self.backwards = 0
        call()
        return self.forwards, self.backwards


def counted() -> dict[str, tuple[int, int]]:
    """Return the forwards and backwards for one clip, for each method and for the metrics of one map."""
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=2
    )
    clf = VideoClassifier(transformers.VideoMAEForVideoClassification(config).eval())
    counter, clip = Counted(clf.module), torch.rand(1, 16, 3, 224, 224)
    found = {}
    for method in tqdm(made(METHODS, clf, COPIES), desc="methods"):
        call = method.call
        assert call is not None, method.reason
        found[method.name] = counter.during(lambda call=call: call(clip, 0))  # type: ignore[misc]
    truth = torch.zeros(1, 16, 224, 224, dtype=torch.bool)
    truth[:, 4:8, 50:100, 50:100] = True
    maps = torch.rand(1, 16, 224, 224, dtype=torch.float64)
    metric_input = MetricInput(
        classifier=clf,
        clip=clip,
        maps=maps,
        target=0,
        truth=truth,
        rivals=~truth,
        objects=torch.stack([truth, ~truth], 1),
        baseline=baseline_of("zero", clip, clf),
        steps=32,
        perturbations_per_eval=COPIES,
    )
    scores = [METRICS[name].score for name in DEFAULT]
    found["the metrics of one map"] = counter.during(
        lambda: [score(metric_input) for score in scores if score is not None]
    )
    return found


def fill(folder: Path, clips: int) -> tuple[float, float]:
    """Write copies of the results of one clip as the results of ``clips`` clips. Return bytes and seconds per file."""
    clf = VideoClassifier.from_pretrained(MODEL)
    real = folder / "real"
    compare(clf, PlantedClips(seed=0, n=1), COPIED, out=real)
    entries = list(Storage(real).of(0))
    settings = json.loads((real / SETTINGS).read_text())
    settings["clips"] = described(source_of(PlantedClips(seed=0, n=clips), clf))
    many = Storage(folder / "many")
    many.open(settings, resume=False)
    began = time.perf_counter()
    for index in tqdm(range(clips), desc="results"):
        for entry in entries:
            many.write(replace(entry, index=index, clip=f"pattern-{index:05d}"))
    seconds = (time.perf_counter() - began) / (clips * len(entries))
    one = many.folder / "rows" / "0000000"
    return sum(path.stat().st_size for path in one.glob("*.json")) / len(entries), seconds


def gather(folder: Path, clips: int) -> dict[str, float]:
    """Return seconds and peak MiB of the last step of a run, including the tables. Runs in a separate process."""
    clf = VideoClassifier.from_pretrained(MODEL)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
    before = _resident_peak()
    began = time.perf_counter()
    found = compare(
        clf,
        PlantedClips(seed=0, n=clips),
        COPIED,
        out=folder / "many",
        resume=True,
        show_progress=False,
    )
    read = time.perf_counter() - began
    found.to_csv(folder / "rows.csv")
    found.to_json(folder / "comparison.json")
    found.to_markdown()
    return {
        "read": read,
        "tables": time.perf_counter() - began - read,
        "MiB": _resident_peak() - before,
        "csv": (folder / "rows.csv").stat().st_size / 2**20,
        "json": (folder / "comparison.json").stat().st_size / 2**20,
        "entries": float(len(COPIED) + len(CONTROLS) + 1),
    }


def _resident_peak() -> float:
    """Return the peak of resident memory in MiB. Linux only."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def page(counts: dict[str, tuple[int, int]], size: float, write: float, gathered: dict[str, float], clips: int) -> str:
    """Return the whole page, extrapolated to ``CLIPS``."""
    metrics = counts["the metrics of one map"][0] * (len(METHODS) + len(CONTROLS))
    units = {name: forwards + BACKWARD * backwards for name, (forwards, backwards) in counts.items()}
    again = len(AGAIN) * units[METHODS[0]]
    total = sum(units[name] for name in METHODS) + again + metrics + 1
    hours = total * CLIPS * FORWARD_MS / 1000 / 3600
    files = CLIPS * int(gathered["entries"])
    times = CLIPS / clips
    return TEXT.format(
        clips=CLIPS,
        gpus=GPUS,
        copies=COPIES,
        methods=len(METHODS),
        controls=len(CONTROLS),
        again=f"{' and '.join(AGAIN)}, of {METHODS[0]}",
        again_units=again,
        sample=clips,
        rows="\n".join(f"| {name} | {f} | {b} | {units[name]} |" for name, (f, b) in counts.items()),
        metrics=metrics,
        total=total,
        milliseconds=FORWARD_MS,
        seconds=total * FORWARD_MS / 1000,
        hours=hours,
        each=hours / GPUS,
        metric_share=metrics / total,
        dear_share=sum(sorted(units[name] for name in METHODS)[-3:]) / total,
        entries=gathered["entries"],
        size=size,
        files=files,
        gib=files * size / 2**30,
        blocks=files * 4096 / 2**30,
        write=write * 1000,
        csv=gathered["csv"] * times,
        json=gathered["json"] * times,
        read=gathered["read"],
        tables=gathered["tables"],
        mib=gathered["MiB"],
        read_all=gathered["read"] * times / 60,
        tables_all=gathered["tables"] * times / 60,
        gib_each=gathered["MiB"] * times / 1024,
        gib_all=GPUS * gathered["MiB"] * times / 1024,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=2000, help="clips whose results are written and read")
    parser.add_argument("--gather", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.gather is not None:
        print(json.dumps(gather(arguments.gather, arguments.entries)))
        return
    counts = counted()
    with tempfile.TemporaryDirectory() as folder:
        size, write = fill(Path(folder), arguments.entries)
        command = [sys.executable, "-W", "ignore", __file__, "--gather", folder, "--entries", str(arguments.entries)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = page(counts, size, write, json.loads(output.splitlines()[-1]), arguments.entries)
    write_between(PAGE, "comparison_scale", text)


if __name__ == "__main__":
    main()
