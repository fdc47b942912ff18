"""What a stream gives for each frame, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class FrameResult:
    """One frame, what the model answered around it, and where and how much the model looked at it.

    Example:
        >>> import torch
        >>> result = FrameResult(
        ...     index=7, frame=None, windows=2, labels=["left", "right"], probabilities=torch.tensor([0.25, 0.75]),
        ...     joint=torch.full((2, 2), 0.5), temporal=2.0, crop=(0, 0, 48, 48), latency=0.5, latency_frames=12)
        >>> result.label, result.top(1), result.explained
        ('right', [('right', 0.75)], True)

    Attributes:
        index: of the frame in the stream, from 0.
        frame: ``(H, W, 3)`` uint8, a copy; None where the frame was dropped before anyone looked at it.
        windows: how many windows explained it; 0 where it was dropped.
        labels: the K classes.
        probabilities: ``(K,)``, mean over its windows; None where there is none.
        joint: ``(H', W')`` float32 on the CPU in pixels of the model's input, mean over its windows; None where there
            is none. Attention: 1 over the whole frame is an even share of the window. Relevance: signed, in units of
            the logit; by Chefer's rule not negative, in no unit.
        temporal: the map's sum; of ``mode="released"`` its own signal. nan where there is none.
        crop: ``(top, left, height, width)`` in the frame's pixels: where the map lies, as ``crop=`` of
            :mod:`captum_staa.visualization` takes it.
        latency: seconds from the frame's arrival to this result; nan where the frame was dropped unseen.
        latency_frames: how many frames had come after it by then.
    """

    index: int
    frame: NDArray[np.uint8] | None
    windows: int
    labels: list[str]
    probabilities: Tensor | None
    joint: Tensor | None
    temporal: float
    crop: tuple[float, float, float, float]
    latency: float
    latency_frames: int

    @property
    def explained(self) -> bool:
        """Whether any window saw it."""
        return self.windows > 0

    @property
    def label(self) -> str | None:
        """The likeliest class; None where no window saw the frame."""
        return self.top(1)[0][0] if self.explained else None

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` likeliest classes as (label, probability), likeliest first; empty where no window saw the frame."""
        if self.probabilities is None:
            return []
        best = self.probabilities.topk(min(k, len(self.labels)))
        return [(self.labels[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


@dataclass
class StreamStats:
    """What a stream has counted so far.

    Attributes:
        frames: results given.
        unexplained: of these, without an explanation.
        windows: windows explained.
        skipped: windows skipped because the stream had fallen behind.
    """

    frames: int = 0
    unexplained: int = 0
    windows: int = 0
    skipped: int = 0
