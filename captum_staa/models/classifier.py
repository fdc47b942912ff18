"""``VideoClassifier``: wraps any video model as a module that returns ``(B, K)`` and knows what its axes mean."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

import torch
from torch import Tensor, nn

from captum_staa._utils.checks import check_choice, check_count
from captum_staa._utils.model_state import eval_mode, frozen_parameters, uncompiled, without_compiling
from captum_staa._utils.networks import (
    OTHER_CHANNELS,
    SHAPES_DIFFER,
    lacks_backward,
    missing_backward,
    stated_sizes,
)
from captum_staa.layout import VideoLayout
from captum_staa.models.families import Family, Pooling, find_transformer
from captum_staa.models.labels import index_of, labels_of
from captum_staa.models.loading import HUB_OPTIONS, load
from captum_staa.models.outputs import (
    KINDS,
    Contrast,
    FunctionName,
    LastFunction,
    OutputKey,
    OutputKind,
    check_kind,
    find_outputs,
    kind_in_config,
    minus_other,
    path_of_outputs,
    probabilities,
    sums_to_one,
    tensors_in,
)
from captum_staa.models.preprocessing import Preprocessing, Transform, as_frames, how_to_state
from captum_staa.models.similarity import Similarity, references_of, sizes_in_config
from captum_staa.result import as_tuple

if TYPE_CHECKING:
    import os

    import numpy as np

    from captum_staa.grid import TokenGrid

logger = logging.getLogger(__name__)
DEFAULT_FRAMES = 16  # frames per clip for models that accept any number


class VideoClassifier(nn.Module):
    """A video model that Captum can explain. It takes clips and returns ``(B, K)``, with contiguous gradients.

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

        A network that takes two pathways, as SlowFast does, and answers a yes-no question with one logit:

        >>> class TwoPathways(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.slow, self.fast = nn.LazyLinear(1), nn.LazyLinear(1)
        ...     def forward(self, pathways):
        ...         return self.slow(pathways[0].flatten(1)) + self.fast(pathways[1].flatten(1))
        >>> pack = lambda clip: [clip[:, :, ::4], clip]
        >>> clf = VideoClassifier(TwoPathways(), layout="BCTHW", labels=["fall"], output="sigmoid", pack=pack)
        >>> clf(clip).shape, clf.predict(clip)[0][0]
        (torch.Size([1, 1]), 'fall')

    Args:
        module: a module that takes a clip and returns one row of outputs per clip, as a tensor or in a container. Its
            mode, ``requires_grad`` flags and dtype are not changed.
        layout: the order of the clip's axes. It is optional for a recognized transformer, also inside a wrapper (PEFT,
            Lightning, ``nn.DataParallel``, ``torch.compile``, your own module). If it differs from the own layout of a
            transformer that is not wrapped, clips are converted.
        labels: the K class names in the order of the outputs. None uses the labels of a Hugging Face model's config.
        family: description of a transformer. None uses the family of a recognized Hugging Face model.
        num_frames: number of frames per clip. None uses the family's value, or accepts any number.
        image_size: ``(H, W)`` of the clip in pixels. None uses the family's value, or accepts any size.
        preprocessing: conversion of frames to clips: a ``Preprocessing`` of :mod:`captum_staa.models`, or any function
            of frames, a uint8 tensor ``(T, 3, H, W)``, that returns the clip in ``layout``, such as
            ``weights.transforms()`` of torchvision. If it is None, :meth:`preprocess` raises an error.
        output: what the outputs are. ``"logits"``: one class is right, softmax follows. ``"probabilities"``: the module
            ends in a softmax or sigmoid. ``"sigmoid"``: one logit per label, each of which may be right. ``"score"``:
            numbers that are not classes (regression, similarity). None reads it from a Hugging Face config; otherwise
            it is found in the first call, and logged unless it is ``"logits"``.
        output_key: name, index or path of the output in the container that the module returns. None finds it.
        pack: differentiable function from clips ``(B, ...)`` in :attr:`layout` to what the module takes: a tuple of
            positional arguments, a dict of keyword arguments, or the single argument (a tensor or a list).

    Attributes:
        module, layout, labels, family, num_frames, image_size, preprocessing, output_key, pack: as above.
        grid: the :class:`TokenGrid` of a transformer, None for other models.
        transformer: the recognized transformer, which is ``module`` or a part of it, or None.
        notice: what must be said with the answers of this model, such as that it is a toy model; empty for most models.

    Raises:
        TypeError: ``module`` is not an ``nn.Module``, ``labels`` is a single string, or an argument has a wrong type.
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
        preprocessing: Preprocessing | Callable[[Tensor], Any] | None = None,
        *,
        output: OutputKind | None = None,
        output_key: OutputKey | None = None,
        pack: Callable[[Tensor], Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"module must be an nn.Module, got {type(module).__name__}. Load a model by its name with "
                f"VideoClassifier.from_pretrained(name), or call a function in the forward of an nn.Module."
            )
        if isinstance(labels, str):
            raise TypeError(f"labels must be a list with one name per class, got the string {labels!r}")
        if output is not None:
            check_choice("output", output, KINDS)
        if pack is not None and not callable(pack):
            raise TypeError(f"pack must be a function of a clip, got {pack!r}. Pass, e.g., lambda clip: [clip, clip].")
        found = find_transformer(module, family)
        if layout is None:
            if found is None:
                raise ValueError(
                    f"layout is required because {type(module).__name__} is not a recognized transformer, and does not "
                    f"contain exactly one, got None. Pass layout='BCTHW' for a 3D CNN, or 'BTCHW' if frames come "
                    f"before channels."
                )
            layout = found.family.layout
        self.module = module
        self.training = module.training
        self.family = found.family if found else None
        self._transformer_name = found.name if found else None
        self.layout = VideoLayout.of(layout)
        inner = self.transformer or module
        self.labels = labels_of(inner) if labels is None else [str(label) for label in labels]
        if num_frames is not None:
            check_count("num_frames", num_frames)
            num_frames = int(num_frames)
        self.num_frames = num_frames or (self.family.num_frames(inner) if self.family else None)
        own_size = self.family.image_size(inner) if self.family else None
        self.image_size = own_size if image_size is None else edges_of(image_size)
        self.grid = self._grid()
        self.notice = ""
        self.preprocessing: Preprocessing | Transform | None = self._steps(preprocessing)
        self.output_key, self.pack = output_key, pack
        declared = output or kind_in_config(inner)
        self._kind: OutputKind = declared or "logits"
        self._declared = declared is not None
        self._sums_to_one = False
        self._verified = False  # whether the kind of output and the place of a wrapped transformer have been verified
        self._differentiable = False  # whether a graph without missing backward passes has been seen
        self._path: tuple[str | int, ...] | None = None  # where the output was in what the module returned
        self._other: int | Literal["rest"] | None = None
        self._ran: tuple[int, ...] | None = None  # (T, H, W) of the last clips, for the error about another size
        self._lower = False
        self.inspections: dict[Any, Any] = {}  # of captum_staa.models.inspect, by the size of clips

    @property
    def transformer(self) -> nn.Module | None:
        """The recognized transformer: :attr:`module`, or a part of it; None for other models."""
        if self._transformer_name is None:
            return None
        return uncompiled(uncompiled(self.module).get_submodule(self._transformer_name))

    @property
    def output(self) -> OutputKind:
        """What the outputs are. It is ``"logits"`` until the first call if it is neither stated nor in a config."""
        return self._kind if self._other is None else "score"

    @property
    def exclusive(self) -> bool:
        """Whether exactly one class is right: logits, or probabilities that sum to 1."""
        return self.output == "logits" or (self.output == "probabilities" and self._sums_to_one)

    @property
    def num_classes(self) -> int | None:
        """K, if the labels or the model's config tell it."""
        config = getattr(self.transformer or self.module, "config", None)
        count = getattr(config, "num_labels", None) if self.labels is None else len(self.labels)
        return count if isinstance(count, int) else None

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
            **options: ``layout``, ``labels``, ``family``, ``num_frames``, ``image_size``, ``preprocessing``,
                ``output``, ``output_key``, ``pack`` as for the class; ``attn_implementation``, ``revision``, ``token``,
                ``cache_dir``, ``local_files_only`` as in transformers. Code from model repositories is never run, and
                pickled weights are never read.

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
        notice = settings.pop("notice", "")
        classifier = cls(module.to(device=device, dtype=dtype).eval(), **{**settings, **options})
        classifier.notice = notice
        return classifier

    @classmethod
    def similarity(
        cls,
        encoder: nn.Module,
        to: Tensor | Mapping[str, Tensor],
        layout: VideoLayout | str | None = None,
        labels: Sequence[str] | None = None,
        *,
        output_key: OutputKey | None = None,
        **options: Any,
    ) -> VideoClassifier:
        """Return a model whose scores are the cosine similarities of a clip to texts or to other clips.

        Every method then explains an encoder without a head: why this clip is like that text, or like that clip.

        Example:
            >>> import torch
            >>> from transformers import VideoMAEConfig, VideoMAEModel
            >>> config = VideoMAEConfig(image_size=16, num_frames=4, patch_size=8, hidden_size=8, num_hidden_layers=1,
            ...                         num_attention_heads=1, intermediate_size=8)
            >>> encoder, reference = VideoMAEModel(config).eval(), torch.rand(1, 4, 3, 16, 16)
            >>> clf = VideoClassifier.similarity(encoder, reference, labels=["like the reference"])
            >>> clf.output, round(clf(reference).item(), 4)
            ('score', 1.0)

        Args:
            encoder: module that takes clips and returns their embeddings ``(B, D)``, tokens ``(B, N, D)``, which are
                averaged, or a container with ``video_embeds``, ``pooler_output`` or ``last_hidden_state``. Or a model
                of videos and texts, such as ``XCLIPModel`` and ``VideoPrismClipModel``.
            to: what clips are compared with, K times: embeddings ``(K, D)`` of texts or clips; reference clips in
                ``layout``, which the encoder embeds now; or, for a model of videos and texts, the tensors of K texts as
                a tokenizer returns them (``input_ids``, ``attention_mask``).
            layout: order of the axes of clips. It is optional for encoders of transformers.
            labels: a name for each of the K similarities.
            output_key: name, index or path of the embedding in what the encoder returns. None finds it.
            **options: ``family``, ``num_frames``, ``image_size``, ``preprocessing``, ``pack`` as for the class.

        Returns:
            A classifier with K outputs of kind ``"score"``, from -1 to 1. X-CLIP changes the embeddings of texts by
            what it sees in the clip; this is part of its similarity.

        Raises:
            TypeError: ``encoder`` is not a module, or ``to`` is neither a tensor nor a mapping of tensors.
            ValueError: ``to`` has another shape, or the encoder has no texts.
        """
        if unknown := set(options) - _OPTIONS | set(options) & {"output"}:
            raise TypeError(f"options must be among {sorted(_OPTIONS - {'output'})}, got {sorted(unknown)}")
        if layout is not None:
            options["layout"] = layout

        def scored(to: Tensor | Mapping[str, Tensor] | None) -> VideoClassifier:
            known = {**sizes_in_config(encoder), **options}
            return cls(
                Similarity(encoder, output_key, to), **known, labels=None if to is None else labels, output="score"
            )

        return scored(references_of(encoder, to, embed=lambda clips: scored(None)(clips)))

    def forward(self, clip: Tensor, *args: Any) -> Tensor:
        """Return the outputs for clips.

        Args:
            clip: floating-point tensor with five axes in :attr:`layout`, of any dtype and memory format.
            *args: passed to the module after the clip: further clips of a model of several inputs (RGB and flow), which
                are 5-D floating-point tensors, and Captum's ``additional_forward_args``.

        Returns:
            ``(B, K)`` in the module's dtype; ``(B, 1)`` for a single output; with further axes for an output per frame
            ``(B, T, K)`` or per pixel. The gradient with respect to ``clip`` is contiguous.

        Raises:
            TypeError: ``clip`` is not a tensor, or the module returned none.
            ValueError: ``clip`` does not have the shape that the model takes, there is not one row of outputs per clip,
                several tensors could be the output, or the outputs do not fit :attr:`output`.
        """
        eager = not (torch.jit.is_tracing() or torch.compiler.is_compiling())
        if eager:  # during tracing, sizes are tensors, and comparing them causes warnings
            self._check(clip)
        dtype = self._dtype()
        clip = _prepared(clip, dtype)
        args = tuple(_prepared(value, dtype) if _is_clip(value) else value for value in args)
        if not eager or self._verified:
            outputs = self._outputs(clip, args)
        else:
            with _same_clip(self, clip), LastFunction() as last:
                outputs = self._outputs(clip, args)
            if not (self.training or self.module.training or outputs.is_meta):
                self._verify(outputs, last.name(outputs))
        if eager and not self._differentiable and clip.requires_grad and outputs.requires_grad:
            self._watch_gradient(outputs, clip.detach(), args)
        if eager:
            self._ran = tuple(self.layout.extent(clip))
        if self._other is not None:
            outputs = minus_other(outputs, self._kind, self._other)
        if self._lower:
            if outputs.shape[1:] != (1,):
                raise ValueError(
                    f"toward needs a model with one output, got outputs of shape {tuple(outputs.shape)}. To explain a "
                    f"class against another, use versus."
                )
            outputs = 1 - outputs if self._kind == "probabilities" else -outputs
        outputs = outputs if dtype is None else outputs.to(dtype)
        return outputs if self.contrasted is None or not eager else Contrast.of(outputs, self.check_target)

    def preprocess(self, frames: np.ndarray | Tensor) -> Tensor:
        """Convert frames, for example from :func:`captum_staa.io.read_video`, to the clip that the model takes.

        Args:
            frames: uint8 ``(T, H, W, 3)``, RGB. T must be :attr:`num_frames` unless that is None.

        Returns:
            float32 clip with batch size 1, in :attr:`layout`, on the device of the module.

        Raises:
            TypeError: ``frames`` is neither an array nor a tensor, or not uint8.
            ValueError: preprocessing is missing, or ``frames`` has another shape or number of frames.
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
            ValueError: preprocessing is missing.
        """
        return self._preprocessing().crop_box(height, width)

    def how_to_preprocess(self) -> str:
        """Return sentences for error messages: how to pass the preprocessing, with the usual one of the family."""
        return how_to_state(self.family.name if self.family else None, self.image_size)

    @torch.no_grad()
    def predict(
        self, clip: Tensor | tuple[Tensor, ...], k: int = 5
    ) -> list[tuple[str, float]] | list[list[tuple[str, float]]]:
        """Return the ``k`` most likely classes or highest scores, computed in eval mode.

        Args:
            clip: clips in :attr:`layout`, or a tuple of the inputs of a model of several (RGB and flow).
            k: number of classes. If it is larger than K, all K classes are returned.

        Returns:
            ``[(label, probability), ...]`` in descending order for a batch of one, and a list of such lists, one per
            clip, for a larger batch. Probabilities follow :attr:`output`: a softmax of logits, a sigmoid of a label's
            logit, or the model's own. For ``"score"``, the scores themselves. A class without a label is named by its
            index, ``"3"``.

        Raises:
            TypeError: ``k`` is not an integer.
            ValueError: ``k`` is not positive, the clip has another shape, the outputs have further axes, or the number
                of labels is not K.
        """
        check_count("k", k, of="classes")
        with eval_mode(self):
            outputs = self(*as_tuple(clip, "clip"))
        if outputs.ndim != 2:
            raise ValueError(
                f"the model must return outputs (B, K) to predict, got shape {tuple(outputs.shape)}. Average the other "
                f"axes in the module, or read clf(clip) yourself. Methods explain one output with a tuple as target."
            )
        labels = self.label_names(outputs.shape[1])
        top = self.values(outputs).topk(min(k, len(labels)))
        rows = [
            [(labels[index], value) for value, index in zip(values, indices, strict=True)]
            for values, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        return rows[0] if len(rows) == 1 else rows

    def values(self, outputs: Tensor) -> Tensor:
        """Return what a reader is shown for outputs of this model: probabilities, or scores for ``"score"``.

        Args:
            outputs: ``(B, K)`` as the model returned them.

        Returns:
            ``(B, K)`` in float32 or wider.
        """
        if self.output == "score":
            return outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        return probabilities(outputs, self.output, self.num_classes)

    def versus(self, other: str | SupportsIndex) -> VideoClassifier:
        """Return the same model with the output of another class subtracted: explanations then say why A and not B.

        Example:
            >>> import torch
            >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
            >>> clip = torch.rand(1, 16, 3, 48, 48)
            >>> logits = clf(clip)
            >>> torch.allclose(clf.versus(1)(clip)[:, 0], logits[:, 0] - logits[:, 1])
            True

        Args:
            other: label or index of the other class, or ``"rest"`` for all other classes together, which gives the log
                odds of each class. A label that is ``"rest"`` itself is meant by its index.

        Returns:
            A classifier that shares the module. Its output is a score per class, in units of a logit. That of the
            other class itself is always 0, so to select it is a ValueError, also when a method of Captum does it.

        Raises:
            ValueError: the class does not exist, or the model has a single output.
        """
        if self._other is not None:
            raise ValueError(
                "versus must be called once, got a classifier that is a difference already. Call it "
                "on the classifier of which this one was made: clf.alone()."
            )
        contrasted = copy.copy(self)
        contrasted._other = "rest" if other == "rest" else self.class_index(other)
        if self.num_classes == 1:
            raise ValueError(
                f"versus needs a model with several classes, got one output, {self.label_names(1)}. Attributions of "
                f"one output already say what raises it (positive) and what lowers it (negative)."
            )
        return contrasted

    def check_target(self, target: Any) -> None:
        """Raise ValueError if a target is the class whose output :meth:`versus` subtracted: its map would be zero.

        Args:
            target: class indices as Captum takes them.
        """
        other = self.contrasted
        if other is None or target is None:
            return
        rows = target.reshape(-1).tolist() if isinstance(target, Tensor) else target
        rows = rows if isinstance(rows, list) else [rows]
        classes = [row[0] if isinstance(row, tuple) and row else row for row in rows]
        if other in classes:
            name = self.label_names(self.num_classes or other + 1)[other]
            row = "" if len(classes) == 1 else f" in row {classes.index(other)} of the batch"
            raise ValueError(
                f"target must differ from the class of versus, got {name!r} (index {other}) for both{row}, whose "
                f"difference is 0 for every clip. Pass the class to explain as target, such as clf(clip).argmax(1), "
                f"and the class to compare it with to versus."
            )

    @property
    def contrasted(self) -> int | None:
        """Index of the class whose output :meth:`versus` subtracts; None for other models and for ``"rest"``."""
        return None if self._other == "rest" else self._other

    @property
    def against_rest(self) -> bool:
        """Whether outputs are those of ``versus("rest")``."""
        return self._other == "rest"

    def alone(self) -> VideoClassifier:
        """Return the classifier of which :meth:`versus` made this one, or this one."""
        if self._other is None:
            return self
        single = copy.copy(self)
        single._other = None
        return single

    def toward(self, direction: Literal["higher", "lower"]) -> VideoClassifier:
        """Return the same model of one output, for explanations of what makes the output higher or lower.

        Example:
            >>> import torch
            >>> net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 8 * 8, 1))
            >>> clf = VideoClassifier(net, layout="BCTHW", output="score")
            >>> clip = torch.rand(1, 3, 4, 8, 8)
            >>> bool(clf.toward("lower")(clip) == -clf(clip))
            True

        Args:
            direction: ``"higher"`` returns this classifier. ``"lower"`` returns one that shares the module, with the
                output negated, or one minus a probability.

        Raises:
            ValueError: the direction is unknown. When called, if the model has several outputs.
        """
        check_choice("direction", direction, ("higher", "lower"))
        if direction == "higher":
            return self
        opposite = copy.copy(self)
        opposite._lower = not self._lower
        return opposite

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
                f"labels must contain one label for each output of the model, {count} here, got {len(labels)}: "
                f"{labels[:5]}. "
                + ("Pass the label of a high output alone." if count == 1 else "Pass all, in the order of the outputs.")
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
        return index_of(label_or_index, self.labels or [], self.num_classes)

    def read_tokens(self, clip: Tensor, *args: Any) -> Pooling:
        """Return what the head reads of the transformer's last tokens, measured if the family does not know it.

        Args:
            clip: clips in :attr:`layout`.
            *args: further positional arguments of the module.

        Raises:
            ValueError: the head reads the tokens neither by their mean nor by the first one alone, or has no gradient.
        """
        assert self.family is not None and self.transformer is not None
        if (stated := self.family.pooling(self.transformer)) is not None:
            return stated(self, clip, *args) if callable(stated) and not isinstance(stated, Tensor) else stated
        read: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            read.append(next(tensor for _, tensor in tensors_in(output) if tensor.ndim == 3))

        handle = self.transformer.register_forward_hook(keep)
        source = clip.detach().to(self._dtype() or clip.dtype, copy=True).requires_grad_()
        try:
            with torch.enable_grad(), frozen_parameters(self), without_compiling():
                outputs = self._outputs(source, args)
                weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs)
                known = outputs.requires_grad and not lacks_backward(outputs.grad_fn, read[-1].grad_fn)
                score = (outputs * weights).sum()
                slope = torch.autograd.grad(score, read[-1], allow_unused=True)[0] if known else None
        finally:
            handle.remove()
        if slope is None:
            raise ValueError(
                f"the head must be differentiable to measure which tokens of {self._transformer_name!r} it reads, got "
                f"a head without a gradient, such as a quantized one. State what it reads: VideoClassifier(..., "
                f"family=dataclasses.replace(family, pooling=lambda model: 'mean')), or 'cls' for the first token."
            )
        gradient = slope.float()  # (B, N, D)
        size = gradient.abs().max()
        if bool(gradient[:, 1:].abs().max() <= 1e-6 * size):
            return "cls"
        if bool((gradient - gradient.mean(1, keepdim=True)).abs().max() <= 1e-3 * size):
            return "mean"
        raise ValueError(
            f"the head must read the mean of the tokens of {self._transformer_name!r} or the first token alone, got a "
            f"head that reads them in another way, so that attention rollout does not know where to begin. Use "
            f"STAA(mode='relevance'), or state it with family=dataclasses.replace(family, pooling=...)."
        )

    def __repr__(self) -> str:
        """Return one line. ``print(clf.module)`` shows the modules inside."""
        classes = "unnamed classes" if self.labels is None else f"{len(self.labels)} classes"
        own = "" if self.transformer is None else f", transformer={type(self.transformer).__name__}"
        inside = f" in {self._transformer_name!r}" if self._transformer_name else ""
        packed = "" if self.pack is None else ", packed"
        versus = "" if self._other is None else f", versus={self._other!r}"
        toward = ", toward='lower'" if self._lower else ""
        return (
            f"{type(self).__name__}({type(uncompiled(self.module)).__name__}, layout={self.layout.axes!r}, "
            f"num_frames={self.num_frames}, image_size={self.image_size}, {classes}, output={self.output!r}"
            f"{own}{inside}{packed}{versus}{toward})"
        )

    def _call(self, clip: Tensor, args: tuple[Any, ...]) -> Any:
        """Return what the module returns for clips of its dtype."""
        if self.pack is not None:
            packed = self.pack(clip)
            if clip.requires_grad and not any(tensor.requires_grad for _, tensor in tensors_in(packed)):
                raise ValueError(
                    "pack must return tensors that depend differentiably on the clip, got none that requires a "
                    "gradient. Leave out detach(), numpy() and torch.no_grad() in pack."
                )
            try:
                if isinstance(packed, Mapping):
                    return self.module(*args, **packed)
                return self.module(*(packed if isinstance(packed, tuple) else (packed,)), *args)
            except TypeError as error:
                self._hint_at_pack(clip, error, packed)
                raise
        name = None
        if self.family is not None and self._transformer_name == "":
            name = self.family.input_name
            if name is not None and any(map(_is_clip, args)):
                raise ValueError(
                    f"{type(self.module).__name__} takes one clip tensor, got {1 + sum(map(_is_clip, args))} clips. "
                    f"Pass one clip."
                )
            if self.family.layout != self.layout.axes:
                clip = VideoLayout.of(self.family.layout).from_working(self.layout.to_working(clip))
        try:
            return self.module(clip, *args) if name is None or args else self.module(**{name: clip})
        except RuntimeError as error:
            self._hint_at_batch(clip, error)
            self._hint_at_swapped_axes(clip, error)
            self._hint_at_size(clip, error)
            raise
        except AssertionError as error:  # torch.export
            self._hint_at_batch(clip, error)
            raise
        except (TypeError, ValueError, IndexError) as error:
            self._hint_at_pack(clip, error)
            raise

    def _outputs(self, clip: Tensor, args: tuple[Any, ...]) -> Tensor:
        returned, key = self._call(clip, args), self.output_key
        if key is None and not isinstance(returned, Tensor):
            # in a batch of K clips, K scores per clip can look like the clips per score
            key = self._path = path_of_outputs(returned, len(clip), self.num_classes, self._path)
        return find_outputs(returned, len(clip), key=key)

    def _watch_gradient(self, outputs: Tensor, clip: Tensor, args: tuple[Any, ...]) -> None:
        """Make the backward of outputs an error if it would miss a part of the gradient: Captum does not check it."""
        if not lacks_backward(outputs.grad_fn):
            self._differentiable = True
            return

        def refuse(gradient: Tensor) -> None:
            raise ValueError(missing_backward(self.module, lambda: self._outputs(clip.clone().requires_grad_(), args)))

        outputs.register_hook(refuse)

    def _verify(self, outputs: Tensor, last: FunctionName | None) -> None:
        """Check :attr:`output` against the outputs of the first call, or find it.

        Args:
            outputs: outputs in eval mode.
            last: the function that computed them, if it is known.
        """
        self._sums_to_one = sums_to_one(outputs)
        if self._declared:
            check_kind(outputs, self._kind, last)
        else:
            if last is not None or self._sums_to_one:
                self._kind = "probabilities"
            elif outputs.shape[1:] == (1,):
                self._kind = "score"
            if self._kind != "logits":
                logger.warning(
                    "The outputs of %s were taken as output=%r. Pass VideoClassifier(..., output=...) with one of %s "
                    "to state what they are.",
                    type(uncompiled(self.module)).__name__,
                    self._kind,
                    ", ".join(KINDS),
                )
        self._verified = True

    def _grid(self) -> TokenGrid | None:
        """Return the family's grid, scaled to :attr:`num_frames` and :attr:`image_size`."""
        grid = self.family.grid(self.transformer) if self.family else None
        if grid is None:
            return None
        height, width = self.image_size or grid.pixels[1:]
        t, h, w = grid.tubelet
        return replace(grid, t=(self.num_frames or grid.pixels[0]) // t, h=height // h, w=width // w)

    def _dtype(self) -> torch.dtype | None:
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), None)

    def _steps(self, preprocessing: Any) -> Preprocessing | Transform | None:
        if preprocessing is None or isinstance(preprocessing, (Preprocessing, Transform)):
            return preprocessing
        if not callable(preprocessing):
            raise TypeError(
                f"preprocessing must be a Preprocessing or a function of frames, a uint8 tensor (T, 3, H, W), got "
                f"{preprocessing!r}. Pass for example weights.transforms() of torchvision."
            )
        return Transform(preprocessing, self.layout, self.num_frames)

    def _preprocessing(self) -> Preprocessing | Transform:
        if self.preprocessing is None:
            raise ValueError(f"preprocessing is required to convert frames, got None. {self.how_to_preprocess()}")
        return self.preprocessing

    def _check(self, clip: Tensor) -> None:
        """Raise ValueError for clips that would fail inside the module, or be read with the wrong axes."""
        self.layout.check(clip, "clip")
        sizes = self.layout.size(clip)
        frames, channels = sizes["T"], sizes["C"]
        config = getattr(self.transformer, "config", None)
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
        channels = OTHER_CHANNELS.search(str(error))  # as torch words it: of the weight, of the input
        swapped = channels and (int(channels[1]), int(channels[2])) == (sizes["C"], sizes["T"])
        if self.family is None and (swapped or (sizes["T"] in (1, 3) and sizes["C"] not in (1, 3))):
            raise ValueError(
                f"the module failed on a clip of shape {tuple(clip.shape)} in layout {self.layout.axes}, which has "
                f"{sizes['C']} channels and {sizes['T']} frames. These two axes are probably swapped. Pass the layout "
                f"that the module takes to VideoClassifier(module, layout=...). The error of the module: {error}"
            ) from error

    def _hint_at_batch(self, clip: Tensor, error: Exception) -> None:
        """Raise ValueError about the number of clips if a traced or exported module is of one number alone."""
        traced = isinstance(self.module, (torch.jit.ScriptModule, torch.fx.GraphModule))
        if traced and (SHAPES_DIFFER.search(str(error)) or "Guard failed" in str(error)):
            raise ValueError(
                f"a traced or exported module must take any number of clips of its size, got an error on clips of "
                f"shape {tuple(clip.shape)}. It was perhaps made for another size, or another number of clips alone. "
                f"Pass the module itself, or export it with dynamic_shapes. The error of the module: {error}"
            ) from error

    def _hint_at_size(self, clip: Tensor, error: RuntimeError) -> None:
        """Raise ValueError about the size of the clip if an unknown module failed because shapes do not fit."""
        if self.family is None and SHAPES_DIFFER.search(str(error)):
            sizes = dict(zip(self.layout.axes, clip.shape, strict=True))
            stated = ", ".join(f"{name}={value}" for name, value in stated_sizes(self.module).items())
            ran = [f"ran before on {t} frames of {h} x {w} pixels" for t, h, w in filter(None, [self._ran])]
            expected = " and ".join([f"has {stated}"] * bool(stated) + ran) or "does not state its size"
            raise ValueError(
                f"clips must have the size for which the module was built ({type(self.module).__name__} {expected}), "
                f"got {sizes['T']} frames of {sizes['H']} x {sizes['W']} pixels (shape {tuple(clip.shape)} in layout "
                f"{self.layout.axes}). Resize the clip with F.interpolate, or pass other frames; state the size with "
                f"VideoClassifier(..., num_frames=, image_size=). The error of the module: {error}"
            ) from error

    def _hint_at_pack(self, clip: Tensor, error: Exception, packed: Any = None) -> None:
        """Raise ValueError about ``pack`` if a module failed because it takes something else than it was passed."""
        if not _OTHER_ARGUMENTS.search(str(error)):
            return
        if self.pack is not None:
            several = f" of {len(packed)}" if isinstance(packed, (tuple, list, Mapping)) else ""
            returned = f"a {type(packed).__name__}{several}"
            raise ValueError(
                f"pack must return what the module takes, got {returned} and {error}. Return a list to pass all "
                f"tensors as a single argument, a tuple for positional arguments, or a dict for keyword arguments. "
                f"Further inputs and additional_forward_args follow it."
            ) from error
        if self.family is None:
            raise ValueError(
                f"the module must take a clip as one tensor, got {error} for a clip of shape {tuple(clip.shape)}. If "
                f"it takes a list of pathways, a dict or several tensors, pass pack=, a function from the clip to them."
            ) from error


_OTHER_ARGUMENTS = re.compile(
    r"to unpack|positional argument|unexpected keyword argument|Dimension out of range|too many indices"
)
_OPTIONS = {
    *("layout", "labels", "family", "num_frames", "image_size", "preprocessing", "output", "output_key", "pack"),
}


@contextmanager
def _same_clip(classifier: VideoClassifier, clip: Tensor) -> Iterator[None]:
    """Check that a transformer inside a wrapper gets the clip that the wrapper gets, in the transformer's layout."""
    if not classifier._transformer_name:  # no transformer, or no wrapper
        yield
        return
    assert classifier.family is not None and classifier.transformer is not None
    inner, own = classifier.transformer, VideoLayout.of(classifier.family.layout)
    sizes = dict(zip(classifier.layout.axes, clip.shape, strict=True))
    expected = tuple(sizes[axis] for axis in own.axes)

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        got = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if got is not None and tuple(got.shape) != expected:
            raise ValueError(
                f"layout must be the order of the axes of the clips that {type(classifier.module).__name__} takes, got "
                f"{classifier.layout.axes!r}: its {type(module).__name__} ({classifier._transformer_name!r}) then gets "
                f"shape {tuple(got.shape)} for a clip of shape {tuple(clip.shape)}, and not {expected}. Pass another "
                f"layout; if the module crops, resizes or splits clips, pass the clips that the transformer takes."
            )

    handle = inner.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _is_clip(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 5 and value.is_floating_point()


def _prepared(clip: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a clip in the dtype of a module, whose gradient is contiguous.

    Models permute and slice their input, so its gradient is not contiguous, but Captum (sensitivity_max) calls .view on
    it. Flattening costs nothing in the forward pass, and makes the gradient contiguous.
    """
    clip = clip.reshape(-1).view(clip.shape)
    return clip.to(dtype) if dtype is not None and clip.is_floating_point() else clip


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
