"""Focus: its threshold against a slow Otsu, its harmlessness, and what it does for the signal."""

from __future__ import annotations

import math

import pytest
import torch
from covering import in_one_case
from staa_modes import MODES
from torch import Tensor

from captum_staa import STAA, Focus, VideoClassifier
from captum_staa.benchmark import PlantedClips


def clumps(seed: int, batch: int = 3) -> Tensor:
    """Noise with a bright region: (B, 6, 10, 12)."""
    maps = torch.rand(batch, 6, 10, 12, generator=torch.Generator().manual_seed(seed)) ** 2
    for i in range(batch):
        maps[i, 1 : 3 + i, 2:7, 3 : 6 + 2 * i] += 0.8
    return maps


def slow_otsu(values: list[float], low: float, high: float) -> float:
    """The value between two percentiles that splits best into 'up to it' and 'above it'; every split is tried."""
    ordered = sorted(values)
    least, most = (ordered[round((len(ordered) - 1) * p / 100)] for p in (low, high))
    best, found = -1.0, least
    for cut in ordered[:-1]:
        if not least <= cut <= most:
            continue
        below, above = [v for v in values if v <= cut], [v for v in values if v > cut]
        between = len(below) * len(above) * (sum(above) / len(above) - sum(below) / len(below)) ** 2
        if between > best:
            best, found = between, cut
    return found


@in_one_case()
@pytest.mark.parametrize(("low", "high"), [(70, 90), (0, 100), (50, 55), (95, 99), (80, 80)])
@pytest.mark.parametrize("seed", [0, 1])
def test_threshold_equals_otsu(seed, low, high):
    maps = clumps(seed)
    expected = [slow_otsu(one.flatten().tolist(), low, high) for one in maps]
    torch.testing.assert_close(Focus(low, high).threshold(maps), torch.tensor(expected))


def test_focused_maps_equal_the_formula_of_the_gate():
    maps, focus = clumps(0), Focus(60, 80, sharpness=3.0, split="middle")
    for one, found in zip(maps.double(), focus(maps.double(), (1, 1, 1)), strict=True):
        ordered = sorted(one.flatten().tolist())
        last = len(ordered) - 1
        level = (ordered[round(0.6 * last)] + ordered[round(0.8 * last)]) / 2
        top = ordered[round(last * (0.8 + 0.2 * 80 / 100))]  # the start of the topmost values: 96 %
        gate = [[[1 / (1 + math.exp(-6 * ((v - level) / (top - level) - 0.25))) for v in r] for r in f] for f in one]
        torch.testing.assert_close(found, one * torch.tensor(gate, dtype=torch.float64))


def test_knee_and_middle_splits():
    maps = clumps(0)
    ordered = maps.flatten(1).sort(1).values
    last = ordered.shape[1] - 1
    low, high = ordered[:, round(0.7 * last)], ordered[:, round(0.9 * last)]
    torch.testing.assert_close(Focus(split="middle").threshold(maps), (low + high) / 2)
    knees = []
    for values in ordered.tolist():
        gaps = [i / last - (v - values[0]) / (values[-1] - values[0]) for i, v in enumerate(values)]
        knees.append(values[gaps.index(max(gaps))])
    torch.testing.assert_close(Focus(0, 100, split="knee").threshold(maps), torch.tensor(knees))
    clamped = Focus(split="knee").threshold(maps)
    torch.testing.assert_close(clamped, torch.tensor(knees).clamp(low, high))


@in_one_case()
@pytest.mark.parametrize("level", [0.0, 1.0, 0.1, 1e-9, 3e7])
@pytest.mark.parametrize("split", ["otsu", "knee", "middle"])
def test_constant_map_stays_constant(level, split):
    """0.1 has no exact float: its means differ in the last digit, which must not decide."""
    focused = Focus(split=split)(torch.full((2, 6, 10, 12), level), (3, 5, 5))
    assert torch.isfinite(focused).all()
    assert (focused.amax() - focused.amin()) <= 0.01 * level
    assert focused.amin() >= 0.2 * level


def test_focus_is_deterministic_per_clip_and_scale_invariant():
    maps, focus, state = clumps(0), Focus(), torch.get_rng_state()
    focused = focus(maps, (3, 3, 3))
    assert torch.equal(focused, focus(maps.clone(), (3, 3, 3)))
    assert torch.equal(torch.get_rng_state(), state)
    alone = torch.cat([focus(one[None], (3, 3, 3)) for one in maps])
    torch.testing.assert_close(focused, alone)
    for scale in (1e-6, 1e4):  # gradients have no unit
        torch.testing.assert_close(focus(maps * scale, (3, 3, 3)) / scale, focused, rtol=1e-3, atol=1e-5)
    assert (focused <= maps).all() and (focused >= 0).all()


def test_order_of_evidence_values_is_kept():
    """The gate rises with a voxel's neighborhood, so of two with the same neighborhood the brighter one stays so."""
    maps = clumps(0, batch=1)
    focused = Focus()(maps, (1, 1, 1))
    assert torch.equal(focused.flatten().argsort(), maps.flatten().argsort())


def test_isolated_voxel_is_suppressed_and_a_cluster_is_kept():
    maps = torch.rand(1, 8, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.2
    maps[0, 1:4, 2:6, 2:6] = 2.0
    maps[0, 6, 12, 12] = 2.0  # as bright, but alone in space and in time
    maps[0, 6, 3:6, 11:14] = maps[0, 6, 3:6, 11:14].clamp(min=2.0)  # together in space, alone in time
    kept = Focus()(maps, (3, 3, 3)) / maps
    clustered, flash, lone = kept[0, 2, 4, 4], kept[0, 6, 4, 12], kept[0, 6, 12, 12]
    assert lone < flash < clustered
    assert clustered > 0.9 and lone < 0.5 * clustered


def test_sharpness_is_the_slope_of_the_gate():
    maps = clumps(0)
    soft, hard = (Focus(sharpness=s)(maps, (3, 3, 3)) / maps for s in (0.5, 8.0))
    assert ((hard - 0.5).abs() >= (soft - 0.5).abs() - 1e-6).all()


@in_one_case()
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Focus(90, 70), "low=90, high=70"),
        (lambda: Focus(-1, 70), "low=-1"),
        (lambda: Focus(70, 101), "high=101"),
        (lambda: Focus(split="kmeans"), "'otsu', 'knee', 'middle'.*'kmeans'"),  # type: ignore[arg-type]
        (lambda: Focus(sharpness=0), "sharpness.*0"),
        (lambda: Focus(sharpness=float("inf")), "sharpness.*inf"),
        (lambda: Focus()(torch.rand(1, 4, 4, 4), (3, 2, 3)), "odd.*(3, 2, 3)"),
    ],
)
def test_options_out_of_range_raise(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert all(word in str(caught.value) for word in words.split(".*")), str(caught.value)


@pytest.mark.parametrize("options", [{"sharpness": "2"}, {"low": None}, {"sharpness": float("nan")}])
def test_options_of_a_wrong_type_raise(options):
    with pytest.raises(TypeError, match=f"{next(iter(options))} must be a number, got"):
        Focus(**options)


def signal_to_noise(maps: Tensor, truth: Tensor) -> Tensor:
    """Per clip: (mean inside - mean outside) / standard deviation outside."""
    values = []
    for one, inside in zip(maps, truth, strict=True):
        values.append((one[inside].mean() - one[~inside].mean()) / one[~inside].std())
    return torch.stack(values)


@pytest.mark.parametrize("name", ["tiny-videomae-pattern", "tiny-timesformer-pattern"])
def test_focus_raises_the_signal_to_noise_ratio_of_attention(name):
    clf = VideoClassifier.from_pretrained(name)
    clips, _, truth = PlantedClips(seed=2024, n=16)[:16]
    plain, focused = (STAA(clf, mode="attention", focus=focus).attribute_maps(clips).joint for focus in (None, Focus()))
    before, after = signal_to_noise(plain, truth), signal_to_noise(focused, truth)
    assert after.mean() > 1.005 * before.mean(), f"{before.mean() = }, {after.mean() = }"


def insertion(clf, clips, labels, maps, steps=12):
    """Mean probability of the label while the highest tubelets come back into a gray clip."""
    tubelets = torch.nn.functional.avg_pool3d(maps[:, None], clf.grid.tubelet)[:, 0]
    rank = tubelets.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1).view_as(tubelets)
    probabilities = []
    for step in range(steps + 1):
        kept = clf.grid.to_pixels((rank < rank[0].numel() * step / steps).float())
        with torch.no_grad():
            answers = clf(clips * kept[:, :, None]).softmax(1)
        probabilities.append(answers.gather(1, labels[:, None])[:, 0])
    return torch.stack(probabilities).mean().item()


@pytest.mark.parametrize("kind", ["attention", "chefer"])
def test_focus_lowers_insertion_by_less_than_a_hundredth(kind):
    clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    clips, labels, _ = PlantedClips(seed=31, n=12)[:6]
    plain, focused = (
        STAA(clf, **MODES[kind], focus=focus).attribute_maps(clips, labels).joint for focus in (None, Focus())
    )
    before, after = (insertion(clf, clips, labels, maps) for maps in (plain, focused))
    assert after > before - 0.01
    assert before > insertion(clf, clips, labels, torch.rand(plain.shape)) + 0.05  # the measure can tell maps apart
