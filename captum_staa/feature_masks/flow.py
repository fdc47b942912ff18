"""Regions that follow movement: superpixels of every frame, joined where colors agree and points travel together."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from captum_staa.feature_masks.slic import as_mask, check_clip, gapless, lab, slic, stretched
from captum_staa.feature_masks.ward import merge
from captum_staa.layout import VideoLayout

Floats = NDArray[np.floating[Any]]

PIECES = 4  # superpixels per tube and frame: small enough to keep to edges, large enough to average out noise
SHARP = 50.0  # weight of the picture against smoothness in optical flow: a small patch keeps its own movement
EXACT = "donot_use_mm_for_euclid_dist"  # else near ties could fall otherwise with another number of threads
ENOUGH = 128  # pixels along a frame's shorter side that suffice for flow, as it is averaged over superpixels


def flow_tubes(clip: Tensor, layout: VideoLayout | str, n: int, *, compactness: float = 20.0) -> Tensor:
    """One feature per tube, a region that goes along with what it shows: which moving thing counts?

    Example:
        >>> rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
        >>> clip = (torch.sin(rows / 2) + torch.cos(columns / 3)).expand(1, 1, 5, 32, 32) / 4
        >>> clip = clip.contiguous()
        >>> for t in range(5):
        ...     clip[..., t, 8:20, 4 + 3 * t : 16 + 3 * t] = 2.0  # a bright patch goes right
        >>> mask = flow_tubes(clip, "BCTHW", 6)[0, 0]
        >>> patch = mask[0, 14, 10]
        >>> [(mask[t] == patch).nonzero().float().mean(0).round().tolist() for t in (0, 2, 4)]  # rows, columns
        [[14.0, 10.0], [14.0, 16.0], [14.0, 22.0]]

    Every frame is cut into about ``4 n`` superpixels. Their points are traced along optical flow to the first and to
    the last frame, and superpixels that touch, in a frame or from one to the next, are merged by Ward's rule until
    ``n`` tubes are left: two belong together where their colors agree and their points come from one place and go to
    one place. In the end every voxel joins the tube that is nearest by this measure, so that borders do not tremble.

    Args:
        clip: floats of five axes, frames of 2 x 2 pixels at least.
        layout: the order of its axes.
        n: how many tubes at most. Fewer come only where SLIC finds fewer superpixels, as when asked for one per voxel,
            or where all voxels of a small tube are nearer to others.
        compactness: which difference of color weighs as much as the distance of two tubes, where black and white are
            100 apart. Large holds together what moves together, small what has one color.

    Returns:
        int64 ids ``0 .. n-1``, ``(B, T, 1, H, W)`` in the clip's layout, each clip's own. A tube need not hang together
        in a frame: a thing may pass in front of it.

    Raises:
        ImportError: scikit-image is missing.
        TypeError, ValueError: as :func:`captum_staa.feature_masks.supervoxels`, or a frame is a single row or column.

    Note:
        What appears late gets tubes from its first frame on, and they end with it. What leaves the picture, or hides,
        and comes back is another tube then. Movement is followed as far as flow sees it: up to a third of a thing's
        width per frame, and not within a plain surface. Beyond that, and across a cut, color and place decide.
        What stays, stays in one tube all along; for when, cut tubes by :func:`captum_staa.feature_masks.segments`.

        A clip of 16 x 224 x 224 takes some 4 seconds on one core, mostly for the flow.

    Reference:
        Flow: Zach, Pock, Bischof, "A Duality Based Approach for Realtime TV-L1 Optical Flow", DAGM 2007, as in
        scikit-image. Merging superpixels over space and time: Grundmann et al., "Efficient Hierarchical Graph-Based
        Video Segmentation", CVPR 2010, with another criterion.
    """
    layout = check_clip(clip, layout, n, compactness)
    sizes = layout.size(clip)
    if min(sizes["H"], sizes["W"]) < 2:
        raise ValueError(
            f"optical flow needs frames of 2 x 2 pixels at least, but a clip of shape {tuple(clip.shape)} in layout "
            f"{layout.axes} came; feature_masks.frames or segments take it"
        )
    masks = [_tubes(stretched(frames), n, compactness) for frames in layout.to_working(clip)]
    return as_mask(masks, clip, layout)


def _tubes(volume: NDArray[np.float32], n: int, compactness: float) -> NDArray[np.int64]:
    """``(T, H, W)`` ids of a clip ``(T, H, W, C)``."""
    height, width = volume.shape[1:3]
    colors = lab(volume)
    back, forth = _flow(volume.mean(-1))
    ends = np.concatenate([_traced(back), _traced(forth[::-1])[::-1]], axis=1)  # (T, 4, H, W)
    side = (height * width / n) ** 0.5  # of a tube, if all lived from the first frame to the last
    # SLIC's own distance, the squared difference of color plus that of place, here the mean of the two places'
    voxels = np.concatenate([colors / compactness, np.moveaxis(ends, 1, -1) / (side * 2**0.5)], axis=-1)
    pieces = _superpixels(colors, min(PIECES * n, height * width), compactness)
    means, sizes = _means(voxels, pieces)
    tubes = gapless(merge(means, sizes, _neighbors(pieces), n)[pieces])
    # No two frames are cut into pieces alike, so borders of tubes would jump to and fro: voxels choose once more.
    centers = torch.from_numpy(_means(voxels, tubes)[0]).float()
    nearest = [torch.cdist(torch.from_numpy(frame).float(), centers, compute_mode=EXACT).argmin(-1) for frame in voxels]
    return gapless(torch.stack(nearest).numpy())


def _means(voxels: Floats, labels: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each label, the mean ``(N, D)`` of its voxels ``(T, H, W, D)``, and how many it has."""
    sizes = np.bincount(labels.ravel()).astype(np.float64)
    sums = [np.bincount(labels.ravel(), weights=part.ravel()) for part in np.moveaxis(voxels, -1, 0)]
    return np.stack(sums, axis=1) / sizes[:, None], sizes


def _superpixels(colors: NDArray[np.float32], n: int, compactness: float) -> NDArray[np.int64]:
    """Labels ``(T, H, W)``, no two frames sharing one."""
    frames: list[NDArray[np.int64]] = []
    for frame in colors:
        frames.append(slic(frame, n, compactness) + (frames[-1].max() + 1 if frames else 0))
    return np.stack(frames)


def _flow(gray: NDArray[np.float32]) -> tuple[Floats, Floats]:
    """Where each pixel was a frame ago, and where it is a frame on.

    Returns:
        ``(T-1, 2, H, W)`` twice, steps down and right in pixels: of frames 1 .. T-1 back, of 0 .. T-2 forth.
    """
    from skimage.registration import optical_flow_tvl1

    height, width = size = gray.shape[1:]
    by = -(-min(size) // ENOUGH)
    shrunk = F.interpolate(torch.from_numpy(gray)[:, None], size=(-(-height // by), -(-width // by)), mode="area")
    steps = torch.tensor([height / shrunk.shape[2], width / shrunk.shape[3]]).view(2, 1, 1)
    frames = shrunk[:, 0].numpy()

    def between(here: Floats, there: Floats) -> Floats:
        flow = [optical_flow_tvl1(a, b, attachment=SHARP) for a, b in zip(here, there, strict=True)]
        wide = torch.from_numpy(np.array(flow, dtype=np.float32).reshape(-1, 2, *frames.shape[1:]))
        return (F.interpolate(wide, size=size, mode="bilinear") * steps).numpy()

    return between(frames[1:], frames[:-1]), between(frames[:-1], frames[1:])


def _traced(flow: Floats) -> Floats:
    """Where the point at each pixel of each frame was in the first one: ``(T, 2, H, W)``, rows and columns."""
    from skimage.transform import warp

    grid = np.indices(flow.shape[2:], dtype=np.float32)
    places = [grid]
    for step in flow:
        places.append(np.stack([warp(axis, grid + step, order=1, mode="edge") for axis in places[-1]]))
    return np.stack(places)


def _neighbors(pieces: NDArray[np.int64]) -> NDArray[np.int64]:
    """``(E, 2)``, the labels of ``(T, H, W)`` that touch within a frame or from one frame to the next."""
    count = int(pieces.max()) + 1
    sides = [(pieces[1:], pieces[:-1]), (pieces[:, 1:], pieces[:, :-1]), (pieces[:, :, 1:], pieces[:, :, :-1])]
    keys = [np.unique(np.minimum(a, b) * count + np.maximum(a, b)) for a, b in sides]
    low, high = np.divmod(np.unique(np.concatenate(keys)), count)
    return np.stack([low, high], axis=1)[low != high]
