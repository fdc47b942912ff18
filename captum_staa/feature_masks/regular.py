"""Regions whose shape does not depend on what the clip shows: frames, segments, cells and a transformer's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from captum_staa._utils.checks import check_count, is_triple
from captum_staa.grid import TokenGrid
from captum_staa.layout import VideoLayout


class Tokenized(Protocol):
    """What :func:`tubelets` reads of a :class:`captum_staa.VideoClassifier`."""

    layout: VideoLayout
    grid: TokenGrid | None
    num_frames: int | None
    image_size: tuple[int, int] | None


def frames(clip: Tensor, layout: VideoLayout | str) -> Tensor:
    """One feature per frame: which frame counts?

    Example:
        >>> clip = torch.rand(2, 3, 4, 8, 8)
        >>> mask = frames(clip, "BCTHW")
        >>> mask.shape, mask.flatten().tolist()
        (torch.Size([1, 1, 4, 1, 1]), [0, 1, 2, 3])

    Args:
        clip: floats of five axes.
        layout: the order of its axes, such as ``"BTCHW"``.

    Returns:
        int64 ids ``0 .. T-1`` in the order of time, of size 1 but along time.

    Raises:
        TypeError, ValueError: ``clip`` is no clip of finite floats in this layout.
    """
    layout = VideoLayout.of(layout)
    layout.check_values(clip, "clip")
    return _shaped(torch.arange(layout.size(clip)["T"]).view(-1, 1, 1), clip, layout)


def segments(clip: Tensor, layout: VideoLayout | str, n: int) -> Tensor:
    """One feature per run of frames: when does it happen?

    Example:
        >>> clip = torch.rand(1, 8, 3, 16, 16)
        >>> segments(clip, "BTCHW", 3).flatten().tolist()
        [0, 0, 0, 1, 1, 1, 2, 2]

    Args:
        clip: floats of five axes.
        layout: the order of its axes.
        n: how many runs, at most one per frame. Their lengths differ by one frame at most.

    Returns:
        int64 ids ``0 .. n-1`` in the order of time, of size 1 but along time.

    Raises:
        TypeError, ValueError: ``clip`` is no clip of finite floats in this layout, or ``n`` is no whole number of 1 to
            T.
    """
    layout = VideoLayout.of(layout)
    layout.check_values(clip, "clip")
    count = layout.size(clip)["T"]
    check_count("n", n, most=count, of=f"frames of a clip of shape {tuple(clip.shape)} in layout {layout.axes}")
    return _shaped((torch.arange(count) * int(n) // count).view(-1, 1, 1), clip, layout)


def grid(clip: Tensor, layout: VideoLayout | str, cell: Sequence[int]) -> Tensor:
    """One feature per cell of a regular grid over space and time: where and when, whatever the model?

    Example:
        >>> clip = torch.rand(1, 3, 8, 32, 48)
        >>> mask = grid(clip, "BCTHW", (4, 16, 16))  # 2 x 2 x 3 cells
        >>> mask.shape, int(mask.max()) + 1, mask[0, 0, 7, 31].unique().tolist()
        (torch.Size([1, 1, 8, 32, 48]), 12, [9, 10, 11])

    Args:
        clip: floats of five axes.
        layout: the order of its axes.
        cell: ``(t, h, w)``, the sides of a cell in frames and pixels, as the window of
            :class:`captum_staa.VideoOcclusion`. The last cells of an axis are cut off where it does not divide.

    Returns:
        int64 ids ``0 .. n-1``, counted along time, then height, then width; of size 1 along batch and channel.

    Raises:
        TypeError, ValueError: ``clip`` is no clip of finite floats in this layout, or ``cell`` is not three whole
            numbers of 1 to the clip's sides.
    """
    layout = VideoLayout.of(layout)
    layout.check_values(clip, "clip")
    if not is_triple(cell):
        raise ValueError(f"cell is (t, h, w), its sides in frames and pixels, got {cell!r}")
    ids = torch.zeros(1, dtype=torch.long)
    for axis, side in zip("THW", cell, strict=True):
        size = layout.size(clip)[axis]
        came = f"frames or pixels of a clip of shape {tuple(clip.shape)} in layout {layout.axes}"
        check_count(f"side {axis.lower()} of {cell = }", side, most=size, of=came)
        steps = torch.arange(size) // int(side)
        ids = ids[..., None] * (int(steps[-1]) + 1) + steps
    return _shaped(ids[0], clip, layout)


def tubelets(clip: Tensor, clf: Tokenized) -> Tensor:
    """One feature per token of a video transformer: what does each of its own units contribute?

    Example:
        >>> from captum_staa import VideoClassifier
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> mask = tubelets(torch.rand(1, 16, 3, 48, 48), clf)
        >>> clf.grid.shape, mask.shape, int(mask.max()) + 1
        ((8, 6, 6), torch.Size([1, 16, 1, 48, 48]), 288)

    Args:
        clip: floats of five axes in the classifier's layout, of the size it takes.
        clf: a :class:`captum_staa.VideoClassifier` around a transformer; its ``grid`` says where the tokens stand.

    Returns:
        int64 ids ``0 .. t*h*w-1``, counted along time, then height, then width, whatever the order of the tokens; of
        size 1 along batch and channel. Where a clip reaches beyond the last whole tubelet, the pixels that the model
        never reads are one more feature, the last, which ends up with no attribution.

    Raises:
        TypeError: ``clf`` is no classifier.
        ValueError: ``clip`` is no clip of finite floats in the classifier's layout, has another size than it takes, or
            the classifier has no tokens.
    """
    if not hasattr(clf, "grid") or not hasattr(clf, "layout"):
        raise TypeError(
            f"tubelets takes a VideoClassifier, got {type(clf).__name__}; wrap the model: VideoClassifier(model)"
        )
    clf.layout.check_values(clip, "clip")
    if clf.grid is None:
        raise ValueError(
            "the classifier has no token grid, as it is no transformer of a known family, so it has no tubelets; "
            "feature_masks.grid(clip, layout, (t, h, w)) makes cells for any model"
        )
    size = clf.layout.extent(clip)
    takes = (clf.num_frames or size[0], *(clf.image_size or size[1:]))
    if size != takes or any(have < need for have, need in zip(size, clf.grid.pixels, strict=True)):
        wanted = takes if size != takes else clf.grid.pixels
        raise ValueError(
            f"clip of shape {tuple(clip.shape)} in layout {clf.layout.axes} has (T, H, W) = {size}, but the classifier "
            f"takes {wanted}: clf.preprocess(frames) makes such a clip"
        )
    count = clf.grid.num_patches
    ids = clf.grid.to_pixels(torch.arange(1, count + 1).view(1, *clf.grid.shape), size=size)[0]
    return _shaped(ids.where(ids > 0, count + 1) - 1, clip, clf.layout)  # 0 is where no token stands


def _shaped(ids: Tensor, clip: Tensor, layout: VideoLayout) -> Tensor:
    """Ids ``(T or 1, H or 1, W or 1)`` on the clip's device and in its layout."""
    return layout.from_working(ids[None, :, None]).contiguous().to(clip.device)
