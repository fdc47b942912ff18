"""One window of a stream explained: prediction and maps out of one forward, each frame prepared once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from captum_staa.attr.staa import STAA
from captum_staa.lending import evaluating
from captum_staa.models.preprocessing import Preprocessing
from captum_staa.stream.sources import Arrived


class WindowExplainer:
    """Explains windows that move forward over a stream.

    Args:
        explainer: around a classifier that knows its preprocessing.
        target: class index to explain, or None for each window's likeliest one.
    """

    def __init__(self, explainer: STAA, target: int | None) -> None:
        self.explainer, self.target = explainer, target
        self._prepared: dict[int, Tensor] = {}  # the last window's frames by index, (C, H', W') on the model's device

    def __call__(self, frames: Sequence[Arrived]) -> tuple[Tensor, Tensor, Tensor]:
        """Explain T frames in a row.

        Returns:
            joint ``(T, H', W')``, temporal ``(T,)`` and probabilities ``(K,)``, float32 on the CPU. Shares of attention
            come times T, so that an even share of the window is 1 per frame however many frames it has.
        """
        classifier = self.explainer.forward_func
        clip = self.clip(frames)
        relevance = self.explainer.mode == "relevance"
        trains = any(module.training for module in classifier.modules())  # setting modes takes longer than to look
        with evaluating(classifier) if trains else nullcontext():
            target = self.target
            if relevance and target is None:
                with torch.no_grad():
                    target = int(classifier(clip)[0].argmax())
            parts = self.explainer.attribute_parts(clip, target=target)
        unit = 1 if relevance else len(frames)
        joint, temporal = ((part[0].float() * unit).cpu() for part in (parts.joint, parts.temporal))
        assert parts.logits is not None  # attribute_parts brings them
        return joint, temporal, parts.logits[0].float().softmax(0).cpu()

    def clip(self, frames: Sequence[Arrived]) -> Tensor:
        """``classifier.preprocess`` of the whole window, from what its frames gave one by one."""
        classifier = self.explainer.forward_func
        if type(classifier.preprocessing) is not Preprocessing:  # one's own may look at all frames together
            return classifier.preprocess(np.stack([came.frame for came in frames]))
        device = next((parameter.device for parameter in classifier.module.parameters()), None)
        before, self._prepared = self._prepared, {}
        for came in frames:
            ready = before.get(came.index)
            if ready is None:
                ready = classifier.preprocessing(came.frame[None])[0, 0].to(device)
            self._prepared[came.index] = ready
        working = torch.stack(list(self._prepared.values()))[None]  # (1, T, C, H', W')
        return classifier.layout.from_working(working).contiguous()
