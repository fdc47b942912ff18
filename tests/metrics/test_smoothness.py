"""Smoothness equals the textbook's double sum over all pairs, and values computed by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from covering import in_one_case

from captum_staa import smooth
from captum_staa.metrics import Smoothness, auroc, complexity, smoothness, sparsity


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def neighbors(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """``(N, N)`` weights of Geary's C for space and for time: 1 for voxels one step apart, from their coordinates."""
    places = np.array(list(np.ndindex(*shape)))
    apart = np.abs(places[:, None] - places[None])  # (N, N, 3)
    one = apart.sum(2) == 1
    return (one & (apart[..., 0] == 0)).astype(float), (one & (apart[..., 0] == 1)).astype(float)


def geary(values: np.ndarray, weights: np.ndarray) -> float:
    """Geary's C as published: a sum over all ordered pairs of voxels, most with weight 0."""
    n, pairs = len(values), 0.0
    for i in range(n):
        for j in range(n):
            pairs += weights[i, j] * (values[i] - values[j]) ** 2
    return (n - 1) * pairs / (2 * weights.sum() * sum((value - values.mean()) ** 2 for value in values))


@in_one_case()
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 2, 2), (4, 1, 6), (4, 6, 1), (7, 1, 2), (2, 5, 3)])
def test_smoothness_equals_1_minus_gearys_c(shape):
    maps = drawn(2, *shape, seed=sum(shape)) + torch.arange(float(shape[2]))  # a trend, so that the result is not 0
    found = smoothness(maps)
    for b, values in enumerate(maps.double().flatten(1).numpy()):
        space, time = neighbors(shape)
        assert found.space[b].item() == pytest.approx(1 - geary(values, space), rel=1e-12)
        assert found.time[b].item() == pytest.approx(1 - geary(values, time), rel=1e-12)


def test_the_mean_over_all_permutations_is_exactly_zero():
    """All permutations of six different values in 2 x 1 x 3 voxels; nothing is random."""
    values = [5.0, -1.0, 0.25, 100.0, 0.0, -7.0]
    maps = torch.tensor(list(itertools.permutations(values))).reshape(-1, 2, 1, 3)
    space, time = smoothness(maps)
    assert len(maps) == 720 and space.std() > 0.05 and time.std() > 0.05
    assert space.mean().item() == pytest.approx(0, abs=1e-12)
    assert time.mean().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("axis", ["space", "time"])
def test_white_noise_has_the_theoretical_variance(axis):
    """Cliff and Ord's variance of C for independent normal values: z-scores have mean 0 and deviation 1."""
    shape, count = (4, 6, 8), 400
    weights = neighbors(shape)[axis == "time"]
    n, total = len(weights), weights.sum()
    s1, s2 = 2 * (weights**2).sum(), (4 * weights.sum(1) ** 2).sum()
    error = math.sqrt(((2 * s1 + s2) * (n - 1) - 4 * total**2) / (2 * (n + 1) * total**2))
    z = getattr(smoothness(drawn(count, *shape)), axis) / error
    assert abs(z.mean().item()) < 3 / math.sqrt(count)
    assert z.std().item() == pytest.approx(1, abs=3 / math.sqrt(2 * count))


def test_values_of_checkerboards_stripes_and_flicker():
    t, y, x = torch.meshgrid(torch.arange(6), torch.arange(8), torch.arange(10), indexing="ij")
    n = t.numel()
    lowest = -1 + 2 / n
    board, rows, flicker = (-1.0) ** (x + y), (-1.0) ** y, (-1.0) ** t
    for maps, space, time in [
        (board, lowest, 1),  # constant in time
        (board * flicker, lowest, lowest),
        (flicker, 1, lowest),
        # Of 8 x 9 + 7 x 10 pairs in a frame, those of two rows differ.
        (rows, 1 - (n - 1) / n * 2 * (7 * 10) / (8 * 9 + 7 * 10), 1),
    ]:
        found = smoothness(maps[None])
        assert (found.space.item(), found.time.item()) == pytest.approx((space, time), rel=1e-12)


@pytest.mark.parametrize("frames", [2, 5, 16])
def test_value_of_a_ramp(frames):
    """Steps of 1 with a variance of (T² - 1) / 12."""
    maps = torch.arange(float(frames)).reshape(1, frames, 1, 1).expand(1, frames, 3, 4)
    n = maps.numel()
    space, time = smoothness(maps)
    assert space.item() == 1
    assert time.item() == pytest.approx(1 - 6 * (n - 1) / n / (frames**2 - 1), rel=1e-12)
    across = smoothness(maps.transpose(1, 3).reshape(1, 12, 1, frames))  # the same, from left to right
    assert (across.space.item(), across.time.item()) == pytest.approx((time.item(), 1), rel=1e-12)


@in_one_case()
@pytest.mark.parametrize("turns", [1, 7, 50, 113])
def test_a_wave_has_the_cosine_of_its_step(turns):
    steps = 2 * math.pi * turns / 240
    wave = torch.sin(steps * torch.arange(240.0, dtype=torch.float64) + 0.3)
    assert smoothness(wave.reshape(1, 240, 1, 1)).time.item() == pytest.approx(math.cos(steps), abs=0.01)
    assert smoothness(wave.reshape(1, 1, 1, 240)).space.item() == pytest.approx(math.cos(steps), abs=0.01)


@pytest.mark.parametrize("sigma", [0.8, 1.0, 2.0])
def test_smoothed_noise_has_the_autocorrelation_of_its_kernel(sigma):
    noise = drawn(1, 60, 1, 60, 60, seed=5)
    still = smoothness(smooth(noise, "BTCHW", space=sigma, time=0), "BTCHW")
    assert still.space.item() == pytest.approx(math.exp(-1 / (4 * sigma**2)), abs=0.01)
    assert still.time.item() == pytest.approx(0, abs=0.05)
    calm = smoothness(smooth(noise, "BTCHW", space=0, time=sigma), "BTCHW")
    assert calm.time.item() == pytest.approx(math.exp(-1 / (4 * sigma**2)), abs=0.01)
    assert calm.space.item() == pytest.approx(0, abs=0.05)


def same(found: Smoothness, expected: Smoothness, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=0, atol=tolerance)


def test_scale_and_offset_cancel():
    maps = drawn(3, 4, 5, 6).double().cumsum(3)
    expected = smoothness(maps)
    for factor, offset in [(7.5, 0), (-1, 0), (1e-3, 20), (1e-200, 0), (1e200, 0), (-0.1, -3)]:
        same(smoothness(maps * factor + offset), expected)


def test_signs_count():
    magnitude = 10 + drawn(1, 4, 6, 6).cumsum(3).cumsum(2)
    board = (-1.0) ** (torch.arange(6)[:, None] + torch.arange(6))
    assert smoothness(magnitude).space > 0.5
    assert smoothness(magnitude * board).space < -0.5
    same(smoothness((magnitude * board).abs()), smoothness(magnitude))


def test_flips_and_transposes_within_frames_do_not_count():
    maps = drawn(2, 5, 6, 7).cumsum(1)
    expected = smoothness(maps)
    for axis in (1, 2, 3):
        same(smoothness(maps.flip(axis)), expected)
    same(smoothness(maps.transpose(2, 3)), expected)
    line = drawn(2, 5, 1, 7).cumsum(1)
    space, time = smoothness(line)
    assert (time > space + 0.1).all()
    same(smoothness(line.transpose(1, 3)), Smoothness(time, space))


@in_one_case()
@pytest.mark.parametrize("layout", ["BTCHW", "BCTHW", "BTHWC", "BWHTC"])
def test_all_layouts_give_the_same_value(layout):
    attributions = drawn(2, 5, 3, 6, 7).cumsum(1).double()  # (B, T, C, H, W)
    twin = attributions.permute(["BTCHW".index(axis) for axis in layout])
    same(smoothness(twin, layout), smoothness(attributions.sum(2)))
    assert twin.is_contiguous() == (layout == "BTCHW")


def test_channels_are_summed_and_can_cancel():
    attributions = drawn(1, 4, 2, 5, 5)
    attributions[:, :, 1] = -attributions[:, :, 0]
    assert all(part.isnan().all() for part in smoothness(attributions, "BTCHW"))
    assert all(part.isfinite().all() for part in smoothness(attributions.abs(), "BTCHW"))


def test_clips_are_independent_and_arguments_unchanged():
    maps = torch.cat([drawn(1, 4, 5, 6), drawn(1, 4, 5, 6, seed=1).cumsum(2) * 1e6, torch.ones(1, 4, 5, 6)])
    before, state = maps.clone(), torch.get_rng_state()
    maps.requires_grad_()
    whole = smoothness(maps)
    assert not whole.space.requires_grad and whole.space.dtype == whole.time.dtype == torch.float64
    for i in range(3):
        alone = smoothness(maps[i : i + 1])
        assert alone.space.equal(whole.space[i : i + 1]) or i == 2
        assert alone.time.equal(whole.time[i : i + 1]) or i == 2
    assert maps.equal(before) and torch.get_rng_state().equal(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float64(dtype):
    maps = (drawn(1, 8, 9, 10).cumsum(3) * 1000).to(dtype)  # squares beyond float16
    same(smoothness(maps), smoothness(maps.double()), 0)
    channels = torch.stack([maps, maps.flip(1), maps.flip(3)], 2)
    same(smoothness(channels, "BTCHW"), smoothness(channels.double().sum(2)), 0)


def test_undefined_values_are_nan():
    nan = math.nan
    for maps, space, time in [
        (torch.full((1, 3, 7, 7), 0.1, dtype=torch.float64), nan, nan),  # its mean is not 0.1 exactly
        (torch.zeros(1, 2, 2, 2), nan, nan),
        (torch.ones(1, 1, 1, 1), nan, nan),
        (torch.tensor([0.0, 1.0, 5.0]).reshape(1, 1, 1, 3), 1 - 8.5 / 14, nan),
        (torch.tensor([0.0, 1.0, 5.0]).reshape(1, 3, 1, 1), nan, 1 - 8.5 / 14),
    ]:
        found = smoothness(maps)
        assert (found.space.item(), found.time.item()) == pytest.approx((space, time), nan_ok=True)
    a_single_voxel = torch.zeros(1, 3, 3, 3)
    a_single_voxel[0, 1, 1, 1] = 1e-30
    assert all(part.isfinite().all() for part in smoothness(a_single_voxel))


def test_a_smoothed_random_map_is_smooth_but_not_better():
    """As the docstring warns: smoothness rises with sigma, localization does not."""
    noise, truth = drawn(40, 8, 1, 24, 24, seed=3), torch.zeros(40, 8, 24, 24, dtype=torch.bool)
    truth[:, 2:5, 4:12, 9:17] = True
    found = []
    for sigma in (0, 1, 2, 4):
        blurred = smooth(noise, "BTCHW", space=sigma, time=sigma / 2)
        space, time = smoothness(blurred, "BTCHW")
        found.append((space.mean().item(), time.mean().item()))
        right = auroc(blurred[:, :, 0], truth)
        assert abs(right.mean() - 0.5) < 3 * right.std() / math.sqrt(len(right))
    spaces, times = zip(*found, strict=True)
    assert sorted(spaces) == list(spaces) and sorted(times) == list(times) and spaces[-1] > 0.9 and times[-1] > 0.9


@in_one_case()
@pytest.mark.parametrize(
    ("attributions", "layout", "error", "message"),
    [
        (torch.zeros(2, 3, 4), None, ValueError, "(2, 3, 4)"),
        (torch.zeros(1, 3, 8, 4, 4), None, ValueError, "layout='BTCHW'"),
        (torch.zeros(1, 0, 4, 4), None, ValueError, "(1, 0, 4, 4)"),
        (
            torch.tensor([1.0, math.nan, math.inf, 0.0]).reshape(1, 1, 2, 2),
            None,
            ValueError,
            "got 2 nan or infinite values out of 4",
        ),
        (torch.zeros(1, 2, 4, 4, dtype=torch.bool), None, TypeError, ".float()"),
        ([1.0], None, TypeError, "list"),
        (torch.zeros(1, 8, 4, 4), "BCTHW", ValueError, "(1, 8, 4, 4)"),
        (torch.zeros(1, 8, 3, 4, 4), "BCTHW", ValueError, "layout='BTCHW'"),
        (torch.full((1, 8, 3, 4, 4), math.nan), "BTCHW", ValueError, "got 384 nan or infinite values out of 384"),
        (torch.zeros(1, 8, 3, 4, 4).long(), "BTCHW", TypeError, "int64"),
        (torch.zeros(1, 8, 3, 4, 4), "BTCH", ValueError, "'BTCH'"),
        (torch.zeros(1, 8, 3, 4, 4), 5, TypeError, "5"),
    ],
)
def test_invalid_arguments_raise(attributions, layout, error, message):
    for metric in (smoothness, sparsity, complexity):
        with pytest.raises(error) as caught:
            metric(attributions, layout)
        assert message in str(caught.value)


def test_an_unknown_keyword_raises():
    with pytest.raises(TypeError, match="axis"):
        smoothness(torch.zeros(1, 2, 2, 2), axis="time")
