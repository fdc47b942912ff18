"""Gaussian blur: a weighted mean of neighbors, or its transpose, which preserves sums."""

from __future__ import annotations

import pytest
import torch
from covering import in_one_case
from torch import Tensor

from captum_staa._utils.tensors import gaussian
from captum_staa.perturbation.mask_grid import CellGrid

SIZES = (4, 5, 6)  # T, H, W
SIGMAS = [(1.5, 0.75, 2.0), (0.75, 6.0, 6.0), (0.0, 1.0, 0.0), (0.1, 20.0, 0.1)]


def matrix(sigma: tuple[float, float, float], **options: object) -> Tensor:
    """Return the blur as a matrix ``(N, N)``. Row i is the blur of a map that is 1 at voxel i and 0 elsewhere."""
    units = torch.eye(torch.Size(SIZES).numel(), dtype=torch.float64).view(-1, *SIZES)
    return gaussian(units, sigma, **options).flatten(1)


@in_one_case()
@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 130, 200])
def test_blur_is_the_weighted_mean_of_neighbors_on_axes_of_any_length(length):
    maps = torch.randn(2, length, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at = torch.arange(length, dtype=torch.float64)
    weights = torch.exp(-0.5 * ((at[:, None] - at) / 1.5) ** 2).where((at[:, None] - at).abs() <= 5, 0)
    expected = torch.einsum("ij,bjhw->bihw", weights / weights.sum(1, keepdim=True), maps)
    torch.testing.assert_close(gaussian(maps, (1.5, 0.0, 0.0)), expected, rtol=0, atol=1e-14)


@in_one_case()
@pytest.mark.parametrize("radius", [None, (1, 2, 1)])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_keep_sums_is_the_transpose_of_the_mean(sigma, radius):
    mean, spread = matrix(sigma, radius=radius), matrix(sigma, radius=radius, keep_sums=True)
    torch.testing.assert_close(spread, mean.T, rtol=0, atol=1e-15)
    assert not torch.equal(spread, mean), "equal only without blur, or far from borders"


@in_one_case()
@pytest.mark.parametrize("sigma", SIGMAS)
def test_keep_sums_preserves_the_sum_of_every_voxel(sigma):
    """This includes voxels at borders and in corners. The mean preserves constants instead."""
    ones = torch.ones(torch.Size(SIZES).numel(), dtype=torch.float64)
    torch.testing.assert_close(matrix(sigma, keep_sums=True).sum(1), ones, rtol=0, atol=1e-14)
    torch.testing.assert_close(matrix(sigma).sum(0), ones, rtol=0, atol=1e-14)


def test_keep_sums_preserves_the_sum_of_signed_maps():
    maps = torch.randn(3, 8, 12, 10, generator=torch.Generator().manual_seed(0))
    spread = gaussian(maps, (1.5, 6.0, 6.0), keep_sums=True)
    torch.testing.assert_close(spread.sum((1, 2, 3)), maps.sum((1, 2, 3)), rtol=1e-4, atol=1e-4)
    assert spread.abs().sum() < 0.5 * maps.abs().sum(), "neighbors of opposite signs must cancel"


def test_keep_sums_spreads_only_within_the_radius():
    map_of_one = torch.zeros(1, *SIZES)
    map_of_one[0, 1, 2, 3] = 1
    spread = gaussian(map_of_one, (0.0, 1.0, 1.0), radius=(0, 1, 2), keep_sums=True)[0]
    reached = torch.zeros(SIZES, dtype=torch.bool)
    reached[1, 1:4, 1:6] = True
    assert torch.equal(spread > 0, reached)


@pytest.mark.parametrize("product", ["gaussian", "masks"])
def test_maps_and_masks_under_autocast_are_those_without(product):
    values = torch.rand(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))

    def run():
        if product == "gaussian":
            return gaussian(values, (1.0, 2.0, 2.0), keep_sums=True)
        return CellGrid((8, 12, 10), (4, 6, 5)).spread(values.flatten(1)[:, None])

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(), expected)
