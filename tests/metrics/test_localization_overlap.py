"""Overlap metrics equal sets and sums by hand, and boxes_to_truth equals a loop over pixels."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from covering import in_one_case
from test_localization import along

from captum_staa.metrics.localization import boxes_to_truth
from captum_staa.metrics.overlap import energy_pointing_game, iou, relevance_rank_accuracy

OVERLAPS = [iou, relevance_rank_accuracy, energy_pointing_game]
NAN = (math.nan,) * 4


def drawn(seed: int, levels: int | None, size: tuple[int, int, int] = (4, 3, 2)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, *size, generator=generator)
    if levels:  # integers, so that many are equal and sums are exact
        scores = (scores * levels).round()
    return scores, torch.rand(3, *size, generator=generator) < 0.2


def kept(scores: list[float], size: float) -> list[float]:
    """The share of each voxel among the highest: 1, 0, or an equal part of the rest for ties at the limit."""
    parts, left = [0.0] * len(scores), size
    for level in sorted(set(scores), reverse=True):
        tied = [i for i, score in enumerate(scores) if score == level]
        for i in tied:
            parts[i] = min(1.0, left / len(tied))
        left = max(0.0, left - len(tied))
    return parts


def fuzzy_iou(scores: list[float], inside: list[bool], area: float | None) -> float:
    """Sum of minima divided by sum of maxima of two memberships. For plain sets this is the IoU."""
    if all(inside) or not any(inside):
        return math.nan
    parts = kept(scores, sum(inside) if area is None else area * len(scores))
    both, either = (
        sum(choice(part, is_in) for part, is_in in zip(parts, inside, strict=True)) for choice in (min, max)
    )
    return both / either


def over_all_orders(scores: list[float], inside: list[bool]) -> float:
    """The mean share of truth among the highest, over all choices between ties at the limit."""
    size = sum(inside)
    if size in (0, len(inside)):
        return math.nan
    cut = sorted(scores, reverse=True)[size - 1]
    above = [i for i, score in enumerate(scores) if score > cut]
    tied = [i for i, score in enumerate(scores) if score == cut]
    choices = list(itertools.combinations(tied, size - len(above)))
    return sum(inside[i] for choice in choices for i in (*above, *choice)) / (len(choices) * size)


def energy(scores: list[float], inside: list[bool]) -> float:
    within = sum(score for score, is_in in zip(scores, inside, strict=True) if is_in and score > 0)
    total = sum(score for score in scores if score > 0)
    return math.nan if all(inside) or not any(inside) or total == 0 else within / total


ORACLES = [
    (iou, lambda s, t: fuzzy_iou(s, t, None)),
    (relevance_rank_accuracy, over_all_orders),
    (energy_pointing_game, energy),
]


@in_one_case("levels", "seed")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("levels", [None, 1, 4])
@pytest.mark.parametrize(("metric", "oracle"), ORACLES)
def test_overlap_metrics_equal_counts_of_voxels(metric, oracle, seed, levels):
    scores, truth = drawn(seed, levels)
    for axis in ("joint", "time", "space"):
        expected = [oracle(*along(axis, s, t)) for s, t in zip(scores, truth, strict=True)]
        found = metric(scores, truth, axis)
        assert found.dtype == torch.float64 and found.shape == (3,)
        assert found.tolist() == pytest.approx(expected, rel=1e-12, nan_ok=True), axis


@in_one_case()
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [None, 1])
def test_iou_for_several_areas(seed, levels):
    scores, truth = drawn(seed, levels)
    areas = [1e-9, 0.1, 1 / 3, 0.5, 0.77, 1.0]
    for axis in ("joint", "space"):
        expected = [[fuzzy_iou(*along(axis, s, t), a) for a in areas] for s, t in zip(scores, truth, strict=True)]
        curve = iou(scores, truth, axis, area=areas)
        assert curve.shape == (3, 6)
        for found, wanted in zip(curve.tolist(), expected, strict=True):
            assert found == pytest.approx(wanted, rel=1e-12, nan_ok=True)
        single = iou(scores, truth, axis, area=0.5)
        torch.testing.assert_close(single, curve[:, 3], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(iou(scores, truth, axis, area=np.array([0.5])), curve[:, 3:4], equal_nan=True)


@in_one_case("seed")
@pytest.mark.parametrize("seed", range(4))
def test_without_ties_iou_equals_that_of_sets(seed):
    scores, truth = drawn(seed, None)
    for i, (score, inside) in enumerate(zip(scores.flatten(1).numpy(), truth.flatten(1).numpy(), strict=True)):
        top = set(np.argsort(score)[::-1][: inside.sum()].tolist())
        wanted = set(np.flatnonzero(inside).tolist())
        assert iou(scores, truth)[i].item() == pytest.approx(len(top & wanted) / len(top | wanted))
        assert relevance_rank_accuracy(scores, truth)[i].item() == pytest.approx(len(top & wanted) / len(wanted))
        six = set(np.argsort(score)[::-1][:6].tolist())
        found = iou(scores, truth, area=0.25)[i].item()  # 6 of 24 voxels
        assert found == pytest.approx(len(six & wanted) / len(six | wanted))


@pytest.mark.parametrize("metric", OVERLAPS)
def test_the_truth_scores_highest_and_its_complement_lowest(metric):
    truth = torch.zeros(2, 5, 4, 3, dtype=torch.bool)
    truth[0, 1, 2:, 1], truth[1, 3:, 0, 2] = True, True
    for axis in ("joint", "time", "space"):
        assert metric(truth.float(), truth, axis).tolist() == [1, 1]
    assert metric((~truth).float(), truth).tolist() == [0, 0]
    assert (metric.higher_is_better, metric.lowest, metric.highest) == (True, 0, 1)


def test_a_constant_map_is_chance():
    _, truth = drawn(2, None)
    flat, share = torch.full(truth.shape, 0.3), truth.flatten(1).double().mean(1)
    torch.testing.assert_close(relevance_rank_accuracy(flat, truth), share)
    torch.testing.assert_close(energy_pointing_game(flat, truth), share)
    torch.testing.assert_close(iou(flat, truth), share / (2 - share))


def test_energy_depends_on_values_and_overlap_on_order():
    scores, truth = drawn(5, levels=2)
    for metric in (iou, relevance_rank_accuracy):
        assert metric(scores.exp() * 9 - 4, truth).tolist() == metric(scores, truth).tolist()
    torch.testing.assert_close(
        energy_pointing_game(scores.double() * 1e-300, truth), energy_pointing_game(scores, truth)
    )
    torch.testing.assert_close(
        energy_pointing_game(scores.double() * 1e307, truth), energy_pointing_game(scores, truth)
    )
    assert energy_pointing_game(scores + 5, truth).tolist() != energy_pointing_game(scores, truth).tolist()
    assert energy_pointing_game(scores, truth).tolist() == energy_pointing_game(scores.clamp(min=0), truth).tolist()


def test_scores_are_summed_before_negative_values_are_clamped():
    scores = torch.tensor([[3.0, -3.0], [1.0, 0.0]]).reshape(1, 2, 1, 2)  # frames sum to 0 and 1
    truth = torch.tensor([[True, True], [False, False]]).reshape(1, 2, 1, 2)
    assert energy_pointing_game(scores, truth).item() == 0.75
    assert energy_pointing_game(scores, truth, axis="time").item() == 0


def test_clips_with_nothing_to_compare_are_nan():
    scores, truth = drawn(3, None)
    truth[0], truth[1], truth[2, 1, 1, 1] = False, True, True
    for found in (metric(scores, truth) for metric in OVERLAPS):
        assert found.isnan().tolist() == [True, True, False]
    assert iou(scores, truth, area=[0.2, 0.4]).isnan().tolist() == [[True] * 2, [True] * 2, [False] * 2]
    assert energy_pointing_game(-scores.abs(), truth)[2].isnan()
    assert energy_pointing_game(torch.zeros_like(scores), truth)[2].isnan()


@pytest.mark.parametrize("metric", OVERLAPS)
def test_clips_are_independent_and_all_forms_agree(metric):
    scores, truth = drawn(6, levels=3)
    expected, turn = metric(scores, truth), [2, 0, 1]
    assert metric(scores[turn], truth[turn]).tolist() == expected[turn].tolist()
    assert torch.cat([metric(s[None], t[None]) for s, t in zip(scores, truth, strict=True)]).tolist() == (
        expected.tolist()
    )
    channels = torch.stack([scores - 3, torch.full_like(scores, 3)], dim=2)  # sum: scores
    assert metric(channels, truth, layout="BTCHW").tolist() == expected.tolist()
    assert metric(channels.movedim(2, 1).numpy(), truth.numpy(), layout="BCTHW").tolist() == expected.tolist()
    assert metric(scores.numpy(), truth).tolist() == expected.tolist()
    assert metric(scores.requires_grad_(), truth).requires_grad is False


@pytest.mark.parametrize("metric", OVERLAPS)
def test_invalid_arguments_raise(metric):
    scores, truth = drawn(0, None)
    for wrong, error, message in (
        ((scores, truth.mT), ValueError, r"\(3, 4, 2, 3\)"),
        ((scores, truth.float()), TypeError, "truth > 0"),
        ((scores * math.nan, truth), ValueError, "attributions must not contain nan.* got 72 nan values"),
        ((scores, truth, "frames"), ValueError, "'frames'"),
    ):
        with pytest.raises(error, match=message):
            metric(*wrong)


def test_invalid_options_raise():
    scores, truth = drawn(0, None)
    for area in (0, -0.1, 1.5, math.nan, [], [0.5, 2], [[0.5]]):
        with pytest.raises(ValueError, match="area must be a fraction"):
            iou(scores, truth, area=area)
    scores[1, 0, 0, 0] = math.inf
    assert iou(scores, truth).isfinite().all()  # infinity has a rank
    with pytest.raises(ValueError, match=r"attributions must be finite.* 1 of the 72"):
        energy_pointing_game(scores, truth)


@pytest.mark.parametrize("whole", [True, False])
def test_boxes_contain_pixels_whose_center_is_inside(whole):
    generator = torch.Generator().manual_seed(1)
    size = torch.tensor([9.0, 5.0])  # W, H
    low = torch.rand(2, 6, 2, generator=generator) * size - 1
    boxes = torch.cat([low, low + 1 + torch.rand(2, 6, 2, generator=generator) * size], 2)
    boxes[..., :2] = boxes[..., :2].minimum(size - 1)
    boxes[..., 2:] = boxes[..., 2:].clamp(min=1)  # partly outside the frame, never completely
    boxes = boxes.round() if whole else boxes
    boxes[0, 2] = boxes[1, 0] = torch.tensor(NAN)
    truth = boxes_to_truth(boxes, (5, 9))
    assert truth.shape == (2, 6, 5, 9) and truth.dtype == torch.bool
    for clip, frame, y, x in itertools.product(range(2), range(6), range(5), range(9)):
        x0, y0, x1, y1 = boxes[clip, frame].tolist()
        center = x0 <= x + 0.5 < x1 and y0 <= y + 0.5 < y1
        assert truth[clip, frame, y, x].item() is center
        if whole and x0 == x0:
            assert center == (x in range(int(x0), int(x1)) and y in range(int(y0), int(y1)))
    assert boxes_to_truth(boxes.numpy(), np.array([5, 9])).equal(truth)


def test_a_center_on_the_edge_of_a_box_is_inside_at_the_lower_edge_only():
    truth = boxes_to_truth(torch.tensor([[[1.5, 0.5, 3.5, 2.5]]]), (4, 6))
    assert truth[0, 0].nonzero().tolist() == [[y, x] for y in (0, 1) for x in (1, 2)]


def test_integer_boxes_and_frames_without_a_box():
    assert boxes_to_truth(torch.tensor([[[8, 0, 9, 4]]]), (4, 9))[0, 0].nonzero().tolist() == [[y, 8] for y in range(4)]
    assert boxes_to_truth(torch.tensor([[[0, 0, 1, 1]]]), (4, 9)).sum() == 1
    assert not boxes_to_truth(torch.tensor([[NAN, NAN]]), (4, 9)).any()


@in_one_case()
@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((4.0, 1.0, 2.0, 3.0), r"x0 < x1 and y0 < y1.* \(4.0, 1.0, 2.0, 3.0\) in frame 1 of clip 0"),
        ((1.0, 3.0, 2.0, 3.0), "contain the center of a pixel"),
        ((1.0, 5.0, 3.0, 7.0), r"5 x 9 frame \(H x W\)"),  # y exceeds the height, but not the width
        ((9.0, 1.0, 11.0, 3.0), "four nan for a frame"),
        ((2.6, 1.0, 3.4, 3.0), "contain the center"),
        ((1.0, math.nan, 2.0, 3.0), "four finite numbers.* in frame 1 of clip 0"),
        ((1.0, 1.0, math.inf, 3.0), "four finite numbers"),
    ],
)
def test_a_box_without_pixels_raises(box, message):
    with pytest.raises(ValueError, match=message):
        boxes_to_truth(torch.tensor([[(0.0, 0.0, 5.0, 5.0), box, NAN]]), (5, 9))


@in_one_case()
@pytest.mark.parametrize(
    ("boxes", "size", "error", "message"),
    [
        ([[1, 2, 3, 4]], (5, 9), TypeError, "list"),
        (torch.zeros(2, 4), (5, 9), ValueError, r"\(2, 4\)"),
        (torch.zeros(1, 2, 5), (5, 9), ValueError, r"\(1, 2, 5\)"),
        (torch.zeros(1, 0, 4), (5, 9), ValueError, "not empty"),
        (torch.ones(1, 1, 4), (5, 0), ValueError, r"W of size = \(5, 0\)"),
        (torch.ones(1, 1, 4), 5, ValueError, "size must be .*got 5"),
        (torch.tensor([[[0.1, 0.2, 0.7, 1.0]]]), (5, 9), ValueError, r"Multiply .* by \(W, H, W, H\)"),
    ],
)
def test_invalid_boxes_raise(boxes, size, error, message):
    with pytest.raises(error, match=message):
        boxes_to_truth(boxes, size)
