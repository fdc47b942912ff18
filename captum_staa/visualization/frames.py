"""The frames of a clip, on which maps are drawn: their times, their size, and the region that the model saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from captum_staa._utils.checks import is_number
from captum_staa._utils.tensors import short_repr
from captum_staa.io import Video
from captum_staa.layout import VideoLayout
from captum_staa.models import VideoClassifier, VideoLanguageModel
from captum_staa.models.classifier import classifier_of
from captum_staa.result import as_tensor

Crop = tuple[float, float, float, float]  # (top, left, height, width) in pixels; fractions are allowed
Pixels = Tensor | NDArray[np.uint8] | Sequence[NDArray[np.uint8]] | Video


@dataclass(frozen=True, eq=False)
class Frames:
    """The frames of one clip, and what is known about them.

    Every function of this package takes :class:`Frames`, the result of :func:`captum_staa.io.read_video`, or uint8
    frames ``(T, H, W, 3)`` without further information. Where a model resizes and crops the frames, pass
    ``Frames.from_video(video, classifier)``, so that maps are drawn where the model saw the frames.

    Example:
        >>> import numpy as np
        >>> pixels = np.zeros((4, 48, 64, 3), dtype=np.uint8)
        >>> Frames(pixels, indices=[10, 12, 14, 16], fps=25).captions()
        ['0.40 s', '0.48 s', '0.56 s', '0.64 s']

    Attributes:
        pixels: ``(T, H, W, 3)`` uint8, the original frames. A tensor or a list of frames is converted to an array.
        crop: ``(top, left, height, width)`` in pixels of the frames: the region that the model saw after its resizing
            and cropping. Maps are drawn there, and the rest of the frame is pale. None is the whole frame; maps of
            another aspect ratio are then an error.
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

    __repr__ = short_repr

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
        return frames if isinstance(frames, Frames) else cls.from_video(frames)

    @classmethod
    def from_video(cls, video: Pixels, classifier: VideoClassifier | VideoLanguageModel | None = None) -> Frames:
        """Return original frames with their times in the file, and with the region that a model saw.

        Example:
            >>> import numpy as np
            >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
            >>> Frames.from_video(np.zeros((16, 96, 160, 3), dtype=np.uint8), clf).crop  # the middle of wide frames
            (0.0, 32.0, 96.0, 96.0)

        Args:
            video: the result of :func:`captum_staa.io.read_video`, or uint8 frames ``(T, H, W, 3)``, whose times are
                not known.
            classifier: the model that is explained, also a video language model: its ``layout``, and the ``crop`` that
                its preprocessing takes.
        """
        known: dict[str, Any] = {}
        if isinstance(video, Video):
            video, fps, indices = video
            known = {"indices": [int(i) for i in indices], "fps": None if math.isnan(fps) else fps}
        frames = cls(video, **known)  # type: ignore[arg-type]  # converted to an array
        if classifier is None:
            return frames
        if isinstance(classifier, VideoLanguageModel):
            steps = classifier.preprocessing
            crop = None if steps is None else steps.crop_box(*frames.size)
            return replace(frames, crop=crop, layout=classifier.layout)
        model = _checked(classifier)
        crop = None if model.preprocessing is None else model.crop_box(*frames.size)
        return replace(frames, crop=crop, layout=model.layout)

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
        flipped = False
        if steps is not None:
            *own, flipped = steps.normalization()
            mean, std = own if mean is None else (mean, std)
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
        if flipped:
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
    def cropped(self) -> bool:
        """Whether a part of the frames is outside of the crop. A border of less than half a pixel does not count."""
        return self.crop is not None and not all(_within(centers).all() for centers in _centers(self.crop, self.size))

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
    """Return a tensor, an array or nested numbers as a tensor on the CPU."""
    if isinstance(values, tuple | list) and any(isinstance(value, Tensor) for value in values):
        raise TypeError(
            f"{name} must be a tensor or an array, got a {type(values).__name__} of tensors. If Captum returned a "
            f"tuple for a tuple of inputs, pass the entry of the clip."
        )
    array = values if isinstance(values, Tensor) or values is None else np.asarray(values)
    return as_tensor(array, name).detach().cpu()


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


# --- sizes, and the region that the model saw -------------------------------------------------------------------------


def size_within(size: tuple[int, int], most: int) -> tuple[int, int]:
    """Return ``(H, W)`` with the same aspect ratio, whose shorter side has at most ``most`` pixels.

    Example:
        >>> size_within((1080, 1920), most=360), size_within((100, 120), most=360)
        ((360, 640), (100, 120))
    """
    factor = min(1, most / min(size))
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)


def reduced(frame: NDArray[np.uint8], most: int) -> NDArray[np.uint8]:
    """Return the frame ``(H, W, 3)``, reduced so that its shorter side has at most ``most`` pixels."""
    height, width = size_within((frame.shape[0], frame.shape[1]), most)
    if (height, width) == frame.shape[:2]:
        return frame
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))


def enlarged(frame: NDArray[np.uint8], least: int) -> NDArray[np.uint8]:
    """Return the frame ``(H, W, 3)``, enlarged so that its shorter side has at least ``least`` pixels.

    Tiny frames are enlarged by an integer factor, so that the pixels of the model input stay visible. Others are
    interpolated.
    """
    height, width = frame.shape[:2]
    factor = least / min(height, width)
    if factor <= 1:
        return frame
    if factor > 3:
        return frame.repeat(math.ceil(factor), axis=0).repeat(math.ceil(factor), axis=1)
    size = round(width * factor), round(height * factor)
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))


def check_crop(crop: Any, size: tuple[int, int]) -> None:
    """Raise TypeError unless ``crop`` is None or four numbers, and ValueError if it contains no pixel of the frames."""
    if crop is None:
        return
    if not (isinstance(crop, Sequence) and len(crop) == 4 and all(map(is_number, crop))):
        raise TypeError(
            f"crop must be four numbers (top, left, height, width), got {crop!r}. Use the result of clf.crop_box."
        )
    if not all(_within(centers).any() for centers in _centers((crop[0], crop[1], crop[2], crop[3]), size)):
        raise ValueError(
            f"crop must be (top, left, height, width) of a region inside the {size[0]} x {size[1]} frames, got "
            f"{crop!r}, which contains no pixel. Pass the crop in pixels of the frames."
        )


def _centers(crop: Crop, size: tuple[int, int]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Return the centers of the rows ``(H,)`` and columns ``(W,)`` of pixels; they are in [0, 1] inside the crop."""
    top, left, tall, wide = crop
    return (np.arange(size[0]) + 0.5 - top) / max(tall, 1e-9), (np.arange(size[1]) + 0.5 - left) / max(wide, 1e-9)


def _within(centers: NDArray[np.floating]) -> NDArray[np.bool_]:
    return (centers >= 0) & (centers <= 1)


def check_aspect(cells: tuple[int, int], frames: Frames) -> None:
    """Raise ValueError if maps of ``cells`` (h, w) cannot cover whole frames, and the frames have no crop.

    A grid of a few cells has about the aspect ratio of the frames, so half a cell may be missing along each axis. One
    number per frame ``(1, 1)`` fits any frame.
    """
    (h, w), (height, width) = cells, frames.size
    if frames.crop is not None or (h, w) == (1, 1):
        return
    shortest = max(height / (h + 0.5), width / (w + 0.5))  # possible side of a square cell in pixels
    longest = min(height / (h - 0.5), width / (w - 0.5))
    if shortest <= longest:
        return
    raise ValueError(
        f"attributions must have the aspect ratio of the frames if the frames have no crop, got attributions of {h} x "
        f"{w} and frames of {height} x {width}: the model saw a crop of these frames, or resized them. Pass "
        f"Frames.from_video(video, classifier), or Frames(pixels, crop=classifier.crop_box({height}, {width})); for a "
        f"model that resizes whole frames to {h} x {w}, crop=(0, 0, {height}, {width})."
    )


def place(
    values: NDArray[np.float32], size: tuple[int, int], crop: Crop | None = None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Resize maps to the frames, and place them in the region that the model saw.

    Example:
        >>> import numpy as np
        >>> lit, seen = place(np.ones((1, 2, 2), np.float32), (6, 8), crop=(1, 2, 4, 4))
        >>> lit[0].astype(int).tolist()[0], lit[0].astype(int).tolist()[1]
        ([0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0])
        >>> int(seen.sum())
        16

    Args:
        values: ``(T, h, w)``.
        size: ``(H, W)`` of the frames.
        crop: ``(top, left, height, width)`` of the region that the maps cover, in pixels of the frames (fractions are
            allowed); None is the whole frame.

    Returns:
        The maps ``(T, H, W)``, interpolated bilinearly and 0 outside of the crop, and a mask ``(H, W)`` of the pixels
        that the model saw: those whose center is inside the crop.
    """
    height, width = size
    if crop is None and values.shape[1:] == size:
        return values, np.ones(size, dtype=bool)
    crop = (0, 0, height, width) if crop is None else crop
    rows, columns = _centers(crop, size)
    seen = _within(rows)[:, None] & _within(columns)
    maps = torch.from_numpy(shrunk(values, crop[2:]))[:, None]
    y, x = torch.from_numpy(rows).float() * 2 - 1, torch.from_numpy(columns).float() * 2 - 1
    points = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)  # (H, W, 2), as (x, y)
    points = points[None].expand(len(maps), -1, -1, -1)
    laid = F.grid_sample(maps, points, mode="bilinear", padding_mode="border", align_corners=False)[:, 0]
    return np.where(seen, laid.numpy(), np.float32(0)), seen


def shrunk(values: NDArray[np.float32], most: tuple[float, float]) -> NDArray[np.float32]:
    """Return maps ``(T, h, w)`` reduced with antialiasing to at most ``most`` rows and columns.

    Sampling a larger map directly could miss values between the sampled points.
    """
    size = values.shape[1:]
    smaller = min(size[0], max(round(most[0]), 1)), min(size[1], max(round(most[1]), 1))
    values = np.ascontiguousarray(values)
    if smaller == size:
        return values
    maps = torch.from_numpy(values)[:, None]
    return F.interpolate(maps, size=smaller, mode="bilinear", align_corners=False, antialias=True)[:, 0].numpy()
