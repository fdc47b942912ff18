"""Properties of all metrics, tested on generated shapes, values, cells and steps.

Values are integers in float64: there are ties, sums, means of single voxels and outputs of the model are exact, and a
monotonic transform does not merge different values. Ties are broken in a fixed random order, which must not change.
"""

from __future__ import annotations

import math
from dataclasses import astuple
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_staa import metrics as m

drawn_examples = settings(deadline=None, derandomize=True, max_examples=20, database=None)
REDUCED = {"joint": (4,), "time": (2, 3, 4), "space": (1, 4)}  # of (B, T, H, W, 1)
ALONG_AXES = (m.auroc, m.average_precision, m.iou, m.relevance_rank_accuracy, m.energy_pointing_game)
POINTING = {"pointing_game": m.pointing_game, "pointing_game-frame": partial(m.pointing_game, per="frame")}
OF_MAPS = {
    "signal_to_noise": m.signal_to_noise,
    "sparsity": lambda maps, truth, **layout: m.sparsity(maps, **layout),
    "complexity": lambda maps, truth, **layout: m.complexity(maps, **layout),
    "smoothness": lambda maps, truth=None, **layout: torch.stack(m.smoothness(maps, **layout), 1),
}
JUDGES = {f"{metric.__name__}-{axis}": partial(metric, axis=axis) for metric in ALONG_AXES for axis in REDUCED}
JUDGES |= POINTING | {"temporal_pointing": m.temporal_pointing} | OF_MAPS
CURVES = (m.insertion, m.deletion, m.insertion_deletion)
OF_VALUES = (m.saco, m.faithfulness_correlation)  # the others read the order of a map alone
OF_ORDER = (*CURVES, m.aopc, m.faithfulness, m.monotonicity)
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(2, 6), st.integers(2, 6))  # (B, T, H, W)


def over(**strategies):
    return lambda test: drawn_examples(given(**strategies)(test))


def of_each(*chosen):
    return pytest.mark.parametrize("metric", chosen, ids=lambda metric: metric.__name__)


@st.composite
def whole(draw, shape, least=None, most=None):
    """Integers as float64: three, seven or many levels, unless the limits are passed."""
    top = draw(st.sampled_from([1, 3, 1000])) if most is None else most
    low, count = -top if least is None else least, math.prod(shape)
    # One string of bytes takes a hundredth of the time of a list. Its 0 is 0 here: failing examples shrink to that.
    raw = np.frombuffer(draw(st.binary(min_size=2 * count, max_size=2 * count)), "<u2").astype(np.int64)
    return torch.from_numpy((low + (raw + max(0, -low)) % (top - low + 1)).astype(np.float64).reshape(shape))


@st.composite
def judged(draw, channels=None):
    """Maps, or attributions in the clip's shape, and a truth that can be all or nothing."""
    shape = draw(SHAPES)
    maps = draw(whole(shape if channels is None else (*shape[:2], draw(channels), *shape[2:])))
    levels = draw(st.lists(st.sampled_from([50, 10, 80, 97, 0, 100]), min_size=shape[0], max_size=shape[0]))
    return maps, draw(whole(shape, 1, 100)) > torch.tensor(levels).view(-1, 1, 1, 1)


@st.composite
def raised(draw, maps):
    """Maps with other values in the same order, including ties, different for each clip."""
    levels = [row.unique(return_inverse=True) for row in maps]
    rows = [(draw(whole(values.shape, 1, 1000)).cumsum(0) - draw(st.integers(0, 9000)))[at] for values, at in levels]
    return torch.stack(rows)


@st.composite
def problems(draw):
    """A clip, attributions of its shape and the options of every metric with a model; at least four cells."""
    b, t, h, w = draw(SHAPES)
    shape = (b, t, draw(st.integers(1, 2)), h, w)
    cell = tuple(draw(st.integers(1, size)) for size in (t, h, w))
    if (count := math.prod(-(-size // side) for size, side in zip((t, h, w), cell, strict=True))) < 4:
        cell, count = (1, 1, 1), t * h * w
    options = {"cells": cell, "baselines": draw(st.integers(-2, 2)), "parts": draw(st.integers(2, min(count, 8)))}
    options["target"] = draw(st.lists(st.integers(0, 2), min_size=b, max_size=b))
    return draw(whole(shape, most=3)), draw(whole(shape)), options


def selections(batch):  # all rows permuted, one alone, some twice
    return st.permutations(range(batch)) | st.lists(st.integers(0, batch - 1), min_size=1, max_size=4)


def model(clip):
    """Logits ``(B, 3)`` of clips ``(B, T, C, H, W)``: neither additive nor smooth, without rounding errors."""
    flat = clip.flatten(1)
    j = torch.arange(flat.shape[1], dtype=torch.float64)[:, None]
    first, second = ((j * torch.tensor(steps) + start) % 7 - 3 for steps, start in (((3, 5, 2), 1), ((4, 1, 6), 2)))
    return (flat @ first + (flat @ second).clamp(min=0)) / 64


def scores(metric, clip, maps, forward_func=model, parts=4, **options):
    """All numbers that a metric with a model returns for each clip, ``(B, n)``."""
    own = {m.saco: {"groups": parts}, m.faithfulness_correlation: {"fraction": 0.5, "n_subsets": 30}}
    own |= {m.faithfulness: {}, m.monotonicity: {"fractions": (0.25, 0.5, 0.75)}}
    found = metric(forward_func, clip, maps, **{"layout": "BTCHW", **own.get(metric, {"steps": parts}), **options})
    curves = found if metric is m.insertion_deletion else [found]
    numbers = [part for curve in curves for part in (curve if metric in CURVES else [curve])]
    return torch.cat([part.reshape(len(clip), -1) for part in numbers], 1)


def same(found, expected, tolerance=0.0, name=""):
    how = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    torch.testing.assert_close(found, expected, **how, msg=lambda text: f"{name} {text}")


def said_of(metric, found, nan, name=""):
    same(found.isnan(), nan, name=name)
    assert ((found >= metric.lowest) & (found <= metric.highest) | nan).all(), f"{name} {found}"


def least_possible(metric, inside):
    """What the worst order of a clip's places ``(N,)`` scores. In average precision equal scores enter together, so
    that the inverse of a truth, one tie, is better than the truth in single file behind all else."""
    n, p = len(inside), int(inside.sum())
    forced = max(0, 2 * p - n)  # if more than half is truth, some of it is among the top p
    worst = {m.iou: forced / (2 * p - forced), m.relevance_rank_accuracy: forced / p}
    worst[m.average_precision] = sum(i / (n - p + i) for i in range(1, p + 1)) / p
    return worst.get(metric, 0.0)


@of_each(*ALONG_AXES)
@pytest.mark.parametrize("axis", REDUCED)
@over(case=judged())
def test_no_map_scores_above_the_truth_or_below_its_inverse(metric, axis, case):
    maps, truth = case
    inside = truth[..., None].any(REDUCED[axis], keepdim=True)[..., 0].expand_as(truth)
    held = truth[..., None].any(REDUCED[axis]).flatten(1)
    valid = held.any(1) & ~held.all(1)
    single_file = torch.arange(truth[0].numel(), dtype=torch.float64).view(truth.shape[1:])
    if metric is m.energy_pointing_game:  # values count: it must be 0 outside, not only lower than inside
        perfect, inverse = (maps.clamp(min=0) + 1).where(inside, -1), (maps.abs() + 1) * ~inside
    else:
        perfect, inverse = maps + 1e6 * inside, single_file - 1e6 * inside
    for best in (truth.double(), perfect):
        assert (metric(best, truth, axis)[valid] == 1).all()
    least = torch.tensor([least_possible(metric, row) for row in held[valid]], dtype=torch.float64)
    same(metric(inverse, truth, axis)[valid], least, 1e-12)
    for other in (maps, -inside.double()):  # energy_pointing_game of the second, which is never positive, is nan
        found = metric(other, truth, axis)[valid]
        assert ((found >= least - 1e-12) | found.isnan()).all() and not (found > 1).any()


@over(case=judged(), data=st.data())
def test_pointing_game_of_the_truth_and_of_its_inverse(case, data):
    maps, truth = case
    held, full, some = truth.flatten(2).any(2), truth.flatten(2).all(2), truth.flatten(1).any(1)
    least = [full.all(1).double(), full.sum(1).double() / held.sum(1), held.all(1).double()]
    for point, worst in zip((*POINTING.values(), m.temporal_pointing), least, strict=True):
        assert (point(truth.double(), truth)[some] == 1).all()
        assert (point(maps + 1e6 * truth, truth)[some] == 1).all()
        same(point(-truth.double(), truth)[some], worst[some])
        assert (point(maps, truth)[some] >= worst[some]).all()
    near = data.draw(st.tuples(*[st.integers(0, 3)] * 3))
    for point in POINTING.values():
        hits = [point(maps, truth, reach)[some] for reach in ((0, 0, 0), near, (9, 9, 9))]
        assert all((fewer <= more).all() for fewer, more in pairwise(hits)) and (hits[-1] == 1).all()


@of_each(*CURVES, m.aopc, *OF_VALUES)
@over(data=st.data())
def test_terms_of_an_additive_model_score_highest_and_their_negative_lowest(metric, data):
    """Cells of one size, groups of one size: elsewhere a mean and a sum order them differently."""
    shape = b, t, h, w = data.draw(SHAPES)
    channels, base = data.draw(st.integers(1, 2)), data.draw(st.integers(-2, 2))
    clip, weights = data.draw(whole((b, t, channels, h, w), most=3)), data.draw(whole((t, channels, h, w), 1, 5))
    cell = [data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0])) for size in (t, h, w)]
    cell = cell if math.prod(cell) < t * h * w else [1, 1, 1]
    count = t * h * w // math.prod(cell)
    equal = [n for n in range(2, count + 1) if count % n == 0]
    parts = data.draw(st.sampled_from(equal) if metric is m.saco else st.integers(1, count))
    exact, other = weights * (clip - base), data.draw(whole(shape))
    options = {"cells": cell, "baselines": base, "parts": parts} | ({"output": "logit"} if metric in CURVES else {})
    run = partial(scores, metric, clip, forward_func=lambda x: (weights * x).sum((1, 2, 3, 4)), **options)
    best, found, worst = (run(maps) for maps in (exact, other, -exact))
    terms = exact.sum(2).view(b, t // cell[0], cell[0], h // cell[1], cell[1], w // cell[2], cell[2])
    flat = (terms.sum((2, 4, 6)) == terms.sum((2, 4, 6))[:, :1, :1, :1]).flatten(1).all(1)
    if metric in OF_VALUES:
        for extreme, value in ((best, 1.0), (worst, -1.0)):
            expected = torch.full((b, 1), value, dtype=torch.float64).masked_fill(flat[:, None], math.nan)
            same(extreme, expected, 0 if metric is m.saco else 1e-12)
        return
    signs = {m.deletion: [-1], m.insertion_deletion: [1, -1, -1, 1]}.get(
        metric, [1]
    )  # lower is better, also for least relevant first
    best, found, worst = (x.unflatten(1, (len(signs), -1)) * torch.tensor(signs)[:, None] for x in (best, found, worst))
    assert (best >= found - 1e-9).all() and (found >= worst - 1e-9).all()  # also at each point of a curve
    assert parts < count or not (best == worst).flatten(1).all(1)[~flat].any()


@of_each(*OF_ORDER, *OF_VALUES)
@over(case=problems(), factor=st.integers(1, 9), offset=st.integers(-999, 999), data=st.data())
def test_scale_and_offset_cancel_and_only_the_order_of_single_voxels_counts(metric, case, factor, offset, data):
    """For single voxels: the mean of a rescaled map is not the rescaled mean, so larger cells can change order."""
    clip, attributions, options = case
    maps = attributions.sum(2)
    expected = scores(metric, clip, attributions, **options)
    same(scores(metric, clip, factor * maps + offset, **options), expected, 1e-9)
    if metric in OF_ORDER:
        options["cells"] = (1, 1, 1)
        same(scores(metric, clip, data.draw(raised(maps)), **options), scores(metric, clip, maps, **options))


@over(case=judged(channels=st.integers(1, 3)), data=st.data())
def test_selections_of_a_batch_and_layouts_give_the_same_scores(case, data):
    attributions, truth = case
    rows = data.draw(selections(len(truth)))
    for name, score in JUDGES.items():
        expected = score(attributions.sum(2), truth)[rows]
        same(score(attributions.sum(2)[rows], truth[rows]), expected, 1e-14, name)
        for layout, given_so in (("BTCHW", attributions), ("BCTHW", attributions.transpose(1, 2))):
            same(score(given_so[rows], truth[rows], layout=layout), expected, 1e-14, name)


@of_each(*OF_ORDER, *OF_VALUES)
@over(case=problems(), perturbations_per_eval=st.integers(1, 40), data=st.data())
def test_selections_layouts_and_chunks_give_the_same_scores_with_a_model(metric, case, perturbations_per_eval, data):
    clip, attributions, options = case
    expected = scores(metric, clip, attributions, **options)
    rows = data.draw(selections(len(clip)))
    options |= {"target": [options["target"][row] for row in rows], "perturbations_per_eval": perturbations_per_eval}
    same(scores(metric, clip[rows], attributions[rows], **options), expected[rows], 1e-14)
    twins = clip[rows].transpose(1, 2), attributions[rows].transpose(1, 2).contiguous()
    found = scores(metric, *twins, lambda x: model(x.transpose(1, 2)), layout="BCTHW", **options)
    same(found, expected[rows], 1e-14)


@over(case=judged(), data=st.data())
def test_scores_are_invariant_as_documented(case, data):
    maps, truth = case
    higher = data.draw(raised(maps))
    for name in [name for name in JUDGES if name in POINTING or (name.endswith("joint") and "energy" not in name)]:
        same(JUDGES[name](higher, truth), JUDGES[name](maps, truth), name=name)
    order = torch.tensor(data.draw(st.permutations(range(truth[0].numel()))))
    moved = [x.flatten(1)[:, order].view(x.shape) for x in (maps, truth)]  # the same permutation for all clips
    for name in [name for name in JUDGES if name.endswith("joint") or name in ("pointing_game", *OF_MAPS)]:
        if name != "smoothness":
            same(JUDGES[name](*moved), JUDGES[name](maps, truth), 1e-12, name)
    factor = data.draw(whole((len(maps), 1, 1, 1), 1, 99)) / 8
    offset, signs = data.draw(st.integers(-99, 99)), data.draw(whole(tuple(maps.shape), 0, 1)) * 2 - 1
    for metric in (m.sparsity, m.complexity):
        same(metric(maps * signs * factor), metric(maps), 1e-12)
    same(m.energy_pointing_game(factor * maps, truth), m.energy_pointing_game(maps, truth), 1e-12)
    same(m.signal_to_noise(factor * maps + offset, truth), m.signal_to_noise(maps, truth), 1e-12)
    for metric, opposite in ((m.signal_to_noise, -m.signal_to_noise(maps, truth)), (m.auroc, 1 - m.auroc(maps, truth))):
        same(metric(-maps, truth), opposite, 1e-12)
    turned = maps.mT.flip([1, data.draw(st.sampled_from([2, 3]))])  # neighbors stay neighbors
    for twin in (offset - factor * maps, turned):
        same(OF_MAPS["smoothness"](twin), OF_MAPS["smoothness"](maps), 1e-12)


@over(case=judged())
def test_scores_of_a_map_are_within_bounds_and_nan_as_documented(case):
    maps, truth = case
    rows, inside = maps.flatten(1), truth.flatten(1)
    held = {axis: truth[..., None].any(dims).flatten(1) for axis, dims in REDUCED.items()}
    undefined = {axis: places.all(1) | ~places.any(1) for axis, places in held.items()}
    flat, never = (rows == rows[:, :1]).all(1), torch.ones(len(rows), dtype=torch.bool)
    ins, outs = ([row[at] for row, at in zip(rows, where, strict=True)] for where in (inside, ~inside))
    level = [len(b.unique()) == 1 and bool(a.sum() == b[0] * len(a)) for a, b in zip(ins, outs, strict=True)]
    nan = {"signal_to_noise": undefined["joint"] | torch.tensor(level), "sparsity": (rows == 0).all(1)}
    nan |= {"complexity": nan["sparsity"], "smoothness": torch.stack([flat, flat if maps.shape[1] > 1 else never], 1)}
    for name, score in JUDGES.items():
        found, (metric, _, axis) = score(maps, truth), name.partition("-")
        pointing = "pointing" in name and metric != "energy_pointing_game"  # these need any truth only
        said = nan[name] if name in nan else ~inside.any(1) if pointing else undefined[axis]
        if metric == "energy_pointing_game":
            said = said | ~(maps[..., None].sum(REDUCED[axis]) > 0).flatten(1).any(1)
        said_of(getattr(m, metric), found, said, name)


@of_each(*OF_ORDER, *OF_VALUES)
@over(case=problems())
def test_scores_of_a_model_are_within_bounds_and_nan_as_documented(metric, case):
    (clip, attributions, options), answers = case, []
    options["cells"] = (1, 1, 1)
    found = scores(metric, clip, attributions, lambda x: answers.append(model(x)) or answers[-1], **options)
    answers = torch.cat(answers).unflatten(0, (-1, len(clip)))  # (P, B, 3), the first for the whole clip
    maps = attributions.sum(2).flatten(1)
    said = (maps == maps[:, :1]).all(1) if metric in OF_VALUES else torch.zeros(len(clip), dtype=torch.bool)
    if metric is m.faithfulness_correlation:
        of_target = answers[1:, range(len(clip)), options["target"]]
        said = said | (of_target == of_target[0]).all(0)
    if metric in (m.faithfulness, m.monotonicity):
        said = (answers == answers[:, :, :1]).all(2).any(0)
    if metric is m.monotonicity:
        steps = [scores(m.faithfulness, clip, attributions, kept=kept, **options) for kept in (0.25, 0.5, 0.75)]
        said = said | (steps[0] == torch.cat(steps, 1)).all(1)
    said_of(metric, found, said[:, None].expand_as(found))


@st.composite
def tables(draw):
    """Scores of N inputs by M methods, with ties, and sometimes missing or infinite values."""
    table = draw(whole(draw(st.tuples(st.integers(2, 6), st.integers(2, 5)))))
    holes = draw(whole(tuple(table.shape), 0, draw(st.sampled_from([0, 9]))))
    table = table.masked_fill(holes == 1, math.nan).masked_fill(holes == 2, math.inf)
    table[0, 0] = 1
    return table


def numbers(found):
    """Three means, each followed by the limits of its interval, ``(9,)``."""
    return torch.from_numpy(np.hstack(astuple(found)))


@over(table=tables(), data=st.data())
def test_reliability_is_invariant_and_1_if_all_clips_agree(table, data):
    random = data.draw(st.integers(0, table.shape[1] - 1))
    found = m.reliability(table, random, 8)
    clips, columns = (data.draw(st.permutations(range(size))) for size in table.shape)
    same(numbers(m.reliability(table[clips], random, 1))[::3], numbers(found)[::3], 1e-12)
    same(numbers(m.reliability(table[:, columns], columns.index(random), 8)), numbers(found), 1e-12)
    higher = torch.stack([data.draw(raised(row[None]))[0].where(row.isfinite(), row) for row in table])
    same(numbers(m.reliability(higher, random, 8)), numbers(found))
    assert not (numbers(found).abs() > 1).any()
    usable = [len(row.unique()) > 1 and not row.isnan().any() for row in table]
    weighs = [use and bool((row >= row[random]).sum() > 1) for row, use in zip(table, usable, strict=True)]
    assert (math.isnan(found.spearman), math.isnan(found.weighted)) == (sum(usable) < 2, sum(weighs) < 2)
    row = data.draw(whole((data.draw(st.integers(2, 6)),)))
    row[0] = row[1] + 1  # not all equal, and the random map not the best
    agreed = m.reliability(data.draw(raised(row.repeat(data.draw(st.integers(2, 5)), 1))), 1, 5)
    same(numbers(agreed)[::3], torch.ones(3, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
@over(table=tables(), data=st.data())
def test_alpha_is_invariant_as_its_level_allows(level, table, data):
    table = table.nan_to_num(nan=math.nan, posinf=1001)
    order, columns = (data.draw(st.permutations(range(size))) for size in table.shape)
    single = torch.full_like(table[:, :1], math.nan)  # a unit with a single rating
    single[0], moved = data.draw(st.integers(-5, 5)), table.clone()
    if level == "interval":
        moved = data.draw(st.sampled_from([-3, 0.5, 7])) * table + data.draw(st.integers(-99, 99))
    else:  # any distinct values serve as names
        known = data.draw(raised(table[table.isfinite()][None]))[0]
        moved[table.isfinite()] = known if level == "ordinal" else (known * 7919) % 1_000_003
    found, paired = m.krippendorff_alpha(table, level), table[:, table.isfinite().sum(0) > 1]
    twins = [table[order][:, columns], moved, torch.cat([table, single], 1), torch.cat([table, table[:1] * math.nan])]
    for twin in twins:
        assert m.krippendorff_alpha(twin, level) == pytest.approx(found, abs=1e-12, nan_ok=True)
    assert math.isnan(found) == (len(paired[paired.isfinite()].unique()) < 2) and not abs(found) > 1
    agreed = 1 if len(table[0][table[0].isfinite()].unique()) > 1 else math.nan
    assert m.krippendorff_alpha(table[:1].repeat(3, 1), level) == pytest.approx(agreed, abs=1e-12, nan_ok=True)
