"""Supervoxels: feature masks of regions of similar color, by SLIC over space and time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captum_staa._utils.checks import check_count, is_number
from captum_staa.feature_masks.regular import for_inputs
from captum_staa.layout import VideoLayout
from captum_staa.result import Inputs


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
