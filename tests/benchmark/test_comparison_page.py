"""Tests of the published comparison: intervals over models and clips, bold cells, and the page from stored results."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from captum_staa.benchmark import Comparison, Row
from captum_staa.benchmark.records import control_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compared() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield SimpleNamespace(
            **{name: importlib.import_module(f"compared.{name}") for name in ("intervals", "page", "stored")}
        )


def tables(*means: float, clips: int = 200, spread: float = 0.1) -> list[torch.Tensor]:
    """Return scores of two methods, (clips, 2) for each model; the second method has the model's mean."""
    generator = torch.Generator().manual_seed(1)
    noise = [spread * torch.randn(clips, 2, generator=generator, dtype=torch.float64) for _ in means]
    return [0.5 + own * torch.tensor([0.0, 1.0]) + part for own, part in zip(means, noise, strict=True)]


def test_each_model_counts_the_same_whatever_its_number_of_clips(compared):
    scores = compared.intervals.Scores.of([torch.zeros(40, 1), torch.ones(2, 1)])
    assert scores.means.tolist() == [0.5]


def test_intervals_hold_the_spread_of_models_and_of_clips(compared):
    """Against the standard error of a two-stage sample; clips alone would give an interval that is far too narrow."""
    of_models = tables(*np.linspace(-0.2, 0.2, 12).tolist())
    scores = compared.intervals.Scores.of(of_models)
    own = torch.stack([table.mean(0) for table in of_models])
    within = torch.stack([table.var(0, correction=0) / len(table) for table in of_models]).mean(0)
    error = ((own.var(0, correction=0) + within) / len(of_models)).sqrt()
    half = scores.intervals.diff(dim=1)[:, 0] / 2
    torch.testing.assert_close(half, 1.96 * error, rtol=0.08, atol=0)
    one = compared.intervals.Scores.of(of_models[:1])  # of one model: clips alone
    error = of_models[0].std(0) / math.sqrt(200)
    torch.testing.assert_close(one.intervals.diff(dim=1)[:, 0] / 2, 1.96 * error, rtol=0.08, atol=0)


def test_a_method_without_numbers_on_a_model_is_averaged_over_the_others(compared):
    first, second = torch.tensor([[0.2, 0.4]] * 3), torch.tensor([[0.6, math.nan]] * 3)
    scores = compared.intervals.Scores.of([first, second])
    assert scores.means.tolist() == pytest.approx([0.4, 0.4])
    assert scores.intervals[1].tolist() == pytest.approx([0.4, 0.4])  # nan only if the model is drawn alone


def test_only_a_method_beyond_all_others_and_all_controls_is_clearly_best(compared):
    rows = torch.Generator().manual_seed(2)

    def scores(*means: float, better: int = 1) -> compared.intervals.Scores:
        noise = 0.05 * torch.randn(20, len(means), generator=rows, dtype=torch.float64)
        return compared.intervals.Scores.of([torch.tensor(means) + noise, torch.tensor(means) - noise], better)

    assert scores(0.9, 0.6, 0.5).clearly_best([0, 1]) == 0
    assert scores(0.9, 0.89, 0.5).clearly_best([0, 1]) is None  # meets the next method
    assert scores(0.9, 0.6, 0.91).clearly_best([0, 1]) is None  # meets the control
    assert scores(0.1, 0.6, 0.9, better=-1).clearly_best([0, 1]) == 0  # lower is better
    assert scores(math.nan, 0.9, 0.5).clearly_best([0, 1]) == 1
    assert scores(0.9, 0.6, 0.2).not_behind(0, range(3)) == [] and scores(0.9, 0.895, 0.2).not_behind(0, range(3)) == [
        1
    ]


def test_methods_that_differ_on_every_clip_differ_clearly_however_much_the_clips_vary(compared):
    """The draws are the same for all methods: intervals of single means meet, that of their difference holds no 0."""
    clips = torch.linspace(0, 1, 20)[:, None]
    scores = compared.intervals.Scores.of([torch.cat([clips, clips - 0.01], 1)] * 3)
    assert scores.clearly_best([0, 1]) is None
    assert scores.not_behind(0, range(2)) == []
    assert scores.share_first([0, 1]).tolist() == [1, 0]


def run_of(compared, tmp_path: Path, methods: dict[str, float], metric: str = "rivals", clips: int = 6) -> dict:
    """Return the stored results of a comparison in which each method has about this score."""
    noise = 0.002 * np.random.default_rng(3).standard_normal((clips, len(methods)))
    rows = [
        Row(f"clip-{at}", name, key, value)
        for at, line in enumerate(noise)
        for (name, mean), part in zip(methods.items(), line, strict=True)
        for key, value in ((metric, mean + part), ("forwards", 3.0))
        if not (math.isnan(mean) or (key == "forwards" and control_of(name)))
    ]
    answers = {f"clip-{at}": (0, int(at == 0)) for at in range(clips)}
    settings = {"inverted": "Saliency"}
    found = Comparison(rows, list(methods), [metric, "forwards"], {metric: 1, "forwards": -1}, settings, answers)
    compared.stored.keep(found, tmp_path / "run.json")
    return compared.stored.kept(tmp_path / "run.json")


def test_stored_results_have_the_numbers_of_the_comparison(compared, tmp_path):
    run = run_of(compared, tmp_path, {"Saliency": 0.7, "RISE": 0.9, "random": 0.5, "GradCAM": math.nan})
    table = compared.stored.numbers(run, "rivals", ["RISE", "GradCAM", "STAA", "Saliency"])
    assert table.shape == (6, 4) and table[:, 1:3].isnan().all()
    assert table.nanmean(0)[[0, 3]].tolist() == pytest.approx([0.9, 0.7], abs=0.005)
    assert compared.stored.numbers(run, "unknown", ["RISE"]).isnan().all()


def test_slow_methods_have_numbers_on_the_first_clips_only(compared, tmp_path):
    run = run_of(compared, tmp_path, {"Saliency": 0.7, "random": 0.5})
    slow = run_of(compared, tmp_path, {"RISE": 0.9, "random": 0.1}, clips=4)
    table = compared.stored.numbers(compared.stored.joined(run, slow), "rivals", ["Saliency", "RISE", "random"])
    assert (~table.isnan()).sum(0).tolist() == [6, 4, 6] and not table[:4].isnan().any()
    assert table.nanmean(0).tolist() == pytest.approx([0.7, 0.9, 0.5], abs=0.005)
    with pytest.raises(ValueError, match="first clips"):
        compared.stored.joined(slow, run)


def test_the_page_has_a_table_for_each_kind_of_model(compared, tmp_path, monkeypatch):
    runs = {
        "videomae-pattern": {"STAA": 0.8, "Saliency": 0.7, "random": 0.5},
        "vivit-order": {"STAA": 0.9, "Saliency": 0.6, "random": 0.5},
        "resnet3d-order": {"STAA": math.nan, "Saliency": 0.9, "random": 0.5},
    }
    kept = {name: run_of(compared, tmp_path, own) for name, own in runs.items()}
    kept["videomae-pattern-classes"] = run_of(compared, tmp_path, runs["videomae-pattern"], "classes", clips=4)
    monkeypatch.setattr(compared.page, "save", lambda figure, path: None)
    compared.page.write(kept, tmp_path)
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    parts = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    assert list(parts) == [
        "What to use",
        "Video transformers",
        "3D CNNs",
        "All models",
        "Each model",
        "What is left out",
    ]
    assert "3 small models, at least 6" in text.replace("\n", " ")
    table = parts["Video transformers"]
    assert "2 models, 12 clips; *class A against B*: 1 of them, 4 clips." in table
    assert re.search(
        r"^\| STAA \| \*\*0\.8[45]\d \((0.79|0\.80)\d to 0\.90\d\)\*\* \| \*\*0\.80\d .* \| 3 \|$", table, re.MULTILINE
    )
    assert re.search(r"^\| control: random \| 0\.[45]\d\d \(.* \| – \|$", table, re.MULTILINE)
    assert "| evidence against rivals | STAA | 100% of draws | none |" in table
    assert "STAA" not in parts["3D CNNs"].split("Saliency", 1)[1] and "nan" not in table
    assert "| vivit-order | bundled | 5 of 6 |" in parts["Each model"]


def test_the_committed_page_is_made_of_the_committed_results(compared, tmp_path, monkeypatch):
    docs = ROOT / "docs"
    kept = {path.stem: compared.stored.kept(path) for path in (docs / "comparison").glob("*.json")}
    order = [f"{name}{kind}" for name in compared.page.SUBJECTS for kind in compared.page.KINDS]
    monkeypatch.setattr(compared.page, "save", lambda figure, path: None)
    compared.page.write({name: kept[name] for name in order if name in kept}, tmp_path)
    assert (tmp_path / "comparison.md").read_text("utf-8") == (docs / "comparison.md").read_text("utf-8")
    assert min(len(run["clips"]) for name, run in kept.items() if name in order[::3]) >= 20
