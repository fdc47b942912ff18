"""Numbers behind all pictures: frames as uint8, one saliency map per clip, and its sums over time and space."""

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
    """Normalized map of one clip, with its scale."""

    values: NDArray[np.float32]  # (T, H, W), in [0, 1], or [-1, 1] for sign="all"
    scale: float  # the attribution that becomes 1; 0 if all attributions are zero


def saliency(
    attributions: Attributions,
    layout: VideoLayout | str | None = None,
    sign: Sign = "absolute_value",
    outlier_perc: float = 2,
    index: int | None = None,
) -> Saliency:
    """Return attributions normalized as in Captum's visualization, with one scale for the whole clip.

    Example:
        >>> import torch
        >>> maps = torch.tensor([4.0, -2.0, 0.0]).reshape(1, 3, 1, 1)  # one clip, three frames of one pixel
        >>> saliency(maps, sign="all", outlier_perc=0).values.ravel().tolist()
        [1.0, -0.5, 0.0]

    Args:
        attributions: attributions of the same shape as the clip (with ``layout``; channels are summed, as in Captum),
            or ``(T, H, W)``, ``(B, T, H, W)``, or :class:`~captum_staa.VideoAttribution`, whose joint part is used.
        layout: order of the axes of 5-D attributions, such as ``"BTCHW"``.
        sign: attributions to keep: ``"absolute_value"``, ``"positive"``, ``"negative"`` (as magnitude) or ``"all"``.
        outlier_perc: percentage in [0, 100]: the largest values that together make up this share of the total are
            clipped to 1.
        index: index of the clip in a batch; required if the batch has more than one clip.

    Returns:
        :class:`Saliency`. A map that is zero everywhere stays zero.

    Raises:
        ValueError: ``sign`` is unknown, ``outlier_perc`` is outside [0, 100], or the attributions have another shape
            or contain nan or inf.
    """
    check_choice("sign", sign, SIGNS)
    if not (is_number(outlier_perc) and 0 <= outlier_perc <= 100):
        raise ValueError(f"outlier_perc must be a percentage in [0, 100], got {outlier_perc!r}")
    values = signed(as_map(attributions, layout, index), sign)
    scale = _threshold(np.abs(values), 100 - outlier_perc)
    if scale > 0:
        values = np.clip(values / scale, -1, 1)
    return Saliency(values.astype(np.float32), scale)


def signed(values: NDArray[np.float64], sign: Sign) -> NDArray[np.float64]:
    """Return the values that Captum's ``sign`` keeps; ``"negative"`` returns magnitudes."""
    if sign == "all":
        return values
    return np.abs(values) if sign == "absolute_value" else np.maximum(values if sign == "positive" else -values, 0)


def _threshold(magnitudes: NDArray[np.float64], percentile: float) -> float:
    """Return the value v such that all values up to v sum to ``percentile`` % of the total, as defined by Captum."""
    ascending = np.sort(magnitudes, axis=None)
    total = np.cumsum(ascending)
    # Rounding can make the searched sum slightly larger than the last entry, so the index is limited.
    at = min(int(np.searchsorted(total, total[-1] * percentile / 100)), len(ascending) - 1)
    # With outlier_perc near 100, the first value that reaches the sum can be zero although others are not.
    return float(ascending[at]) or float(ascending[-1])


def as_map(
    attributions: Attributions, layout: VideoLayout | str | None = None, index: int | None = None
) -> NDArray[np.float64]:
    """Return the signed attributions of one clip ``(T, H, W)``; the arguments are those of :func:`saliency`."""
    maps = tensor_of(attributions.joint if isinstance(attributions, VideoAttribution) else attributions).double()
    shape = tuple(maps.shape)
    if maps.ndim == 5:
        if layout is None:
            raise ValueError(
                f"layout must be given for attributions of shape {shape}, got None. Pass layout='BTCHW' or 'BCTHW'."
            )
        maps = VideoLayout.of(layout).reduce(maps)
    if maps.ndim == 4:
        maps = _pick(maps, index, "attributions")
    if maps.ndim != 3 or 0 in maps.shape:
        raise ValueError(
            f"attributions must have the shape of the clip, (T, H, W) or (B, T, H, W), and must not be empty, got "
            f"shape {shape}"
        )
    nonfinite = int((~maps.isfinite()).sum())
    if nonfinite:
        raise ValueError(
            f"attributions must be finite, got nan or inf at {nonfinite} of {maps.numel()} pixels of attributions of "
            f"shape {shape}. Check the model and the method that computed them."
        )
    return maps.numpy()


def when(
    attributions: Attributions | Sequence[float],
    layout: VideoLayout | str | None = None,
    sign: Sign = "all",
    index: int | None = None,
) -> NDArray[np.float64]:
    """Return one number per frame ``(T,)``: the temporal part of a :class:`~captum_staa.VideoAttribution`, or sums."""
    check_choice("sign", sign, SIGNS)
    if isinstance(attributions, VideoAttribution):  # the temporal part is not always the sum of the joint part
        values = _pick(attributions.temporal, index, "attributions")
    else:
        values = tensor_of(attributions)
    if values.ndim != 1:
        return signed(as_map(values, layout, index), sign).sum((1, 2))
    return signed(as_map(values[:, None, None]), sign)[:, 0, 0]


def where(
    attributions: Attributions, layout: VideoLayout | str | None = None, index: int | None = None
) -> NDArray[np.float64]:
    """Return a signed map ``(H, W)``: the spatial part of a :class:`~captum_staa.VideoAttribution`, or the sum."""
    if isinstance(attributions, VideoAttribution):
        return as_map(_pick(attributions.spatial, index, "attributions")[None])[0]
    return as_map(attributions, layout, index).sum(0)


def key_frames(values: NDArray[np.floating], count: int) -> list[int]:
    """Return the frame with the largest magnitude in each of at most ``count`` equal parts of a clip.

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
    """Return ``truth`` as pairs (first, last) of frames, both inclusive."""
    if truth is None:
        return []
    array = np.asarray(truth)
    if array.dtype == bool and array.shape == (total,):
        edges = np.flatnonzero(np.diff(array, prepend=False, append=False))
        return [(int(first), int(end) - 1) for first, end in edges.reshape(-1, 2)]
    if array.dtype == bool or array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(
            f"truth must be bool of shape ({total},), or pairs (first, last), got shape {array.shape} and dtype "
            f"{array.dtype}"
        )
    for first, last in array:
        if not 0 <= first <= last < total:
            raise ValueError(f"truth windows must satisfy 0 <= first <= last < {total}, got ({first}, {last})")
    return [(int(first), int(last)) for first, last in array]


def as_pictures(
    clip: Clip,
    layout: VideoLayout | str | None = None,
    index: int | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> NDArray[np.uint8]:
    """Return a clip as pictures ``(T, H, W, 3)`` uint8.

    Example:
        >>> import torch
        >>> clip = torch.tensor([-1.0, 1.0, 3.0]).reshape(1, 3, 1, 1, 1).expand(1, 3, 3, 2, 2)
        >>> as_pictures(clip, "BTCHW")[:, 0, 0, 0].tolist()  # the range of the clip becomes 0..255
        [0, 128, 255]
        >>> as_pictures(clip, "BTCHW", mean=0.25, std=0.25)[:, 0, 0, 0].tolist()  # or its normalization is undone
        [0, 128, 255]

    Args:
        clip: the original frames ``(T, H, W, 3)`` uint8, or a clip in ``layout`` (uint8 or float).
        layout: order of the axes of a 5-D clip, such as ``"BTCHW"``.
        index: index of the clip in a batch; required if the batch has more than one clip.
        mean: mean that was subtracted from pictures in [0, 1], one number or one per channel; requires ``std``.
        std: standard deviation by which the result was divided. Without both, the minimum and the maximum of a float
            clip become black and white.

    Raises:
        TypeError, ValueError: ``clip`` has another dtype or shape, or only one of ``mean`` and ``std`` is given.
    """
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must be given together, got {mean = }, {std = }")
    frames = tensor_of(clip)
    shape = tuple(frames.shape)
    if frames.ndim == 5:
        if layout is None:
            raise ValueError(
                f"layout must be given for a clip of shape {shape}, got None. Pass layout='BTCHW' or 'BCTHW'."
            )
        frames = _pick(VideoLayout.of(layout).to_working(frames), index, "clip").movedim(1, -1)  # (T, H, W, C)
    elif frames.ndim == 4 and frames.dtype != torch.uint8:
        raise TypeError(
            f"frames (T, H, W, 3) must be uint8 in 0..255, got {frames.dtype} of shape {shape}. Scale and round the "
            f"frames, or pass a 5-D clip with its layout."
        )
    if frames.ndim != 4 or frames.shape[-1] not in (1, 3) or 0 in frames.shape:
        raise ValueError(
            f"clip must be uint8 frames (T, H, W, 3), or 5-D with 1 or 3 channels, got shape {shape} ({layout = })"
        )
    if frames.dtype != torch.uint8:
        frames = frames.double()
        if not bool(frames.isfinite().all()):
            raise ValueError(
                f"clip must be finite, got nan or inf in the clip of shape {shape}. Check its preprocessing."
            )
        if mean is not None and std is not None:
            frames = frames * torch.as_tensor(std) + torch.as_tensor(mean)
        else:
            low, high = frames.min(), frames.max()
            frames = (frames - low) / (high - low).clamp(min=1e-12)
        frames = (frames * 255).round().clamp(0, 255).byte()
    return frames.expand(*frames.shape[:3], 3).numpy()


def tensor_of(values: Tensor | NDArray[np.generic] | Sequence[float] | None) -> Tensor:
    """Return an array-like as a tensor on the CPU. Flipped and transposed views of numpy are allowed."""
    if isinstance(values, Tensor):
        check_dense(values, "the clip or the attributions")
        return values.detach().cpu()
    if values is None or (isinstance(values, tuple | list) and any(isinstance(value, Tensor) for value in values)):
        raise TypeError(
            f"the clip and the attributions must each be a tensor or an array, got {type(values).__name__}. If Captum "
            f"returned a tuple for a tuple of inputs, pass the entry of the clip."
        )
    array = np.ascontiguousarray(values)
    if any(stride < 0 for stride in array.strides):  # numpy counts an array that is flipped along an axis of size 1
        array = array.copy()  # as contiguous, but torch does not accept negative strides
    if array.dtype.kind not in "fiub":
        raise TypeError(
            f"the clip and the attributions must contain real numbers, got {type(values).__name__} of {array.dtype}"
        )
    return torch.from_numpy(array)


def _pick(batch: Tensor, index: int | None, name: str) -> Tensor:
    if index is None and len(batch) > 1:
        raise ValueError(
            f"index must be given for a batch of several clips, got None for {name} of {len(batch)} clips (shape "
            f"{tuple(batch.shape)}). Pass index= to select one."
        )
    if not -len(batch) <= (index or 0) < len(batch):
        raise ValueError(
            f"index must select one of the {len(batch)} clips of {name} (shape {tuple(batch.shape)}), got {index}"
        )
    return batch[index or 0]
