"""The demo: its files, its table, and its messages if the result differs from the planted evidence."""

from __future__ import annotations

import csv
import os
import re
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
from captum_staa._utils.tensors import gaussian
from captum_staa.benchmark import METHODS
from captum_staa.cli import demo, output, parser
from captum_staa.cli import explain as explaining
from captum_staa.cli.explanation import Options

pytest.importorskip("av")


def table_of(path: Path) -> dict[str, list[str]]:
    """Return the rows of a Markdown table, by the first cell of each row."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def check_demo(folder: Path, clips: int) -> dict[str, dict[str, float]]:
    """Check the files of a demo, and return the mean scores by method and metric."""
    check_numbers(folder)
    assert sorted(os.listdir(folder)) == sorted(("planted.mp4", demo.SHEET, *output.FILES, *demo.TABLES, demo.PAGE))
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with (folder / "table.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found[row["method"]][row["metric"]].append(
                float(row["value"])
            )  # fails for a row with a reason instead of a number
    controls = ("random", "uniform", "center", "model-free", "inverted", "random weights", "other class")
    assert list(found) == [*demo.METHODS, *controls]
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

    assert means["STAA (relevance)"]["rivals"] > 0.8 and means["STAA (relevance)"]["auroc"] > 0.8
    assert abs(means["random"]["auroc"] - 0.5) < 0.03
    assert means["uniform"]["rivals"] == means["uniform"]["rivals_time"] == 0.5
    assert means["inverted"]["rivals"] == pytest.approx(1 - means["STAA (relevance)"]["rivals"])
    for control in ("center", "model-free", "random weights", "other class"):
        assert means[control]["rivals"] < means["STAA (relevance)"]["rivals"], control
    return means


def test_demo_with_two_clips(tmp_path, capsys):
    threads = torch.get_num_threads()
    assert main(["demo", "--out", str(tmp_path / "demo"), "--clips", "2"]) == 0
    assert torch.get_num_threads() == threads
    means = check_demo(tmp_path / "demo", clips=2)
    said = capsys.readouterr().out
    assert "as planted: the class, and every key frame" in said and "| STAA (relevance)" in said
    assert all(f"{name}: {METHODS[name].description}" in said for name in demo.METHODS)
    assert said.startswith("This demo explains a synthetic clip") and "contains no real video" in said
    commands = re.findall(r"^    python -m captum_staa (.*)$", said.split("try next:")[1], re.M)
    parsed = [parser.build_parser().parse_args(command.split()) for command in commands]
    assert [str(options.run.__name__) for options in parsed] == ["_explain", "_compare", "_explain"]
    assert parsed[0].video.exists() and parsed[0].versus in PLANTED.labels
    page = (tmp_path / "demo" / "methods.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("planted", *demo.METHODS)) and "inverted" not in page

    metrics = pytest.importorskip("sklearn.metrics")  # computes scores of the table independently
    from captum.attr import InputXGradient

    clf = VideoClassifier.from_pretrained(demo.MODEL)
    scores = []
    for index in range(2):
        clip, label, truth = PLANTED[index]
        attributions = InputXGradient(clf).attribute(clip[None].requires_grad_(), target=int(label)).detach()
        maps = gaussian(attributions.sum(2), (1.5, 6.0, 6.0))[0]  # (T, H, W)
        objects = truth | PLANTED.rivals(index)
        joint = metrics.roc_auc_score(truth[objects].numpy(), maps[objects].detach().numpy())
        everywhere = metrics.roc_auc_score(truth.flatten().numpy(), maps.detach().flatten().numpy())
        scores.append((joint, everywhere))
    shown = [means["InputXGradient"][metric] for metric in ("rivals", "auroc")]
    assert shown == pytest.approx(np.mean(scores, axis=0), rel=1e-4)


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("out of luck"), 1), (KeyboardInterrupt(), 130)])
def test_demo_reports_failed_methods_and_writes_no_partial_table(error, code, tmp_path, monkeypatch, capsys):
    def broken(clip: torch.Tensor, target: int) -> torch.Tensor:
        raise error

    monkeypatch.setattr(demo, "METHODS", {"STAA (relevance)": "STAA (relevance)", "broken": broken})
    monkeypatch.setattr(demo, "write", lambda *args, **options: [])  # the explanation's files are tested above
    threads = torch.get_num_threads()
    assert main(["demo", "--out", str(tmp_path), "--clips", "2"]) == code
    assert torch.get_num_threads() == threads
    said = capsys.readouterr()
    if code == 130:
        assert sorted(os.listdir(tmp_path)) == ["planted.mp4", "planted.png"] and "interrupted" in said.err
        return
    table = table_of(tmp_path / "table.md")
    assert table["broken"] == [*"–––––", "failed on 2 of 2 clips: RuntimeError: out of luck"]
    assert "RuntimeError: out of luck" in said.out and "0.9" in table["STAA (relevance)"][0]
    page = (tmp_path / "methods.html").read_text(encoding="utf-8")
    assert "STAA" in page and "broken" not in page


def test_verdict_names_the_difference_from_the_planted_evidence(video, tmp_path):
    explanation = explaining.explain(Options(video=video, model=MODEL, out=tmp_path))
    when = PLANTED[0][2].flatten(1).any(1)
    label = PLANTED.labels[int(PLANTED[0][1])]
    assert demo.verdict(explanation, label, when) == ""
    assert "'stripes' was planted" in demo.verdict(explanation, "stripes", when)
    assert "outside of the evidence" in demo.verdict(explanation, label, ~when)


@pytest.mark.slow
def test_demo_as_a_subprocess_with_default_clips(tmp_path):
    """With enough clips for a significant difference between methods."""
    command = [sys.executable, "-m", "captum_staa", "demo", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    means = check_demo(tmp_path / "demo", clips=demo.CLIPS)
    assert means["STAA (relevance)"]["rivals"] > means["IntegratedGradients"]["rivals"]
    assert means["model-free"]["rivals"] < 0.65 and means["random weights"]["rivals"] < 0.65
