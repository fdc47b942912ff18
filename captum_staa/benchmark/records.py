"""The parts of a comparison: one number or one reason each, means of them, and what a picture of a clip needs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MODEL_FREE, INVERTED = "model-free", "inverted"
RANDOM_WEIGHTS, OTHER_CLASS = "random weights", "other class"  # of one method
CONTROLS = ("random", "uniform", "center", MODEL_FREE, INVERTED, RANDOM_WEIGHTS, OTHER_CLASS)
ERROR, LEFT_OUT, NO_USE = "error", "left out", "does not apply"  # in a row's metric: the row is a reason, no number
GRID = np.linspace(0, 1, 101)  # parts of a clip, where curves of unequal steps meet
ALL = "*"  # in a row's clip or method: holds for each


def control_of(name: str) -> str | None:
    """Which of ``CONTROLS`` a row of a table is; None for a method.

    Example:
        >>> control_of("random"), control_of("STAA, random weights"), control_of("STAA")
        ('random', 'random weights', None)
    """
    if name in CONTROLS:
        return name
    kind = name.rpartition(", ")[2]
    return kind if kind != name and kind in (RANDOM_WEIGHTS, OTHER_CLASS) else None


class Row(NamedTuple):
    """One number, or one reason why there is none.

    Attributes:
        clip: name; ``"*"`` for all.
        method: name; ``"*"`` for all.
        metric: name; or ``"error"``, ``"left out"``, ``"does not apply"``.
        value: the number; nan where a metric can say nothing, and in rows that hold a reason.
        reason: empty in rows that hold a number.
    """

    clip: str
    method: str
    metric: str
    value: float
    reason: str = ""


class Mean(NamedTuple):
    """A mean over clips, for costs a median.

    Attributes:
        value: the estimate; nan where no clip has a number.
        low, high: its 95 % interval, for means by bootstrap over clips, for medians by order statistics.
        clips: how many have a number.
    """

    value: float
    low: float
    high: float
    clips: int


class Sheet(NamedTuple):
    """What a contact sheet of one clip shows."""

    clip: str
    frames: NDArray[np.uint8]  # (T, H, W, 3)
    truth: NDArray[np.bool_] | None  # (T, H, W)
    maps: dict[str, NDArray[np.floating]]  # by method, (T, H, W)
