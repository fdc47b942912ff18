"""The optimization loop that learns masks.

It learns the masks of all areas and all clips at once, keeps the best state of each clip, and stops a clip when it no
longer improves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from captum_staa._utils.networks import lacks_backward
from captum_staa.perturbation.blends import Blend
from captum_staa.perturbation.config import OBJECTIVES, PerturbationConfig, Scale, losses
from captum_staa.perturbation.mask_grid import MaskGrid
from captum_staa.perturbation.masks import MaskBatch, Nested

EVALUATE_EVERY = 10  # steps; an evaluation costs about a tenth of these steps
PATIENCE = 3  # evaluations without improvement after which a clip is done
WARM_LEVELS = (0.1, 0.37, 0.63, 0.9)  # values of the uniform masks whose gradients give the initial map

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
        """Return the number of calls of the model if no clip is done before the last step."""

        def evals(perturbations: int) -> int:
            return -(-perturbations // self.perturbations_per_eval)

        count, steps = len(self.areas), self.config.iterations
        first = 1 + (0 if init or not self.config.parametrization.warm else evals(len(WARM_LEVELS)))
        evaluations = 1 + -(-steps // EVALUATE_EVERY)
        step = evals(len(OBJECTIVES[self.config.objective]) * count)
        return len(self.blends) * (first + evaluations * evals(2 * count)) + steps * step


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
        done: ``(B,)`` bool, clips whose values are final: they no longer improve, or the model failed on them.
        failed: maps the index of a clip to the step at which the model returned nan or infinity for it.
        interrupted: whether a KeyboardInterrupt (Ctrl-C) ended the optimization.
    """

    def __init__(self, values: Tensor, first: Evaluation) -> None:
        self.values, self.best, self.evaluations = values.clone(), first, [first]
        self.interrupted = False
        self.failed: dict[int, int] = {}
        self.done = torch.zeros_like(first.energy, dtype=torch.bool)
        self._stalled = torch.zeros_like(first.energy, dtype=torch.int64)  # evaluations since the last gain

    def update(self, values: Tensor, evaluation: Evaluation, tolerance: float) -> None:
        """Store the values of the clips that improved, and mark clips without recent improvement as done."""
        self.evaluations.append(evaluation)
        before = self.best.energy
        better = (evaluation.energy < before) & ~self.done
        self.values[better] = values[better]
        parts = (
            torch.where(better.view(-1, *[1] * (a.ndim - 1)), a, b)
            for a, b in zip(evaluation[1:], self.best[1:], strict=True)
        )
        self.best = Evaluation(evaluation.step, *parts)
        self._stalled = torch.where(better & (evaluation.energy < before - tolerance), 0, self._stalled + 1)
        self.done |= self._stalled >= PATIENCE

    def give_up(self, clips: Tensor, step: int) -> None:
        """Mark ``clips``, ``(B,)`` bool, as failed and done. Clips that were done before do not count as failed."""
        self.failed |= dict.fromkeys((clips & ~self.done).nonzero()[:, 0].tolist(), step)
        self.done |= clips


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
        if init is None and parametrization.warm:
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
    optimizer = parametrization.optimizer(values)
    step = 0
    try:
        for step in range(iterations):
            if bool(learned.done.all()):
                break
            drawn = parametrization.draw(values, problem.grid, problem.areas, step, step / max(1, iterations - 1))
            slope, bad = _slope(problem, drawn, step, baseline_scores)
            learned.give_up(bad, step)
            (values.grad,) = torch.autograd.grad(drawn.masks, values, slope)
            optimizer.step()
            if ((step + 1) % EVALUATE_EVERY == 0 or step + 1 == iterations) and not bool(learned.done.all()):
                evaluation = _evaluate(problem, values.detach(), step + 1, baseline_scores)
                learned.give_up(_nonfinite(evaluation), step + 1)
                learned.update(values.detach(), evaluation, problem.config.tolerance)
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
    """Return an initial map ``(B, n)``: coarse Integrated Gradients along uniform masks, summed over all blends.

    It costs about as much as two steps, and already contains most of the evidence.
    """
    shares, config = problem.grid.shares, problem.config
    scale: Scale = "logit" if config.scale == "logit" else "margin"
    own = replace(config, parametrization=Nested(), objective="preserve", scale=scale, regularizer=None)
    uniform = replace(problem, config=own)
    levels = shares.new_tensor(WARM_LEVELS)
    masks = levels[:, None].repeat(problem.batch, 1, shares.shape[1])
    masks = masks.view(problem.batch, len(levels), -1)
    slope = torch.zeros_like(masks)
    for step in range(len(problem.blends)):
        part, bad = _slope(uniform, MaskBatch(masks, levels), step, baseline_scores)
        if bool(bad.any()):
            raise _NotFinite(_nonfinite_message(bad))
        slope += part
    density = -slope.sum(1) / shares.clamp_min(torch.finfo(shares.dtype).tiny)
    # this smooths a grid of cells, and does not change regions
    return problem.grid.gather(problem.grid.spread(density[:, None])[:, 0])


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
    energy = _terms(problem, MaskBatch(masks, problem.areas), 0)  # (B, A)
    kept, removed = scores.split(count)  # (A, B) each
    for is_removed in OBJECTIVES[problem.config.objective]:
        flags = torch.full((count,), is_removed, device=masks.device)
        part = removed if is_removed else kept
        energy = energy + losses(problem.config.scale, part, flags, baseline_scores.mean(0)).T
    return Evaluation(step, energy.mean(1), kept.T, removed.T)


def _terms(problem: Problem, drawn: MaskBatch, step: int) -> Tensor:
    """Return the area penalty, with the weight of this step, plus the regularizer, ``(B, A)``."""
    terms = problem.config.parametrization.penalty(drawn, problem.grid, step)
    if problem.config.regularizer is not None:
        terms = terms + problem.config.regularizer(problem.grid.spread(drawn.masks), drawn.areas)
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
