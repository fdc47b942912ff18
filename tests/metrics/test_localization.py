"""Ranking metrics equal a count of all pairs, and pointing games equal the maximum found by hand."""

from __future__ import annotations

import math

import pytest
import torch
from covering import in_one_case

from captum_staa.metrics.localization import auroc, average_precision, pointing_game, temporal_pointing

RANKED = [auroc, average_precision, pointing_game, temporal_pointing]


def counted(scores: list[float], inside: list[bool]) -> float:
    """AUROC by its definition: a loop over pairs, where ties count half."""
    won, pairs = 0.0, 0
    for score, is_in in zip(scores, inside, strict=True):
        for other, other_in in zip(scores, inside, strict=True):
            if is_in and not other_in:
                pairs += 1
                won += 1.0 if score > other else 0.5 if score == other else 0.0
    return won / pairs if pairs else math.nan


def stepped(scores: list[float], inside: list[bool]) -> float:
    """Average precision by its definition: a loop over thresholds, from the highest."""
    recall_before, area = 0.0, 0.0
    if all(inside) or not any(inside):
        return math.nan
    for threshold in sorted(set(scores), reverse=True):
        kept = [is_in for score, is_in in zip(scores, inside, strict=True) if score >= threshold]
        recall, precision = sum(kept) / sum(inside), sum(kept) / len(kept)
        recall_before, area = recall, area + (recall - recall_before) * precision
    return area


def along(axis: str, scores: torch.Tensor, truth: torch.Tensor) -> tuple[list[float], list[bool]]:
    """The values that an axis compares in one clip ``(T, H, W)``, by loops."""
    scores, (t, h, w) = scores.double(), scores.shape
    if axis == "joint":
        return scores.flatten().tolist(), truth.flatten().tolist()
    if axis == "time":
        return [sum(frame.flatten().tolist()) for frame in scores], [bool(frame.any()) for frame in truth]
    places = [(y, x) for y in range(h) for x in range(w)]
    summed = [sum(scores[i, y, x].item() for i in range(t)) for y, x in places]
    return summed, [any(truth[:, y, x].tolist()) for y, x in places]


def drawn(seed: int, levels: int | None, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, 5, 4, 3, generator=generator)
    if levels:  # integers, so that many are equal and sums are exact
        scores = (scores * levels).round()
    return scores, torch.rand(batch, 5, 4, 3, generator=generator) < 0.15


@in_one_case("levels", "seed")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize(("metric", "oracle"), [(auroc, counted), (average_precision, stepped)])
def test_ranking_metrics_equal_their_definition(metric, oracle, seed, levels):
    scores, truth = drawn(seed, levels)
    for axis in ("joint", "time", "space"):
        expected = [oracle(*along(axis, s, t)) for s, t in zip(scores, truth, strict=True)]
        found = metric(scores, truth, axis=axis)
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(expected, rel=1e-14, nan_ok=True), axis


@in_one_case()
@pytest.mark.parametrize(("metric", "name"), [(auroc, "roc_auc_score"), (average_precision, "average_precision_score")])
@pytest.mark.parametrize("levels", [None, 2])
def test_ranking_metrics_equal_scikit_learn(metric, name, levels):
    oracle = getattr(pytest.importorskip("sklearn.metrics"), name)
    scores, truth = drawn(7, levels)
    expected = [oracle(t.flatten().numpy(), s.flatten().numpy()) for s, t in zip(scores, truth, strict=True)]
    assert metric(scores, truth).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_constant_map_is_chance_and_only_the_order_counts():
    scores, truth = drawn(1, levels=None)
    assert auroc(torch.full_like(scores, 7.0), truth).tolist() == [0.5] * 3
    share = truth.flatten(1).double().mean(1).tolist()
    assert average_precision(torch.full_like(scores, 7.0), truth).tolist() == pytest.approx(share)
    assert average_precision(scores.exp() * 9, truth).tolist() == average_precision(scores, truth).tolist()
    torch.testing.assert_close(auroc(scores.exp() * 9, truth), auroc(scores, truth), rtol=0, atol=0)
    torch.testing.assert_close(auroc(-scores, truth), 1 - auroc(scores, truth))
    scores[0, 0, 0, 0], scores[1, 1, 1, 1] = math.inf, -math.inf
    for metric in (auroc, average_precision):
        assert metric(scores, truth).isfinite().all()
        assert (
            metric(scores, truth, axis="space").tolist() == metric(scores.clamp(-99, 99), truth, axis="space").tolist()
        )


def test_a_sum_of_infinity_and_minus_infinity_raises():
    scores, truth = drawn(1, levels=None)
    scores[0, 0, 1, 2], scores[0, 0, 2, 1] = math.inf, -math.inf  # in the same frame, but not in the same pixel
    for metric in (auroc, average_precision):
        assert metric(scores, truth, axis="space").isfinite().all()
        with pytest.raises(
            ValueError, match=r"sums over axis='time' must not add infinity and -infinity.* 1 of the 15"
        ):
            metric(scores, truth, axis="time")
    with pytest.raises(ValueError, match="1 of the 15 sums"):
        temporal_pointing(scores, truth)


def test_each_clip_is_scored_alone():
    scores, truth = drawn(2, levels=2)
    for axis in ("joint", "time", "space"):
        for metric in (auroc, average_precision):
            whole = metric(scores, truth, axis=axis)
            alone = torch.cat([metric(scores[i : i + 1], truth[i : i + 1], axis=axis) for i in range(3)])
            torch.testing.assert_close(whole, alone, rtol=0, atol=0, equal_nan=True)
    for metric in RANKED:
        assert metric(scores, truth)[[2, 0, 1]].tolist() == metric(scores[[2, 0, 1]], truth[[2, 0, 1]]).tolist()


def test_clips_with_nothing_to_compare_are_nan():
    scores, truth = drawn(3, levels=None)
    truth[0], truth[1] = False, True
    truth[2, :, 0, 0], truth[2, 0, 1, 1] = True, False  # evidence in every frame, but not everywhere
    for metric in (auroc, average_precision):
        assert metric(scores, truth).isnan().tolist() == [True, True, False]
        assert metric(scores, truth, axis="time").isnan().tolist() == [True, True, True]
        assert metric(scores, truth, axis="space").isnan().tolist() == [True, True, False]
    for pointed in (pointing_game(scores, truth), pointing_game(scores, truth, per="frame")):
        assert pointed.isnan().tolist() == [True, False, False]
    assert temporal_pointing(scores, truth).isnan().tolist() == [True, False, False]


@in_one_case()
@pytest.mark.parametrize("metric", RANKED)
def test_the_truth_scores_highest_and_its_inverse_lowest(metric):
    truth = torch.zeros(2, 5, 4, 3, dtype=torch.bool)
    truth[0, 1, 2:, 1], truth[1, 3:, 0, 2] = True, True
    assert metric(truth.float(), truth).tolist() == [1, 1]
    lowest = 2 / 60 if metric is average_precision else 0  # the last 2 of 60 voxels are added together
    assert metric(-truth.float(), truth).tolist() == pytest.approx([lowest] * 2)
    assert (metric.higher_is_better, metric.lowest, metric.highest) == (True, 0, 1)


@in_one_case()
@pytest.mark.parametrize("metric", RANKED)
def test_maps_as_tensors_arrays_and_attributions(metric):
    scores, truth = drawn(4, levels=2)
    channels = torch.stack([scores - 3, torch.full_like(scores, 5), torch.full_like(scores, -2)], dim=2)  # sum: scores
    assert metric(scores, truth).dtype == torch.float64
    expected = metric(scores, truth).tolist()
    array = scores.numpy()[:, :, :, ::-1].copy()[:, :, :, ::-1]  # negative strides
    array.flags.writeable = False
    assert metric(array, truth.numpy()).tolist() == expected
    assert metric(channels, truth, layout="BTCHW").tolist() == expected
    assert metric(channels.movedim(2, 1).numpy(), truth, layout="BCTHW").tolist() == expected
    assert metric(scores.int(), truth).tolist() == expected
    assert metric(scores.requires_grad_(), truth).requires_grad is False
    with pytest.raises(ValueError, match="layout='BTCHW'"):
        metric(channels, truth)
    with pytest.raises(ValueError, match=r"\(3, 5, 4, 3\)"):
        metric(scores.detach(), truth, layout="BTCHW")


@in_one_case()
@pytest.mark.parametrize("at", [(0, 0, 0), (5, 0, 8), (2, 6, 1), (5, 6, 8), (3, 2, 7)])
@pytest.mark.parametrize("tolerance", [(0, 0, 0), (1, 0, 0), (0, 2, 0), (0, 0, 3), (1, 2, 3), (9, 9, 9)])
def test_pointing_game_equals_a_check_of_the_maximum(at, tolerance):
    """Equal to arithmetic on coordinates. The three sizes differ, so that swapped axes are found."""
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


def test_pointing_game_does_not_swap_height_and_width():
    truth = torch.zeros(1, 1, 4, 12, dtype=torch.bool)
    truth[0, 0, 1, 10] = True
    scores = torch.zeros(1, 1, 4, 12)
    scores[0, 0, 3, 10] = 1.0  # two rows below
    assert pointing_game(scores, truth, (0, 2, 0)).item() == 1
    assert pointing_game(scores, truth, (0, 0, 2)).item() == 0
    assert pointing_game(scores, truth, (2, 1, 11)).item() == 0


@in_one_case()
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tolerance", [(0, 0, 0), (1, 0, 0), (0, 2, 0), (0, 0, 3), (1, 1, 2)])
def test_pointing_game_per_frame_equals_a_check_of_each_maximum(seed, tolerance):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(2, 6, 5, 8, generator=generator) < 0.02
    truth[:, seed % 3] = False
    scores = torch.randint(0, 12, (2, 6, 5, 8), generator=generator).float()  # with ties
    expected = []
    for clip, marks in zip(scores.tolist(), truth, strict=True):
        places = marks.nonzero().tolist()
        shares = []
        for i, frame in enumerate(clip):
            if any(place[0] == i for place in places):
                top = max(max(row) for row in frame)
                tied = [(i, y, x) for y in range(5) for x in range(8) if frame[y][x] == top]
                near = [
                    any(all(abs(a - b) <= r for a, b, r in zip(at, place, tolerance, strict=True)) for place in places)
                    for at in tied
                ]
                shares.append(sum(near) / len(near))
        expected.append(sum(shares) / len(shares))
    assert pointing_game(scores, truth, tolerance, per="frame").tolist() == pytest.approx(expected)


def test_frames_without_truth_are_ignored():
    truth = torch.zeros(1, 3, 4, 12, dtype=torch.bool)
    truth[0, 0, 1, 10] = truth[0, 2, 1, 10] = True
    scores = torch.zeros(1, 3, 4, 12)
    scores[0, 0, 1, 10], scores[0, 1, 0, 0], scores[0, 2, 1, 9] = (
        1,
        9,
        1,
    )  # a hit; a frame without truth; one column off
    assert pointing_game(scores, truth).item() == 0
    assert pointing_game(scores, truth, per="frame").item() == 0.5
    assert pointing_game(scores, truth, (0, 0, 1), per="frame").item() == 1
    assert pointing_game(scores, truth, (0, 1, 0), per="frame").item() == 0.5  # rows and columns differ


@in_one_case("seed")
@pytest.mark.parametrize("seed", range(5))
def test_temporal_pointing_equals_a_check_of_the_sums(seed):
    scores, truth = drawn(seed, levels=1)
    truth[:, ::2] = False
    truth[0, 1, 3, 2] = truth[1, 3, 0, 0] = True
    expected = []
    for clip, marks in zip(scores, truth, strict=True):
        sums, holds = along("time", clip, marks)
        best = [is_in for total, is_in in zip(sums, holds, strict=True) if total == max(sums)]
        expected.append(sum(best) / len(best) if any(holds) else math.nan)
    assert temporal_pointing(scores, truth).tolist() == pytest.approx(expected, nan_ok=True)


def test_temporal_pointing_of_two_joined_clips():
    truth = torch.zeros(3, 8, 4, 4, dtype=torch.bool)
    truth[:, 4:] = True
    scores = torch.zeros(3, 8, 4, 4)
    scores[0, 6], scores[0, 1, 0, 0] = 0.1, 1.5  # 1.6 against 1.5: the sum counts, not the maximum
    scores[1, 3], scores[1, 4] = 0.5, -0.9  # signed values count
    assert temporal_pointing(scores, truth).tolist() == [1, 0, 0.5]  # the third is a constant map


def test_equal_maxima_give_the_fraction_of_hits():
    truth = torch.zeros(2, 2, 2, 2, dtype=torch.bool)
    truth[:, 0] = True
    scores = torch.zeros(2, 2, 2, 2)
    scores[1, 0, 0, 0] = scores[1, 1, 0, 0] = scores[1, 1, 1, 1] = 5
    assert pointing_game(scores, truth).tolist() == pytest.approx([0.5, 1 / 3])  # the first is a constant map


@in_one_case()
@pytest.mark.parametrize(
    ("scores", "truth", "options", "error", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4).bool(), {}, ValueError, "(2, 3, 4)"),
        (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4, 3).bool(), {}, ValueError, "(1, 2, 4, 3)"),
        (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), {}, TypeError, "truth > 0"),
        (
            torch.full((1, 2, 3, 4), math.nan),
            torch.zeros(1, 2, 3, 4).bool(),
            {},
            ValueError,
            "attributions must not contain nan",
        ),
        ([1.0], torch.zeros(1, 2, 3, 4).bool(), {}, TypeError, "attributions must be"),
        (torch.zeros(1, 2, 3, 4), [True], {}, TypeError, "truth must be"),
        (torch.zeros(0, 2, 3, 4), torch.zeros(0, 2, 3, 4).bool(), {}, ValueError, "non-empty"),
        (
            torch.full((1, 2, 3, 3, 4), math.inf),
            torch.zeros(1, 2, 3, 4).bool(),
            {"layout": "BTCHW"},
            ValueError,
            "got 72 nan",
        ),
    ],
)
def test_invalid_arguments_raise(scores, truth, options, error, message):
    for metric in RANKED:
        with pytest.raises(error) as caught:
            metric(scores, truth, **options)
        assert message in str(caught.value)


def test_invalid_options_raise():
    scores, truth = drawn(0, None)
    for metric in (auroc, average_precision):
        with pytest.raises(ValueError, match="'frames'"):
            metric(scores, truth, axis="frames")
    for tolerance, error in (((1, 2), ValueError), ((0, -1, 0), ValueError), (3, ValueError), ((0, 0.5, 0), TypeError)):
        with pytest.raises(error, match="tolerance"):
            pointing_game(scores, truth, tolerance)
    with pytest.raises(ValueError, match=r"per .*'frames'"):
        pointing_game(scores, truth, per="frames")
