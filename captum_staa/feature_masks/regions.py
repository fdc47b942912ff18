"""Feature masks of regions that follow the picture: supervoxels of similar color, and tubes that also follow motion."""

from __future__ import annotations

import heapq
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from captum_staa._utils.checks import check_count, is_number
from captum_staa.feature_masks.regular import for_inputs
from captum_staa.layout import VideoLayout
from captum_staa.result import Inputs

PIECES = 4  # superpixels per tube and frame: small enough to follow edges, large enough to average out noise
SHARP = 50.0  # weight of the image relative to smoothness in optical flow: lets a small patch keep its own motion
EXACT = "donot_use_mm_for_euclid_dist"  # otherwise near ties could depend on the number of threads
ENOUGH = 128  # pixels along the shorter side at which flow is computed; it is averaged over superpixels anyway


def supervoxels(inputs: Inputs, layout: VideoLayout | str, n: int, *, compactness: float = 20.0) -> Inputs:
    """Return a mask with one feature per supervoxel, a small region of similar color in space and time.

    Example:
        >>> inputs = torch.zeros(1, 3, 8, 32, 32)
        >>> inputs[..., 20:] = 1.0  # bright on the right
        >>> mask = supervoxels(inputs, "BCTHW", 12)
        >>> mask.shape, set(mask[..., :20].unique().tolist()) & set(mask[..., 20:].unique().tolist())
        (torch.Size([1, 1, 8, 32, 32]), set())

    Args:
        inputs: clips, a float tensor of five axes, or a tuple of them (RGB and flow), each with its own regions.
        layout: order of the axes, such as ``"BTCHW"``.
        n: approximate number of regions. SLIC rounds it to a grid of seeds and merges regions that are too small. The
            distance of seeds is ``(T H W / n) ** (1/3)``, in frames and in pixels. If it is more than two thirds of the
            clip's frames, regions span the whole clip, even across a cut. Then increase ``n``, or intersect the mask
            with :func:`segments`.
        compactness: the color difference that weighs as much as the distance of two seeds. The difference of black and
            white is 100. Large values give boxes, and small values give irregular regions that follow every edge.

    Returns:
        int64 ids, ``(B, T, 1, H, W)`` in the clip's layout. The ids of each clip start at 0 and have no gaps. The
        number of regions may differ between the clips of a batch.

    Raises:
        ImportError: scikit-image is not installed.
        TypeError, ValueError: ``inputs`` are not clips of finite floats in this layout, ``n`` is not an integer of 1 to
            the number of voxels of a clip, or ``compactness`` is not positive and finite.

    Note:
        Colors are scaled to 0 .. 1 over each clip, and converted to Lab if there are three channels. First, each pixel
        is replaced by the median of 3 x 3 pixels in its frame, so that noise does not determine the regions. A median
        keeps the position of edges. There is no median over time, which would blur moving objects. A clip of
        16 x 224 x 224 takes about a second.

    Reference:
        Achanta et al., "SLIC Superpixels Compared to State-of-the-Art Superpixel Methods", TPAMI 2012, as in
        scikit-image.
    """

    def segmented(clip: Tensor, layout: VideoLayout) -> Tensor:
        check_clip(clip, layout, n, compactness)
        masks = [slic(lab(stretched(frames)), n, compactness) for frames in layout.to_working(clip)]
        return as_mask(masks, clip, layout)

    return for_inputs(inputs, layout, segmented)


def flow_tubes(inputs: Inputs, layout: VideoLayout | str, n: int, *, compactness: float = 20.0) -> Inputs:
    """Return a mask with one feature per tube, a region that follows a moving object.

    Example:
        >>> rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
        >>> inputs = (torch.sin(rows / 2) + torch.cos(columns / 3)).expand(1, 1, 5, 32, 32) / 4
        >>> inputs = inputs.contiguous()
        >>> for t in range(5):
        ...     inputs[..., t, 8:20, 4 + 3 * t : 16 + 3 * t] = 2.0  # a bright patch moves right
        >>> mask = flow_tubes(inputs, "BCTHW", 6)[0, 0]
        >>> patch = mask[0, 14, 10]
        >>> [(mask[t] == patch).nonzero().float().mean(0).round().tolist() for t in (0, 2, 4)]  # rows, columns
        [[14.0, 10.0], [14.0, 16.0], [14.0, 22.0]]

    The algorithm has four steps. (1) Each frame is divided into about ``4 n`` superpixels. (2) Their pixels are traced
    along optical flow to the first and to the last frame. (3) Superpixels that touch, within a frame or between
    consecutive frames, are merged by Ward's rule until ``n`` tubes are left. The distance of two superpixels is that of
    their colors and of their traced positions. (4) Each voxel is assigned to the nearest tube by the same distance, so
    that the borders of tubes are stable over time.

    Args:
        inputs: clips, a float tensor of five axes, with frames of at least 2 x 2 pixels; or a tuple of them, each with
            its own tubes. For RGB and flow, pass the mask of the RGB for both: ``feature_mask=(mask, mask)``.
        layout: order of the axes, such as ``"BTCHW"``.
        n: maximum number of tubes. There are fewer if SLIC finds fewer superpixels, for example with one per voxel, or
            if all voxels of a small tube are nearer to other tubes.
        compactness: the color difference that weighs as much as the distance of two tubes. The difference of black and
            white is 100. Large values group by motion, and small values group by color.

    Returns:
        int64 ids ``0 .. n-1``, ``(B, T, 1, H, W)`` in the clip's layout, with separate ids for each clip. A tube may
        be disconnected within a frame, for example if an object passes in front of it.

    Raises:
        ImportError: scikit-image is not installed.
        TypeError, ValueError: As for :func:`captum_staa.feature_masks.supervoxels`, or frames have only one row or
            column.

    Note:
        An object that appears late has tubes from its first frame to its last. An object that disappears and returns
        gets another tube. Motion is followed up to about a third of an object's width per frame, and not within uniform
        surfaces, which have no flow. For faster motion, and across cuts, color and position determine the tubes. A
        static object stays in the same tube in all frames. To separate the frames, intersect the mask with
        :func:`captum_staa.feature_masks.segments`.

        A clip of 16 x 224 x 224 takes about 4 seconds on one core, mostly for optical flow.

    Reference:
        Flow: Zach, Pock, Bischof, "A Duality Based Approach for Realtime TV-L1 Optical Flow", DAGM 2007, as in
        scikit-image. Merging superpixels over space and time: Grundmann et al., "Efficient Hierarchical Graph-Based
        Video Segmentation", CVPR 2010, with another criterion.
    """

    def followed(clip: Tensor, layout: VideoLayout) -> Tensor:
        check_clip(clip, layout, n, compactness)
        sizes = layout.size(clip)
        if min(sizes["H"], sizes["W"]) < 2:
            raise ValueError(
                f"inputs must have frames of at least 2 x 2 pixels for optical flow, got shape {tuple(clip.shape)} in "
                f"layout {layout.axes}. Use feature_masks.frames or feature_masks.segments."
            )
        masks = [_tubes(stretched(frames), n, compactness) for frames in layout.to_working(clip)]
        return as_mask(masks, clip, layout)

    return for_inputs(inputs, layout, followed)


# --- supervoxels ------------------------------------------------------------------------------------------------------


def check_clip(clip: Tensor, layout: VideoLayout, n: int, compactness: float) -> None:
    """Raise if an argument of a content-dependent mask is wrong, or scikit-image is not installed."""
    sizes = layout.size(clip)
    described = f"clip of shape {tuple(clip.shape)} in layout {layout.axes}"
    check_count("n", n, most=sizes["T"] * sizes["H"] * sizes["W"], of=f"voxels of a {described}")
    if not (is_number(compactness) and 0 < compactness < math.inf):
        raise ValueError(f"compactness must be positive and finite, typically 5 to 50, got {compactness!r}")
    try:
        import skimage  # noqa: F401
    except ImportError:
        raise ImportError(
            'supervoxels and flow_tubes require scikit-image. Install it with pip install "captum_staa[supervoxels]", '
            "or use feature_masks.grid(inputs, layout, (t, h, w)), which does not need it."
        ) from None


def stretched(frames: Tensor) -> NDArray[np.float32]:
    """Return frames ``(T, C, H, W)`` as ``(T, H, W, C)``, scaled to 0 .. 1, after a median of 3 x 3 in each frame."""
    from skimage.filters import median

    wide = frames.detach().cpu().float()
    low, high = wide.aminmax()
    volume = ((wide - low) / (high - low).clamp_min(1e-12)).movedim(1, -1).numpy()
    return median(volume, np.ones((1, 3, 3, 1)))


def lab(volume: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return colors 0 .. 1 as Lab for three channels, else scaled so that the distance of all 0 and all 1 is 100."""
    from skimage.color import rgb2lab

    channels = volume.shape[-1]
    return rgb2lab(volume) if channels == 3 else volume * (100 / channels**0.5)


def slic(colors: NDArray[np.float32], n: int, compactness: float) -> NDArray[np.int64]:
    """Return labels ``(..., H, W)`` without gaps for colors ``(..., H, W, C)``."""
    from skimage.segmentation import slic as segment

    span = float(np.ptp(colors)) or 1.0  # scikit-image rescales its input to 0 .. 1
    return gapless(
        segment(colors, n_segments=n, compactness=compactness / span, convert2lab=False, start_label=0, channel_axis=-1)
    )


def gapless(labels: NDArray[Any]) -> NDArray[np.int64]:
    """Return the same regions, numbered 0 .. n-1 in the order of their labels."""
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape)


def as_mask(labels: list[NDArray[np.int64]], inputs: Tensor, layout: VideoLayout) -> Tensor:
    """Return ids, one ``(T, H, W)`` array per clip, as a mask in the clip's layout and on its device."""
    ids = torch.from_numpy(np.stack(labels))[:, :, None]  # (B, T, 1, H, W)
    return layout.from_working(ids).contiguous().to(inputs.device)


Floats = NDArray[np.floating[Any]]


# --- flow tubes -------------------------------------------------------------------------------------------------------


def _tubes(volume: NDArray[np.float32], n: int, compactness: float) -> NDArray[np.int64]:
    """Return ids ``(T, H, W)`` of a clip ``(T, H, W, C)``."""
    height, width = volume.shape[1:3]
    colors = lab(volume)
    backward, forward = _flow(volume.mean(-1))
    ends = np.concatenate([_traced(backward), _traced(forward[::-1])[::-1]], axis=1)  # (T, 4, H, W)
    side = (height * width / n) ** 0.5  # of a tube, if all tubes span all frames
    # SLIC's distance: squared difference of color plus that of position, here the mean over the two traced positions
    voxels = np.concatenate([colors / compactness, np.moveaxis(ends, 1, -1) / (side * 2**0.5)], axis=-1)
    pieces = _superpixels(colors, min(PIECES * n, height * width), compactness)
    means, sizes = _means(voxels, pieces)
    tubes = gapless(ward(means, sizes, _neighbors(pieces), n)[pieces])
    # Superpixels differ between frames, so the borders of tubes would flicker. Assign each voxel again.
    centers = torch.from_numpy(_means(voxels, tubes)[0]).float()
    nearest = [torch.cdist(torch.from_numpy(frame).float(), centers, compute_mode=EXACT).argmin(-1) for frame in voxels]
    return gapless(torch.stack(nearest).numpy())


def _means(voxels: Floats, labels: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean ``(N, D)`` of the voxels ``(T, H, W, D)`` of each label, and their number ``(N,)``."""
    sizes = np.bincount(labels.ravel()).astype(np.float64)
    sums = [np.bincount(labels.ravel(), weights=part.ravel()) for part in np.moveaxis(voxels, -1, 0)]
    return np.stack(sums, axis=1) / sizes[:, None], sizes


def _superpixels(colors: NDArray[np.float32], n: int, compactness: float) -> NDArray[np.int64]:
    """Return labels ``(T, H, W)`` of superpixels, different in each frame."""
    frames: list[NDArray[np.int64]] = []
    for frame in colors:
        frames.append(slic(frame, n, compactness) + (frames[-1].max() + 1 if frames else 0))
    return np.stack(frames)


def _flow(gray: NDArray[np.float32]) -> tuple[Floats, Floats]:
    """Return the backward and the forward optical flow of gray frames ``(T, H, W)``.

    Returns:
        Two arrays ``(T-1, 2, H, W)``, offsets of rows and columns in pixels: from frames 1 .. T-1 to the previous
        frame, and from frames 0 .. T-2 to the next frame.
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
    """Return the position in the first frame of each pixel of each frame: ``(T, 2, H, W)``, rows and columns."""
    from skimage.transform import warp

    grid = np.indices(flow.shape[2:], dtype=np.float32)
    places = [grid]
    for step in flow:
        places.append(np.stack([warp(axis, grid + step, order=1, mode="edge") for axis in places[-1]]))
    return np.stack(places)


def _neighbors(pieces: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return pairs ``(E, 2)`` of labels of ``(T, H, W)`` that touch within a frame or between consecutive frames."""
    count = int(pieces.max()) + 1
    sides = [(pieces[1:], pieces[:-1]), (pieces[:, 1:], pieces[:, :-1]), (pieces[:, :, 1:], pieces[:, :, :-1])]
    keys = [np.unique(np.minimum(a, b) * count + np.maximum(a, b)) for a, b in sides]
    low, high = np.divmod(np.unique(np.concatenate(keys)), count)
    return np.stack([low, high], axis=1)[low != high]


def ward(
    features: NDArray[np.float64], sizes: NDArray[np.float64], edges: NDArray[np.int64], n: int
) -> NDArray[np.int64]:
    """Return groups of a graph's nodes by Ward's rule: always merge the two neighbors with the smallest merge cost.

    Example:
        >>> features = np.array([[0.0], [1.0], [5.0], [0.0]])  # the last equals the first, but they are not neighbors
        >>> groups = ward(features, np.ones(4), np.array([[0, 1], [1, 2], [2, 3]]), 3)
        >>> bool(groups[0] == groups[1]), len(set(groups.tolist()))
        (True, 3)

    Args:
        features: ``(N, D)``, the mean features of each node.
        sizes: ``(N,)``, the number of points of each node.
        edges: ``(E, 2)``, pairs of neighbors. Only neighbors are merged.
        n: number of groups to leave. More are left if the graph has more connected components.

    Returns:
        ``(N,)`` labels, equal within a group.

    Reference:
        Ward, "Hierarchical Grouping to Optimize an Objective Function", JASA 1963: merging a and b adds
        ``|a| |b| / (|a| + |b|) * |mean(a) - mean(b)|^2`` to the sum of squares within groups.
    """
    count = len(features)
    means = np.concatenate([features, np.empty_like(features)])  # a merged group is a new node, after the others
    weights = np.concatenate([sizes, np.zeros_like(sizes)])
    parents = np.arange(2 * count)
    near: list[set[int]] = [set() for _ in range(count)]

    def costs(a: NDArray[np.int64], b: NDArray[np.int64] | int) -> list[float]:
        factor = weights[a] * weights[b] / (weights[a] + weights[b])
        return (factor * ((means[a] - means[b]) ** 2).sum(-1)).tolist()

    for a, b in edges.tolist():
        near[a].add(b)
        near[b].add(a)
    queue = [(cost, a, b) for cost, (a, b) in zip(costs(*edges.T), edges.tolist(), strict=True)]
    heapq.heapify(queue)
    alive = [True] * count
    left = count
    while left > n and queue:
        _, a, b = heapq.heappop(queue)
        if not (alive[a] and alive[b]):
            continue
        new = len(near)
        weights[new] = weights[a] + weights[b]
        means[new] = (weights[a] * means[a] + weights[b] * means[b]) / weights[new]
        parents[a] = parents[b] = new
        alive[a] = alive[b] = False
        alive.append(True)
        around = [node for node in sorted(near[a] | near[b]) if alive[node]]
        near[a], near[b] = set(), set()
        near.append(set(around))
        for node, cost in zip(around, costs(np.array(around, dtype=np.int64), new), strict=True):
            near[node].add(new)
            heapq.heappush(queue, (cost, node, new))
        left -= 1
    roots = parents.copy()
    for node in reversed(range(len(near))):  # a parent has a larger index than its children, so its root is known
        roots[node] = roots[parents[node]]
    return roots[:count]
