"""Attribution methods, one per module. Each class is a Captum ``Attribution``."""

from captum_staa.attr.answer import AnswerAttribution, AnswerMaps
from captum_staa.attr.feature_ablation import VideoFeatureAblation
from captum_staa.attr.grad_cam import GradCAM
from captum_staa.attr.llm import VideoLLMAttribution, VideoMaskInput
from captum_staa.attr.occlusion import VideoOcclusion
from captum_staa.attr.perturbation import History, MaskAttribution, SpatioTemporalPerturbation
from captum_staa.attr.released_staa import ReleasedSTAA
from captum_staa.attr.rise import RISE
from captum_staa.attr.smooth import smooth
from captum_staa.attr.st_abn import AttentionBranch, BranchAttribution
from captum_staa.attr.staa import STAA
from captum_staa.attr.step_ablation import StepAblation

__all__ = [
    "RISE",
    "STAA",
    "AnswerAttribution",
    "AnswerMaps",
    "AttentionBranch",
    "BranchAttribution",
    "GradCAM",
    "History",
    "MaskAttribution",
    "ReleasedSTAA",
    "SpatioTemporalPerturbation",
    "StepAblation",
    "VideoFeatureAblation",
    "VideoLLMAttribution",
    "VideoMaskInput",
    "VideoOcclusion",
    "smooth",
]
