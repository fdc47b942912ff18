"""Building a branch for a layer: which parts, of which sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from captum_staa._utils.checks import check_choice, check_count
from captum_staa._utils.model_state import eval_mode
from captum_staa.grid import TokenGrid
from captum_staa.models.classifier import VideoClassifier
from captum_staa.models.resnet3d import ResNet3D
from captum_staa.models.slow_resnet import SlowResNet
from captum_staa.models.st_abn.branch import Branch, Norm, Temporal, group_norm
from captum_staa.models.st_abn.mechanism import Mix, Observe, Residual
from captum_staa.models.st_abn.probe import probe

Mechanism = Literal["mix", "residual", "observe"]
Body = Literal["light", "stage", "own"]
TrunkBody = Literal["stage", "light"]
Trunk = Literal["small", "resnet50"]
NormName = Literal["group", "batch"]
NORMS: dict[NormName, Norm] = {"group": group_norm, "batch": nn.BatchNorm3d}


@dataclass(frozen=True)
class BranchConfig:
    """All that is needed to build a branch again, beside the model.

    Attributes:
        layer: name of the layer whose output passes through the gates.
        mechanism: how the gates act on it.
        body: ``"light"``, one convolution; ``"stage"``, a copy at stride 1 of the trunk's last stage; ``"own"``, a
            module that was passed.
        width: channels of a light body.
        maps: maps of class evidence; None for one per class.
        temporal: ``"any"`` number of steps, or ``"fixed"``.
        norm: ``"group"`` or ``"batch"``.
        dropout: before the linear layer of the branch's class scores.
    """

    layer: str
    mechanism: Mechanism = "residual"
    body: Body = "light"
    width: int = 32
    maps: int | None = None
    temporal: Temporal = "any"
    norm: NormName = "group"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_choice("mechanism", self.mechanism, get_args(Mechanism))
        check_choice("body", self.body, get_args(Body))
        check_choice("temporal", self.temporal, get_args(Temporal))
        check_choice("norm", self.norm, NORMS)
        check_count("width", self.width)
        object.__setattr__(self, "width", int(self.width))  # numpy's cannot be written to a config.json
        if self.maps is not None:
            check_count("maps", self.maps)
            object.__setattr__(self, "maps", int(self.maps))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is in [0, 1), got {self.dropout!r}")


def build(
    model: VideoClassifier,
    layer: nn.Module,
    config: BranchConfig,
    grid: TokenGrid | None,
    example: Tensor | None,
    body: nn.Module | None,
) -> tuple[Branch, nn.Module]:
    """The branch and the mechanism for a layer, on its device; what the layer gives is learned by one forward."""
    found = probe(model, layer, config.layer, grid, example)
    features, norm = found.features, NORMS[config.norm]
    channels, steps = features.shape[1:3]
    if body is None:
        body = nn.Sequential(
            nn.Conv3d(channels, config.width, 3, padding=1, bias=False, padding_mode="replicate"),
            norm(config.width),
            nn.ReLU(),
        )
    body = body.to(features)
    with torch.no_grad(), eval_mode(body):  # its running statistics are no business of zeros
        given = body(features)
    if not isinstance(given, Tensor) or given.ndim != 5 or given.shape[2:] != features.shape[2:]:
        shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(
            f"the branch's body must keep t, h and w, but of features {tuple(features.shape)} it makes {shape}; build "
            f"it without strides"
        )
    branch = Branch(
        body,
        given.shape[1],
        found.num_classes,
        steps,
        temporal=config.temporal,
        maps=config.maps,
        norm=norm,
        dropout=config.dropout,
    )
    makers: dict[Mechanism, Callable[[], nn.Module]] = {
        "mix": lambda: Mix(channels, norm),
        "residual": lambda: Residual(channels),
        "observe": Observe,
    }
    return branch.to(features), makers[config.mechanism]().to(features)


def _trunk(num_classes: int, trunk: Trunk | nn.Module) -> nn.Module:
    """The residual 3D CNN by its name, or the one that was given, checked."""
    if isinstance(trunk, str):
        check_choice("trunk", trunk, get_args(Trunk))
        if trunk == "resnet50":
            return SlowResNet(num_classes)
        return ResNet3D(num_classes, padding_mode="replicate", time_strides_from=2)
    stages = getattr(trunk, "stages", None)
    if not isinstance(stages, nn.Sequential) or len(stages) < 2:
        raise ValueError(
            f"the trunk must be 'small', 'resnet50', or a residual 3D CNN whose .stages is an nn.Sequential of two or "
            f"more, got {type(trunk).__name__}; STABN.inject(model, layer) adds a branch to any other model"
        )
    return trunk


def paper(
    num_classes: int, trunk: Trunk | nn.Module, body: TrunkBody, temporal: Temporal, dropout: float
) -> tuple[nn.Module, BranchConfig]:
    """A trunk, and the paper's branch for it: in front of its last stage, with norms of its kind."""
    check_choice("body", body, get_args(TrunkBody))
    network = _trunk(num_classes, trunk)
    stages: nn.Sequential = network.stages  # type: ignore[assignment]
    batch = any(isinstance(module, nn.BatchNorm3d) for module in network.modules())
    return network, BranchConfig(
        layer=f"stages.{len(stages) - 2}",
        mechanism="mix",
        body=body,
        temporal=temporal,
        norm="batch" if batch else "group",
        dropout=dropout,
    )


def around(
    trunk: nn.Module, config: BranchConfig, labels: list[str] | None, num_frames: int | None
) -> tuple[VideoClassifier, BranchConfig, Tensor, nn.Module | None]:
    """What a branch over a trunk is assembled of: classifier, config, example, a stage as its body."""
    stages: nn.Sequential = trunk.stages  # type: ignore[assignment]
    frames = num_frames or (trunk.config.num_frames if isinstance(trunk, ResNet3D) else 32)
    fixed = frames if config.temporal == "fixed" or isinstance(trunk, ResNet3D) else None
    model = VideoClassifier(trunk, "BCTHW", labels, num_frames=fixed)
    example = next(trunk.parameters()).new_zeros(1, 3, frames, 64, 64)
    return model, config, example, at_stride_one(stages[-1]) if config.body == "stage" else None


def at_stride_one(stage: nn.Module) -> nn.Module:
    """A copy of a stage of convolutions that keeps t, h and w."""
    stage = copy.deepcopy(stage)
    for module in stage.modules():
        if isinstance(module, nn.Conv3d):
            module.stride = (1, 1, 1)
    return stage
