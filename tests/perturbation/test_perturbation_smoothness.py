"""Regularizers of masks equal loops over voxels."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from covering import in_one_case
from drawn import same, uniform

from captum_staa.perturbation.config import REGULARIZERS, Ellipsoid, SquaredDifferences, TotalVariation


def by_neighbors(mask: np.ndarray, space: float, time: float, power: int) -> float:
    """For each axis: the sum over neighboring voxels, per line. For squares, times the length of a line."""
    total = 0.0
    for axis, weight in enumerate((time, space, space)):
        pairs = []
        for place in np.ndindex(*mask.shape):
            after = tuple(p + (a == axis) for a, p in enumerate(place))
            if after[axis] < mask.shape[axis]:
                pairs.append(abs(mask[after] - mask[place]) ** power)
        length, lines = mask.shape[axis], mask.size // mask.shape[axis]
        total += weight * sum(pairs) / lines * length ** (power - 1)
    return total


@in_one_case()
@pytest.mark.parametrize("size", [(4, 3, 5), (1, 3, 2), (3, 1, 4), (1, 1, 1)])
@pytest.mark.parametrize(("term", "power"), [(TotalVariation, 1), (SquaredDifferences, 2)])
def test_difference_regularizers_equal_loops_over_neighbors(term, power, size):
    masks, areas = uniform(2, 2, *size), torch.tensor([0.1, 0.5])
    for space, time in ((1.0, 1.0), (2.0, 5.0), (0.0, 3.0), (3.0, 0.0)):
        found = term(space=space, time=time)(masks, areas)
        for clip, number in np.ndindex(2, 2):
            same(found[clip, number], by_neighbors(masks[clip, number].numpy(), space, time, power))
    for value in (0.0, 0.3, 1.0):  # constant masks of any area cost nothing
        same(term()(torch.full_like(masks, value), areas), torch.zeros(2, 2))


def window_means(mask: np.ndarray, sides: list[int]) -> list[float]:
    """Windows half their length apart, the first centered on the border: means over the voxels in the clip."""
    sides = [min(side, length) for side, length in zip(sides, mask.shape, strict=True)]
    starts = [
        range(-(side // 2), length + side // 2 - side + 1, max(1, side // 2))
        for side, length in zip(sides, mask.shape, strict=True)
    ]
    means = []
    for first in ((a, b, c) for a in starts[0] for b in starts[1] for c in starts[2]):
        held = []
        for step in np.ndindex(*sides):
            away = sum(Fraction(2 * s + 1 - side, side) ** 2 for s, side in zip(step, sides, strict=True))
            place = tuple(f + s for f, s in zip(first, step, strict=True))
            if away <= 1 and all(0 <= p < length for p, length in zip(place, mask.shape, strict=True)):
                held.append(mask[place])
        means.append(sum(held) / len(held))
    return means


def by_order(means: list[float], area: float) -> float:
    ordered, full_count = sorted(means, reverse=True), min(max(round(area * len(means)), 1), len(means) - 1)
    high = sum((mean - 1) ** 2 for mean in ordered[:full_count]) / full_count
    return high + sum(mean**2 for mean in ordered[full_count:]) / (len(means) - full_count)


@in_one_case()
@pytest.mark.parametrize(
    ("size", "frames", "pixels"),
    [((5, 6, 7), 3, 3), ((5, 6, 7), 4, 2), ((6, 5, 9), 2, 5), ((3, 4, 4), 8, 4), ((2, 7, 3), 1, 1), ((1, 6, 6), 8, 3)],
)
def test_ellipsoid_equals_loops_over_the_voxels_of_each_window(size, frames, pixels):
    masks, areas = uniform(2, 3, *size), torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    term = Ellipsoid(frames=frames, side=pixels / min(size[1:]))
    means, found = term.windows(masks), term(masks, areas)
    for clip, number in np.ndindex(2, 3):
        expected = window_means(masks[clip, number].numpy(), [frames, pixels, pixels])
        same(means[clip, number], expected)
        same(found[clip, number], by_order(expected, float(areas[number])))


def test_ellipsoid_window_is_at_least_a_pixel_and_has_the_papers_size_by_default():
    masks = uniform(1, 1, 16, 22, 30)
    assert Ellipsoid(frames=1, side=0.01).windows(masks).shape[2] == masks.numel()
    assert torch.equal(Ellipsoid().windows(masks), Ellipsoid(frames=8, side=2 / 22).windows(masks))
    assert Ellipsoid().windows(masks).shape[2] == 5 * 23 * 31


def test_regularizers_prefer_a_connected_mask():
    """A half mask costs less than its random permutations. A full and an empty mask have the same Ellipsoid cost."""
    whole = torch.zeros(1, 1, 8, 8, 8, dtype=torch.float64)
    whole[..., :4] = 1
    term, areas = Ellipsoid(frames=4, side=0.5), torch.tensor([0.5])
    lowest = float(term(whole, areas))
    for seed in range(20):
        order = torch.randperm(512, generator=torch.Generator().manual_seed(seed))
        torn = whole.flatten()[order].view(whole.shape)
        for other in (TotalVariation(), SquaredDifferences()):
            assert float(other(torn, areas)) > 2 * float(other(whole, areas))
        assert float(term(torn, areas)) > 1.5 * lowest
    same(term(torch.stack([whole[0] * 0, whole[0] * 0 + 1]), areas), [[1.0], [1.0]])
    assert lowest < 0.2


def test_regularizer_gradients_equal_finite_differences():
    masks, areas = uniform(1, 2, 3, 4, 4).requires_grad_(), torch.tensor([0.2, 0.5])
    for term in (TotalVariation(2.0, 3.0), SquaredDifferences(2.0, 3.0), Ellipsoid(frames=2, side=0.5)):
        assert torch.autograd.gradcheck(lambda m, t=term: t(m, areas), masks)


def test_regularizers_are_finite_for_one_voxel():
    for term in REGULARIZERS.values():
        assert term is None or bool(term(torch.ones(1, 1, 1, 1, 1), torch.tensor([0.5])).isfinite().all()), term
