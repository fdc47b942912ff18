"""Reliability equals sums over all pairs, correlations of scipy, and the published example of Krippendorff."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import FrozenInstanceError, astuple

import numpy as np
import pytest
import torch
from covering import in_one_case

from captum_staa.metrics._shared import draws_in_blocks, interval
from captum_staa.metrics.reliability import Reliability, krippendorff_alpha, reliability

nan = math.nan

# Krippendorff (2011), section E: four observers, twelve units, five values.
PUBLISHED = torch.tensor(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, nan, nan, nan],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nan, 3],
        [nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nan],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nan],
    ]
)


def drawn(inputs: int, methods: int, seed: int = 0, agreement: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(inputs, methods, generator=generator) + agreement * torch.arange(methods)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow_alpha(table: np.ndarray, level: str, names: list[int] | None = None) -> float:
    """Alpha by a loop over pairs. Rows with the same name are copies of one observer and do not form pairs."""
    names = list(range(len(table))) if names is None else names
    units = [[(n, v) for n, v in zip(names, column, strict=True) if not math.isnan(v)] for column in table.T.tolist()]
    units = [unit for unit in units if len({name for name, _ in unit}) > 1]
    marginal = Counter(value for unit in units for _, value in unit)

    def difference(c: float, k: float) -> float:
        if level == "nominal":
            return float(c != k)
        if level == "interval":
            return (c - k) ** 2
        between = sum(count for value, count in marginal.items() if min(c, k) <= value <= max(c, k))
        return (between - (marginal[c] + marginal[k]) / 2) ** 2

    observed = 0.0
    for unit in units:
        pairs = [difference(a, b) for (n, a), (m, b) in itertools.permutations(unit, 2) if n != m]
        observed += len(unit) * sum(pairs) / len(pairs)
    everything = [(u, name, value) for u, unit in enumerate(units) for name, value in unit]
    pairs = [difference(a[2], b[2]) for a, b in itertools.permutations(everything, 2) if a[:2] != b[:2]]
    if not any(pairs):
        return nan
    return 1 - observed / len(everything) / (sum(pairs) / len(pairs))


def slow_means(scores: np.ndarray, random: int, names: list[int] | None = None) -> tuple[float, float]:
    """Weighted and unweighted means as in the paper, over inputs with all scores and not all equal."""
    stats = pytest.importorskip("scipy.stats")
    names = list(range(len(scores))) if names is None else names
    whole = [(n, row) for n, row in zip(names, scores, strict=True) if not np.isnan(row).any() and len(set(row)) > 1]
    methods, top, below, rhos = scores.shape[1], 0.0, 0.0, []
    for (n, a), (m, b) in itertools.combinations(whole, 2):
        if n != m:
            rho = float(stats.spearmanr(a, b).statistic)
            places = [stats.rankdata(row)[random] - 1 for row in (a, b)]
            weight = math.prod((methods - 1 - place) / (methods - 1) for place in places)
            rhos.append(rho)
            top, below = top + weight * (rho + 1), below + weight
    return top / below - 1 if below else nan, sum(rhos) / len(rhos) if rhos else nan


@pytest.mark.parametrize(("level", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_the_published_example(level, published):
    assert krippendorff_alpha(PUBLISHED, level) == pytest.approx(published, abs=5e-4)
    assert krippendorff_alpha(PUBLISHED.numpy(), level) == pytest.approx(
        slow_alpha(PUBLISHED.numpy(), level), rel=1e-12
    )
    assert krippendorff_alpha(PUBLISHED.flip(0, 1), level) == pytest.approx(krippendorff_alpha(PUBLISHED, level))


@in_one_case("seed")
@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
@pytest.mark.parametrize("seed", range(5))
def test_alpha_equals_a_loop_over_pairs(level, seed):
    ratings = drawn(5, 7, seed, agreement=0.3).round().double()
    ratings[torch.rand(5, 7, generator=seeded(seed)) < 0.1 * seed] = nan
    assert krippendorff_alpha(ratings, level) == pytest.approx(slow_alpha(ratings.numpy(), level), rel=1e-10)


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_alpha_of_perfect_agreement_chance_and_disagreement(level):
    row = torch.tensor([0.1, 0.7, 0.3, 0.3, 5.0])
    assert krippendorff_alpha(row.repeat(3, 1), level) == pytest.approx(1, abs=1e-12)
    opposites = torch.tensor([[0.0, 1.0] * 10, [1.0, 0.0] * 10])
    assert krippendorff_alpha(opposites, level) == pytest.approx(-1 + 2 / 40)
    # The mean over all permutations of the values of two observers is chance.
    every = [torch.tensor(values).reshape(2, 3) for values in itertools.permutations([0.0, 1.0, 1.0, 2.0, 5.0, 5.0])]
    assert sum(krippendorff_alpha(table, level) for table in every) / len(every) == pytest.approx(0, abs=1e-12)


def test_levels_are_invariant_as_defined():
    ratings = PUBLISHED.double()
    for level, twin in [
        ("nominal", torch.where(ratings == 2, 9, ratings)),
        ("ordinal", ratings.exp()),
        ("ordinal", torch.where(ratings == 5, math.inf, ratings)),
        ("interval", 3 - 7 * ratings),
        ("interval", 2**30 + ratings),
        ("interval", 1e-200 * ratings),
        ("interval", 1e200 * ratings),
    ]:
        assert krippendorff_alpha(twin, level) == pytest.approx(krippendorff_alpha(ratings, level), rel=1e-12)
    assert krippendorff_alpha(ratings.exp(), "interval") > krippendorff_alpha(ratings, "interval") + 0.1


def test_undefined_alpha_is_nan():
    for table in ([[0.1, 0.1], [0.1, 0.1]], [[1, nan], [nan, 2]], [[1, 2]], [[0, 1 / 3, 7], [nan, 1 / 3, nan]]):
        for level in ("nominal", "ordinal", "interval"):
            assert math.isnan(krippendorff_alpha(torch.tensor(table, dtype=torch.float64), level))


def test_reliability_by_hand():
    """Ranks of the random map are 0, 0, 1 and 2, so weights are 1, 1, 1/2 and 0."""
    scores = torch.tensor([[0.1, 0.5, 0.9], [0.1, 0.9, 0.5], [0.5, 0.1, 0.9], [0.9, 0.5, 0.1]])
    found = reliability(scores, random=0)
    # rho: 12 .5, 13 .5, 23 -.5, and with the fourth -1, -.5, -.5
    assert found.weighted == pytest.approx((0.5 * 1 + 0.5 * 0.5 - 0.5 * 0.5) / (1 + 0.5 + 0.5))
    assert found.spearman == pytest.approx((0.5 + 0.5 - 0.5 - 1 - 0.5 - 0.5) / 6)
    assert found.krippendorff == pytest.approx(1 - (1 + 0.25) * (11 / 12))


@in_one_case("levels", "seed")
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [None, 1])
def test_reliability_equals_a_sum_over_pairs(seed, levels):
    scores = drawn(9, 5, seed)
    if levels:  # ties, also of the random map; a constant input; missing scores
        scores = (scores * levels).round()
        scores[1], scores[2, 3], scores[4, :4] = 2.0, nan, nan
        scores[3, 4] = math.inf
    random = seed % 5
    found = reliability(scores, random, n_bootstrap=1)
    assert (found.weighted, found.spearman) == pytest.approx(slow_means(scores.double().numpy(), random), rel=1e-12)
    ranks = torch.tensor(
        [[nan if x != x else sum(y < x for y in row) + (row.count(x) + 1) / 2 for x in row] for row in scores.tolist()]
    )
    assert found.krippendorff == pytest.approx(slow_alpha(ranks.numpy(), "ordinal"), rel=1e-12)
    if not levels:  # without ties, the two agree
        assert found.krippendorff == pytest.approx(1 - (1 - found.spearman) * (1 - 1 / 45))
        assert found.krippendorff == pytest.approx(krippendorff_alpha(ranks, "interval"))


def test_intervals_are_bootstrap_percentiles():
    scores = drawn(6, 4, seed=2)
    scores[0, 1] = nan
    found = reliability(scores, random=1, n_bootstrap=40, generator=seeded(5))
    draws = torch.randint(6, (40, 6), generator=seeded(5)).tolist()
    slow = [(*slow_means(scores.double().numpy()[names], 1, names), slow_alpha(ranked(scores)[names], "ordinal", names))
            for names in draws]  # fmt: skip
    low, high = np.nanquantile(np.array(slow), [0.025, 0.975], axis=0)
    intervals = (found.weighted_interval, found.spearman_interval, found.krippendorff_interval)
    assert np.array(intervals) == pytest.approx(np.stack([low, high], 1), rel=1e-10)
    assert found.spearman_interval[0] < found.spearman < found.spearman_interval[1]


def ranked(scores: torch.Tensor) -> np.ndarray:
    rows = scores.tolist()
    return np.array([[nan if x != x else 1 + sum(y < x for y in row) for x in row] for row in rows])


def test_more_inputs_narrow_the_interval():
    truth = reliability(drawn(10000, 5, seed=9), n_bootstrap=1).spearman
    within, widths = 0, {}
    for count in (25, 100):
        found = [reliability(drawn(count, 5, seed=seed), n_bootstrap=100) for seed in range(30)]
        within += sum(f.spearman_interval[0] <= truth <= f.spearman_interval[1] for f in found)
        widths[count] = sum(f.spearman_interval[1] - f.spearman_interval[0] for f in found) / 30
    assert widths[25] / widths[100] == pytest.approx(2, rel=0.2)
    assert within >= 50  # of 60; 95 % are 57


def test_perfect_agreement_and_disagreement():
    for part in astuple(reliability(torch.arange(4.0).repeat(5, 1), random=0, n_bootstrap=20)):
        assert np.array(part) == pytest.approx(1)
    found = reliability(torch.tensor([[1.0, 2, 3], [3, 2, 1]]), random=1)
    assert (found.weighted, found.spearman) == pytest.approx((-1, -1))


@in_one_case()
@pytest.mark.parametrize(("methods", "chance"), [(2, 1), (3, 1 / 3), (6, 7 / 75), (10, 11 / 243)])
def test_noise_is_zero_except_for_the_weighted_mean(methods, chance):
    noise = reliability(drawn(4000, methods, agreement=0), random=1, n_bootstrap=1)
    assert (noise.spearman, noise.krippendorff) == pytest.approx((0, 0), abs=2e-3)
    assert noise.weighted == pytest.approx(chance, abs=0.02)


def test_only_the_order_counts_and_the_direction_affects_only_weights():
    scores = drawn(12, 5, seed=3).double()
    found = reliability(scores, random=2, n_bootstrap=30)
    same(reliability(scores.exp() * 9, 2, 30), found)
    same(reliability(scores.double().numpy(), 2, 30), found)
    columns = [3, 0, 4, 1, 2]
    same(reliability(scores[:, columns], columns.index(2), 30), found)
    shuffled = reliability(scores.flip(0), 2, 1)
    assert [shuffled.weighted, shuffled.krippendorff] == pytest.approx([found.weighted, found.krippendorff])
    upside_down = reliability(-scores, 2, 30)
    assert upside_down.spearman == pytest.approx(found.spearman)
    assert abs(upside_down.weighted - found.weighted) > 0.01


def same(found: Reliability, expected: Reliability) -> None:
    for part, other in zip(astuple(found), astuple(expected), strict=True):
        assert part == pytest.approx(other, rel=1e-12)


def test_a_draw_is_as_many_inputs_with_replacement():
    """Draws equal counts from the same generator, and the interval equals that of numpy without nan."""
    copies = torch.cat(list(draws_in_blocks(40, 7, seeded(3))))
    picked = torch.randint(7, (40, 7), generator=seeded(3)).tolist()
    assert copies.tolist() == [[row.count(i) for i in range(7)] for row in picked]
    assert next(draws_in_blocks(3, 0, seeded(0))).shape == (3, 0)  # a comparison in which all clips failed
    values = drawn(200, 3, seed=4).double().masked_fill(drawn(200, 3, seed=5) > 1, nan)
    low, high = interval(values)
    np.testing.assert_allclose(torch.stack([low, high]), np.nanpercentile(values.numpy(), [2.5, 97.5], axis=0))


def test_undefined_values_are_nan():
    scores = drawn(4, 3)
    without = reliability(scores)
    assert math.isnan(without.weighted) and all(math.isnan(end) for end in without.weighted_interval)
    assert without.spearman == reliability(scores, 0).spearman
    best = reliability(torch.cat([scores, torch.full((4, 1), 99.0)], 1), random=3)  # the random map is always the best
    assert math.isnan(best.weighted) and math.isfinite(best.spearman)
    scores[1:] = 0.7
    equal = reliability(scores, 0)
    assert math.isnan(equal.spearman) and math.isfinite(equal.krippendorff)
    assert math.isnan(reliability(torch.full((3, 3), 0.1)).krippendorff)


def test_results_are_repeatable_and_arguments_unchanged():
    scores, state = drawn(8, 4), torch.get_rng_state()
    before = scores.clone()
    found = reliability(scores, 0, 50)
    assert found == reliability(scores.requires_grad_(), 0, 50) == reliability(scores, 0, 50, seeded(0))
    assert found.spearman_interval != reliability(scores, 0, 50, seeded(1)).spearman_interval
    assert scores.equal(before) and torch.get_rng_state().equal(state)
    with pytest.raises(FrozenInstanceError):
        found.weighted = 1.0  # type: ignore[misc]
    assert (reliability.higher_is_better, krippendorff_alpha.higher_is_better) == (True, True)


@in_one_case()
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]],), TypeError, "list"),
        ((torch.zeros(3),), ValueError, "(3,)"),
        ((torch.zeros(1, 3),), ValueError, "(1, 3)"),
        ((torch.zeros(3, 1),), ValueError, "(3, 1)"),
        ((torch.zeros(3, 3).long(),), TypeError, "int64"),
        ((torch.full((3, 3), nan),), ValueError, "nan in all 9"),
        ((torch.zeros(3, 3), 3), ValueError, "got 3"),
        ((torch.zeros(3, 3), -1), ValueError, "got -1"),
        ((torch.zeros(3, 3), True), TypeError, "got True"),
        ((torch.zeros(3, 3), "random"), TypeError, "got 'random'"),
        ((torch.zeros(3, 3), 0, 0), ValueError, "n_bootstrap"),
        ((torch.zeros(3, 3), 0, 1.5), TypeError, "got 1.5"),
        ((torch.zeros(3, 3), 0, 10, 7), TypeError, "got 7"),
    ],
)
def test_invalid_arguments_raise(arguments, error, message):
    with pytest.raises(error) as caught:
        reliability(*arguments)
    assert message in str(caught.value)


def test_invalid_ratings_raise():
    with pytest.raises(ValueError, match="'ratio'"):
        krippendorff_alpha(PUBLISHED, "ratio")
    with pytest.raises(ValueError, match=r"ratings must not be infinite .*got 1"):
        krippendorff_alpha(torch.tensor([[1.0, math.inf], [1.0, nan]]), "interval")
    with pytest.raises(ValueError, match="nan in all 4"):
        krippendorff_alpha(torch.full((2, 2), nan))
    with pytest.raises(TypeError, match="list"):
        krippendorff_alpha([[1.0, 2.0]])
