"""Numbers that say how good an attribution is."""

from captum_staa.metrics.localization import auroc, pointing_game

__all__ = ["auroc", "pointing_game"]
