"""Any video model as a module that returns plain logits, with what Captum and this library need to know about it."""

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

DEFAULT_FRAMES = 16  # of a clip, where a model takes any number


class VideoClassifier(nn.Module):
    """A video model that Captum can explain: a clip in, logits ``(B, K)`` out, contiguous gradients back.

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
        module: takes a clip, and gives logits, a tuple that begins with them, or an output with ``.logits``. It is
            kept as it is: mode, gradients and dtype stay its owner's.
        layout: the order of the clip's axes. May be left out for a recognized transformer; there, another order than
            the transformer's own is carried over.
        labels: the K class names in order; a Hugging Face model brings its own.
        family: the facts about a transformer; recognized Hugging Face models bring their own.
        num_frames: frames per clip; None accepts any number, or takes the family's.
        image_size: ``(H, W)`` of the clip; None accepts any, or takes the family's.
        preprocessing: from frames to clips; None leaves :meth:`preprocess` without an answer.

    Attributes:
        module, layout, labels, family, num_frames, image_size, preprocessing: as above.
        grid: the transformer's :class:`TokenGrid`, None for other models.

    Raises:
        TypeError: ``module`` is no ``nn.Module``, ``labels`` is a single string, or a size is no whole number.
        ValueError: there is neither a layout nor a family to take it from, or a size is below 1.
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
                f"module must be an nn.Module, got {type(module).__name__}; "
                f"VideoClassifier.from_pretrained(name) loads one by name, a function goes into a module's forward"
            )
        if isinstance(labels, str):
            raise TypeError(f"labels must be a list with one name per class, got the string {labels!r}")
        family = family or family_of(module)
        if layout is None:
            if family is None:
                raise ValueError(
                    f"{type(module).__name__} is no transformer that is known here, so its layout must be given: "
                    f"VideoClassifier(module, layout='BCTHW') for a 3D CNN, 'BTCHW' where frames come first"
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
        """A classifier by name, in eval mode.

        Example:
            >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
            >>> clf.layout.axes, clf.num_frames
            ('BTCHW', 16)

        Args:
            name_or_path: a model shipped with this package, a folder with ``config.json`` and safetensors, or a
                name on the Hugging Face hub such as ``"MCG-NJU/videomae-base-finetuned-kinetics"``.
            dtype: of the weights.
            device: of the weights.
            **options: ``layout``, ``labels``, ``family``, ``num_frames``, ``image_size``, ``preprocessing`` as for
                the class; ``attn_implementation``, ``revision``, ``token``, ``cache_dir``, ``local_files_only`` as in
                transformers. Code that comes with weights is never run, and pickled weights are never read.

        Raises:
            ValueError: there is no such model, it is no video classifier, or weights are missing from it.
            TypeError: an unknown option.
        """
        if unknown := set(options) - _OPTIONS - HUB_OPTIONS:
            raise TypeError(f"from_pretrained takes no {sorted(unknown)}, only {sorted(_OPTIONS | HUB_OPTIONS)}")
        hub = {name: options.pop(name) for name in HUB_OPTIONS & set(options)}
        module, found = load(name_or_path, read_preprocessing="preprocessing" not in options, **hub)
        return cls(module.to(device=device, dtype=dtype).eval(), **{**found, **options})

    def forward(self, clip: Tensor, *args: Any) -> Tensor:
        """Logits of clips.

        Args:
            clip: five axes in :attr:`layout`, floating point of any dtype and memory order.
            *args: passed on to the module after the clip (Captum's ``additional_forward_args``).

        Returns:
            ``(B, K)`` in the module's dtype. The gradient that reaches ``clip`` is contiguous.

        Raises:
            TypeError: ``clip`` is no tensor, or the module returned no logits.
            ValueError: ``clip`` has another shape than the model takes, or the logits are not ``(B, K)``.
        """
        if not torch.jit.is_tracing():  # sizes are tensors then, and comparing them would warn
            self._check(clip)
        dtype = self._dtype()
        # Models permute and cut their input, so its gradient comes back strided, and Captum (sensitivity_max) calls
        # .view on it. Flattening is a free view on the way in, and makes the gradient contiguous on the way back.
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
        """Frames as they come from a file to the clip that the model takes.

        Args:
            frames: uint8 ``(T, H, W, 3)``, RGB, with as many frames as the model takes.

        Returns:
            float32, batch of one, in :attr:`layout`, on the module's device.

        Raises:
            TypeError: ``frames`` is neither an array nor a tensor, or not of uint8.
            ValueError: the model came without its preprocessing, or the shape or the number of frames is another.
        """
        preprocessing, pixels = self._preprocessing(), as_frames(frames)
        if self.num_frames is not None and len(pixels) != self.num_frames:
            raise ValueError(
                f"{len(pixels)} frames came (shape {pixels.shape}), the model takes {self.num_frames}: "
                f"read_video(..., num_frames={self.num_frames}), or pick frames evenly with "
                f"frames[np.linspace(0, len(frames) - 1, {self.num_frames}).round().astype(int)]"
            )
        clip = preprocessing(pixels)  # (1, T, C, H, W)
        tensor = next(iter(self.module.parameters()), clip)
        return self.layout.from_working(clip).contiguous().to(tensor.device)

    def crop_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """``(top, left, height, width)`` in pixels of the original frame that the model sees.

        Raises:
            ValueError: the model came without its preprocessing.
        """
        return self._preprocessing().crop_box(height, width)

    @torch.no_grad()
    def predict(self, clip: Tensor, k: int = 5) -> list[tuple[str, float]] | list[list[tuple[str, float]]]:
        """The ``k`` likeliest classes, in eval mode.

        Args:
            clip: in :attr:`layout`.
            k: how many; all K where it is larger.

        Returns:
            ``[(label, probability), ...]`` from the likeliest on, for a batch of one; a list of such lists, one per
            clip, for a larger batch. A class without a label is named by its index, ``"3"``.

        Raises:
            TypeError: ``k`` is no whole number.
            ValueError: ``k`` is not positive, the clip does not fit, or there are not K labels.
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
        """A name per class: the labels, or the class indices where there are none.

        Args:
            count: K, how many logits the model gave.

        Raises:
            ValueError: there are not K labels.
        """
        labels = self.labels or [str(index) for index in range(count)]
        if len(labels) != count:
            raise ValueError(f"the model gives {count} logits, but has {len(labels)} labels: give one per class")
        return labels

    def target(self, label_or_index: str | SupportsIndex) -> int:
        """The class index of a label, for Captum's ``target``.

        Args:
            label_or_index: a label in any case, or an index 0..K-1 (which is checked and given back).

        Raises:
            ValueError: there is no such label, it names several classes, or the index is out of range.
            TypeError: neither a string nor an integer came.
        """
        count = len(self.labels) if self.labels else getattr(getattr(self.module, "config", None), "num_labels", None)
        return index_of(label_or_index, self.labels or [], count)

    def extra_repr(self) -> str:
        classes = "unnamed classes" if self.labels is None else f"{len(self.labels)} classes"
        return f"layout={self.layout.axes}, num_frames={self.num_frames}, image_size={self.image_size}, {classes}"

    def _grid(self) -> TokenGrid | None:
        """The family's grid, scaled where the owner says that clips have another size."""
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
                "this classifier does not know its preprocessing: give it one with "
                "VideoClassifier(..., preprocessing=Preprocessing(resize=..., crop=..., mean=..., std=...)) from "
                "captum_staa.models.preprocessing, or Preprocessing.from_folder(folder) of the model's own files"
            )
        return self.preprocessing

    def _check(self, clip: Tensor) -> None:
        """Raise where the module would fail deep inside, or answer for another clip than is meant."""
        self.layout.check(clip, "clip")
        sizes = self.layout.size(clip)
        frames, channels = sizes["T"], sizes["C"]
        config = getattr(self.module, "config", None) if self.family else None
        wanted = getattr(config, "num_channels", getattr(config, "in_chans", None))
        came = f"clip of shape {tuple(clip.shape)} in layout {self.layout.axes}"
        axes = f"{self.layout.time}, {self.layout.channel}"
        if (wanted not in (None, channels) and frames == wanted) or (
            self.num_frames not in (None, frames) and channels == self.num_frames
        ):
            raise ValueError(
                f"{came} has {channels} channels and {frames} frames: these two axes are swapped. Pass "
                f"clip.transpose({axes}), or say at VideoClassifier(..., layout=...) which order your clips have"
            )
        if wanted not in (None, channels):
            raise ValueError(f"{came} has {channels} channels, the model takes {wanted}: RGB frames give 3")
        if self.num_frames not in (None, frames):
            raise ValueError(
                f"{came} has {frames} frames, the model takes {self.num_frames}: "
                f"read_video(..., num_frames={self.num_frames})"
            )
        if self.image_size is not None and self.image_size != (sizes["H"], sizes["W"]):
            raise ValueError(
                f"{came} has frames of {sizes['H']} x {sizes['W']} pixels, the model takes "
                f"{self.image_size[0]} x {self.image_size[1]}: clf.preprocess(frames), or F.interpolate to that size"
            )
        if self.family is not None and not clip.is_floating_point():
            raise ValueError(f"{came} holds {clip.dtype}, the model takes normalized floats: clf.preprocess(frames)")

    def _hint_at_swapped_axes(self, clip: Tensor, error: RuntimeError) -> None:
        """A module of which nothing is known fails on a clip whose time axis looks like color: say so."""
        sizes = dict(zip(self.layout.axes, clip.shape, strict=True))
        if self.family is None and sizes["T"] in (1, 3) and sizes["C"] not in (1, 3):
            raise ValueError(
                f"the module failed on a clip of shape {tuple(clip.shape)} in layout {self.layout.axes}, which has "
                f"{sizes['C']} channels and {sizes['T']} frames: are these two axes swapped? Say the clip's order at "
                f"VideoClassifier(module, layout=...). The module said: {error}"
            ) from error


_OPTIONS = {"layout", "labels", "family", "num_frames", "image_size", "preprocessing"}


def classifier_of(model: object) -> VideoClassifier | None:
    """The classifier that a model is, compiled or not; None where it is no classifier."""
    found = uncompiled(model) if isinstance(model, nn.Module) else None
    return found if isinstance(found, VideoClassifier) else None


def edges_of(image_size: object) -> tuple[int, int]:
    """``(height, width)`` in pixels, checked."""
    if not isinstance(image_size, (tuple, list)) or len(image_size) != 2:
        raise TypeError(f"image_size is (height, width) in pixels, got {image_size!r}")
    for edge in image_size:
        check_count("image_size", edge, of="pixels per edge")
    return int(image_size[0]), int(image_size[1])
