"""The numbers behind all pictures: attributions of one clip, their normalization, and the frames that stand out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from captum_staa._utils.checks import check_choice, check_count
from captum_staa.layout import VideoLayout
from captum_staa.result import VideoAttribution
from captum_staa.visualization.figure import SIGNS, Sign
from captum_staa.visualization.frames import Frames, pick, tensor_of

Attributions = Tensor | NDArray[np.floating] | VideoAttribution
Classes = Mapping[str, Attributions]  # what one method returned for several classes, by label
Truth = Tensor | NDArray[np.bool_] | Sequence[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Maps:
    """The signed attributions of one clip.

    Attributes:
        joint: ``(T, h, w)``.
        spatial: ``(h, w)``, the spatial part of a :class:`~captum_staa.VideoAttribution`, or the sum over frames.
        temporal: ``(T,)``, the temporal part of a :class:`~captum_staa.VideoAttribution`, which is not always the sum
            of the joint part; None if it is, and for other attributions.
    """

    joint: NDArray[np.float64]
    spatial: NDArray[np.float64]
    temporal: NDArray[np.float64] | None = None

    @classmethod
    def of(cls, attributions: Attributions, frames: Frames | None = None) -> Maps:
        """Check attributions and return those of one clip.

        Args:
            attributions: of the shape of the inputs (channels are summed, as in Captum), ``(B, T, h, w)``, ``(T, h,
                w)`` or :class:`~captum_staa.VideoAttribution`.
            frames: the clip, with the layout of the attributions and the position of the clip in the batch.

        Raises:
            TypeError: ``attributions`` are not real numbers.
            ValueError: they have another shape or number of frames, or contain nan or inf.
        """
        layout, index = (None, None) if frames is None else (frames.layout, frames.index)
        parts = attributions if isinstance(attributions, VideoAttribution) else None
        values = tensor_of(attributions if parts is None else parts.joint, "attributions")
        shape = tuple(values.shape)
        if values.ndim == 5:
            if layout is None:
                raise ValueError(
                    f"layout must be given for attributions of shape {shape}, got None. Pass Frames(..., "
                    f"layout='BTCHW') or 'BCTHW', Frames.from_inputs(inputs, classifier), or "
                    f"VideoAttribution.from_attributions(attributions, layout)."
                )
            values = VideoLayout.of(layout).reduce(values.double())
        if values.ndim == 4:
            values = pick(values, index, "attributions")
        if values.ndim != 3 or 0 in values.shape:
            raise ValueError(
                f"attributions must have the shape of the inputs, (B, T, H, W) or (T, H, W), and must not be empty, "
                f"got shape {shape}"
            )
        joint = _finite(values, shape)
        if parts is None:
            maps = cls(joint, joint.sum(0))
        else:
            spatial, temporal = (
                _finite(pick(tensor_of(part, "attributions"), index, "attributions"), part.shape)
                for part in (parts.spatial, parts.temporal)
            )
            # a sum over pixels is computed again for each sign: positive and negative pixels of a frame cancel in it
            sums = joint.sum((1, 2))
            size = 1e-5 * np.abs(joint).sum()
            summed = temporal.shape == sums.shape and np.allclose(temporal, sums, rtol=1e-3, atol=size)
            maps = cls(joint, spatial, None if summed else temporal)
        counts = {len(maps.joint), len(maps.joint if maps.temporal is None else maps.temporal)}
        if frames is not None and counts != {len(frames)}:
            got = " and ".join(map(str, sorted(counts)))
            raise ValueError(
                f"attributions must have as many frames as the clip, {len(frames)}, got {got} (shape "
                f"{maps.joint.shape}). Pass the frames that the model saw, or resize maps on a token grid with "
                f"TokenGrid.to_pixels."
            )
        return maps

    def per_frame(self, sign: Sign = "all") -> NDArray[np.float64]:
        """Return one number per frame ``(T,)``: the temporal part, or the sum over pixels of the values of a sign."""
        check_choice("sign", sign, SIGNS)
        return signed(self.joint, sign).sum((1, 2)) if self.temporal is None else signed(self.temporal, sign)


class Saliency(NamedTuple):
    """Normalized map of one clip, with its scale."""

    values: NDArray[np.float32]  # (T, h, w), in [0, 1], or [-1, 1] for sign="all"
    scale: float  # the attribution that becomes 1; 0 if all attributions are zero


def saliency(
    values: NDArray[np.float64], sign: Sign = "absolute_value", outlier_perc: float = 2, scale: float | None = None
) -> Saliency:
    """Return maps normalized as in Captum's visualization, with one scale for the whole clip.

    Example:
        >>> maps = np.array([4.0, -2.0, 0.0]).reshape(3, 1, 1)  # three frames of one pixel
        >>> saliency(maps, sign="all", outlier_perc=0).values.ravel().tolist()
        [1.0, -0.5, 0.0]

    Args:
        values: ``(T, h, w)``, signed.
        sign: values to keep, as in :class:`~captum_staa.visualization.Style`.
        outlier_perc: percentage in [0, 100]: the largest values that together make up this share of the total are
            clipped to 1.
        scale: the attribution that becomes 1, for maps that are compared; None takes it from ``values``.

    Returns:
        :class:`Saliency`. A map that is zero everywhere stays zero.
    """
    values = signed(values, sign)
    scale = _threshold(np.abs(values), 100 - outlier_perc) if scale is None else scale
    if scale > 0:
        values = np.clip(values / scale, -1, 1)
    return Saliency(values.astype(np.float32), scale)


def signed(values: NDArray[np.float64], sign: Sign) -> NDArray[np.float64]:
    """Return the values that Captum's ``sign`` keeps; ``"negative"`` returns magnitudes."""
    if sign == "all":
        return values
    return np.abs(values) if sign == "absolute_value" else np.maximum(values if sign == "positive" else -values, 0)


def key_frames(values: NDArray[np.floating], count: int) -> list[int]:
    """Return the frame with the largest magnitude in each of at most ``count`` equal parts of a clip.

    Example:
        >>> key_frames(np.array([0.0, 5.0, 1.0, 0.0, 0.0, -3.0]), count=2)
        [1, 5]
    """
    check_count("the number of key frames", count)
    parts = np.array_split(np.arange(len(values)), min(count, len(values)))
    return [int(part[np.abs(values[part]).argmax()]) for part in parts]


def evidence_windows(truth: Truth | None, total: int) -> list[tuple[int, int]]:
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


def _finite(values: Tensor, shape: Sequence[int]) -> NDArray[np.float64]:
    """Return values in float64; ``shape`` is that of the attributions, for the error message."""
    nonfinite = int((~values.isfinite()).sum())
    if nonfinite:
        raise ValueError(
            f"attributions must be finite, got nan or inf at {nonfinite} of {values.numel()} pixels of attributions of "
            f"shape {tuple(shape)}. Check the model and the method that computed them."
        )
    return values.double().numpy()


def _threshold(magnitudes: NDArray[np.float64], percentile: float) -> float:
    """Return the value v such that all values up to v sum to ``percentile`` % of the total, as defined by Captum."""
    ascending = np.sort(magnitudes, axis=None)
    total = np.cumsum(ascending)
    # Rounding can make the searched sum slightly larger than the last entry, so the index is limited.
    at = min(int(np.searchsorted(total, total[-1] * percentile / 100)), len(ascending) - 1)
    # With outlier_perc near 100, the first value that reaches the sum can be zero although others are not.
    return float(ascending[at]) or float(ascending[-1])
