"""ST-ABN: a video model with an attention branch at one of its layers, its explanations and counterfactuals."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from captum_staa._utils.model_state import eval_mode
from captum_staa.grid import TokenGrid
from captum_staa.layout import VideoLayout
from captum_staa.models.classifier import VideoClassifier, classifier_of
from captum_staa.models.layers import find_layer, from_features, network_of, to_features, to_pixels
from captum_staa.models.layouts import layout_of
from captum_staa.models.st_abn import storage
from captum_staa.models.st_abn.branch import Gates, Temporal
from captum_staa.models.st_abn.build import BranchConfig, Mechanism, Trunk, TrunkBody, around, build, paper
from captum_staa.models.st_abn.call import Call, check_gates
from captum_staa.models.st_abn.explanation import BranchExplanation

# What is asked of each STABN (by id) in this thread or task: nothing is kept on the module, so threads do not mix.
_CALLS: ContextVar[Mapping[int, Call]] = ContextVar("captum_staa.st_abn", default=MappingProxyType({}))


class STABN(nn.Module):
    """The Spatio-Temporal Attention Branch Network over a residual 3D CNN; :meth:`inject` adds its branch to any model.

    Example:
        >>> st_abn = STABN(num_classes=4)  # over a small 3D CNN, untrained
        >>> clip = torch.rand(1, 3, 16, 48, 48)
        >>> st_abn(clip).shape
        torch.Size([1, 4])
        >>> explanation = st_abn.explain(clip)
        >>> explanation.spatial.shape, explanation.temporal.shape, explanation.grid
        (torch.Size([1, 16, 48, 48]), torch.Size([1, 16]), (16, 6, 6))
        >>> with st_abn.override(temporal=torch.zeros(1, 16)):  # what if no frame had any weight?
        ...     bool((st_abn.explain(clip).logits != explanation.logits).any())
        True

    Args:
        num_classes: K.
        trunk: ``"small"``, a :class:`ResNet3D` whose first and last frames look like all others, for 16 frames of 48
            pixels; ``"resnet50"``, the paper's :class:`SlowResNet`; or a residual 3D CNN of your own for
            ``(B, C, T, H, W)``, its last stage at the end of ``.stages``. The branch stands in front of that stage.
        body: ``"stage"``, a copy of that stage at stride 1, as in the paper; or ``"light"``, one convolution.
        temporal: the paper's head for a ``"fixed"`` number of frames, or one for ``"any"``.
        num_frames: T of the clips; None takes the trunk's, or the paper's 32.
        dropout: in the branch, before the linear layer of its class scores.
        labels: a name per class.

    Attributes:
        model: the :class:`VideoClassifier` with the branch in it; ``model.module`` is the trunk, or what was given to
            :meth:`inject`.
        config: how the branch is built, as ``config.layer``, ``config.mechanism``.
        branch, mechanism: what was added.
        injected: whether to a model of yours, by :meth:`inject`.
        layout: the order of the clip's axes.
        grid: where the layer's tokens stand; None for a CNN.

    Raises:
        ValueError: a trunk of another kind or number of classes, or an unknown option.

    Reference:
        Mitsuhara, Hirakawa, Yamashita and Fujiyoshi, "ST-ABN: Visual Explanation Taking into Account Spatio-temporal
        Information for Video Recognition", arXiv 2110.15574.
    """

    def __init__(
        self,
        num_classes: int,
        trunk: Trunk | nn.Module = "small",
        *,
        body: TrunkBody = "stage",
        temporal: Temporal = "any",
        num_frames: int | None = None,
        dropout: float = 0.5,
        labels: list[str] | None = None,
    ) -> None:
        network, config = paper(num_classes, trunk, body, temporal, dropout)
        self._assemble(*around(network, config, labels, num_frames))
        if (found := self.branch.classify.out_features) != num_classes:
            self.remove()
            raise ValueError(f"num_classes is {num_classes}, got the trunk that gives {found}; pass the same")

    @classmethod
    def inject(
        cls,
        model: nn.Module,
        layer: str | nn.Module,
        layout: VideoLayout | str | None = None,
        grid: TokenGrid | None = None,
        *,
        mechanism: Mechanism = "residual",
        body: nn.Module | None = None,
        width: int = 32,
        maps: int | None = None,
        temporal: Temporal = "any",
        dropout: float = 0.0,
        example: Tensor | None = None,
    ) -> STABN:
        """Add a branch to a model, at a layer; its answers stay what they are until the branch is trained.

        Example:
            >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
            >>> clip = torch.rand(1, 16, 3, 48, 48)
            >>> before = clf(clip)
            >>> st_abn = STABN.inject(clf, "videomae.encoder.layer.1")
            >>> bool((st_abn(clip) == before).all()), st_abn.remove() is clf
            (True, True)

        Args:
            model: any video model. It is changed in place, by one forward hook, until :meth:`remove`.
            layer: the layer or its name, called once per forward. Its output, or the first item of the tuple that it
                returns, is ``(B, C, t, h, w)``; or, of ``grid``, tokens ``(B, N, D)``, whose prefix passes untouched,
                or frames ``(B*t, C, h, w)``.
            layout: order of the clips' axes; a :class:`VideoClassifier` and a known transformer bring their own.
            grid: where the tokens stand; those bring their own, too.
            mechanism: ``"residual"``, the features plus what is learned of their gated copies; ``"observe"``, the
                features as they are, for gates trained to mask the clip (``STABNLoss("posthoc")``); ``"mix"``, the
                paper's, which alters the answers from the start.
            body: a module from the features to any number of channels with the same t, h and w; None for a
                convolution to ``width`` channels.
            width: channels of that convolution.
            maps: maps of class evidence; None for one per class, as in the paper.
            temporal: a head for ``"any"`` number of steps, or the paper's for a ``"fixed"`` one.
            dropout: in the branch, before its class scores.
            example: a clip that the model takes, for one forward that tells the layer's shape; None takes zeros.

        Raises:
            ValueError: no such layer (near names are listed), one whose output is no grid or that is not called once,
                no layout, or an unknown option.
            TypeError: ``model`` is no module, or ``layer`` neither a module nor a name.
        """
        wrapped = classifier_of(model) or VideoClassifier(model, layout)
        layout_of(wrapped, layout)
        _, name = find_layer(wrapped, layer)
        config = BranchConfig(
            layer=name,
            mechanism=mechanism,
            body="light" if body is None else "own",
            width=width,
            maps=maps,
            temporal=temporal,
            dropout=dropout,
        )
        self = cls.__new__(cls)
        self._assemble(wrapped, config, example, body, grid or wrapped.grid, given=model)
        return self

    @classmethod
    def from_pretrained(cls, name_or_folder: str | os.PathLike[str], model: nn.Module | None = None) -> STABN:
        """An ST-ABN shipped with this package or written by :meth:`save_pretrained`, in eval mode.

        Example:
            >>> st_abn = STABN.from_pretrained("tiny-st-abn-pattern")
            >>> st_abn.model.labels
            ['bright-right', 'bright-bottom', 'bright-diagonal']

        Args:
            name_or_folder: of the ST-ABN.
            model: what a branch was added to, where that has no name of its own. Its sizes and preprocessing hold.

        Raises:
            ValueError: there is no such folder, it holds another model or a whole one, or its weights do not fit.
        """
        stored = storage.read(name_or_folder)
        if stored.trunk is not None and model is not None:
            raise ValueError(f"{name_or_folder} holds a whole ST-ABN with a trunk of its own; leave model out")
        if stored.trunk is not None:
            self = cls.__new__(cls)
            self._assemble(*around(stored.trunk, stored.config, stored.labels, stored.frames))
            self.model.image_size, self.model.preprocessing = stored.image_size, stored.preprocessing
        else:
            model = stored.base_model() if model is None else model
            self = cls.inject(model, stored.config.layer, **stored.options)
        try:
            stored.fill(self)
        except BaseException:
            self.remove()
            raise
        return self.eval()

    def save_pretrained(self, folder: str | os.PathLike[str], *, base: str | None = None, half: bool = False) -> None:
        """Write config, weights and any preprocessing to a folder: all of it, or of an injected branch what was added.

        Args:
            folder: made if it is not there.
            base: of an injected branch, the shipped name or folder of its model; one of the hub is passed.
            half: store float16; it is float32 again when read.

        Raises:
            ValueError: the folder holds a model, ``base`` has no meaning, or no config builds a part of yours.
            FileExistsError: the folder holds another of these files.
        """
        storage.write(Path(folder), self, base, half)

    def _assemble(
        self,
        model: VideoClassifier,
        config: BranchConfig,
        example: Tensor | None,
        body: nn.Module | None,
        grid: TokenGrid | None = None,
        given: nn.Module | None = None,
    ) -> None:
        super().__init__()
        layer, _ = find_layer(model, config.layer)
        self.branch, self.mechanism = build(model, layer, config, grid, example, body)
        self.model, self.config, self.grid = model, config, grid
        self.training = model.training
        self.branch.train(self.training)
        self.mechanism.train(self.training)
        self.injected = given is not None
        self._given = (model if given is None else given,)  # in a tuple, so that it is no submodule twice
        self._handle: RemovableHandle | None = layer.register_forward_hook(self._gate)

    @property
    def layout(self) -> VideoLayout:
        """The order of the clip's axes."""
        return self.model.layout

    def forward(self, clip: Tensor, *args: Any) -> Tensor:
        """Logits ``(B, K)`` of clips in :attr:`layout`; further arguments go to the model."""
        if self._handle is None:  # the branch is gone
            return self.model(clip, *args)
        return self.forward_with_gates(clip, *args)[0]

    def forward_with_gates(self, clip: Tensor, *args: Any, leaves: bool = False) -> tuple[Tensor, Gates]:
        """Logits and the layer's gates, as parts of the graph: what a loss needs.

        Args:
            clip: in :attr:`layout`.
            *args: further arguments of the model.
            leaves: the gates are leaves of the graph, of one shape, so that a gradient knows every cell of both.

        Raises:
            ValueError: the branch was removed, the layer was not called once, or an override does not fit.
        """
        if self._handle is None:
            raise ValueError("the branch was removed from this model; add one with STABN.inject(model, layer)")
        seen: list[Gates] = []
        with self._asked(seen=seen, leaves=leaves):
            logits = self.model(clip, *args)
        if len(seen) != 1:
            raise ValueError(
                f"the forward called layer {self.config.layer!r} {len(seen)} times where a branch expects once; a "
                f"model that was compiled before the branch was added does not see it: add it first"
            )
        return logits, seen[0]

    @torch.no_grad()
    def explain(self, clip: Tensor, *args: Any) -> BranchExplanation:
        """Logits, the branch's own logits, and the gates in frames and pixels, in eval mode.

        Args:
            clip: in :attr:`layout`.
            *args: further arguments of the model.

        Raises:
            ValueError: as in :meth:`forward_with_gates`.
        """
        with eval_mode(self):
            logits, gates = self.forward_with_gates(clip, *args)
        size = self.layout.extent(clip)
        spatial, temporal = gates.spatial[:, 0].float(), gates.temporal[:, 0].float()
        steps, height, width = spatial.shape[1:]
        frames = to_pixels(temporal.mean((2, 3), keepdim=True).expand_as(spatial), size, self.grid, "nearest")
        return BranchExplanation(
            logits=logits,
            attention_logits=gates.logits,
            spatial=to_pixels(spatial, size, self.grid),
            temporal=frames[:, :, 0, 0],
            grid=(steps, height, width),
            gates=gates,
        )

    @contextmanager
    def override(self, *, spatial: Tensor | None = None, temporal: Tensor | None = None) -> Iterator[None]:
        """Inside the block, gates of yours in place of the branch's: human edits, and "what if frame t had weight 0".

        Args:
            spatial: ``(B, t, h, w)`` of the layer's cells, or ``(B, T, H, W)`` of the clip's pixels, which is averaged
                over each cell; values in [0, 1]. B may be 1.
            temporal: ``(B, t)`` or ``(B, T)``, likewise.

        Raises:
            ValueError: values outside [0, 1]; in the forward, a shape that fits neither the layer nor the clip.
            TypeError: what came is no tensor.
        """
        check_gates("spatial", spatial)
        check_gates("temporal", temporal)
        given = {"spatial": spatial, "temporal": temporal}
        with self._asked(**{name: value for name, value in given.items() if value is not None}):
            yield

    @contextmanager
    def branch_disabled(self) -> Iterator[None]:
        """Inside the block the model answers as if it had no branch."""
        with self._asked(off=True):
            yield

    def remove(self) -> nn.Module:
        """Take the branch out; gives back the model that :meth:`inject` was given, as it was unless it was trained."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        return self._given[0]

    @contextmanager
    def _asked(self, **asked: Any) -> Iterator[None]:
        """Ask for more than what is asked for already, of all forwards inside the block."""
        calls = _CALLS.get()
        token = _CALLS.set({**calls, id(self): replace(calls.get(id(self), Call()), **asked)})
        try:
            yield
        finally:
            _CALLS.reset(token)

    def _gate(self, layer: nn.Module, args: object, output: Any) -> Any:
        """The layer's forward hook: its output through the gates."""
        call = _CALLS.get().get(id(self), Call())
        if call.off:
            return output
        first = output[0] if isinstance(output, tuple) else output
        features = to_features(first, self.grid)
        if features is None:
            raise ValueError(
                f"layer {self.config.layer!r} gives shape {tuple(first.shape)} here, which does not fold to "
                f"(B, C, t, h, w) by {self.grid}; was the model given another clip size?"
            )
        gates = call.take(self.branch(features))
        if call.seen is not None:
            call.seen.append(gates)
        onward = from_features(self.mechanism(features, gates.spatial, gates.temporal), first, self.grid)
        return getattr(output, "_make", tuple)((onward, *output[1:])) if isinstance(output, tuple) else onward


def st_abn_of(model: nn.Module) -> STABN | None:
    """The ST-ABN that a model is, compiled or not, or that a :class:`VideoClassifier` holds, or None."""
    found = network_of(model)
    return found if isinstance(found, STABN) else None
