"""What a mask is asked to do to the model's answer: keep it, where shown; undo it, where hidden."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Aim = Literal["preserve", "delete", "dual"]
Scale = Literal["log_probability", "margin", "logit"]
AIMS: dict[Aim, tuple[bool, ...]] = {"preserve": (False,), "delete": (True,), "dual": (False, True)}
SCALES: tuple[Scale, ...] = ("log_probability", "margin", "logit")


@dataclass(frozen=True)
class Objective:
    """The loss of altered clips, from the target's score in them.

    Example:
        >>> objective = Objective("dual", "log_probability")
        >>> scores = torch.tensor([[0.9], [0.2]]).log()  # a clip where the mask shows, and one where it hides
        >>> objective.losses(scores, torch.tensor([False, True])).exp().flatten()  # 1 / .9, and 1 / (1 - .2)
        tensor([1.1111, 1.2500])

    Args:
        aim: ``"preserve"``, what the mask shows suffices for the answer; ``"delete"``, the answer needs what it shows;
            ``"dual"``, both.
        scale: ``"log_probability"``: ``-log p`` of what is to be kept, ``-log(1 - p)`` of what is to go.
            ``"margin"``: the target's log-odds ``log p - log(1 - p)``, to go up or down without end. ``"logit"``: the
            target's output as the model gives it, likewise; the one for models without classes.
    """

    aim: Aim = "dual"
    scale: Scale = "log_probability"

    @property
    def hidden(self) -> tuple[bool, ...]:
        """For each kind of altered clip that is needed, whether the mask hides what it otherwise shows."""
        return AIMS[self.aim]

    def losses(self, scores: Tensor, hidden: Tensor) -> Tensor:
        """Per altered clip.

        Args:
            scores: ``(P, B)``: the target's log-probability, or with ``"logit"`` its output.
            hidden: ``(P,)`` bool.

        Returns:
            ``(P, B)``.
        """
        if self.scale == "log_probability":
            return torch.where(hidden[:, None], -log_of_rest(scores), -scores)
        strength = scores if self.scale == "logit" else scores - log_of_rest(scores)
        return torch.where(hidden[:, None], strength, -strength)


def log_of_rest(scores: Tensor) -> Tensor:
    """``log(1 - p)`` of ``log p``; where p is 1 to the last digit, that of the next number below."""
    most = -torch.finfo(scores.dtype).eps
    return (-torch.expm1(scores.clamp(max=most))).log()
