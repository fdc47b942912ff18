"""Checks of arguments that every method here shares: each says what came, what was expected, and the way out."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_staa._captum import TargetType, _format_tensor_into_tuples, _select_targets
from captum_staa.layout import VideoLayout


def one_clip(inputs: Tensor | tuple[Tensor, ...], layout: VideoLayout, method: str) -> Tensor:
    """The clip of a method that explains one tensor of floats per example."""
    clips = _format_tensor_into_tuples(inputs)
    if len(clips) != 1:
        raise ValueError(f"{method} explains one clip tensor per example, but a tuple of {len(clips)} inputs came")
    layout.check_values(clips[0])
    return clips[0]


def score_of(answer: Tensor, target: TargetType) -> Tensor:
    """The sum over examples of the target's output, as Captum selects it."""
    if target is None and answer.ndim > 1 and answer.shape[1] > 1:
        raise ValueError(
            f"the model gives {answer.shape[1]} classes, so a gradient needs a target: pass target=class index "
            f"(or one per example); STAA(mode='attention') explains no class in particular and needs none"
        )
    return _select_targets(answer, target).sum()


def refuse_inference_mode(what: str) -> None:
    """Raise under ``torch.inference_mode()``, where no gradient can be switched on again."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            f"{what} needs a gradient, which torch.inference_mode() forbids; call it under torch.no_grad() (gradients "
            f"are switched on inside); STAA(mode='attention') needs none"
        )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of the words."""
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(choices)}, but {value!r} came")
