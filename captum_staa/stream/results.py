"""The result of a stream for each frame, and its counters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class FrameResult:
    """One frame with its prediction and explanation.

    Example:
        >>> import torch
        >>> result = FrameResult(
        ...     index=7, frame=None, windows=2, labels=["left", "right"], probabilities=torch.tensor([0.25, 0.75]),
        ...     joint=torch.full((2, 2), 0.5), temporal=2.0, crop=(0, 0, 48, 48), latency=0.5, latency_frames=12)
        >>> result.label, result.top(1), result.explained
        ('right', [('right', 0.75)], True)

    Attributes:
        index: index of the frame in the stream, from 0.
        frame: ``(H, W, 3)`` uint8, a copy; None if the frame was dropped.
        windows: number of windows that contain the frame and were explained; 0 if there were none.
        labels: names of the K classes.
        probabilities: ``(K,)``, mean over the windows; None without windows.
        joint: ``(H', W')`` float32 on the CPU in pixels of the model's input, mean over the windows; None without
            windows. Attention: a frame with an even share of its window sums to 1. Relevance: signed, in units of the
            logit; with Chefer's rule nonnegative and without a unit.
        temporal: sum of the map; nan without windows.
        crop: ``(top, left, height, width)`` of the map in pixels of the frame, for ``Frames(crop=)`` of
            :mod:`captum_staa.visualization`.
        latency: seconds from the arrival of the frame to this result; nan if the frame was dropped.
        latency_frames: number of frames that arrived after the frame and before this result.
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
        """Whether at least one window explained the frame."""
        return self.windows > 0

    @property
    def label(self) -> str | None:
        """The most likely class; None if no window explained the frame."""
        return self.top(1)[0][0] if self.explained else None

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """Return the ``k`` most likely classes as (label, probability); empty if no window explained the frame."""
        if self.probabilities is None:
            return []
        best = self.probabilities.topk(min(k, len(self.labels)))
        return [(self.labels[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


@dataclass
class StreamStats:
    """Counters of a stream.

    Attributes:
        frames: results returned.
        unexplained: results without an explanation.
        windows: windows explained.
        skipped: windows skipped because frames arrived faster than they were explained.
    """

    frames: int = 0
    unexplained: int = 0
    windows: int = 0
    skipped: int = 0
