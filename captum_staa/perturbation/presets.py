"""Named presets of learned masks: the default of this library, the STEP paper's, and its two predecessors."""

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
    """Options of :class:`captum_staa.SpatioTemporalPerturbation` that do not depend on the clip.

    Args:
        parametrization: :class:`Nested` masks of one score, or :class:`Separate` masks.
        areas: fractions of the clip's volume that the masks keep, in (0, 1).
        objective: loss of perturbed clips.
        regularizer: term that is added to the loss, or None.
        blends: names of the blends, which define what replaces removed voxels. Steps cycle through them.
        levels: number of clips in a blur pyramid, at least 2.
        frames: length of a mask cell in frames.
        across: number of mask cells along height and along width, at most one per pixel.
        iterations: maximum number of steps.
        tolerance: a clip is done if its energy has not decreased by more than this within 30 steps.
        blur: standard deviation of the spatial blur of the final map, as a fraction of the shorter side; 0 means no
            blur.
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
        if not isinstance(areas, Sequence) or not areas or any(not _is_fraction(area) for area in areas):
            raise ValueError(
                f"areas must be fractions of the clip's volume in (0, 1), at least one, got {self.areas!r}. Pass "
                f"floats such as areas=(0.05, 0.1)."
            )
        object.__setattr__(self, "areas", tuple(areas))
        for name, least in (("levels", 2), ("frames", 1), ("across", 1), ("iterations", 0)):
            check_count(name, getattr(self, name), least)
        for name in ("tolerance", "blur"):
            if not (is_number(getattr(self, name)) and 0 <= getattr(self, name) < inf):
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)!r}")
        if not self.blends:
            raise ValueError(f"blends must name at least one of {', '.join(BLENDS)}, got {self.blends!r}")
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
        """Return this preset with all arguments that are not None replaced."""
        term: Any = regularizer
        if isinstance(term, str):
            check_choice("regularizer", term, REGULARIZERS)
            term = REGULARIZERS[term]
        elif term is None:
            term = self.regularizer
        elif not callable(term) or isinstance(term, type):
            names = ", ".join(map(repr, REGULARIZERS))
            raise TypeError(
                f"regularizer must be one of {names} or a function of masks, got {term!r} of type {type(term).__name__}"
                f". Pass an instance, such as TotalVariation()."
            )
        aim = self.objective.aim if aim is None else aim
        scale = self.objective.scale if scale is None else scale
        check_choice("objective", aim, AIMS)
        check_choice("scale", scale, SCALES)
        changes = {name: value for name, value in fields.items() if value is not None}
        return replace(self, objective=Objective(aim, scale), regularizer=term, **changes)


def _is_fraction(area: object) -> bool:
    return isinstance(area, float) and 0 < area < 1


_PAPER = PerturbationConfig(
    Separate(),
    objective=Objective("preserve", "log_probability"),
    blends=("blur",),
    levels=8,
    frames=1,
    iterations=400,  # the papers use 1200 to 2000; the kept score peaks before 200, then edges only get sharper
    tolerance=0.01,
    blur=10 / 112,
)

PRESETS: dict[str, PerturbationConfig] = {
    "nested": PerturbationConfig(Nested()),
    "step": replace(_PAPER, regularizer=Ellipsoid()),
    "3d-ep": _PAPER,
    "2d-ep": replace(_PAPER, parametrization=Separate(per_frame=True)),
}
