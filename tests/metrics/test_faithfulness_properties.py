"""Properties of all faithfulness metrics: order, batch, layout, chunks, ties, constant models, invalid arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from covering import in_one_case

from captum_staa import VideoClassifier, VideoLayout, feature_masks, metrics
from captum_staa.benchmark import PlantedClips
from captum_staa.metrics.faithfulness import aopc, faithfulness, faithfulness_correlation, monotonicity, saco

ALL = (faithfulness, monotonicity, faithfulness_correlation, aopc, saco)
BY_RANK = (faithfulness, monotonicity, aopc)
WEIGHTS = torch.randn(4 * 2 * 4 * 6, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def model(clip):
    """``(B, 6)``."""
    return (clip.flatten(1) @ WEIGHTS / 5).tanh() + clip.flatten(1)[:, :6] / 5


def drawn(seed=0, batch=3):
    generator = torch.Generator().manual_seed(seed)
    clip = torch.randn(batch, 4, 2, 4, 6, generator=generator, dtype=torch.float64)
    return clip, torch.randn(batch, 4, 4, 6, generator=generator, dtype=torch.float64)


def ragged_mask():
    """Three partitions, into 12, 20 and 16 regions."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.arange(96)[torch.randperm(96, generator=generator)] % n for n in (12, 20, 16)]
    return torch.stack(rows).reshape(3, 4, 1, 4, 6)


@pytest.fixture(params=ALL, ids=lambda metric: metric.__name__)
def metric(request):
    return request.param


def score(metric, clip, maps, forward_func=model, **options):
    target = None if metric in (faithfulness, monotonicity) else 1
    return metric(forward_func, clip, maps, **{"target": target, "layout": "BTCHW", **options})


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("metric", BY_RANK)
def test_only_the_order_of_a_map_counts(metric):
    clip, maps = drawn()
    same(score(metric, clip, (3 * maps).exp() - 7), score(metric, clip, maps))
    assert not torch.allclose(score(metric, clip, -maps), score(metric, clip, maps))


@pytest.mark.parametrize("metric", [saco, faithfulness_correlation])
def test_scale_and_offset_cancel_and_the_negative_map_negates(metric):
    clip, maps = drawn()
    same(score(metric, clip, 3 * maps + 5), score(metric, clip, maps))
    options = {"groups": 8} if metric is saco else {}  # groups of equal size
    same(score(metric, clip, -maps, **options), -score(metric, clip, maps, **options))


@in_one_case("masked")
@pytest.mark.parametrize("masked", [False, True])
def test_each_clip_is_scored_alone(metric, masked):
    """Also with different regions per clip, a different number of them, and ties."""
    clip, maps = drawn(1)
    maps = maps.round()
    for values in (maps, maps + drawn(2)[1] / 100):
        options = {"feature_mask": ragged_mask()} if masked else {}
        whole = score(metric, clip, values, **options)
        assert len(set(whole.tolist())) > 1
        order = torch.tensor([2, 0, 1])
        permuted = {"feature_mask": ragged_mask()[order]} if masked else {}
        same(score(metric, clip[order], values[order], **permuted), whole[order])
        for b in range(3):
            alone = {"feature_mask": ragged_mask()[b : b + 1]} if masked else {}
            same(score(metric, clip[b : b + 1], values[b : b + 1], **alone), whole[b : b + 1])


def test_layouts_numpy_and_full_attributions_give_the_same_score(metric):
    clip, maps = drawn(3)
    expected = score(metric, clip, maps, baselines=clip.flip(1))
    twin = clip.transpose(1, 2)
    spread = maps[:, None] * torch.tensor([0.25, 0.75]).view(1, 2, 1, 1, 1)

    def turned(x):
        return model(x.transpose(1, 2))

    for attributions in (maps, maps.numpy(), spread, spread.numpy()):
        same(score(metric, twin, attributions, turned, layout="BCTHW", baselines=twin.flip(2)), expected)
    mask = torch.arange(96).reshape(1, 1, 4, 4, 6)
    same(score(metric, twin, maps, turned, layout="BCTHW", baselines=twin.flip(2), feature_mask=mask), expected)


def test_perturbations_per_eval_and_additional_forward_args(metric):
    clip, maps = drawn(4)
    options = {} if metric in (faithfulness, monotonicity) else {"target": [0, 2, 1]}
    expected = score(metric, clip, maps, **options)
    for size in (1, 3, 1000):
        same(score(metric, clip, maps, perturbations_per_eval=size, **options), expected)
    shift = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)[:, None]

    def shifted(x, offset, factor):
        return model(factor * (x - offset[..., None, None, None]))

    moved = clip + shift[..., None, None, None]
    options |= {"baselines": shift[..., None, None, None], "perturbations_per_eval": 2}
    found = score(metric, moved, maps, shifted, additional_forward_args=(shift, 1.0), **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_constant_map_has_a_random_order_or_nan():
    """0.1 is not a binary fraction: rounding errors of its sums must not affect the result."""
    clip = torch.arange(96.0).reshape(1, 96, 1, 1, 1) / 95
    flat = torch.full((1, 96, 1, 1), 0.1, dtype=torch.float64)

    def late(x):
        return x.sum((1, 2, 3, 4))

    sweeps = [aopc(late, clip, sign * clip, layout="BTCHW").item() for sign in (1, -1)]
    found = aopc(late, clip, flat, layout="BTCHW").item()
    assert abs(found - sum(sweeps) / 2) < 0.25 * (sweeps[0] - sweeps[1]) / 2
    for metric in (saco, faithfulness_correlation):
        assert metric(late, clip, flat, layout="BTCHW").isnan().item()
        for value, frames in ((0.1, 7), (0.3, 5), (1 / 3, 4), (0.7, 3)):
            assert metric(late, clip, torch.full_like(flat, value), layout="BTCHW", cells=(frames, 1, 1)).isnan().item()


def test_scores_of_a_constant_model():
    clip, maps = drawn(5)

    def constant(x):
        return torch.tensor([[0.1, 0.7]]).expand(len(x), 2)

    assert score(aopc, clip, maps, constant).tolist() == score(saco, clip, maps, constant).tolist() == [0.0] * 3
    assert score(faithfulness_correlation, clip, maps, constant).isnan().all()
    assert score(monotonicity, clip, maps, constant).isnan().all()
    assert score(faithfulness, clip, maps, constant).tolist() == [1.0] * 3


def test_nan_outputs_affect_only_their_clip(metric):
    clip, maps = drawn(6)
    clip[1, 0, 0, 0, 0] = 50.0

    maps[1, 0, 0, 0] = -0.65  # a low rank: replaced in some copies, kept in others
    marked = torch.zeros_like(clip)
    marked[1, 0, 0, 0, 0] = -1.0

    for value in (50, -1):  # nan for copies that keep the first pixel, or for those that do not

        def failing(x, value=value):
            return torch.where(x[:, :1, 0, 0, 0] == value, torch.nan, model(x))

        found = score(metric, clip, maps, failing, baselines=marked)
        assert found.isnan().tolist() == [False, True, False]


def test_subsets_depend_only_on_the_generator():
    clip, maps = drawn(7)
    state = torch.get_rng_state()
    first, again = (score(faithfulness_correlation, clip, maps, n_subsets=5) for _ in range(2))
    seeded = [
        score(faithfulness_correlation, clip, maps, n_subsets=5, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and torch.equal(first, seeded[0]) and not torch.allclose(first, seeded[1])


def test_a_model_may_write_to_its_input(metric):
    clip, maps = drawn(8)
    expected, before = score(metric, clip, maps), clip.clone()

    def writing(x):
        answer = model(x)
        x.zero_()
        return answer

    same(score(metric, clip, maps, writing), expected)
    assert torch.equal(clip, before)
    leaf = clip.clone().requires_grad_()
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    found = score(metric, leaf, maps, lambda x: weight * model(x))
    assert leaf.grad is None and weight.grad is None and not found.requires_grad


@in_one_case("options")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"inputs": torch.zeros(3, 4, 2, 4, 6).long()}, TypeError, "int64"),
        ({"inputs": torch.full((3, 4, 2, 4, 6), math.nan)}, ValueError, "nan or infinite"),
        ({"attributions": torch.zeros(3, 4, 6, 4)}, ValueError, "(3, 4, 6, 4)"),
        ({"attributions": torch.zeros(1, 4, 4, 6)}, ValueError, "(1, 4, 4, 6)"),
        ({"attributions": [1.0]}, TypeError, "list"),
        ({"layout": None}, ValueError, "layout="),
        ({"cells": (2, 5, 1)}, ValueError, "5"),
        ({"cells": (2, 2)}, ValueError, "(2, 2)"),
        ({"cells": (1.5, 1, 1)}, TypeError, "1.5"),
        ({"cells": (2, 2, 2), "feature_mask": torch.zeros(1, 1, 1, 1, 1).long()}, ValueError, "(2, 2, 2)"),
        ({"feature_mask": torch.zeros(1, 4, 1, 4, 6)}, TypeError, "float32"),
        ({"feature_mask": torch.ones(1, 4, 1, 4, 6).long()}, ValueError, "1 ids from 1 to 1"),
        ({"feature_mask": torch.arange(2).view(1, 1, 2, 1, 1)}, ValueError, "(1, 1, 2, 1, 1)"),
        ({"baselines": math.inf}, ValueError, "inf"),
        ({"baselines": torch.zeros(3, 4)}, ValueError, "(3, 4)"),
        ({"baselines": "zero"}, TypeError, "str"),
        ({"perturbations_per_eval": 0}, ValueError, "got 0"),
        ({"perturbations_per_eval": 2.0}, TypeError, "2.0"),
        ({"forward_func": None}, TypeError, "NoneType"),
        ({"windows": 3}, TypeError, "windows"),
    ],
)
def test_invalid_arguments_raise_before_the_model_is_called(metric, options, error, message):
    clip, maps = drawn()
    calls = []
    arguments = {"forward_func": calls.append, "inputs": clip, "attributions": maps, "layout": "BTCHW", **options}
    with pytest.raises(error) as caught:
        metric(**arguments)
    assert message in str(caught.value)
    assert not calls


@in_one_case()
@pytest.mark.parametrize(
    ("metric", "options", "error"),
    [
        (faithfulness, {"kept": 1.0}, ValueError),
        (faithfulness, {"kept": 0}, ValueError),
        (faithfulness, {"kept": "0.7"}, TypeError),
        (faithfulness, {"kept": 0.9, "cells": (1, 4, 6)}, ValueError),
        (faithfulness, {"kept": 0.1, "cells": (1, 4, 6)}, ValueError),
        (monotonicity, {"fractions": (0.5, 0.9), "cells": (1, 4, 6)}, ValueError),
        (monotonicity, {"fractions": (0.1, 0.5), "cells": (1, 4, 6)}, ValueError),
        (monotonicity, {"fractions": (0.5,)}, ValueError),
        (monotonicity, {"fractions": (0.5, 0.2)}, ValueError),
        (monotonicity, {"fractions": (0.5, 1.0)}, ValueError),
        (monotonicity, {"fractions": (0.0, 0.5)}, ValueError),
        (faithfulness_correlation, {"fraction": 1.0}, ValueError),
        (faithfulness_correlation, {"fraction": 0.1, "cells": (1, 4, 6)}, ValueError),
        (faithfulness_correlation, {"fraction": 0.9, "cells": (1, 4, 6)}, ValueError),
        (faithfulness_correlation, {"n_subsets": 2}, ValueError),
        (faithfulness_correlation, {"correlation": "kendall"}, ValueError),
        (faithfulness_correlation, {"generator": 3}, TypeError),
        (aopc, {"steps": 0}, ValueError),
        (aopc, {"steps": 5, "cells": (1, 4, 6)}, ValueError),
        (saco, {"groups": 1}, ValueError),
        (saco, {"groups": 13, "feature_mask": ragged_mask()}, ValueError),
        (saco, {"groups": 4.0}, TypeError),
    ],
)
def test_options_out_of_range_raise_before_the_model_is_called(metric, options, error):
    calls = []
    with pytest.raises(error, match=next(iter(options))):
        score(metric, *drawn(), calls.append, **options)
    assert not calls


def test_models_without_classes_raise():
    clip, maps = drawn()
    for metric in (faithfulness, monotonicity):
        with pytest.raises(ValueError, match="1 output"):
            score(metric, clip, maps, lambda x: model(x)[:, :1])
        with pytest.raises(ValueError, match=r"\(B, K\)"):
            score(metric, clip, maps, lambda x: model(x)[:, 0])
    for metric in (aopc, saco, faithfulness_correlation):
        with pytest.raises(ValueError, match="target=class index"):
            score(metric, clip, maps, target=None)


def test_range_and_direction():
    assert [metric.higher_is_better for metric in ALL] == [True, False, True, True, True]
    assert [(metric.lowest, metric.highest) for metric in ALL] == [
        (0, 1), (-1, 1), (-1, 1), (-math.inf, math.inf), (-1, 1)
    ]  # fmt: skip


def test_planted_evidence_scores_better_than_its_inverse():
    clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    clip, label, truth = PlantedClips(seed=12, n=20)[16:18]
    options = {"target": label, "feature_mask": feature_masks.tubelets(clip, clf)}
    for metric in (aopc, saco):
        right, wrong = (metric(clf, clip, maps, **options) for maps in (truth.double(), 1 - truth.double()))
        assert (right > wrong + 0.5).all()
    with pytest.raises(ValueError, match="layout"):
        aopc(clf, clip, truth.double(), layout="BCTHW", target=label)


@in_one_case()
@pytest.mark.parametrize("name", ["insertion", "deletion", "faithfulness", "monotonicity", "aopc", "saco"])
def test_a_layout_with_a_number_of_channels_gives_the_same_score(name):
    """The layout checks the inputs, and not the masks of cells, which have one channel."""
    generator = torch.Generator().manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16 * 4 * 6 * 6, 3))
    inputs, maps = torch.rand(2, 16, 4, 6, 6, generator=generator), torch.rand(2, 4, 6, 6, generator=generator)
    options: dict[str, Any] = {"cells": (1, 2, 2)} | ({} if name in ("faithfulness", "monotonicity") else {"target": 1})
    options |= {"groups": 3} if name == "saco" else {"steps": 3} if name in ("insertion", "deletion", "aopc") else {}
    twin = lambda x: model(x.transpose(1, 2))  # noqa: E731
    found = getattr(metrics, name)(model, inputs, maps, layout=VideoLayout("BCTHW", channels=16), **options)
    expected = getattr(metrics, name)(twin, inputs.transpose(1, 2), maps, layout="BTCHW", **options)
    found, expected = (getattr(result, "score", result) for result in (found, expected))
    torch.testing.assert_close(found, expected)
