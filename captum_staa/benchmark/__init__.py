"""Clips whose evidence is planted, and the comparison of methods on them."""

from captum_staa.benchmark.planted import PlantedClips

__all__ = ["PlantedClips"]
