"""Convert uint8 frames to the clip of a model, as its processor's JSON file describes, with Pillow and NumPy.

The video processors of Hugging Face require torchvision, and its image processors take different inputs in different
releases. There are only a few steps, so this library implements them. The results equal those of the Pillow processors
(tested), no other package is required, and the region of the original frame that the model sees is known
(:meth:`Preprocessing.crop_box`). Results of processors that resize with torchvision may differ by one uint8 step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from captum_staa.layout import VideoLayout, check_dense

_STANDARD = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
# Default values of a processor for settings that its file does not contain, by the beginning of its class name. For
# unknown processors there are no defaults: a step that the file does not mention is not done.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "VideoMAE": {"size": 224, "crop_size": 224, **_STANDARD},
    "Vivit": {"size": 256, "crop_size": 224, "rescale_factor": 1 / 127.5, "offset": True, **_STANDARD},
    "Timesformer": {"size": 224, "crop_size": 224, **_IMAGENET},
    "VJEPA2": {"crop_size": 256, **_IMAGENET},
}
# The settings of the published models on the Hugging Face hub, by the beginning of their model_type. A suggestion for
# models without a processor file, not a default: the files of the published models state other numbers.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "videomae": _IMAGENET,
    "timesformer": {"image_mean": (0.45, 0.45, 0.45), "image_std": (0.225, 0.225, 0.225)},
    "vivit": {"edge": 256 / 224, "rescale_factor": 1 / 127.5, "offset": True, **_STANDARD},
    "vjepa2": {"edge": 256 / 224, **_IMAGENET},
    "videoprism": {"edge": None, "resample": 3},  # resized to the size of the model, without a crop
}


@dataclass(frozen=True, repr=False)
class Preprocessing:
    """Resize, crop, rescale and normalize, in this order.

    Example:
        >>> import numpy as np
        >>> preprocessing = Preprocessing(resize=8, crop=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> frames = np.full((4, 16, 32, 3), 255, dtype=np.uint8)
        >>> clip = preprocessing(frames)
        >>> clip.shape, clip.max().item()
        (torch.Size([1, 4, 3, 8, 8]), 1.0)
        >>> preprocessing.crop_box(16, 32)  # the model sees the middle of these frames
        (0.0, 8.0, 16.0, 16.0)

    Args:
        resize: length of the shorter edge in pixels (keeps the aspect ratio), or ``(height, width)``. None does not
            resize.
        crop: ``(height, width)`` of the center crop in pixels, padded with black if the frame is smaller. None does not
            crop.
        resample: Pillow's resampling filter, 0 to 5 (2 is bilinear, 3 is bicubic).
        factor: factor by which the values 0..255 are multiplied. None does not rescale.
        offset: whether to subtract 1 after rescaling, as ViViT does.
        mean: value per channel that is subtracted after rescaling. None does not normalize.
        std: value per channel by which the result is divided.
        flip_channels: whether to return BGR instead of RGB.

    Raises:
        ValueError: a size is not positive, ``resample`` is unknown, or only one of ``mean`` and ``std`` is given.
    """

    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    resample: int = 2
    factor: float | None = 1 / 255
    offset: bool = False
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    flip_channels: bool = False

    def __post_init__(self) -> None:
        for name, size in (("resize", self.resize), ("crop", self.crop)):
            edges = [] if size is None else list(size) if isinstance(size, tuple) else [size]
            if any(edge < 1 for edge in edges) or (isinstance(size, tuple) and len(edges) != 2):
                raise ValueError(f"{name} must be (height, width) of 1 pixel or more, got {size!r}")
        if self.resample not in range(6):
            raise ValueError(f"resample must be one of Pillow's filters 0..5 (2 is bilinear), got {self.resample!r}")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean and std must be given together, got mean = {self.mean!r} and std = {self.std!r}")
        if self.mean is not None and self.std is not None and {len(self.mean), len(self.std)} != {3}:
            raise ValueError(f"mean and std must be three numbers each, got {self.mean!r} and {self.std!r}")
        if self.std is not None and 0 in self.std:
            raise ValueError(f"std must not contain 0, got {self.std!r}")

    def __repr__(self) -> str:
        """Return the call that makes these steps, without arguments that have their default."""
        stated = [f"{f.name}={value!r}" for f in fields(self) if (value := getattr(self, f.name)) != f.default]
        return f"Preprocessing({', '.join(stated)})"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocessing:
        """Return the steps that the JSON file of a processor describes.

        Example:
            >>> Preprocessing.from_config({"size": {"shortest_edge": 256}, "crop_size": 224}).crop
            (224, 224)

        Args:
            config: the content of ``preprocessor_config.json`` or ``video_preprocessor_config.json``.

        Raises:
            ValueError: a value is invalid.
        """
        kinds = ("video_processor_type", "image_processor_type", "feature_extractor_type")
        kind = next((str(config[key]) for key in kinds if config.get(key)), "")
        defaults = next((values for name, values in _DEFAULTS.items() if kind.startswith(name)), {})
        settings = {**defaults, **{key: value for key, value in config.items() if value is not None}}
        resize, crop = _size(settings, "size"), _size(settings, "crop_size")
        crop = (crop, crop) if isinstance(crop, int) else crop
        if kind.startswith("VJEPA2") and crop is not None:
            resize = int(
                crop[0] * 256 / 224
            )  # its processor derives the size from the crop and ignores the size in the file
        do = {
            "do_resize": resize is not None,
            "do_center_crop": crop is not None,
            "do_rescale": True,
            "do_normalize": "image_mean" in settings,
            **{key: bool(value) for key, value in settings.items() if key.startswith("do_")},
        }
        sizes = (("do_resize", "size", resize), ("do_center_crop", "crop_size", crop))
        if missing := [f"{name} is true without {key}" for name, key, value in sizes if do[name] and value is None]:
            raise ValueError(f"a processor config must give the size of each step, got {', '.join(missing)}")
        return cls(
            resize=resize if do["do_resize"] else None,
            crop=crop if do["do_center_crop"] else None,
            resample=int(settings.get("resample", 2)),
            factor=float(settings.get("rescale_factor", 1 / 255)) if do["do_rescale"] else None,
            offset=bool(settings.get("offset", False)) and do["do_rescale"],
            mean=_channels(settings, "image_mean") if do["do_normalize"] else None,
            std=_channels(settings, "image_std") if do["do_normalize"] else None,
            flip_channels=do.get("do_flip_channel_order", False),
        )

    def to_config(self) -> dict[str, Any]:
        """Return the content of a ``preprocessor_config.json`` with these steps, which :meth:`from_config` reads.

        Example:
            >>> steps = Preprocessing(resize=256, crop=(224, 224))
            >>> steps.to_config()["size"], Preprocessing.from_config(steps.to_config()) == steps
            ({'shortest_edge': 256}, True)
        """
        config: dict[str, Any] = {
            "do_resize": self.resize is not None,
            "do_center_crop": self.crop is not None,
            "resample": int(self.resample),
            "do_rescale": self.factor is not None or self.offset,  # the offset belongs to this step
            "rescale_factor": 1.0 if self.factor is None else float(self.factor),
            "offset": bool(self.offset),
            "do_normalize": self.mean is not None,
            "do_flip_channel_order": bool(self.flip_channels),
        }
        for name, size in (("size", self.resize), ("crop_size", self.crop)):
            if isinstance(size, tuple):
                config[name] = {"height": int(size[0]), "width": int(size[1])}
            elif size is not None:
                config[name] = {"shortest_edge": int(size)}
        for name, values in (("image_mean", self.mean), ("image_std", self.std)):
            if values is not None:
                config[name] = [float(value) for value in values]
        return config

    @classmethod
    def from_folder(cls, folder: str | Path) -> Preprocessing:
        """Return the steps that the folder of a model describes.

        Example:
            >>> import json, tempfile
            >>> folder = tempfile.TemporaryDirectory()
            >>> config = {"size": {"height": 48, "width": 64}, "do_normalize": False}
            >>> _ = Path(folder.name, "preprocessor_config.json").write_text(json.dumps(config))
            >>> Preprocessing.from_folder(folder.name).resize
            (48, 64)
            >>> folder.cleanup()

        Args:
            folder: a folder with ``processor_config.json`` (with a section for video or images),
                ``video_preprocessor_config.json`` or ``preprocessor_config.json``. The first of these files with steps
                is used.

        Raises:
            ValueError: none of these files exists, or one is invalid.
        """
        found = find(lambda name: path if (path := Path(folder, name)).is_file() else None)
        if found is None:
            raise ValueError(
                f"the folder {str(folder)!r} must contain one of {', '.join(FILES)}, got none of them. "
                f"{how_to_state(*_model_in(Path(folder)))}"
            )
        return found

    def __call__(self, frames: np.ndarray | Tensor) -> Tensor:
        """Convert frames to the clip that the model takes.

        Args:
            frames: uint8 ``(T, H, W, 3)``, RGB, values 0..255.

        Returns:
            float32 ``(1, T, 3, H', W')`` on the CPU.

        Raises:
            TypeError: ``frames`` is neither an array nor a tensor, or not uint8.
            ValueError: ``frames`` has another shape.
        """
        pixels = as_frames(frames)
        if self.resize is not None:
            height, width = self._resized(*pixels.shape[1:3])
            resized = [Image.fromarray(frame).resize((width, height), resample=self.resample) for frame in pixels]
            pixels = np.stack([np.asarray(frame) for frame in resized])
        if self.crop is not None:
            pixels = _center_crop(pixels, self.crop)
        if self.factor is not None:
            # in float64, as the Pillow processors do, so that results are bitwise equal
            pixels = (pixels.astype(np.float64) * self.factor).astype(np.float32)
        pixels = pixels.astype(np.float32, copy=False)
        if self.offset:
            pixels = pixels - np.float32(1)
        if self.mean is not None:
            pixels = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        if self.flip_channels:
            pixels = pixels[..., ::-1]
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))[None]

    def crop_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Return the region of the original frame that the model sees, in pixels.

        Example:
            >>> Preprocessing(resize=256, crop=(224, 224)).crop_box(512, 1024)
            (32.0, 288.0, 448.0, 448.0)

        Args:
            height: height of the original frames.
            width: width of the original frames.

        Returns:
            ``(top, left, height, width)``. A map over the input of the model must be resized to this box to overlay the
            original frame. The box extends beyond the frame if the crop is larger than the resized frame.

        Raises:
            ValueError: a size is not positive.
        """
        if min(height, width) < 1:
            raise ValueError(f"height and width must be at least 1, got (height, width) = {(height, width)}")
        rows, columns = self._resized(height, width)
        crop_rows, crop_columns = self.crop or (rows, columns)
        down, right = height / rows, width / columns
        top, left = (rows - crop_rows) // 2, (columns - crop_columns) // 2
        return top * down, left * right, crop_rows * down, crop_columns * right

    def normalization(self) -> tuple[list[float], list[float], bool]:
        """Return mean and standard deviation of R, G and B, for pixels in [0, 1], and whether channels are BGR."""
        # (pixels * factor - offset - mean) / std, with pixels in 0..255
        scale = 255 * (1.0 if self.factor is None else self.factor)
        mean = [(value + self.offset) / scale for value in self.mean or (0, 0, 0)]
        return mean, [value / scale for value in self.std or (1, 1, 1)], self.flip_channels

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        if width <= height:
            return int(self.resize * height / width), self.resize
        return self.resize, int(self.resize * width / height)


FILES = ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json")


def find(locate: Callable[[str], str | Path | None]) -> Preprocessing | None:
    """Return the steps in a model's processor files, for video if possible, else for images. None if there are none.

    Args:
        locate: function that returns the path of a file by its name, or None if the model does not have the file.

    Raises:
        ValueError: a file is not a JSON object, or a value is invalid.
    """
    contents: dict[str, dict[str, Any]] = {}
    for name in FILES:
        if path := locate(name):
            try:
                contents[name] = dict(json.loads(Path(path).read_text(encoding="utf-8")))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{str(path)!r} must contain a JSON object, got an error: {error}") from error
    nested, video, image = (contents.get(name, {}) for name in FILES)
    candidates = (nested.get("video_processor"), video, nested.get("image_processor"), image)
    config = next((candidate for candidate in candidates if candidate), None)
    return None if config is None else Preprocessing.from_config(config)


def published(model_type: str | None, size: tuple[int, int] | None) -> Preprocessing | None:
    """Return the steps of the published models of a family, scaled to the input size of a model; None if unknown.

    Example:
        >>> published("timesformer", (224, 224))
        Preprocessing(resize=224, crop=(224, 224), mean=(0.45, 0.45, 0.45), std=(0.225, 0.225, 0.225))

    Args:
        model_type: the ``model_type`` in ``config.json``, such as ``"videomae"``.
        size: ``(height, width)`` of the model's input in pixels.
    """
    known = next((values for name, values in _PUBLISHED.items() if (model_type or "").startswith(name)), None)
    if known is None or size is None:
        return None
    edge = known.get("edge", 1)
    config = {name: value for name, value in known.items() if name != "edge"}
    crop = {"height": size[0], "width": size[1]}
    sizes = {"size": crop} if edge is None else {"size": int(min(size) * edge), "crop_size": crop}
    return Preprocessing.from_config({**config, **sizes})


def how_to_state(model_type: str | None, size: tuple[int, int] | None) -> str:
    """Return sentences that say how to pass the steps of a model, with those of :func:`published` as a suggestion."""
    steps = published(model_type, size)
    call = "Preprocessing(resize=..., crop=..., mean=..., std=...)" if steps is None else repr(steps)
    origin = (
        "The numbers are those with which the model was trained"
        if steps is None
        else f"These are the numbers of the published {model_type} models; use those with which yours was trained"
    )
    return (
        f"Pass preprocessing={call} to VideoClassifier or to VideoClassifier.from_pretrained, with Preprocessing from "
        f"captum_staa.models; or your function of frames, such as weights.transforms() of torchvision. {origin}."
    )


def _model_in(folder: Path) -> tuple[str | None, tuple[int, int] | None]:
    """Return ``model_type`` and ``(height, width)`` in the ``config.json`` of a folder, as far as it has them."""
    try:
        config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return None, None
    edges: Any = config.get("image_size", config.get("crop_size"))
    edges = [edges, edges] if isinstance(edges, int) else edges
    fits = isinstance(edges, list) and len(edges) == 2 and all(isinstance(edge, int) and edge > 0 for edge in edges)
    return str(config.get("model_type")), (edges[0], edges[1]) if fits else None


def _size(settings: Mapping[str, Any], key: str) -> int | tuple[int, int] | None:
    """Return a size as an edge, ``(height, width)`` or None, from one of the formats that processors use."""
    size = settings.get(key)
    if size is None:
        return None
    if isinstance(size, Mapping):
        size = {name: value for name, value in size.items() if value is not None}
        if set(size) == {"shortest_edge"} and key == "size":
            return int(size["shortest_edge"])
        if set(size) == {"height", "width"}:
            return int(size["height"]), int(size["width"])
    elif isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    elif isinstance(size, int):
        return size
    raise ValueError(
        f"{key} in a processor config must be an int, {{'height': h, 'width': w}} or (for size) "
        f"{{'shortest_edge': n}}, got {settings[key]!r}. Pass the steps with preprocessing=Preprocessing(...)."
    )


def _channels(settings: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    value = settings.get(key)
    values = [value] * 3 if isinstance(value, (int, float)) else value
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise ValueError(f"{key} in a processor config must be a number or three numbers, got {value!r}")
    return float(values[0]), float(values[1]), float(values[2])


def as_frames(frames: object, name: str = "frames", axes: str = "T, H, W, 3") -> np.ndarray:
    """Check frames and return them as a uint8 array.

    Args:
        frames: the frames, an array or a tensor.
        name: name of the argument in error messages.
        axes: the expected axes. The last one has size 3.

    Raises:
        TypeError: ``frames`` is neither an array nor a tensor, or not uint8.
        ValueError: ``frames`` has other axes or is empty.
    """
    if not isinstance(frames, (np.ndarray, Tensor)):
        advice = "Read a file with io.read_video(path).frames"
        if hasattr(frames, "frames"):
            advice = "Pass video.frames"
        elif isinstance(frames, (list, tuple)):
            advice = "Join the frames with np.stack"
        raise TypeError(f"{name} must be a uint8 array or tensor ({axes}), got {type(frames).__name__}. {advice}.")
    if isinstance(frames, Tensor):
        check_dense(frames, name)
    array = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else frames
    if array.dtype != np.uint8:
        raise TypeError(
            f"{name} must be uint8 with values 0..255, got {array.dtype} of shape {tuple(array.shape)}. "
            f"Convert values in 0..1 with (values * 255).round() and a cast to uint8."
        )
    if array.ndim != len(axes.split(",")) or array.shape[-1] != 3 or 0 in array.shape:
        raise ValueError(
            f"{name} must be non-empty and ({axes}), got shape {tuple(array.shape)}. "
            f"Move channels to the last axis, repeat a gray channel three times, and drop an alpha channel."
        )
    return array


def _center_crop(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the center crop of frames ``(T, H, W, 3)``. Pixels outside the frame are 0."""
    (rows, columns), (height, width) = frames.shape[1:3], size
    top, left = (rows - height) // 2, (columns - width) // 2
    beyond = (max(0, -top), max(0, top + height - rows)), (max(0, -left), max(0, left + width - columns))
    if any(map(any, beyond)):
        frames = np.pad(frames, [(0, 0), *beyond, (0, 0)])
    top, left = max(0, top), max(0, left)
    return frames[:, top : top + height, left : left + width]


# --- preprocessing by a function of the user --------------------------------------------------------------------------

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
