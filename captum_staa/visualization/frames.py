"""The frames of a clip, on which maps are drawn, with their time axis and the region that the model saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captum_staa.io import Video
from captum_staa.layout import VideoLayout, check_dense
from captum_staa.models import VideoClassifier
from captum_staa.models.classifier import classifier_of

from .placement import Crop, check_crop

Pixels = Tensor | NDArray[np.uint8] | Sequence[NDArray[np.uint8]]


@dataclass(frozen=True, eq=False)
class Frames:
    """The frames of one clip, and what is known about them.

    Every function of this package takes :class:`Frames`, or uint8 frames ``(T, H, W, 3)`` without further information.

    Example:
        >>> import numpy as np
        >>> pixels = np.zeros((4, 48, 64, 3), dtype=np.uint8)
        >>> Frames(pixels, indices=[10, 12, 14, 16], fps=25).captions()
        ['0.40 s', '0.48 s', '0.56 s', '0.64 s']

    Attributes:
        pixels: ``(T, H, W, 3)`` uint8, the original frames. A tensor or a list of frames is converted to an array.
        crop: ``(top, left, height, width)`` in pixels of the frames: the region that the model saw after its resizing
            and cropping. Maps are drawn there, and the rest of the frame is gray. None is the whole frame.
        indices: ``(T,)``, frame numbers in the video file, for the labels.
        fps: frame rate of ``indices`` (of the clip if ``indices`` is None); labels and time axes are then in seconds.
        labels: ``(T,)`` strings that replace the labels of the frames.
        layout: order of the axes of 5-D attributions, such as ``"BTCHW"``.
        index: position of this clip in a batch of attributions; required if the batch has more than one clip.

    Raises:
        TypeError, ValueError: a field has another type, shape or value.
    """

    pixels: NDArray[np.uint8]
    crop: Crop | None = None
    indices: Sequence[int] | None = None
    fps: float | None = None
    labels: Sequence[str] | None = None
    layout: VideoLayout | str | None = None
    index: int | None = None

    def __post_init__(self) -> None:
        frames = tensor_of(self.pixels, "frames")
        expected = f"frames must be uint8 (T, H, W, 3) in 0..255, got {frames.dtype} of shape {tuple(frames.shape)}"
        if frames.dtype != torch.uint8:
            raise TypeError(
                f"{expected}. Pass attributions first and frames second. Convert the inputs of a model with "
                f"Frames.from_inputs(inputs, classifier)."
            )
        if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise ValueError(expected)
        object.__setattr__(self, "pixels", frames.numpy())
        check_crop(self.crop, self.size)
        for name, value in (("indices", self.indices), ("labels", self.labels)):
            if value is not None and len(value) != len(self):
                raise ValueError(
                    f"{name} must have one entry for each of the {len(self)} frames, got {len(value)}: {list(value)!r}"
                )
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps must be positive and finite, got {self.fps!r}")
        if self.layout is not None:
            object.__setattr__(self, "layout", VideoLayout.of(self.layout))

    @classmethod
    def of(cls, frames: Frames | Pixels) -> Frames:
        """Return ``frames`` as :class:`Frames`."""
        return frames if isinstance(frames, Frames) else cls(frames)  # type: ignore[arg-type]

    @classmethod
    def from_video(cls, video: Video, classifier: VideoClassifier | None = None) -> Frames:
        """Return the frames that :func:`captum_staa.io.read_video` read, with their times in the file.

        Args:
            video: the result of ``read_video``.
            classifier: the model that is explained: its ``layout``, and the ``crop`` that its preprocessing takes.
        """
        frames, fps, indices = video
        crop = layout = None
        if classifier is not None:
            model = _checked(classifier)
            layout = model.layout
            if model.preprocessing is not None:
                crop = model.crop_box(*frames.shape[1:3])
        return cls(frames, crop, [int(i) for i in indices], None if math.isnan(fps) else fps, layout=layout)

    @classmethod
    def from_inputs(
        cls,
        inputs: Tensor | NDArray[Any],
        classifier: VideoClassifier | None = None,
        *,
        layout: VideoLayout | str | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        index: int | None = None,
        indices: Sequence[int] | None = None,
        fps: float | None = None,
    ) -> Frames:
        """Return the frames that a model takes, with its normalization undone.

        Example:
            >>> import torch
            >>> inputs = torch.tensor([-1.0, 1.0, 3.0]).reshape(1, 3, 1, 1, 1).expand(1, 3, 3, 2, 2)
            >>> Frames.from_inputs(inputs, layout="BTCHW").pixels[:, 0, 0, 0].tolist()  # their range becomes 0..255
            [0, 128, 255]
            >>> Frames.from_inputs(inputs, layout="BTCHW", mean=0.25, std=0.25).pixels[:, 0, 0, 0].tolist()
            [0, 128, 255]

        Args:
            inputs: a clip, or a batch of clips, with 1 or 3 channels, uint8 or float.
            classifier: the model, from which the layout, the mean and the standard deviation are read.
            layout: order of the axes, such as ``"BTCHW"``; required without ``classifier``.
            mean: mean that was subtracted from pixels in [0, 1], one number or one per channel; requires ``std``.
            std: standard deviation by which the result was divided. If the normalization is unknown, the minimum and
                the maximum of the clip become black and white.
            index: position of the clip in the batch; required if the batch has more than one clip.
            indices: ``(T,)``, frame numbers in the video file.
            fps: frame rate of ``indices``.

        Raises:
            TypeError, ValueError: ``inputs`` have another dtype or shape or are not finite, there is no layout, or only
                one of ``mean`` and ``std`` is given.
        """
        if (mean is None) != (std is None):
            raise ValueError(f"mean and std must be given together, got {mean = }, {std = }")
        clip, steps = tensor_of(inputs, "inputs"), None
        if classifier is not None:
            model = _checked(classifier)
            layout, steps = model.layout if layout is None else layout, model.preprocessing
        if steps is not None and mean is None:
            # (pixels * factor - offset - mean) / std, as a mean and a standard deviation of pixels in [0, 1]
            scale = 255 * (1.0 if steps.factor is None else steps.factor)
            mean = [(value + steps.offset) / scale for value in steps.mean or (0, 0, 0)]
            std = [value / scale for value in steps.std or (1, 1, 1)]
        if layout is None:
            raise ValueError(
                f"layout must be given for inputs of shape {tuple(clip.shape)}, got None. Pass the classifier, or "
                f"layout='BTCHW' or 'BCTHW'."
            )
        layout = VideoLayout.of(layout)
        frames = pick(layout.to_working(clip), index, "inputs").movedim(1, -1)  # (T, H, W, C)
        if frames.shape[-1] not in (1, 3):
            raise ValueError(
                f"inputs must have 1 or 3 channels to be drawn, got shape {tuple(clip.shape)} in layout {layout.axes}"
            )
        if steps is not None and steps.flip_channels:
            frames = frames.flip(-1)  # the last step of the preprocessing, so the first to be undone
        if frames.dtype != torch.uint8:
            frames = _as_bytes(frames.double(), mean, std)
        pixels = frames.expand(*frames.shape[:3], 3).numpy()
        return cls(pixels, indices=indices, fps=fps, layout=layout, index=index)

    def __len__(self) -> int:
        """The number of frames."""
        return len(self.pixels)

    def __getitem__(self, positions: int | slice | Sequence[int]) -> Frames:
        """Return some of the frames, with their numbers and labels."""
        chosen = np.atleast_1d(np.arange(len(self))[positions]).tolist()
        labels = None if self.labels is None else [self.labels[at] for at in chosen]
        return replace(self, pixels=self.pixels[chosen], indices=[self.numbers[at] for at in chosen], labels=labels)

    @property
    def size(self) -> tuple[int, int]:
        """``(H, W)`` in pixels."""
        return self.pixels.shape[1], self.pixels.shape[2]

    @property
    def numbers(self) -> list[int]:
        """The frame numbers: ``indices``, or positions in the clip."""
        return list(range(len(self))) if self.indices is None else [int(number) for number in self.indices]

    def captions(self, join: str | None = None) -> list[str]:
        """Return a label such as ``"frame 12"`` or ``"0.48 s"`` per frame; with ``join``, both separated by ``join``.

        Example:
            >>> frames = Frames(np.zeros((1, 4, 4, 3), dtype=np.uint8), indices=[12], fps=25)
            >>> frames.captions(), frames.captions(join=", ")
            (['0.48 s'], ['frame 12, 0.48 s'])
        """
        if self.labels is not None:
            return [str(label) for label in self.labels]
        if self.fps is None:
            return [f"frame {number}" for number in self.numbers]
        prefixes = ["" if join is None else f"frame {number}{join}" for number in self.numbers]
        return [f"{prefix}{n / self.fps:.2f} s" for prefix, n in zip(prefixes, self.numbers, strict=True)]


def _checked(classifier: object) -> VideoClassifier:
    model = classifier_of(classifier)
    if model is None:
        raise TypeError(
            f"classifier must be a VideoClassifier, got {type(classifier).__name__}. Without one, pass layout=, and "
            f"mean= and std= of the normalization."
        )
    return model


def _as_bytes(frames: Tensor, mean: float | Sequence[float] | None, std: float | Sequence[float] | None) -> Tensor:
    """Undo the normalization of frames ``(T, H, W, C)``, or stretch their range, and return them as uint8."""
    if not bool(frames.isfinite().all()):
        raise ValueError(
            f"inputs must be finite, got nan or inf in a clip of shape {tuple(frames.shape)}. Check the preprocessing."
        )
    if mean is not None and std is not None:
        frames = frames * torch.as_tensor(std) + torch.as_tensor(mean)
    else:
        low, high = frames.min(), frames.max()
        frames = (frames - low) / (high - low).clamp(min=1e-12)
    return (frames * 255).round().clamp(0, 255).byte()


def tensor_of(values: object, name: str) -> Tensor:
    """Return an array-like as a tensor on the CPU. Flipped and transposed views of NumPy are allowed."""
    if isinstance(values, Tensor):
        check_dense(values, name)
        return values.detach().cpu()
    if isinstance(values, tuple | list) and any(isinstance(value, Tensor) for value in values):
        raise TypeError(
            f"{name} must be a tensor or an array, got a {type(values).__name__} of tensors. If Captum returned a "
            f"tuple for a tuple of inputs, pass the entry of the clip."
        )
    if values is None:
        raise TypeError(f"{name} must be a tensor or an array, got None")
    array = np.ascontiguousarray(values)
    if any(stride < 0 for stride in array.strides):  # NumPy counts an array that is flipped along an axis of size 1
        array = array.copy()  # as contiguous, but PyTorch does not accept negative strides
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must contain real numbers, got {type(values).__name__} of {array.dtype}")
    return torch.from_numpy(array)


def pick(batch: Tensor, index: int | None, name: str) -> Tensor:
    """Return one clip of a batch; ``index`` may be None if there is only one."""
    if index is None and len(batch) > 1:
        raise ValueError(
            f"index must be given for a batch of several clips, got None for {name} of {len(batch)} clips (shape "
            f"{tuple(batch.shape)}). Pass index= to Frames to select one."
        )
    if not -len(batch) <= (index or 0) < len(batch):
        raise ValueError(
            f"index must select one of the {len(batch)} clips of {name} (shape {tuple(batch.shape)}), got {index}"
        )
    return batch[index or 0]
