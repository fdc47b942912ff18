"""What a mask is asked to do to the model's answer: keep it, where shown; undo it, where hidden."""

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
    """The loss of altered clips, from the target's score in them.

    Example:
        >>> objective = Objective("dual", "odds")
        >>> scores = torch.tensor([[0.9], [0.2]]).log()  # a clip where the mask shows, and one where it hides
        >>> floor = torch.tensor([0.2]).log()  # nothing shown
        >>> objective.losses(scores, torch.tensor([False, True]), floor).exp().flatten()  # 1 / .9, and 1 + 1
        tensor([1.1111, 2.0000])

    Args:
        aim: ``"preserve"``, what the mask shows suffices for the answer; ``"delete"``, the answer needs what it shows;
            ``"dual"``, both.
        scale: of the target's probability ``p``.

            - ``"odds"``: ``-log p`` of what is to be kept; of what is to go, ``log(1 + odds / odds_0)`` with ``odds = p
              / (1 - p)``, and ``odds_0`` that of a clip of which nothing is shown. To fall far below it, the clip would
              have to speak for another class: that is no longer the evidence's absence, and gains little.
            - ``"log_probability"``: ``-log p``, and ``-log(1 - p)``, the papers'.
            - ``"margin"``: ``log odds``, to go up or down without end.
            - ``"logit"``: the target's output as the model gives it, likewise; for models without classes.
    """

    aim: Aim = "dual"
    scale: Scale = "odds"

    @property
    def hidden(self) -> tuple[bool, ...]:
        """For each kind of altered clip that is needed, whether the mask hides what it otherwise shows."""
        return AIMS[self.aim]

    def losses(self, scores: Tensor, hidden: Tensor, floor: Tensor) -> Tensor:
        """Per altered clip.

        Args:
            scores: ``(P, B)``: the target's log-probability, or with ``"logit"`` its output.
            hidden: ``(P,)`` bool.
            floor: ``(B,)``, the score where nothing is shown.

        Returns:
            ``(P, B)``.
        """
        hidden = hidden[:, None]
        if self.scale == "logit":
            return torch.where(hidden, scores, -scores)
        if self.scale == "margin":
            return torch.where(hidden, log_odds(scores), -log_odds(scores))
        least = log_odds(floor) if self.scale == "odds" else torch.zeros_like(floor)
        return torch.where(hidden, F.softplus(log_odds(scores) - least), -scores)


def log_odds(scores: Tensor) -> Tensor:
    """``log p - log(1 - p)`` of ``log p``; of no p nearer to 1 than a number of its precision can be."""
    most = -torch.finfo(scores.dtype).eps
    # no clamp: from torch 2.15 on it has no slope at its bound, which is just what certain models answer
    return scores - (-torch.expm1(scores.masked_fill(scores > most, most))).log()
