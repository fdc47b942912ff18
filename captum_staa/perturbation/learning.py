"""The loop that learns masks: all areas and all clips at once, the best state kept, stopped where nothing improves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from captum_staa.perturbation.blends import Blend
from captum_staa.perturbation.mask_grid import Field
from captum_staa.perturbation.masks import MaskBatch, Nested, Parametrization
from captum_staa.perturbation.objective import Objective, Scale
from captum_staa.perturbation.regularizers import Regularizer

CHECK_EVERY = 10  # steps; a check costs about a tenth of the ten
PATIENCE = 3  # checks without a gain, after which a clip is done
WARM = (0.1, 0.37, 0.63, 0.9)  # how much of the clip is seen through the even masks that give the first hint

Score = Callable[[tuple[Tensor, ...], int], Tensor]
"""Clips ``(copies * B, ...)`` and ``copies`` to ``(copies, B)``, differentiable."""


@dataclass(frozen=True)
class Task:
    """What is to be learned.

    Attributes:
        score: of altered clips.
        blends: what a mask does to the clip; steps take turns, checks take the mean.
        field: what the masks' numbers stand for.
        parametrization: how masks come from what is learned.
        objective: what they are asked to do.
        regularizer: the term that is added, or None.
        areas: ``(A,)``.
        batch: B.
        perturbations_per_eval: altered copies of the batch per call of the model.
        tick: called after every call of the model.
    """

    score: Score
    blends: Sequence[Blend]
    field: Field
    parametrization: Parametrization
    objective: Objective
    regularizer: Regularizer | None
    areas: Tensor
    batch: int
    perturbations_per_eval: int
    tick: Callable[[], object]

    def calls(self, iterations: int, init: bool) -> int:
        """Of the model, where no clip is done before the last step."""
        count = len(self.areas)
        check = len(self.blends) * -(-2 * count // self.perturbations_per_eval)
        step = -(-len(self.objective.hidden) * count // self.perturbations_per_eval)
        warm = 0 if init or not self.parametrization.warm else -(-len(WARM) // self.perturbations_per_eval)
        first = len(self.blends) * (1 + warm)
        return first + (1 + -(-iterations // CHECK_EVERY)) * check + iterations * step


class Check(NamedTuple):
    """What a mask does, at the asked areas and with the masks as they are handed out.

    Attributes:
        step: after how many steps.
        energy: ``(B,)``, what is minimized: the mean over areas of loss, regularizer and the first step's penalty.
        kept: ``(B, A)``, the score of what the masks show.
        deleted: ``(B, A)``, the score of what they leave.
    """

    step: int
    energy: Tensor
    kept: Tensor
    deleted: Tensor


class OptimizationState:
    """The best state of each clip so far. Every clip counts by itself: none depends on the others of its batch.

    Attributes:
        values: as the parametrization has them.
        best: the check that they passed; its step is that of the last check.
        checks: all of them, in order.
        done: ``(B,)`` bool, clips that no longer improve or can no longer be learned, and keep what they have.
        failed: by clip, the step from which the model gave nan or infinity.
        interrupted: whether Ctrl-C came before the end.
    """

    def __init__(self, values: Tensor, first: Check) -> None:
        self.values, self.best, self.checks = values.clone(), first, [first]
        self.interrupted = False
        self.failed: dict[int, int] = {}
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

    def give_up(self, clips: Tensor, step: int) -> None:
        """These, ``(B,)`` bool, keep what they have; of those that were done already nothing is told."""
        self.failed |= dict.fromkeys((clips & ~self.done).nonzero()[:, 0].tolist(), step)
        self.done |= clips


class _NotFinite(Exception):
    """The model gave nan or infinity."""


def learn(
    task: Task,
    init: Tensor | None,
    iterations: int,
    tolerance: float,
    report: Callable[[Check], object],
) -> OptimizationState:
    """Learn masks; needs gradients to be enabled.

    Args:
        task: what is to be learned.
        init: ``(B, n)``, a map to begin from, or None.
        iterations: most steps.
        tolerance: a clip is done once its energy has not fallen by more than this for three checks in a row.
        report: called with every check.

    Returns:
        :class:`OptimizationState`. After Ctrl-C, or for a clip with nan outputs, what was learned until then, with
        a warning.

    Raises:
        ValueError: the model gives nan before the first step, or no gradient leads from its answer to the clip.
    """
    try:
        floors = _baseline_scores(task)
        if init is None and task.parametrization.warm:
            init = _warm_start(task, floors)
        values = task.parametrization.start(task.field, task.areas, task.batch, init)
        learned = OptimizationState(values, _finite(_check(task, values, 0, floors)))
    except _NotFinite as error:
        raise ValueError(f"{error}, before the first step: no mask can be learned from that") from None
    report(learned.best)
    values.requires_grad_()
    optimizer = task.parametrization.optimizer(values)
    step = 0
    try:
        for step in range(iterations):
            if bool(learned.done.all()):
                break
            drawn = task.parametrization.draw(values, task.field, task.areas, step, step / max(1, iterations - 1))
            slope, bad = _slope(task, drawn, step, floors)
            learned.give_up(bad, step)
            (values.grad,) = torch.autograd.grad(drawn.masks, values, slope)
            optimizer.step()
            if ((step + 1) % CHECK_EVERY == 0 or step + 1 == iterations) and not bool(learned.done.all()):
                check = _check(task, values.detach(), step + 1, floors)
                learned.give_up(_unfit(check), step + 1)
                learned.update(values.detach(), check, tolerance)
                report(learned.best)
    except KeyboardInterrupt:
        learned.interrupted = True
        warnings.warn(f"interrupted at step {step} of {iterations}; the best masks so far are returned", stacklevel=4)
    if learned.failed:
        where = ", ".join(f"clip {clip} at step {first}" for clip, first in learned.failed.items())
        warnings.warn(
            f"the model gives nan or infinity for altered copies of {where}; the best masks until then are returned",
            stacklevel=4,
        )
    return learned


@torch.no_grad()
def _baseline_scores(task: Task) -> Tensor:
    """The scores of clips of which nothing is shown, ``(blends, B)``."""
    nothing = task.field.spread(task.field.shares.new_zeros(task.batch, 1, task.field.shares.shape[1]))
    found = []
    for blend in task.blends:
        found.append(task.score((blend(nothing.transpose(0, 1)),), 1)[0].to(nothing.dtype))
        task.tick()
    floors = torch.stack(found)
    if bool((bad := ~floors.isfinite().all(0)).any()):
        raise _NotFinite(_told(bad))
    return floors


def _warm_start(task: Task, floors: Tensor) -> Tensor:
    """``(B, n)``: where the answer grows as an even mask opens: coarse Integrated Gradients over all ways of hiding.

    For the price of two steps, learning begins with most of the evidence in place.
    """
    shares = task.field.shares
    scale: Scale = "logit" if task.objective.scale == "logit" else "margin"
    even = replace(task, objective=Objective("preserve", scale), regularizer=None, parametrization=Nested())
    levels = shares.new_tensor(WARM)
    masks = levels[:, None].repeat(task.batch, 1, shares.shape[1])
    masks = masks.view(task.batch, len(levels), -1)
    slope = torch.zeros_like(masks)
    for step in range(len(task.blends)):
        part, bad = _slope(even, MaskBatch(masks, levels), step, floors)
        if bool(bad.any()):
            raise _NotFinite(_told(bad))
        slope += part
    density = -slope.sum(1) / shares.clamp_min(torch.finfo(shares.dtype).tiny)
    return task.field.gather(task.field.spread(density[:, None])[:, 0])  # which smooths a grid, and leaves regions


def _slope(task: Task, drawn: MaskBatch, step: int, floors: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the sum of energies over areas along the masks, ``(B, A, n)``; call of the model after call.

    And ``(B,)`` bool, for which clips there is none, and 0, as the model's answer or its gradient is not finite.
    """
    leaf = drawn.masks.detach().requires_grad_()
    bad = torch.zeros(len(leaf), dtype=torch.bool, device=leaf.device)
    total, count = torch.zeros_like(leaf), leaf.shape[1]
    blend = task.blends[step % len(task.blends)]
    hidden = torch.tensor(task.objective.hidden, device=leaf.device).repeat_interleave(count)
    areas = torch.arange(count, device=leaf.device).repeat(len(task.objective.hidden))
    for which, number in zip(
        hidden.split(task.perturbations_per_eval), areas.split(task.perturbations_per_eval), strict=True
    ):
        scores = _scores(task, blend, leaf, which, number)
        losses = task.objective.losses(scores, which, floors[step % len(task.blends)])
        bad |= ~losses.isfinite().all(0)
        if not losses.requires_grad:
            raise ValueError(_NO_GRADIENT)
        (slope,) = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)
        if slope is None:
            raise ValueError(_NO_GRADIENT)
        total += slope
    own = task.parametrization.penalty(MaskBatch(leaf, drawn.areas), task.field, step)
    if task.regularizer is not None:
        own = own + task.regularizer(task.field.spread(leaf), drawn.areas)
    if own.requires_grad:
        total += torch.autograd.grad(own.sum(), leaf)[0]
    bad |= ~total.isfinite().flatten(1).all(1)
    return total.masked_fill(bad[:, None, None], 0), bad


@torch.no_grad()
def _check(task: Task, values: Tensor, step: int, floors: Tensor) -> Check:
    """What the masks of the asked areas do, over all blends."""
    masks = task.parametrization.final(values, task.field, task.areas)
    count = masks.shape[1]
    every = torch.arange(2 * count, device=masks.device)  # what each mask shows, then what each leaves
    found = masks.new_zeros(2 * count, len(masks))
    for blend in task.blends:
        for chunk in every.split(task.perturbations_per_eval):
            found[chunk] += _scores(task, blend, masks, chunk >= count, chunk % count) / len(task.blends)
    energy = task.parametrization.penalty(MaskBatch(masks, task.areas), task.field, 0)  # (B, A)
    if task.regularizer is not None:
        energy = energy + task.regularizer(task.field.spread(masks), task.areas)
    floor = floors.mean(0)
    for hidden, part in zip((False, True), found.split(count), strict=True):
        if hidden in task.objective.hidden:
            energy = (
                energy + task.objective.losses(part, torch.full_like(every[:count], hidden, dtype=torch.bool), floor).T
            )
    kept, deleted = found.T.split(count, dim=1)
    return Check(step, energy.mean(1), kept, deleted)


def _scores(task: Task, blend: Blend, masks: Tensor, hidden: Tensor, areas: Tensor) -> Tensor:
    """The scores ``(P, B)`` of copies under the masks of these areas; where ``hidden``, under what they leave."""
    numbers = masks[:, areas]  # (B, P, n)
    # turned round while they are few: what is spread of 1 - p is 1 less what is spread of p
    shown = task.field.spread(torch.where(hidden[:, None], 1 - numbers, numbers))
    scores = task.score((blend(shown.transpose(0, 1)),), len(hidden))
    task.tick()
    return scores.to(masks.dtype)


def _unfit(check: Check) -> Tensor:
    """``(B,)`` bool, clips for which the model does not give finite scores."""
    return ~(check.kept.isfinite().all(1) & check.deleted.isfinite().all(1))


def _told(bad: Tensor) -> str:
    return f"the model gives nan or infinity for altered copies of clips {bad.nonzero()[:, 0].tolist()}"


def _finite(check: Check) -> Check:
    if bool((bad := _unfit(check)).any()):
        raise _NotFinite(_told(bad))
    return check


_NO_GRADIENT = (
    "no gradient leads from the model's output to the clip, so no mask can be learned: something on the way cuts it, "
    "such as torch.no_grad(), .detach() of a recurrent state, .item(), numpy or argmax; mend the model, or explain it "
    "without gradients, by VideoOcclusion or RISE"
)
