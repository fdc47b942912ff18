"""The numbers behind every picture: frames as uint8, one saliency map per clip, and its sums over time and space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captum_staa._utils.checks import check_choice, check_count, is_number
from captum_staa.layout import VideoLayout, check_dense
from captum_staa.result import VideoAttribution

Sign = Literal["absolute_value", "positive", "negative", "all"]
Attributions = Tensor | NDArray[np.floating] | VideoAttribution
Clip = Tensor | NDArray[np.uint8] | NDArray[np.floating]

SIGNS: dict[Sign, str] = {
    "absolute_value": "|attribution|",
    "positive": "positive attribution",
    "negative": "negative attribution, magnitude",
    "all": "attribution",
}


class Saliency(NamedTuple):
    """A map that is ready for a color map, and what its colors mean."""

    values: NDArray[np.float32]  # (T, H, W), in [0, 1], or [-1, 1] for sign="all"
    scale: float  # the attribution that 1 stands for; 0 where all is zero


def saliency(
    attributions: Attributions,
    layout: VideoLayout | str | None = None,
    sign: Sign = "absolute_value",
    outlier_perc: float = 2,
    index: int | None = None,
) -> Saliency:
    """Attributions as Captum's pictures show them, but on one scale for the whole clip.

    Example:
        >>> import torch
        >>> maps = torch.tensor([4.0, -2.0, 0.0]).reshape(1, 3, 1, 1)  # one clip, three frames of one pixel
        >>> saliency(maps, sign="all", outlier_perc=0).values.ravel().tolist()
        [1.0, -0.5, 0.0]

    Args:
        attributions: of the clip's shape (needs ``layout``; channels are summed, as in Captum), or ``(T, H, W)``, or
            ``(B, T, H, W)``, or :class:`~captum_staa.VideoAttribution`, whose joint part is taken.
        layout: order of the axes of five-dimensional attributions, such as ``"BTCHW"``.
        sign: what to keep: ``"absolute_value"``, ``"positive"``, ``"negative"`` (its magnitude) or ``"all"``.
        outlier_perc: the largest values that together make up this percentage of the clip's total count as 1.
        index: which clip of a batch; needed where there is more than one.

    Returns:
        :class:`Saliency`; a map that is zero everywhere stays zero.

    Raises:
        ValueError: unknown ``sign``, ``outlier_perc`` outside [0, 100], a shape as not said above, or nan and inf.
    """
    check_choice("sign", sign, SIGNS)
    if not (is_number(outlier_perc) and 0 <= outlier_perc <= 100):
        raise ValueError(f"outlier_perc is a percentage in [0, 100], got {outlier_perc!r}")
    values = signed(as_map(attributions, layout, index), sign)
    scale = _threshold(np.abs(values), 100 - outlier_perc)
    if scale > 0:
        values = np.clip(values / scale, -1, 1)
    return Saliency(values.astype(np.float32), scale)


def signed(values: NDArray[np.float64], sign: Sign) -> NDArray[np.float64]:
    """Captum's ``sign``: the values that it keeps, the negative ones as magnitudes."""
    if sign == "all":
        return values
    return np.abs(values) if sign == "absolute_value" else np.maximum(values if sign == "positive" else -values, 0)


def _threshold(magnitudes: NDArray[np.float64], percentile: float) -> float:
    """The value up to which the smaller ones sum to ``percentile`` % of the total: Captum's definition."""
    ascending = np.sort(magnitudes, axis=None)
    total = np.cumsum(ascending)
    # A sum that is rounded up to just above the last entry must not fall off the end.
    at = min(int(np.searchsorted(total, total[-1] * percentile / 100)), len(ascending) - 1)
    # With outlier_perc near 100 the first value that reaches the sum may be zero although others are not.
    return float(ascending[at]) or float(ascending[-1])


def as_map(
    attributions: Attributions, layout: VideoLayout | str | None = None, index: int | None = None
) -> NDArray[np.float64]:
    """One clip's signed attributions as ``(T, H, W)``; the arguments are those of :func:`saliency`."""
    maps = tensor_of(attributions.joint if isinstance(attributions, VideoAttribution) else attributions).double()
    shape = tuple(maps.shape)
    if maps.ndim == 5:
        if layout is None:
            raise ValueError(f"attributions of shape {shape} need their layout: pass layout='BTCHW' or 'BCTHW'")
        maps = VideoLayout.of(layout).reduce(maps)
    if maps.ndim == 4:
        maps = _pick(maps, index, "attributions")
    if maps.ndim != 3 or 0 in maps.shape:
        raise ValueError(
            f"attributions must have the clip's shape, or be (T, H, W) or (B, T, H, W), and not empty, but their shape "
            f"is {shape}"
        )
    broken = int((~maps.isfinite()).sum())
    if broken:
        raise ValueError(
            f"attributions of shape {shape} are nan or inf at {broken} of {maps.numel()} pixels; look upstream"
        )
    return maps.numpy()


def when(
    attributions: Attributions | Sequence[float],
    layout: VideoLayout | str | None = None,
    sign: Sign = "all",
    index: int | None = None,
) -> NDArray[np.float64]:
    """``(T,)``, one number per frame: that of :class:`~captum_staa.VideoAttribution`, else sums over pixels."""
    check_choice("sign", sign, SIGNS)
    if isinstance(attributions, VideoAttribution):  # its temporal part may be a signal of its own, not a sum
        given = _pick(attributions.temporal, index, "attributions")
    else:
        given = tensor_of(attributions)
    if given.ndim != 1:
        return signed(as_map(given, layout, index), sign).sum((1, 2))
    return signed(as_map(given[:, None, None]), sign)[:, 0, 0]


def where(
    attributions: Attributions, layout: VideoLayout | str | None = None, index: int | None = None
) -> NDArray[np.float64]:
    """``(H, W)``, signed: the spatial part of :class:`~captum_staa.VideoAttribution`, else the sum over frames."""
    if isinstance(attributions, VideoAttribution):
        return as_map(_pick(attributions.spatial, index, "attributions")[None])[0]
    return as_map(attributions, layout, index).sum(0)


def key_frames(values: NDArray[np.floating], count: int) -> list[int]:
    """The frame that counts most in each of at most ``count`` equal parts of a clip.

    Example:
        >>> key_frames(np.array([0.0, 5.0, 1.0, 0.0, 0.0, -3.0]), count=2)
        [1, 5]
    """
    check_count("the number of key frames", count)
    parts = np.array_split(np.arange(len(values)), min(count, len(values)))
    return [int(part[np.abs(values[part]).argmax()]) for part in parts]


def evidence_windows(
    truth: Tensor | NDArray[np.bool_] | Sequence[tuple[int, int]] | None, total: int
) -> list[tuple[int, int]]:
    """``truth`` as pairs (first, last) of frames, both included."""
    if truth is None:
        return []
    given = np.asarray(truth)
    if given.dtype == bool and given.shape == (total,):
        edges = np.flatnonzero(np.diff(given, prepend=False, append=False))
        return [(int(first), int(end) - 1) for first, end in edges.reshape(-1, 2)]
    if given.dtype == bool or given.ndim != 2 or given.shape[1] != 2:
        raise ValueError(
            f"truth must be ({total},) of bool, or pairs (first, last), but its shape is {given.shape} and its dtype "
            f"{given.dtype}"
        )
    for first, last in given:
        if not 0 <= first <= last < total:
            raise ValueError(f"truth windows lie in 0..{total - 1}, first before last, got ({first}, {last})")
    return [(int(first), int(last)) for first, last in given]


def as_pictures(
    clip: Clip,
    layout: VideoLayout | str | None = None,
    index: int | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> NDArray[np.uint8]:
    """A clip as pictures ``(T, H, W, 3)`` uint8.

    Example:
        >>> import torch
        >>> clip = torch.tensor([-1.0, 1.0, 3.0]).reshape(1, 3, 1, 1, 1).expand(1, 3, 3, 2, 2)
        >>> as_pictures(clip, "BTCHW")[:, 0, 0, 0].tolist()  # the clip's own range becomes 0..255
        [0, 128, 255]
        >>> as_pictures(clip, "BTCHW", mean=0.25, std=0.25)[:, 0, 0, 0].tolist()  # or its normalization is undone
        [0, 128, 255]

    Args:
        clip: the original frames ``(T, H, W, 3)`` uint8, or a clip in ``layout`` (uint8, or float).
        layout: order of the axes of a five-dimensional clip.
        index: which clip of a batch; needed where there is more than one.
        mean: what was subtracted from pictures in [0, 1], one number or one per channel; goes with ``std``.
        std: what they were then divided by. Without both, the clip's minimum and maximum become black and white.

    Raises:
        TypeError, ValueError: ``clip`` is none of these, or only one of ``mean`` and ``std`` came.
    """
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std go together, got {mean = }, {std = }")
    frames = tensor_of(clip)
    shape = tuple(frames.shape)
    if frames.ndim == 5:
        if layout is None:
            raise ValueError(f"a clip of shape {shape} needs its layout: pass layout='BTCHW' or 'BCTHW'")
        frames = _pick(VideoLayout.of(layout).to_working(frames), index, "clip").movedim(1, -1)  # (T, H, W, C)
    elif frames.ndim == 4 and frames.dtype != torch.uint8:
        raise TypeError(
            f"original frames (T, H, W, 3) are uint8 in 0..255, got {frames.dtype} of shape {shape}; pass a "
            f"five-dimensional clip with its layout, or scale and round the frames"
        )
    if frames.ndim != 4 or frames.shape[-1] not in (1, 3) or 0 in frames.shape:
        raise ValueError(
            f"clip must be (T, H, W, 3) uint8 frames, or five-dimensional with 1 or 3 channels, but its shape is "
            f"{shape} ({layout = })"
        )
    if frames.dtype != torch.uint8:
        frames = frames.double()
        if not bool(frames.isfinite().all()):
            raise ValueError(f"the clip of shape {shape} holds nan or inf and cannot be drawn; look upstream")
        if mean is not None and std is not None:
            frames = frames * torch.as_tensor(std) + torch.as_tensor(mean)
        else:
            low, high = frames.min(), frames.max()
            frames = (frames - low) / (high - low).clamp(min=1e-12)
        frames = (frames * 255).round().clamp(0, 255).byte()
    return frames.expand(*frames.shape[:3], 3).numpy()


def tensor_of(values: Tensor | NDArray[np.generic] | Sequence[float] | None) -> Tensor:
    """Anything array-like as a tensor on the CPU, numpy's flipped and turned views included."""
    if isinstance(values, Tensor):
        check_dense(values, "what is drawn")
        return values.detach().cpu()
    if values is None or (isinstance(values, tuple | list) and any(isinstance(value, Tensor) for value in values)):
        raise TypeError(
            f"a clip and attributions are a tensor or an array each, got {type(values).__name__}; of a tuple, as "
            f"Captum returns it for a tuple of inputs, pass the entry that belongs to the clip"
        )
    array = np.ascontiguousarray(values)
    if any(stride < 0 for stride in array.strides):  # flipped along an axis of one, it counts as contiguous
        array = array.copy()
    if array.dtype.kind not in "fiub":
        raise TypeError(f"what is drawn must hold real numbers, got {type(values).__name__} of {array.dtype}")
    return torch.from_numpy(array)


def _pick(batch: Tensor, index: int | None, name: str) -> Tensor:
    if index is None and len(batch) > 1:
        raise ValueError(f"{name} hold {len(batch)} clips (shape {tuple(batch.shape)}); pass index= to choose one")
    if not -len(batch) <= (index or 0) < len(batch):
        raise ValueError(f"{index = } is outside the {len(batch)} clips of {name} (shape {tuple(batch.shape)})")
    return batch[index or 0]
