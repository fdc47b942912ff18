"""The result type of every method, and maps ``(B, T, H, W)`` in one form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_staa.layout import VideoLayout, check_dense

NOTEBOOK_CLIPS = 4  # how many clips of a batch a notebook shows


@dataclass(frozen=True)
class VideoAttribution:
    """An attribution in space and time.

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

    @classmethod
    def from_joint(cls, joint: Tensor, logits: Tensor | None = None) -> VideoAttribution:
        """Return the attribution whose spatial and temporal parts are the sums of ``joint`` ``(B, T, H, W)``."""
        return VideoAttribution(joint, joint.sum(1), joint.sum((2, 3)), logits)

    @classmethod
    def from_attributions(cls, attributions: Tensor, layout: VideoLayout | str) -> VideoAttribution:
        """Return the parts in space and time of attributions of any method, such as one of Captum.

        Example:
            >>> attributions = torch.zeros(1, 3, 8, 4, 4)  # as Captum returns them for a 3D CNN
            >>> attributions[:, :, 5] = 1.0
            >>> maps = VideoAttribution.from_attributions(attributions, "BCTHW")
            >>> maps.joint.shape, maps.spatial.shape, int(maps.temporal.argmax())
            (torch.Size([1, 8, 4, 4]), torch.Size([1, 4, 4]), 5)

        Args:
            attributions: signed, of the shape of the inputs.
            layout: the order of their axes, such as ``"BTCHW"``.

        Returns:
            :class:`VideoAttribution` in float32 or wider. Channels are summed, so signs may cancel; pass
            ``attributions.abs()`` for magnitudes.

        Raises:
            ValueError: ``attributions`` do not have five axes.
        """
        layout = VideoLayout.of(layout)
        layout.check(attributions, "attributions")
        check_dense(attributions, "attributions")
        wide = torch.promote_types(attributions.dtype, torch.float32)
        return cls.from_joint(layout.reduce(attributions.detach().to(wide)))

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
    """The map ``(H, W)`` in at most 24 x 24 cells beside a bar for each frame ``(T,)``, each on its own scale."""
    from captum_staa._utils.notebook import signed_bars, signed_map

    where, when = spatial.detach().float().cpu(), temporal.detach().float().cpu()
    size = min(24, where.shape[0]), min(24, where.shape[1])
    cells = torch.nn.functional.adaptive_avg_pool2d(where[None], size)[0]
    tiles, bars = ((values / values.abs().max().clamp(min=1e-30)).tolist() for values in (cells, when))
    wide = 120 * where.shape[1] / where.shape[0]
    pictures = signed_map(tiles, wide, 120, "where") + signed_bars(bars, 360, 120, "when")
    return f"<div style='display: flex; gap: 1em; margin: 0.4em 0'>{pictures}</div>"


Array = Tensor | np.ndarray[Any, Any]


def as_tensor(value: object, name: str, axes: str) -> Tensor:
    """A tensor, or a copy of a numpy array, which may be read-only or run backwards; anything else is refused."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiubc":
            raise TypeError(f"{name} must be a tensor or array of numbers ({axes}), got an array of {value.dtype}")
        return torch.from_numpy(np.array(value, order="C"))
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor ({axes}), got {type(value).__name__}")
    check_dense(value, name)
    return value


def as_tuple(inputs: object) -> tuple[Tensor, ...]:
    """A method's inputs, a tensor or a tuple of tensors, as a tuple."""
    clips = inputs if isinstance(inputs, tuple) else (inputs,)
    if not clips or not all(isinstance(clip, Tensor) for clip in clips):
        came = [type(clip).__name__ for clip in clips]
        raise TypeError(f"inputs must be a tensor, or a tuple of at least one, got {type(inputs).__name__} of {came}")
    return clips


def as_maps(attributions: Array, layout: VideoLayout | str | None = None) -> Tensor:
    """``(B, T, H, W)`` float64 of attributions of a clip's shape with ``layout``, or of maps without; checked."""
    attributions = as_tensor(attributions, "attributions", "B, T, H, W")
    if layout is not None:
        layout = VideoLayout.of(layout)
        layout.check_values(attributions, "attributions")
        return layout.reduce(attributions.detach().double())
    if attributions.ndim != 4 or 0 in attributions.shape:
        raise ValueError(
            f"without a layout, attributions must be maps (B, T, H, W) and not empty, but their shape is "
            f"{tuple(attributions.shape)}; pass layout='BTCHW' or 'BCTHW' for attributions of a clip's shape"
        )
    if not attributions.is_floating_point():
        raise TypeError(f"attributions must hold floats, got {attributions.dtype}; pass truth.float() for a mask")
    if bad := int(attributions.numel() - attributions.isfinite().sum()):
        raise ValueError(
            f"{bad} of the {attributions.numel()} values of attributions (shape {tuple(attributions.shape)}) are nan "
            f"or infinite, which no metric can weigh; mend them first, as with torch.nan_to_num"
        )
    return attributions.detach().double()


def maps_of(attributions: Array, clip: Tensor, layout: VideoLayout) -> Tensor:
    """``(B, T, H, W)`` float64 of attributions of the clip's shape, or of maps."""
    wanted = tuple(layout.size(clip)[letter] for letter in "BTHW")
    shape = tuple(getattr(attributions, "shape", ()))
    if len(shape) in (4, 5) and shape not in (wanted, tuple(clip.shape)):
        raise ValueError(
            f"attributions must have the clip's shape {tuple(clip.shape)} in layout {layout.axes}, or be maps "
            f"(B, T, H, W) = {wanted}, but their shape is {shape}"
        )
    return as_maps(attributions, layout if len(shape) == 5 else None)
