"""The Spatio-Temporal Attention Branch Network: its parts, its loss and its training."""

from captum_staa.models.st_abn.branch import Branch, Gates
from captum_staa.models.st_abn.explanation import BranchExplanation
from captum_staa.models.st_abn.loss import STABNLoss
from captum_staa.models.st_abn.network import STABN
from captum_staa.models.st_abn.training import FitHistory, fit_st_abn

__all__ = ["STABN", "Branch", "BranchExplanation", "FitHistory", "Gates", "STABNLoss", "fit_st_abn"]
