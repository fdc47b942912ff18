"""Optimization of masks on the command line: the progress bar, and Ctrl-C, which keeps the best masks."""

from __future__ import annotations

import io as io_module
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import read
from perturbation_runs import CNN, by_hand, check_same, run, write_video

from captum_staa.benchmark import PlantedClips, SceneOptions
from captum_staa.cli import demo
from captum_staa.perturbation import learning

pytest.importorskip("av")
pytestmark = pytest.mark.usefixtures("ctrl_c_reaches_python")


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "planted.mp4", PlantedClips(seed=demo.SEED, n=4))


@pytest.fixture(scope="module")
def long_video(tmp_path_factory) -> Path:
    clips = PlantedClips(seed=1, n=1, scene=SceneOptions(num_frames=44))
    return write_video(tmp_path_factory.mktemp("videos") / "long.mp4", clips)


def interrupt_at(monkeypatch, step: int, clip: int = 0) -> None:
    """Send one real Ctrl-C during this optimization step of this clip."""
    original, seen = learning._slope, []

    def interrupted(problem, drawn, number, baseline_scores):
        if problem.config.objective == "dual" and number == step:  # the warm start has "preserve"
            seen.append(number)
            if len(seen) == clip + 1:
                signal.raise_signal(signal.SIGINT)
        return original(problem, drawn, number, baseline_scores)

    monkeypatch.setattr(learning, "_slope", interrupted)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.filterwarnings("always:interrupted at step")
def test_ctrl_c_keeps_the_best_masks_so_far(video, tmp_path, capsys, monkeypatch):
    interrupt_at(monkeypatch, 12)
    assert run(video, tmp_path, "--areas", ".1") == 130
    said = capsys.readouterr().err
    assert "captum_staa: warning: interrupted at step 12 of 60. The best masks so far are returned" in said
    assert "interrupted: the masks are the best of 10 steps out of 60" in said and "Traceback" not in said
    interrupt_at(monkeypatch, 12)
    with pytest.warns(UserWarning, match="interrupted at step 12"):
        parts, _ = by_hand(video, CNN, areas=[0.1])
    result = check_same(tmp_path, parts, [0.1])
    assert result["interrupted"] == "the masks are the best of 10 steps out of 60"
    assert result["perturbation"]["steps"] == 10


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.filterwarnings("always:interrupted at step")
def test_ctrl_c_in_a_later_window_keeps_the_finished_windows(long_video, tmp_path, capsys, monkeypatch):
    interrupt_at(monkeypatch, 1, clip=1)  # in the second window
    options = ["--windows", "--stride", "14", "--iterations", "3", "--areas", ".2", "--target", "0"]
    assert run(long_video, tmp_path, *options) == 130
    tensors, _, result = read(tmp_path)
    expected = "2 of 3 windows are done and kept, the others are missing; in the last of them, the masks are the best"
    assert result["interrupted"] == f"{expected} of 0 steps out of 3"
    assert [row["start"] for row in result["windows"]] == [0, 14]
    assert [row["perturbation"]["steps"] for row in result["windows"]] == [3, 0]
    assert result["perturbation"]["steps"] == 3
    assert len(tensors["masks"][0]) == len(result["frame_indices"]) == 30
    assert "2 of 3 windows" in capsys.readouterr().err


def test_ctrl_c_before_the_first_masks_writes_no_files(video, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(learning, "_evaluate", lambda *args: signal.raise_signal(signal.SIGINT))
    assert run(video, tmp_path / "out", "--iterations", "2") == 130
    assert "no partial files are left" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Terminal(io_module.StringIO):
    """Records the text, and claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("without_pictures")
def test_progress_bar_shows_the_kept_score(video, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run(video, tmp_path, "--iterations", "2") == 0
    kept = np.mean([row["kept"] for row in read(tmp_path)[2]["perturbation"]["areas"]])
    drawn = terminal.getvalue().split("\r")[-1]
    assert "STEP (nested)" in drawn and f"kept {kept:.3f}" in drawn and "100%" in drawn
    assert drawn.count("\n") == 1 and drawn.endswith("\n")  # the bar ends with a newline


@pytest.mark.usefixtures("without_pictures")
def test_progress_bars_of_windows_are_cleared(long_video, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run(long_video, tmp_path, "--windows", "--iterations", "2", "--areas", ".2", "--target", "0") == 0
    drawn = terminal.getvalue()
    assert drawn.count("STEP (nested)") >= 3 and not drawn.split("\r")[-2].strip()  # cleared
