"""Video language models: fact sheets of families, clips and prompts, and answers as classifiers."""

from captum_staa.models.video_language.classifier import AnswerClassifier
from captum_staa.models.video_language.families import LANGUAGE_FAMILIES, VideoLanguageFamily
from captum_staa.models.video_language.model import VideoLanguageModel, VideoPrompt
from captum_staa.models.video_language.tokens import VideoTokens

__all__ = [
    "LANGUAGE_FAMILIES",
    "AnswerClassifier",
    "VideoLanguageFamily",
    "VideoLanguageModel",
    "VideoPrompt",
    "VideoTokens",
]
