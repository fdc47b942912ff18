"""Where a map lies in the frames: resizing and cropping undone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from captum_staa._utils.checks import is_number


def size_within(size: tuple[int, int], most: int) -> tuple[int, int]:
    """``(H, W)`` of the same shape whose shorter side has at most ``most`` pixels.

    Example:
        >>> size_within((1080, 1920), most=360), size_within((100, 120), most=360)
        ((360, 640), (100, 120))
    """
    factor = min(1, most / min(size))
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)


def reduced(frame: NDArray[np.uint8], most: int) -> NDArray[np.uint8]:
    """A frame ``(H, W, 3)`` whose shorter side has at most ``most`` pixels."""
    height, width = size_within((frame.shape[0], frame.shape[1]), most)
    if (height, width) == frame.shape[:2]:
        return frame
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))


def enlarged(frame: NDArray[np.uint8], least: int) -> NDArray[np.uint8]:
    """A frame ``(H, W, 3)`` whose shorter side has at least ``least`` pixels.

    Tiny frames grow by a whole factor, so that the pixels that the model saw stay visible; others are smoothed.
    """
    height, width = frame.shape[:2]
    factor = least / min(height, width)
    if factor <= 1:
        return frame
    if factor > 3:
        return frame.repeat(math.ceil(factor), axis=0).repeat(math.ceil(factor), axis=1)
    size = round(width * factor), round(height * factor)
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))


Crop = tuple[float, float, float, float]


def place(
    values: NDArray[np.float32], size: tuple[int, int], crop: Crop | None = None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Lay maps over frames of another size, where the model saw them.

    Example:
        >>> import numpy as np
        >>> lit, seen = place(np.ones((1, 2, 2), np.float32), (6, 8), crop=(1, 2, 4, 4))
        >>> lit[0].astype(int).tolist()[0], lit[0].astype(int).tolist()[1]
        ([0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0])
        >>> int(seen.sum())
        16

    Args:
        values: ``(T, h, w)``.
        size: ``(H, W)`` of the frames.
        crop: ``(top, left, height, width)`` in pixels of the frames, not necessarily whole, of the region that the
            maps cover; None is the whole frame.

    Returns:
        The maps ``(T, H, W)``, bilinear in between and 0 outside of the crop, and which pixels ``(H, W)`` the model
        saw: those whose center lies in the crop.

    Raises:
        TypeError: the crop is not four numbers.
        ValueError: it is empty or beside the frame.
    """
    height, width = size
    if crop is None and values.shape[1:] == size:
        return values, np.ones(size, dtype=bool)
    given: Any = crop
    if given is not None and not (isinstance(given, Sequence) and len(given) == 4 and all(map(is_number, given))):
        raise TypeError(f"crop is four numbers, (top, left, height, width), got {crop!r}; clf.crop_box makes it")
    top, left, tall, wide = (0, 0, height, width) if crop is None else crop
    rows = (np.arange(height) + 0.5 - top) / max(tall, 1e-9)  # of each pixel's center, in [0, 1] inside of the crop
    columns = (np.arange(width) + 0.5 - left) / max(wide, 1e-9)
    seen = ((rows >= 0) & (rows <= 1))[:, None] & ((columns >= 0) & (columns <= 1))
    if not seen.any():
        raise ValueError(
            f"crop is (top, left, height, width) of a region of the {height} x {width} frames, got {crop!r}, "
            f"which holds no pixel of them"
        )
    maps = torch.from_numpy(shrunk(values, (tall, wide)))[:, None]
    y, x = torch.from_numpy(rows).float() * 2 - 1, torch.from_numpy(columns).float() * 2 - 1
    points = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)  # (H, W, 2), as (x, y)
    points = points[None].expand(len(maps), -1, -1, -1)
    laid = F.grid_sample(maps, points, mode="bilinear", padding_mode="border", align_corners=False)[:, 0]
    return np.where(seen, laid.numpy(), np.float32(0)), seen


def shrunk(values: NDArray[np.float32], room: tuple[float, float]) -> NDArray[np.float32]:
    """Maps ``(T, h, w)`` of no more rows and columns than there is room for: a point between two would vanish."""
    size = values.shape[1:]
    smaller = min(size[0], max(round(room[0]), 1)), min(size[1], max(round(room[1]), 1))
    values = np.ascontiguousarray(values)
    if smaller == size:
        return values
    maps = torch.from_numpy(values)[:, None]
    return F.interpolate(maps, size=smaller, mode="bilinear", align_corners=False, antialias=True)[:, 0].numpy()
