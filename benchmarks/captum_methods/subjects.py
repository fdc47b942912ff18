"""One model of each kind that people explain, with two clips for it: the columns of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from captum_staa import VideoClassifier, VideoLayout
from captum_staa.benchmark import PlantedClips

CLASSES = 4
TARGET = [1, 0]  # one class per clip, not the same


@dataclass(frozen=True)
class Subject:
    """A model as its user has it, and through VideoClassifier.

    Attributes:
        net: the module.
        call: how its user gets logits out of ``net`` and clips.
        wrapped: the classifier around it.
        inputs: two clips, or two of each kind.
        layer: what Grad-CAM reads.
        fold: from this layer's output to ``(B, channels, t, h, w)``.
    """

    net: nn.Module
    call: Callable[..., Tensor]
    wrapped: VideoClassifier
    inputs: tuple[Tensor, ...]
    layer: nn.Module
    fold: Callable[[Tensor], Tensor]

    @property
    def raw(self) -> Callable[..., Tensor]:
        """What its user gives Captum: the network where it returns a tensor, else a function that takes it out."""
        return self.net if self.call is _plain else lambda *clips: self.call(self.net, *clips)

    @property
    def given(self) -> Tensor | tuple[Tensor, ...]:
        """Copies of the inputs as Captum takes them."""
        fresh = tuple(clip.clone() for clip in self.inputs)  # a Captum call that fails leaves its input changed
        return fresh if len(fresh) > 1 else fresh[0]

    @property
    def layout(self) -> VideoLayout:
        return self.wrapped.layout


def _plain(net: nn.Module, *clips: Tensor) -> Tensor:
    return net(*clips)


def _logits(net: nn.Module, clip: Tensor) -> Tensor:
    return net(clip).logits


class CNN3D(nn.Module):
    """Convolution, batch norm, ReLU and max pool as in R3D, I3D or SlowFast; ``(B, C, T, H, W)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.relu1 = nn.Conv3d(3, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU()
        self.pool, self.conv2, self.relu2 = nn.MaxPool3d(2), nn.Conv3d(6, 8, 3, padding=1), nn.ReLU()
        self.mean, self.head = nn.AdaptiveAvgPool3d(1), nn.Linear(8, CLASSES)

    def forward(self, clip: Tensor) -> Tensor:
        maps = self.pool(self.relu1(self.norm(self.conv1(clip))))
        return self.head(self.mean(self.relu2(self.conv2(maps))).flatten(1))


class CNNLSTM(nn.Module):
    """A 2D CNN for every frame, then an LSTM; ``(B, T, C, H, W)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.pool = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        self.lstm, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, CLASSES)

    def forward(self, clip: Tensor) -> Tensor:
        frames = self.pool(self.relu(self.conv(clip.flatten(0, 1)))).mean((2, 3))
        return self.head(self.lstm(frames.unflatten(0, clip.shape[:2]))[0][:, -1])


class TwoStream(nn.Module):
    """RGB and optical flow, ``(B, C, T, H, W)`` each."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb, self.flow = CNN3D(), CNN3D()

    def forward(self, rgb: Tensor, flow: Tensor) -> Tensor:
        return self.rgb(rgb) + self.flow(flow)


def _own(net: nn.Module, axes: str, layer: str, count: int = 1) -> Subject:
    """One of the networks above."""
    clip = _clips()[:, ::2, :, ::2, ::2]  # (2, 8, 3, 24, 24)
    inputs = tuple(VideoLayout(axes).from_working(part).contiguous() for part in (clip, clip.roll(1, 1))[:count])
    per_frame = isinstance(net, CNNLSTM)
    return Subject(
        net=net,
        call=_plain,
        wrapped=VideoClassifier(net, layout=axes),
        inputs=inputs,
        layer=net.get_submodule(layer),
        fold=(lambda value: value.unflatten(0, (2, -1)).transpose(1, 2)) if per_frame else (lambda value: value),
    )


def _shipped(name: str, layer: str) -> Subject:
    """A small trained transformer that comes with the package."""
    clf = VideoClassifier.from_pretrained(f"tiny-{name}-pattern")
    return Subject(
        net=clf.module,
        call=_logits,
        wrapped=clf,
        inputs=(_clips(),),
        layer=clf.module.get_submodule(layer),
        fold=lambda value: clf.grid.to_grid(value.transpose(1, 2)),
    )


def _videoprism() -> Subject:
    from transformers.models.videoprism.configuration_videoprism import VideoPrismVisionConfig
    from transformers.models.videoprism.modeling_videoprism import VideoPrismForVideoClassification

    config = VideoPrismVisionConfig(
        image_size=24,
        num_frames=8,
        tubelet_size=(1, 8, 8),
        hidden_size=24,
        num_attention_heads=2,
        num_spatial_layers=2,
        num_temporal_layers=1,
        intermediate_size=32,
        num_labels=CLASSES,
    )
    net = VideoPrismForVideoClassification(config)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)  # as trained models have it: the defaults barely attend to anything
    return Subject(
        net=net,
        call=_logits,
        wrapped=VideoClassifier(net),
        inputs=(_clips()[:, ::2, :, ::2, ::2].contiguous(),),
        layer=net.vision_model.spatial_layers[-1],
        fold=lambda value: value.unflatten(0, (2, 8)).unflatten(2, (3, 3)).movedim(-1, 1),  # (B*t, h*w, D)
    )


@cache
def _clips() -> Tensor:
    return PlantedClips(seed=12, n=20)[16:18][0]  # (2, 16, 3, 48, 48)


MAKERS: dict[str, Callable[[], Subject]] = {
    "VideoMAE": lambda: _shipped("videomae", "videomae.encoder.layer.2"),
    "TimeSformer": lambda: _shipped("timesformer", "timesformer.encoder.layer.1"),
    "ViViT": lambda: _shipped("vivit", "vivit.layers.1"),
    "V-JEPA 2": lambda: _shipped("vjepa2", "vjepa2.encoder.layer.1"),
    "VideoPrism": _videoprism,
    "3D CNN": lambda: _own(CNN3D(), "BCTHW", "conv2"),
    "CNN + LSTM": lambda: _own(CNNLSTM(), "BTCHW", "conv"),
    "RGB + flow": lambda: _own(TwoStream(), "BCTHW", "rgb.conv2", count=2),
}


@contextmanager
def seeded() -> Iterator[None]:
    """The global generators of PyTorch and NumPy from a known state; put back afterwards."""
    before = np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            np.random.set_state(before)


@cache
def subject(name: str, dtype: torch.dtype) -> Subject:
    """A column of the table, in eval mode; the model and its clips in one dtype."""
    with seeded():
        made = MAKERS[name]()
    made.net.to(dtype).eval()
    return Subject(**{**vars(made), "inputs": tuple(clip.to(dtype) for clip in made.inputs)})
