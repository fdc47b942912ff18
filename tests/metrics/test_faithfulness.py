"""Faithfulness metrics equal slow loops over recorded clips, scipy, and values computed by hand."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from covering import over_values

from captum_staa.layout import VideoLayout
from captum_staa.metrics.faithfulness import (
    TENTHS,
    _kendall,
    aopc,
    faithfulness,
    faithfulness_correlation,
    monotonicity,
    saco,
)

B, T, C, H, W, K = 3, 4, 2, 3, 5, 4


class Model:
    """A smooth, non-additive model in float64 that records its inputs."""

    def __init__(self, layout="BTCHW"):
        generator = torch.Generator().manual_seed(5)
        self.layout = VideoLayout.of(layout)
        self.first = torch.randn(T * C * H * W, 6, generator=generator, dtype=torch.float64) / 3
        self.second = torch.randn(6, K, generator=generator, dtype=torch.float64)
        self.seen = []

    def __call__(self, clip, scale=1.0):
        clip = self.layout.to_working(clip)
        self.seen += list(clip.clone())
        scale = scale[:, None] if isinstance(scale, torch.Tensor) else scale
        return scale * (clip.flatten(1) @ self.first).tanh() @ self.second


def drawn(seed=0):
    """Return clips, maps without ties and baselines, BTCHW."""
    generator = torch.Generator().manual_seed(seed)
    clip = torch.randn(B, T, C, H, W, generator=generator, dtype=torch.float64)
    maps = torch.randn(B, T, H, W, generator=generator, dtype=torch.float64)
    return clip, maps, torch.randn(B, T, C, H, W, generator=generator, dtype=torch.float64)


def grid_ids(cells):
    t, h, w = cells
    ids = np.zeros((B, T, H, W), dtype=int)
    for i, j, k in np.ndindex(T, H, W):
        ids[:, i, j, k] = (i // t * math.ceil(H / h) + j // h) * math.ceil(W / w) + k // w
    return ids


def ragged_ids():
    """A different partition for each clip, with a different number of regions of different sizes."""
    numbers = np.random.default_rng(3)
    counts = (7, 12, 9)
    rows = [np.concatenate([np.arange(n), numbers.integers(0, n, T * H * W - n)]) for n in counts]
    return np.stack([numbers.permutation(row) for row in rows]).reshape(B, T, H, W)


UNITS = {
    "pixels": ({}, np.arange(T * H * W).reshape(1, T, H, W).repeat(B, 0)),
    "cells": ({"cells": (2, 2, 1)}, grid_ids((2, 2, 1))),
    "mask": ({"feature_mask": torch.from_numpy(ragged_ids())[:, :, None]}, ragged_ids()),
}


@pytest.fixture(params=UNITS)
def units(request):
    return UNITS[request.param]


def means_of(maps, ids):
    return [maps.numpy()[ids == i].mean() for i in range(ids.max() + 1)]


def best_first(maps, ids):
    means = means_of(maps, ids)
    return sorted(range(len(means)), key=lambda i: -means[i])


def answer(clip, ids, replaced, baseline):
    """The model's outputs (K,) for one clip of which some cells are replaced."""
    altered = clip.clone()
    for t, h, w in np.ndindex(T, H, W):
        if ids[t, h, w] in replaced:
            altered[t, :, h, w] = baseline[t, :, h, w]
    return Model()(altered[None])[0].numpy()


def stretched(outputs):
    return (outputs - outputs.min()) / (outputs.max() - outputs.min())


def slow_differences(clip, maps, ids, baseline, kept):
    """The difference of each class for one clip."""
    order = best_first(maps, ids)
    lost = order[round(kept * len(order)) :]
    return abs(stretched(answer(clip, ids, (), baseline)) - stretched(answer(clip, ids, lost, baseline)))


@pytest.mark.parametrize("kept", [0.2, 0.7])
def test_faithfulness_equals_the_difference_of_scaled_outputs(units, kept):
    options, ids = units
    clip, maps, baseline = drawn()
    options = {**options, "layout": "BTCHW", "baselines": baseline, "kept": kept}
    slow = [slow_differences(*parts, kept) for parts in zip(clip, maps, ids, baseline, strict=True)]
    found = faithfulness(Model(), clip, maps, **options)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([1 - each.mean() for each in slow], rel=1e-12)
    targets = [2, 0, 3]
    expected = [1 - each[target] for each, target in zip(slow, targets, strict=True)]
    assert faithfulness(Model(), clip, maps, target=targets, **options).tolist() == pytest.approx(expected, rel=1e-12)


def test_monotonicity_equals_kendalls_tau_of_these_differences(units):
    stats = pytest.importorskip("scipy.stats")
    options, ids = units
    clip, maps, baseline = drawn(1)
    expected = [
        stats.kendalltau(TENTHS, [slow_differences(*parts, kept).mean() for kept in TENTHS]).statistic
        for parts in zip(clip, maps, ids, baseline, strict=True)
    ]
    found = monotonicity(Model(), clip, maps, layout="BTCHW", baselines=baseline, **options)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_kendall_equals_scipy_with_ties():
    stats = pytest.importorskip("scipy.stats")
    x, y = torch.tensor([0.0, 1, 1, 2, 3, 5]), torch.randint(0, 4, (40, 6), generator=torch.manual_seed(0)).double()
    y[0], y[1] = x.double(), 3
    expected = [stats.kendalltau(x, row).statistic for row in y]
    assert _kendall(x.double(), y).tolist() == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert math.isnan(expected[1]) and expected[0] == 1


@pytest.mark.parametrize("correlation", ["pearson", "spearman"])
def test_faithfulness_correlation_equals_that_of_recorded_subsets(units, correlation):
    """The subsets are read from the recorded clips."""
    stats = pytest.importorskip("scipy.stats")
    options, ids = units
    clip, maps, baseline = drawn(2)
    model = Model()
    found = faithfulness_correlation(
        model, clip, maps, target=1, layout="BTCHW", baselines=baseline, fraction=0.3, n_subsets=20,
        correlation=correlation, **options,
    )  # fmt: skip
    assert len(model.seen) == 21 * B
    for b in range(B):
        sums, falls, subsets = [], [], set()
        means = means_of(maps[b], ids[b])
        for altered in model.seen[B + b :: B]:
            subset = frozenset(ids[b][(altered != clip[b]).any(1).numpy()].tolist())
            assert len(subset) == round(0.3 * len(means))
            outputs = answer(clip[b], ids[b], subset, baseline[b])
            assert outputs[1] == pytest.approx(Model()(altered[None])[0, 1].item())  # subsets consist of whole cells
            sums.append(sum(means[i] for i in subset))
            falls.append(answer(clip[b], ids[b], (), baseline[b])[1] - outputs[1])
            subsets.add(subset)
        assert len(subsets) > 10
        expected = getattr(stats, {"pearson": "pearsonr", "spearman": "spearmanr"}[correlation])(sums, falls).statistic
        assert found[b].item() == pytest.approx(expected, rel=1e-9)


def test_midranks_equal_scipy_with_ties():
    stats = pytest.importorskip("scipy.stats")
    clip = torch.randn(2, 8, 1, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    maps = torch.tensor([0.0, 0, 0, 1, 1, 2, 2, 2], dtype=torch.float64).reshape(1, 8, 1, 1).expand(2, 8, 1, 1)
    seen = []

    def model(x):
        seen.append(x.flatten(1))
        return x.sum((1, 2, 3, 4)).round()

    found = faithfulness_correlation(model, clip, maps, layout="BTCHW", correlation="spearman", fraction=0.4)
    for b in range(2):
        copies = torch.cat(seen)[b::2]
        sums = torch.stack([maps[b].flatten()[row == 0].sum() for row in copies[1:]])
        falls = copies[0].sum().round() - copies[1:].sum(1).round()
        assert found[b].item() == pytest.approx(stats.spearmanr(sums, falls).statistic, rel=1e-12)


@over_values
@pytest.mark.parametrize("steps", [1, 5, 7])
def test_aopc_equals_the_mean_fall_over_steps(units, steps):
    options, ids = units
    clip, maps, baseline = drawn(3)
    expected = []
    for b in range(B):
        order = best_first(maps[b], ids[b])
        curve = [
            answer(clip[b], ids[b], order[: round(k * len(order) / steps)], baseline[b])[2] for k in range(steps + 1)
        ]
        expected.append(sum(curve[0] - value for value in curve) / (steps + 1))
    found = aopc(Model(), clip, maps, target=2, layout="BTCHW", baselines=baseline, steps=steps, **options)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


@over_values
@pytest.mark.parametrize("groups", [2, 5, 7])
def test_saco_equals_a_loop_over_pairs_of_groups(units, groups):
    options, ids = units
    clip, maps, baseline = drawn(4)
    expected = []
    for b in range(B):
        order, means = best_first(maps[b], ids[b]), means_of(maps[b], ids[b])
        parts = [[cell for i, cell in enumerate(order) if i * groups // len(order) == g] for g in range(groups)]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        whole = answer(clip[b], ids[b], (), baseline[b])[0]
        falls = [whole - answer(clip[b], ids[b], part, baseline[b])[0] for part in parts]
        salience = [sum(means[i] for i in part) / len(part) for part in parts]
        total = weight = 0.0
        for i, j in combinations(range(groups), 2):
            total += (1 if falls[i] > falls[j] else -1) * (salience[i] - salience[j])
            weight += salience[i] - salience[j]
        expected.append(total / weight)
    found = saco(Model(), clip, maps, target=0, layout="BTCHW", baselines=baseline, groups=groups, **options)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


def additive(clip):
    return clip.sum((1, 2, 3, 4))


def test_the_true_order_scores_highest_and_its_inverse_lowest():
    truth = torch.tensor([5.0, -1.0, 3.0, 2.0]).reshape(1, 4, 1, 1, 1)
    orders = torch.tensor(list(permutations([0.0, 1.0, 2.0, 3.0]))).reshape(24, 4, 1, 1)
    clip = truth.expand(24, 4, 1, 1, 1).clone()
    best = int((orders * truth[0, :, 0]).flatten(1).sum(1).argmax())
    for score in (
        aopc(additive, clip, orders, layout="BTCHW", steps=4),
        saco(additive, clip, orders, layout="BTCHW", groups=4),
        faithfulness_correlation(additive, clip, orders, layout="BTCHW", fraction=0.25, correlation="spearman"),
    ):
        assert int(score.argmax()) == best and (score == score.max()).sum() == 1
        assert orders[score.argmin()].flatten().tolist() == (3 - orders[best]).flatten().tolist()
    for metric, options in ((saco, {"groups": 4}), (faithfulness_correlation, {})):
        for sign in (1.0, -1.0):
            assert metric(additive, truth, sign * truth, layout="BTCHW", **options).item() == pytest.approx(sign)


def test_fractions_that_keep_no_cell_or_all_cells_raise():
    """0.9 of four cells rounds to all cells, which gives a map and its inverse the same score."""
    clip, maps, _ = drawn(5)
    regions = torch.arange(T).view(1, T, 1, 1, 1) * 4 // T
    options = {"layout": "BTCHW", "feature_mask": regions}
    for kept in (0.9, 0.1):
        for given in (maps, -maps):
            with pytest.raises(ValueError, match=rf"kept must .* got {kept} of 4 cells"):
                faithfulness(Model(), clip, given, kept=kept, **options)
    with pytest.raises(ValueError, match=r"fractions .*0\.1 of 4 cells"):
        monotonicity(Model(), clip, maps, **options)
    with pytest.raises(ValueError, match=r"fractions .*0\.9 of 4 cells"):
        monotonicity(Model(), clip, maps, fractions=(0.5, 0.9), **options)
    assert (faithfulness(Model(), clip, maps, kept=0.5, **options) < 1).all()
    fewer = torch.stack([torch.arange(T) * n // T for n in (T, 2, T)][:B]).view(B, T, 1, 1, 1)
    with pytest.raises(ValueError, match=r"kept .*0\.8 of 2 cells"):  # the clip with the fewest cells
        faithfulness(Model(), clip, maps, kept=0.8, layout="BTCHW", feature_mask=fewer)


def test_faithfulness_finds_the_decisive_frames():
    def model(clip):
        light = clip.mean((2, 3, 4))
        return torch.stack([light[:, 0], light[:, 1], light[:, 2]], dim=1)

    clip = torch.tensor([4.0, 1.0, 0.0, 9.0]).reshape(1, 4, 1, 1, 1)
    maps = torch.tensor([3.0, 2.0, 1.0, 0.0]).reshape(1, 4, 1, 1)
    # with the inverted map, frames 2 and 3 are kept, which give 0, 0, 0: all classes are equal
    assert faithfulness(model, clip, maps, layout="BTCHW", kept=0.5).item() == 1
    assert faithfulness(model, clip, -maps, layout="BTCHW", kept=0.5).isnan().item()
    assert faithfulness(model, clip, -maps, layout="BTCHW", kept=0.75).item() == pytest.approx(1 - (1 + 0.75) / 3)
    assert monotonicity(model, clip, maps, layout="BTCHW", fractions=(0.25, 0.5)).item() == -1
