"""The optimization loop that learns masks.

It learns the masks of all areas and all clips at once, and keeps the best state of each clip.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from captum_staa._utils.networks import lacks_backward
from captum_staa.perturbation.blends import Blend
from captum_staa.perturbation.config import (
    EVALUATE_EVERY,
    OBJECTIVES,
    PerturbationConfig,
    Scale,
    evaluations,
    losses,
)
from captum_staa.perturbation.mask_grid import CellGrid, MaskGrid
from captum_staa.perturbation.masks import MaskBatch, Nested, standardized

COARSE = 2  # random values along each axis of the random masks whose gradients give the initial map

Score = Callable[[tuple[Tensor, ...], int], Tensor]
"""Differentiable function from clips ``(P * B, T, C, H, W)`` and ``P`` to scores ``(P, B)``."""


@dataclass(frozen=True)
class Problem:
    """The optimization problem of one call.

    Attributes:
        config: the options. Its scale is that of ``score``.
        score: score of perturbed clips.
        blends: how a mask blends the clip with a baseline. Steps cycle through the blends. Evaluations average over
            them.
        grid: expands the values of a mask to voxels.
        areas: ``(A,)``, target areas of the masks, in (0, 1): those of ``config`` as a tensor.
        batch: B, number of clips.
        perturbations_per_eval: perturbations of the batch per call of the model.
        tick: called after every call of the model.
    """

    config: PerturbationConfig
    score: Score
    blends: Sequence[Blend]
    grid: MaskGrid
    areas: Tensor
    batch: int
    perturbations_per_eval: int
    tick: Callable[[], object]

    def calls(self, init: bool) -> int:
        """Return the number of calls of the model."""

        def calls(perturbations: int) -> int:
            return -(-perturbations // self.perturbations_per_eval)

        config, parametrization, blends = self.config, self.config.parametrization, len(self.blends)
        random = 0 if init else parametrization.gradients
        first = blends + sum(calls(len(range(blend, random, blends))) for blend in range(blends))
        first += 0 if init else 2 * calls(math.prod(_window_counts(self)))
        step = calls(len(OBJECTIVES[config.objective]) * parametrization.masks_per_step(len(self.areas)))
        return first + config.iterations * step + evaluations(config.iterations) * blends * calls(2 * len(self.areas))


class Evaluation(NamedTuple):
    """Scores of the masks of the result, at the requested areas, after some number of steps.

    Attributes:
        step: number of steps so far.
        energy: ``(B,)``, the minimized quantity: the mean over areas of loss, regularizer and area penalty, with the
            penalty's weight at the first step.
        kept: ``(B, A)``, the score of clips that keep what the masks select.
        removed: ``(B, A)``, the score of clips from which it is removed.
    """

    step: int
    energy: Tensor
    kept: Tensor
    removed: Tensor


class OptimizationState:
    """The best state of each clip so far. A clip's state does not depend on the other clips of the batch.

    Attributes:
        values: the best learned values, in the shape that the parametrization defines.
        best: the evaluation of these values. Its ``step`` is that of the last evaluation.
        evaluations: all evaluations, in order.
        failed: maps the index of a clip to the step at which the model returned nan or infinity for it.
        interrupted: whether a KeyboardInterrupt (Ctrl-C) ended the optimization.
    """

    def __init__(self, values: Tensor, first: Evaluation) -> None:
        self.values, self.best, self.evaluations = values.clone(), first, [first]
        self.interrupted = False
        self.failed: dict[int, int] = {}

    @property
    def done(self) -> bool:
        """Whether the model failed on all clips."""
        return len(self.failed) == len(self.values)

    def update(self, values: Tensor, evaluation: Evaluation) -> None:
        """Store the values of the clips that improved. Those of failed clips are final."""
        self.evaluations.append(evaluation)
        better = evaluation.energy < self.best.energy
        better[list(self.failed)] = False
        self.values[better] = values[better]
        parts = (
            torch.where(better.view(-1, *[1] * (a.ndim - 1)), a, b)
            for a, b in zip(evaluation[1:], self.best[1:], strict=True)
        )
        self.best = Evaluation(evaluation.step, *parts)

    def give_up(self, clips: Tensor, step: int) -> None:
        """Mark ``clips``, ``(B,)`` bool, as failed."""
        self.failed = dict.fromkeys(clips.nonzero()[:, 0].tolist(), step) | self.failed


class _NotFinite(Exception):
    """The model returned nan or infinity."""


def learn(problem: Problem, init: Tensor | None, report: Callable[[Evaluation], object]) -> OptimizationState:
    """Learn masks. Gradients must be enabled.

    Args:
        problem: the optimization problem.
        init: a map ``(B, n)`` to start from, or None.
        report: called with the best evaluation so far, after every evaluation.

    Returns:
        The :class:`OptimizationState`. After Ctrl-C, or for a clip with nan outputs, it holds the best state so far,
        with a warning.

    Raises:
        ValueError: The model returns nan before the first step, or its output has no gradient with respect to the clip.
    """
    parametrization, iterations = problem.config.parametrization, problem.config.iterations
    try:
        baseline_scores = _baseline_scores(problem)
        if init is None and (parametrization.gradients or parametrization.windows):
            init = _warm_start(problem, baseline_scores)
        values = parametrization.start(problem.grid, problem.areas, problem.batch, init)
        learned = OptimizationState(values, _finite(_evaluate(problem, values, 0, baseline_scores)))
    except _NotFinite as error:
        raise ValueError(
            f"{error}, before the first step, so no mask can be learned. Check that the model returns finite "
            f"outputs for this clip and for baselines."
        ) from None
    report(learned.best)
    values.requires_grad_()
    descend = parametrization.descent(values, problem.grid, iterations)
    step = 0
    try:
        for step in range(iterations):
            if learned.done:
                break
            drawn = parametrization.draw(values, problem.grid, problem.areas, step, step / max(1, iterations - 1))
            slope, bad = _slope(problem, drawn, step, baseline_scores)
            learned.give_up(bad, step)
            # a sum: with grad_outputs, torch would import its symbolic shapes, which takes a second and 50 MB
            descend(torch.autograd.grad((drawn.masks * slope).sum(), values)[0])
            if ((step + 1) % EVALUATE_EVERY == 0 or step + 1 == iterations) and not learned.done:
                evaluation = _evaluate(problem, values.detach(), step + 1, baseline_scores)
                learned.give_up(_nonfinite(evaluation), step + 1)
                learned.update(values.detach(), evaluation)
                report(learned.best)
    except KeyboardInterrupt:
        learned.interrupted = True
        warnings.warn(f"interrupted at step {step} of {iterations}. The best masks so far are returned.", stacklevel=4)
    if learned.failed:
        where = ", ".join(f"clip {clip} at step {first}" for clip, first in learned.failed.items())
        warnings.warn(
            f"the model returns nan or infinity for perturbations of {where}. The best masks until then are returned.",
            stacklevel=4,
        )
    return learned


@torch.no_grad()
def _baseline_scores(problem: Problem) -> Tensor:
    """Return the scores of clips that are replaced entirely by the baseline of each blend, ``(blends, B)``."""
    nothing = problem.grid.spread(problem.grid.shares.new_zeros(problem.batch, 1, problem.grid.shares.shape[1]))
    per_blend = []
    for blend in problem.blends:
        per_blend.append(problem.score((blend(nothing.transpose(0, 1)),), 1)[0].to(nothing.dtype))
        problem.tick()
    baseline_scores = torch.stack(per_blend)
    if bool((bad := ~baseline_scores.isfinite().all(0)).any()):
        raise _NotFinite(_nonfinite_message(bad))
    return baseline_scores


def _warm_start(problem: Problem, baseline_scores: Tensor) -> Tensor:
    """Return an initial map ``(B, n)``, from gradients at random masks and from windows that are removed and kept.

    A single gradient depends on the point where it is taken. Random masks, from which different parts of the clip are
    removed, give a mean slope as Integrated Gradients and RISE do. It is signed, so it tells evidence for the target
    from evidence for other classes.
    """
    grid, config = problem.grid, problem.config
    scale: Scale = "logit" if config.scale == "logit" else "margin"
    own = replace(config, parametrization=Nested(), objective="preserve", scale=scale, regularizer=None)
    masks = _random_masks(grid, config.parametrization.gradients, problem.batch)
    slope = grid.shares.new_zeros(problem.batch, masks.shape[2])
    for blend in range(min(len(problem.blends), masks.shape[1])):
        drawn = MaskBatch(masks[:, blend :: len(problem.blends)], problem.areas)
        part, bad = _slope(replace(problem, config=own), drawn, blend, baseline_scores)
        if bool(bad.any()):
            raise _NotFinite(_nonfinite_message(bad))
        slope -= part.sum(1)
    return config.parametrization.initial(slope, _window_changes(problem), grid)


def _window_counts(problem: Problem) -> tuple[int, int, int]:
    """Return the number of windows along each axis, at most one per frame or pixel; 0 if there are none."""
    t, h, w = (min(problem.config.parametrization.windows, side) for side in problem.grid.size)
    return t, h, w


@torch.no_grad()
def _window_changes(problem: Problem) -> Tensor:
    """Return how much each part of the clip matters as a whole, ``(B, n)``.

    The clip is divided into equal windows. Each window is removed from the clip, with the last blend, and its score
    subtracted; and it is kept alone, with the first blend, and its score added. Both are standardized over windows,
    since one of them may change the score much more, and interpolated between the centers of the windows.
    """
    grid, counts = problem.grid, _window_counts(problem)
    windows, batch = math.prod(counts), problem.batch
    if not windows:
        return grid.shares.new_zeros(batch, grid.shares.shape[1])
    t, h, w = (torch.arange(side) * count // side for side, count in zip(grid.size, counts, strict=True))
    ids = ((t[:, None, None] * counts[1] + h[:, None]) * counts[2] + w).to(grid.shares.device)  # (T, H, W)
    total = grid.shares.new_zeros(batch, windows)
    for removed, blend in ((True, problem.blends[-1]), (False, problem.blends[0])):
        scores = grid.shares.new_zeros(windows, batch)
        for chunk in torch.arange(windows, device=ids.device).split(problem.perturbations_per_eval):
            kept = (ids == chunk[:, None, None, None]) != removed  # (P, T, H, W)
            masks = kept[:, None].expand(-1, batch, -1, -1, -1).to(grid.shares)
            scores[chunk] = problem.score((blend(masks),), len(chunk)).to(grid.shares.dtype)
            problem.tick()
        if bool((bad := ~scores.isfinite().all(0)).any()):
            raise _NotFinite(_nonfinite_message(bad))
        own = standardized(scores.T, torch.ones_like(scores.T))
        total += -own if removed else own
    return grid.gather(CellGrid(grid.size, counts, grid.shares).spread(total[:, None])[:, 0])


def _random_masks(grid: MaskGrid, count: int, batch: int) -> Tensor:
    """Return random masks ``(B, count, n)``, the same for all clips: values in [0, 1] of a few large, blended cells."""
    t, h, w = (min(COARSE, side) for side in grid.size)
    coarse = CellGrid(grid.size, (t, h, w), grid.shares)
    draws = torch.rand(1, count, t * h * w, generator=torch.Generator().manual_seed(0)).to(grid.shares)
    masks = grid.shares.new_empty(batch, count, grid.shares.shape[1])
    for number, draw in enumerate(draws.unbind(1)):
        masks[:, number] = grid.gather(coarse.spread(draw[:, None])[:, 0].expand(batch, -1, -1, -1))
    return masks


def _slope(problem: Problem, drawn: MaskBatch, step: int, baseline_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient ``(B, A, n)`` of the summed energies with respect to the masks, and which clips failed.

    The second result is ``(B,)`` bool. It is True where the model's output or its gradient is not finite; the gradient
    is 0 there.
    """
    leaf = drawn.masks.detach().requires_grad_()
    bad = torch.zeros(len(leaf), dtype=torch.bool, device=leaf.device)
    total, count = torch.zeros_like(leaf), leaf.shape[1]
    number = step % len(problem.blends)
    kinds = torch.tensor(OBJECTIVES[problem.config.objective], device=leaf.device)
    every = torch.arange(len(kinds) * count, device=leaf.device)  # all areas of the first kind, then of the second
    for chunk in every.split(problem.perturbations_per_eval):
        removed = kinds[chunk // count]
        scores = _scores(problem, problem.blends[number], leaf, removed, chunk % count)
        loss = losses(problem.config.scale, scores, removed, baseline_scores[number])
        bad |= ~loss.isfinite().all(0)
        if not loss.requires_grad:
            raise NoGradientError(_NO_GRADIENT)
        (slope,) = torch.autograd.grad(loss.sum(), leaf, allow_unused=True)
        if slope is None:
            raise NoGradientError(_NO_GRADIENT)
        total += slope
    if step == 0 and lacks_backward(loss.grad_fn):  # its gradient is zero: a residual connection may pass it by
        raise NoGradientError(_NO_GRADIENT)
    terms = _terms(problem, MaskBatch(leaf, drawn.areas), step)
    if terms.requires_grad:
        total += torch.autograd.grad(terms.sum(), leaf)[0]
    bad |= ~total.isfinite().flatten(1).all(1)
    return total.masked_fill(bad[:, None, None], 0), bad


@torch.no_grad()
def _evaluate(problem: Problem, values: Tensor, step: int, baseline_scores: Tensor) -> Evaluation:
    """Return the evaluation of the masks at the requested areas, averaged over all blends."""
    masks = problem.config.parametrization.final(values, problem.grid, problem.areas)
    count = masks.shape[1]
    every = torch.arange(2 * count, device=masks.device)  # first the selection of each mask is kept, then removed
    scores = masks.new_zeros(2 * count, len(masks))
    for blend in problem.blends:
        for chunk in every.split(problem.perturbations_per_eval):
            scores[chunk] += _scores(problem, blend, masks, chunk >= count, chunk % count) / len(problem.blends)
    energy = _terms(problem, MaskBatch(masks, problem.areas), None)  # (B, A)
    kept, removed = scores.split(count)  # (A, B) each
    for is_removed in OBJECTIVES[problem.config.objective]:
        flags = torch.full((count,), is_removed, device=masks.device)
        part = removed if is_removed else kept
        energy = energy + losses(problem.config.scale, part, flags, baseline_scores.mean(0)).T
    return Evaluation(step, energy.mean(1), kept.T, removed.T)


def _terms(problem: Problem, drawn: MaskBatch, step: int | None) -> Tensor:
    """Return the area penalty plus the regularizer, ``(B, A)``, with the weights of this step.

    None means the weight of the area penalty at the first step, and the regularizer also if it starts later.
    """
    terms = problem.config.parametrization.penalty(drawn, problem.grid, step or 0)
    regularizer = problem.config.regularizer
    if regularizer is not None and (step is None or step >= getattr(regularizer, "start", 0)):
        terms = terms + regularizer(problem.grid.spread(drawn.masks), drawn.areas)
    return terms


def _scores(problem: Problem, blend: Blend, masks: Tensor, removed: Tensor, areas: Tensor) -> Tensor:
    """Return the scores ``(P, B)`` of clips blended by the masks of these areas, inverted where ``removed``."""
    values = masks[:, areas]  # (B, P, n)
    # invert before spreading, on fewer numbers: spread(1 - v) == 1 - spread(v)
    kept = problem.grid.spread(torch.where(removed[:, None], 1 - values, values))
    scores = problem.score((blend(kept.transpose(0, 1)),), len(removed))
    problem.tick()
    return scores.to(masks.dtype)


def _nonfinite(evaluation: Evaluation) -> Tensor:
    """Return ``(B,)`` bool, True for clips with scores that are not finite."""
    return ~(evaluation.kept.isfinite().all(1) & evaluation.removed.isfinite().all(1))


def _nonfinite_message(bad: Tensor) -> str:
    return f"the model returns nan or infinity for perturbations of clips {bad.nonzero()[:, 0].tolist()}"


def _finite(evaluation: Evaluation) -> Evaluation:
    if bool((bad := _nonfinite(evaluation)).any()):
        raise _NotFinite(_nonfinite_message(bad))
    return evaluation


class NoGradientError(ValueError):
    """Raised when the model's output has no gradient with respect to the clip."""


_NO_GRADIENT = (
    "the model's output must have a gradient with respect to the clip, got none, so no mask can be learned. Typical "
    "causes are torch.no_grad(), .detach() of a recurrent state, .item(), numpy, argmax or quantized layers. Fix the "
    "model, or use a method without gradients: VideoOcclusion or RISE."
)
