"""The result type of spatio-temporal perturbation, and the function that makes it from the optimized masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from captum_staa._utils import notebook
from captum_staa._utils.gaussian import gaussian
from captum_staa.perturbation.learning import OptimizationState, Problem
from captum_staa.perturbation.objective import Objective
from captum_staa.result import VideoAttribution


class History(NamedTuple):
    """History of the optimization: energies and scores of the masks at the requested areas, at each evaluation.

    Attributes:
        steps: ``(S,)`` int64, number of steps before each evaluation.
        energy: ``(S, B)``, the minimized quantity: the mean over areas of loss, regularizer and area penalty, with the
            penalty's weight at the first step.
        kept: ``(S, B, A)``, the score of clips that keep what the masks select.
        deleted: ``(S, B, A)``, the score of clips from which it is removed.
    """

    steps: Tensor
    energy: Tensor
    kept: Tensor
    deleted: Tensor


@dataclass(frozen=True, kw_only=True)
class MaskAttribution(VideoAttribution):
    """Attribution by learned masks: the map, the mask of each area, scores, and the history of the optimization.

    Attributes:
        joint: ``(B, T, H, W)``, not negative. The sum over a clip is 1, or 0 if no mask keeps anything.
        masks: ``(B, A, T, H, W)`` in [0, 1], one per area; 1 keeps a voxel, 0 removes it.
        areas: ``(A,)``, the requested areas, in (0, 1).
        visible: ``(B, A)``, the mean of each mask: the fraction of the clip's volume that it keeps.
        whole: ``(B,)``, the model's score of the unperturbed clip: the target's probability, or its output if the
            objective's scale is ``"logit"``.
        kept: ``(B, A)``, the score if only what the mask selects is kept, as a mean over the blends.
        deleted: ``(B, A)``, the score if what the mask selects is removed, as a mean over the blends.
        history: energies and scores during the optimization, every ten steps.
        interrupted: whether a KeyboardInterrupt (Ctrl-C) ended the optimization early.
    """

    masks: Tensor
    areas: Tensor
    visible: Tensor
    whole: Tensor
    kept: Tensor
    deleted: Tensor
    history: History
    interrupted: bool

    def _repr_html_(self) -> str:
        means = [values.nanmean(0).tolist() for values in (self.visible, self.kept, self.deleted)]
        learned = notebook.table(
            ("area", "visible", "kept", "deleted"), list(zip(self.areas.tolist(), *means, strict=True))
        )
        energies = list(zip(self.history.steps.tolist(), self.history.energy.nanmean(1).tolist(), strict=True))
        whole = notebook.number(float(self.whole.nanmean()))
        title = f"masks, means over clips; the score of the unperturbed clip is {whole}"
        title += "; interrupted early" if self.interrupted else ""
        more = notebook.block(title, learned, notebook.curves({"energy": energies}, "step", "minimized energy"))
        return f"<div>{super()._repr_html_()}{more}</div>"


def result_of(problem: Problem, learned: OptimizationState, whole: Tensor, blur: float) -> MaskAttribution:
    """Return the result for the best state of the optimization.

    Args:
        problem: the optimization problem.
        learned: the best state of each clip.
        whole: ``(B,)``, scores of the unperturbed clips.
        blur: standard deviation of the spatial blur of the map, as a fraction of the shorter side; 0 means no blur.
    """
    with torch.no_grad():
        masks = problem.grid.spread(problem.parametrization.final(learned.values, problem.grid, problem.areas))
        joint = problem.grid.spread(
            problem.parametrization.weights(learned.values, problem.grid, problem.areas)[:, None]
        )[:, 0]
        if blur:
            sigma = blur * min(joint.shape[2:])
            joint = gaussian(joint, (0.0, sigma, sigma))
        total = joint.sum((1, 2, 3), keepdim=True)
        parts = VideoAttribution.from_joint(joint / total.clamp_min(torch.finfo(joint.dtype).tiny))
    scale = probability(problem.objective)
    steps, energy, kept, deleted = zip(*learned.evaluations, strict=True)
    return MaskAttribution(
        joint=parts.joint,
        spatial=parts.spatial,
        temporal=parts.temporal,
        masks=masks,
        areas=problem.areas,
        visible=masks.mean((2, 3, 4)),
        whole=scale(whole),
        kept=scale(learned.best.kept),
        deleted=scale(learned.best.deleted),
        history=History(
            torch.tensor(steps), torch.stack(energy), scale(torch.stack(kept)), scale(torch.stack(deleted))
        ),
        interrupted=learned.interrupted,
    )


def probability(objective: Objective) -> Callable[[Tensor], Tensor]:
    """Return the function that converts scores to the result's scale: probabilities, or outputs for ``"logit"``."""
    return (lambda score: score) if objective.scale == "logit" else torch.exp
