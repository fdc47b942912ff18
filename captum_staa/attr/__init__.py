"""Attribution methods, one per module. Each class is a Captum ``Attribution``."""

from captum_staa.attr.feature_ablation import VideoFeatureAblation
from captum_staa.attr.grad_cam import GradCAM
from captum_staa.attr.occlusion import VideoOcclusion
from captum_staa.attr.perturbation import History, MaskAttribution, SpatioTemporalPerturbation
from captum_staa.attr.released_staa import ReleasedSTAA
from captum_staa.attr.rise import RISE
from captum_staa.attr.smooth import smooth
from captum_staa.attr.st_abn import AttentionBranch, BranchAttribution
from captum_staa.attr.staa import STAA

__all__ = [
    "RISE",
    "STAA",
    "AttentionBranch",
    "BranchAttribution",
    "GradCAM",
    "History",
    "MaskAttribution",
    "ReleasedSTAA",
    "SpatioTemporalPerturbation",
    "VideoFeatureAblation",
    "VideoOcclusion",
    "smooth",
]
