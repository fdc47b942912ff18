"""Localization metrics: equal to a count of all pairs, and to a look at the maximum by hand."""

from __future__ import annotations

import math

import pytest
import torch

from captum_staa.metrics import auroc, pointing_game


def counted(scores: list[float], inside: list[bool]) -> float:
    """AUROC by its definition: every pair, a tie for half."""
    won, pairs = 0.0, 0
    for score, is_in in zip(scores, inside, strict=True):
        for other, other_in in zip(scores, inside, strict=True):
            if is_in and not other_in:
                pairs += 1
                won += 1.0 if score > other else 0.5 if score == other else 0.0
    return won / pairs if pairs else math.nan


def drawn(seed: int, levels: int | None, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, 5, 4, 3, generator=generator)
    if levels:  # whole numbers, so that many are equal and sums are exact
        scores = (scores * levels).round()
    return scores, torch.rand(batch, 5, 4, 3, generator=generator) < 0.15


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("levels", [None, 1, 3])
def test_auroc_is_a_count_of_pairs(seed, levels):
    scores, truth = drawn(seed, levels)
    joint = [counted(s.flatten().tolist(), t.flatten().tolist()) for s, t in zip(scores, truth, strict=True)]
    time = [
        counted([sum(f.flatten().tolist()) for f in s.double()], [bool(f.any()) for f in t])
        for s, t in zip(scores, truth, strict=True)
    ]
    space = [
        counted(
            [sum(s.double()[:, y, x].tolist()) for y in range(4) for x in range(3)],
            [any(t[:, y, x].tolist()) for y in range(4) for x in range(3)],
        )
        for s, t in zip(scores, truth, strict=True)
    ]
    for axis, expected in (("joint", joint), ("time", time), ("space", space)):
        found = auroc(scores, truth, axis=axis)
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(expected, rel=1e-15, nan_ok=True), axis


def test_auroc_agrees_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    scores, truth = drawn(7, levels=2)
    expected = [
        metrics.roc_auc_score(t.flatten().numpy(), s.flatten().numpy()) for s, t in zip(scores, truth, strict=True)
    ]
    assert auroc(scores, truth).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_constant_map_is_chance_and_order_is_all_that_counts():
    scores, truth = drawn(1, levels=None)
    assert auroc(torch.full_like(scores, 7.0), truth).tolist() == [0.5] * 3
    torch.testing.assert_close(auroc(scores.exp() * 9, truth), auroc(scores, truth), rtol=0, atol=0)
    torch.testing.assert_close(auroc(-scores, truth), 1 - auroc(scores, truth))
    scores[0, 0, 0, 0], scores[1, 1, 1, 1] = math.inf, -math.inf
    assert auroc(scores, truth).isfinite().all()


def test_each_clip_is_scored_alone():
    scores, truth = drawn(2, levels=2)
    for axis in ("joint", "time", "space"):
        whole = auroc(scores, truth, axis=axis)
        alone = torch.cat([auroc(scores[i : i + 1], truth[i : i + 1], axis=axis) for i in range(3)])
        torch.testing.assert_close(whole, alone, rtol=0, atol=0, equal_nan=True)
    assert pointing_game(scores, truth)[1:].tolist() == pointing_game(scores[1:], truth[1:]).tolist()


def test_nothing_to_compare_is_nan():
    scores, truth = drawn(3, levels=None)
    truth[0], truth[1] = False, True
    truth[2, :, 0, 0], truth[2, 0, 1, 1] = True, False  # evidence in every frame, but not everywhere
    assert auroc(scores, truth).isnan().tolist() == [True, True, False]
    assert auroc(scores, truth, axis="time").isnan().tolist() == [True, True, True]
    assert auroc(scores, truth, axis="space").isnan().tolist() == [True, True, False]
    assert pointing_game(scores, truth).isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("at", [(0, 0, 0), (5, 0, 8), (2, 6, 1), (5, 6, 8), (3, 2, 7)])
@pytest.mark.parametrize("tolerance", [(0, 0, 0), (1, 0, 0), (0, 2, 0), (0, 0, 3), (1, 2, 3), (9, 9, 9)])
def test_pointing_is_a_look_at_the_maximum(at, tolerance):
    """Against plain arithmetic on coordinates, in a box whose three sides all differ: swapped axes would show."""
    generator = torch.Generator().manual_seed(sum(at))
    truth = torch.rand(1, 6, 7, 9, generator=generator) < 0.01
    truth[0, 2, 3, 4] = True
    scores = torch.rand(1, 6, 7, 9, generator=generator)
    scores[(0, *at)] = 2.0
    near = [
        all(abs(a - b) <= reach for a, b, reach in zip(at, place, tolerance, strict=True))
        for place in truth[0].nonzero().tolist()
    ]
    assert pointing_game(scores, truth, tolerance).tolist() == [float(any(near))]


def test_pointing_never_swaps_height_and_width():
    truth = torch.zeros(1, 1, 4, 12, dtype=torch.bool)
    truth[0, 0, 1, 10] = True
    scores = torch.zeros(1, 1, 4, 12)
    scores[0, 0, 3, 10] = 1.0  # two rows below
    assert pointing_game(scores, truth, (0, 2, 0)).item() == 1
    assert pointing_game(scores, truth, (0, 0, 2)).item() == 0
    assert pointing_game(scores, truth, (2, 1, 11)).item() == 0


def test_of_equal_maxima_the_fraction_counts():
    truth = torch.zeros(2, 2, 2, 2, dtype=torch.bool)
    truth[:, 0] = True
    scores = torch.zeros(2, 2, 2, 2)
    scores[1, 0, 0, 0] = scores[1, 1, 0, 0] = scores[1, 1, 1, 1] = 5
    assert pointing_game(scores, truth).tolist() == pytest.approx([0.5, 1 / 3])  # the first is a constant map


@pytest.mark.parametrize(
    ("scores", "truth", "options", "error", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4).bool(), {}, ValueError, "(2, 3, 4)"),
        (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4, 3).bool(), {}, ValueError, "(1, 2, 4, 3)"),
        (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), {}, TypeError, "pass truth > 0"),
        (torch.full((1, 2, 3, 4), math.nan), torch.zeros(1, 2, 3, 4).bool(), {}, ValueError, "24 of the 24 scores"),
        ([1.0], torch.zeros(1, 2, 3, 4).bool(), {}, TypeError, "list"),
    ],
)
def test_wrong_arguments_are_named(scores, truth, options, error, message):
    for metric in (auroc, pointing_game):
        with pytest.raises(error) as caught:
            metric(scores, truth, **options)
        assert message in str(caught.value)


def test_wrong_options_are_named():
    scores, truth = drawn(0, None)
    with pytest.raises(ValueError, match="'frames' came"):
        auroc(scores, truth, axis="frames")
    for tolerance in ((1, 2), (0, -1, 0), (0, 0.5, 0)):
        with pytest.raises(ValueError, match="tolerance is"):
            pointing_game(scores, truth, tolerance)
