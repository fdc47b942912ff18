"""Records of a comparison: entries, tidy rows, means, and the names that they share."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass, field
from importlib import metadata
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Their versions are in the record of a run, because its numbers depend on them.
DEPENDENCIES = ("captum", "torch", "numpy", "transformers", "scikit-learn", "pillow", "av")
MODEL_FREE, INVERTED = "model-free", "inverted"
RANDOM_WEIGHTS, OTHER_CLASS = "random weights", "other class"  # these two run a method again
CONTROLS = ("random", "uniform", "center", MODEL_FREE, INVERTED, RANDOM_WEIGHTS, OTHER_CLASS)
# Values of Row.metric for rows that hold a reason instead of a number.
ERROR, LEFT_OUT, NOT_APPLICABLE = "error", "left out", "does not apply"
GRID = np.linspace(0, 1, 101)  # fractions of a clip to which all curves are interpolated
ALL = "*"  # the clip or the method of a record that holds for all, such as the entry of the clip itself


def control_of(name: str) -> str | None:
    """Return which of ``CONTROLS`` a name is; None for the name of a method.

    Example:
        >>> control_of("random"), control_of("STAA, random weights"), control_of("STAA")
        ('random', 'random weights', None)
    """
    if name in CONTROLS:
        return name
    kind = name.rpartition(", ")[2]
    return kind if kind != name and kind in (RANDOM_WEIGHTS, OTHER_CLASS) else None


@dataclass(frozen=True)
class Entry:
    """Results of one method on one clip.

    Attributes:
        index: index of the clip.
        clip: name of the clip.
        method: name of the method or control; ``"*"`` for the entry of the clip itself.
        values: numbers by metric, which may be nan or infinite.
        curves: data for figures, such as the points of the insertion curve.
        reasons: by metric, why its value is missing.
        error: why the whole entry failed; empty if it did not.
        left_out: why the method does not apply to this clip, which is not a failure; empty if it applies.
    """

    index: int
    clip: str
    method: str
    values: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    error: str = ""
    left_out: str = ""

    @property
    def complete(self) -> bool:
        """Whether nothing failed. The next run tries others again, because the cause may be fixed by then."""
        return not self.error and not self.reasons


class Row(NamedTuple):
    """One number, or one reason why a number is missing.

    Attributes:
        clip: name of the clip; ``"*"`` for all clips.
        method: name of the method or control; ``"*"`` for all.
        metric: name of the metric; or ``"error"``, ``"left out"``, ``"does not apply"``.
        value: the number; nan if the metric is undefined, and in rows that hold a reason.
        reason: why the number is missing; empty in rows that hold one.
    """

    clip: str
    method: str
    metric: str
    value: float
    reason: str = ""


class Mean(NamedTuple):
    """Mean over clips; for costs, the median over clips.

    Attributes:
        value: the mean or median; nan if no clip has a number.
        low: lower end of the 95 % interval, from a bootstrap over clips for means, from order statistics for medians.
        high: upper end of the 95 % interval.
        clips: number of clips that have a number.
    """

    value: float
    low: float
    high: float
    clips: int


class Sheet(NamedTuple):
    """Data of a contact sheet of one clip."""

    clip: str
    frames: NDArray[np.uint8]  # (T, H, W, 3)
    truth: NDArray[np.bool_] | None  # (T, H, W)
    maps: dict[str, NDArray[np.floating]]  # by method, (T, H, W)


def versions() -> dict[str, str]:
    """Return the version of Python, of this library and of its installed dependencies, by name.

    Example:
        >>> import captum_staa
        >>> versions()["captum_staa"] == captum_staa.__version__
        True
    """
    installed = {"python": platform.python_version(), "captum_staa": sys.modules["captum_staa"].__version__}
    for name in DEPENDENCIES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed
