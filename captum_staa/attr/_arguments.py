"""Checks of arguments that every method here shares: each says what came, what was expected, and the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from captum_staa._utils.captum import NullProgress, TargetType, progress
from captum_staa.layout import VideoLayout, check_dense
from captum_staa.masking.scores import selected
from captum_staa.result import as_tuple


def one_clip(inputs: Tensor | tuple[Tensor, ...], layout: VideoLayout, method: str) -> Tensor:
    """The clip of a method that explains one tensor of floats per example."""
    clips = as_tuple(inputs)
    if len(clips) != 1:
        raise ValueError(f"{method} explains one clip tensor per example, got a tuple of {len(clips)} inputs")
    layout.check_values(clips[0])
    return clips[0]


def score_of(answer: Tensor, target: TargetType) -> Tensor:
    """The sum over examples of the target's output, as Captum selects it."""
    return outputs_of(answer, target).sum()


def outputs_of(answer: Tensor, target: TargetType) -> Tensor:
    """``(B,)``, or B numbers of another shape: each example's output for the target, as Captum selects it."""
    if target is None and answer.ndim > 1 and answer.shape[1] > 1:
        raise ValueError(
            f"the model gives {answer.shape[1]} classes, so a gradient needs a target: pass target=class index "
            f"(or one per example); of a transformer, STAA(mode='attention') explains no class in particular"
        )
    scores = selected(answer, target)
    if scores.numel() != len(answer):
        raise ValueError(
            f"{target = } leaves {scores.numel()} outputs of shape {tuple(answer.shape)} for {len(answer)} examples, "
            f"but one per example has a gradient: pass as many indices as there are axes after the batch"
        )
    return scores


def refuse_inference_mode(what: str) -> None:
    """Raise under ``torch.inference_mode()``, where no gradient can be switched on again."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            f"{what} needs a gradient, which torch.inference_mode() forbids; call it under torch.no_grad() (gradients "
            f"are switched on inside); VideoOcclusion and RISE need none"
        )


def clips_of(inputs: Tensor | tuple[Tensor, ...], layout: VideoLayout | None) -> tuple[Tensor, ...]:
    """The tensors of a method that takes one or several per example; clips, where there is a layout."""
    clips = as_tuple(inputs)
    for i, clip in enumerate(clips):
        name = "inputs" if len(clips) == 1 else f"inputs[{i}]"
        if layout is not None:
            layout.check_values(clip, name)
            continue
        if clip.ndim == 0 or clip.numel() == 0:
            raise ValueError(f"{name} must be a non-empty tensor with a row per example, got shape {tuple(clip.shape)}")
        check_dense(clip, name)
        if clip.is_floating_point() and not bool(clip.isfinite().all()):
            raise ValueError(f"{name} of shape {tuple(clip.shape)} holds nan or infinity; mend it with nan_to_num")
    if len({len(clip) for clip in clips}) > 1:
        raise ValueError(f"all inputs hold the same examples, got shapes {[tuple(clip.shape) for clip in clips]}")
    return clips


def call_bar(name: str, calls: int, show: bool) -> Any:
    """Captum's progress bar over so many calls of the model, or none; below another bar it vanishes when done."""
    return progress(desc=f"{name} attribution", total=calls, leave=None) if show else NullProgress()


@contextmanager
def evaluations(name: str, perturbations: int, perturbations_per_eval: int, show: bool) -> Iterator[Callable[[], None]]:
    """A progress bar over the calls of the model, the unperturbed one included; gives the function that moves it."""
    with call_bar(name, 1 + -(-perturbations // perturbations_per_eval), show) as bar:
        yield bar.update


def as_attributions(maps: tuple[Tensor, ...], clips: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Maps in their inputs' dtypes, but float32 for half precision, as everywhere in this library."""
    wide = (torch.promote_types(clip.dtype, torch.float32) for clip in clips)
    return tuple(part.to(dtype) for part, dtype in zip(maps, wide, strict=True))
