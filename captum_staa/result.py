"""The result type of all methods, and the conversion of attributions to maps ``(B, T, H, W)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from captum_staa._utils.tensors import short_repr, wide
from captum_staa.layout import VideoLayout, check_dense

NOTEBOOK_CLIPS = 4  # number of clips of a batch that a notebook shows
Inputs = TypeVar("Inputs", Tensor, tuple[Tensor, ...])  # the input of a model, or several, such as RGB and flow


@dataclass(frozen=True)
class VideoAttribution:
    """An attribution in space and time, the result of :meth:`attribute_maps`.

    Example:
        >>> joint = torch.zeros(1, 8, 4, 4)
        >>> joint[:, 5] = 1.0
        >>> maps = VideoAttribution.from_joint(joint)
        >>> maps.spatial.shape, int(maps.temporal.argmax())
        (torch.Size([1, 4, 4]), 5)

    Attributes:
        joint: ``(B, T, H, W)``, one value per pixel of every frame.
        spatial: ``(B, H, W)``, the sum over frames.
        temporal: ``(B, T)``, the sum over the pixels of each frame.
        logits: ``(B, K)``, the outputs of the model, if the method computed them; else None.
    """

    joint: Tensor
    spatial: Tensor
    temporal: Tensor
    logits: Tensor | None = None

    __repr__ = short_repr

    @classmethod
    def from_joint(cls, joint: Tensor, logits: Tensor | None = None) -> VideoAttribution:
        """Return the attribution whose spatial and temporal parts are the sums of ``joint`` ``(B, T, H, W)``."""
        return VideoAttribution(joint, joint.sum(1), joint.sum((2, 3)), logits)

    @classmethod
    def from_attributions(cls, attributions: Tensor, layout: VideoLayout | str) -> VideoAttribution:
        """Return the spatial and temporal parts of attributions of any method, for example of a Captum method.

        Example:
            >>> attributions = torch.zeros(1, 3, 8, 4, 4)  # as Captum returns them for a 3D CNN
            >>> attributions[:, :, 5] = 1.0
            >>> maps = VideoAttribution.from_attributions(attributions, "BCTHW")
            >>> maps.joint.shape, maps.spatial.shape, int(maps.temporal.argmax())
            (torch.Size([1, 8, 4, 4]), torch.Size([1, 4, 4]), 5)

        Args:
            attributions: signed attributions with the shape of the inputs.
            layout: the order of their axes, such as ``"BTCHW"``.

        Returns:
            :class:`VideoAttribution` in float32 or wider. Channels are summed, so opposite signs may cancel. Pass
            ``attributions.abs()`` for magnitudes.

        Raises:
            TypeError: ``attributions`` is not a dense tensor of real numbers.
            ValueError: it does not have five axes.
        """
        layout = VideoLayout.of(layout)
        layout.check(attributions, "attributions")
        check_dense(attributions, "attributions")
        return cls.from_joint(layout.reduce(wide(attributions.detach())))

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the spatial and temporal parts of the first clips of the batch."""
        from captum_staa._utils.notebook import AGAINST, FOR

        batch, frames, height, width = self.joint.shape
        shown = "".join(_picture(self.spatial[at], self.temporal[at]) for at in range(min(batch, NOTEBOOK_CLIPS)))
        size = f"{batch} clip{'s' * (batch > 1)} of {frames} frames, {height} × {width}"
        key = f"<span style='color: {FOR}'>for</span> and <span style='color: {AGAINST}'>against</span>"
        few = f", in the first {NOTEBOOK_CLIPS} clips" if batch > NOTEBOOK_CLIPS else ""
        return f"<div>{type(self).__name__}: {size}; where and when evidence is {key}{few}{shown}</div>"


def _picture(spatial: Tensor, temporal: Tensor) -> str:
    """Return HTML of a map ``(H, W)`` in at most 24 x 24 cells and of a bar per frame ``(T,)``, scaled separately."""
    from captum_staa._utils.notebook import signed_bars, signed_map

    where, when = spatial.detach().float().cpu(), temporal.detach().float().cpu()
    size = min(24, where.shape[0]), min(24, where.shape[1])
    cells = torch.nn.functional.adaptive_avg_pool2d(where[None], size)[0]
    tiles, bars = ((values / values.abs().max().clamp(min=1e-30)).tolist() for values in (cells, when))
    width = 120 * where.shape[1] / where.shape[0]
    pictures = signed_map(tiles, width, 120, "where") + signed_bars(bars, 360, 120, "when")
    return f"<div style='display: flex; gap: 1em; margin: 0.4em 0'>{pictures}</div>"


Array = Tensor | np.ndarray[Any, Any]


def as_tensor(value: object, name: str, axes: str = "") -> Tensor:
    """Return a tensor unchanged, or a NumPy array as a tensor.

    The tensor shares the memory of the array, unless PyTorch cannot: it supports neither read-only arrays nor negative
    strides.

    Args:
        value: the tensor or array.
        name: name of the argument in error messages.
        axes: its axes in error messages, such as ``"B, T, H, W"``; empty if it may have any.

    Raises:
        TypeError: ``value`` is not a dense tensor or array of numbers.
    """
    shape = f" ({axes})" if axes else ""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiub":
            content = f" {value.item()!r}" if value.ndim == 0 else ""
            raise TypeError(
                f"{name} must be a tensor or array of real numbers{shape}, got an array of {value.dtype}{content}. "
                f"Convert it with .astype(float)."
            )
        array = np.ascontiguousarray(value).reshape(value.shape)  # which makes an array without axes one-dimensional
        # NumPy counts an array that is flipped along an axis of size 1 as contiguous
        shared = array.flags.writeable and all(stride >= 0 for stride in array.strides)
        return torch.from_numpy(array if shared else array.copy())
    if not isinstance(value, Tensor):
        several = isinstance(value, (tuple, list)) and any(isinstance(item, Tensor) for item in value)
        fix = "Pass its items one at a time." if several else "Convert it with torch.as_tensor."
        raise TypeError(f"{name} must be a tensor or array{shape}, got {type(value).__name__}. {fix}")
    check_dense(value, name)
    return value


def as_tuple(inputs: object, name: str = "inputs") -> tuple[Tensor, ...]:
    """Return the inputs of a method, a tensor or a tuple of tensors, as a tuple."""
    clips = inputs if isinstance(inputs, tuple) else (inputs,)
    if not clips or not all(isinstance(clip, Tensor) for clip in clips):
        types = [type(clip).__name__ for clip in clips]
        received = f"a tuple of {types}" if isinstance(inputs, tuple) else types[0]
        raise TypeError(
            f"{name} must be a tensor or a non-empty tuple of tensors, got {received}. Pass one tensor per input "
            f"of the model; if the model takes several tensors made of one clip, pass this clip to "
            f"VideoClassifier(module, layout=..., pack=function from the clip to these)."
        )
    return clips


def clips_in(inputs: object, layout: VideoLayout, name: str = "inputs") -> tuple[Tensor, ...]:
    """Return the inputs of a method as a tuple of clips. ``name`` is that of the argument in error messages.

    Raises:
        TypeError: ``inputs`` is neither a tensor of floats nor a tuple of them.
        ValueError: an input does not fit the layout or has nan, or the batch sizes differ.
    """
    clips = as_tuple(inputs, name)
    for i, clip in enumerate(clips):
        layout.check_values(clip, name if len(clips) == 1 else f"{name}[{i}]")
    check_same_batch(clips)
    return clips


def check_same_batch(clips: tuple[Tensor, ...]) -> None:
    """Raise a ValueError unless all inputs have the same number of examples."""
    if len({len(clip) for clip in clips}) > 1:
        raise ValueError(
            f"all inputs must have the same batch size, got shapes {[tuple(clip.shape) for clip in clips]}. Pass the "
            f"same examples in each."
        )


def for_each(
    inputs: object,
    layout: VideoLayout | str,
    make: Callable[[Tensor, VideoLayout], Tensor],
    name: str = "inputs",
) -> Any:
    """Return what a function makes of a clip and its layout, for a tuple of clips (RGB and flow) as a tuple."""
    layout = VideoLayout.of(layout)
    made = tuple(make(clip, layout) for clip in clips_in(inputs, layout, name))
    return made if isinstance(inputs, tuple) else made[0]


def as_maps(
    attributions: Array, layout: VideoLayout | str | None = None, *, name: str = "attributions", ranked: bool = False
) -> Tensor:
    """Check attributions and return them as maps ``(B, T, H, W)`` in float64.

    Args:
        attributions: of the shape of a clip with ``layout``, or maps ``(B, T, H, W)`` without it.
        layout: the order of the axes. None if ``attributions`` are maps.
        name: name of the argument in error messages.
        ranked: whether only the order of the values matters. Maps may then hold integers and infinity.

    Raises:
        TypeError: ``attributions`` is not a tensor or array of floats.
        ValueError: it has another shape, or is not finite.
    """
    values = as_tensor(attributions, name, "B, T, H, W")
    if layout is not None:
        layout = VideoLayout.of(layout)
        layout.check_values(values, name)
        return layout.reduce(values.detach().double())
    if values.ndim != 4 or 0 in values.shape:
        raise ValueError(
            f"{name} without a layout must be non-empty maps (B, T, H, W), got shape {tuple(values.shape)}. Pass "
            f"layout='BTCHW' or 'BCTHW' if they have the shape of a clip."
        )
    if not (ranked or values.is_floating_point()):
        raise TypeError(f"{name} must be a floating-point tensor, got {values.dtype}. Convert it with .float().")
    if bad := int((values.isnan() if ranked else ~values.isfinite()).sum()):
        expected, wrong = ("must not contain nan", "nan") if ranked else ("must be finite", "nan or infinite")
        raise ValueError(
            f"{name} {expected}, got {bad} {wrong} values out of {values.numel()} (shape {tuple(values.shape)}). "
            f"Replace them, for example with torch.nan_to_num."
        )
    return values.detach().double()


def maps_of(attributions: Array, clip: Tensor, layout: VideoLayout) -> Tensor:
    """Check that attributions fit a clip, with its shape or as maps, and return maps ``(B, T, H, W)`` in float64."""
    expected = tuple(layout.size(clip)[letter] for letter in "BTHW")
    shape = tuple(getattr(attributions, "shape", ()))
    if len(shape) in (4, 5) and shape not in (expected, tuple(clip.shape)):
        raise ValueError(
            f"attributions must have the shape of the clip, {tuple(clip.shape)} in layout {layout.axes}, or be maps "
            f"(B, T, H, W) = {expected}, got shape {shape}. Pass the attributions of this clip."
        )
    return as_maps(attributions, layout if len(shape) == 5 else None)


def maps_for(
    attributions: Array | tuple[Array, ...], clips: tuple[Tensor, ...], layout: VideoLayout
) -> tuple[Tensor, ...]:
    """Return :func:`maps_of` for each input of a model. Raise ValueError unless there is one attribution per input."""
    parts = attributions if isinstance(attributions, tuple) else (attributions,)
    if len(parts) != len(clips):
        raise ValueError(
            f"attributions must be one per input, {len(clips)}, got {len(parts)}. Pass a tuple, as methods return it "
            f"for a tuple of inputs."
        )
    return tuple(maps_of(part, clip, layout) for part, clip in zip(parts, clips, strict=True))
