"""Learned masks: their options and presets. The other modules are the parts of :class:`SpatioTemporalPerturbation`."""

from captum_staa.perturbation.config import (
    PRESETS,
    Ellipsoid,
    PerturbationConfig,
    SquaredDifferences,
    TotalVariation,
)
from captum_staa.perturbation.masks import Nested, Separate

__all__ = [
    "PRESETS",
    "Ellipsoid",
    "Nested",
    "PerturbationConfig",
    "Separate",
    "SquaredDifferences",
    "TotalVariation",
]
