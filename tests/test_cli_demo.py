"""The demonstration: its files, its table, and what it says when something differs."""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
from collections import defaultdict
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
from captum_staa.benchmark import METHODS
from captum_staa.cli import demo, output
from captum_staa.cli import explain as explaining
from captum_staa.cli.explanation import Options

pytest.importorskip("av")


def table_of(path: Path) -> dict[str, list[str]]:
    """The cells of a Markdown table by the first of each row."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def check_demo(folder: Path, clips: int) -> dict[str, dict[str, float]]:
    """Means by method and metric."""
    check_numbers(folder)
    assert sorted(os.listdir(folder)) == sorted(("planted.mp4", *output.FILES, *demo.TABLES, demo.PAGE))
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with (folder / "table.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found[row["method"]][row["metric"]].append(float(row["value"]))  # a reason is no number
    assert list(found) == [*demo.METHODS, "random", "uniform", "centre", "model-free", "inverted"]
    assert {len(values) for own in found.values() for values in own.values()} == {clips}
    means = {method: {metric: statistics.fmean(own[metric]) for metric in own} for method, own in found.items()}

    table = table_of(folder / "table.md")
    assert list(table) == ["method", *means]
    assert [name.split()[0] for name in table.pop("method")[:-1]] == list(demo.METRICS)
    for method, cells in table.items():
        shown = [float(cell.strip("*").split()[0]) for cell in cells[:3]]
        assert shown == pytest.approx([means[method][metric] for metric in demo.METRICS[:3]], abs=6e-4)
        timed = method in demo.METHODS
        assert {"forwards", "seconds"} & set(means[method]) == ({"forwards", "seconds"} if timed else set())
        assert all(cell != "–" for cell in cells[3:5]) if timed else cells[3:5] == ["–", "–"]

    assert means["STAA"]["auroc"] > 0.95 and means["STAA"]["auroc_time"] > 0.9
    assert means["STAA"]["pointing_game"] == 1
    assert abs(means["random"]["auroc"] - 0.5) < 0.03
    assert means["uniform"]["auroc"] == means["uniform"]["auroc_time"] == 0.5
    assert means["inverted"]["auroc"] == pytest.approx(1 - means["STAA"]["auroc"])
    assert means["centre"]["auroc"] < means["STAA"]["auroc"]
    return means


def test_the_demo_in_small(tmp_path, capsys):
    threads = torch.get_num_threads()
    assert main(["demo", "--out", str(tmp_path / "demo"), "--clips", "2"]) == 0
    assert torch.get_num_threads() == threads
    means = check_demo(tmp_path / "demo", clips=2)
    said = capsys.readouterr().out
    assert "as planted: the class, and every key frame" in said and "| STAA " in said
    assert all(f"{name}: {METHODS[name].about}" in said for name in demo.METHODS)
    page = (tmp_path / "demo" / "methods.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("planted", *demo.METHODS)) and "inverted" not in page

    metrics = pytest.importorskip("sklearn.metrics")  # the table again, another way
    from captum.attr import Saliency

    clf = VideoClassifier.from_pretrained(demo.MODEL)
    scores = []
    for clip, label, truth in (PLANTED[i] for i in range(2)):
        clip = clip[None].requires_grad_()
        maps = Saliency(clf).attribute(clip, target=int(label))[0].sum(1).abs()  # (T, H, W)
        when = truth.flatten(1).any(1)
        joint = metrics.roc_auc_score(truth.flatten().numpy(), maps.flatten().numpy())
        scores.append((joint, metrics.roc_auc_score(when.numpy(), maps.sum((1, 2)).numpy())))
    shown = [means["Saliency"][metric] for metric in ("auroc", "auroc_time")]
    assert shown == pytest.approx(np.mean(scores, axis=0), rel=1e-4)


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("out of luck"), 1), (KeyboardInterrupt(), 130)])
def test_the_demo_hides_no_method_that_fails_and_leaves_no_part_of_a_table(error, code, tmp_path, monkeypatch, capsys):
    def broken(clip: torch.Tensor, target: int) -> torch.Tensor:
        raise error

    monkeypatch.setattr(demo, "METHODS", {"STAA": "STAA", "broken": broken})
    monkeypatch.setattr(demo, "write", lambda *args, **options: [])  # the explanation's files are tested above
    threads = torch.get_num_threads()
    assert main(["demo", "--out", str(tmp_path), "--clips", "2"]) == code
    assert torch.get_num_threads() == threads
    said = capsys.readouterr()
    if code == 130:
        assert os.listdir(tmp_path) == ["planted.mp4"] and "interrupted" in said.err
        return
    table = table_of(tmp_path / "table.md")
    assert table["broken"] == [*"–––––", "failed on 2 of 2 clips: RuntimeError: out of luck"]
    assert "RuntimeError: out of luck" in said.out and "0.9" in table["STAA"][0]
    page = (tmp_path / "methods.html").read_text(encoding="utf-8")
    assert "STAA" in page and "broken" not in page


def test_the_demo_says_where_it_differs_from_what_was_planted(video, tmp_path):
    explanation = explaining.explain(Options(video=video, model=MODEL, out=tmp_path))
    when = PLANTED[0][2].flatten(1).any(1)
    label = PLANTED.labels[int(PLANTED[0][1])]
    assert demo.verdict(explanation, label, when) == ""
    assert "'stripes' was planted" in demo.verdict(explanation, "stripes", when)
    assert "outside of the evidence" in demo.verdict(explanation, label, ~when)


@pytest.mark.slow
def test_the_demo_in_full(tmp_path):
    """As a user starts it, and with enough clips to tell methods apart."""
    command = [sys.executable, "-m", "captum_staa", "demo", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    means = check_demo(tmp_path / "demo", clips=demo.CLIPS)
    assert means["STAA"]["auroc"] > means["IntegratedGradients"]["auroc"]
    assert means["random"]["pointing_game"] < 0.6
