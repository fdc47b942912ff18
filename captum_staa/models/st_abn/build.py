"""Construction of an attention branch for a layer."""

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
    """Class that holds all options of a branch, so that it can be built again for the same model.

    Attributes:
        layer: name of the layer whose output is multiplied by the gates.
        mechanism: how the gates act on this output.
        body: ``"light"``, one convolution; ``"stage"``, a copy of the trunk's last stage with stride 1; ``"own"``, a
            module of the user.
        width: number of channels of a light body.
        maps: number of maps of class evidence; None for one per class.
        temporal: ``"any"`` for any number of steps, or ``"fixed"``.
        norm: ``"group"`` or ``"batch"``.
        dropout: dropout probability before the linear layer of the branch's logits, in [0, 1).
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
        object.__setattr__(self, "width", int(self.width))  # integers of numpy cannot be written to config.json
        if self.maps is not None:
            check_count("maps", self.maps)
            object.__setattr__(self, "maps", int(self.maps))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {self.dropout!r}. Pass, e.g., 0.5.")


def build(
    model: VideoClassifier,
    layer: nn.Module,
    config: BranchConfig,
    grid: TokenGrid | None,
    example: Tensor | None,
    body: nn.Module | None,
) -> tuple[Branch, nn.Module]:
    """Return the branch and the mechanism for a layer, on its device. One forward determines the sizes."""
    probed = probe(model, layer, config.layer, grid, example)
    features, norm = probed.features, NORMS[config.norm]
    channels, steps = features.shape[1:3]
    if body is None:
        body = nn.Sequential(
            nn.Conv3d(channels, config.width, 3, padding=1, bias=False, padding_mode="replicate"),
            norm(config.width),
            nn.ReLU(),
        )
    body = body.to(features)
    with torch.no_grad(), eval_mode(body):  # eval mode: this input must not change running statistics
        output = body(features)
    if not isinstance(output, Tensor) or output.ndim != 5 or output.shape[2:] != features.shape[2:]:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"body must keep t, h and w of the features, got {shape} for features of shape {tuple(features.shape)}. "
            f"Build the body without strides."
        )
    branch = Branch(
        body,
        output.shape[1],
        probed.num_classes,
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
    """Return the residual 3D CNN with this name, or the given one after a check."""
    if isinstance(trunk, str):
        check_choice("trunk", trunk, get_args(Trunk))
        if trunk == "resnet50":
            return SlowResNet(num_classes)
        return ResNet3D(num_classes, padding_mode="replicate", time_strides_from=2)
    stages = getattr(trunk, "stages", None)
    if not isinstance(stages, nn.Sequential) or len(stages) < 2:
        raise ValueError(
            f"trunk must be 'small', 'resnet50', or a residual 3D CNN whose .stages is an nn.Sequential of two or more "
            f"stages, got {type(trunk).__name__}. Add a branch to any other model with STABN.inject(model, layer)."
        )
    return trunk


def paper(
    num_classes: int, trunk: Trunk | nn.Module, body: TrunkBody, temporal: Temporal, dropout: float
) -> tuple[nn.Module, BranchConfig]:
    """Return a trunk and the config of the paper's branch: before the last stage, with norms of the same kind."""
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
    """Return classifier, config, example clip and body, from which an ST-ABN over a trunk is assembled."""
    stages: nn.Sequential = trunk.stages  # type: ignore[assignment]
    frames = num_frames or (trunk.config.num_frames if isinstance(trunk, ResNet3D) else 32)
    fixed = frames if config.temporal == "fixed" or isinstance(trunk, ResNet3D) else None
    model = VideoClassifier(trunk, "BCTHW", labels, num_frames=fixed)
    example = next(trunk.parameters()).new_zeros(1, 3, frames, 64, 64)
    return model, config, example, at_stride_one(stages[-1]) if config.body == "stage" else None


def at_stride_one(stage: nn.Module) -> nn.Module:
    """Return a copy of a stage with stride 1 in all convolutions, so that it keeps t, h and w."""
    stage = copy.deepcopy(stage)
    for module in stage.modules():
        if isinstance(module, nn.Conv3d):
            module.stride = (1, 1, 1)
    return stage
