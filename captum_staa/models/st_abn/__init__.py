"""The Spatio-Temporal Attention Branch Network (ST-ABN): the network, its loss and its training."""

from pathlib import Path
from typing import Any

from torch import nn

from captum_staa.models.st_abn.branch import Branch, Gates
from captum_staa.models.st_abn.explanation import BranchExplanation
from captum_staa.models.st_abn.history import FitHistory
from captum_staa.models.st_abn.loss import STABNLoss
from captum_staa.models.st_abn.network import STABN
from captum_staa.models.st_abn.training import fit_st_abn

__all__ = ["STABN", "Branch", "BranchExplanation", "FitHistory", "Gates", "STABNLoss", "fit_st_abn"]


def as_classifier(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return the ST-ABN of a folder, and the keyword arguments of the :class:`VideoClassifier` around it."""
    st_abn = STABN.from_pretrained(folder)
    names = ("layout", "labels", "num_frames", "image_size", "preprocessing")
    return st_abn, {name: getattr(st_abn.model, name) for name in names}
