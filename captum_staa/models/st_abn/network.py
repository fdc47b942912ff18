"""ST-ABN: a video model with an attention branch at one of its layers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from captum_staa._utils.checks import check_choice
from captum_staa._utils.model_state import eval_mode
from captum_staa.grid import TokenGrid
from captum_staa.layout import VideoLayout, layout_of
from captum_staa.models.classifier import VideoClassifier, classifier_of
from captum_staa.models.layers import find_layer, first_tensor, network_of, to_pixels
from captum_staa.models.st_abn import saving
from captum_staa.models.st_abn.branch import Body, BranchConfig, BranchExplanation, Gates, Mechanism, Temporal
from captum_staa.models.st_abn.injection import (
    ForwardOptions,
    Parts,
    Trunk,
    as_in_the_paper,
    at_layer,
    check_gates,
    over_trunk,
)

# The options of each STABN (by id) in this thread or task. They are not stored on the module, for thread safety.
_OPTIONS: ContextVar[Mapping[int, ForwardOptions]] = ContextVar("captum_staa.st_abn", default=MappingProxyType({}))


class STABN(nn.Module):
    """Spatio-Temporal Attention Branch Network over a residual 3D CNN. :meth:`inject` adds a branch to any model.

    The layers of the model up to :attr:`layer` are the backbone, those after it are the head. Between them, the branch
    computes gates from the features of the layer, and the mechanism applies the gates to the features.

    Example:
        >>> st_abn = STABN(num_classes=4)  # over a small 3D CNN, untrained
        >>> clip = torch.rand(1, 3, 16, 48, 48)
        >>> st_abn(clip).shape
        torch.Size([1, 4])
        >>> explanation = st_abn.explain(clip)
        >>> explanation.spatial_gates.shape, explanation.temporal_gates.shape, explanation.grid
        (torch.Size([1, 16, 48, 48]), torch.Size([1, 16]), (16, 6, 6))
        >>> with st_abn.override(temporal=torch.zeros(1, 16)):  # all frames have weight 0
        ...     bool((st_abn.explain(clip).logits != explanation.logits).any())
        True

    Args:
        num_classes: K, the number of classes.
        trunk: the network without its branch: ``"small"``, a residual 3D CNN with replicated padding in time, for 16
            frames of 48 x 48 pixels; ``"resnet50"``, the 3D ResNet-50 of the paper; or your residual 3D CNN for
            ``(B, C, T, H, W)``, with its last stage at the end of ``.stages``. The branch is added before this stage;
            that of a bottleneck is added after ``.stem``.
        mechanism: ``"mix"``, that of the paper, which the network may ignore; or ``"bottleneck"``, with which the
            network receives only what the gates let through, as in :class:`BranchConfig`.
        body: as in :class:`BranchConfig`, such as ``"light"``; None is ``"stage"``, as in the paper, or ``"stages"``
            for a bottleneck.
        temporal: the paper's head for a ``"fixed"`` number of frames, or a head for ``"any"`` number.
        num_frames: T of the clips; None uses the value of the trunk, or 32 as in the paper.
        dropout: dropout probability in the branch, before the linear layer of its logits, in [0, 1).
        labels: one name per class.

    Attributes:
        model: the :class:`VideoClassifier` that contains the branch. ``model.module`` is the trunk, or the model that
            was passed to :meth:`inject`.
        layer: name of the layer whose output the branch reads and the mechanism changes.
        axes: how the output of the layer is arranged.
        branch, mechanism: the added modules.
        config: :class:`BranchConfig` from which they were built.
        injected: whether the branch was added to an existing model by :meth:`inject`.
        layout: the order of the clip's axes.
        grid: the grid of the layer's tokens; None for a CNN.

    Raises:
        ValueError: the trunk has an unknown structure or another number of classes, or an option is unknown.

    Reference:
        Mitsuhara, Hirakawa, Yamashita and Fujiyoshi, "ST-ABN: Visual Explanation Taking into Account Spatio-temporal
        Information for Video Recognition", arXiv 2110.15574.
    """

    def __init__(
        self,
        num_classes: int,
        trunk: Trunk | nn.Module = "small",
        *,
        mechanism: Literal["mix", "bottleneck"] = "mix",
        body: Body | nn.Module | None = None,
        temporal: Temporal = "any",
        num_frames: int | None = None,
        dropout: float = 0.5,
        labels: list[str] | None = None,
        _parts: Parts | None = None,  # of inject and from_pretrained, in place of the paper's network
    ) -> None:
        super().__init__()
        if _parts is None:
            check_choice("mechanism", mechanism, ("mix", "bottleneck"))
            if body is None:
                body = "stages" if mechanism == "bottleneck" else "stage"
            config = BranchConfig(mechanism, body, temporal=temporal, dropout=dropout)
            _parts = as_in_the_paper(num_classes, trunk, config, labels, num_frames)
        self.branch, self.mechanism, self.model = _parts.branch, _parts.mechanism, _parts.model
        self.layer, self.config, self.grid = _parts.layer, _parts.config, _parts.grid
        self.axes = _parts.axes
        self.training = self.model.training
        self._base = (_parts.base,)  # in a tuple, so that it is not registered as a submodule
        layer, _ = find_layer(self.model, self.layer)
        self._handle: RemovableHandle | None = layer.register_forward_hook(self._apply_branch)

    @classmethod
    def _of(cls, parts: Parts) -> STABN:
        """Return the ST-ABN of these parts."""
        return cls(parts.branch.classify.out_features, _parts=parts)

    @classmethod
    def inject(
        cls,
        model: nn.Module,
        layer: str | nn.Module,
        layout: VideoLayout | str | None = None,
        grid: TokenGrid | None = None,
        *,
        mechanism: Mechanism | None = None,
        config: BranchConfig | None = None,
        example: Tensor | None = None,
        layer_axes: str | None = None,
    ) -> STABN:
        """Add a branch to a layer of a model. The model's outputs do not change until the branch is trained.

        Exceptions are the mechanisms ``"mix"`` and ``"bottleneck"``, which change the outputs from the start.

        Example:
            >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
            >>> clip = torch.rand(1, 16, 3, 48, 48)
            >>> before = clf(clip)
            >>> st_abn = STABN.inject(clf, layer="videomae.encoder.layer.1")
            >>> bool((st_abn(clip) == before).all()), st_abn.remove() is clf
            (True, True)

        Args:
            model: any video model. It is changed in place by one forward hook, until :meth:`remove` is called.
            layer: the layer or its name. It must be called once per forward. Its output, or the first item if it
                returns a tuple, must be ``(B, C, t, h, w)``; or, with a ``grid``, tokens ``(B, N, D)``, whose prefix is
                not changed, or frames ``(B*t, C, h, w)``.
            layout: the order of the clips' axes, such as ``"BCTHW"``. Optional for a :class:`VideoClassifier` and for a
                known transformer.
            grid: the grid of the tokens. Optional for the same models.
            mechanism: how the gates act on the features, short for ``config=BranchConfig(mechanism)``. For
                ``"bottleneck"``, choose an early layer, such as the stem of a CNN or the embeddings of a transformer.
            config: options of the branch, such as ``BranchConfig("observe", maps=16)``; None uses ``BranchConfig()``.
            example: a valid clip, used in one forward that determines the shape of the layer's output; None uses zeros.
            layer_axes: the order of the axes of the layer's output, such as ``"BTHWC"``. None reads it from the modules
                around the layer.

        Returns:
            The ST-ABN around the model.

        Raises:
            ValueError: the layer does not exist (similar names are listed), its output is not a grid, it is not called
                once, the layout is missing, both ``mechanism`` and ``config`` are given, or the body of the branch
                changes t, h or w.
            TypeError: ``model`` is not a module, or ``layer`` is neither a module nor a name.
        """
        classifier = classifier_of(model) or VideoClassifier(model, layout)
        layout_of(classifier, layout)  # raises for another layout than the classifier's
        if mechanism is not None and config is not None:
            raise ValueError(
                f"mechanism must be None if config is given, got {mechanism!r} and {config}. Set the mechanism in the "
                f"config."
            )
        config = config or BranchConfig(mechanism or "residual")
        if layer_axes is not None:
            config = replace(config, layer_axes=layer_axes)
        return cls._of(at_layer(classifier, layer, config, grid or classifier.grid, example, base=model))

    @classmethod
    def from_pretrained(cls, name_or_folder: str | os.PathLike[str], model: nn.Module | None = None) -> STABN:
        """Return an ST-ABN that is bundled with this package or was saved by :meth:`save_pretrained`, in eval mode.

        Example:
            >>> st_abn = STABN.from_pretrained("tiny-st-abn-pattern")
            >>> st_abn.model.labels
            ['bright-right', 'bright-bottom', 'bright-diagonal']

        Args:
            name_or_folder: name of a bundled ST-ABN, or a folder.
            model: the model to which the branch was added, if the folder does not name it. Its clip size and
                preprocessing are used.

        Raises:
            ValueError: the folder does not exist, it holds another kind of model, it already contains a trunk, or its
                weights do not fit.
        """
        stored = saving.read(name_or_folder)
        if stored.trunk is None:
            base = stored.base_model() if model is None else model
            st_abn = cls.inject(base, stored.layer, config=stored.config)
        elif model is None:
            st_abn = cls._of(over_trunk(stored.trunk, stored.layer, stored.config, stored.labels, stored.frames))
            st_abn.model.image_size, st_abn.model.preprocessing = stored.image_size, stored.preprocessing
        else:
            raise ValueError(
                f"model must be None for an ST-ABN that was saved with its trunk, got {type(model).__name__} for "
                f"{name_or_folder}. Leave model out."
            )
        try:
            stored.fill(st_abn)
        except BaseException:
            st_abn.remove()
            raise
        return st_abn.eval()

    def save_pretrained(self, folder: str | os.PathLike[str], *, base: str | None = None, half: bool = False) -> None:
        """Save config, weights and preprocessing to a folder. For an injected branch, only the added weights are saved.

        Args:
            folder: the folder. It is created if it does not exist.
            base: for an injected branch, the bundled name or the folder of its model. If it is None or a name on the
                Hugging Face Hub, pass the model to :meth:`from_pretrained`.
            half: whether to store float16. The weights are float32 again after loading.

        Raises:
            ValueError: the folder already holds a model, ``base`` is given for an ST-ABN with a trunk, or a custom
                module cannot be built from a config.
            FileExistsError: one of the other files already exists.
        """
        saving.write(Path(folder), self, base, half)

    @property
    def injected(self) -> bool:
        """Whether the branch was added to an existing model by :meth:`inject`."""
        return self._base[0] is not None

    @property
    def layout(self) -> VideoLayout:
        """The order of the clip's axes."""
        return self.model.layout

    def forward(self, clip: Tensor, *args: Any) -> Tensor:
        """Return the logits ``(B, K)`` of clips in :attr:`layout`. Further arguments are passed to the model."""
        if self._handle is None:  # the branch was removed
            return self.model(clip, *args)
        return self.forward_with_gates(clip, *args)[0]

    def forward_with_gates(
        self,
        clip: Tensor,
        *args: Any,
        leaves: bool = False,
        given: Gates | None = None,
        front_detached: bool = False,
    ) -> tuple[Tensor, Gates]:
        """Return the logits and the layer's gates, as parts of the graph, for a loss.

        Args:
            clip: clips in :attr:`layout`.
            *args: further arguments of the model.
            leaves: whether to make the gates leaves of the graph. Both then have the shape of the spatial gates, so
                that there is a gradient for every cell.
            given: gates of an earlier forward of the same clips, or changed ones, as parts of their graph. The branch
                is not run. None computes them.
            front_detached: whether the layer and those in front of it get no gradient.

        Raises:
            ValueError: the branch was removed, the layer was not called exactly once, or an override does not fit.
        """
        if self._handle is None:
            raise ValueError(
                "the ST-ABN must have a branch, got one whose branch was removed. Add a branch with "
                "STABN.inject(model, layer)."
            )
        collected: list[Gates] = []
        with self._with_options(collected=collected, leaves=leaves, given=given, front_detached=front_detached):
            logits = self.model(clip, *args)
        if len(collected) != 1:
            raise ValueError(
                f"the forward must call layer {self.layer!r} once, got {len(collected)} calls. If the model was "
                f"compiled before the branch was added, add the branch first, then compile."
            )
        return logits, collected[0]

    @torch.no_grad()
    def explain(self, clip: Tensor, *args: Any) -> BranchExplanation:
        """Return the logits of model and branch, and the gates in frames and pixels, in eval mode.

        Args:
            clip: clips in :attr:`layout`.
            *args: further arguments of the model.

        Returns:
            :class:`BranchExplanation`, without a graph.

        Raises:
            ValueError: as in :meth:`forward_with_gates`.
        """
        with eval_mode(self):
            logits, gates = self.forward_with_gates(clip, *args)
        size = self.layout.extent(clip)
        spatial, temporal = gates.spatial[:, 0].float(), gates.temporal[:, 0].float()
        frames = to_pixels(temporal.expand_as(spatial), size, self.grid, "nearest")
        return BranchExplanation(
            logits=logits,
            spatial_gates=to_pixels(spatial, size, self.grid),
            temporal_gates=frames[:, :, 0, 0],
            gates=gates,
        )

    @contextmanager
    def override(self, *, spatial: Tensor | None = None, temporal: Tensor | None = None) -> Iterator[None]:
        """Context manager that replaces the gates of the branch, for edited gates and counterfactuals.

        Args:
            spatial: gates in [0, 1], ``(B, t, h, w)`` for the layer's cells, or ``(B, T, H, W)`` for the clip's pixels,
                which are averaged over each cell. B may be 1. None keeps the gates of the branch.
            temporal: gates in [0, 1], ``(B, t)`` or ``(B, T)``. None keeps the gates of the branch.

        Raises:
            ValueError: values outside [0, 1]; in the forward, a shape that fits neither the layer nor the clip.
            TypeError: ``spatial`` or ``temporal`` is not a tensor.
        """
        check_gates("spatial", spatial)
        check_gates("temporal", temporal)
        gates = {"spatial": spatial, "temporal": temporal}
        with self._with_options(**{name: value for name, value in gates.items() if value is not None}):
            yield

    @contextmanager
    def branch_disabled(self) -> Iterator[None]:
        """Context manager under which the model runs without its branch."""
        with self._with_options(disabled=True):
            yield

    def remove(self) -> nn.Module:
        """Remove the branch and return the model that was passed to :meth:`inject`. Trained weights are kept."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        (base,) = self._base
        return self.model if base is None else base

    @contextmanager
    def _with_options(self, **options: Any) -> Iterator[None]:
        """Add options for all forwards inside the block to those that are already set."""
        before = _OPTIONS.get()
        token = _OPTIONS.set({**before, id(self): replace(before.get(id(self), ForwardOptions()), **options)})
        try:
            yield
        finally:
            _OPTIONS.reset(token)

    def _apply_branch(self, layer: nn.Module, args: object, output: Any) -> Any:
        """Forward hook of the layer: apply the gates to its output."""
        options = _OPTIONS.get().get(id(self), ForwardOptions())
        if options.disabled:
            return output
        first, replace_first = first_tensor(output)
        try:
            features = self.axes.fold(first)
        except ValueError as error:
            raise ValueError(
                f"the output of layer {self.layer!r} must fit {self.axes}, got shape {tuple(first.shape)}. Pass "
                f"clips of the size for which the branch was built."
            ) from error
        if options.front_detached:
            features = features.detach()
        gates = options.apply(self.branch(features) if options.given is None else options.given)
        return replace_first(self.axes.unfold(self.mechanism(features, gates.spatial, gates.temporal), first))


def st_abn_of(model: nn.Module) -> STABN | None:
    """Return the ST-ABN of a model, which may be compiled or inside a :class:`VideoClassifier`, or None."""
    network = network_of(model)
    return network if isinstance(network, STABN) else None


def as_classifier(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return the ST-ABN of a folder, and the keyword arguments of the :class:`VideoClassifier` around it."""
    st_abn = STABN.from_pretrained(folder)
    names = ("layout", "labels", "num_frames", "image_size", "preprocessing")
    return st_abn, {name: getattr(st_abn.model, name) for name in names}
