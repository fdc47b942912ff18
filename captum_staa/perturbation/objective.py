"""Objectives of learned masks: the selected voxels alone keep the model's score, or removing them lowers it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Aim = Literal["preserve", "delete", "dual"]
Scale = Literal["odds", "log_probability", "margin", "logit"]
AIMS: dict[Aim, tuple[bool, ...]] = {"preserve": (False,), "delete": (True,), "dual": (False, True)}
SCALES: tuple[Scale, ...] = get_args(Scale)


@dataclass(frozen=True)
class Objective:
    """Loss of perturbed clips, computed from the target's score for them.

    Example:
        >>> objective = Objective("dual", "odds")
        >>> scores = torch.tensor([[0.9], [0.2]]).log()  # what the mask selects is kept, then removed
        >>> baseline = torch.tensor([0.2]).log()  # everything is removed
        >>> objective.losses(scores, torch.tensor([False, True]), baseline).exp().flatten()  # 1 / .9, and 1 + 1
        tensor([1.1111, 2.0000])

    Args:
        aim: ``"preserve"``: what the mask selects is sufficient for the prediction. ``"delete"``: it is necessary.
            ``"dual"``: both.
        scale: how the loss depends on the target's probability ``p``.

            - ``"odds"``: ``-log p`` if the selection is kept. If it is removed, ``log(1 + odds / odds_0)``, where
              ``odds = p / (1 - p)`` and ``odds_0`` are the odds of a clip from which everything is removed. This loss
              is almost flat for odds far below ``odds_0``. Such odds need evidence for another class, not only missing
              evidence for the target.
            - ``"log_probability"``: ``-log p`` and ``-log(1 - p)``, as in the papers.
            - ``"margin"``: the log odds, without bounds: minus the log odds if the selection is kept, plus if removed.
            - ``"logit"``: the target's raw output, in the same way. For models without classes.
    """

    aim: Aim = "dual"
    scale: Scale = "odds"

    @property
    def removed(self) -> tuple[bool, ...]:
        """One entry per kind of perturbed clip: whether the mask's selection is removed (True) or kept (False)."""
        return AIMS[self.aim]

    def losses(self, scores: Tensor, removed: Tensor, baseline_score: Tensor) -> Tensor:
        """Return the loss of each perturbed clip.

        Args:
            scores: ``(P, B)``, the target's log-probability, or its output for ``"logit"``.
            removed: ``(P,)`` bool, whether the mask's selection is removed (True) or kept (False).
            baseline_score: ``(B,)``, the score of the clip from which everything is removed.

        Returns:
            Losses ``(P, B)``.
        """
        removed = removed[:, None]
        if self.scale == "logit":
            return torch.where(removed, scores, -scores)
        if self.scale == "margin":
            return torch.where(removed, log_odds(scores), -log_odds(scores))
        reference = log_odds(baseline_score) if self.scale == "odds" else torch.zeros_like(baseline_score)
        return torch.where(removed, F.softplus(log_odds(scores) - reference), -scores)


def log_odds(scores: Tensor) -> Tensor:
    """Return ``log p - log(1 - p)`` for ``log p``. A ``log p`` above ``-eps`` of its dtype counts as ``-eps``."""
    most = -torch.finfo(scores.dtype).eps
    # not clamp: since torch 2.15 its gradient at the bound is 0, and models that are certain return exactly the bound
    return scores - (-torch.expm1(scores.masked_fill(scores > most, most))).log()
