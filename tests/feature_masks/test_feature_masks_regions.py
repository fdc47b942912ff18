"""Supervoxels follow edges and tubes follow motion, on clips with known edges and motion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from covering import in_one_case, over_pairs
from scipy.cluster import hierarchy
from skimage.measure import label
from skimage.morphology import erosion
from skimage.segmentation import find_boundaries
from torch import Tensor

from captum_staa.benchmark import PlantedClips
from captum_staa.feature_masks import flow_tubes, grid, supervoxels
from captum_staa.feature_masks.regions import ENOUGH, _flow, _neighbors, _superpixels, _traced, lab, ward


def shared(a: Tensor, b: Tensor) -> set[int]:
    return set(a.unique().tolist()) & set(b.unique().tolist())


def texture(height: int, width: int, seed: int, channels: int = 3) -> Tensor:
    """Smooth random colors ``(C, H, W)``, different at each position."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, channels, height // 6 + 2, width // 6 + 2, generator=generator)
    return F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)[0]


def moving_patch(step: tuple[int, int], seed: int, background: Tensor) -> tuple[Tensor, Tensor]:
    """A clip ``(1, 6, 3, 40, 56)`` of a textured patch that moves over a background, and the mask of the patch."""
    clip, truth = background.expand(6, 3, 40, 56).clone(), torch.zeros(6, 40, 56, dtype=torch.bool)
    for t in range(6):
        y, x = 6 + step[0] * t, 6 + step[1] * t
        clip[t, :, y : y + 16, x : x + 16] = texture(16, 16, seed + 100)
        truth[t, y : y + 16, x : x + 16] = True
    return clip[None], truth


def going_along(ids: Tensor, where: Tensor, step: tuple[int, int]) -> float:
    """The fraction of points that keep their region, for points that start at ``where`` (H, W) and move by ``step``."""
    y, x = where.nonzero().T
    regions = torch.stack([frame[y + step[0] * t, x + step[1] * t] for t, frame in enumerate(ids)])
    return float((regions[1:] == regions[:-1]).float().mean())


def staying(ids: Tensor, truth: Tensor) -> float:
    """The mean IoU with the evidence over its frames, of the regions on the evidence in its first frame."""
    life = truth.flatten(1).any(1).nonzero().flatten().tolist()
    count = int(ids.max()) + 1
    inside = torch.bincount(ids[life[0]][truth[life[0]]], minlength=count)
    chosen = (2 * inside > torch.bincount(ids[life[0]].flatten(), minlength=count))[ids]
    overlaps = [(chosen[t] & truth[t]).sum() / (chosen[t] | truth[t]).sum() for t in life]
    return float(torch.stack(overlaps).mean())


def still(clip: Tensor, n: int) -> Tensor:
    """Superpixels of the middle frame, repeated for all frames."""
    middle = clip.shape[1] // 2
    return supervoxels(clip[:, middle : middle + 1], "BTCHW", n)[0, :, 0].expand(clip.shape[1], -1, -1)


# ------------------------------------------------------------------------------------------------------- supervoxels


@in_one_case()
@over_pairs
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n", [9, 30, 100])
@pytest.mark.parametrize("axis", ["height", "width", "slanted", "time"])
def test_no_supervoxel_crosses_an_edge(n, axis, channels):
    t, y, x = torch.meshgrid(torch.arange(6), torch.arange(24), torch.arange(30), indexing="ij")
    side = {"time": t > 2, "height": y > 12, "width": x > 12, "slanted": x - y > 2 * t}[axis]
    clip = torch.where(side[None, :, None], 0.9, 0.1).expand(1, 6, channels, 24, 30)
    mask = supervoxels(clip, "BTCHW", n)[0, :, 0]
    if axis == "time" and (6 * 24 * 30 / n) ** (1 / 3) > 6 * 2 / 3:  # one seed along time, as documented
        assert shared(mask[side], mask[~side]) != set()
    else:
        assert shared(mask[side], mask[~side]) == set()
    assert mask.max() >= n // 3


def test_supervoxels_are_connected_and_about_n():
    clip, _, _ = PlantedClips(seed=3, n=2)[:1]
    for n, low, high in ((24, 12, 30), (48, 38, 58), (200, 150, 250)):
        ids = supervoxels(clip, "BTCHW", n)[0, :, 0].numpy()
        assert low <= ids.max() + 1 <= high
        pieces = label(ids, background=-1, connectivity=1)
        assert pieces.max() == ids.max() + 1


def test_supervoxel_boundaries_follow_a_moving_patch():
    clip = torch.full((1, 6, 3, 36, 48), 0.2)
    truth = torch.zeros(6, 36, 48, dtype=torch.bool)
    for t in range(6):
        truth[t, 10:24, 6 + 3 * t : 20 + 3 * t] = True
    clip = torch.where(truth[None, :, None], torch.tensor([0.9, 0.3, 0.1])[:, None, None], clip)
    edge = truth.numpy() & ~erosion(truth.numpy(), np.ones((1, 3, 3)))

    def recall(mask: Tensor) -> float:
        ids = mask[0, :, 0].expand(6, 36, 48).numpy()
        near = [find_boundaries(frame, mode="inner") for frame in ids]
        return float(np.stack(near)[edge].mean())

    cut = supervoxels(clip, "BTCHW", 40)
    assert recall(cut) > 0.95  # the four corner pixels are rounded off
    assert recall(cut) > recall(grid(clip, "BTCHW", (3, 12, 8))) + 0.3


def test_isolated_noise_pixels_do_not_change_supervoxels():
    clip = torch.full((1, 4, 3, 24, 32), 0.2)
    clip[..., 17:] = 0.8
    noisy = clip.clone()
    noisy[:, ::2, :, 3::6, 2::5], noisy[:, 1::2, :, 2::7, 4::6] = 0.8, 0.2
    assert supervoxels(noisy, "BTCHW", 12).equal(supervoxels(clip, "BTCHW", 12))


def test_supervoxels_depend_on_compactness_and_not_on_color_scale():
    clip, _, _ = PlantedClips(seed=4, n=1)[:1]
    mask = supervoxels(clip, "BTCHW", 48)
    assert supervoxels(clip * 4 + 2, "BTCHW", 48).eq(mask).float().mean() > 0.99
    boxes = supervoxels(torch.zeros_like(clip), "BTCHW", 48)  # uniform clip: only the seeds matter
    shares = [
        float(supervoxels(clip, "BTCHW", 48, compactness=c).eq(boxes).float().mean()) for c in (5.0, 50.0, 5000.0)
    ]
    assert shares[0] < shares[1] < shares[2] and shares[2] > 0.9


@pytest.mark.parametrize("channels", [2, 4, 7])
def test_repeated_channels_do_not_change_supervoxels(channels):
    gray = texture(24, 30, seed=4, channels=1).expand(1, 4, 1, 24, 30)
    assert supervoxels(gray.expand(-1, -1, channels, -1, -1), "BTCHW", 12).equal(supervoxels(gray, "BTCHW", 12))


def test_three_channels_are_converted_to_lab():
    black, white, blue, yellow = ([0, 0, 0], [1, 1, 1], [0, 0, 1], [1, 1, 0])
    seen = lab(np.array([black, white, blue, yellow], dtype=np.float32))
    assert np.linalg.norm(seen[1] - seen[0]) == pytest.approx(100, abs=0.1)
    assert seen[2:, 0] == pytest.approx([32.3, 97.1], abs=0.1)  # lightness from tables of the Lab space


# -------------------------------------------------------------------------------------------------------------- Ward


def partition(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)}


def every_pair(count: int) -> np.ndarray:
    return np.stack(np.triu_indices(count, 1), axis=1)


@in_one_case()
@pytest.mark.parametrize("seed", range(4))
def test_merge_of_a_complete_graph_equals_scipy_ward(seed):
    points = np.random.default_rng(seed).normal(size=(30, 3))
    tree = hierarchy.linkage(points, "ward")
    for n in (1, 2, 7, 29, 30):
        expected = hierarchy.fcluster(tree, n, "maxclust")
        assert partition(ward(points, np.ones(30), every_pair(30), n)) == partition(expected)


def test_merge_treats_a_node_size_as_repeated_points():
    generator = np.random.default_rng(5)
    points, sizes = generator.normal(size=(14, 2)), generator.integers(1, 6, 14)
    which = np.repeat(np.arange(14), sizes)
    for n in (2, 5, 9):
        expected = hierarchy.fcluster(hierarchy.linkage(points[which], "ward"), n, "maxclust")
        found = ward(points, sizes.astype(float), every_pair(14), n)
        assert partition(found[which]) == partition(expected)


@in_one_case()
@pytest.mark.parametrize("seed", range(4))
def test_merge_equals_greedy_search_over_all_neighbors(seed):
    """Compare with a search that recomputes all costs after each merge."""
    generator = np.random.default_rng(seed)
    points, sizes = generator.normal(size=(16, 2)), generator.integers(1, 9, 16).astype(float)
    edges = np.array([(a, b) for a, b in every_pair(16).tolist() if generator.random() < 0.15])
    groups = [{i} for i in range(16)]
    while True:
        best = None
        for i, one in enumerate(groups):
            for j, other in enumerate(groups[:i]):
                if any({a, b} <= one | other and len({a, b} & one) == 1 for a, b in edges.tolist()):
                    means = [np.average(points[list(g)], axis=0, weights=sizes[list(g)]) for g in (one, other)]
                    total = [sizes[list(g)].sum() for g in (one, other)]
                    cost = total[0] * total[1] / sum(total) * ((means[0] - means[1]) ** 2).sum()
                    best = min(best or (np.inf,), (cost, i, j))
        assert partition(ward(points, sizes, edges, len(groups))) == {frozenset(g) for g in groups}
        if best is None:
            break
        groups[best[2]] |= groups.pop(best[1])
    assert partition(ward(points, sizes, edges, 1)) == {
        frozenset(g) for g in groups
    }  # the connected components are left


# -------------------------------------------------------------------------------------------------------- flow tubes


def test_traced_positions_follow_the_flow():
    flow = np.zeros((3, 2, 6, 9), dtype=np.float32)
    flow[0, 0], flow[1, 1], flow[2] = -1, -2, 0.5  # one row up, two columns left, half a pixel down and right
    y, x = np.indices((6, 9))
    found = _traced(flow)
    assert found.shape == (4, 2, 6, 9)
    inside = np.s_[2:5, 3:7]
    for t, (dy, dx) in enumerate([(0, 0), (-1, 0), (-1, -2), (-0.5, -1.5)]):
        assert np.allclose(found[t, 0][inside], (y + dy)[inside]) and np.allclose(found[t, 1][inside], (x + dx)[inside])
    assert found.min() >= 0 and found[:, 0].max() <= 5 and found[:, 1].max() <= 8  # no position is outside the frame


def test_flow_is_in_pixels_of_the_clip_if_computed_on_smaller_frames():
    height, width = ENOUGH + 31, ENOUGH + 70
    picture = texture(height + 8, width + 8, seed=2, channels=1)[0]
    frames = torch.stack(
        [picture[4:-4, 4:-4], picture[2:-6, 8:]]
    ).numpy()  # the content at (y, x) moves to (y + 2, x - 4)
    back, forth = _flow(frames)
    assert back.shape == forth.shape == (1, 2, height, width)
    assert np.median(forth[0], axis=(1, 2)) == pytest.approx([2, -4], abs=0.2)
    assert np.median(back[0], axis=(1, 2)) == pytest.approx([-2, 4], abs=0.2)


def test_superpixels_have_labels_per_frame_and_correct_neighbors():
    frames = lab(texture(12, 15, seed=1).expand(3, 3, 12, 15).movedim(1, -1).numpy())
    pieces = _superpixels(frames, 6, 20.0)
    count = int(pieces[0].max()) + 1
    assert all(np.array_equal(pieces[t], pieces[0] + t * count) for t in range(3))  # same regions, different labels
    touching = {
        tuple(sorted((int(pieces[at]), int(pieces[beside]))))
        for at in np.ndindex(3, 12, 15)
        for beside in [tuple(np.add(at, step)) for step in np.eye(3, dtype=int)]
        if np.less(beside, (3, 12, 15)).all() and pieces[at] != pieces[beside]
    }
    found = _neighbors(pieces).tolist()
    assert {tuple(pair) for pair in found} == touching and len(found) == len(touching)


def test_tubes_of_a_static_clip_are_static():
    frame = texture(24, 30, seed=1)
    mask = flow_tubes(frame.expand(1, 4, 3, 24, 30), "BTCHW", 7)[0, :, 0]
    assert mask.eq(mask[0]).all() and int(mask.max()) == 6
    plain = flow_tubes(torch.zeros(1, 4, 3, 24, 32), "BTCHW", 12)[0, :, 0]
    assert plain.eq(plain[0]).all() and plain[0].flatten().bincount().min() > 24 * 32 / 12 / 3


@in_one_case()
@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_there_are_n_tubes(n):
    clip, _ = moving_patch((0, 2), 0, texture(40, 56, seed=0))
    assert flow_tubes(clip[:, :2], "BTCHW", n).unique().tolist() == list(range(n))
    assert flow_tubes(clip[:, :1], "BTCHW", n).unique().tolist() == list(range(n))  # one frame has no flow


def test_tubes_are_limited_by_the_number_of_superpixels():
    clip = torch.rand(1, 2, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    ids = flow_tubes(clip, "BTCHW", 2 * 6 * 7).unique()
    assert ids.tolist() == list(range(len(ids))) and len(ids) <= 84


@pytest.mark.parametrize("step", [(0, 3), (2, 0), (1, -2)])
def test_tubes_follow_a_panning_camera(step):
    wide = texture(60, 60, seed=3)
    views = [wide[:, 14 - step[0] * t : 46 - step[0] * t, 14 - step[1] * t : 46 - step[1] * t] for t in range(5)]
    mask = flow_tubes(torch.stack(views)[None], "BTCHW", 9)[0, :, 0]
    middle = torch.zeros(32, 32, dtype=torch.bool)
    middle[8:20, 8:20] = True
    assert going_along(mask, middle, step) > 0.97
    assert going_along(mask, middle, (0, 0)) < 0.9


@pytest.mark.parametrize("step", [(0, 3), (2, 1)])
def test_tubes_follow_a_moving_patch(step):
    clip, truth = moving_patch(step, 0, torch.full((3, 40, 56), 0.5))
    tubes, standing = flow_tubes(clip, "BTCHW", 24)[0, :, 0], still(clip, 24)
    assert going_along(tubes, truth[0], step) > 0.97 > going_along(standing, truth[0], step) + 0.2
    assert staying(tubes, truth) > 0.8 > staying(supervoxels(clip, "BTCHW", 24)[0, :, 0], truth) + 0.05
    assert staying(standing, truth) < 0.4


def test_tubes_follow_a_patch_that_differs_only_by_motion():
    """Both have the same kind of texture, so colors must have a low weight."""
    clip, truth = moving_patch((0, 3), 1, texture(40, 56, seed=1))
    tubes = flow_tubes(clip, "BTCHW", 20, compactness=40)[0, :, 0]
    assert going_along(tubes, truth[0], (0, 3)) > 0.93
    assert staying(tubes, truth) > staying(supervoxels(clip, "BTCHW", 20, compactness=40)[0, :, 0], truth) + 0.15


@pytest.mark.parametrize("step", [(0, 3), (2, 1)])
def test_tube_follows_a_patch_that_appears_late(step):
    """One tube equals the patch, in exactly the frames of the patch."""
    background = torch.full((3, 40, 56), 0.5)
    clip, truth = moving_patch(step, 0, background)
    clip[:, :2], truth[:2] = background, False
    clip = torch.where(truth[None, :, None], 0.9, clip)  # a uniform patch
    mask = flow_tubes(clip, "BTCHW", 9)[0, :, 0]
    assert staying(mask, truth) > 0.85 > staying(still(clip, 9), truth) + 0.1
    tube = mask == mask[truth].mode().values
    assert (tube & truth).sum() / (tube | truth).sum() > 0.9


def test_a_tube_ends_at_a_cut():
    clip = torch.cat([texture(24, 32, seed=1).expand(3, 3, 24, 32) * 0.3, texture(24, 32, seed=2).expand(3, 3, 24, 32)])
    mask = flow_tubes((clip + torch.tensor([0, 0, 0, 3, 3, 3.0]).view(6, 1, 1, 1))[None], "BTCHW", 12)[0, :, 0]
    assert shared(mask[:3], mask[3:]) == set()
