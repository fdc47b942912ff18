"""Video models: ``VideoClassifier``, families of video transformers, ST-ABN, and small bundled models."""

from captum_staa._utils.model_state import model_state
from captum_staa.models.classifier import VideoClassifier
from captum_staa.models.discovery import inspect
from captum_staa.models.families import FAMILIES, AttentionLayer, Family, family_of
from captum_staa.models.inspection import FoundAttention, Inspection
from captum_staa.models.loading import READERS
from captum_staa.models.preprocessing import Preprocessing
from captum_staa.models.st_abn import (
    STABN,
    BranchConfig,
    BranchExplanation,
    FitConfig,
    FitHistory,
    STABNLoss,
    as_classifier,
    fit_st_abn,
)
from captum_staa.models.video_language import (
    LANGUAGE_FAMILIES,
    AnswerClassifier,
    VideoLanguageFamily,
    VideoLanguageModel,
    VideoPrompt,
    VideoTokens,
)

READERS["st_abn"] = as_classifier

__all__ = [
    "FAMILIES",
    "LANGUAGE_FAMILIES",
    "STABN",
    "AnswerClassifier",
    "AttentionLayer",
    "BranchConfig",
    "BranchExplanation",
    "Family",
    "FitConfig",
    "FitHistory",
    "FoundAttention",
    "Inspection",
    "Preprocessing",
    "STABNLoss",
    "VideoClassifier",
    "VideoLanguageFamily",
    "VideoLanguageModel",
    "VideoPrompt",
    "VideoTokens",
    "family_of",
    "fit_st_abn",
    "inspect",
    "model_state",
]
