"""The vision tower's output for a clip, and the language model run on it, so that the tower runs once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from captum_staa.models.video_language.model import VideoLanguageModel, VideoPrompt


@dataclass(frozen=True)
class VideoFeatures:
    """What the language model gets for the video tokens of clips.

    Attributes:
        values: ``(B, N, D)``, one vector per video token: those of the grid, then those of the tail.
        deepstack: ``(B, N, D)`` for each layer of the language model that adds further features (Qwen3-VL). A token
            that is removed must be removed here as well.
    """

    values: Tensor
    deepstack: tuple[Tensor, ...] = ()
    _raw: Any = None

    def map(self, function: Callable[[Tensor], Tensor]) -> VideoFeatures:
        """Return the features with a function applied to each of the tensors ``(B, N, D)``."""
        return replace(self, values=function(self.values), deepstack=tuple(map(function, self.deepstack)))


def encode(vlm: VideoLanguageModel, clip: Tensor, prompt: VideoPrompt) -> VideoFeatures:
    """Return what the vision tower and the projection make of clips.

    Args:
        vlm: the model.
        clip: ``(B, T, C, H, W)``.
        prompt: a prompt for clips of this size.
    """
    arguments = vlm.inputs(clip, prompt)
    function = getattr(vlm.model.model, f"get_{vlm.family.modality}_features")
    known = inspect.signature(inspect.unwrap(function)).parameters
    raw = function(**{name: value for name, value in arguments.items() if name in known}, return_dict=True)
    count = prompt.tokens.count + prompt.tokens.tail
    deepstack = tuple(_rows(layer, count) for layer in (raw.get("deepstack_features") or ()))
    return VideoFeatures(_rows(raw.pooler_output, count), deepstack, raw)


def answer_logits(vlm: VideoLanguageModel, features: VideoFeatures, prompt: VideoPrompt, answer: Tensor) -> Tensor:
    """Return the logits at each token of an answer, ``(B, n, V)``, from features in place of clips.

    Args:
        vlm: the model.
        features: features of B clips, perhaps changed.
        prompt: the prompt.
        answer: ``(n,)`` token ids.
    """
    batch = len(features.values)
    size, dtype = prompt.tokens.size, features.values.dtype
    empty = torch.zeros((1, size[0], 3, *size[1:]), dtype=dtype, device=features.values.device)
    arguments = vlm.inputs(empty, prompt, answer[:-1])  # for ids and positions, which do not depend on pixels
    arguments = {name: _repeated(name, value, batch) for name, value in arguments.items() if "pixel" not in name}
    raw = copy.copy(features._raw)
    raw.pooler_output = _like(features._raw.pooler_output, features.values)
    if features.deepstack:
        raw.deepstack_features = [
            _like(layer, values)
            for layer, values in zip(features._raw.deepstack_features, features.deepstack, strict=True)
        ]
    return vlm.run({**arguments, "mm_encoder_outputs": {vlm.family.modality: raw}}, len(answer))


def _repeated(name: str, value: Tensor, batch: int) -> Tensor:
    if name == "position_ids":
        return value.expand(-1, batch, -1)
    return value.repeat(batch, *[1] * (value.ndim - 1))


def _rows(output: Any, count: int) -> Tensor:
    """Return features ``(B, N, D)`` from a tensor, or from a list with one tensor per clip."""
    joined = output if isinstance(output, Tensor) else torch.cat(list(output))
    return joined.reshape(-1, count, joined.shape[-1])


def _like(output: Any, values: Tensor) -> Any:
    """Return features ``(B, N, D)`` in the form of ``output``."""
    if isinstance(output, Tensor):
        return values.reshape(-1, *output.shape[1:])
    return tuple(values.unbind(0))
