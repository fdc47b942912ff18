"""Explain one window of a stream. Each frame is preprocessed only once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from captum_staa._utils.model_state import eval_mode
from captum_staa.attr.staa import STAA
from captum_staa.models.preprocessing import Preprocessing
from captum_staa.stream.sources import Arrived


class WindowExplainer:
    """Explains windows that move forward over a stream.

    Args:
        explainer: STAA with a classifier that has its preprocessing.
        target: index of the class to explain; None for the most likely class of each window.
    """

    def __init__(self, explainer: STAA, target: int | None) -> None:
        self.explainer, self.target = explainer, target
        self._prepared: dict[int, Tensor] = {}  # the last window's frames by index, (C, H', W') on the model's device

    def __call__(self, frames: Sequence[Arrived]) -> tuple[Tensor, Tensor, Tensor]:
        """Explain T consecutive frames.

        Returns:
            joint ``(T, H', W')``, temporal ``(T,)`` and probabilities ``(K,)``, float32 on the CPU. Shares of attention
            are multiplied by T, so that an even share of the window is 1 per frame for any T.
        """
        classifier = self.explainer.forward_func
        clip = self.clip(frames)
        relevance = self.explainer.mode == "relevance"
        with eval_mode(classifier):
            target = self.target
            if relevance and target is None:
                with torch.no_grad():
                    target = int(classifier(clip)[0].argmax())
            parts = self.explainer.attribute_maps(clip, target=target)
        unit = 1 if relevance else len(frames)
        joint, temporal = ((part[0].float() * unit).cpu() for part in (parts.joint, parts.temporal))
        assert parts.logits is not None  # attribute_maps sets them
        return joint, temporal, classifier.values(parts.logits)[0].float().cpu()

    def clip(self, frames: Sequence[Arrived]) -> Tensor:
        """Return ``classifier.preprocess`` of the whole window, from frames that were preprocessed one by one."""
        classifier = self.explainer.forward_func
        if type(classifier.preprocessing) is not Preprocessing:  # other preprocessing may depend on all frames together
            return classifier.preprocess(np.stack([arrived.frame for arrived in frames]))
        device = next((parameter.device for parameter in classifier.module.parameters()), None)
        before, self._prepared = self._prepared, {}
        for arrived in frames:
            prepared = before.get(arrived.index)
            if prepared is None:
                prepared = classifier.preprocessing(arrived.frame[None])[0, 0].to(device)
            self._prepared[arrived.index] = prepared
        working = torch.stack(list(self._prepared.values()))[None]  # (1, T, C, H', W')
        return classifier.layout.from_working(working).contiguous()


class Merged:
    """Results of overlapping windows, merged for each frame by the mean over the windows that contain it.

    Example:
        >>> merged = Merged()
        >>> for start, level in ((0, 1.0), (2, 3.0)):
        ...     merged.add(range(start, start + 4), torch.full((4, 1, 1), level), torch.full((4,), level))
        >>> indices, (joint, temporal) = merged.result()
        >>> indices, temporal.tolist()
        ([0, 1, 2, 3, 4, 5], [1.0, 1.0, 2.0, 2.0, 3.0, 3.0])
        >>> merged.take(3)[1].item(), merged.count(3), len(merged)
        (2.0, 0, 5)
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[int, tuple[Tensor, ...]]] = {}  # by frame: number of windows, and sums over them

    def __len__(self) -> int:
        return len(self._held)

    def add(self, indices: Iterable[int], *parts: Tensor) -> None:
        """Add the parts of one window, each ``(T, ...)``. An interrupt leaves the mean of every frame correct."""
        for index, *ones in zip(indices, *parts, strict=True):
            count, sums = self._held.get(index, (0, ()))
            added = tuple(total + one for total, one in zip(sums, ones, strict=True)) if count else tuple(ones)
            self._held[index] = (count + 1, added)

    def count(self, index: int) -> int:
        """Return the number of windows that contain a frame."""
        return self._held[index][0] if index in self._held else 0

    def mean(self, index: int) -> tuple[Tensor, ...]:
        """Return the means of the parts of one frame, without the time axis."""
        count, sums = self._held[index]
        return tuple(total / count for total in sums)

    def take(self, index: int) -> tuple[Tensor, ...]:
        """Return :meth:`mean` of a frame, and remove the frame."""
        parts = self.mean(index)
        del self._held[index]
        return parts

    def result(self) -> tuple[list[int], list[Tensor]]:
        """Return the indices of all frames in order, and each part as ``(frames, ...)``."""
        indices = sorted(self._held)
        return indices, [torch.stack(part) for part in zip(*map(self.mean, indices), strict=True)]
