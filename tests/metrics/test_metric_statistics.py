"""Statistics of a map equal their formulas in loops and numpy, and values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from covering import in_one_case

from captum_staa.metrics import auroc, complexity, signal_to_noise, sparsity


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_truth(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.2


def gini(values: list[float]) -> float:
    """Gini index as the mean difference of all ordered pairs divided by twice the mean."""
    magnitudes = [abs(value) for value in values]
    n, mean = len(magnitudes), sum(magnitudes) / len(magnitudes)
    return sum(abs(a - b) for a in magnitudes for b in magnitudes) / (2 * n * n * mean)


def entropy(values: list[float]) -> float:
    total = sum(abs(value) for value in values)
    shares = [abs(value) / total for value in values if value]
    return -sum(share * math.log(share) for share in shares) / math.log(len(values))


def noise_ratio(values: np.ndarray, inside: np.ndarray) -> float:
    return (values[inside].mean() - values[~inside].mean()) / math.sqrt(values[~inside].var())


@in_one_case()
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("step", [0, 1.0])
def test_statistics_equal_their_formulas(seed, step):
    maps, truth = drawn(3, 4, 3, 5, seed=seed), some_truth(3, 4, 3, 5, seed=seed)
    if step:
        maps = (maps / step).round() * step  # many ties and zeros
    flat = maps.flatten(1).tolist()
    assert sparsity(maps).tolist() == pytest.approx([gini(values) for values in flat], rel=1e-12)
    assert complexity(maps).tolist() == pytest.approx([entropy(values) for values in flat], rel=1e-12)
    expected = [noise_ratio(values, where) for values, where in zip(maps.numpy(), truth.numpy(), strict=True)]
    assert signal_to_noise(maps, truth).tolist() == pytest.approx(expected, rel=1e-12)
    for found in (sparsity(maps), complexity(maps), signal_to_noise(maps, truth)):
        assert found.dtype == torch.float64 and found.shape == (3,)


@in_one_case()
@pytest.mark.parametrize("count", [2, 7, 64])
@pytest.mark.parametrize("value", [0.1, -3.0, 1e-200, 1e200])
def test_one_voxel_and_equal_voxels_give_the_extremes(count, value):
    maps = torch.full((2, count, 1, 1), value, dtype=torch.float64)
    maps[1, 1:] = 0
    assert sparsity(maps).tolist() == [0, pytest.approx(1 - 1 / count, rel=1e-15)]
    assert complexity(maps).tolist() == [1, 0]


def test_values_for_k_equal_voxels_of_n():
    for k in (1, 3, 10, 60):
        maps = torch.zeros(1, 60)
        maps[0, :k] = 2
        maps = maps.reshape(1, 3, 4, 5)
        assert sparsity(maps).item() == pytest.approx(1 - k / 60, abs=1e-12)
        assert 60 ** complexity(maps).item() == pytest.approx(k, rel=1e-12)


def test_two_copies_of_a_map_have_the_same_sparsity():
    maps = drawn(2, 3, 4, 5)
    torch.testing.assert_close(sparsity(torch.cat([maps, maps], 1)), sparsity(maps))
    assert (complexity(torch.cat([maps, 0 * maps], 1)) < complexity(maps)).all()
    assert (sparsity(torch.cat([maps, 0 * maps], 1)) > sparsity(maps)).all()


def test_signs_and_positions_do_not_count():
    maps, truth = drawn(2, 3, 4, 5), some_truth(2, 3, 4, 5)
    moved = maps.flatten(1).flip(1).reshape(maps.shape)
    for metric in (sparsity, complexity):
        for twin in (-maps, maps.abs(), moved, 7 * maps, 1e-200 * maps, 1e200 * maps):
            torch.testing.assert_close(metric(twin), metric(maps))
        assert not torch.allclose(metric(maps + 3), metric(maps))
    for factor, offset in [(7, 0), (1e-200, 0), (1e200, 0), (1, 100), (0.25, -3)]:
        torch.testing.assert_close(signal_to_noise(factor * maps + offset, truth), signal_to_noise(maps, truth))
    torch.testing.assert_close(signal_to_noise(-maps, truth), -signal_to_noise(maps, truth))


def test_values_stay_in_range_despite_rounding():
    nearly = 1 + 1e-15 * drawn(200, 3, 5, 7)
    assert (sparsity(nearly) >= 0).all() and (complexity(nearly) <= 1).all()


def test_the_truth_scores_highest_and_its_inverse_lowest():
    truth = some_truth(3, 4, 5, 6)
    assert signal_to_noise(truth.double(), truth).tolist() == [math.inf] * 3
    assert signal_to_noise(-truth.double(), truth).tolist() == [-math.inf] * 3
    tilted = truth * 0.6 + 0.1  # relative to its maximum, 1/7: a constant whose mean has a rounding error
    assert signal_to_noise(tilted, truth).tolist() == [math.inf] * 3


def test_one_voxel_can_outweigh_many_in_snr_and_not_in_auroc():
    truth = some_truth(1, 4, 5, 6)
    maps = drawn(1, 4, 5, 6)
    loud = maps.clone()
    loud[tuple(truth.nonzero()[0])] = 1e3
    assert signal_to_noise(loud, truth) > signal_to_noise(maps, truth) + 30
    assert auroc(loud, truth) - auroc(maps, truth) < 0.1


def test_signal_to_noise_of_noise_is_zero_on_average():
    """For independent normal values, the variance of the ratio is 1 / inside + 1 / outside, so z-scores have std 1."""
    truth = torch.zeros(400, 4, 6, 10, dtype=torch.bool)
    truth[:, 1, 1:4, 2:7] = True  # 15 of 240
    z = signal_to_noise(drawn(400, 4, 6, 10, seed=3), truth) / math.sqrt(1 / 15 + 1 / 225)
    assert abs(z.mean().item()) < 3 / math.sqrt(400)
    assert z.std().item() == pytest.approx(1, abs=3 / math.sqrt(800))


def test_undefined_values_are_nan():
    flat = torch.full((3, 2, 2, 2), 0.1, dtype=torch.float64)
    truth = torch.zeros(3, 2, 2, 2, dtype=torch.bool)
    truth[0], truth[2, 0] = True, True
    assert signal_to_noise(drawn(3, 2, 2, 2), truth).isnan().tolist() == [True, True, False]
    assert signal_to_noise(flat, truth).isnan().all() and signal_to_noise(0 * flat, truth).isnan().all()
    for metric in (sparsity, complexity):
        maps = drawn(2, 2, 2, 2)
        maps[0] = 0
        assert metric(maps).isnan().tolist() == [True, False]
    one = torch.ones(1, 1, 1, 1)
    assert complexity(one).isnan().item() and sparsity(one).item() == 0


@pytest.mark.parametrize(("axis", "summed"), [("joint", ()), ("time", (2, 3)), ("space", (1,))])
def test_snr_supports_layouts_and_axes(axis, summed):
    """Attributions in the clip's shape, in all layouts and along all axes, equal numpy clip by clip."""
    attributions, truth = drawn(3, 5, 2, 3, 4), some_truth(3, 5, 3, 4) & (torch.arange(5) < 3).view(-1, 1, 1)
    truth[..., 0] = False  # no frame and no pixel is truth everywhere
    maps = attributions.sum(2).numpy().sum(summed) if summed else attributions.sum(2).numpy()
    inside = truth.numpy().any(summed) if summed else truth.numpy()
    expected = [noise_ratio(values, where) for values, where in zip(maps, inside, strict=True)]
    for layout in ("BTCHW", "BCTHW", "BWHTC"):
        twin = attributions.permute(["BTCHW".index(letter) for letter in layout])
        assert signal_to_noise(attributions=twin, truth=truth, axis=axis, layout=layout).tolist() == pytest.approx(
            expected, rel=1e-12
        )


@in_one_case()
@pytest.mark.parametrize("layout", ["BTCHW", "BCTHW", "BTHWC", "BWHTC"])
def test_all_layouts_give_the_same_value(layout):
    attributions = drawn(2, 5, 3, 6, 7)  # (B, T, C, H, W)
    twin = attributions.permute(["BTCHW".index(axis) for axis in layout])
    for metric in (sparsity, complexity):
        torch.testing.assert_close(metric(twin, layout), metric(attributions.sum(2)), rtol=1e-12, atol=0)


def test_clips_are_independent_and_arguments_unchanged():
    maps, truth, order = drawn(4, 3, 4, 5).float(), some_truth(4, 3, 4, 5), [2, 0, 3, 1]
    maps[1] *= 1e6
    before, state = maps.clone(), torch.get_rng_state()
    for metric in (sparsity, complexity, lambda maps: signal_to_noise(maps, truth)):
        assert metric(maps.numpy()).equal(metric(maps))
        assert not metric(maps.clone().requires_grad_()).requires_grad
    for metric in (sparsity, complexity):
        assert metric(maps[order]).equal(metric(maps)[order])
        assert torch.cat([metric(clip[None]) for clip in maps]).equal(metric(maps))
    assert signal_to_noise(maps[order], truth[order].numpy()).equal(signal_to_noise(maps, truth)[order])
    assert signal_to_noise(maps[2:3], truth[2:3]).equal(signal_to_noise(maps, truth)[2:3])
    assert maps.equal(before) and torch.get_rng_state().equal(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float64(dtype):
    maps, truth = (drawn(1, 8, 9, 10) * 1000).to(dtype), some_truth(1, 8, 9, 10)
    assert sparsity(maps).equal(sparsity(maps.double())) and complexity(maps).equal(complexity(maps.double()))
    assert signal_to_noise(maps, truth).equal(signal_to_noise(maps.double(), truth))


def test_range_and_direction():
    assert (signal_to_noise.higher_is_better, signal_to_noise.lowest, signal_to_noise.highest) == (
        True,
        -math.inf,
        math.inf,
    )
    for metric in (sparsity, complexity):
        assert (metric.higher_is_better, metric.lowest, metric.highest) == (None, 0, 1)


@in_one_case()
@pytest.mark.parametrize(
    ("scores", "truth", "error", "message"),
    [
        (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), TypeError, "truth > 0"),
        (torch.zeros(1, 2, 3, 4), [True], TypeError, "list"),
        (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4, 3).bool(), ValueError, "(1, 2, 4, 3)"),
        (torch.zeros(2, 2, 3, 4), torch.zeros(1, 2, 3, 4).bool(), ValueError, "(1, 2, 3, 4)"),
        (
            torch.full((1, 2, 3, 4), math.nan),
            torch.zeros(1, 2, 3, 4).bool(),
            ValueError,
            "attributions must not contain nan",
        ),
        (torch.full((1, 2, 3, 4), math.inf), torch.zeros(1, 2, 3, 4).bool(), ValueError, "attributions must be finite"),
        (torch.zeros(1, 2, 3, 3, 4), torch.zeros(1, 2, 3, 4).bool(), ValueError, "layout='BTCHW'"),
    ],
)
def test_invalid_scores_and_truth_raise(scores, truth, error, message):
    with pytest.raises(error) as caught:
        signal_to_noise(scores, truth)
    assert message in str(caught.value)
