"""Preprocessing by a function of the user, such as ``weights.transforms()`` of torchvision.

The clip is what the function returns. Which region of a frame the model sees, and with which mean and standard
deviation values are normalized, is measured with test images, because a function does not state it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captum_staa.layout import VideoLayout
from captum_staa.models.preprocessing import as_frames

SIZE = 64  # height and width of the frames on which the normalization is measured
MARGIN = 0.1  # share of the rows and columns at each border that is not measured: filters repeat the border there
TOLERANCE = 0.01  # largest deviation from a straight line, as a fraction of the side of the frame
GOLDEN = 0.6180339887498949  # its multiples fill [0, 1) evenly


class Transform:
    """A user's function of frames, with the interface of :class:`~captum_staa.models.preprocessing.Preprocessing`.

    Example:
        >>> def halved(frames):  # uint8 (T, 3, H, W) -> float (T, 3, H / 2, H / 2): the left square of wide frames
        ...     half = torch.nn.functional.interpolate(frames / 255, scale_factor=0.5, mode="area")
        ...     return half[..., : half.shape[2]]
        >>> transform = Transform(halved, VideoLayout("BTCHW"))
        >>> transform(np.zeros((4, 40, 80, 3), np.uint8)).shape
        torch.Size([1, 4, 3, 20, 20])
        >>> [round(side) for side in transform.crop_box(40, 80)]
        [0, 0, 40, 40]

    Args:
        function: function of frames, a uint8 tensor ``(T, 3, H, W)`` in RGB, that returns the clip of the model as a
            float tensor, in the axes of ``layout`` with or without the batch axis.
        layout: order of the axes of the model's clips.
        num_frames: number of frames of the model's clips, for the test images. None uses one frame.
    """

    def __init__(self, function: Callable[[Tensor], Any], layout: VideoLayout, num_frames: int | None = None) -> None:
        self.function, self.layout, self.num_frames = function, layout, num_frames
        self._boxes: dict[tuple[int, int], tuple[float, float, float, float]] = {}

    def __repr__(self) -> str:
        return repr(self.function)

    def __call__(self, frames: NDArray[np.uint8] | Tensor) -> Tensor:
        """Return the clip ``(1, T, 3, H', W')`` of frames ``(T, H, W, 3)``.

        Raises:
            TypeError: ``frames`` is not uint8, or the function returns something else than a float tensor.
            ValueError: ``frames`` has another shape, or the result does not have the axes of the layout.
        """
        # a copy, because the function may write into it
        pixels = torch.from_numpy(np.array(as_frames(frames).transpose(0, 3, 1, 2), order="C"))
        clip = self.function(pixels)
        if isinstance(clip, Mapping):  # of a Hugging Face processor
            clip = next((value for value in clip.values() if isinstance(value, Tensor) and value.ndim > 3), None)
        axes = self.layout.axes
        if not isinstance(clip, Tensor) or not clip.is_floating_point():
            got = clip.dtype if isinstance(clip, Tensor) else type(clip).__name__
            raise TypeError(
                f"preprocessing must return a float tensor ({', '.join(axes[1:])}) for uint8 frames of shape "
                f"{tuple(pixels.shape)} (T, C, H, W), got {got}. Convert its result to a float tensor; for a processor "
                f"of Hugging Face, pass lambda frames: processor(list(frames), return_tensors='pt')."
            )
        whole = clip[None] if clip.ndim == 4 else clip
        if whole.ndim != 5 or len(whole) != 1 or whole.shape[self.layout.channel] not in (1, 3):
            raise ValueError(
                f"preprocessing must return one clip in the layout of the model, {axes}, or the same without B, got "
                f"shape {tuple(clip.shape)} for frames of shape {tuple(pixels.shape)} (T, C, H, W). Pass the layout of "
                f"this result to VideoClassifier, or move its axes with permute."
            )
        return self.layout.to_working(whole.detach()).contiguous()

    def crop_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Return the region of the original frame that the model sees, ``(top, left, height, width)`` in pixels.

        It is measured with frames whose brightness increases from one side to the other: the brightness of a pixel of
        the clip tells where in the frame it comes from.

        Raises:
            ValueError: the function is not a resize and a crop: it is random, flips, or bends frames.
        """
        if (height, width) not in self._boxes:
            black, white = (self._answer(np.full((height, width), value)) for value in (0, 255))
            span = white - black  # (H', W'); padding is the same in both
            seen = np.abs(span) > np.abs(span).max() / 2
            (top, tall), (left, wide) = (self._along(axis, (height, width), black, span, seen) for axis in (0, 1))
            self._boxes[height, width] = top, left, tall, wide
        return self._boxes[height, width]

    def normalization(self) -> tuple[list[float], list[float], bool]:
        """Return mean and standard deviation of R, G and B, for pixels in [0, 1], and whether channels are BGR."""
        levels = [self._channels((value,) * 3) for value in (0, 255)]
        red = self._channels((255, 0, 0)) - levels[0]
        flipped = bool(abs(red[-1]) > abs(red[0]))
        black, white = (values[::-1] if flipped else values for values in levels)
        std = 1 / np.where(white == black, 1, white - black)
        return (-black * std).tolist(), std.tolist(), flipped

    def _along(
        self,
        axis: int,
        size: tuple[int, int],
        black: NDArray[np.float64],
        span: NDArray[np.float64],
        seen: NDArray[np.bool_],
    ) -> tuple[float, float]:
        """Return begin and length, in pixels of the frame, of the region that the clip shows along an axis."""
        length = size[axis]
        ramp = 255 * (np.arange(length) + 0.5) / length
        # rounded up or down in equal shares across the other axis, so that the mean there is exact
        dither = np.arange(size[1 - axis]) * GOLDEN % 1
        image = np.floor(ramp[:, None] + dither[None])
        image = image if axis == 0 else image.T
        answer = self._answer(image)
        places = np.where(seen, (answer - black) / np.where(seen, span, 1), np.nan) * length
        lines = np.flatnonzero(seen.any(axis=1 - axis))
        lines = lines[int(MARGIN * len(lines)) : len(lines) - int(MARGIN * len(lines))]
        found = np.nanmean(np.take(places, lines, axis), axis=1 - axis)
        step, begin = np.polyfit(lines + 0.5, found, 1) if len(lines) > 1 else (0.0, 0.0)
        deviation = np.abs(found - begin - step * (lines + 0.5)).max(initial=0)
        if not np.array_equal(answer, self._answer(image)) or step <= 0 or deviation > TOLERANCE * length + 1:
            raise ValueError(
                f"preprocessing must resize and crop frames, so that the region that the model sees can be measured, "
                f"got a function that is random, flips or distorts frames of {size[0]} x {size[1]}: {self!r}. Pass the "
                f"crop by hand: Frames(pixels, crop=(top, left, height, width))."
            )
        return float(begin), float(step * seen.shape[axis])

    def _answer(self, image: NDArray[Any]) -> NDArray[np.float64]:
        """Return the first channel ``(H', W')`` of a frame of a clip in which all frames are ``image`` ``(H, W)``."""
        return self._clip(np.broadcast_to(image[..., None], (*image.shape, 3)))[0]

    def _channels(self, color: tuple[int, int, int]) -> NDArray[np.float64]:
        """Return the value of each channel at the center of frames of one color."""
        clip = self._clip(np.broadcast_to(np.array(color), (SIZE, SIZE, 3)))
        return clip[:, clip.shape[1] // 2, clip.shape[2] // 2]

    def _clip(self, image: NDArray[Any]) -> NDArray[np.float64]:
        frames = np.broadcast_to(image.astype(np.uint8), (self.num_frames or 1, *image.shape))
        return self(frames)[0, 0].double().cpu().numpy()
