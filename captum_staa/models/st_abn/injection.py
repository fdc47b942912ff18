"""Composition of a model with a branch at one of its layers, and the options of the branch for one forward."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_staa._utils.checks import check_choice
from captum_staa._utils.model_state import eval_mode
from captum_staa.grid import TokenGrid
from captum_staa.models.classifier import DEFAULT_FRAMES, VideoClassifier
from captum_staa.models.layers import ChannelWitness, LayerAxes, axes_of, find_layer, first_tensor, network_of
from captum_staa.models.resnet3d import ResNet3D, SlowResNet
from captum_staa.models.st_abn.branch import NORMS, Bottleneck, Branch, BranchConfig, Gates, Pyramid, mechanism_of

Trunk = Literal["small", "resnet50"]


@dataclass(frozen=True)
class Parts:
    """The parts of an ST-ABN. The layers of ``model`` before and after ``layer`` are its backbone and its head.

    Attributes:
        model: the model, without a branch.
        layer: name of the layer whose output the branch reads and the mechanism changes.
        axes: how the output of the layer is arranged.
        branch: from the features of the layer to gates.
        mechanism: from features and gates to features.
        config: the options from which branch and mechanism were built.
        grid: the grid of the layer's tokens; None for a CNN.
        base: the model that was passed to :meth:`STABN.inject`; None if the model was built for the branch.
    """

    model: VideoClassifier
    layer: str
    axes: LayerAxes
    branch: Branch
    mechanism: nn.Module
    config: BranchConfig
    grid: TokenGrid | None = None
    base: nn.Module | None = None


def at_layer(
    model: VideoClassifier,
    layer: str | nn.Module,
    config: BranchConfig,
    grid: TokenGrid | None = None,
    example: Tensor | None = None,
    base: nn.Module | None = None,
) -> Parts:
    """Return the parts of an ST-ABN over an existing model. One forward determines the sizes of the branch.

    Raises:
        ValueError: the layer does not exist, is not called once, or its output is not a grid over space and time; or
            the body changes t, h or w.
    """
    module, name = find_layer(model, layer)
    features, axes, num_classes = _probe(model, module, name, grid, example, config.layer_axes)
    body, width = _body(model, config, features)
    channels, steps = features.shape[1:3]
    bottleneck = config.mechanism == "bottleneck"
    branch = Branch(
        body,
        width,
        num_classes,
        steps,
        temporal=config.temporal,
        maps=config.maps or (width if bottleneck else None),
        norm=NORMS[config.norm],
        dropout=config.dropout,
        noise=config.noise if bottleneck else None,
    )
    mechanism = mechanism_of(config, channels)
    if isinstance(mechanism, Bottleneck):  # until it is trained
        mechanism.mean.copy_(features.mean((0, 2, 3, 4)))
    for added in (branch, mechanism):
        added.to(features).train(model.training)
    return Parts(model, name, axes, branch, mechanism, config, grid, base)


def over_trunk(
    trunk: nn.Module, layer: str, config: BranchConfig, labels: list[str] | None, num_frames: int | None
) -> Parts:
    """Return the parts of an ST-ABN over a residual 3D CNN for clips ``(B, C, T, H, W)``."""
    small = trunk.config if isinstance(trunk, ResNet3D) else None
    frames = num_frames or (32 if small is None else small.num_frames)
    fixed = None if small is None and config.temporal == "any" else frames
    model = VideoClassifier(trunk, "BCTHW", labels, num_frames=fixed)
    return at_layer(model, layer, config, example=next(trunk.parameters()).new_zeros(1, 3, frames, 64, 64))


def as_in_the_paper(
    num_classes: int, trunk: Trunk | nn.Module, config: BranchConfig, labels: list[str] | None, num_frames: int | None
) -> Parts:
    """Return the parts of the paper's network: a branch before the last stage, with norms of the trunk's kind.

    The branch of a bottleneck is in front of the first stage, where features depend on few pixels.

    Raises:
        ValueError: the trunk has an unknown structure, or another number of classes.
    """
    if isinstance(trunk, str):
        check_choice("trunk", trunk, get_args(Trunk))
        if trunk == "resnet50":
            trunk = SlowResNet(num_classes)
        else:
            trunk = ResNet3D(num_classes, padding_mode="replicate", time_strides_from=2)
    stages = _stages(trunk)
    if stages is None:
        raise ValueError(
            f"trunk must be 'small', 'resnet50', or a residual 3D CNN whose .stages is an nn.Sequential of two or more "
            f"stages, got {type(trunk).__name__}. Add a branch to any other model with STABN.inject(model, layer)."
        )
    batch = any(isinstance(module, nn.BatchNorm3d) for module in trunk.modules())
    config = replace(config, norm="batch" if batch else "group")
    layer = f"stages.{len(stages) - 2}"
    if config.mechanism == "bottleneck":
        layer = "stem"
        if not isinstance(getattr(trunk, layer, None), nn.Module):
            raise ValueError(
                f"trunk must have a module .stem in front of its .stages for mechanism='bottleneck', got "
                f"{type(trunk).__name__} without one. Use STABN.inject(model, layer, mechanism='bottleneck')."
            )
    parts = over_trunk(trunk, layer, config, labels, num_frames)
    if (outputs := parts.branch.classify.out_features) != num_classes:
        raise ValueError(
            f"num_classes must equal the number of outputs of the trunk, {outputs}, got {num_classes}. Pass "
            f"num_classes={outputs}."
        )
    return parts


def _stages(network: nn.Module) -> nn.Sequential | None:
    """Return the stages of a residual 3D CNN, or None for any other network."""
    stages = getattr(network, "stages", None)
    return stages if isinstance(stages, nn.Sequential) and len(stages) > 1 else None


def _body(model: VideoClassifier, config: BranchConfig, features: Tensor) -> tuple[nn.Module, int]:
    """Return the body of a branch for these features, on their device, and the number of channels of its output."""
    norm = NORMS[config.norm]
    if isinstance(config.body, nn.Module):
        body = config.body
    elif config.body == "light":
        conv = nn.Conv3d(features.shape[1], config.width, 3, padding=1, bias=False, padding_mode="replicate")
        body = nn.Sequential(conv, norm(config.width), nn.ReLU())
    elif config.body == "pyramid":
        return Pyramid.new(features.shape[1], config.width, norm).to(features), config.width
    else:
        stages = _stages(network_of(model))
        if stages is None:
            raise ValueError(
                f"body={config.body!r} needs a residual 3D CNN whose .stages is an nn.Sequential of two or more "
                f"stages, got {type(network_of(model)).__name__}. Use body='light' or 'pyramid', or pass your own "
                f"module."
            )
        if config.body == "stages":
            return _pyramid_of(stages, config, features)
        body = copy.deepcopy(stages[-1])
        for module in body.modules():
            if isinstance(module, nn.Conv3d):
                module.stride = (1, 1, 1)  # the body must keep t, h and w
    body = body.to(features)
    with torch.no_grad(), eval_mode(body):  # eval mode: this input must not change running statistics
        output = body(features)
    if not isinstance(output, Tensor) or output.ndim != 5 or output.shape[2:] != features.shape[2:]:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"body must keep t, h and w of the features, got {shape} for features of shape {tuple(features.shape)}. "
            f"Build the body without strides."
        )
    return body, output.shape[1]


@torch.no_grad()
def _pyramid_of(stages: nn.Sequential, config: BranchConfig, features: Tensor) -> tuple[Pyramid, int]:
    """Return a pyramid whose levels are copies of all stages but the last, and the number of its channels."""
    levels, channels, x = [], [], features
    for stage in list(stages)[:-1]:
        level = copy.deepcopy(stage)
        try:
            with eval_mode(level):
                x = level(x)
        except RuntimeError as error:
            raise ValueError(
                f"body='stages' needs a layer in front of the model's .stages, got features of shape "
                f"{tuple(features.shape)} that they do not accept: {error}. Use layer='stem', or body='pyramid'."
            ) from error
        levels.append(level)
        channels.append(x.shape[1])
    pyramid = Pyramid(levels, channels, config.width, NORMS[config.norm])
    pyramid.join.to(features)  # the levels are where the model is
    return pyramid, config.width


@torch.no_grad()
def _probe(
    model: VideoClassifier,
    layer: nn.Module,
    name: str,
    grid: TokenGrid | None,
    example: Tensor | None,
    layer_axes: str | None,
) -> tuple[Tensor, LayerAxes, int]:
    """Run the model once, in eval mode, and return the layer's features ``(1, C, t, h, w)``, how its output is
    arranged, and the number of classes.

    Raises:
        ValueError: the model fails on a clip of zeros, does not call the layer exactly once, or the layer's output is
            not a grid over space and time.
    """
    outputs: list[Any] = []
    witness = ChannelWitness()
    clip = _zeros(model) if example is None else example[:1]

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)
        first, _ = first_tensor(output)
        if isinstance(first, Tensor):
            witness.watch(first, output)

    handle = layer.register_forward_hook(keep)
    try:
        with eval_mode(model), witness.watching(network_of(model), layer):
            logits = model(clip)
    except Exception as error:
        if example is not None:
            raise
        raise ValueError(
            f"the model must accept a clip of zeros, got an error for shape {tuple(clip.shape)} in layout "
            f"{model.layout.axes}: {error}. Pass example=clip with a clip that the model accepts."
        ) from error
    finally:
        handle.remove()
    if len(outputs) != 1:
        raise ValueError(
            f"the forward must call layer {name!r} once, got {len(outputs)} calls. Choose a layer that is called once "
            f"per forward."
        )
    first, _ = first_tensor(outputs[0])
    size = model.layout.extent(clip)
    if not isinstance(first, Tensor) or not first.is_floating_point():
        raise ValueError(
            f"layer {name!r} must return a tensor of floats, or a container that begins with one, got "
            f"{first.dtype if isinstance(first, Tensor) else type(first).__name__}. Choose a layer inside it."
        )
    axes = axes_of(first, 1, size, grid, witness, name=f"layer {name!r}", stated=layer_axes)
    return axes.fold(first), axes, logits.shape[1]


def _zeros(model: VideoClassifier) -> Tensor:
    """Return a clip of zeros of the model's size, or of a small default size if it is unknown."""
    weights = [weight for weight in model.parameters() if weight.ndim > 1]
    like = weights[0] if weights else torch.empty(0)
    channels = next((m.in_channels for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), 3)
    height, width = model.image_size or (64, 64)
    clip = torch.zeros(1, model.num_frames or DEFAULT_FRAMES, channels, height, width, device=like.device)
    return model.layout.from_working(clip)


# ---- one forward: gates of the user, gradients at the gates, or no gates ----


@dataclass(frozen=True)
class ForwardOptions:
    """Options of a branch for one forward, and the list that collects the gates that were applied.

    Attributes:
        spatial, temporal: gates that replace those of the branch, as in :meth:`STABN.override`.
        given: gates of an earlier forward of the same clips. The branch is not run.
        front_detached: whether the layer and those before it get no gradient.
        leaves: whether the gates become leaves of the graph, with a separate temporal gate for every cell.
        disabled: whether the features are passed on without gates.
        collected: list to which the gates are appended, once per call of the layer; None to collect nothing.
    """

    spatial: Tensor | None = None
    temporal: Tensor | None = None
    given: Gates | None = None
    front_detached: bool = False
    leaves: bool = False
    disabled: bool = False
    collected: list[Gates] | None = None

    def apply(self, gates: Gates) -> Gates:
        """Return the gates to apply: those of the branch or of an override, as leaves if ``leaves`` is set."""
        batch, _, *cells = gates.spatial.shape
        applied = {"spatial": gates.spatial, "temporal": gates.temporal}
        if self.spatial is not None:
            applied["spatial"] = _averaged(self.spatial, batch, cells, "spatial")[:, None].to(gates.spatial)
        if self.temporal is not None:
            weights = _averaged(self.temporal, batch, cells[:1], "temporal")
            applied["temporal"] = weights[:, None, :, None, None].to(gates.temporal)
        if self.leaves:
            shape = gates.spatial.shape
            applied = {name: gate.detach().expand(shape).clone().requires_grad_() for name, gate in applied.items()}
        gates = replace(gates, **applied)
        if self.collected is not None:
            self.collected.append(gates)
        return gates


def check_gates(name: str, value: Tensor | None) -> None:
    """Raise an error unless ``value`` is None or gates in [0, 1]: ``(B, t, h, w)`` for "spatial", else ``(B, t)``."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a tensor of gates or None, got {type(value).__name__}. Convert it with torch.as_tensor."
        )
    axes = "(B, t, h, w)" if name == "spatial" else "(B, t)"
    inside = value.numel() > 0 and bool(((value >= 0) & (value <= 1)).all())
    if value.ndim != axes.count(",") + 1 or not inside:
        values = f"values from {value.min():.3g} to {value.max():.3g}" if value.numel() else "no values"
        raise ValueError(
            f"{name} must hold gates {axes} in [0, 1], got shape {tuple(value.shape)} with {values}. Reshape the "
            f"tensor, or limit its values with clamp(0, 1)."
        )


def _averaged(value: Tensor, batch: int, cells: list[int], name: str) -> Tensor:
    """Return gates of the layer's cells, averaged from gates of cells or of frames and pixels."""
    sizes = list(value.shape[1:])
    if value.shape[0] not in (1, batch) or any(size % count for size, count in zip(sizes, cells, strict=True)):
        raise ValueError(
            f"{name} gates must have the shape of the layer's gates, {(batch, *cells)}, or integer multiples of its "
            f"sizes (frames and pixels), got shape {tuple(value.shape)}. Resize the gates to one of these."
        )
    wide = value.float()[:, None]
    if len(cells) == 1:
        return F.adaptive_avg_pool1d(wide, cells[0])[:, 0].expand(batch, *cells)
    t, h, w = cells
    pooled = F.adaptive_avg_pool3d(wide, (t, h, w))
    return pooled[:, 0].expand(batch, *cells)
