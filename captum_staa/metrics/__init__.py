"""Metrics of attributions.

Each function has the attributes ``higher_is_better``, ``lowest`` and ``highest``. ``higher_is_better`` is None if the
value describes a map and does not rate it.
"""

from captum_staa.metrics import noise, sanity
from captum_staa.metrics.attention_usage import AttentionUsage, attention_usage
from captum_staa.metrics.controls import controls, model_free_controls
from captum_staa.metrics.faithfulness import aopc, faithfulness, faithfulness_correlation, monotonicity, saco
from captum_staa.metrics.insertion_deletion import (
    Curve,
    InsertionDeletionResult,
    deletion,
    insertion,
    insertion_deletion,
)
from captum_staa.metrics.localization import (
    auroc,
    average_precision,
    boxes_to_truth,
    pointing_game,
    temporal_pointing,
)
from captum_staa.metrics.map_properties import Smoothness, complexity, smoothness, sparsity
from captum_staa.metrics.overlap import energy_pointing_game, iou, relevance_rank_accuracy, signal_to_noise
from captum_staa.metrics.reliability import Reliability, krippendorff_alpha, reliability
from captum_staa.metrics.rivals import class_discrimination, evidence_against_rivals, object_pointing

__all__ = [
    "AttentionUsage",
    "Curve",
    "InsertionDeletionResult",
    "Reliability",
    "Smoothness",
    "aopc",
    "attention_usage",
    "auroc",
    "average_precision",
    "boxes_to_truth",
    "class_discrimination",
    "complexity",
    "controls",
    "deletion",
    "energy_pointing_game",
    "evidence_against_rivals",
    "faithfulness",
    "faithfulness_correlation",
    "insertion",
    "insertion_deletion",
    "iou",
    "krippendorff_alpha",
    "model_free_controls",
    "monotonicity",
    "noise",
    "object_pointing",
    "pointing_game",
    "relevance_rank_accuracy",
    "reliability",
    "saco",
    "sanity",
    "signal_to_noise",
    "smoothness",
    "sparsity",
    "temporal_pointing",
]
