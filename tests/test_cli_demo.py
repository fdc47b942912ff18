"""The demonstration: its files, its table, and what it says when something differs."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import (
    MODEL,
    PLANTED,
    check_numbers,
)

from captum_staa import VideoClassifier
from captum_staa.__main__ import main
from captum_staa.cli import comparison, demo, output
from captum_staa.cli import explain as explaining
from captum_staa.cli.explanation import Options

pytest.importorskip("av")


def check_demo(folder: Path, clips: int) -> dict[str, dict[str, float]]:
    check_numbers(folder)
    assert sorted(os.listdir(folder)) == sorted(("planted.mp4", *output.FILES, *demo.TABLES, demo.METHODS))
    with (folder / "table.csv").open(newline="", encoding="utf-8") as file:
        rows = {row.pop("method"): {k: float(v) for k, v in row.items()} for row in csv.DictReader(file)}
    assert len(rows) == 11  # seven methods, four controls
    assert len((folder / "table.md").read_text(encoding="utf-8").splitlines()) == 13
    assert rows["STAA relevance"]["auroc_joint"] > 0.95
    assert rows["STAA relevance"]["auroc_temporal"] > 0.9
    assert rows["STAA relevance"]["pointing"] == 1
    assert abs(rows["random"]["auroc_joint"] - 0.5) < 0.03
    assert rows["uniform"]["auroc_joint"] == rows["uniform"]["auroc_temporal"] == 0.5
    assert rows["inverted"]["auroc_joint"] == pytest.approx(1 - rows["STAA relevance"]["auroc_joint"])
    assert rows["centre"]["auroc_joint"] < rows["STAA relevance"]["auroc_joint"]
    assert rows["STAA relevance"]["forwards"] < 20 < rows["Captum IntegratedGradients, 50 steps"]["forwards"]
    assert rows["Captum Occlusion, 2 x 8 x 8"]["forwards"] > 100  # 288 boxes
    return rows


def test_the_demo_in_small(tmp_path, capsys):
    threads = torch.get_num_threads()
    assert main(["demo", "--out", str(tmp_path / "demo"), "--clips", "2"]) == 0
    assert torch.get_num_threads() == threads
    rows = check_demo(tmp_path / "demo", clips=2)
    said = capsys.readouterr().out
    assert "as planted: the class, and every key frame" in said and "| STAA relevance" in said

    metrics = pytest.importorskip("sklearn.metrics")  # the table again, another way
    from captum.attr import Saliency

    clf = VideoClassifier.from_pretrained(demo.MODEL)
    scores = []
    for clip, label, truth in (PLANTED[i] for i in range(2)):
        clip = clip[None].requires_grad_()
        magnitude = Saliency(clf).attribute(clip, target=int(label))[0].sum(1).abs()
        scores.append(metrics.roc_auc_score(truth.flatten().numpy(), magnitude.flatten().numpy()))
    assert rows["Captum Saliency"]["auroc_joint"] == pytest.approx(np.mean(scores), rel=1e-4)


def test_the_demo_says_where_it_differs_from_what_was_planted(video, tmp_path):
    explanation = explaining.explain(Options(video=video, model=MODEL, out=tmp_path))
    when = PLANTED[0][2].flatten(1).any(1)
    label = PLANTED.labels[int(PLANTED[0][1])]
    assert demo.verdict(explanation, label, when) == ""
    assert "'stripes' was planted" in demo.verdict(explanation, "stripes", when)
    assert "outside of the evidence" in demo.verdict(explanation, label, ~when)


def test_every_method_of_the_table_is_there():
    assert len(comparison.methods_of(VideoClassifier.from_pretrained("tiny-timesformer-motion"))) == 7


@pytest.mark.slow
def test_the_demo_in_full(tmp_path):
    """As a user starts it, and with enough clips to tell methods apart."""
    command = [sys.executable, "-m", "captum_staa", "demo", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = check_demo(tmp_path / "demo", clips=demo.CLIPS)
    assert rows["STAA relevance"]["auroc_joint"] > rows["Captum IntegratedGradients, 50 steps"]["auroc_joint"]
    assert rows["random"]["pointing"] < 0.6
