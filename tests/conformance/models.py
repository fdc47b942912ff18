"""The models for the tests of every method: tiny, random, seeded, with clips whose axes all have different sizes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import tiny_language
import torch
from tiny_models import CLASSES, SIZE, OwnViT, own_family, randomize, tiny_module
from tiny_models import CallsSdpa as Attention
from torch import Tensor, nn

from captum_staa import VideoClassifier, VideoLayout
from captum_staa.models import STABN, AttentionLayer, BranchConfig, VideoLanguageModel

Tensors = tuple[Tensor, ...]


class ConvNet(nn.Module):
    """A 3D CNN for clips in both orders of time and channels. Its head depends on the position."""

    def __init__(self, axes: str, channels: int = 3) -> None:
        super().__init__()
        self.channel = axes.index("C")
        self.features = nn.Sequential(nn.Conv3d(channels, 5, 3, (1, 2, 2), padding=1), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool3d((2, 3, 2))
        self.head = nn.Linear(5 * 2 * 3 * 2, CLASSES)

    def forward(self, clip: Tensor) -> Tensor:
        maps = self.features(clip.movedim(self.channel, 1))  # (B, 5, T, H / 2, W / 2)
        return self.head(self.pool(maps).flatten(1))


class CNNLSTM(nn.Module):
    """A 2D CNN for each frame, then an LSTM; ``(B, T, C, H, W)``."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, 2, padding=1), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d((3, 2))
        self.lstm = nn.LSTM(4 * 3 * 2, 6, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, clip: Tensor) -> Tensor:
        maps = self.pool(self.features(clip.flatten(0, 1)))  # (B*T, 4, 3, 2)
        steps, _ = self.lstm(maps.flatten(1).unflatten(0, clip.shape[:2]))  # (B, T, 6)
        return self.head(steps[:, -1])


class TwoStream(nn.Module):
    """RGB and optical flow, each ``(B, C, T, H, W)``, added before a non-linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb, self.flow = (ConvNet("BCTHW", channels).features for channels in (3, 2))
        self.mixed = nn.Sequential(nn.Conv3d(5, 4, 1), nn.Tanh())
        self.pool = nn.AdaptiveAvgPool3d((2, 3, 2))
        self.head = nn.Linear(4 * 2 * 3 * 2, CLASSES)

    def forward(self, rgb: Tensor, flow: Tensor) -> Tensor:
        maps = self.mixed(self.rgb(rgb) + self.flow(flow))  # (B, 4, T, H / 2, W / 2)
        return self.head(self.pool(maps).flatten(1))


class Scaled(nn.Module):
    """A model whose logits are multiplied by additional arguments: one factor per clip, and optionally one number."""

    def __init__(self, inner: nn.Module, clips: int = 1) -> None:
        super().__init__()
        self.inner, self.clips = inner, clips
        if hasattr(inner, "blocks"):
            self.embed, self.blocks = inner.embed, inner.blocks  # a family needs these names

    def forward(self, *args: Tensor | float) -> Tensor:
        clips, factors = args[: self.clips], args[self.clips :]
        return self.inner(*clips) * math.prod(f[:, None] if isinstance(f, Tensor) else f for f in factors)


class Fixed(Scaled):
    """A scaled model with fixed factors."""

    def __init__(self, inner: nn.Module, *factors: Tensor | float) -> None:
        super().__init__(inner)
        self.factors = factors

    def forward(self, *clips: Tensor) -> Tensor:
        self.clips = len(clips)
        return super().forward(*clips, *self.factors)


class Doubled(Scaled):
    """A model of the clip times two, which may write into its input."""

    def __init__(self, inner: nn.Module, in_place: bool) -> None:
        super().__init__(inner)
        self.in_place = in_place

    def forward(self, *clips: Tensor) -> Tensor:
        return self.inner(*(clip.mul_(2) if self.in_place else 2 * clip for clip in clips))


class MeanOverBatch(nn.Module):
    """A model that returns one output for all clips."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *clips: Tensor) -> Tensor:
        return self.inner(*clips).mean(0, keepdim=True)


@dataclass(frozen=True)
class Case:
    """A model, and clips for it.

    Attributes:
        name: name of the case.
        model: a VideoClassifier if it takes one clip, a plain module if it takes two.
        inputs: the clips, as a tuple.
        layout: layout of every clip.
        layer: end of the name of the layer that Grad-CAM explains, which runs in the middle of a forward.
        target: one class per clip, not the same for all.
    """

    name: str
    model: nn.Module
    inputs: Tensors
    layout: VideoLayout
    layer: str
    target: tuple[int, ...] = (2, 0)

    @property
    def clips(self) -> Tensor | Tensors:
        """The inputs as a user passes them."""
        return self.inputs[0] if len(self.inputs) == 1 else self.inputs

    @property
    def sides(self) -> tuple[int, int, int]:
        """``(T, H, W)``."""
        sizes = dict(zip(self.layout.axes, self.inputs[0].shape, strict=True))
        return sizes["T"], sizes["H"], sizes["W"]

    @property
    def network(self) -> nn.Module:
        """The model without the classifier, whose forward checks the clip."""
        return self.model.module if isinstance(self.model, VideoClassifier) else self.model

    @property
    def layer_module(self) -> nn.Module:
        """The layer, also if the model is wrapped."""
        return next(module for name, module in self.model.named_modules() if name.endswith(self.layer))

    def around(self, wrap: Callable[[nn.Module], nn.Module]) -> Case:
        """Return the same case with a wrapped network."""
        if not isinstance(self.model, VideoClassifier):
            return replace(self, model=wrap(self.model))
        known = {"layout": self.layout, "family": self.model.family, "image_size": self.model.image_size}
        return replace(self, model=VideoClassifier(wrap(self.model.module), **known))

    def part(self, i: int) -> Case:
        """Return one clip alone, with its own target."""
        return replace(self, inputs=tuple(clip[i : i + 1] for clip in self.inputs), target=self.target[i : i + 1])

    def to(self, dtype: torch.dtype) -> Case:
        """Return the case with model and clips in another precision."""
        return replace(self, model=copy.deepcopy(self.model).to(dtype), inputs=tuple(x.to(dtype) for x in self.inputs))


@dataclass(frozen=True)
class Branched(Case):
    """A case whose model has an attention branch that changes its outputs: a :class:`STABN`."""

    @property
    def network(self) -> nn.Module:
        """The model that the branch was added to."""
        return self.model.model.module

    def around(self, wrap: Callable[[nn.Module], nn.Module]) -> Case:
        """Return the same case with a wrapped network that contains the branch. A trace contains the network only."""
        model = copy.deepcopy(self.model)
        with model.branch_disabled():
            model.model.module = wrap(model.model.module)
        return replace(self, model=model)


@dataclass(frozen=True)
class Answering(Case):
    """A case whose model answers a prompt: an :class:`AnswerClassifier`."""

    def around(self, wrap: Callable[[nn.Module], nn.Module]) -> Case:
        """Return the same case with a wrapped language model."""
        vlm = copy.copy(self.model.vlm)
        vlm._modules = {**vlm._modules, "model": wrap(vlm.model)}
        return replace(self, model=vlm.as_classifier(self.model.prompt, self.model.answer))


def _clips(axes: str, frames: int, size: tuple[int, int], channels: tuple[int, ...] = (3,), batch: int = 2) -> Tensors:
    """Return normal random clips. They are drawn in the same order for all layouts, so twins get the same clips."""
    generator = torch.Generator().manual_seed(1)
    clips = (torch.randn(batch, frames, count, *size, generator=generator) for count in channels)
    return tuple(VideoLayout(axes).from_working(clip).contiguous() for clip in clips)


def _conv(name: str, axes: str) -> Case:
    model = VideoClassifier(randomize(ConvNet(axes), seed=0), layout=axes)
    return Case(name, model, _clips(axes, 4, (12, 10)), model.layout, "features")


def _cnn_lstm(name: str) -> Case:
    model = VideoClassifier(randomize(CNNLSTM(), seed=0), layout="BTCHW")
    return Case(name, model, _clips("BTCHW", 4, (12, 10)), model.layout, "features")


def _two_stream(name: str) -> Case:
    clips = _clips("BCTHW", 4, (12, 10), channels=(3, 2))
    return Case(name, randomize(TwoStream(), seed=0), clips, VideoLayout("BCTHW"), "mixed")


def _transformer(name: str, kind: str, layer: str, axes: str = "BTCHW") -> Case:
    model = VideoClassifier(tiny_module(kind), layout=axes, image_size=SIZE)
    assert model.num_frames is not None
    return Case(name, model, _clips(axes, model.num_frames, SIZE), model.layout, layer)


def _own(name: str) -> Case:
    sites = [
        AttentionLayer(f"blocks.{i}.attn", block=i) for i in range(2)
    ]  # not read from the model, because it may be traced
    family = replace(own_family(), attention=lambda model: sites)
    model = VideoClassifier(randomize(OwnViT(lambda: Attention(16, 2)), seed=0), family=family)
    return Case(name, model, _clips("BCTHW", 8, SIZE), model.layout, "blocks.1.norm")


def _branched(name: str) -> Case:
    """Return another case with a random branch at one of its layers."""
    plain = fresh(name.removesuffix(BRANCHED))
    at, before = LAYERS[plain.name]
    model = STABN.inject(plain.model, at, config=BranchConfig(width=6), example=plain.inputs[0])
    for seed, added in enumerate((model.branch, model.mechanism), start=2):
        randomize(added, seed)
    return Branched(name, model, plain.inputs, plain.layout, before)


def _answering(name: str) -> Case:
    """Return a random language model in place of another model, with an answer of two tokens."""
    kind = LANGUAGE[name.removesuffix(ANSWERING)]
    vlm = VideoLanguageModel(tiny_language.build(kind).eval(), tiny_language.tokenizer())
    model = vlm.as_classifier(tiny_language.question(kind), "it is")
    clips = (tiny_language.clips_of(kind, 2, seed=1),)
    with torch.no_grad():
        model(*clips)  # transformers adds hooks in the first call, which stay
    return Answering(name, model, clips, model.layout, "language_model.layers.1.input_layernorm")


_MAKERS: dict[str, Callable[[str], Case]] = {
    "conv": lambda name: _conv(name, "BCTHW"),
    "conv-btchw": lambda name: _conv(name, "BTCHW"),
    "cnn-lstm": _cnn_lstm,
    "two-stream": _two_stream,
    "videomae": lambda name: _transformer(name, "videomae", "layer.1.layernorm_before"),
    "videomae-bcthw": lambda name: _transformer(name, "videomae", "layer.1.layernorm_before", "BCTHW"),
    "timesformer": lambda name: _transformer(name, "timesformer", "encoder.layer.1.temporal_layernorm"),
    "vivit": lambda name: _transformer(name, "vivit", "layers.1.layernorm_before"),
    "vjepa2": lambda name: _transformer(name, "vjepa2", "encoder.layer.1.norm1"),
    "own": _own,
}

MODELS = tuple(_MAKERS)
# The same models with a branch: its layer, and a layer before it. Of the last block of a transformer, only one token
# would be read.
BRANCHED = "-branched"
LAYERS = {
    "conv": ("features", "features.0"),
    "conv-btchw": ("features", "features.0"),
    "vivit": ("vivit.layers.0", "layers.0.layernorm_before"),
    "own": ("blocks.0.attn", "blocks.0.norm"),
}
# Language models in place of models.
ANSWERING = "-answering"
LANGUAGE = {"conv": "llava_onevision", "conv-btchw": "qwen2_5_vl", "vivit": "qwen3_vl", "own": "internvl"}
_MAKERS |= {name + ANSWERING: _answering for name in LANGUAGE}
_MAKERS |= {name + BRANCHED: _branched for name in LAYERS}
TRANSFORMERS = ("videomae", "videomae-bcthw", "timesformer", "vivit", "vjepa2", "own")
TWINS = {"conv": "conv-btchw", "videomae": "videomae-bcthw"}
TWINS |= {name + BRANCHED: twin + BRANCHED for name, twin in TWINS.items() if name in LAYERS}


def fresh(name: str) -> Case:
    """Return a new case that the test may change."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _MAKERS[name](name)


case = cache(fresh)
"""Return a case that all tests share. Tests must not change its model or its clips."""


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Tensors]]:
    """Record copies of the clips of every call of the model."""
    model = model.model if isinstance(model, STABN) else model  # the gates are read without calling its own forward
    model = model.vlm.model if hasattr(model, "vlm") else model  # and tokens without calling the classifier
    calls: list[Tensors] = []

    def note(_: nn.Module, args: tuple[object, ...]) -> None:
        calls.append(tuple(x.detach().clone() for x in args if isinstance(x, Tensor)))

    handle = model.register_forward_pre_hook(note)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def failing(module: nn.Module, call: int) -> Iterator[None]:
    """The module raises ZeroDivisionError on one of its calls, counted from 1."""
    count = 0

    def fail(*_: object) -> None:
        nonlocal count
        count += 1
        if count == call:
            raise ZeroDivisionError(f"the model failed on call {call}")

    handle = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()
