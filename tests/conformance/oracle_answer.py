"""Slow reference implementations of the methods for answers of language models. See slow_answer.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import slow_answer
import torch
from torch import Tensor

from .models import Case, Tensors


def _each(case: Case, map_of: Callable[[Tensor, int], Tensor]) -> Tensors:
    """Return the map ``(1, T, H, W)`` of every clip for its own target, spread over channels."""
    (clips,) = case.inputs
    maps = torch.cat([map_of(clips[i : i + 1], target) for i, target in enumerate(case.target)])
    return ((maps / 3)[:, :, None].expand_as(clips).to(clips),)


def relevance(case: Case, **_: Any) -> Tensors:
    return _each(case, lambda clip, token: slow_answer.merged(slow_answer.relevance(case.model, clip, token), patch=4))


def attention(case: Case, **_: Any) -> Tensors:
    return _each(case, lambda clip, token: _blocks(case, slow_answer.attention(case.model, clip, token)))


def steps(case: Case, **_: Any) -> Tensors:
    def fall(clip: Tensor, token: int) -> Tensor:
        tokens = case.model.prompt_for(clip).tokens
        with torch.no_grad():
            whole = case.model(clip)[0, token]
            removed = [slow_answer.step_removed(case.model, clip, step, "mean")[token] for step in range(tokens.t)]
        falls = (whole - torch.stack(removed)) / (tokens.h * tokens.w)
        return _blocks(case, falls.view(1, -1, 1, 1).expand(1, *tokens.shape))

    return _each(case, fall)


def _blocks(case: Case, values: Tensor) -> Tensor:
    """Spread each value ``(1, t, h, w)`` over its 8 x 8 pixels and its frames. Pixels beyond the last token get 0."""
    frames, height, width = case.sides
    pixels = torch.zeros(1, frames, height, width, dtype=values.dtype)
    step = case.model.prompt_for(case.inputs[0]).tokens.step
    for t in range(values.shape[1]):
        first, last = t * step, min((t + 1) * step, frames)
        for y in range(values.shape[2]):
            for x in range(values.shape[3]):
                share = values[0, t, y, x] / (last - first) / 64
                pixels[0, first:last, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = share
    return pixels
