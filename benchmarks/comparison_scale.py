"""Comparisons of twenty thousand clips: simulated runs, and an estimate of the time: docs/comparison_scale.md.

    python benchmarks/comparison_scale.py --out runs                        # all stages; continues an interrupted run
    python benchmarks/comparison_scale.py --out runs --stages "ranks 1"     # some of them
    python benchmarks/comparison_scale.py --clips 500 --troubled-clips 500 --kills 3 --no-page   # a minute

The simulated runs store, read and report real records, but a model, methods and metrics that cost nothing replace the
real ones. For the estimate, forwards and backwards are counted, not timed, on a VideoMAE with the tokens of base
(16 x 224 x 224, tubelets of 2 x 16 x 16) but few channels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from captum_staa import VideoClassifier
from captum_staa._utils.files import atomic
from captum_staa.benchmark import METRICS, Comparison, Metric, MetricInput, MetricOptions, compare
from captum_staa.benchmark.methods import made
from captum_staa.benchmark.records import CONTROLS, OTHER_CLASS, RANDOM_WEIGHTS
from captum_staa.benchmark.scoring import COSTS, DEFAULT, baseline_of
from captum_staa.cli.compare import write

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
STEPS = 32  # points of a curve
STAGES = ("ranks 1", "ranks 2", "ranks 4", "reference", "troubled")
PAGE = Path(__file__).parents[1] / "docs" / "comparison_scale.md"


TEXT = """# Estimated cost of a comparison of twenty thousand clips

The cost of `compare` for {clips} clips, {methods} methods and the default metrics on {gpus} GPUs, estimated from the
cost of one clip. Made by

```console
python benchmarks/comparison_scale.py --entries {sample}
```

## Time

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

## Disk

There are {entries:.0f} files per clip (methods, controls, the clip itself) of {size:.0f} bytes on average: {files}
files, {gib:.1f} GiB, or {blocks:.1f} GiB on a disk with blocks of 4 KiB. Writing one file took {write:.2f} ms. Maps
are stored for the first clip only. At the end, `rows.csv` has {csv:.0f} MiB and `comparison.json` has {json:.0f} MiB.

## Memory

At the end, every process reads all files. With {sample} clips, reading took {read:.0f} s, the tables took
{tables:.0f} s, and the memory was {mib:.0f} MiB. In proportion, {clips} clips need {read_all:.1f} minutes for
reading, {tables_all:.1f} minutes for the tables, and {gib_each:.1f} GiB **in each process**, which is {gib_all:.0f}
GiB on a machine with {gpus} processes.

A GPU needs memory for the model, and for {copies} changed clips (`perturbations_per_eval`) with their activations.
With gradients, the activations need about 14 times the memory of a plain forward for VideoMAE-base ([Cost](cost.md)).
STAA stores a matrix of tokens by tokens for each layer, 12 x 9.4 MiB.

## Network

Processes exchange a few short messages at the start and at the end. Each clip is read once, by one process. A video
of Kinetics has about 1 to 3 MB, so {clips} videos have 20 to 60 GB. Over {each:.0f} hours, this is at most a few MB
per second. The results, {gib:.1f} GiB, are written once, and read once by each process at the end.

## Limits

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
    import transformers

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


# --- a simulated run -------------------------------------------------------------------------------------------------


class NullModel(torch.nn.Module):
    """Model that costs nothing; with a parameter, because one control draws the parameters at random."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3, 2)

    def forward(self, clip: Tensor) -> Tensor:
        return self.head(clip[:, 0, :, 0, 0])


class NullClips:
    """Clips of 2 x 4 x 4 pixels; each is different. It notes when the first is loaded."""

    first: float | None = None

    def __init__(self, count: int) -> None:
        self.names = [f"video-{index:05d}.mp4" for index in range(count)]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.first is None:
            self.first = time.perf_counter()
        return torch.linspace(index % 97 / 97, 1, 96).view(1, 2, 3, 4, 4), index % 2


def null_method(number: int) -> Callable[[Tensor, int], Tensor]:
    return lambda clip, target: clip.sum(2) + number


def null_metrics() -> dict[str, Metric]:
    """Return all metrics under their names; costs are measured, other scores are drawn from the map.

    The first score also leaves insertion and deletion curves, because they are the largest part of a record.
    """

    def score(case: MetricInput, column: int) -> float:
        found = vars(case)
        if "drawn" not in found:
            state = np.frombuffer(case.maps.numpy().tobytes(), np.uint32)
            draw = np.random.default_rng([case.target, *state[::16]])
            fractions = torch.linspace(0, 1, STEPS + 1)[None]
            rise, fall = (SimpleNamespace(fractions=fractions, curve=torch.rand(1, STEPS + 1)) for _ in range(2))
            found["drawn"], found["curves"] = draw.random(len(METRICS)), SimpleNamespace(insertion=rise, deletion=fall)
        return float(found["drawn"][column])

    return {
        name: Metric(known.score and partial(score, column=column), known.higher_is_better)
        for column, (name, known) in enumerate(METRICS.items())
    }


def rank_main(arguments: argparse.Namespace) -> None:
    """One process of the simulated run: compare, measure, and write what was measured to the folder ``measured``."""
    if arguments.full_after:  # the disk is full when a file has so many bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (arguments.full_after, resource.RLIM_INFINITY))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    classifier = VideoClassifier(NullModel().eval(), "BTCHW")
    clips = NullClips(arguments.clips)
    rank = int(os.environ.get("RANK", "0"))
    found: dict[str, Any] = {"base": peak()}
    began = time.perf_counter()
    comparison = compare(
        classifier,
        clips,
        {name: null_method(number) for number, name in enumerate(METHODS)},
        null_metrics(),
        out=arguments.rank / "run",
        resume=not arguments.fresh,
        metric_options=MetricOptions(steps=STEPS),
        show_progress=False,
    )
    found |= {"compare": time.perf_counter() - began, "peak": peak()}
    if clips.first is not None:
        found["until first clip"] = clips.first - began
    found["table"] = digest(comparison)
    if rank == 0 and arguments.report:
        began = time.perf_counter()
        write(comparison, arguments.rank / "run")
        found |= {"report": time.perf_counter() - began, "peak with report": peak()}
    with atomic(arguments.rank / f"rank-{rank}.json", overwrite=True) as partial_path:
        partial_path.write_text(json.dumps(found))


def digest(comparison: Comparison) -> str:
    """Return a hash of all rows but those of costs, which no two runs share."""
    found = hashlib.sha256()
    for metric in (name for name in comparison.metrics if name not in COSTS):
        found.update(comparison.values(metric).numpy().tobytes())
    found.update(repr((comparison.clips, comparison.reason_rows, comparison.methods)).encode())
    for curves in comparison.curves.values():
        found.update(curves["insertion"].tobytes())
    return found.hexdigest()[:16]


def peak() -> float:
    """Return the peak of resident memory in MiB. Linux only."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


class Ranks:
    """The processes of one start, without torchrun, so that each can be killed by itself."""

    def __init__(self, folder: Path, clips: int, world: int, *more: str) -> None:
        command = [sys.executable, "-W", "ignore", __file__, "--rank", str(folder), "--clips", str(clips), *more]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.began = time.perf_counter()
        self.processes = [
            subprocess.Popen(
                command,
                env={
                    **os.environ,
                    **({"RANK": str(rank), "WORLD_SIZE": str(world)} if world > 1 else {}),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                },
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]

    def wait(self, timeout: float | None = None) -> bool:
        """Return whether all processes have ended within the time."""
        end = None if timeout is None else time.monotonic() + timeout
        for process in self.processes:
            try:
                process.wait(None if end is None else max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                return False
        return True

    def kill(self, first: int) -> None:
        """Kill one process with SIGKILL, then the others."""
        order = [self.processes[first], *self.processes]
        for process in order:
            process.kill()
        self.wait()

    def errors(self) -> str:
        return "\n".join((process.stderr.read() if process.stderr else "") for process in self.processes)

    def finished(self) -> dict[str, Any]:
        """Wait, and return what was measured: the highest peak of all processes, and the rest of the first."""
        self.wait()
        if any(process.returncode for process in self.processes):
            raise RuntimeError(self.errors())
        folder = Path(self.processes[0].args[self.processes[0].args.index("--rank") + 1])  # type: ignore
        found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(len(self.processes))]
        assert len({each["table"] for each in found}) == 1, "the processes returned different tables"
        return {
            **found[0],
            "total": time.perf_counter() - self.began,
            "peak": max(each["peak"] for each in found),
            "base": max(each["base"] for each in found),
        }


def plain_run(folder: Path, clips: int, world: int) -> dict[str, Any]:
    """One run without events, then a resumed one, which finds that all is done."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = Ranks(folder, clips, world, "--fresh").finished()
    files = [path for path in (folder / "run").rglob("*") if path.is_file()]
    found |= {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}
    again = Ranks(folder, clips, world, *(["--report"] if world == 1 else [])).finished()
    assert again["table"] == found["table"], "the resumed run has another table"
    found["resume"] = again["compare"]
    found["resume peak"] = again["peak"]
    for name in ("report", "peak with report"):
        if name in again:
            found[name] = again[name]
    for path in (folder / "run").rglob("*"):
        if path.name in ("rows.csv", "comparison.json"):
            found[path.name] = path.stat().st_size
    shutil.rmtree(folder)
    return found


def troubled_run(folder: Path, clips: int, kills: int, seed: int) -> dict[str, Any]:
    """A run with two processes: killed at random moments, half-written records, a full disk, and a second start.

    After each kill, one file loses a random number of its last bytes. Before the last start, the other file gets a
    byte changed in its middle.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    draw = random.Random(seed)
    found: dict[str, Any] = {"kills": 0, "full disk": 0, "refused": 0, "cut": 0, "until first clip": []}
    mean = None  # seconds between a start and its kill
    with tqdm(total=kills, desc="kills") as bar:
        while found["kills"] < kills:
            full = found["kills"] == kills // 2 and not found["full disk"]
            size = max((path.stat().st_size for path in (folder / "run" / "entries").glob("*")), default=0)
            ranks = Ranks(folder, clips, 2, *(["--full-after", str(size + draw.randrange(10_000))] if full else []))
            if full:
                ranks.wait()
                assert "File too large" in (errors := ranks.errors()), errors
                found["full disk"] += 1
                continue
            while not ranks.wait(0.2) and _size(folder) <= size:  # until this start has written something
                pass
            mean = mean or 8.0
            if not found["refused"]:
                second = Ranks(folder, clips, 1)
                second.wait()
                assert "no other run uses" in (errors := second.errors()), errors
                found["refused"] += 1
            if ranks.wait(draw.uniform(0, mean)):
                break  # finished before so many kills
            ranks.kill(draw.randrange(2))
            found["kills"] += 1
            bar.update()
            files = sorted((folder / "run" / "entries").glob("*"))
            if files:
                path = draw.choice(files)
                lost = draw.randrange(1, 4000)
                os.truncate(path, max(path.stat().st_size - lost, 0))
                found["cut"] += 1
    path = sorted((folder / "run" / "entries").glob("*"))[0]
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    last = Ranks(folder, clips, 2).finished()
    found |= {"table": last["table"], "peak": last["peak"], "until first clip": last.get("until first clip")}
    found["files"] = sum(path.is_file() for path in (folder / "run").rglob("*"))
    shutil.rmtree(folder)
    return found


def _size(folder: Path) -> int:
    return max((path.stat().st_size for path in (folder / "run" / "entries").glob("*")), default=0)


def measure(folder: Path, clips: int, troubled: int, kills: int, stages: Sequence[str]) -> dict[str, Any]:
    """Run all stages that are not measured yet, and return what was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "measured.json"
    measured: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    calls: dict[str, Callable[[], dict[str, Any]]] = {
        **{f"ranks {world}": partial(plain_run, folder / "plain", clips, world) for world in (1, 2, 4)},
        "reference": partial(plain_run, folder / "plain", troubled, 1),
        "troubled": partial(troubled_run, folder / "troubled", troubled, kills, seed=0),
    }
    for stage in stages:
        if stage not in measured:
            print(f"stage: {stage}", flush=True)
            measured[stage] = calls[stage]()
            measured["clips"], measured["troubled clips"] = clips, troubled
            with atomic(path, overwrite=True) as partial_path:
                partial_path.write_text(json.dumps(measured, indent=1))
    return measured


def page(counts: dict[str, tuple[int, int]], found: dict[str, Any]) -> str:
    """Return the whole page."""
    metrics = counts["the metrics of one map"][0] * (len(METHODS) + len(CONTROLS))
    units = {name: forwards + BACKWARD * backwards for name, (forwards, backwards) in counts.items()}
    again = len(AGAIN) * units[METHODS[0]]
    total = sum(units[name] for name in METHODS) + again + metrics + 1
    hours = total * CLIPS * FORWARD_MS / 1000 / 3600
    runs = {world: found[f"ranks {world}"] for world in (1, 2, 4)}
    tables = {run["table"] for run in runs.values()}
    assert len(tables) == 1 and found["troubled"]["table"] == found["reference"]["table"], "the tables differ"
    one, trouble = runs[1], found["troubled"]
    simulated = "\n".join(
        f"| {world} | {run['files']} | {run['bytes'] / 2**20:.0f} MiB | {run['compare'] / 60:.1f} min "
        f"| {run['peak']:.0f} MiB | {run['resume']:.0f} s |"
        for world, run in runs.items()
    )
    return TEXT.format(
        clips=CLIPS,
        gpus=GPUS,
        copies=COPIES,
        methods=len(METHODS),
        controls=len(CONTROLS),
        all_metrics=len(METRICS),
        simulated_clips=found["clips"],
        simulated=simulated,
        base=max(run["base"] for run in runs.values()),
        report=one["report"],
        report_peak=one["peak with report"],
        csv=one["rows.csv"] / 2**20,
        json=one["comparison.json"] / 2**20,
        records=found["clips"] * (len(METHODS) + len(CONTROLS) + 1),
        kills=trouble["kills"],
        cut=trouble["cut"],
        troubled=found["troubled clips"],
        trouble_files=trouble["files"],
        again=f"{' and '.join(AGAIN)}, of {METHODS[0]}",
        again_units=again,
        rows="\n".join(f"| {name} | {f} | {b} | {units[name]} |" for name, (f, b) in counts.items()),
        metrics=metrics,
        total=total,
        milliseconds=FORWARD_MS,
        seconds=total * FORWARD_MS / 1000,
        hours=hours,
        each=hours / GPUS,
        metric_share=metrics / total,
        dear_share=sum(sorted(units[name] for name in METHODS)[-3:]) / total,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the simulated runs and of what was measured")
    parser.add_argument("--clips", type=int, default=CLIPS, help="clips of the simulated runs")
    parser.add_argument("--troubled-clips", type=int, default=4000, help="clips of the run with kills")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--no-page", action="store_true", help="measure only")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)  # one process of a simulated run
    parser.add_argument("--fresh", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--report", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--full-after", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        rank_main(arguments)
        return
    out = arguments.out or Path(tempfile.mkdtemp())
    found = measure(out, arguments.clips, arguments.troubled_clips, arguments.kills, arguments.stages)
    print(json.dumps(found, indent=1))
    if not arguments.no_page:
        text = page(counted(), found)
        with atomic(PAGE, overwrite=True) as partial_path:
            partial_path.write_text(text)


if __name__ == "__main__":
    main()
