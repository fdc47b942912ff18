"""Frames made smaller or larger, for pictures of a sensible size."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image


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
