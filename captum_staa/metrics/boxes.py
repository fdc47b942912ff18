"""Convert annotated boxes to the masks that the metrics compare with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_staa._utils.checks import check_count
from captum_staa.result import as_tensor


def boxes_to_truth(boxes: Tensor | np.ndarray[Any, Any], size: tuple[int, int]) -> Tensor:
    """Return a mask of the pixels that lie in the box of their frame.

    Example:
        >>> import torch
        >>> nan = float("nan")
        >>> boxes = torch.tensor([[[1.0, 0.0, 4.0, 2.0], [nan, nan, nan, nan]]])  # the second frame has no box
        >>> truth = boxes_to_truth(boxes, size=(3, 5))
        >>> truth[0, 0].int()
        tensor([[0, 1, 1, 1, 0],
                [0, 1, 1, 1, 0],
                [0, 0, 0, 0, 0]], dtype=torch.int32)
        >>> truth[0, 1].any().item()
        False

    Boxes are half-open, as slices in Python: ``(x0, y0, x1, y1) = (1, 0, 4, 2)`` is columns 1, 2, 3 and rows 0, 1. Add
    1 to ``x1`` and ``y1`` if the annotation contains the last pixel inside. If a corner lies between pixels, a pixel
    belongs to the box if its center does: ``x0 <= x + 0.5 < x1``. Parts of a box outside the frame are cut off. For
    several boxes in a frame, combine their masks: ``boxes_to_truth(a, size) | boxes_to_truth(b, size)``.

    Args:
        boxes: ``(B, T, 4)``, ``(x0, y0, x1, y1)`` in pixels of the clip, x to the right and y down; four nan where a
            frame has no box.
        size: ``(H, W)`` of the clip in pixels.

    Returns:
        bool ``(B, T, H, W)`` on the device of ``boxes``.

    Raises:
        TypeError: ``boxes`` is neither a tensor nor an array of numbers, or a side of ``size`` is not an int.
        ValueError: ``boxes`` has another shape, has infinite values or nan beside numbers, seems to be scaled to
            0 .. 1, or a box contains no pixel, because its corners are swapped or because it lies outside the frame.
    """
    boxes = as_tensor(boxes, "boxes", "B, T, 4")
    if boxes.dtype == torch.bool:
        raise TypeError(
            f"boxes must be corners in pixels, got bool of shape {tuple(boxes.shape)}. A mask needs no conversion."
        )
    if boxes.ndim != 3 or boxes.shape[2] != 4 or 0 in boxes.shape:
        raise ValueError(f"boxes must be (B, T, 4) and not empty, got shape {tuple(boxes.shape)}.")
    sides: Any = size
    if not (isinstance(sides, (list, tuple, np.ndarray)) and len(sides) == 2):
        raise ValueError(f"size must be (H, W) of the clip in pixels, got {size!r}.")
    for axis, side in zip("HW", sides, strict=True):
        check_count(f"{axis} of {size = }", side)
    boxes = boxes.double()
    there = ~boxes.isnan().all(2)  # (B, T)
    if not bool(boxes[there].isfinite().all()):
        raise ValueError(
            f"each box must be four finite numbers, or four nan if the frame has no box, got "
            f"{_first(boxes, there & ~boxes.isfinite().all(2))}."
        )
    corners = boxes[there]
    if bool(((corners >= 0) & (corners <= 1)).all()) and bool((corners != corners.round()).any()):
        raise ValueError(
            f"boxes must be in pixels, got only corners between 0 and 1, such as {_first(boxes, there)}. Multiply "
            f"relative boxes by (W, H, W, H)."
        )
    x0, y0, x1, y1 = boxes[..., None].unbind(2)  # (B, T, 1) each; nan is neither below nor above
    y, x = (torch.arange(int(side), device=boxes.device) + 0.5 for side in size)
    rows, columns = (y0 <= y) & (y < y1), (x0 <= x) & (x < x1)  # (B, T, H), (B, T, W)
    if bool((empty := there & ~(rows.any(2) & columns.any(2))).any()):
        raise ValueError(
            f"each box must be (x0, y0, x1, y1) with x0 < x1 and y0 < y1, and contain the center of a pixel of the "
            f"{int(size[0])} x {int(size[1])} frame (H x W), got {_first(boxes, empty)}. Use four nan for a frame "
            f"without a box."
        )
    return rows[..., :, None] & columns[..., None, :]


def _first(boxes: Tensor, where: Tensor) -> str:
    clip, frame = where.nonzero()[0].tolist()
    return f"{tuple(boxes[clip, frame].tolist())} in frame {frame} of clip {clip}"
