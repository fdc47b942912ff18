"""The attention branch: from the features of a layer to class evidence, spatial and temporal gates, and logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]
Temporal = Literal["any", "fixed"]


@dataclass(frozen=True)
class Gates:
    """Class that holds the output of a branch for features ``(B, C, t, h, w)``.

    Attributes:
        spatial: ``(B, 1, t, h, w)`` in (0, 1), the paper's M: the weight of each position in each step of time.
        temporal: ``(B, 1, t, 1, 1)`` in (0, 1), the paper's alpha: the weight of each step of time.
        evidence: ``(B, K', t, h, w)``, maps from which the branch's logits are computed, by a mean and a linear layer.
        logits: ``(B, K)``, the logits of the branch.
    """

    spatial: Tensor
    temporal: Tensor
    evidence: Tensor
    logits: Tensor


def group_norm(channels: int) -> nn.Module:
    """Return a group norm. It has no running statistics, so the output for a clip does not depend on other clips."""
    return nn.GroupNorm(4 if channels % 4 == 0 else 1, channels)


class FixedTime(nn.Module):
    """The paper's temporal weights: ``sigmoid(W2 relu(W1 GAP(relu(conv_T(relu(BN(conv3x3x3(A))))))))``.

    Its last three layers have weights for each pair of steps, so the number of steps is fixed.
    """

    def __init__(self, channels: int, steps: int, norm: Norm) -> None:
        super().__init__()
        self.steps = steps
        self.squeeze = nn.Conv3d(channels, 1, 3, padding=1, bias=False)
        self.norm = norm(1)
        self.mix = nn.Conv2d(steps, steps, 1, bias=False)
        self.weigh = nn.Sequential(nn.Linear(steps, steps), nn.ReLU(), nn.Linear(steps, steps))

    def forward(self, maps: Tensor) -> Tensor:
        if maps.shape[2] != self.steps:
            raise ValueError(
                f"maps (B, K', t, h, w) of a fixed temporal head must have {self.steps} steps, got shape "
                f"{tuple(maps.shape)}. Pass clips of the original length, or build the branch with temporal='any'."
            )
        squeezed = torch.relu(self.norm(self.squeeze(maps)))[:, 0]  # (B, t, h, w)
        pooled = torch.relu(self.mix(squeezed)).mean((2, 3))  # (B, t)
        return torch.sigmoid(self.weigh(pooled))[:, None, :, None, None]


class AnyTime(nn.Module):
    """Temporal weights for any number of steps: convolutions over time with replicated padding at the ends."""

    def __init__(self, channels: int, width: int, norm: Norm) -> None:
        super().__init__()
        self.squeeze = nn.Conv3d(channels, width, 3, padding=1, bias=False, padding_mode="replicate")
        self.norm = norm(width)
        # The mean measures how much of a frame is evidence. The maximum also detects small evidence.
        self.mix = nn.Conv1d(2 * width, width, 3, padding=1, padding_mode="replicate")
        self.weigh = nn.Conv1d(width, 1, 3, padding=1, padding_mode="replicate")

    def forward(self, maps: Tensor) -> Tensor:
        squeezed = torch.relu(self.norm(self.squeeze(maps)))
        pooled = torch.cat([squeezed.mean((3, 4)), squeezed.amax((3, 4))], 1)  # (B, 2 width, t)
        return torch.sigmoid(self.weigh(torch.relu(self.mix(pooled))))[..., None, None]


class Branch(nn.Module):
    """Module that computes an attention branch from features ``(B, C, t, h, w)``.

    Example:
        >>> branch = Branch(nn.Conv3d(8, 16, 1), width=16, num_classes=5, steps=4)
        >>> gates = branch(torch.rand(2, 8, 4, 6, 6))
        >>> gates.spatial.shape, gates.temporal.shape, gates.logits.shape
        (torch.Size([2, 1, 4, 6, 6]), torch.Size([2, 1, 4, 1, 1]), torch.Size([2, 5]))

    Args:
        body: module from C to ``width`` channels that keeps t, h and w of the features.
        width: number of channels of the body's output.
        num_classes: K, the number of classes.
        steps: expected t of the features. With ``temporal="any"``, other values work as well: the evidence is averaged
            to ``steps`` bins before the logits are computed.
        temporal: ``"any"`` for any number of steps, or the paper's ``"fixed"``.
        maps: K', number of maps of class evidence; None for one per class, as in the paper.
        norm: function from a number of channels to a normalization layer.
        dropout: dropout probability before the linear layer of the logits, in [0, 1).

    Reference:
        Mitsuhara et al., arXiv 2110.15574, section 3: A = relu(BN(conv(BN(body)))), M = sigmoid(BN(conv(A))).
    """

    def __init__(
        self,
        body: nn.Module,
        width: int,
        num_classes: int,
        steps: int,
        *,
        temporal: Temporal = "any",
        maps: int | None = None,
        norm: Norm = group_norm,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        maps = maps or num_classes
        self.steps = steps
        self.body = body
        self.body_norm = norm(width)
        self.to_maps = nn.Conv3d(width, maps, 1, bias=False)
        self.maps_norm = norm(maps)
        self.to_spatial = nn.Conv3d(maps, 1, 1, bias=False)
        self.spatial_norm = norm(1)
        self.to_temporal = AnyTime(maps, 8, norm) if temporal == "any" else FixedTime(maps, steps, norm)
        self.to_evidence = nn.Conv3d(maps, maps, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(maps * steps, num_classes)

    def forward(self, features: Tensor) -> Gates:
        maps = torch.relu(self.maps_norm(self.to_maps(self.body_norm(self.body(features)))))  # the paper's A
        evidence = self.to_evidence(maps)
        return Gates(
            spatial=torch.sigmoid(self.spatial_norm(self.to_spatial(maps))),
            temporal=self.to_temporal(maps),
            evidence=evidence,
            logits=self.classify(self.dropout(self.pooled(evidence))),
        )

    def pooled(self, evidence: Tensor) -> Tensor:
        """Return means ``(B, K' steps)`` of the evidence ``(B, K', t, h, w)``: the input of the linear layer."""
        return F.adaptive_avg_pool3d(evidence, (self.steps, 1, 1)).flatten(1)
