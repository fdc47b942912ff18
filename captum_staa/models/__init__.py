"""Video models: any of them as a classifier, the families of transformers, and the small ones shipped here."""

from captum_staa.models.classifier import VideoClassifier
from captum_staa.models.families import FAMILIES, Family, family_of
from captum_staa.models.resnet3d import ResNet3D
from captum_staa.sites import AttentionSite

__all__ = ["FAMILIES", "AttentionSite", "Family", "ResNet3D", "VideoClassifier", "family_of"]
