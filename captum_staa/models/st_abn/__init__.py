"""The Spatio-Temporal Attention Branch Network (ST-ABN): the network, its loss and its training."""

from captum_staa.models.st_abn.branch import Branch, BranchConfig, BranchExplanation, Gates
from captum_staa.models.st_abn.loss import STABNLoss
from captum_staa.models.st_abn.network import STABN, as_classifier
from captum_staa.models.st_abn.training import FitConfig, FitHistory, fit_st_abn

__all__ = [
    "STABN",
    "Branch",
    "BranchConfig",
    "BranchExplanation",
    "FitConfig",
    "FitHistory",
    "Gates",
    "STABNLoss",
    "as_classifier",
    "fit_st_abn",
]
