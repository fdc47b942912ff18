"""Named ways to learn masks: this library's own, the paper's, and its two ancestors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from captum_staa._utils.checks import check_choice, check_count, is_number
from captum_staa.perturbation.blends import BLENDS, BlendName
from captum_staa.perturbation.masks import Nested, Parametrization, Separate
from captum_staa.perturbation.objective import AIMS, SCALES, Aim, Objective, Scale
from captum_staa.perturbation.regularizers import REGULARIZERS, Ellipsoid, Regularizer


@dataclass(frozen=True)
class PerturbationConfig:
    """Everything about learning that is not of the clip.

    Args:
        parametrization: :class:`Nested` masks of one score, or :class:`Separate` ones.
        areas: parts of the clip's volume that masks leave, in (0, 1).
        objective: what masks are asked to do.
        regularizer: the term that is added to it, or None.
        blends: names of what a mask does to the clip, taken in turns.
        levels: clips that a blur goes through.
        frames: of a cell of the mask.
        across: cells along height and along width, at most one per pixel.
        iterations: most steps.
        tolerance: energy that a clip must gain within 30 steps to go on.
        blur: standard deviation of the final map's blur within frames, as a part of the shorter side.
    """

    parametrization: Parametrization
    areas: Sequence[float] = (0.05, 0.1, 0.15, 0.5)
    objective: Objective = field(default_factory=Objective)
    regularizer: Regularizer | None = None
    blends: tuple[BlendName, ...] = ("fade", "blur", "mean_frame", "shuffle")
    levels: int = 2
    frames: int = 2
    across: int = 16
    iterations: int = 60
    tolerance: float = 0.0
    blur: float = 0.0

    def __post_init__(self) -> None:
        areas: Any = (self.areas,) if isinstance(self.areas, float) else self.areas
        if not isinstance(areas, Sequence) or not areas or any(not _is_part(area) for area in areas):
            raise ValueError(f"areas are parts of the clip's volume in (0, 1), one at least, got {self.areas!r}")
        object.__setattr__(self, "areas", tuple(areas))
        for name, least in (("levels", 2), ("frames", 1), ("across", 1), ("iterations", 0)):
            check_count(name, getattr(self, name), least)
        for name in ("tolerance", "blur"):
            if not (is_number(getattr(self, name)) and 0 <= getattr(self, name) < inf):
                raise ValueError(f"{name} is a finite number of at least 0, got {getattr(self, name)!r}")
        if not self.blends:
            raise ValueError(f"blends name ways of hiding, of {', '.join(BLENDS)}, got {self.blends!r}")
        for blend in self.blends:
            check_choice("blends", blend, BLENDS)

    def changed(
        self,
        *,
        aim: Aim | None,
        scale: Scale | None,
        regularizer: str | Regularizer | None,
        **fields: Any,
    ) -> PerturbationConfig:
        """This preset with whatever is not None put in its place."""
        came: Any = regularizer
        if isinstance(came, str):
            check_choice("regularizer", came, REGULARIZERS)
            came = REGULARIZERS[came]
        elif came is None:
            came = self.regularizer
        elif not callable(came) or isinstance(came, type):
            kind = type(came).__name__
            raise TypeError(f"regularizer is a word or a function of masks, got {came!r} of type {kind}")
        aim = self.objective.aim if aim is None else aim
        scale = self.objective.scale if scale is None else scale
        check_choice("objective", aim, AIMS)
        check_choice("scale", scale, SCALES)
        given = {name: value for name, value in fields.items() if value is not None}
        return replace(self, objective=Objective(aim, scale), regularizer=came, **given)


def _is_part(area: object) -> bool:
    return isinstance(area, float) and 0 < area < 1


_PAPER = PerturbationConfig(
    Separate(),
    objective=Objective("preserve", "log_probability"),
    blends=("blur",),
    levels=8,
    frames=1,
    iterations=400,  # the papers take 1200 to 2000, but what is kept is best by 200, and later only hardens
    tolerance=0.01,
    blur=10 / 112,
)

PRESETS: dict[str, PerturbationConfig] = {
    "nested": PerturbationConfig(Nested()),
    "step": replace(_PAPER, regularizer=Ellipsoid()),
    "3d-ep": _PAPER,
    "2d-ep": replace(_PAPER, parametrization=Separate(per_frame=True)),
}
