"""From a map to a walk: units in the order of their attribution, and the clips that hold the first of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from captum_staa._captum import BaselineType, TargetType
from captum_staa.layout import VideoLayout
from captum_staa.metrics._metric import Array
from captum_staa.metrics._units import Axis, check_choice, maps_of, units_of
from captum_staa.models.layouts import layout_of
from captum_staa.perturbation.arguments import baselines_for
from captum_staa.perturbation.scores import TargetScore

Output = Literal["probability", "logit"]


class Walk(NamedTuple):
    """A clip's units in the order of a map, ready to be inserted into the baseline.

    Attributes:
        clip: ``(B, ...)``, detached.
        baseline: of the clip's shape.
        ranks: int32 in the clip's layout, of size 1 along channels: the place of each voxel's unit, 0 first.
        totals: ``(B,)`` int64 on the CPU, how many units each clip has.
    """

    clip: Tensor
    baseline: Tensor
    ranks: Tensor
    totals: Tensor


def walk_of(
    forward_func: object,
    clip: Tensor,
    attributions: Array,
    layout: VideoLayout | str | None,
    cells: Sequence[int] | None,
    feature_mask: Tensor | None,
    baselines: BaselineType,
    axis: Axis,
) -> Walk:
    """Everything checked, and the units ranked; the arguments are those of :func:`captum_staa.metrics.insertion`."""
    layout = layout_of(forward_func, layout)
    layout.check_values(clip, "clip")
    units = units_of(forward_func, clip, layout, cells, feature_mask, axis)
    (baseline,) = baselines_for((clip,), baselines)
    ranks, totals = ranks_of(maps_of(attributions, clip, layout), units)
    ranks = layout.from_working(ranks[:, :, None]).to(clip.device, torch.int32)
    return Walk(clip.detach(), baseline, ranks, totals)


def score_of(
    forward_func: Callable[..., Any], target: TargetType, additional_forward_args: object, output: Output, batch: int
) -> TargetScore:
    """The target's probability, or its output as it comes."""
    check_choice("output", output, ("probability", "logit"))
    if output == "probability" and target is None:
        raise ValueError("a probability is that of a class: pass target=class index (or one per example)")
    function = probabilities_of(forward_func) if output == "probability" else forward_func
    return TargetScore(function, target, additional_forward_args, batch)


def ranks_of(maps: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """The place of each voxel's unit, 0 for the highest mean attribution; and how many units each clip has.

    Args:
        maps: ``(B, T, H, W)`` float64.
        units: as :func:`units_of` gives them. A unit may be missing from a clip; it is not counted there.

    Returns:
        ``(B, T, H, W)`` int64, equal means in the order of their ids; ``(B,)`` int64. Both on the CPU.
    """
    values = maps.cpu().flatten(1)  # (B, voxels)
    ids = units.flatten(1).expand_as(values)
    zeros = values.new_zeros(len(values), int(units.max()) + 1)  # (B, units)
    count = zeros.scatter_add(1, ids, torch.ones_like(values))
    # The rounding of a sum depends on the number of its terms. Within the extremes of its voxels, the mean of a unit
    # of one value is this value, so that units of different size can tie.
    lowest, highest = (zeros.scatter_reduce(1, ids, values, how, include_self=False) for how in ("amin", "amax"))
    mean = (zeros.scatter_add(1, ids, values) / count).clamp(lowest, highest)
    mean = mean.where(count > 0, -torch.inf)  # missing units come last, where no step reaches
    places = mean.argsort(dim=1, descending=True, stable=True).argsort(1)
    return places.gather(1, ids).view_as(maps), (count > 0).sum(1)


def counts_of(units: Tensor, steps: int) -> Tensor:
    """Units inserted after each step, ``(steps + 1, B)``: ``k * n / steps``, halves rounded up."""
    k = torch.arange(steps + 1)[:, None]
    return (2 * k * units + steps) // (2 * steps)


@torch.no_grad()
def scores_between(walk: Walk, score: TargetScore, first: Tensor, end: Tensor, perturbations_per_eval: int) -> Tensor:
    """The scores ``(S, B)`` of clips that hold the units of rank ``first`` to ``end - 1``, and else the baseline.

    Args:
        walk: the units.
        score: inputs of ``copies * B`` examples, and ``copies``, to ``(copies, B)``.
        first, end: ``(S, B)``.
        perturbations_per_eval: of the S, so many per call of the model.

    Returns:
        float64 on the clip's device.
    """
    found = torch.empty(first.shape, dtype=torch.float64, device=walk.clip.device)
    for start in range(0, len(found), perturbations_per_eval):
        rows = slice(start, start + perturbations_per_eval)
        low, high = (bound[rows, :, None, None, None, None].to(walk.ranks) for bound in (first, end))
        held = (walk.ranks >= low) & (walk.ranks < high)
        altered = torch.where(held, walk.clip, walk.baseline)  # (copies, B, ...), new: the model may write into it
        found[rows] = score((altered.flatten(0, 1),), len(altered))
    return found


def probabilities_of(forward_func: Callable[..., Any]) -> Callable[..., Tensor]:
    """The same function with a softmax over its classes, in float32 at least."""

    def probabilities(*inputs: Any) -> Tensor:
        logits = forward_func(*inputs)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
            came = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"output='probability' is a softmax over logits (B, K) of several classes, but the model gives {came}; "
                f"pass output='logit' to take the target's output as it is"
            )
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)

    return probabilities
