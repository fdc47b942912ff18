"""Regions that follow color: SLIC, over space and time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captum_staa._utils.checks import check_count, is_number
from captum_staa.layout import VideoLayout


def supervoxels(clip: Tensor, layout: VideoLayout | str, n: int, *, compactness: float = 20.0) -> Tensor:
    """One feature per supervoxel, a small region of one color in space and time: which thing counts, and when?

    Example:
        >>> clip = torch.zeros(1, 3, 8, 32, 32)
        >>> clip[..., 20:] = 1.0  # light on the right
        >>> mask = supervoxels(clip, "BCTHW", 12)
        >>> mask.shape, set(mask[..., :20].unique().tolist()) & set(mask[..., 20:].unique().tolist())
        (torch.Size([1, 1, 8, 32, 32]), set())

    Args:
        clip: floats of five axes.
        layout: the order of its axes.
        n: about how many regions, a hint that SLIC rounds to a grid of seeds; regions too small are merged. Seeds stand
            ``(T H W / n) ** (1/3)`` apart, in frames as in pixels: where that is more than two thirds of a clip's
            frames, regions last the whole clip, even over a cut. Raise ``n`` then, or cut them by :func:`segments`.
        compactness: which difference of color weighs as much as the distance of two seeds, where black and white are
            100 apart. Large gives boxes, small gives ragged regions that follow every edge.

    Returns:
        int64 ids, ``(B, T, 1, H, W)`` in the clip's layout. Each clip's own begin at 0 and have no gaps; how many there
        are may differ between the clips of a batch.

    Raises:
        ImportError: scikit-image is missing.
        TypeError, ValueError: ``clip`` is no clip of finite floats in this layout, ``n`` is no whole number of 1 to the
            voxels of a clip, or ``compactness`` is not positive.

    Note:
        Colors are stretched to 0 .. 1 over each clip and taken to Lab where there are three channels. Before, each
        pixel becomes the median of 3 x 3 in its frame: noise would else decide, and a median keeps edges where they
        are (over time it would smear what moves). A clip of 16 x 224 x 224 takes about a second.

    Reference:
        Achanta et al., "SLIC Superpixels Compared to State-of-the-Art Superpixel Methods", TPAMI 2012, as in
        scikit-image.
    """
    layout = check_clip(clip, layout, n, compactness)
    masks = [slic(lab(stretched(frames)), n, compactness) for frames in layout.to_working(clip)]
    return as_mask(masks, clip, layout)


def check_clip(clip: Tensor, layout: VideoLayout | str, n: int, compactness: float) -> VideoLayout:
    """The layout; raises where an argument of a mask that looks at the clip is wrong, or scikit-image is missing."""
    layout = VideoLayout.of(layout)
    layout.check_values(clip, "clip")
    sizes = layout.size(clip)
    came = f"clip of shape {tuple(clip.shape)} in layout {layout.axes}"
    check_count("n", n, most=sizes["T"] * sizes["H"] * sizes["W"], of=f"voxels of a {came}")
    if not (is_number(compactness) and 0 < compactness < math.inf):
        raise ValueError(f"compactness is positive and finite, about 5 to 50, got {compactness!r}")
    try:
        import skimage  # noqa: F401
    except ImportError:
        raise ImportError(
            'masks that look at the clip need scikit-image: pip install "captum_staa[supervoxels]"; '
            "feature_masks.grid(clip, layout, (t, h, w)) does without"
        ) from None
    return layout


def stretched(frames: Tensor) -> NDArray[np.float32]:
    """Frames ``(T, C, H, W)`` as ``(T, H, W, C)``, stretched to 0 .. 1 over all, each pixel the median of 3 x 3."""
    from skimage.filters import median

    wide = frames.detach().cpu().float()
    low, high = wide.aminmax()
    volume = ((wide - low) / (high - low).clamp_min(1e-12)).movedim(1, -1).numpy()
    return median(volume, np.ones((1, 3, 3, 1)))


def lab(volume: NDArray[np.float32]) -> NDArray[np.float32]:
    """Colors 0 .. 1 in the last axis to numbers of which all 0 and all 1 are 100 apart: Lab, where there are three."""
    from skimage.color import rgb2lab

    channels = volume.shape[-1]
    return rgb2lab(volume) if channels == 3 else volume * (100 / channels**0.5)


def slic(colors: NDArray[np.float32], n: int, compactness: float) -> NDArray[np.int64]:
    """Labels ``(..., H, W)``, gapless, of colors ``(..., H, W, C)``."""
    from skimage.segmentation import slic as segment

    span = float(np.ptp(colors)) or 1.0  # scikit-image stretches what it gets to 0 .. 1
    return gapless(
        segment(colors, n_segments=n, compactness=compactness / span, convert2lab=False, start_label=0, channel_axis=-1)
    )


def gapless(labels: NDArray[Any]) -> NDArray[np.int64]:
    """The same regions, numbered 0 .. n-1 in the order of their labels."""
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape)


def as_mask(labels: list[NDArray[np.int64]], clip: Tensor, layout: VideoLayout) -> Tensor:
    """One ``(T, H, W)`` of ids per clip as a mask in the clip's layout, on its device."""
    ids = torch.from_numpy(np.stack(labels))[:, :, None]  # (B, T, 1, H, W)
    return layout.from_working(ids).contiguous().to(clip.device)
