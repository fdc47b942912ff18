"""``VideoClassifier``: wraps any video model as a module that returns logits and knows its layout, labels and grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor, nn

from captum_staa._utils.checks import check_count
from captum_staa._utils.model_state import eval_mode, uncompiled
from captum_staa.layout import VideoLayout
from captum_staa.models.families import Family, family_of, wrapped_family
from captum_staa.models.labels import index_of, labels_of
from captum_staa.models.loading import HUB_OPTIONS, load
from captum_staa.models.logits import logits_of
from captum_staa.models.preprocessing import as_frames

if TYPE_CHECKING:
    import os

    import numpy as np

    from captum_staa.grid import TokenGrid
    from captum_staa.models.preprocessing import Preprocessing

DEFAULT_FRAMES = 16  # frames per clip for models that accept any number


class VideoClassifier(nn.Module):
    """A video model that Captum can explain. It takes clips and returns logits ``(B, K)``, with contiguous gradients.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv3d(3, 2, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten())
        >>> clf = VideoClassifier(net, layout="BCTHW", labels=["waving", "jumping"], num_frames=8)
        >>> clip = torch.rand(1, 3, 8, 16, 16)
        >>> clf(clip).shape, clf.class_index("Jumping")
        (torch.Size([1, 2]), 1)
        >>> sorted(label for label, probability in clf.predict(clip))
        ['jumping', 'waving']

    Args:
        module: a module that takes a clip and returns logits, a tuple that begins with logits, or an output with
            ``.logits``. Its mode, ``requires_grad`` flags and dtype are not changed.
        layout: the order of the clip's axes. It is optional for a recognized transformer. If it differs from the
            transformer's own layout, clips are converted.
        labels: the K class names in the order of the logits. None uses the labels of a Hugging Face model's config.
        family: description of a transformer. None uses the family of a recognized Hugging Face model.
        num_frames: number of frames per clip. None uses the family's value, or accepts any number.
        image_size: ``(H, W)`` of the clip in pixels. None uses the family's value, or accepts any size.
        preprocessing: conversion of frames to clips. If it is None, :meth:`preprocess` raises an error.

    Attributes:
        module, layout, labels, family, num_frames, image_size, preprocessing: as above.
        grid: the :class:`TokenGrid` of a transformer, None for other models.

    Raises:
        TypeError: ``module`` is not an ``nn.Module``, ``labels`` is a single string, or a size is not an integer.
        ValueError: ``layout`` is None and the model is not a recognized transformer, or a size is below 1.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: VideoLayout | str | None = None,
        labels: Sequence[str] | None = None,
        family: Family | None = None,
        num_frames: int | None = None,
        image_size: tuple[int, int] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"module must be an nn.Module, got {type(module).__name__}. Load a model by its name with "
                f"VideoClassifier.from_pretrained(name), or call a function in the forward of an nn.Module."
            )
        if isinstance(labels, str):
            raise TypeError(f"labels must be a list with one name per class, got the string {labels!r}")
        family = family or family_of(module)
        if layout is None:
            if family is None:
                raise ValueError(
                    f"layout is required because {type(module).__name__} is not a recognized transformer, got None. "
                    f"Pass layout='BCTHW' for a 3D CNN, or 'BTCHW' if frames come before channels"
                    f"{wrapped_family(module)}"
                )
            layout = family.layout
        self.module = module
        self.training = module.training
        self.family = family
        self.layout = VideoLayout.of(layout)
        self.labels = labels_of(module) if labels is None else [str(label) for label in labels]
        if num_frames is not None:
            check_count("num_frames", num_frames)
            num_frames = int(num_frames)
        self.num_frames = num_frames or (family.num_frames(module) if family else None)
        own_size = family.image_size(module) if family else None
        self.image_size = own_size if image_size is None else edges_of(image_size)
        self.grid = self._grid()
        self.preprocessing = preprocessing

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> VideoClassifier:
        """Load a classifier by its name, in eval mode.

        Example:
            >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
            >>> clf.layout.axes, clf.num_frames
            ('BTCHW', 16)

        Args:
            name_or_path: name of a model bundled with this package, a folder with ``config.json`` and safetensors, or
                a name on the Hugging Face hub such as ``"MCG-NJU/videomae-base-finetuned-kinetics"``.
            dtype: dtype of the weights.
            device: device of the weights.
            **options: ``layout``, ``labels``, ``family``, ``num_frames``, ``image_size``, ``preprocessing`` as for
                the class; ``attn_implementation``, ``revision``, ``token``, ``cache_dir``, ``local_files_only`` as in
                transformers. Code from model repositories is never run, and pickled weights are never read.

        Returns:
            The classifier in eval mode.

        Raises:
            ValueError: the model does not exist, is not a video classifier, or has missing weights.
            TypeError: an option is unknown.
        """
        if unknown := set(options) - _OPTIONS - HUB_OPTIONS:
            raise TypeError(f"options must be among {sorted(_OPTIONS | HUB_OPTIONS)}, got {sorted(unknown)}")
        hub = {name: options.pop(name) for name in HUB_OPTIONS & set(options)}
        module, settings = load(name_or_path, read_preprocessing="preprocessing" not in options, **hub)
        return cls(module.to(device=device, dtype=dtype).eval(), **{**settings, **options})

    def forward(self, clip: Tensor, *args: Any) -> Tensor:
        """Return the logits of clips.

        Args:
            clip: floating-point tensor with five axes in :attr:`layout`, of any dtype and memory format.
            *args: passed to the module after the clip (Captum's ``additional_forward_args``).

        Returns:
            ``(B, K)`` in the module's dtype. The gradient with respect to ``clip`` is contiguous.

        Raises:
            TypeError: ``clip`` is not a tensor, or the module returned no logits.
            ValueError: ``clip`` does not have the shape that the model takes, or the logits are not ``(B, K)``.
        """
        if not torch.jit.is_tracing():  # during tracing, sizes are tensors, and comparing them causes warnings
            self._check(clip)
        dtype = self._dtype()
        # Models permute and slice their input, so its gradient is not contiguous, but Captum (sensitivity_max) calls
        # .view on it. Flattening costs nothing in the forward pass, and makes the gradient contiguous.
        clip = clip.reshape(-1).view(clip.shape)
        if dtype is not None and clip.is_floating_point():
            clip = clip.to(dtype)
        name = None
        if self.family is not None:
            name = self.family.input_name
            if self.family.layout != self.layout.axes:
                clip = VideoLayout.of(self.family.layout).from_working(self.layout.to_working(clip))
        try:
            output = self.module(clip, *args) if name is None or args else self.module(**{name: clip})
        except RuntimeError as error:
            self._hint_at_swapped_axes(clip, error)
            raise
        logits = logits_of(output)
        return logits if dtype is None else logits.to(dtype)

    def preprocess(self, frames: np.ndarray | Tensor) -> Tensor:
        """Convert frames, for example from :func:`captum_staa.io.read_video`, to the clip that the model takes.

        Args:
            frames: uint8 ``(T, H, W, 3)``, RGB. T must be :attr:`num_frames` unless that is None.

        Returns:
            float32 clip with batch size 1, in :attr:`layout`, on the device of the module.

        Raises:
            TypeError: ``frames`` is neither an array nor a tensor, or not uint8.
            ValueError: the classifier has no preprocessing, or ``frames`` has another shape or number of frames.
        """
        preprocessing, pixels = self._preprocessing(), as_frames(frames)
        if self.num_frames is not None and len(pixels) != self.num_frames:
            raise ValueError(
                f"frames must have {self.num_frames} frames, got {len(pixels)} (shape {pixels.shape}). Use "
                f"read_video(..., num_frames={self.num_frames}), or select frames evenly with "
                f"frames[np.linspace(0, len(frames) - 1, {self.num_frames}).round().astype(int)]."
            )
        clip = preprocessing(pixels)  # (1, T, C, H, W)
        tensor = next(iter(self.module.parameters()), clip)
        return self.layout.from_working(clip).contiguous().to(tensor.device)

    def crop_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Return the region of the original frame that the model sees, ``(top, left, height, width)`` in pixels.

        Args:
            height: height of the original frames.
            width: width of the original frames.

        Raises:
            ValueError: the classifier has no preprocessing.
        """
        return self._preprocessing().crop_box(height, width)

    @torch.no_grad()
    def predict(self, clip: Tensor, k: int = 5) -> list[tuple[str, float]] | list[list[tuple[str, float]]]:
        """Return the ``k`` most likely classes, computed in eval mode.

        Args:
            clip: clips in :attr:`layout`.
            k: number of classes. If it is larger than K, all K classes are returned.

        Returns:
            ``[(label, probability), ...]`` in descending order of probability for a batch of one, and a list of such
            lists, one per clip, for a larger batch. A class without a label is named by its index, ``"3"``.

        Raises:
            TypeError: ``k`` is not an integer.
            ValueError: ``k`` is not positive, the clip has another shape, or the number of labels is not K.
        """
        check_count("k", k, of="classes")
        with eval_mode(self):
            logits = self(clip)
        labels = self.label_names(logits.shape[1])
        top = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1).topk(min(k, len(labels)))
        rows = [
            [(labels[index], value) for value, index in zip(values, indices, strict=True)]
            for values, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        return rows[0] if len(rows) == 1 else rows

    def label_names(self, count: int) -> list[str]:
        """Return one name per class: the labels, or the class indices if there are no labels.

        Args:
            count: K, the number of logits of the model.

        Raises:
            ValueError: the number of labels is not K.
        """
        labels = self.labels or [str(index) for index in range(count)]
        if len(labels) != count:
            raise ValueError(
                f"labels must contain one label for each of the {count} logits of the model, got {len(labels)} labels"
            )
        return labels

    def class_index(self, label_or_index: str | SupportsIndex) -> int:
        """Return the class index of a label, for Captum's ``target``.

        Args:
            label_or_index: a label (upper and lower case are equal), or an index 0..K-1, which is checked and returned.

        Raises:
            ValueError: the label does not exist or belongs to several classes, or the index is out of range.
            TypeError: ``label_or_index`` is neither a string nor an integer.
        """
        count = len(self.labels) if self.labels else getattr(getattr(self.module, "config", None), "num_labels", None)
        return index_of(label_or_index, self.labels or [], count)

    def extra_repr(self) -> str:
        classes = "unnamed classes" if self.labels is None else f"{len(self.labels)} classes"
        return f"layout={self.layout.axes}, num_frames={self.num_frames}, image_size={self.image_size}, {classes}"

    def _grid(self) -> TokenGrid | None:
        """Return the family's grid, scaled to :attr:`num_frames` and :attr:`image_size`."""
        grid = self.family.grid(self.module) if self.family else None
        if grid is None:
            return None
        height, width = self.image_size or grid.pixels[1:]
        t, h, w = grid.tubelet
        return replace(grid, t=(self.num_frames or grid.pixels[0]) // t, h=height // h, w=width // w)

    def _dtype(self) -> torch.dtype | None:
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), None)

    def _preprocessing(self) -> Preprocessing:
        if self.preprocessing is None:
            raise ValueError(
                "preprocessing is required to convert frames, got None. Pass "
                "VideoClassifier(..., preprocessing=Preprocessing(resize=..., crop=..., mean=..., std=...)) from "
                "captum_staa.models.preprocessing, or Preprocessing.from_folder(folder) with the model's files."
            )
        return self.preprocessing

    def _check(self, clip: Tensor) -> None:
        """Raise ValueError for clips that would fail inside the module, or be read with the wrong axes."""
        self.layout.check(clip, "clip")
        sizes = self.layout.size(clip)
        frames, channels = sizes["T"], sizes["C"]
        config = getattr(self.module, "config", None) if self.family else None
        expected = getattr(config, "num_channels", getattr(config, "in_chans", None))
        received = f"(clip of shape {tuple(clip.shape)} in layout {self.layout.axes})"
        axes = f"{self.layout.time}, {self.layout.channel}"
        if (expected not in (None, channels) and frames == expected) or (
            self.num_frames not in (None, frames) and channels == self.num_frames
        ):
            raise ValueError(
                f"the channel and time axes of the clip are swapped: got {channels} channels and {frames} frames "
                f"{received}. Pass clip.transpose({axes}), or the layout of the clips to "
                f"VideoClassifier(..., layout=...)."
            )
        if expected not in (None, channels):
            raise ValueError(
                f"clip must have {expected} channels, got {channels} {received}. RGB frames have 3 channels."
            )
        if self.num_frames not in (None, frames):
            raise ValueError(
                f"clip must have {self.num_frames} frames, got {frames} {received}. Use "
                f"read_video(..., num_frames={self.num_frames})."
            )
        if self.image_size is not None and self.image_size != (sizes["H"], sizes["W"]):
            raise ValueError(
                f"clip must have frames of {self.image_size[0]} x {self.image_size[1]} pixels, got {sizes['H']} x "
                f"{sizes['W']} {received}. Use clf.preprocess(frames), or resize the clip with F.interpolate."
            )
        if self.family is not None and not clip.is_floating_point():
            raise ValueError(
                f"clip must be a normalized floating-point tensor, got {clip.dtype} {received}. Use "
                f"clf.preprocess(frames)."
            )

    def _hint_at_swapped_axes(self, clip: Tensor, error: RuntimeError) -> None:
        """Raise ValueError about swapped axes if an unknown module failed and T looks like a number of channels."""
        sizes = dict(zip(self.layout.axes, clip.shape, strict=True))
        if self.family is None and sizes["T"] in (1, 3) and sizes["C"] not in (1, 3):
            raise ValueError(
                f"the module failed on a clip of shape {tuple(clip.shape)} in layout {self.layout.axes}, which has "
                f"{sizes['C']} channels and {sizes['T']} frames. These two axes are probably swapped. Pass the layout "
                f"of your clips to VideoClassifier(module, layout=...). The error of the module: {error}"
            ) from error


_OPTIONS = {"layout", "labels", "family", "num_frames", "image_size", "preprocessing"}


def classifier_of(model: object) -> VideoClassifier | None:
    """Return ``model`` as a VideoClassifier, without a ``torch.compile`` wrapper, or None if it is not one."""
    module = uncompiled(model) if isinstance(model, nn.Module) else None
    return module if isinstance(module, VideoClassifier) else None


def edges_of(image_size: object) -> tuple[int, int]:
    """Check an image size and return it as ``(height, width)`` in pixels."""
    if not isinstance(image_size, (tuple, list)) or len(image_size) != 2:
        raise TypeError(f"image_size must be (height, width) in pixels, got {image_size!r}")
    for edge in image_size:
        check_count("image_size", edge, of="pixels per edge")
    return int(image_size[0]), int(image_size[1])
