"""Where and when did a video model look, and why this class? Attribution for video, as a Captum plugin."""

from captum_staa import baselines, benchmark, feature_masks, io, metrics, models, visualization
from captum_staa.attention.focus import Focus
from captum_staa.attr.answer import AnswerAttribution
from captum_staa.attr.feature_ablation import VideoFeatureAblation
from captum_staa.attr.grad_cam import GradCAM
from captum_staa.attr.occlusion import VideoOcclusion
from captum_staa.attr.perturbation import SpatioTemporalPerturbation
from captum_staa.attr.rise import RISE
from captum_staa.attr.smooth import smooth
from captum_staa.attr.st_abn import AttentionBranch
from captum_staa.attr.staa import STAA
from captum_staa.grid import TokenGrid
from captum_staa.layout import VideoLayout
from captum_staa.models.classifier import VideoClassifier
from captum_staa.models.video_language import VideoLanguageModel
from captum_staa.result import VideoAttribution
from captum_staa.stream.stream import STAAStream

__version__ = "0.1.0"

__all__ = [
    "RISE",
    "STAA",
    "STAAStream",
    "AnswerAttribution",
    "AttentionBranch",
    "Focus",
    "GradCAM",
    "VideoAttribution",
    "SpatioTemporalPerturbation",
    "TokenGrid",
    "VideoClassifier",
    "VideoFeatureAblation",
    "VideoLanguageModel",
    "VideoLayout",
    "VideoOcclusion",
    "baselines",
    "benchmark",
    "feature_masks",
    "io",
    "metrics",
    "models",
    "smooth",
    "visualization",
]
