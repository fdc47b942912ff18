"""Small stand-ins for the kinds of models that people bring, in the state in which a training script leaves them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEModel

from captum_staa import VideoClassifier
from captum_staa.models import STABN, BranchConfig
from captum_staa.models.preprocessing import Preprocessing

B, T, SIDE, CLASSES = 2, 4, 16, 3
CLIP = torch.randn(B, T, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))  # BTCHW


class Trained(nn.Module):
    """A CNN whose train mode differs from its eval mode in four ways: BatchNorm, dropout, checkpointing, a counter."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), nn.Dropout(0.5)
        self.block, self.head = nn.Conv3d(4, 4, 3, padding=1), nn.Linear(4, classes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, clip: Tensor) -> Tensor:
        self.calls += 1  # in eval mode, too
        x = self.drop(self.norm(self.conv(clip)).relu())
        # checkpointing is active in train mode only, as in transformers
        again = self.training and torch.is_grad_enabled()
        x = checkpoint(self.block, x, use_reentrant=True) if again else self.block(x)
        return self.head(x.relu().mean((2, 3, 4)) * (1 + (torch.rand(1) if self.training else 0)))


class Recurrent(nn.Module):
    """A 2D CNN per frame and an LSTM with dropout between its layers; ``(B, T, C, H, W)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4)
        self.lstm, self.head = nn.LSTM(4, 5, num_layers=2, dropout=0.5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, clip: Tensor) -> Tensor:
        frames = self.norm(self.conv(clip.flatten(0, 1))).relu().mean((2, 3)).unflatten(0, clip.shape[:2])
        return self.head(self.lstm(frames)[0][:, -1])


class PerFrame(nn.Module):
    """An output for every frame, ``(B, T, K)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), nn.Dropout(0.3)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, clip: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(clip)).relu().mean((3, 4)).transpose(1, 2)))


class Pathways(nn.Module):
    """Two pathways in a list, as SlowFast takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fast = nn.Conv3d(3, 4, 3, padding=1), nn.Conv3d(3, 2, 3, padding=1)
        self.norm, self.drop, self.head = nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, CLASSES)

    def forward(self, pathways: list[Tensor]) -> Tensor:
        slow, fast = pathways
        pooled = [self.conv(slow).relu().mean((2, 3, 4)), self.fast(fast).relu().mean((2, 3, 4))]
        return self.head(self.drop(self.norm(torch.cat(pooled, 1))))


class OwnHead(nn.Module):
    """A known backbone below a head of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = VideoMAEModel(videomae_config())
        self.drop, self.norm, self.head = nn.Dropout(0.3), nn.BatchNorm1d(16), nn.Linear(16, CLASSES)

    def forward(self, clip: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.backbone(clip).last_hidden_state.mean(1))))


def videomae_config() -> VideoMAEConfig:
    return VideoMAEConfig(
        image_size=SIDE, patch_size=8, num_frames=T, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3, num_labels=CLASSES,
    )  # fmt: skip


def checkpointed(model: nn.Module) -> nn.Module:
    """Turn on gradient checkpointing as transformers does, under the name that the attribute has in this version."""
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=True)
    return model


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        build: function that returns a new network.
        wrap: function that returns what is explained, for a network.
        layout: order of the axes of its clips.
        layer: name of a layer in the middle of its forward, with a gradient at more than one cell.
        target: a valid target.
        outputs: ``"classes"`` for (B, K), ``"one"`` for (B, 1), ``"frames"`` for (B, T, K).
        has: what else it has: ``"tokens"`` of a known transformer, ``"branch"`` of an ST-ABN.
        dtype: dtype of its weights.
    """

    build: Callable[[], nn.Module]
    wrap: Callable[[nn.Module], nn.Module]
    layout: str = "BCTHW"
    layer: str = "conv"
    target: Any = 1
    outputs: str = "classes"
    has: str = ""
    dtype: torch.dtype = torch.float32

    def make(self) -> nn.Module:
        """Return a new model, the same each time, in train mode, with all that a call could change in use."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = self.build().train()
            for module in network.modules():
                if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
                    module.running_mean.normal_().mul_(0.2)
                    module.running_var.uniform_(0.5, 2)
        network = network.to(self.dtype)
        parameters = list(network.parameters())
        parameters[0].requires_grad_(False)
        parameters[1].grad = torch.ones_like(parameters[1])
        list(network.modules())[-1].eval()  # a module with another mode
        network.get_submodule(self.layer).register_forward_hook(lambda module, args, output: None)
        return self.wrap(network)

    @property
    def clip(self) -> Tensor:
        """Clips of the model."""
        return CLIP if self.layout == "BTCHW" else CLIP.transpose(1, 2).contiguous()


def _classifier(layout: str | None = "BCTHW", **options: Any) -> Callable[[nn.Module], VideoClassifier]:
    labels = ["a", "b", "c"] if options.get("output") != "sigmoid" else ["a"]
    return lambda network: VideoClassifier(network, layout, **{"labels": labels, "output": "logits", **options})


def _branched(network: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = STABN.inject(network, "norm", "BCTHW", config=BranchConfig(width=4), example=CLIP.transpose(1, 2))
        with torch.no_grad():
            for parameter in model.mechanism.parameters():
                parameter.normal_().mul_(0.3)
    return model


STEPS = Preprocessing(resize=(SIDE, SIDE), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
KINDS: dict[str, Kind] = {
    "plain module": Kind(Trained, lambda network: network),
    "classifier": Kind(Trained, _classifier()),
    "one sigmoid": Kind(lambda: Trained(1), _classifier(output="sigmoid"), target=0, outputs="one"),
    "bfloat16": Kind(Trained, _classifier(), dtype=torch.bfloat16),
    "LSTM": Kind(Recurrent, _classifier("BTCHW"), "BTCHW"),
    "two pathways": Kind(Pathways, _classifier(pack=lambda clip: [clip[:, :, ::2], clip])),
    "output per frame": Kind(PerFrame, _classifier(), target=(2, 1), outputs="frames"),
    "transformer": Kind(
        lambda: checkpointed(VideoMAEForVideoClassification(videomae_config())),
        _classifier(None, preprocessing=STEPS),
        "BTCHW",
        "videomae.encoder.layer.0.layernorm_before",
        has="tokens",
    ),
    "transformer in a wrapper": Kind(
        lambda: checkpointed(OwnHead()),
        _classifier(None, preprocessing=STEPS),
        "BTCHW",
        "backbone.encoder.layer.0.layernorm_before",
        has="tokens",
    ),
    "attention branch": Kind(Trained, _branched, has="branch"),
}
