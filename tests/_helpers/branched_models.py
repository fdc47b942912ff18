"""Models of all kinds to which an ST-ABN branch can be added, and models with a trained branch, for several files."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from tiny_models import clip_for, randomize, tiny, tiny_module
from torch import Tensor, nn

from captum_staa import TokenGrid
from captum_staa.models import STABN, BranchConfig
from captum_staa.models.resnet3d import ResNet3D

Pair = namedtuple("Pair", "features weights")


class Net(nn.Module):
    """A 3D CNN for both layouts, or a 2D CNN over frames. The middle layer may return more than features."""

    def __init__(self, axes: str = "BCTHW", frames: bool = False, more: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.channel, self.frames = axes.index("C"), frames
        conv = nn.Conv2d(3, 6, 3, 2, 1) if frames else nn.Conv3d(3, 6, 3, (1, 2, 2), 1)
        self.first, self.middle = conv, Returns(more)
        self.last, self.head = nn.Conv3d(6, 5, 3), nn.Linear(5, 3)

    def forward(self, clip: Tensor) -> Tensor:
        x = clip.movedim(self.channel, 2).flatten(0, 1) if self.frames else clip.movedim(self.channel, 1)
        x = self.middle(self.first(x).relu())
        x = x[0] if isinstance(x, tuple) else x
        x = x.unflatten(0, (len(clip), -1)).transpose(1, 2) if self.frames else x
        return self.head(self.last(x).tanh().mean((2, 3, 4)))


class Returns(nn.Module):
    def __init__(self, more: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.more = more

    def forward(self, x: Tensor) -> Any:
        return self.more(x)


def net(**options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(Net(**options), seed=0)


def frames_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case(name: str) -> tuple[nn.Module, str, Tensor, dict[str, Any]]:
    """Return a model, its layer, a clip, and layout and grid where they are needed."""
    clip = frames_of(2, 3, 4, 12, 10)
    grid = TokenGrid(4, 6, 5, tubelet=(1, 2, 2))
    if name in ("videomae", "vivit", "timesformer", "timesformer-joint"):
        clf = tiny(name)
        block = {"videomae": "videomae.encoder.layer.0", "vivit": "vivit.layers.0"}.get(name)
        return clf, block or "timesformer.encoder.layer.0", clip_for(clf), {}
    if name == "plain hugging face":
        clf = tiny("vivit")
        return tiny_module("vivit").double(), "vivit.layers.0", clip_for(clf).double(), {}
    if name == "resnet3d":
        model = ResNet3D(3, width=4, num_frames=4, stages=2)
        return randomize(model, 0), "stages.0", clip, {"layout": "BCTHW"}
    if name == "frames":
        return net(axes="BTCHW", frames=True), "first", clip.transpose(1, 2), {"layout": "BTCHW", "grid": grid}
    if name == "btchw":
        return net(axes="BTCHW"), "middle", clip.transpose(1, 2), {"layout": "BTCHW"}
    more = {"tuple": lambda x: (x, "weights"), "named tuple": lambda x: Pair(x, None), "tensor": lambda x: x}[name]
    return net(more=more), "middle", clip, {"layout": "BCTHW"}


CASES = ("tensor", "tuple", "named tuple", "btchw", "frames", "resnet3d")
TOKENS = ("videomae", "vivit", "timesformer", "timesformer-joint", "plain hugging face")


def injected(name: str, **branch: Any) -> tuple[STABN, nn.Module, Tensor]:
    """Return a model with a trained branch."""
    model, layer, clip, options = case(name)
    return taught(add(model, layer, clip, **options, **branch)), model, clip


def add(model: nn.Module, layer: str, clip: Tensor, layout: Any = None, grid: Any = None, **branch: Any) -> STABN:
    """Add a new branch, which is the same for the same features."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return STABN.inject(model, layer, layout, grid, config=BranchConfig(**branch), example=clip)


def taught(st_abn: STABN, seed: int = 5) -> STABN:
    """Simulate training: randomize the weights of the branch, and keep those of the model."""
    for added in (st_abn.branch, st_abn.mechanism):
        randomize(added, seed)
    return st_abn


def answer_of(model: nn.Module, clip: Tensor) -> Tensor:
    with torch.no_grad():
        answer = model(clip)
    return answer if isinstance(answer, Tensor) else answer.logits


def hooks_of(model: nn.Module, layer: str) -> dict[int, Any]:
    return getattr(model, "module", model).get_submodule(layer)._forward_hooks
