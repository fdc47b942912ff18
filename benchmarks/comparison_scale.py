"""Comparisons of twenty thousand clips: simulated runs, and an estimate of the time: docs/comparison_guide.md.

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
import multiprocessing
import os
import random
import re
import resource
import shutil
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from evidence import write_between
from torch import Tensor
from tqdm import tqdm

from captum_staa import VideoClassifier
from captum_staa._utils.files import atomic
from captum_staa.benchmark import METRICS, Comparison, Metric, MetricInput, MetricOptions, Sample, compare
from captum_staa.benchmark.methods import made
from captum_staa.benchmark.records import CONTROLS, OTHER_CLASS, RANDOM_WEIGHTS, Entry, Storage
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
LAST = 200  # clips that the simulated run computes
PERIOD = 194  # after so many, null clips repeat
STAGES = ("ranks 4", "ranks 1", "ranks 2", "troubled", "report", "counts")
PAGE = Path(__file__).parents[1] / "docs" / "comparison_guide.md"


TEXT = """\
The model, the methods and the metrics are replaced by functions that cost nothing, so this measures `compare` itself:
{records} records, of which all but those of {last} clips are there at the start. Two cores of a busy machine; the time
is processor time of the first process, and in brackets that on the clock.

| processes | files | size | highest memory of a process | time until the first new clip |
|---|---|---|---|---|
{simulated}

A process has {base:.0f} MiB before it starts. {same}{report}

{killed}

Forwards for one clip of 16 x 224 x 224 and a VideoMAE with the tokens of the base size; a backward counts as two:

| | as forwards |
|---|---|
{rows}
| {again} | {again_units} |
| metrics of {methods} methods and {controls} controls | {metrics} |
| **one clip** | **{total}** |

**If** a forward of one clip takes {milliseconds:.0f} ms (no GPU was available: run ten clips of your own first, and
read `seconds`), one clip takes {seconds:.0f} s, all clips {hours:.0f} hours on one GPU, and **{each:.0f} hours** on
{gpus} GPUs. Metrics take {metric_share:.0%} of the time: first use fewer `steps` and fewer of the metrics that change
the clip.
"""


REPORTED = """Starting a finished run again takes {tables:.0f} s of processor time. The tables, pictures and the report
take another {report:.0f} s, with at most {peak:.0f} MiB; `rows.csv` has {csv:.0f} MiB and `comparison.json` {json:.0f}
MiB."""
KILLED = """**Killed.** A run of {clips} clips with two processes was killed with SIGKILL at {kills} moments spread over
the run, with bytes cut from the end of a file in {cut} cases, a full disk once and a changed byte once, and resumed
each time; the finished run was killed {reports} more times. The final table is that of an undisturbed run with one
process."""


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
        sample=Sample(clip, 0, truth, ~truth, torch.stack([truth, ~truth], 1)),
        maps=maps,
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
    first_busy = 0.0

    def __init__(self, count: int, stop: bool = False) -> None:
        self.stop = stop
        self.names = [f"video-{index:05d}.mp4" for index in range(count)]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.stop:
            raise KeyboardInterrupt
        if self.first is None:
            self.first, self.first_busy = time.perf_counter(), time.process_time()
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
            found["drawn"] = draw.random(len(METRICS))
            points = torch.from_numpy(draw.random((2, 1, STEPS + 1)))
            fractions = torch.linspace(0, 1, STEPS + 1)[None]
            rise, fall = (SimpleNamespace(fractions=fractions, curve=curve) for curve in points)
            found["curves"] = SimpleNamespace(insertion=rise, deletion=fall)
        return float(found["drawn"][column])

    return {
        name: Metric(known.score and partial(score, column=column), known.higher_is_better)
        for column, (name, known) in enumerate(METRICS.items())
    }


@dataclass(frozen=True)
class Start:
    """One start of the simulated run.

    Attributes:
        folder: folder of the run, and of what was measured.
        clips: number of clips.
        world: number of processes.
        report: whether the first process also writes the tables, the pictures and the report.
        full_after: bytes of a file after which the disk is full; 0 for never.
        stop: whether it is interrupted before the first clip.
    """

    folder: Path
    clips: int
    world: int
    report: bool = False
    full_after: int = 0
    stop: bool = False


def rank_main(start: Start, rank: int, port: int) -> None:
    """One process of a start: compare, measure, and write what was measured, or the error."""
    if start.world > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(start.world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    path = start.folder / f"rank-{rank}.json"
    try:
        text = json.dumps(measured_run(start, rank))
    except Exception as error:
        text = json.dumps({"error": f"{type(error).__name__}: {error}"})
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with atomic(path, overwrite=True) as partial_path:
        partial_path.write_text(text)


def measured_run(start: Start, rank: int) -> dict[str, Any]:
    """Compare, and return seconds, peaks of memory in MiB, and a hash of the table."""
    if start.full_after:
        resource.setrlimit(resource.RLIMIT_FSIZE, (start.full_after, resource.RLIM_INFINITY))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    classifier = VideoClassifier(NullModel().eval(), "BTCHW")
    clips = NullClips(start.clips, start.stop)
    found: dict[str, Any] = {"base": peak()}
    began, busy = time.perf_counter(), time.process_time()
    comparison = compare(
        classifier,
        clips,
        {name: null_method(number) for number, name in enumerate(METHODS)},
        null_metrics(),
        out=start.folder / "run",
        resume=True,
        metric_options=MetricOptions(steps=STEPS),
        show_progress=False,
    )
    found |= {"compare": time.perf_counter() - began, "compare cpu": time.process_time() - busy, "peak": peak()}
    if clips.first is not None:
        found |= {"until first clip": clips.first - began, "until first clip cpu": clips.first_busy - busy}
    found["table"] = digest(comparison)
    if rank == 0 and start.report:
        began, busy = time.perf_counter(), time.process_time()
        write(comparison, start.folder / "run")
        found |= {"report": time.perf_counter() - began, "report cpu": time.process_time() - busy}
        found["peak with report"] = peak()
    return found


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
    """The processes of one start, without torchrun, so that each can be killed by itself.

    Args:
        start: the start.
        method: ``"spawn"`` for new processes, whose memory is measured; ``"fork"`` for copies of this one, which start
            at once.
    """

    def __init__(self, start: Start, method: str = "spawn") -> None:
        self.start = start
        for path in start.folder.glob("rank-*.json"):
            path.unlink()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context: Any = multiprocessing.get_context(method)
        self.processes = [context.Process(target=rank_main, args=(start, rank, port)) for rank in range(start.world)]
        for process in self.processes:
            process.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Return whether all processes have ended within the time."""
        end = None if timeout is None else time.monotonic() + timeout
        for process in self.processes:
            process.join(None if end is None else max(0.0, end - time.monotonic()))
        return all(process.exitcode is not None for process in self.processes)

    def kill(self, first: int) -> None:
        """Kill one process with SIGKILL, then the others."""
        for process in (self.processes[first], *self.processes):
            process.kill()
        self.wait()

    def results(self) -> list[dict[str, Any]]:
        """Wait, and return what the processes have written."""
        self.wait()
        paths = [self.start.folder / f"rank-{rank}.json" for rank in range(self.start.world)]
        return [json.loads(path.read_text()) for path in paths]

    def finished(self) -> dict[str, Any]:
        """Wait, and return what was measured: the highest peak of all processes, and the rest of the first."""
        found = self.results()
        if errors := [each["error"] for each in found if "error" in each]:
            raise RuntimeError(errors[0])
        assert len({each["table"] for each in found}) == 1, "the processes returned different tables"
        return {
            **found[0],
            "peaks": [each["peak"] for each in found],
            "base": max(each["base"] for each in found),
        }


def fill(folder: Path, clips: int, filled: int) -> None:
    """Write the records of the first clips, as four processes would, as copies of the records of a real run.

    Null clips repeat, so a real run of all of them would write the same records, except for the control ``random``.
    """
    if (folder / "filled").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "sample").mkdir(parents=True)
    Ranks(Start(folder / "sample", PERIOD, 1)).finished()
    entries: dict[int, list[Entry]] = defaultdict(list)
    for entry in Storage(folder / "sample" / "run").entries():
        entries[entry.index].append(entry)
    names = NullClips(clips).names
    storages = [Storage(folder / "run", rank) for rank in range(4)]
    storages[0].folder.mkdir()
    for index in tqdm(range(filled), desc="records"):
        for entry in entries[index % PERIOD]:
            storages[index % 4].write(replace(entry, index=index, clip=names[index]))
    for storage in storages:
        storage.close()
    (folder / "filled").write_text("")


def merged(source: Path, folder: Path, world: int) -> None:
    """Copy the records of four processes into files of fewer processes."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "run" / "entries").mkdir(parents=True)
    for rank in range(4):
        target = folder / "run" / "entries" / f"{rank % world:05d}.jsonl"
        with (source / "run" / "entries" / f"{rank:05d}.jsonl").open("rb") as given, target.open("ab") as file:
            shutil.copyfileobj(given, file, 2**24)


def settled(folder: Path, clips: int) -> None:
    """Write the settings of a run next to its records, as a start does that is interrupted before the first clip."""
    entries, aside = folder / "run" / "entries", folder / "aside"
    entries.rename(aside)
    entries.parent.rmdir()  # a start that is not resumed must find no folder
    Ranks(Start(folder, clips, 1, stop=True), "fork").finished()
    shutil.rmtree(entries)
    aside.rename(entries)


def plain_run(out: Path, clips: int, world: int) -> dict[str, Any]:
    """Resume a run that lacks the last clips; then start it again, when it finds that all is done."""
    filled = clips - min(LAST, clips // 2)
    fill(out / "filled", clips, filled)
    folder = out / "plain"
    merged(out / "filled", folder, world)
    settled(folder, clips)
    found = Ranks(Start(folder, clips, world)).finished()
    files = [path for path in (folder / "run").rglob("*") if path.is_file()]
    found |= {"files": len(files), "bytes": sum(path.stat().st_size for path in files), "filled": filled}
    shutil.rmtree(folder)
    return found


def reported_run(out: Path, clips: int) -> dict[str, Any]:
    """Finish a run, then start it again, when it finds that all is done, and write tables, pictures and the report."""
    fill(out / "filled", clips, clips - min(LAST, clips // 2))
    folder = out / "reported"
    merged(out / "filled", folder, 1)
    settled(folder, clips)
    first = Ranks(Start(folder, clips, 1)).finished()
    found = Ranks(Start(folder, clips, 1, report=True)).finished()
    assert found["table"] == first["table"], "the resumed run has another table"
    found |= {name: (folder / "run" / name).stat().st_size for name in ("rows.csv", "comparison.json")}
    shutil.rmtree(folder)
    return found


def troubled_run(folder: Path, clips: int, kills: int, seed: int) -> dict[str, Any]:
    """A run with two processes: killed at all parts of the run, half-written records, a full disk, and a second start.

    Each kill comes a random time after a share of all records was written, from none to all of them. After each kill,
    one file loses a random number of its last bytes. Before the last start, a byte in the middle of the first file is
    changed. Then the writing of tables, pictures and the report is killed half as often. The table must be that of a
    run of one process without trouble, and the folder must have the same files.
    """
    shutil.rmtree(folder, ignore_errors=True)
    plain, run = folder / "plain", folder / "run" / "run"
    plain.mkdir(parents=True)
    run.parent.mkdir()
    expected = Ranks(Start(plain, clips, 1, report=True), "fork").finished()
    whole = _written(plain / "run")
    random_moments = random.Random(seed)
    start = Start(run.parent, clips, 2)
    found: dict[str, Any] = {"kills": 0, "full disk": 0, "refused": 0, "cut": 0, "complete at kill": []}
    with tqdm(total=kills + kills // 2, desc="kills") as bar:
        while found["kills"] < kills:
            if found["kills"] == kills // 2 and not found["full disk"]:
                limit = _size(run) + random_moments.randrange(10_000)
                errors = [each.get("error", "") for each in Ranks(replace(start, full_after=limit), "fork").results()]
                assert any("File too large" in error for error in errors), errors
                found["full disk"] += 1
            ranks = _begun(start, run)
            if not found["refused"]:
                (second,) = Ranks(replace(start, world=1), "fork").results()
                assert "no other run uses" in second.get("error", ""), second
                found["refused"] += 1
            share = found["kills"] / kills
            while _written(run) < share * whole and not ranks.wait(0):
                time.sleep(0.01)
            if ranks.wait(random_moments.uniform(0, 0.5)):
                break  # finished before so many kills
            ranks.kill(random_moments.randrange(2))
            found["kills"] += 1
            bar.update()
            files = sorted((run / "entries").glob("*"))
            found["complete at kill"].append(sum(path.read_bytes().count(b"\n") for path in files))
            if files:
                path = random_moments.choice(files)
                os.truncate(path, max(path.stat().st_size - random_moments.randrange(1, 4000), 0))
                found["cut"] += 1
        path = sorted((run / "entries").glob("*"))[0]
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        last = Ranks(start, "fork").finished()
        assert last["table"] == expected["table"], "the table differs from that of an undisturbed run"
        found["killed while writing the report"] = 0
        for number in range(kills // 2):
            ranks = _begun(replace(start, report=True), run)
            moment = expected["report"] * (number + random_moments.random()) / (kills // 2)
            if not ranks.wait(last["compare"] + moment):
                found["killed while writing the report"] += 1
            ranks.kill(0)
            bar.update()
    last = Ranks(replace(start, report=True), "fork").finished()
    assert last["table"] == expected["table"], "the table differs from that of an undisturbed run"
    names = [
        {path.relative_to(one).as_posix() for path in one.rglob("*") if "entries" not in path.parts}
        for one in (run, plain / "run")
    ]
    assert names[0] == names[1], f"other files: {names[0] ^ names[1]}"
    found |= {"table": last["table"], "files": sum(path.is_file() for path in run.rglob("*")), "clips": clips}
    shutil.rmtree(folder)
    return found


def _begun(start: Start, run: Path) -> Ranks:
    """Start, and wait until the first process holds the folder."""
    ranks = Ranks(start, "fork")
    holder, lock = f"process {ranks.processes[0].pid} ", run / ".lock"
    while not (lock.is_file() and lock.read_text().startswith(holder)):
        time.sleep(0.01)
    return ranks


def _written(run: Path) -> int:
    return sum(path.stat().st_size for path in (run / "entries").glob("*"))


def _size(run: Path) -> int:
    return max((path.stat().st_size for path in (run / "entries").glob("*")), default=0)


def measure(folder: Path, clips: int, troubled: int, kills: int, stages: Sequence[str]) -> dict[str, Any]:
    """Run all stages that are not measured yet, and return what was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "measured.json"
    measured: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    calls: dict[str, Callable[[], Any]] = {
        **{f"ranks {world}": partial(plain_run, folder, clips, world) for world in (1, 2, 4)},
        "report": partial(reported_run, folder, clips),
        "counts": counted,
        "troubled": partial(troubled_run, folder / "troubled", troubled, kills, seed=0),
    }
    for stage in stages:
        if stage not in measured:
            print(f"stage: {stage}", flush=True)
            measured[stage] = calls[stage]()
            measured["clips"] = clips
            with atomic(path, overwrite=True) as partial_path:
                partial_path.write_text(json.dumps(measured, indent=1))
    return measured


def reported(found: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of the sentence about tables and the report."""
    sizes = {name: found[key] / 2**20 for name, key in (("csv", "rows.csv"), ("json", "comparison.json"))}
    peak = found["peak with report"]
    return {"tables": found["compare cpu"], "report": found["report cpu"], "peak": peak, **sizes}


def page(found: dict[str, Any]) -> str:
    """Return the section of the page."""
    counts = found["counts"]
    metrics = counts["the metrics of one map"][0] * (len(METHODS) + len(CONTROLS))
    units = {name: forwards + BACKWARD * backwards for name, (forwards, backwards) in counts.items()}
    again = len(AGAIN) * units[METHODS[0]]
    total = sum(units[name] for name in METHODS) + again + metrics + 1
    hours = total * CLIPS * FORWARD_MS / 1000 / 3600
    runs = {world: found[f"ranks {world}"] for world in (1, 2, 4) if f"ranks {world}" in found}
    assert len({run["table"] for run in runs.values()}) == 1, "the tables differ"
    simulated = "\n".join(
        f"| {world} | {run['files']} | {run['bytes'] / 2**20:.0f} MiB | {max(run['peaks']):.0f} MiB "
        f"| {run['until first clip cpu']:.0f} s ({run['until first clip']:.0f} s) |"
        for world, run in runs.items()
    )
    filled = next(iter(runs.values()))["filled"]
    same = "All processes return the same table"
    same += f", and {', '.join(map(str, runs))} processes give the same one." if len(runs) > 1 else "."
    missing = "*Not measured yet: `{}`.*"
    return TEXT.format(
        clips=CLIPS,
        gpus=GPUS,
        methods=len(METHODS),
        controls=len(CONTROLS),
        simulated=simulated,
        base=max(run["base"] for run in runs.values()),
        same=same,
        report=" " + REPORTED.format(**reported(found["report"])) if "report" in found else "",
        killed=KILLED.format(
            **found["troubled"],
            reports=found["troubled"]["killed while writing the report"],
        )
        if "troubled" in found
        else missing.format("--stages troubled"),
        records=found["clips"] * (len(METHODS) + len(CONTROLS) + 1),
        last=found["clips"] - filled,
        again=f"{' and '.join(AGAIN)}, of {METHODS[0]}",
        again_units=again,
        rows="\n".join(f"| {name} | {units[name]} |" for name in counts),
        metrics=metrics,
        total=total,
        milliseconds=FORWARD_MS,
        seconds=total * FORWARD_MS / 1000,
        hours=hours,
        each=hours / GPUS,
        metric_share=metrics / total,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the simulated runs and of what was measured")
    parser.add_argument("--clips", type=int, default=CLIPS, help="clips of the simulated runs")
    parser.add_argument("--troubled-clips", type=int, default=400, help="clips of the run with kills")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--no-page", action="store_true", help="measure only")
    arguments = parser.parse_args()
    out = arguments.out or Path(tempfile.mkdtemp())
    found = measure(out, arguments.clips, arguments.troubled_clips, arguments.kills, arguments.stages)
    print(json.dumps(found, indent=1))
    if not arguments.no_page:
        text = page(found)
        write_between(PAGE, "comparison_scale", text)


if __name__ == "__main__":
    main()
