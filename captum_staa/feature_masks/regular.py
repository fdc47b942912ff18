"""Feature masks that do not depend on the content of the clip: frames, segments, grid cells and tubelets.

For a tuple of inputs (RGB and optical flow), all functions of this package return a tuple of masks. Their ids continue
from one input to the next, so that a feature is a region of one input. To remove a region from all inputs at once, pass
the mask of one input for each: ``feature_mask=(mask, mask)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from captum_staa._utils.checks import check_count, is_triple
from captum_staa.grid import TokenGrid
from captum_staa.layout import VideoLayout
from captum_staa.result import Inputs, for_each


class Tokenized(Protocol):
    """Protocol of the attributes of :class:`captum_staa.VideoClassifier` that :func:`tubelets` reads."""

    layout: VideoLayout
    grid: TokenGrid | None
    num_frames: int | None
    image_size: tuple[int, int] | None


def frames(inputs: Inputs, layout: VideoLayout | str) -> Inputs:
    """Return a mask with one feature per frame.

    Example:
        >>> inputs = torch.rand(2, 3, 4, 8, 8)
        >>> mask = frames(inputs, "BCTHW")
        >>> mask.shape, mask.flatten().tolist()
        (torch.Size([1, 1, 4, 1, 1]), [0, 1, 2, 3])

    Args:
        inputs: clips, a float tensor of five axes, or a tuple of them (RGB and flow).
        layout: order of the axes, such as ``"BTCHW"``.

    Returns:
        int64 ids ``0 .. T-1`` in the order of time, of size 1 along all axes except time.

    Raises:
        TypeError, ValueError: ``inputs`` are not clips of finite floats in this layout.
    """
    return for_inputs(
        inputs, layout, lambda clip, layout: _shaped(torch.arange(layout.size(clip)["T"]).view(-1, 1, 1), clip, layout)
    )


def segments(inputs: Inputs, layout: VideoLayout | str, n: int) -> Inputs:
    """Return a mask with one feature per segment of consecutive frames.

    Example:
        >>> inputs = torch.rand(1, 8, 3, 16, 16)
        >>> segments(inputs, "BTCHW", 3).flatten().tolist()
        [0, 0, 0, 1, 1, 1, 2, 2]

    Args:
        inputs: clips, a float tensor of five axes, or a tuple of them (RGB and flow).
        layout: order of the axes, such as ``"BTCHW"``.
        n: number of segments, 1 to T. Their lengths differ by at most one frame.

    Returns:
        int64 ids ``0 .. n-1`` in the order of time, of size 1 along all axes except time.

    Raises:
        TypeError, ValueError: ``inputs`` are not clips of finite floats in this layout, or ``n`` is not an integer of 1
            to T.
    """

    def divided(clip: Tensor, layout: VideoLayout) -> Tensor:
        count = layout.size(clip)["T"]
        check_count("n", n, most=count, of=f"frames of a clip of shape {tuple(clip.shape)} in layout {layout.axes}")
        return _shaped((torch.arange(count) * int(n) // count).view(-1, 1, 1), clip, layout)

    return for_inputs(inputs, layout, divided)


def grid(inputs: Inputs, layout: VideoLayout | str, cells: Sequence[int]) -> Inputs:
    """Return a mask with one feature per cell of a regular grid over space and time.

    Example:
        >>> inputs = torch.rand(1, 3, 8, 32, 48)
        >>> mask = grid(inputs, "BCTHW", (4, 16, 16))  # 2 x 2 x 3 cells
        >>> mask.shape, int(mask.max()) + 1, mask[0, 0, 7, 31].unique().tolist()
        (torch.Size([1, 1, 8, 32, 48]), 12, [9, 10, 11])

    Args:
        inputs: clips, a float tensor of five axes, or a tuple of them (RGB and flow).
        layout: order of the axes, such as ``"BTCHW"``.
        cells: ``(t, h, w)``, the sides of a cell in frames and pixels, like the window of
            :class:`captum_staa.VideoOcclusion`. The last cell of an axis is smaller if the side does not divide it.

    Returns:
        int64 ids ``0 .. n-1``, counted along time, then height, then width; of size 1 along batch and channel.

    Raises:
        TypeError, ValueError: ``inputs`` are not clips of finite floats in this layout, or ``cells`` is not three
            integers of 1 to the sides of a clip.
    """
    if not is_triple(cells):
        raise ValueError(f"cells must be (t, h, w), the sides of a cell in frames and pixels, got {cells!r}")

    def divided(clip: Tensor, layout: VideoLayout) -> Tensor:
        ids = torch.zeros(1, dtype=torch.long)
        for axis, side in zip("THW", cells, strict=True):
            size = layout.size(clip)[axis]
            unit = f"frames or pixels of a clip of shape {tuple(clip.shape)} in layout {layout.axes}"
            check_count(f"side {axis.lower()} of {cells = }", side, most=size, of=unit)
            steps = torch.arange(size) // int(side)
            ids = ids[..., None] * (int(steps[-1]) + 1) + steps
        return _shaped(ids[0], clip, layout)

    return for_inputs(inputs, layout, divided)


def tubelets(inputs: Inputs, clf: Tokenized) -> Inputs:
    """Return a mask with one feature per token of a video transformer.

    Example:
        >>> from captum_staa import VideoClassifier
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> mask = tubelets(torch.rand(1, 16, 3, 48, 48), clf)
        >>> clf.grid.shape, mask.shape, int(mask.max()) + 1
        ((8, 6, 6), torch.Size([1, 16, 1, 48, 48]), 288)

    Args:
        inputs: clips, a float tensor of five axes in the classifier's layout, of the size that the classifier requires.
        clf: a :class:`captum_staa.VideoClassifier` of a transformer. Its ``grid`` gives the positions of the tokens.

    Returns:
        int64 ids ``0 .. t*h*w-1``, counted along time, then height, then width, independent of the order of the tokens;
        of size 1 along batch and channel. If the clip is larger than the tokens, the pixels that the model does not
        read are one additional feature with the last id. Its attribution is 0.

    Raises:
        TypeError: ``clf`` is not a classifier.
        ValueError: ``inputs`` are not clips of finite floats in the classifier's layout, do not have the size that the
            classifier requires, or the classifier has no tokens.
    """
    if not hasattr(clf, "grid") or not hasattr(clf, "layout"):
        raise TypeError(
            f"clf must be a VideoClassifier, got {type(clf).__name__}. Wrap the model: VideoClassifier(model)."
        )
    tokens = clf.grid
    if tokens is None:
        raise ValueError(
            "clf must have a token grid, got None, because it is not a transformer of a supported family. Use "
            "feature_masks.grid(inputs, layout, (t, h, w)), which works for any model."
        )

    def tokenized(clip: Tensor, layout: VideoLayout) -> Tensor:
        size: tuple[int, int, int] = layout.extent(clip)
        required = (clf.num_frames or size[0], *(clf.image_size or size[1:]))
        if size != required or any(have < need for have, need in zip(size, tokens.pixels, strict=True)):
            expected = required if size != required else tokens.pixels
            raise ValueError(
                f"inputs must have (T, H, W) = {expected} for this classifier, got (T, H, W) = {size}, shape "
                f"{tuple(clip.shape)} in layout {layout.axes}. Use clf.preprocess(frames) to make such a clip."
            )
        count = tokens.num_patches
        ids = tokens.to_pixels(torch.arange(1, count + 1).view(1, *tokens.shape), size=size)[0]
        return _shaped(ids.where(ids > 0, count + 1) - 1, clip, layout)  # 0 marks pixels without a token

    return for_inputs(inputs, clf.layout, tokenized)


def for_inputs(inputs: object, layout: VideoLayout | str, make: Callable[[Tensor, VideoLayout], Tensor]) -> Any:
    """Return a mask for a clip, or one per clip of a tuple, whose ids then continue from one input to the next."""
    masks = for_each(inputs, layout, make)
    if not isinstance(masks, tuple):
        return masks
    numbered, first = [], 0
    for mask in masks:
        numbered.append(mask + first)
        first = numbered[-1].flatten(1).amax(1).view(-1, 1, 1, 1, 1) + 1  # per clip, so that its ids have no gaps
    return tuple(numbered)


def _shaped(ids: Tensor, inputs: Tensor, layout: VideoLayout) -> Tensor:
    """Return ids ``(T or 1, H or 1, W or 1)`` as a mask of five axes, on the clip's device and in its layout."""
    return layout.from_working(ids[None, :, None]).contiguous().to(inputs.device)
