"""History of the training of an ST-ABN, epoch by epoch."""

from __future__ import annotations

from dataclasses import dataclass, field

from captum_staa._utils import notebook


@dataclass
class FitHistory:
    """Class that holds the losses of a training.

    Attributes:
        train: for each epoch, the mean of each term of the loss and of their sum, ``"loss"``.
        validation: the same for the validation data; empty if there are none.
        best: index of the epoch whose weights the network has after the training.
        interrupted: whether Ctrl-C ended the training.
    """

    train: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    best: int = -1
    interrupted: bool = False

    @property
    def judged(self) -> list[float]:
        """The loss by which epochs are compared: the validation loss if there is one, otherwise the training loss."""
        return [terms["loss"] for terms in self.validation or self.train]

    def _repr_html_(self) -> str:
        """Return HTML for notebooks: the losses by epoch, and every term at the first, the best and the last epoch."""
        sides = {name: side for name, side in (("train", self.train), ("validation", self.validation)) if side}
        losses = {name: [(float(at), of["loss"]) for at, of in enumerate(side)] for name, side in sides.items()}
        epochs = sorted({0, self.best, len(self.train) - 1} & set(range(len(self.train))))
        terms = list(self.train[0]) if self.train else []
        rows: list[list[notebook.Cell]] = [
            [at, name, *map(side[at].__getitem__, terms)] for at in epochs for name, side in sides.items()
        ]
        title = f"{len(self.train)} epochs, the weights are of epoch {self.best}" + ", interrupted" * self.interrupted
        return notebook.block(
            title, notebook.curves(losses, "epoch", "loss"), notebook.table(["epoch", "data", *terms], rows)
        )
