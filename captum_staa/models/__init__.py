"""Video models: ``VideoClassifier``, families of video transformers, ST-ABN, and small bundled models."""

from captum_staa.models.classifier import VideoClassifier
from captum_staa.models.families import FAMILIES, AttentionLayer, Family, family_of
from captum_staa.models.loading import READERS
from captum_staa.models.resnet3d import ResNet3D
from captum_staa.models.slow_resnet import SlowResNet
from captum_staa.models.st_abn import STABN, BranchExplanation, FitHistory, STABNLoss, as_classifier, fit_st_abn

READERS["st_abn"] = as_classifier

__all__ = [
    "FAMILIES",
    "STABN",
    "AttentionLayer",
    "BranchExplanation",
    "Family",
    "FitHistory",
    "ResNet3D",
    "STABNLoss",
    "SlowResNet",
    "VideoClassifier",
    "family_of",
    "fit_st_abn",
]
