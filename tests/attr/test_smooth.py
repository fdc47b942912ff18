"""Smoothing: equal to a weighted mean written out in loops, and to scipy's filter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from covering import in_one_case
from torch import nn

from captum_staa import VideoAttribution, VideoClassifier, smooth


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mean_of_neighbors(maps: np.ndarray, space: float, time: float) -> np.ndarray:
    """One (T, H, W) volume: at each voxel the mean of what lies within three deviations, with Gaussian weights."""

    def reach(sigma: float) -> int:
        return int(3 * sigma + 0.5)

    def weight(step: int, sigma: float) -> float:
        return math.exp(-(step**2) / (2 * sigma**2)) if sigma else float(step == 0)

    found = np.zeros_like(maps)
    for t, y, x in np.ndindex(maps.shape):
        total = mass = 0.0
        for s in range(max(0, t - reach(time)), min(maps.shape[0], t + reach(time) + 1)):
            for v in range(max(0, y - reach(space)), min(maps.shape[1], y + reach(space) + 1)):
                for u in range(max(0, x - reach(space)), min(maps.shape[2], x + reach(space) + 1)):
                    w = weight(s - t, time) * weight(v - y, space) * weight(u - x, space)
                    total, mass = total + w * maps[s, v, u], mass + w
        found[t, y, x] = total / mass
    return found


@in_one_case()
@pytest.mark.parametrize(("space", "time"), [(0.7, 0.5), (1.0, 0), (0, 1.0), (2.0, 0.4), (1.5, 3.0), (0, 0)])
def test_smooth_equals_the_mean_of_the_neighborhood_up_to_the_borders(space, time):
    attributions = drawn(2, 4, 2, 5, 6)
    found = smooth(attributions, "BTCHW", space, time)
    for b in range(2):
        for c in range(2):
            expected = mean_of_neighbors(attributions[b, :, c].numpy(), space, time)
            np.testing.assert_allclose(found[b, :, c].numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("space", "time"), [(4.0, 1.0), (2.0, 0.5), (1.2, 2.5)])
def test_smooth_equals_scipy(space, time):
    ndimage = pytest.importorskip("scipy.ndimage")
    volume = drawn(20, 32, 40).numpy()
    found = smooth(torch.from_numpy(volume)[None, None], "BCTHW", space, time)[0, 0].numpy()
    options = {"sigma": (time, space, space), "truncate": 3.0, "mode": "constant"}
    blurred, covered = (ndimage.gaussian_filter(part, **options) for part in (volume, np.ones_like(volume)))
    inner = tuple(slice(int(3 * sigma + 0.5), -int(3 * sigma + 0.5)) for sigma in options["sigma"])
    assert blurred[inner].size > 0
    np.testing.assert_allclose(found[inner], blurred[inner], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found, blurred / covered, rtol=0, atol=1e-12)  # renormalized over what lies inside


def test_the_defaults_are_six_pixels_and_one_and_a_half_frames():
    attributions = drawn(1, 6, 1, 20, 20)
    torch.testing.assert_close(smooth(attributions, "BTCHW"), smooth(attributions, "BTCHW", space=6.0, time=1.5))
    assert not smooth(attributions, "BTCHW").allclose(smooth(attributions, "BTCHW", space=1.0, time=4.0))


def test_space_and_time_are_separate():
    point = torch.zeros(1, 3, 9, 15, 15)
    point[:, :, 4, 7, 7] = 1
    wide = smooth(point, "BCTHW", space=2.0, time=0)[0, 0]
    assert wide[4].gt(0).sum() == 13 * 13 and wide[[0, 3, 5, 8]].eq(0).all()
    torch.testing.assert_close(wide[4], wide[4].T)
    long = smooth(point, "BCTHW", space=0, time=1.0)[0, 0]
    assert long[:, 7, 7].gt(0).tolist() == [False, True, True, True, True, True, True, True, False]
    assert long.gt(0).sum() == 7
    torch.testing.assert_close(long[5, 7, 7] / long[4, 7, 7], torch.tensor(math.exp(-0.5)))


@pytest.mark.parametrize("layout", ["BCTHW", "BTHWC", "BWHTC"])
def test_result_does_not_depend_on_the_layout(layout):
    attributions = drawn(2, 5, 3, 7, 9)
    twin = attributions.permute(["BTCHW".index(axis) for axis in layout])
    found = smooth(twin, layout, space=1.3, time=0.8)
    assert found.shape == twin.shape and found.is_contiguous()
    expected = smooth(attributions, "BTCHW", space=1.3, time=0.8)
    assert found.permute([layout.index(axis) for axis in "BTCHW"]).equal(expected)


def test_clips_and_channels_are_smoothed_separately_and_linearly():
    one, other = drawn(2, 5, 3, 7, 9), drawn(2, 5, 3, 7, 9, seed=1)
    first, second = (smooth(part, "BTCHW", space=1.3, time=0.8) for part in (one, other))
    torch.testing.assert_close(smooth(one - 2 * other, "BTCHW", space=1.3, time=0.8), first - 2 * second)
    lonely = torch.zeros_like(one)
    lonely[1, :, 2] = one[1, :, 2]
    found = smooth(lonely, "BTCHW", space=1.3, time=0.8)
    torch.testing.assert_close(found[1, :, 2], first[1, :, 2])
    found[1, :, 2] = 0
    assert found.eq(0).all()


@pytest.mark.parametrize("axis", [1, 3, 4])
def test_reversed_time_and_mirrored_frames(axis):
    attributions = drawn(1, 5, 2, 6, 7)
    expected = smooth(attributions, "BTCHW", space=1.5, time=1.0).flip(axis)
    torch.testing.assert_close(smooth(attributions.flip(axis), "BTCHW", space=1.5, time=1.0), expected)


def test_a_constant_stays_constant_and_a_wide_kernel_gives_the_mean():
    flat = torch.full((1, 16, 3, 12, 12), 0.7)
    torch.testing.assert_close(smooth(flat, "BTCHW", space=4.0, time=2.0), flat, rtol=1e-6, atol=0)
    attributions = drawn(1, 4, 2, 5, 6)
    mean = attributions.mean((1, 3, 4), keepdim=True).expand_as(attributions)
    torch.testing.assert_close(smooth(attributions, "BTCHW", space=1e4, time=1e4), mean, rtol=0, atol=1e-6)
    image = attributions[:, :1, :, :1, :1]  # a single pixel of a single frame has no neighbors
    assert smooth(image, "BTCHW", space=2.0, time=2.0).equal(image)


@in_one_case()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept_and_sums_are_computed_in_float32(dtype):
    """In float16 the kernel's weighted sum of 60000s would overflow."""
    attributions = (60_000 + 100 * drawn(1, 6, 1, 9, 9)).to(dtype)
    found = smooth(attributions, "BTCHW", space=2.0, time=1.0)
    assert found.dtype == dtype
    wide = smooth(attributions.double(), "BTCHW", space=2.0, time=1.0)
    torch.testing.assert_close(found, wide.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_input_and_graph_are_unchanged():
    attributions = drawn(1, 4, 3, 6, 6).requires_grad_()
    before, state = attributions.detach().clone(), torch.get_rng_state()
    for sigma in (0.0, 2.0):
        found = smooth(attributions, "BTCHW", space=sigma, time=sigma)
        assert not found.requires_grad and found.is_contiguous()
        found.zero_()  # a copy also where there is nothing to smooth
    assert attributions.equal(before) and attributions.requires_grad and attributions.grad is None
    assert torch.get_rng_state().equal(state)


def test_signs_cancel_unless_magnitude_is_passed():
    board = ((-1.0) ** torch.arange(16)).expand(1, 4, 1, 16, 16)
    assert smooth(board, "BTCHW", space=2.0, time=0)[..., 6:-6].abs().max() < 1e-3
    torch.testing.assert_close(smooth(board.abs(), "BTCHW", space=2.0, time=0), board.abs())


def test_smooth_of_captum_attributions():
    """Integrated Gradients of a linear model is weight times input, exactly; so smoothing it has a known answer."""
    head = nn.Linear(3 * 6 * 8 * 8, 2)
    with torch.no_grad():
        head.weight.copy_(drawn(*head.weight.shape))
    clf = VideoClassifier(nn.Sequential(nn.Flatten(), head), layout="BCTHW")
    clip = drawn(2, 3, 6, 8, 8, dtype=torch.float32)
    attributions = IntegratedGradients(clf).attribute(clip, target=[0, 1], n_steps=4)
    found = smooth(attributions, clf.layout, space=1.0, time=0.5)
    product = clip.double() * head.weight.detach().double().reshape(2, 3, 6, 8, 8)
    for b in range(2):
        expected = sum(mean_of_neighbors(product[b, c].numpy(), 1.0, 0.5) for c in range(3))
        np.testing.assert_allclose(
            VideoAttribution.from_attributions(found, clf.layout).joint[b].numpy(), expected, rtol=0, atol=1e-5
        )


CLIP = torch.zeros(1, 8, 3, 4, 4)


@in_one_case()
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attributions": torch.zeros(8, 3, 4, 4)}, ValueError, "(8, 3, 4, 4)"),
        ({"attributions": torch.zeros(1, 0, 3, 4, 4)}, ValueError, "(1, 0, 3, 4, 4)"),
        ({"attributions": torch.full_like(CLIP, math.nan)}, ValueError, "nan"),
        ({"attributions": CLIP.long()}, TypeError, "int64"),
        ({"attributions": [CLIP]}, TypeError, "list"),
        ({"layout": "BCTHW"}, ValueError, "layout='BTCHW'"),
        ({"layout": "THW"}, ValueError, "'THW'"),
        ({"space": -1.0}, ValueError, "space = -1.0"),
        ({"time": -0.5}, ValueError, "time = -0.5"),
        ({"space": math.inf}, ValueError, "space = inf"),
        ({"time": math.inf}, ValueError, "time = inf"),
        ({"time": math.nan}, ValueError, "time = nan"),
        ({"sigma": 2.0}, TypeError, "sigma"),
    ],
)
def test_invalid_arguments_raise_and_are_named(arguments, error, message):
    with pytest.raises(error) as caught:
        smooth(**{"attributions": CLIP, "layout": "BTCHW", **arguments})
    assert message in str(caught.value)
