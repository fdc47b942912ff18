"""The loop that learns masks: all areas and all clips at once, the best state kept, stopped where nothing improves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from captum_staa.perturbation.blends import Blend
from captum_staa.perturbation.fields import Field
from captum_staa.perturbation.masks import Drawn, Parametrisation
from captum_staa.perturbation.objective import Objective
from captum_staa.perturbation.smoothness import Smoothness

CHECK_EVERY = 10  # steps; a check costs about a tenth of the ten
PATIENCE = 3  # checks without a gain, after which a clip is done

Score = Callable[[tuple[Tensor, ...], int], Tensor]
"""Clips ``(copies * B, ...)`` and ``copies`` to ``(copies, B)``, differentiable."""


@dataclass(frozen=True)
class Task:
    """What is to be learnt.

    Attributes:
        score: of altered clips.
        blends: what a mask does to the clip; steps take turns, checks take the mean.
        field: what the masks' numbers stand for.
        parametrisation: how masks come from what is learnt.
        objective: what they are asked to do.
        smoothness: the term that is added, or None.
        areas: ``(A,)``.
        batch: B.
        per_eval: altered copies of the batch per call of the model.
    """

    score: Score
    blends: Sequence[Blend]
    field: Field
    parametrisation: Parametrisation
    objective: Objective
    smoothness: Smoothness | None
    areas: Tensor
    batch: int
    per_eval: int

    def calls(self, iterations: int) -> int:
        """Of the model, where no clip is done before the last step."""
        count = len(self.areas)
        check = len(self.blends) * -(-2 * count // self.per_eval)
        step = -(-len(self.objective.hidden) * count // self.per_eval)
        return (1 + -(-iterations // CHECK_EVERY)) * check + iterations * step


class Check(NamedTuple):
    """What a mask does, at the asked areas and with the masks as they are handed out.

    Attributes:
        step: after how many steps.
        energy: ``(B,)``, what is minimised: the mean over areas of loss, smoothness and the first step's penalty.
        kept: ``(B, A)``, the score of what the masks show.
        deleted: ``(B, A)``, the score of what they leave.
    """

    step: int
    energy: Tensor
    kept: Tensor
    deleted: Tensor


class Learnt:
    """The best state of each clip so far. Every clip counts by itself: none depends on the others of its batch.

    Attributes:
        values: as the parametrisation has them.
        best: the check that they passed; its step is that of the last check.
        checks: all of them, in order.
        done: ``(B,)`` bool, clips that no longer improve, and keep what they have.
    """

    def __init__(self, values: Tensor, first: Check) -> None:
        self.values, self.best, self.checks = values.clone(), first, [first]
        self.done = torch.zeros_like(first.energy, dtype=torch.bool)
        self._stalled = torch.zeros_like(first.energy, dtype=torch.int64)  # checks since the last gain

    def update(self, values: Tensor, check: Check, tolerance: float) -> None:
        """Take over what is better."""
        self.checks.append(check)
        before = self.best.energy
        better = (check.energy < before) & ~self.done
        self.values[better] = values[better]
        parts = (
            torch.where(better.view(-1, *[1] * (a.ndim - 1)), a, b)
            for a, b in zip(check[1:], self.best[1:], strict=True)
        )
        self.best = Check(check.step, *parts)
        self._stalled = torch.where(better & (check.energy < before - tolerance), 0, self._stalled + 1)
        self.done |= self._stalled >= PATIENCE


class _NotFinite(Exception):
    """The model gave nan or infinity."""


def learn(
    task: Task,
    init: Tensor | None,
    iterations: int,
    tolerance: float,
    tick: Callable[[], object],
    report: Callable[[Check], object],
) -> Learnt:
    """Learn masks; needs gradients to be enabled.

    Args:
        task: what is to be learnt.
        init: ``(B, n)``, a map to begin from, or None.
        iterations: most steps.
        tolerance: a clip is done once its energy has not fallen by more than this for three checks in a row.
        tick: called after every call of the model.
        report: called with every check.

    Returns:
        :class:`Learnt`. After Ctrl-C, or once the model gives nan, what had been learnt until then, with a warning.

    Raises:
        ValueError: the model gives nan before the first step, or no gradient leads from its answer to the clip.
    """
    values = task.parametrisation.start(task.field, task.areas, task.batch, init)
    try:
        learnt = Learnt(values, _check(task, values, 0, tick))
    except _NotFinite as error:
        raise ValueError(f"{error}, before the first step: no mask can be learnt from that") from None
    report(learnt.best)
    values.requires_grad_()
    optimiser = task.parametrisation.optimiser(values)
    step = 0
    try:
        for step in range(iterations):
            if bool(learnt.done.all()):
                break
            drawn = task.parametrisation.draw(values, task.field, task.areas, step, step / max(1, iterations - 1))
            (values.grad,) = torch.autograd.grad(drawn.masks, values, _slope(task, drawn, step, tick))
            optimiser.step()
            if (step + 1) % CHECK_EVERY == 0 or step + 1 == iterations:
                check = _check(task, values.detach(), step + 1, tick)
                learnt.update(values.detach(), check, tolerance)
                report(learnt.best)
    except _NotFinite as error:
        warnings.warn(f"{error}, at step {step}; the best masks until then are returned", stacklevel=4)
    except KeyboardInterrupt:
        warnings.warn(f"interrupted at step {step} of {iterations}; the best masks so far are returned", stacklevel=4)
    return learnt


def _slope(task: Task, drawn: Drawn, step: int, tick: Callable[[], object]) -> Tensor:
    """The gradient of the step's energy along its masks, ``(B, A, n)``; one call of the model after the other."""
    leaf = drawn.masks.detach().requires_grad_()
    total, count = torch.zeros_like(leaf), leaf.shape[1]
    blend = task.blends[step % len(task.blends)]
    hidden = torch.tensor(task.objective.hidden, device=leaf.device).repeat_interleave(count)
    areas = torch.arange(count, device=leaf.device).repeat(len(task.objective.hidden))
    for which, number in zip(hidden.split(task.per_eval), areas.split(task.per_eval), strict=True):
        losses = task.objective.losses(_scores(task, blend, leaf, which, number), which)
        tick()
        _check_finite(losses)
        if not losses.requires_grad:
            raise ValueError(_NO_GRADIENT)
        (slope,) = torch.autograd.grad(losses.sum() / count, leaf, allow_unused=True)
        if slope is None:
            raise ValueError(_NO_GRADIENT)
        total += slope
    own = task.parametrisation.penalty(Drawn(leaf, drawn.areas), task.field, step)
    if task.smoothness is not None:
        own = own + task.smoothness(task.field.spread(leaf), drawn.areas)
    if own.requires_grad:
        total += torch.autograd.grad(own.sum() / count, leaf)[0]
    return total


@torch.no_grad()
def _check(task: Task, values: Tensor, step: int, tick: Callable[[], object]) -> Check:
    """What the masks of the asked areas do, over all blends."""
    masks = task.parametrisation.final(values, task.field, task.areas)
    count = masks.shape[1]
    every = torch.arange(2 * count, device=masks.device)  # what each mask shows, then what each leaves
    found = masks.new_zeros(2 * count, len(masks))
    for blend in task.blends:
        for chunk in every.split(task.per_eval):
            found[chunk] += _scores(task, blend, masks, chunk >= count, chunk % count) / len(task.blends)
            tick()
    _check_finite(found)
    energy = task.parametrisation.penalty(Drawn(masks, task.areas), task.field, 0)  # (B, A)
    if task.smoothness is not None:
        energy = energy + task.smoothness(task.field.spread(masks), task.areas)
    for hidden, part in zip((False, True), found.split(count), strict=True):
        if hidden in task.objective.hidden:
            energy = energy + task.objective.losses(part, torch.full_like(every[:count], hidden, dtype=torch.bool)).T
    kept, deleted = found.T.split(count, dim=1)
    return Check(step, energy.mean(1), kept, deleted)


def _scores(task: Task, blend: Blend, masks: Tensor, hidden: Tensor, areas: Tensor) -> Tensor:
    """The scores ``(P, B)`` of copies under the masks of these areas; where ``hidden``, under what they leave."""
    shown = task.field.spread(masks[:, areas]).transpose(0, 1)  # (P, B, T, H, W)
    turned = hidden[:, None, None, None, None].to(shown)
    return task.score((blend(turned + (1 - 2 * turned) * shown),), len(hidden)).to(masks.dtype)


def _check_finite(scores: Tensor) -> None:
    if bad := int((~scores.isfinite()).sum()):
        raise _NotFinite(f"the model gives nan or infinity for {bad} of {scores.numel()} altered clips")


_NO_GRADIENT = (
    "no gradient leads from the model's output to the clip, so no mask can be learnt: something on the way cuts it, "
    "such as torch.no_grad(), .detach() of a recurrent state, .item(), numpy or argmax; mend the model, or explain it "
    "without gradients, by VideoOcclusion or RISE"
)
