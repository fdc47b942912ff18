"""Metrics of evidence and rivals equal a count of all pairs, and values computed by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from covering import in_one_case

from captum_staa.metrics import auroc, class_discrimination, evidence_against_rivals, object_pointing

T, H, W = 5, 4, 3
VOXELS = [(t, y, x) for t in range(T) for y in range(H) for x in range(W)]


def pair_share(positive: list, negative: list) -> float:
    """AUROC by its definition: a loop over pairs, where ties count half."""
    won = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in positive for b in negative)
    return won / (len(positive) * len(negative)) if positive and negative else math.nan


def slow_groups(axis: str, values: list, truth: list, rivals: list) -> tuple[list, list]:
    """Values of evidence and of rivals in one clip, nested lists (T, H, W), by loops and exact fractions."""
    if axis == "joint":
        pick = [[values[t][y][x] for t, y, x in VOXELS if mask[t][y][x]] for mask in (truth, rivals)]
        return pick[0], pick[1]
    positive, negative = [], []
    holds = [any(any(row) for row in frame) for frame in truth]
    if axis == "space":
        for y in range(H):
            for x in range(W):
                for mask, found in ((truth, positive), (rivals, negative)):
                    frames = [t for t in range(T) if holds[t] and mask[t][y][x]]
                    if frames:
                        found.append(sum(Fraction(values[t][y][x]) for t in frames) / len(frames))
        return positive, negative
    for t in range(T):
        shown = [(y, x) for y in range(H) for x in range(W) if truth[t][y][x] or rivals[t][y][x]]
        if shown:
            mean = sum(Fraction(values[t][y][x]) for y, x in shown) / len(shown)
            (positive if holds[t] else negative).append(mean)
    return positive, negative


def slow_pointing(values: list, objects: list) -> float:
    means = []
    for k, mask in enumerate(objects):
        inside = [Fraction(values[t][y][x]) for t, y, x in VOXELS if mask[t][y][x]]
        if k == 0 and not inside:
            return math.nan
        if inside:
            means.append(sum(inside) / len(inside))
    if len(means) < 2:
        return math.nan
    return 1 / means.count(max(means)) if means[0] == max(means) else 0.0


def drawn(seed: int, levels: int | None, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maps, evidence and rivals (B, T, H, W); some frames lack either."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(batch, T, H, W, generator=generator, dtype=torch.float64)
    if levels:  # integers, so that many values tie
        maps = (maps * levels).round()
    kind = torch.rand(batch, T, H, W, generator=generator)
    frames = torch.rand(2, batch, T, 1, 1, generator=generator) < 0.6
    return maps, (kind < 0.3) & frames[0], (kind > 0.7) & frames[1]


def drawn_objects(seed: int, batch: int = 6, count: int = 4) -> torch.Tensor:
    """Objects (B, K, T, H, W) without common voxels; about a third of them is empty."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.randint(count + 1, (batch, 1, T, H, W), generator=generator)
    shown = torch.rand(batch, count, generator=generator) < 0.7
    return (owner == torch.arange(count).view(1, count, 1, 1, 1)) & shown[:, :, None, None, None]


@in_one_case()
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize("axis", ["joint", "space", "time"])
def test_evidence_against_rivals_counts_pairs(axis, levels, seed):
    maps, truth, rivals = drawn(seed, levels)
    expected = [
        pair_share(*slow_groups(axis, *clip))
        for clip in zip(maps.tolist(), truth.tolist(), rivals.tolist(), strict=True)
    ]
    found = evidence_against_rivals(maps, truth, rivals, axis)
    assert found.shape == (3,) and found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-14, nan_ok=True)


@in_one_case()
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("levels", [None, 1])
def test_object_pointing_compares_means(levels, seed):
    maps, _, _ = drawn(seed, levels, batch=6)
    objects = drawn_objects(seed)
    expected = [slow_pointing(*clip) for clip in zip(maps.tolist(), objects.tolist(), strict=True)]
    found = object_pointing(maps, objects)
    assert found.shape == (6,) and found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-14, nan_ok=True)


@in_one_case()
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [None, 1])
def test_class_discrimination_counts_pairs(levels, seed):
    for_a, truth_a, _ = drawn(seed, levels)
    for_b, truth_b, _ = drawn(seed + 50, levels)
    truth_b[:, 3, 1:] |= truth_a[:, 3, 1:]  # some voxels are of both classes
    expected = []
    for clip in range(3):
        a, b = ((ours & ~others)[clip] for ours, others in ((truth_a, truth_b), (truth_b, truth_a)))
        areas = [pair_share(m[clip][p].tolist(), m[clip][n].tolist()) for m, p, n in ((for_a, a, b), (for_b, b, a))]
        expected.append(sum(areas) / 2)
    found = class_discrimination(for_a, for_b, truth_a, truth_b)
    assert (truth_a & truth_b).any()
    assert found.tolist() == pytest.approx(expected, rel=1e-14, nan_ok=True)


def clip_of(*frames: list) -> torch.Tensor:
    """Frames of one row each as (1, T, 1, W)."""
    return torch.tensor(frames, dtype=torch.float64)[None, :, None]


def test_values_computed_by_hand():
    truth = clip_of([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]) > 0
    rivals = clip_of([0, 1, 1, 0], [0, 0, 1, 0], [0, 1, 1, 0]) > 0
    maps = clip_of([5, 9, 3, 99], [-4, 2, 2, -99], [0, 4, 6, 50])
    # joint: 5 and 2 against 9, 3, 2, 4, 6: 5 beats 3, 2, 4; 2 ties with 2
    assert evidence_against_rivals(maps, truth, rivals).item() == 3.5 / 10
    # space, in frames 0 and 1: evidence at position 0 (5) and 1 (2), rivals at position 1 (9) and 2 (3 and 2)
    assert evidence_against_rivals(maps, truth, rivals, "space").item() == 0.25
    # time: means (5 + 9 + 3) / 3 and (2 + 2) / 2 against (4 + 6) / 2
    assert evidence_against_rivals(maps, truth, rivals, "time").item() == 0.5
    objects = torch.stack([truth, rivals & (torch.arange(4) == 1), rivals & (torch.arange(4) == 2)], 1)
    # means: 7 / 2; 13 / 2; 11 / 3
    assert object_pointing(maps, objects).item() == 0
    assert object_pointing(-maps, objects).item() == 1
    # evidence of both classes at one voxel is ignored: 5 against 3, 2; then 2, 1 against 0
    truth_b = clip_of([0, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]) > 0
    for_b = clip_of([0, 9, 2, 9], [9, 9, 1, 9], [9, 9, 9, 9])
    assert class_discrimination(maps, for_b, truth, truth_b).item() == 1
    assert class_discrimination(maps, -for_b, truth, truth_b).item() == 0.5
    assert class_discrimination(-maps, -for_b, truth, truth_b).item() == 0


@in_one_case()
@pytest.mark.parametrize(("axis", "start"), [("joint", 1), ("joint", 4), ("space", 1), ("time", 4)])
def test_a_map_of_the_evidence_scores_1_and_a_map_of_the_rivals_0(axis, start):
    truth, rivals = torch.zeros(2, 1, 6, 4, 4, dtype=torch.bool)
    truth[0, 1:3, :2, :2], rivals[0, start : start + 2, 2:, 2:] = True, True
    background = 100.0 * (~truth & ~rivals)
    objects = torch.stack([truth, rivals], 1)
    for marked, expected in ((truth, 1), (rivals, 0)):
        assert evidence_against_rivals(background + marked, truth, rivals, axis).item() == expected
        assert object_pointing(background + marked, objects).item() == expected


def test_a_contrast_detector_is_chance_where_rivals_have_the_same_contrast():
    truth, rivals = torch.zeros(2, 1, 8, 6, 6, dtype=torch.bool)
    truth[0, 2:5, :2, :2], rivals[0, :, 4:, 4:] = True, True
    contrast = (truth | rivals).double() * 0.1
    assert auroc(contrast, truth).item() > 0.9
    for axis in ("joint", "space", "time"):
        assert evidence_against_rivals(contrast, truth, rivals, axis).item() == 0.5
    assert object_pointing(contrast, torch.stack([truth, rivals], 1)).item() == 0.5
    assert class_discrimination(contrast, contrast, truth, rivals).item() == 0.5


def test_a_constant_map_is_chance_for_all_object_sizes():
    """0.1 times 7 divided by 7 is not 0.1 in floating point."""
    for seed in range(5):
        _, truth, rivals = drawn(seed, None, batch=8)
        constant = torch.full(truth.shape, 0.1, dtype=torch.float64)
        for axis in ("joint", "space", "time"):
            found = evidence_against_rivals(constant, truth, rivals, axis)
            assert set(found[~found.isnan()].tolist()) == {0.5}
        objects = drawn_objects(seed, batch=8)
        counts = objects.flatten(2).any(2).sum(1)
        found = object_pointing(constant, objects)
        defined = ~found.isnan()
        assert defined.any() and torch.equal(found[defined], 1 / counts[defined].double())


def test_a_map_without_a_class_cannot_discriminate():
    for seed in range(4):
        maps, truth_a, truth_b = drawn(seed, levels=2)
        found = class_discrimination(maps, maps, truth_a, truth_b)
        assert found[~found.isnan()].tolist() == pytest.approx([0.5] * int((~found.isnan()).sum()), abs=1e-15)


def test_axis_space_ignores_frames_without_evidence():
    maps, truth, rivals = drawn(1, None, batch=8)
    changed = torch.where(truth.any(3, keepdim=True).any(2, keepdim=True), maps, 1e3)
    for axis, same in (("space", True), ("joint", False)):
        found = [evidence_against_rivals(each, truth, rivals, axis).nan_to_num(9) for each in (maps, changed)]
        assert torch.equal(*found) is same


def test_all_other_voxels_are_ignored():
    maps, truth, rivals = drawn(2, None)
    shown = truth | rivals
    changed = torch.where(shown, maps, torch.inf)
    for axis in ("joint", "time"):
        expected = evidence_against_rivals(maps, truth, rivals, axis)
        torch.testing.assert_close(
            evidence_against_rivals(changed, truth, rivals, axis), expected, rtol=0, atol=0, equal_nan=True
        )
    objects = torch.stack([truth, rivals], 1)
    torch.testing.assert_close(
        object_pointing(changed, objects), object_pointing(maps, objects), rtol=0, atol=0, equal_nan=True
    )


def calls(layout: str | None, channels, truth: torch.Tensor, rivals: torch.Tensor):
    """Every metric on the same maps, as (name, result)."""
    for axis in ("joint", "space", "time"):
        yield axis, evidence_against_rivals(channels, truth, rivals, axis, layout=layout)
    objects = torch.stack([torch.as_tensor(truth), torch.as_tensor(rivals)], 1)
    yield "pointing", object_pointing(channels, objects, layout=layout)
    yield "classes", class_discrimination(channels, channels * -1, truth, rivals, layout=layout)


def test_layouts_arrays_and_batches_give_the_same_numbers():
    maps, truth, rivals = drawn(3, levels=2)
    channels = torch.stack([maps - 3, torch.full_like(maps, 5), torch.full_like(maps, -2)], 2)  # their sum is maps
    expected = dict(calls(None, maps, truth, rivals))
    twins = {
        "BTCHW": calls("BTCHW", channels, truth, rivals),
        "BCTHW": calls("BCTHW", channels.movedim(2, 1), truth, rivals),
        "BWHTC": calls("BWHTC", channels.permute(0, 4, 3, 1, 2), truth, rivals),
        "numpy": calls(None, maps.numpy(), truth.numpy(), rivals.numpy()),
        "int": calls(None, maps.int(), truth, rivals),
        "grad": calls(None, maps.clone().requires_grad_(), truth, rivals),
    }
    for twin, results in twins.items():
        for name, found in results:
            assert not found.requires_grad
            torch.testing.assert_close(found, expected[name], rtol=0, atol=0, equal_nan=True, msg=f"{twin} {name}")
    for i in range(3):
        for name, found in calls(None, maps[i : i + 1], truth[i : i + 1], rivals[i : i + 1]):
            torch.testing.assert_close(found, expected[name][i : i + 1], rtol=0, atol=0, equal_nan=True)


def test_clips_with_nothing_to_compare_are_nan():
    maps = torch.randn(4, T, H, W, generator=torch.Generator().manual_seed(0))
    truth, rivals = torch.zeros(2, 4, T, H, W, dtype=torch.bool)
    truth[1:, 2, 0, 0] = True  # clip 0 has no evidence
    rivals[[0, 2], 2, 1, 1] = True  # clip 1 has no rivals; in clip 2 they are in the frame of the evidence
    rivals[3, 3, 1, 1] = True  # in clip 3 they are in another
    for axis, expected in (
        ("joint", [True, True, False, False]),
        ("space", [True, True, False, True]),
        ("time", [True, True, True, False]),
    ):
        assert evidence_against_rivals(maps, truth, rivals, axis).isnan().tolist() == expected, axis
    assert object_pointing(maps, torch.stack([truth, rivals], 1)).isnan().tolist() == [True, True, False, False]
    assert object_pointing(maps, truth[:, None]).isnan().all()  # no rivals
    assert class_discrimination(maps, -maps, truth, rivals).isnan().tolist() == [True, True, False, False]
    assert class_discrimination(maps, -maps, truth, truth).isnan().all()  # every voxel is of both classes


def test_infinity_has_a_rank_but_no_sum_with_its_opposite():
    truth = clip_of([1, 0], [1, 0], [0, 0]) > 0
    rivals = clip_of([0, 1], [0, 1], [0, 1]) > 0
    maps = clip_of([math.inf, 0], [1, 2], [0, 0])
    assert evidence_against_rivals(maps, truth, rivals).item() == 5 / 6
    assert evidence_against_rivals(maps, truth, rivals, "space").item() == 1
    assert object_pointing(maps, torch.stack([truth, rivals], 1)).item() == 1
    maps[0, 1, 0, 0] = -math.inf
    with pytest.raises(ValueError, match=r"sums over axis='space' must not .* 1 of the 2 .*torch.nan_to_num"):
        evidence_against_rivals(maps, truth, rivals, "space")
    with pytest.raises(ValueError, match=r"sums over objects .* 1 of the 2"):
        object_pointing(maps, torch.stack([truth, rivals], 1))


def test_metrics_state_their_range():
    for metric in (evidence_against_rivals, object_pointing, class_discrimination):
        assert (metric.higher_is_better, metric.lowest, metric.highest) == (True, 0, 1)


MAPS, MASK = torch.zeros(1, T, H, W), torch.zeros(1, T, H, W, dtype=torch.bool)
SHAPE = f"(1, {T}, {H}, {W})"


@in_one_case()
@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda: evidence_against_rivals(MAPS, MASK, MASK, "frames"), ValueError, ["axis", "'frames'", "'time'"]),
        (lambda: evidence_against_rivals([1.0], MASK, MASK), TypeError, ["attributions must be a tensor", "list"]),
        (
            lambda: evidence_against_rivals(MAPS[0], MASK, MASK),
            ValueError,
            ["must be non-empty maps (B, T, H, W)", f"({T}, {H}, {W})", "layout='BTCHW'"],
        ),
        (
            lambda: evidence_against_rivals(MAPS, MASK.float(), MASK),
            TypeError,
            ["truth must be bool", "torch.float32", "truth > 0"],
        ),
        (lambda: evidence_against_rivals(MAPS, MASK, MASK.int()), TypeError, ["rivals must", "int32", "rivals > 0"]),
        (
            lambda: evidence_against_rivals(MAPS, MASK, MASK[:, 1:]),
            ValueError,
            [f"rivals must be (B, T, H, W) = {SHAPE}", f"got shape (1, {T - 1}, {H}, {W})", "Pass the mask"],
        ),
        (
            lambda: evidence_against_rivals(MAPS, ~MASK, ~MASK),
            ValueError,
            [f"got {T * H * W} voxels", "Pass rivals & ~truth"],
        ),
        (
            lambda: evidence_against_rivals(MAPS * math.nan, MASK, MASK),
            ValueError,
            ["attributions must not contain nan", f"got {T * H * W} nan values", "torch.nan_to_num"],
        ),
        (
            lambda: evidence_against_rivals(MAPS, MASK, MASK, layout="BTCHW"),
            ValueError,
            ["attributions must be", "(B, T, C, H, W)", SHAPE],
        ),
        (lambda: object_pointing(MAPS, MASK), ValueError, [f"(B, K, T, H, W) = (1, K, {T}, {H}, {W})", SHAPE]),
        (lambda: object_pointing(MAPS, MASK[:, :0, None]), ValueError, ["objects must", f"(1, 0, 1, {H}, {W})"]),
        (lambda: object_pointing(MAPS, MASK[:, None].float()), TypeError, ["objects must be bool", "objects > 0"]),
        (
            lambda: class_discrimination(MAPS, MAPS[:, 1:], MASK, MASK),
            ValueError,
            ["same shape", SHAPE, f"(1, {T - 1}, {H}, {W})", "Explain the same clips"],
        ),
        (
            lambda: class_discrimination(MAPS, MAPS[0], MASK, MASK),
            ValueError,
            ["attributions_b without a layout must be non-empty maps"],
        ),
        (lambda: class_discrimination(MAPS, MAPS, MASK, MASK[..., :1]), ValueError, ["truth_b must", f"{H}, 1)"]),
        (lambda: class_discrimination(MAPS, MAPS, MASK.float(), MASK), TypeError, ["truth_a must be bool", "float32"]),
    ],
)
def test_errors_name_the_argument_the_value_and_the_fix(call, error, parts):
    with pytest.raises(error) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
