"""What spatio-temporal perturbation has learned, in the form in which it is handed out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from captum_staa._utils import notebook
from captum_staa._utils.gaussian import gaussian
from captum_staa.perturbation.learning import OptimizationState, Task
from captum_staa.perturbation.objective import Objective
from captum_staa.result import VideoAttribution


class History(NamedTuple):
    """The course of learning: what the masks as they would be handed out did, at the asked areas.

    Attributes:
        steps: ``(S,)`` int64, after how many steps.
        energy: ``(S, B)``, what is minimized: the mean over areas of loss, regularizer, and the first step's penalty.
        kept: ``(S, B, A)``, the score of what the masks show.
        deleted: ``(S, B, A)``, the score of what they leave.
    """

    steps: Tensor
    energy: Tensor
    kept: Tensor
    deleted: Tensor


@dataclass(frozen=True, kw_only=True)
class MaskAttribution(VideoAttribution):
    """What was learned, beside the map that it gives.

    Attributes:
        joint: ``(B, T, H, W)``, not negative; the sum over a clip is 1, or 0 where no mask shows anything.
        masks: ``(B, A, T, H, W)`` in [0, 1], one per area.
        areas: ``(A,)``, as asked.
        visible: ``(B, A)``, the mean of each mask: the part of the clip's volume that it leaves.
        whole: ``(B,)``, the model's score of the whole clip: the target's probability, or its output where the
            objective's scale is ``"logit"``.
        kept: ``(B, A)``, the score of what a mask shows, as a mean over the ways of hiding.
        deleted: ``(B, A)``, the score of what it leaves.
        history: the course of learning, every ten steps.
        interrupted: whether Ctrl-C came before the end.
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
        course = list(zip(self.history.steps.tolist(), self.history.energy.nanmean(1).tolist(), strict=True))
        title = f"masks, means over clips; the score of the whole is {notebook.number(float(self.whole.nanmean()))}"
        title += "; interrupted before the end" if self.interrupted else ""
        more = notebook.block(title, learned, notebook.curves({"energy": course}, "step", "what is minimized"))
        return f"<div>{super()._repr_html_()}{more}</div>"


def result_of(task: Task, learned: OptimizationState, whole: Tensor, blur: float) -> MaskAttribution:
    """What was learned, in the form in which it is handed out."""
    with torch.no_grad():
        masks = task.field.spread(task.parametrization.final(learned.values, task.field, task.areas))
        joint = task.field.spread(task.parametrization.weights(learned.values, task.field, task.areas)[:, None])[:, 0]
        if blur:
            sigma = blur * min(joint.shape[2:])
            joint = gaussian(joint, (0.0, sigma, sigma))
        total = joint.sum((1, 2, 3), keepdim=True)
        parts = VideoAttribution.from_joint(joint / total.clamp_min(torch.finfo(joint.dtype).tiny))
    scale = probability(task.objective)
    steps, energy, kept, deleted = zip(*learned.checks, strict=True)
    return MaskAttribution(
        joint=parts.joint,
        spatial=parts.spatial,
        temporal=parts.temporal,
        masks=masks,
        areas=task.areas,
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
    """From scores to what is handed out: probabilities, but outputs as they come."""
    return (lambda score: score) if objective.scale == "logit" else torch.exp
