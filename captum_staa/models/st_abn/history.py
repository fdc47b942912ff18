"""How the training of an ST-ABN went, epoch by epoch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class FitHistory:
    """How a training went.

    Attributes:
        train: for every epoch, the mean of each term of the loss and of their sum, ``"loss"``.
        validation: the same on the validation data; empty without them.
        best: index of the epoch whose weights the network has now.
        interrupted: whether Ctrl-C ended it.
    """

    train: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    best: int = -1
    interrupted: bool = False

    @property
    def judged(self) -> list[float]:
        """The loss by which epochs are compared: the validation's where there is one."""
        return [terms["loss"] for terms in self.validation or self.train]
