"""Tests of the published comparison: intervals over models and clips, bold cells, and the page from stored results."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

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
