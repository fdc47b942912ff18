"""Resizing of frames, and placement of maps in the region of the frames that the model saw."""

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
    """Return ``(H, W)`` with the same aspect ratio, whose shorter side has at most ``most`` pixels.

    Example:
        >>> size_within((1080, 1920), most=360), size_within((100, 120), most=360)
        ((360, 640), (100, 120))
    """
    factor = min(1, most / min(size))
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)


def reduced(frame: NDArray[np.uint8], most: int) -> NDArray[np.uint8]:
    """Return the frame ``(H, W, 3)``, reduced so that its shorter side has at most ``most`` pixels."""
    height, width = size_within((frame.shape[0], frame.shape[1]), most)
    if (height, width) == frame.shape[:2]:
        return frame
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))


def enlarged(frame: NDArray[np.uint8], least: int) -> NDArray[np.uint8]:
    """Return the frame ``(H, W, 3)``, enlarged so that its shorter side has at least ``least`` pixels.

    Tiny frames are enlarged by an integer factor, so that the pixels of the model input stay visible. Others are
    interpolated.
    """
    height, width = frame.shape[:2]
    factor = least / min(height, width)
    if factor <= 1:
        return frame
    if factor > 3:
        return frame.repeat(math.ceil(factor), axis=0).repeat(math.ceil(factor), axis=1)
    size = round(width * factor), round(height * factor)
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))


Crop = tuple[float, float, float, float]  # (top, left, height, width) in pixels; fractions are allowed


def check_crop(crop: Any, size: tuple[int, int]) -> None:
    """Raise TypeError unless ``crop`` is None or four numbers, and ValueError if it contains no pixel of the frames."""
    if crop is None:
        return
    if not (isinstance(crop, Sequence) and len(crop) == 4 and all(map(is_number, crop))):
        raise TypeError(
            f"crop must be four numbers (top, left, height, width), got {crop!r}. Use the result of clf.crop_box."
        )
    if not all(_within(centers).any() for centers in _centers((crop[0], crop[1], crop[2], crop[3]), size)):
        raise ValueError(
            f"crop must be (top, left, height, width) of a region inside the {size[0]} x {size[1]} frames, got "
            f"{crop!r}, which contains no pixel. Pass the crop in pixels of the frames."
        )


def _centers(crop: Crop, size: tuple[int, int]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Return the centers of the rows ``(H,)`` and columns ``(W,)`` of pixels; they are in [0, 1] inside the crop."""
    top, left, tall, wide = crop
    return (np.arange(size[0]) + 0.5 - top) / max(tall, 1e-9), (np.arange(size[1]) + 0.5 - left) / max(wide, 1e-9)


def _within(centers: NDArray[np.floating]) -> NDArray[np.bool_]:
    return (centers >= 0) & (centers <= 1)


def place(
    values: NDArray[np.float32], size: tuple[int, int], crop: Crop | None = None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Resize maps to the frames, and place them in the region that the model saw.

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
        crop: ``(top, left, height, width)`` of the region that the maps cover, in pixels of the frames (fractions are
            allowed); None is the whole frame.

    Returns:
        The maps ``(T, H, W)``, interpolated bilinearly and 0 outside of the crop, and a mask ``(H, W)`` of the pixels
        that the model saw: those whose center is inside the crop.
    """
    height, width = size
    if crop is None and values.shape[1:] == size:
        return values, np.ones(size, dtype=bool)
    crop = (0, 0, height, width) if crop is None else crop
    rows, columns = _centers(crop, size)
    seen = _within(rows)[:, None] & _within(columns)
    maps = torch.from_numpy(shrunk(values, crop[2:]))[:, None]
    y, x = torch.from_numpy(rows).float() * 2 - 1, torch.from_numpy(columns).float() * 2 - 1
    points = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)  # (H, W, 2), as (x, y)
    points = points[None].expand(len(maps), -1, -1, -1)
    laid = F.grid_sample(maps, points, mode="bilinear", padding_mode="border", align_corners=False)[:, 0]
    return np.where(seen, laid.numpy(), np.float32(0)), seen


def shrunk(values: NDArray[np.float32], most: tuple[float, float]) -> NDArray[np.float32]:
    """Return maps ``(T, h, w)`` reduced with antialiasing to at most ``most`` rows and columns.

    Sampling a larger map directly could miss values between the sampled points.
    """
    size = values.shape[1:]
    smaller = min(size[0], max(round(most[0]), 1)), min(size[1], max(round(most[1]), 1))
    values = np.ascontiguousarray(values)
    if smaller == size:
        return values
    maps = torch.from_numpy(values)[:, None]
    return F.interpolate(maps, size=smaller, mode="bilinear", align_corners=False, antialias=True)[:, 0].numpy()
