"""What a comparison of twenty thousand clips takes, from what one clip takes: docs/comparison_scale.md.

    python benchmarks/comparison_scale.py                    # some minutes
    python benchmarks/comparison_scale.py --entries 20000    # gather so many clips' results in earnest

Forwards and backwards are counted, not timed: on a VideoMAE with the tokens of base (16 x 224 x 224, tubelets of
2 x 16 x 16) but few channels. Files, and the time and memory of reading all of them at the end, are measured on
results that are copies of real ones.
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
from torch import Tensor
from tqdm import tqdm

from captum_staa import VideoClassifier
from captum_staa._utils.files import atomic
from captum_staa.benchmark import METRICS, Case, PlantedClips, compare
from captum_staa.benchmark.clips import described, source_of
from captum_staa.benchmark.methods import made
from captum_staa.benchmark.records import CONTROLS, OTHER_CLASS, RANDOM_WEIGHTS
from captum_staa.benchmark.scoring import DEFAULT, baseline_of
from captum_staa.benchmark.storage import SETTINGS, Storage

CLIPS, GPUS = 20_000, 8
METHODS = (
    "STAA",
    "STAA(attention)",
    "GradCAM",
    "SmoothGrad",
    "IntegratedGradients",
    "VideoOcclusion",
    "KernelShap",
    "SpatioTemporalPerturbation",
)
COPIES = 8
AGAIN = (RANDOM_WEIGHTS, OTHER_CLASS)  # controls that run the first method again
BACKWARD = 2  # forwards that a backward takes as long as
FORWARD_MS = 10.0  # of one clip on one GPU; an assumption, as no GPU was at hand
MODEL = "tiny-videomae-pattern"  # whose results are copied
COPIED = [*METHODS[:-1], "Saliency"]  # in place of the slowest: the form is the same
PAGE = Path(__file__).parents[1] / "docs" / "comparison_scale.md"


TEXT = """# A comparison of twenty thousand clips, on paper

What `compare` needs for {clips} clips, {methods} methods and the default metrics on {gpus} GPUs, from what one clip
needs. Made by

```console
python benchmarks/comparison_scale.py --entries {sample}
```

## Time

Counted for one clip of 16 x 224 x 224 and a VideoMAE with base's tokens. A backward counts as two forwards.

| | forwards | backwards | as forwards |
|---|---|---|---|
{rows}
| {again} | | | {again_units} |
| metrics of {methods} methods and {controls} controls | {metrics} | 0 | {metrics} |
| **one clip** | | | **{total}** |

Let a forward of one clip take {milliseconds:.0f} ms. That is an **assumption**, as no GPU was at hand: run ten clips
of your own first, and read `seconds` and `forwards`. Then a clip takes {seconds:.0f} s, all of them {hours:.0f} hours
of a GPU, and {gpus} GPUs **{each:.0f} hours**. Clips are shared evenly, and no process waits before the
end.

Metrics are {metric_share:.0%} of it, the three dearest methods {dear_share:.0%}. Fewer `steps` and fewer of the
metrics that alter the clip are the first thing to save on.

## Disk

{entries:.0f} files per clip (methods, controls, the clip itself) of {size:.0f} bytes on average: {files} files,
{gib:.1f} GiB, or {blocks:.1f} GiB on a disk with blocks of 4 KiB. Writing one takes {write:.2f} ms here. Maps are
kept of the first clip alone. At the end, `rows.csv` has {csv:.0f} MiB and `comparison.json` {json:.0f} MiB.

## Memory

At the end every process reads all files. Measured with {sample} clips: {read:.0f} s to read, {tables:.0f} s for the
tables, {mib:.0f} MiB. In proportion, {clips} clips take {read_all:.1f} minutes, {tables_all:.1f} minutes for the
tables, and {gib_each:.1f} GiB **in each process**, {gib_all:.0f} GiB on a machine with {gpus}.

On a GPU: the model, and {copies} altered clips (`perturbations_per_eval`) with their activations. With gradients
these are about 14 times a plain forward's for VideoMAE-base ([Cost](cost.md)). STAA(attention) holds a matrix of
tokens by tokens for each layer, 12 x 9.4 MiB.

## Network

Between processes go a few words at the beginning and at the end. Each clip is read once, by one process. A video of
Kinetics has some 1 to 3 MB, so {clips} have 20 to 60 GB: over {each:.0f} hours, a few MB a second at the most.
Results, {gib:.1f} GiB, are written once, and read once by each process at the end.

## Where the limits are

- The number of files: ask whether the shared disk has {files} inodes to give, and how fast it opens small files.
- The last step holds everything in each process. For ten times as many clips, run parts of them into folders of their
  own, and put their `rows.csv` together.
- Decoding is done between the model's calls, by the same process: beside thousands of forwards it does not count.
  With STAA alone and no metric that alters the clip, it does.
"""


class Counted:
    """Counts the clips that go through a model, and those whose gradient comes back."""

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
    """By method, and for the metrics of one map and the check of the answer: forwards and backwards for one clip."""
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
    case = Case(
        classifier=clf,
        clip=clip,
        maps=maps,
        target=0,
        truth=truth,
        rivals=~truth,
        objects=torch.stack([truth, ~truth], 1),
        baseline=baseline_of("zero", clip, clf),
        steps=32,
        copies=COPIES,
    )
    scores = [METRICS[name].score for name in DEFAULT]
    found["the metrics of one map"] = counter.during(lambda: [score(case) for score in scores if score is not None])
    return found


def fill(folder: Path, clips: int) -> tuple[float, float]:
    """Results of so many clips, all copies of those of one; their bytes, and the seconds for a file."""
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
    """What the last step of a run takes, in a process of its own: seconds, and MiB at its peak, with the tables."""
    clf = VideoClassifier.from_pretrained(MODEL)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory begins anew
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
    """MiB; Linux alone tells."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def page(counts: dict[str, tuple[int, int]], size: float, write: float, gathered: dict[str, float], clips: int) -> str:
    """The whole page, with what follows for ``CLIPS``."""
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
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = page(counts, size, write, json.loads(told.splitlines()[-1]), arguments.entries)
    with atomic(PAGE, overwrite=True) as partial:
        partial.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
