"""A walk from the baseline to the clip, cell after cell in the order of a map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from captum_staa._captum import TargetType
from captum_staa.checks import check_choice
from captum_staa.metrics._cells import Cells
from captum_staa.perturbation.scores import TargetScore, over_classes

Order = Literal["morf", "lerf"]
Output = Literal["probability", "logit"]


def score_of(
    forward_func: Callable[..., Any], target: TargetType, additional_forward_args: object, output: Output, batch: int
) -> TargetScore:
    """The target's probability, or its output as it comes."""
    check_choice("output", output, ("probability", "logit"))
    if output == "probability" and target is None:
        raise ValueError("a probability is that of a class: pass target=class index (or one per example)")
    if output == "probability":
        way_out = "pass output='logit' to take the target's output as it is"
        forward_func = over_classes(forward_func, lambda logits: logits.softmax(1), way_out)
    return TargetScore(forward_func, target, additional_forward_args, batch)


def counts_of(cells: Cells, steps: int) -> Tensor:
    """Cells inserted after each step, ``(steps + 1, B)``: ``k * n / steps``, halves rounded up."""
    k = torch.arange(steps + 1)[:, None]
    totals = cells.totals.T.expand(1, len(cells.clip))
    return (2 * k * totals + steps) // (2 * steps)


@torch.no_grad()
def walk(cells: Cells, score: TargetScore, order: Order, counts: Tensor) -> Tensor:
    """The scores ``(S, B)`` of clips that show their first ``counts`` ``(S, B)`` cells, and else the cover; float64."""
    ranks = cells.ranks()
    places = cells.spread((ranks if order == "morf" else cells.totals - 1 - ranks)[None].float())
    shape = (-1, counts.shape[1], *[1] * (cells.clip.ndim - 1))
    found = []
    for chunk in counts.split(cells.per_eval):
        shown = (chunk.to(places).view(shape) - places).clamp_(0, 1)  # whole numbers: 1 where place < count, else 0
        found.append(score((cells.blended(shown),), len(chunk)))  # a new tensor, the model may write into it
    return torch.cat(found).double()
