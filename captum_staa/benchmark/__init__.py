"""Clips with planted evidence, and comparison of attribution methods on them, on videos, or on any other clips."""

from captum_staa.benchmark.clips import Sample, Videos
from captum_staa.benchmark.comparison import Comparison
from captum_staa.benchmark.joined_clips import JoinedClips
from captum_staa.benchmark.planted import PlantedClips
from captum_staa.benchmark.records import Mean, Row
from captum_staa.benchmark.registry import METHODS, MethodSpec, NotApplicableError
from captum_staa.benchmark.runner import compare
from captum_staa.benchmark.scenes import SceneOptions
from captum_staa.benchmark.scoring import METRICS, Metric, MetricInput, MetricOptions

__all__ = [
    "METHODS",
    "METRICS",
    "Comparison",
    "JoinedClips",
    "Mean",
    "MethodSpec",
    "Metric",
    "MetricInput",
    "MetricOptions",
    "NotApplicableError",
    "PlantedClips",
    "Row",
    "Sample",
    "SceneOptions",
    "Videos",
    "compare",
]
