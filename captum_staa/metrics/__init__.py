"""Numbers that say how good an attribution is."""

from captum_staa.metrics.localization import auroc, pointing_game
from captum_staa.metrics.smoothness import Smoothness, smoothness

__all__ = ["Smoothness", "auroc", "pointing_game", "smoothness"]
