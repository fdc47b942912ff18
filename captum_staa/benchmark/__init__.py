"""Clips with planted evidence, and comparison of attribution methods on them, on videos, or on any other clips."""

from captum_staa.benchmark.comparison import Comparison
from captum_staa.benchmark.joined_clips import JoinedClips
from captum_staa.benchmark.method_spec import MethodSpec, NotApplicableError
from captum_staa.benchmark.methods import METHODS
from captum_staa.benchmark.planted import PlantedClips
from captum_staa.benchmark.records import Mean, Row
from captum_staa.benchmark.runner import compare
from captum_staa.benchmark.scoring import METRICS, Metric, MetricInput
from captum_staa.benchmark.videos import Videos

__all__ = [
    "METHODS",
    "METRICS",
    "MetricInput",
    "Comparison",
    "NotApplicableError",
    "JoinedClips",
    "Mean",
    "Metric",
    "PlantedClips",
    "MethodSpec",
    "Row",
    "Videos",
    "compare",
]
