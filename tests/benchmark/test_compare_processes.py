"""The comparison on the command line: one process, several processes, and killed processes give the same table."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from comparison_cases import entry_files
from covering import in_one_case
from torch import nn

from captum_staa import VideoClassifier
from captum_staa.__main__ import main
from captum_staa.benchmark import MetricOptions
from captum_staa.benchmark.clip_runner import Plan
from captum_staa.benchmark.records import Entry, Storage
from captum_staa.benchmark.runner import _gathered, _start_id, local_device
from captum_staa.benchmark.scoring import chosen

ROOT = Path(__file__).resolve().parents[2]
COMPARE = ["compare", "--model", "tiny-resnet3d-pattern", "--planted", "3"]
# of what is drawn at random, too; of the costs none, which no two runs share
COMPARE += ["--methods", "staa,saliency,SmoothGrad", "--metrics", "auroc,insertion,saco", "--steps", "4"]
FILES = {
    ".lock",
    "entries",
    "sheet.safetensors",
    "settings.json",
    "rows.csv",
    "table.md",
    "table.tex",
    "comparison.json",
    "report.html",
}
PICTURES = {"curves.png", "ranks.png", "sheet.png"}


def run_command(arguments: list[str]) -> tuple[int, str, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def torchrun(count: int, *arguments: str, restarts: int = 0) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    launch += ["--master-addr", "127.0.0.1", "--master-port", str(_free_port()), "--max-restarts", str(restarts)]
    return [*launch, *arguments]


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def finished(command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment(**more), capture_output=True, text=True, timeout=300, check=False, cwd=ROOT
    )


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """The folder of a run with one process."""
    folder = tmp_path_factory.mktemp("single") / "new" / "run"
    code, out, err = run_command([*COMPARE, "--out", str(folder)])
    assert code == 0, err
    assert "| SmoothGrad" in out and "written to" in out
    return folder


def read(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "rows.csv").read_text(encoding="utf-8"))))


def valid(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of a run, with its files as they are."""
    return [vars(entry) for entry in Storage(folder).entries()]


def same(folder: Path, other: Path) -> None:
    """Check that both folders have the same table, without missing or repeated rows."""
    rows = (folder / "rows.csv").read_text()
    assert rows == (other / "rows.csv").read_text()
    assert len({tuple(row[:3]) for row in csv.reader(io.StringIO(rows))}) == len(rows.splitlines()) == 1 + 1 + 3 * 9 * 3
    complete = [{(e["index"], e["method"]) for e in valid(each)} for each in (folder, other)]
    assert complete[0] == complete[1]
    assert (folder / "table.md").read_text() == (other / "table.md").read_text()


def test_a_terminal_without_unicode_arrows(tmp_path, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    few = ["--planted", "1", "--methods", "saliency", "--metrics", "auroc", "--no-model-controls"]
    assert main(["compare", "--model", "tiny-resnet3d-pattern", *few, "--out", str(tmp_path / "run")]) == 0
    shown.flush()
    assert b"auroc ?" in shown.buffer.getvalue()
    table = (tmp_path / "run" / "table.md").read_text(encoding="utf-8")
    assert "auroc ↑" in table and "model-free" in table and "random weights" not in table


def test_the_folder_contains_rows_tables_figures_and_a_report(single):
    assert {path.name for path in single.iterdir()} == FILES | PICTURES
    rows = read(single)
    assert list(rows[0]) == ["clip", "method", "metric", "value"]
    assert {row["method"] for row in rows if row["metric"] == "auroc"} == {
        *("Saliency", "SmoothGrad"),
        *("random", "uniform", "center", "model-free", "inverted", "random weights", "other class"),
    }
    (silent,) = [row for row in rows if row["metric"] == "does not apply"]
    assert silent["method"] == "STAA" and "needs a transformer" in silent["value"]
    by_name = {
        row[0]: row[1] for row in ((r["method"] + r["clip"], r["value"]) for r in rows if r["metric"] == "auroc")
    }
    saliency, inverted = (float(by_name[f"{name}pattern-00002"]) for name in ("Saliency", "inverted"))
    assert saliency + inverted == pytest.approx(1)
    document = json.loads((single / "comparison.json").read_text())
    assert document["settings"]["inverted"] == "Saliency" and document["settings"]["device"] == "cpu"


def test_an_earlier_run_raises_unless_resumed_with_the_same_settings(single):
    for more, message in (
        ([], "resume=True or --resume"),
        (["--resume", "--seed", "1"], "seed: recorded 0, now 1"),
        (["--resume", "--dtype", "bfloat16"], "dtype: recorded float32, now bfloat16"),
        (["--resume", "--planted", "5"], "clips: recorded"),
        (["--resume", "--no-model-controls"], "model_controls: recorded {"),
    ):
        before = (single / "rows.csv").read_text()
        code, _, err = run_command([*COMPARE, "--out", str(single), *more])
        assert code == 2 and message in err, err
        assert (single / "rows.csv").read_text() == before


def test_a_folder_without_a_comparison_raises(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for name, message in (("file", "got the file"), ("mine", "thesis.tex")):
        code, _, err = run_command([*COMPARE, "--out", str(tmp_path / name)])
        assert code == 2 and message in err and "resume" not in err, err


@pytest.mark.slow
def test_a_killed_rank_is_restarted_and_the_table_equals_that_of_one_process(single, tmp_path):
    """Two ranks on loopback, kill -9 of one in the middle, ``--max-restarts``."""
    folder = tmp_path / "run"
    script = str(ROOT / "tests" / "_helpers" / "compare_rank.py")
    command = torchrun(2, script, *COMPARE, "--out", str(folder), restarts=1)
    done = finished(command, KILL_RANK="1", KILL_AFTER="5")
    assert done.returncode == 0, done.stderr
    assert "Signal 9" in done.stderr or "SIGKILL" in done.stderr or "exitcode: -9" in done.stderr, done.stderr
    same(folder, single)


def test_a_restarted_group_ignores_the_store_of_an_earlier_start():
    """All processes agree on a new identifier, in any order of start and with any old content of the store."""
    words = set()
    store = dist.HashStore()
    for first in range(6):
        found: dict[int, str] = {}

        def ask(rank: int, found: dict[int, str] = found) -> None:
            found[rank] = _start_id(store, rank, 3)

        threads = [threading.Thread(target=ask, args=((first + at) % 3,), daemon=True) for at in range(3)]
        for thread in threads:
            thread.start()
            time.sleep(0.02)  # so that each in turn finds what the others have left before they are there
        for thread in threads:
            thread.join(timeout=20)
        assert set(found) == {0, 1, 2} and len(set(found.values())) == 1
        words |= set(found.values())
    assert len(words) == 6


def test_missing_clips_of_other_machines_raise(tmp_path):
    classifier = VideoClassifier(nn.Flatten(), "BCTHW")
    plan = Plan(classifier, [], chosen(["sparsity"]), MetricOptions(), 8, 0)
    clips = [(torch.zeros(3, 4, 8, 8), 0)] * 3
    with Storage(tmp_path / "run") as storage:
        storage.open({}, resume=False)
        for index in (0, 2):
            storage.write(Entry(index, f"clip-{index:05d}", "*", error="OSError"))
        with pytest.raises(OSError, match="all 3 clips, got 2"):
            _gathered(plan, storage, clips, {"device": "cpu"}, False)
        assert len(_gathered(plan, storage, clips, {"device": "cpu"}, True).clips) == 2
        assert len(_gathered(plan, storage, iter(clips), {"device": "cpu"}, False).clips) == 2


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_share_the_clips_and_give_the_same_table(single, tmp_path, count):
    folder = tmp_path / "run"
    done = finished(torchrun(count, "-m", "captum_staa", *COMPARE, "--out", str(folder)))
    assert done.returncode == 0, done.stderr
    same(folder, single)
    again = finished(torchrun(count, "-m", "captum_staa", *COMPARE, "--out", str(folder)))
    assert again.returncode != 0 and "earlier comparison" in again.stderr


@pytest.mark.slow
def test_two_nodes_meet_at_one_address_and_give_the_same_table(single, tmp_path):
    """Two launchers, as of two machines with a shared disk, which find each other by the address of the first."""
    folder = tmp_path / "run"
    port = _free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "two", "--local-addr"]
    command += ["127.0.0.1", "-m", "captum_staa", *COMPARE, "--out", str(folder)]
    nodes = [
        subprocess.Popen(
            command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    try:
        outputs = [node.communicate(timeout=300)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    same(folder, single)
    assert [path.name for path in entry_files(folder)] == ["00000.jsonl", "00001.jsonl"]


@pytest.mark.slow
def test_a_killed_run_is_resumed_with_another_number_of_ranks(single, tmp_path):
    folder = tmp_path / "run"
    command = torchrun(2, "-m", "captum_staa", *COMPARE, "--out", str(folder))
    with subprocess.Popen(
        command, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        try:
            deadline = time.monotonic() + 120
            while len(valid(folder)) < 6:
                assert run.poll() is None and time.monotonic() < deadline
                time.sleep(0.005)
            os.kill(_children(run.pid)[0], signal.SIGKILL)
            assert run.wait(timeout=120) != 0
        finally:
            run.kill()
    assert 6 <= len(valid(folder)) < 3 * 10 and not (folder / "rows.csv").exists()
    for path in entry_files(folder):
        path.write_bytes(path.read_bytes()[:-100])
    done = finished(torchrun(3, "-m", "captum_staa", *COMPARE, "--out", str(folder), "--resume"))
    assert done.returncode == 0, done.stderr
    same(folder, single)


@pytest.mark.slow
def test_ctrl_c_keeps_finished_entries(single, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "captum_staa", *COMPARE, "--out", str(folder)]
    with subprocess.Popen(
        command,
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run in a background
    ) as run:
        try:
            deadline = time.monotonic() + 120
            while len(valid(folder)) < 6:
                assert run.poll() is None and time.monotonic() < deadline
                time.sleep(0.005)
            run.send_signal(signal.SIGINT)
            _, err = run.communicate(timeout=120)
        finally:
            run.kill()
    assert run.returncode == 130 and "continue with --resume" in err, err
    assert "Interrupted" in (folder / "table.md").read_text()
    code, _, err = run_command([*COMPARE, "--out", str(folder), "--resume"])
    assert code == 0, err
    same(folder, single)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_every_process_takes_the_gpu_of_its_local_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [local_device(device) for device in ("cuda", "cuda:1", "cpu", None)] == ["cuda:3", "cuda:1", "cpu", None]
    monkeypatch.delenv("LOCAL_RANK")
    assert local_device("cuda") == "cuda"


def test_a_folder_of_videos_with_a_broken_file(tmp_path):
    pytest.importorskip("av")
    from captum_staa import io as video_io
    from captum_staa.benchmark import PlantedClips

    planted = PlantedClips(seed=12, n=2)
    for index in range(2):
        video_io.write_video(tmp_path / f"{index}.mp4", planted.frames(index), 8, crf=4)
    (tmp_path / "2.mp4").write_bytes(b"no video")
    labels = [f"{i}.mp4,{planted.labels[int(planted[i][1])]}" for i in range(2)]
    (tmp_path / "labels.csv").write_text("\n".join(["name,label", *labels, "2.mp4,bright-bottom", ""]))
    arguments = ["compare", "--model", "tiny-videomae-pattern", "--videos", str(tmp_path)]
    arguments += ["--labels", str(tmp_path / "labels.csv"), "--methods", "staa", "--metrics", "auroc_time,sparsity"]
    code, out, err = run_command([*arguments, "--out", str(tmp_path / "plain")])
    assert code == 1 and "failed: 2.mp4, *: ValueError" in err  # what is good is there, and the status says so
    assert "2 of 3 clips have no truth (needed by auroc_time)" in out
    code, out, _ = run_command([*arguments, "--out", str(tmp_path / "joined"), "--joined"])
    rows = read(tmp_path / "joined")
    assert {row["clip"] for row in rows if row["metric"] == "auroc_time"} <= {"joined-00000", "joined-00001"}


@in_one_case()
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "either --planted N or --videos DIR"),
        (["--planted", "1", "--videos", "."], "got both"),
        (["--videos", "."], "must be passed together"),
        (["--planted", "1", "--boxes", "b.csv"], "--boxes needs --videos"),
        (["--videos", ".", "--labels", "l.csv", "--task", "order"], "--task needs --planted"),
        (["--videos", ".", "--labels", "no.csv"], "got no.csv"),
        (["--planted", "1", "--methods", "star"], "got 'star'"),
        (["--planted", "1", "--metrics", "aurok"], "got 'aurok'"),
        (["--planted", "1", "--device", "tpu9"], "got 'tpu9', which cannot be used here"),
    ],
)
def test_invalid_command_lines_exit_with_status_2(tmp_path, more, message):
    code, _, err = run_command(["compare", "--model", "tiny-resnet3d-pattern", "--out", str(tmp_path / "run"), *more])
    assert code == 2 and message in err and "\n" not in err.strip(), err
    assert not (tmp_path / "run").exists()
