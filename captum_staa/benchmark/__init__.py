"""Clips whose evidence is planted, and the comparison of methods: on them, on videos, on any clips."""

from captum_staa.benchmark.comparison import Comparison
from captum_staa.benchmark.joined import JoinedClips
from captum_staa.benchmark.methods import METHODS
from captum_staa.benchmark.planted import PlantedClips
from captum_staa.benchmark.recipes import DoesNotApply, Recipe
from captum_staa.benchmark.rows import Mean, Row
from captum_staa.benchmark.runner import compare
from captum_staa.benchmark.scoring import METRICS, Case, Metric
from captum_staa.benchmark.videos import Videos

__all__ = [
    "METHODS",
    "METRICS",
    "Case",
    "Comparison",
    "DoesNotApply",
    "JoinedClips",
    "Mean",
    "Metric",
    "PlantedClips",
    "Recipe",
    "Row",
    "Videos",
    "compare",
]
