"""Networks of each kind that no package provides: small, with the structure that makes each kind special."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 3


class MeanOverFrames(nn.Module):
    """A network of images, applied to each frame; the mean of its outputs is the answer. ``(B, T, C, H, W)``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, clip: Tensor) -> Tensor:
        return self.net(clip.flatten(0, 1)).unflatten(0, clip.shape[:2]).mean(1)


class CNNLSTM(nn.Module):
    """A 2D CNN for each frame, then an LSTM; ``(B, T, C, H, W)``. Returns the last output, or one per frame."""

    def __init__(self, every_frame: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, 2, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.pool, self.lstm = nn.AdaptiveAvgPool2d((3, 2)), nn.LSTM(36, 8, batch_first=True)
        self.head, self.every_frame = nn.Linear(8, CLASSES), every_frame

    def forward(self, clip: Tensor) -> Tensor:
        frames = self.pool(self.features(clip.flatten(0, 1))).flatten(1)
        states, _ = self.lstm(frames.unflatten(0, clip.shape[:2]))
        answers = self.head(states)  # (B, T, K)
        return answers if self.every_frame else answers[:, -1]


class Segments(nn.Module):
    """A 2D CNN with the frames folded into the batch, as TSN; with a shift of channels in time, as TSM.

    ``(B*T, C, H, W)`` to ``(B, K)``: the mean over frames.
    """

    def __init__(self, frames: int, shift: bool) -> None:
        super().__init__()
        self.frames, self.shift = frames, shift
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, 2, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, CLASSES))

    def forward(self, frames: Tensor) -> Tensor:
        maps = self.stem(frames)
        if self.shift:
            clip = maps.unflatten(0, (-1, self.frames))  # (B, T, C, h, w)
            shifted = torch.zeros_like(clip)
            shifted[:, :-1, :2] = clip[:, 1:, :2]
            shifted[:, 1:, 2:4] = clip[:, :-1, 2:4]
            shifted[:, :, 4:] = clip[:, :, 4:]
            maps = shifted.flatten(0, 1)
        answers = self.head(self.block(maps).mean((2, 3)))
        return answers.unflatten(0, (-1, self.frames)).mean(1)


class CNN3D(nn.Module):
    """Convolution, batch norm, ReLU and pooling; ``(B, C, T, H, W)``."""

    def __init__(self, classes: int = CLASSES, head: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 6, 3, (1, 2, 2), padding=1), nn.BatchNorm3d(6), nn.ReLU(inplace=True))
        self.block = nn.Sequential(nn.Conv3d(6, 8, 3, 2, padding=1), nn.BatchNorm3d(8), nn.ReLU(inplace=True))
        self.pool, self.drop, self.head = nn.AdaptiveAvgPool3d(1), nn.Dropout(0.5), nn.Linear(8, classes)
        self.last = head or nn.Identity()

    def forward(self, clip: Tensor) -> Tensor:
        maps = self.block(self.stem(clip))
        return self.last(self.head(self.drop(self.pool(maps).flatten(1))))


class SlowFast(nn.Module):
    """Two pathways, a slow one of few frames and a fast one, with a lateral connection."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = nn.Sequential(nn.Conv3d(3, 8, (1, 3, 3), (1, 2, 2), (0, 1, 1)), nn.BatchNorm3d(8), nn.ReLU())
        self.fast = nn.Sequential(nn.Conv3d(3, 4, 3, (1, 2, 2), 1), nn.BatchNorm3d(4), nn.ReLU())
        self.lateral = nn.Conv3d(4, 4, (5, 1, 1), (4, 1, 1), (2, 0, 0))
        self.block, self.head = nn.Conv3d(12, 8, 3, padding=1), nn.Linear(12, CLASSES)

    def forward(self, pathways: list[Tensor]) -> Tensor:
        slow, fast = self.slow(pathways[0]), self.fast(pathways[1])
        slow = self.block(torch.cat([slow, self.lateral(fast)], 1)).relu()
        return self.head(torch.cat([slow.mean((2, 3, 4)), fast.mean((2, 3, 4))], 1))


class Views(nn.Module):
    """Several views of a clip, ``(B, views, C, T, H, W)``, whose outputs are averaged, as in mmaction2."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, views: Tensor) -> Tensor:
        return self.net(views.flatten(0, 1)).unflatten(0, views.shape[:2]).mean(1)


class Lightning(nn.Module):
    """A training module that contains the model, its loss and its metric, as a LightningModule does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, nn.CrossEntropyLoss()

    def forward(self, clip: Tensor) -> Tensor:
        return self.model(pixel_values=clip).logits


class SoftmaxInEval(nn.Module):
    """A head as in PySlowFast: logits in train mode, probabilities in eval mode."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, clip: Tensor) -> Tensor:
        answers = self.net(clip).logits
        return answers if self.training else F.softmax(answers, 1)
