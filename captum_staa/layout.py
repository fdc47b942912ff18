"""The order of a clip's axes: batch, time, channel, height and width; and which order a method or a metric gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from captum_staa._utils.checks import check_count
from captum_staa._utils.networks import sizes_explained

if TYPE_CHECKING:
    from torch import Tensor

WORKING = "BTCHW"


@dataclass(frozen=True)
class VideoLayout:
    """The order of a clip's axes, as a string of the letters B, T, C, H and W.

    All code inside this library uses the order ``BTCHW``. A layout converts a user's clip to this order and back.

    Example:
        >>> import torch
        >>> layout = VideoLayout("BCTHW")
        >>> clip = torch.zeros(2, 3, 16, 48, 64)
        >>> layout.to_working(clip).shape
        torch.Size([2, 16, 3, 48, 64])
        >>> layout.size(clip)
        {'B': 2, 'C': 3, 'T': 16, 'H': 48, 'W': 64}

    Args:
        axes: the five letters in the order of the clip's axes. Batch comes first, as everywhere in Captum.
        channels: number of channels of a clip. None accepts any number, but rejects a clip of more than 4 channels and
            exactly 3 frames, because its axes are most likely named in the wrong order.

    Raises:
        TypeError: ``axes`` is not a string, or ``channels`` is not an integer.
        ValueError: ``axes`` is not a permutation of ``BTCHW`` that begins with B, or ``channels`` is below 1.
    """

    axes: str
    channels: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.axes, str):
            raise TypeError(
                f"a layout must be a string such as 'BTCHW', got {self.axes!r} of type {type(self.axes).__name__}"
            )
        if self.channels is not None:
            check_count("channels", self.channels)
        object.__setattr__(self, "axes", self.axes.upper())
        if sorted(self.axes) != sorted(WORKING) or self.axes[0] != "B":
            raise ValueError(
                f"a layout must contain each of B, T, C, H, W once and begin with B, got {self.axes!r}. "
                f"Use 'BTCHW' (Hugging Face video models) or 'BCTHW' (3D CNNs)."
            )

    @classmethod
    def of(cls, layout: VideoLayout | str) -> VideoLayout:
        """Return ``layout`` as a :class:`VideoLayout`."""
        return layout if isinstance(layout, VideoLayout) else cls(layout)

    @property
    def time(self) -> int:
        """The index of the time axis."""
        return self.axes.index("T")

    @property
    def channel(self) -> int:
        """The index of the channel axis."""
        return self.axes.index("C")

    def size(self, clip: Tensor) -> dict[str, int]:
        """Return the size of each axis by its letter. Raises as :meth:`check` does."""
        self.check(clip)
        return dict(zip(self.axes, clip.shape, strict=True))

    def extent(self, clip: Tensor) -> tuple[int, int, int]:
        """Return ``(T, H, W)`` of a clip. Raises as :meth:`check` does."""
        sizes = self.size(clip)
        return sizes["T"], sizes["H"], sizes["W"]

    def check(self, clip: Tensor, name: str = "inputs") -> None:
        """Raise unless ``clip`` is a non-empty 5-D tensor with a plausible number of channels.

        Args:
            clip: the clip to check.
            name: name of the argument in error messages.

        Raises:
            TypeError: ``clip`` is not a tensor.
            ValueError: it does not have five axes, is empty, or does not have :attr:`channels` channels.
        """
        if not isinstance(clip, torch.Tensor):
            raise TypeError(
                f"{name} must be a tensor in layout {self.axes}, got {type(clip).__name__}. "
                f"{self._instead_of(clip, name)}"
            )
        if clip.ndim != 5 or 0 in clip.shape:
            raise ValueError(
                f"{name} must be a non-empty 5-D tensor ({', '.join(self.axes)}), got shape {tuple(clip.shape)}."
                f"{self._advice(clip, name)}"
            )
        channels, frames = clip.shape[self.channel], clip.shape[self.time]
        if self.channels is None and frames == 3 and channels > 4:
            first, second = sorted((self.time, self.channel))
            swapped = self.axes.translate(str.maketrans("TC", "CT"))
            raise ValueError(
                f"in layout {self.axes}, {name} of shape {tuple(clip.shape)} has {channels} channels and 3 frames. "
                f"The order of the axes is probably wrong. Pass layout={swapped!r} if that is the order of the "
                f"model, and {name}.transpose({first}, {second}) if not. If the order is correct, pass "
                f"VideoLayout({self.axes!r}, channels={channels})."
            )
        if self.channels is not None and channels != self.channels:
            raise ValueError(
                f"{name} must have {self.channels} channels, got {channels} channels in layout {self.axes} "
                f"(shape {tuple(clip.shape)})"
            )

    def _instead_of(self, received: object, name: str) -> str:
        """Return what to pass in place of something that is not a tensor."""
        if isinstance(received, (tuple, list)):
            return (
                f"Pass its items one at a time. For a module that takes several tensors made of one clip, pass this "
                f"clip and VideoClassifier(module, layout={self.axes!r}, pack=function from the clip to these)."
            )
        if isinstance(received, str):
            return (
                "Read a file with io.read_video(path, ...), and convert its frames with classifier.preprocess(frames)."
            )
        return (
            f"Convert frames of a video with classifier.preprocess(frames), and an array of normalized values with "
            f"torch.from_numpy({name}).float()."
        )

    def _advice(self, clip: Tensor, name: str) -> str:
        """Return what to do with a clip that does not have five axes."""
        if clip.ndim == 6:
            return (
                f" If the axis after the batch counts views or crops, explain one view, {name}[:, 0]. For a model that "
                f"takes views, pass VideoClassifier(module, layout={self.axes!r}, pack=lambda clip: clip[:, None])."
            )
        if clip.ndim != 4:
            return ""
        if not clip.is_floating_point() and clip.shape[-1] == 3:
            return " Convert frames (T, H, W, 3) of a video with classifier.preprocess(frames)."
        channels = clip.shape[self.channel - 1]  # of the clip with a batch axis in front
        unbatched = f" Add a batch dimension with {name}.unsqueeze(0)" if channels in (1, 3, 4, self.channels) else ""
        folded = (
            f"pass a 5-D clip and VideoClassifier(module, layout={self.axes!r}, pack=...) with a function that "
            f"folds it, such as pack=lambda clip: clip.flatten(0, 1)"
        )
        if channels in (3, 4, self.channels):
            return f"{unbatched}."
        other = " if it is one clip with 1 channel. If" if unbatched else " If"
        return f"{unbatched}{other} the model takes frames folded into the batch or channel axis, {folded}."

    def check_values(self, clip: Tensor, name: str = "inputs") -> None:
        """Raise unless ``clip`` passes :meth:`check` and is a dense floating-point tensor of finite values."""
        self.check(clip, name)
        check_dense(clip, name)
        if not clip.is_floating_point():
            raise TypeError(
                f"{name} must be a floating-point tensor, got {clip.dtype}. VideoClassifier.preprocess converts uint8 "
                f"frames to floating point."
            )
        if not bool(clip.isfinite().all()):
            bad = int(clip.numel() - clip.isfinite().sum())
            raise ValueError(
                f"{name} must be finite, got {bad} nan or infinite values out of {clip.numel()} "
                f"(shape {tuple(clip.shape)}). Replace them, for example with torch.nan_to_num."
            )

    def to_working(self, clip: Tensor) -> Tensor:
        """Return a ``(B, T, C, H, W)`` view of a clip in this layout."""
        self.check(clip)
        return clip.permute([self.axes.index(axis) for axis in WORKING])

    def mask_to_working(self, mask: Tensor) -> Tensor:
        """Return a ``(B, T, H, W)`` view of a mask in this layout with size 1 along channels."""
        return mask.permute([self.axes.index(axis) for axis in WORKING])[:, :, 0]

    def from_working(self, clip: Tensor) -> Tensor:
        """Return a view in this layout of a ``(B, T, C, H, W)`` clip."""
        return clip.permute([WORKING.index(axis) for axis in self.axes])

    def forward_from_working(self, forward_func: Callable[..., Any], count: int = 1) -> Callable[..., Any]:
        """Return ``forward_func`` as a function of ``count`` clips ``(B, T, C, H, W)`` and further arguments.

        In the first call, an error about shapes that do not fit together becomes a ValueError with the shape of the
        clips in this layout.
        """

        explained = sizes_explained(forward_func, count)

        def forward(*args: Any) -> Any:
            clips = (self.from_working(clip).contiguous() for clip in args[:count])
            return explained(*clips, *args[count:])

        return forward

    def reduce(self, attributions: Tensor) -> Tensor:
        """Return the sum over channels ``(B, T, H, W)`` of attributions with the shape of the clip."""
        return self.to_working(attributions).sum(2)

    def expand(self, maps: Tensor, clip: Tensor) -> Tensor:
        """Distribute maps ``(B, T, H, W)`` evenly over the channels of ``clip``. This is the inverse of :meth:`reduce`.

        Args:
            maps: one value per pixel of every frame.
            clip: the clip whose shape the result has.

        Returns:
            A contiguous tensor with the shape of ``clip`` whose sum over channels is ``maps``. It has the clip's dtype,
            but float32 instead of half precision, because float16 rounds the small attention of one pixel to 0.

        Raises:
            ValueError: ``maps`` does not have the sizes of the clip.
        """
        sizes = self.size(clip)
        expected = tuple(sizes[axis] for axis in "BTHW")
        if tuple(maps.shape) != expected:
            raise ValueError(
                f"maps must be (B, T, H, W) = {expected} for a clip of shape {tuple(clip.shape)} in layout "
                f"{self.axes}, got shape {tuple(maps.shape)}"
            )
        channels = sizes["C"]
        spread = (maps / channels).unsqueeze(2).expand(-1, -1, channels, -1, -1)  # (B, T, C, H, W)
        return self.from_working(spread).to(torch.promote_types(clip.dtype, torch.float32)).contiguous()


def check_dense(values: Tensor, name: str) -> None:
    """Raise TypeError unless ``values`` is a dense tensor of real numbers with data."""
    if values.is_meta or values.layout != torch.strided or values.is_quantized or values.is_complex():
        raise TypeError(
            f"{name} must be a dense tensor of real numbers, got dtype {values.dtype}, {values.layout}, device "
            f"{values.device} and shape {tuple(values.shape)}. Convert it with .to_dense(), .dequantize() or .real. A "
            f"meta tensor has no values."
        )


def layout_of(forward_func: object, layout: VideoLayout | str | None) -> VideoLayout:
    """Return ``layout``, or the layout of ``forward_func`` if it is None.

    Args:
        forward_func: the function or model to explain. A VideoClassifier, an ST-ABN or any module with a ``layout``
            attribute of type :class:`VideoLayout` has a layout.
        layout: the layout that the caller passes, or None.

    Raises:
        ValueError: neither of them has a layout, or the two layouts differ.
    """
    known = layout_if_known(forward_func, layout)
    if known is None:
        raise ValueError(
            f"layout is required for a {type(forward_func).__name__}, got None. Pass layout='BCTHW' or 'BTCHW', or a "
            f"VideoClassifier, which knows its layout."
        )
    return known


def layout_if_known(forward_func: object, layout: VideoLayout | str | None) -> VideoLayout | None:
    """Return the same as :func:`layout_of`, or None without a layout, for methods that accept inputs of any shape."""
    own = getattr(forward_func, "layout", None)
    own = own if isinstance(own, VideoLayout) else None
    if layout is None:
        return own
    layout = VideoLayout.of(layout)
    if own is not None and own.axes != layout.axes:
        raise ValueError(
            f"layout must be {own.axes!r}, the layout of the {type(forward_func).__name__}, got {layout.axes!r}. Leave "
            f"layout out."
        )
    return layout
