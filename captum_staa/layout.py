"""Which axis of a clip is batch, time, channel, height and width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from captum_staa._utils.checks import check_count

if TYPE_CHECKING:
    from torch import Tensor

WORKING = "BTCHW"


@dataclass(frozen=True)
class VideoLayout:
    """The order of a clip's axes, as a word of the letters B, T, C, H and W.

    Everything inside this library works in one order, ``BTCHW``; a layout carries a user's clip there and back.

    Example:
        >>> import torch
        >>> layout = VideoLayout("BCTHW")
        >>> clip = torch.zeros(2, 3, 16, 48, 64)
        >>> layout.to_working(clip).shape
        torch.Size([2, 16, 3, 48, 64])
        >>> layout.size(clip)
        {'B': 2, 'C': 3, 'T': 16, 'H': 48, 'W': 64}

    Args:
        axes: the five letters in the clip's order. Batch comes first, as everywhere in Captum.
        channels: how many channels a clip has. None takes any number, but refuses a clip of more than 4 channels and
            exactly 3 frames, whose axes are most likely named in the wrong order.

    Raises:
        TypeError: ``axes`` is not a string, or ``channels`` no whole number.
        ValueError: ``axes`` is not a permutation of ``BTCHW`` that begins with B, or ``channels`` is below 1.
    """

    axes: str
    channels: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.axes, str):
            raise TypeError(f"a layout is a word such as 'BTCHW', got {self.axes!r} of type {type(self.axes).__name__}")
        if self.channels is not None:
            check_count("channels", self.channels)
        object.__setattr__(self, "axes", self.axes.upper())
        if sorted(self.axes) != sorted(WORKING) or self.axes[0] != "B":
            raise ValueError(
                f"a layout names each of B, T, C, H, W once and begins with B, got {self.axes!r}; "
                f"use 'BTCHW' (Hugging Face video models) or 'BCTHW' (3D CNNs)"
            )

    @classmethod
    def of(cls, layout: VideoLayout | str) -> VideoLayout:
        """A layout from itself or from its word."""
        return layout if isinstance(layout, VideoLayout) else cls(layout)

    @property
    def time(self) -> int:
        """Index of the time axis."""
        return self.axes.index("T")

    @property
    def channel(self) -> int:
        """Index of the channel axis."""
        return self.axes.index("C")

    def size(self, clip: Tensor) -> dict[str, int]:
        """The clip's sizes by letter; raises ValueError where the clip is not five-dimensional."""
        self.check(clip)
        return dict(zip(self.axes, clip.shape, strict=True))

    def extent(self, clip: Tensor) -> tuple[int, int, int]:
        """``(T, H, W)`` of a clip; raises ValueError as :meth:`size` does."""
        sizes = self.size(clip)
        return sizes["T"], sizes["H"], sizes["W"]

    def check(self, clip: Tensor, name: str = "inputs") -> None:
        """Raise unless ``clip`` is a non-empty five-dimensional tensor."""
        if not isinstance(clip, torch.Tensor):
            raise TypeError(f"{name} must be a tensor in layout {self.axes}, got {type(clip).__name__}")
        if clip.ndim != 5 or 0 in clip.shape:
            raise ValueError(
                f"{name} must be a non-empty clip in layout {self.axes}, but its shape is {tuple(clip.shape)}; "
                f"add a batch axis with clip[None] if one is missing"
            )
        channels, frames = clip.shape[self.channel], clip.shape[self.time]
        if self.channels is None and frames == 3 and channels > 4:
            swapped = self.axes.translate(str.maketrans("TC", "CT"))
            raise ValueError(
                f"read as {self.axes}, {name} of shape {tuple(clip.shape)} would have {channels} channels, 3 frames: "
                f"pass layout={swapped!r}, or VideoLayout({self.axes!r}, channels={channels}) if it is truly so"
            )
        if self.channels is not None and channels != self.channels:
            raise ValueError(
                f"{name} must have {self.channels} channels in layout {self.axes}, but its shape is {tuple(clip.shape)}"
            )

    def check_values(self, clip: Tensor, name: str = "inputs") -> None:
        """Raise unless ``clip`` passes :meth:`check` and holds finite floats."""
        self.check(clip, name)
        check_dense(clip, name)
        if not clip.is_floating_point():
            raise TypeError(
                f"{name} must hold floats, got {clip.dtype}; VideoClassifier.preprocess makes a clip of frames"
            )
        if not bool(clip.isfinite().all()):
            bad = int(clip.numel() - clip.isfinite().sum())
            raise ValueError(
                f"{bad} of the {clip.numel()} values of {name} (shape {tuple(clip.shape)}) are nan or infinite, and "
                f"would spread over the whole map; mend them first, as with torch.nan_to_num"
            )

    def to_working(self, clip: Tensor) -> Tensor:
        """``(B, T, C, H, W)`` view of a clip in this layout."""
        self.check(clip)
        return clip.permute([self.axes.index(axis) for axis in WORKING])

    def from_working(self, clip: Tensor) -> Tensor:
        """View in this layout of a ``(B, T, C, H, W)`` clip."""
        return clip.permute([WORKING.index(axis) for axis in self.axes])

    def reduce(self, attributions: Tensor) -> Tensor:
        """Sum over channels: attributions of the clip's shape to maps ``(B, T, H, W)``."""
        return self.to_working(attributions).sum(2)

    def expand(self, maps: Tensor, clip: Tensor) -> Tensor:
        """Spread maps ``(B, T, H, W)`` evenly over the channels of ``clip``: the inverse of :meth:`reduce`.

        Returns:
            A contiguous tensor of the clip's own shape whose sum over channels is ``maps``. Its dtype is the clip's,
            but float32 for half precision: a share of attention per pixel is smaller than float16 can tell from 0.
        """
        sizes = self.size(clip)
        wanted = tuple(sizes[axis] for axis in "BTHW")
        if tuple(maps.shape) != wanted:
            raise ValueError(
                f"maps must be (B, T, H, W) = {wanted} for a clip of shape {tuple(clip.shape)} in layout {self.axes}, "
                f"but their shape is {tuple(maps.shape)}"
            )
        channels = sizes["C"]
        spread = (maps / channels).unsqueeze(2).expand(-1, -1, channels, -1, -1)  # (B, T, C, H, W)
        return self.from_working(spread).to(torch.promote_types(clip.dtype, torch.float32)).contiguous()


def check_dense(values: Tensor, name: str) -> None:
    """Raise unless every number of a tensor is real, and there to be read."""
    if values.is_meta or values.layout != torch.strided or values.is_quantized or values.is_complex():
        raise TypeError(
            f"{name} must be a dense tensor of real numbers, but one of {values.dtype}, {values.layout} on "
            f"{values.device} came (shape {tuple(values.shape)}); pass .to_dense(), .dequantize() or .real, and no "
            f"meta tensor, which holds no values"
        )
