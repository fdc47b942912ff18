"""Baselines equal slow loops over frames, are independent per clip, and remove the documented content."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from covering import in_one_case

from captum_staa import VideoLayout, baselines

NAMES = ("zero", "mean_frame", "blur", "freeze", "shuffle", "reverse", "noise")
every_baseline = pytest.mark.parametrize("name", NAMES)


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A clip (B, T, C, H, W) with different means and deviations per channel, and axes of different length."""
    shape = shape or (4, 6, 2, 7, 5)
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(shape[0], 1, shape[2], 1, 1, generator=generator) + 0.5
    return (torch.randn(shape, generator=generator) * scale + 3 * scale).to(dtype)


def numbered(clips: int, frames: int) -> torch.Tensor:
    """Clips of one pixel, whose value is the index of its frame."""
    return torch.arange(float(frames)).reshape(1, frames, 1, 1, 1).repeat(clips, 1, 1, 1, 1)


def orders(clips: int, frames: int) -> list[tuple[int, ...]]:
    return [tuple(row) for row in baselines.shuffle(numbered(clips, frames), "BTCHW").flatten(1).int().tolist()]


def parted(order: tuple[int, ...]) -> bool:
    return all(abs(a - b) != 1 for a, b in itertools.pairwise(order))


# --- each baseline --------------------------------------------------------------------------------------------------


def test_zero_is_zero():
    assert baselines.zero(drawn(0), "BTCHW").tolist() == torch.zeros(4, 6, 2, 7, 5).tolist()


def test_mean_frame_equals_the_mean_over_time():
    clip = drawn(1)
    total = sum(clip[:, t].numpy().astype(np.float64) for t in range(6))
    found = baselines.mean_frame(clip, "BTCHW")
    for t in range(6):
        np.testing.assert_allclose(found[:, t].numpy(), total / 6, rtol=1e-6)


def smeared(values: np.ndarray, axis: int, sigma: float) -> np.ndarray:
    """A Gaussian blur of one axis by its definition: a weight for each pair of positions within three deviations."""
    size, reach = values.shape[axis], max(1, int(3 * sigma + 0.5))
    weight = np.zeros((size, size))
    for here, there in itertools.product(range(size), repeat=2):
        if abs(here - there) <= reach:
            weight[here, there] = math.exp(-((here - there) ** 2) / (2 * sigma**2))
    weight /= weight.sum(1, keepdims=True)
    return np.moveaxis(np.tensordot(weight, values, axes=(1, axis)), 0, axis)


@in_one_case()
@pytest.mark.parametrize(
    ("options", "space", "time"),
    [
        ({"space": 1.3}, 1.3, 0),
        ({"space": 0, "time": 0.8}, 0, 0.8),
        ({"space": 2, "time": 1.5}, 2, 1.5),
        ({"time": 20.0}, 0.5, 20),
        ({}, 0.5, 0),  # a tenth of the shorter side of 7 x 5 pixels
    ],
)
def test_blur_equals_a_weighted_sum_over_neighbors(options, space, time):
    clip = drawn(2)
    expected = clip.numpy().astype(np.float64)
    for axis, sigma in ((1, time), (3, space), (4, space)):
        if sigma:
            expected = smeared(expected, axis, sigma)
    np.testing.assert_allclose(baselines.blur(clip, "BTCHW", **options).numpy(), expected, rtol=2e-6)


def test_blur_removes_stripes_and_keeps_brightness_over_time():
    stripes = torch.tensor([-1.0, 1.0]).repeat_interleave(3).repeat(8)  # period of six pixels, 48 pixels in total
    clip = stripes.expand(1, 4, 3, 48, 48) + 7 * torch.arange(4.0)[:, None, None, None]
    found = baselines.blur(clip, "BTCHW")[..., 15:-15]  # without borders, where periods are incomplete
    expected = 7 * torch.arange(4.0)[:, None, None, None].expand_as(found)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)  # the stripes have amplitude 1


@in_one_case()
@pytest.mark.parametrize(
    ("frames", "frame", "shown"), [(6, None, 3), (5, None, 2), (6, 0, 0), (6, -1, 5), (1, None, 0)]
)
def test_freeze_repeats_one_frame(frames, frame, shown):
    clip = drawn(3, 2, frames, 2, 4, 5)
    found = baselines.freeze(clip, "BTCHW", frame=frame)
    for t in range(frames):
        assert torch.equal(found[:, t], clip[:, shown])


def test_reverse_inverts_the_order_of_frames():
    clip = drawn(4)
    found = baselines.reverse(clip, "BTCHW")
    for t in range(6):
        assert torch.equal(found[:, t], clip[:, 5 - t])
    assert torch.equal(baselines.reverse(found, "BTCHW"), clip)


def test_shuffle_permutes_whole_frames():
    clip = drawn(5)
    found = baselines.shuffle(clip, "BTCHW")
    order = baselines.shuffle(numbered(4, 6), "BTCHW").flatten(1).long()  # the same draws
    for i, own in enumerate(order.tolist()):
        assert sorted(own) == [0, 1, 2, 3, 4, 5] and parted(tuple(own))
        for t, source in enumerate(own):
            assert torch.equal(found[i, t], clip[i, source])
    assert len({tuple(own) for own in order.tolist()}) > 1  # the order differs between clips


@pytest.mark.parametrize(
    ("frames", "allowed"),
    [
        (2, [(1, 0)]),
        (3, [(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)]),
        (4, [(1, 3, 0, 2), (2, 0, 3, 1)]),
        (5, [order for order in itertools.permutations(range(5)) if parted(order)]),
    ],
)
def test_shuffle_draws_orders_without_neighbors_uniformly(frames, allowed):
    clips = 1400
    counts = Counter(orders(clips, frames))
    assert set(counts) == set(allowed)
    mean = clips / len(allowed)
    assert all(abs(count - mean) <= 4 * math.sqrt(mean) for count in counts.values())
    if frames > 2:  # each order is as likely as its reverse
        assert {order[::-1] for order in allowed} == set(allowed)


@pytest.mark.parametrize("frames", [8, 16, 61])
def test_shuffle_separates_neighbors_in_long_clips(frames):
    found = orders(30, frames)
    assert all(sorted(order) == list(range(frames)) and parted(order) for order in found)
    assert len(set(found)) == 30


def test_noise_has_each_channels_mean_and_deviation():
    clip = drawn(6, 2, 10, 3, 40, 30)
    found = baselines.noise(clip, "BTCHW").numpy().astype(np.float64)
    for i, c in itertools.product(range(2), range(3)):
        own, values = clip[i, :, c].numpy().astype(np.float64), found[i, :, c]
        assert values.mean() == pytest.approx(own.mean(), abs=4 * own.std() / math.sqrt(own.size))
        assert values.std() == pytest.approx(own.std(), rel=4 / math.sqrt(2 * own.size))
        standard = (values - own.mean()) / own.std()
        assert np.mean(abs(standard) < 1) == pytest.approx(0.6827, abs=0.02)  # fraction of a normal distribution
        assert np.mean(abs(standard) < 2) == pytest.approx(0.9545, abs=0.01)
        for other in (
            own,
            np.roll(standard, 1, 0),
            np.roll(standard, 1, 1),
            np.roll(standard, 1, 2),
            found[i, :, c - 1],
        ):
            assert abs(np.corrcoef(standard.ravel(), other.ravel())[0, 1]) < 4 / math.sqrt(own.size)  # uncorrelated
    assert abs(np.corrcoef(found[0].ravel(), found[1].ravel())[0, 1]) < 0.5  # they share only the means


def test_noise_std_scales_the_same_draws():
    clip = drawn(7)
    own, given = baselines.noise(clip, "BTCHW"), baselines.noise(clip, "BTCHW", std=0.25)
    mean = clip.mean((1, 3, 4), keepdim=True)
    deviation = clip.double().std((1, 3, 4), correction=0, keepdim=True).float()
    torch.testing.assert_close((given - mean) / 0.25, (own - mean) / deviation, rtol=1e-4, atol=1e-5)
    flat = torch.full((1, 2, 3, 4, 5), 0.5)
    torch.testing.assert_close(baselines.noise(flat, "BTCHW"), flat)
    assert baselines.noise(flat, "BTCHW", std=1.0).std() > 0.5


# --- all baselines --------------------------------------------------------------------------------------------------


@in_one_case()
@every_baseline
@pytest.mark.parametrize("axes", ["BCTHW", "BWTCH"])
def test_baseline_does_not_depend_on_the_layout(name, axes):
    make, clip, other = getattr(baselines, name), drawn(8), VideoLayout(axes)
    turned = other.from_working(clip).contiguous()
    expected = other.from_working(make(clip, "BTCHW"))
    for layout in (axes, other, axes.lower()):
        torch.testing.assert_close(make(turned, layout), expected, rtol=1e-6, atol=1e-6)


@in_one_case()
@every_baseline
def test_baseline_of_a_clip_does_not_depend_on_other_clips(name):
    make, clip = getattr(baselines, name), drawn(9)
    whole = make(clip, "BTCHW")
    changed = clip.clone()
    changed[1] = drawn(10)[1] * 50
    torch.testing.assert_close(make(changed, "BTCHW")[[0, 2, 3]], whole[[0, 2, 3]], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        make(clip[:2], "BTCHW"), whole[:2], rtol=1e-6, atol=1e-6
    )  # does not depend on later clips
    if name != "zero":
        assert not torch.allclose(make(changed, "BTCHW")[1], whole[1])


@in_one_case()
@every_baseline
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_computed_in_float32(name, dtype):
    make, clip = getattr(baselines, name), drawn(11, dtype=dtype)
    found = make(clip, "BTCHW")
    assert found.dtype == dtype
    wide = clip if dtype == torch.float64 else clip.float()
    torch.testing.assert_close(found, make(wide, "BTCHW").to(dtype), rtol=0, atol=0)


def test_float64_is_not_rounded():
    clip = drawn(12).double() + 1e-9 * drawn(13).double()
    np.testing.assert_allclose(baselines.mean_frame(clip, "BTCHW")[:, 2].numpy(), clip.numpy().mean(1), rtol=1e-14)
    np.testing.assert_allclose(
        baselines.blur(clip, "BTCHW", space=0, time=2).numpy(), smeared(clip.numpy(), 1, 2.0), rtol=1e-13
    )


@in_one_case()
@every_baseline
def test_memory_format_does_not_matter_and_no_memory_is_shared(name):
    make, base = getattr(baselines, name), drawn(14)
    strided = base.new_zeros(4, 6, 2, 7, 10)[..., ::2].copy_(base)
    fresh = base.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    for clip in (base, strided, fresh, base[:, :1].expand(-1, 6, -1, -1, -1)):
        before = clip.clone()
        found = make(clip, "BTCHW")
        torch.testing.assert_close(found, make(before, "BTCHW"), rtol=1e-6, atol=1e-6)
        assert found.is_contiguous() and found.device == clip.device
        found.add_(1000)  # fails on an expanded view, and changes the clip if memory is shared
        assert torch.equal(clip, before)


@in_one_case()
@pytest.mark.parametrize("name", [name for name in NAMES if name != "shuffle"])
def test_single_frame_and_single_pixel_clips(name):
    make = getattr(baselines, name)
    for shape in ((1, 1, 3, 4, 5), (2, 5, 1, 1, 1)):
        clip = drawn(15, *shape)
        before, found = clip.clone(), make(clip, "BTCHW")
        assert found.shape == clip.shape and found.isfinite().all()
        found.add_(1000)
        assert torch.equal(clip, before)
    if name in ("mean_frame", "freeze", "reverse"):
        one = drawn(16, 1, 1, 3, 4, 5)
        assert torch.equal(make(one, "BTCHW"), one)


@in_one_case()
@every_baseline
def test_baselines_are_detached(name):
    clip = drawn(17).requires_grad_()
    found = getattr(baselines, name)(clip, "BTCHW")
    assert not found.requires_grad and clip.requires_grad and clip.grad is None
    with torch.inference_mode():
        torch.testing.assert_close(getattr(baselines, name)(clip, "BTCHW"), found)


@pytest.mark.parametrize("name", ["shuffle", "noise"])
def test_draws_are_reproducible_and_do_not_change_the_global_generator(name):
    make, clip = getattr(baselines, name), drawn(18)
    state = torch.get_rng_state()
    first = make(clip, "BTCHW")
    assert torch.equal(make(clip, "BTCHW"), first)
    assert torch.equal(make(clip, "BTCHW", generator=torch.Generator().manual_seed(0)), first)
    generator = torch.Generator().manual_seed(5)
    draws = [make(clip, "BTCHW", generator=generator) for _ in range(3)]
    assert not torch.equal(draws[0], first) and not torch.equal(draws[0], draws[1])
    generator.manual_seed(5)
    assert all(torch.equal(make(clip, "BTCHW", generator=generator), draw) for draw in draws)
    assert torch.equal(torch.get_rng_state(), state)


# --- errors ---------------------------------------------------------------------------------------------------------


@in_one_case()
@every_baseline
@pytest.mark.parametrize(
    ("clip", "layout", "error", "message"),
    [
        (torch.zeros(6, 2, 7, 5), "BTCHW", ValueError, r"inputs must be .*\(6, 2, 7, 5\)"),
        (torch.zeros(2, 0, 2, 7, 5), "BTCHW", ValueError, "non-empty"),
        (torch.zeros(2, 3, 16, 7, 5), "BTCHW", ValueError, "Pass layout='BCTHW'"),
        (torch.zeros(2, 6, 2, 7, 5), "BTCHWX", ValueError, "got 'BTCHWX'"),
        (torch.zeros(2, 6, 2, 7, 5), 5, TypeError, "a layout .*got 5 of type int"),
        (torch.zeros(2, 6, 2, 7, 5).long(), "BTCHW", TypeError, "got torch.int64"),
        (np.zeros((2, 6, 2, 7, 5)), "BTCHW", TypeError, "got ndarray"),
        (torch.full((1, 2, 2, 2, 2), math.nan), "BTCHW", ValueError, "got 16 nan or infinite values out of 16"),
        (torch.full((1, 2, 2, 2, 2), math.inf), "BTCHW", ValueError, "nan or infinite"),
    ],
)
def test_invalid_clip_raises_error(name, clip, layout, error, message):
    with pytest.raises(error, match=message):
        getattr(baselines, name)(clip, layout)


@in_one_case()
@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("freeze", {"frame": 6}, ValueError, r"-6 \.\. 5, got 6 for a clip of shape \(4, 6, 2, 7, 5\)"),
        ("freeze", {"frame": -7}, ValueError, "got -7"),
        ("freeze", {"frame": 1.0}, TypeError, "float"),
        ("blur", {"space": -1.0, "time": 2.0}, ValueError, "space = -1.0 pixels"),
        ("blur", {"space": 2.0, "time": -0.5}, ValueError, "time = -0.5 frames"),
        ("blur", {"space": math.nan}, ValueError, "finite"),
        ("blur", {"time": math.inf}, ValueError, "finite"),
        ("blur", {"space": 0, "time": 0}, ValueError, "not both 0"),
        ("noise", {"std": 0}, ValueError, "positive and finite, got 0"),
        ("noise", {"std": -0.1}, ValueError, "got -0.1"),
        ("noise", {"std": math.inf}, ValueError, "got inf"),
        ("noise", {"std": math.nan}, ValueError, "got nan"),
        ("noise", {"generator": 3}, TypeError, "generator must be a torch.Generator.*got 3"),
        ("shuffle", {"generator": 3}, TypeError, "generator must be a torch.Generator.*got 3"),
        *((name, {"frames": 3}, TypeError, "unexpected keyword argument 'frames'") for name in NAMES),
    ],
)
def test_invalid_option_raises_error(name, options, error, message):
    with pytest.raises(error, match=message):
        getattr(baselines, name)(drawn(19), "BTCHW", **options)


def test_shuffle_of_one_frame_raises_value_error():
    with pytest.raises(ValueError, match=r"at least two frames to be shuffled.*got shapes \[\(2, 1, 3, 4, 5\)\]"):
        baselines.shuffle(torch.zeros(2, 1, 3, 4, 5), "BTCHW")


def test_layout_with_channels_allows_three_frames_of_many_channels():
    clip = drawn(20, 1, 3, 8, 4, 5)
    found = baselines.reverse(clip, VideoLayout("BTCHW", channels=8))
    assert torch.equal(found, clip[:, [2, 1, 0]])
