"""The attention branch: from a layer's features to class evidence, a spatial map, temporal weights and own logits."""

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
    """What a branch says of a clip's features ``(B, C, t, h, w)``.

    Attributes:
        spatial: ``(B, 1, t, h, w)`` in (0, 1), the paper's M: where, in every step of time.
        temporal: ``(B, 1, t, 1, 1)`` in (0, 1), the paper's alpha: when.
        evidence: ``(B, K', t, h, w)``, from which the branch's own class scores are a mean and a linear layer.
        logits: ``(B, K)``, those scores.
    """

    spatial: Tensor
    temporal: Tensor
    evidence: Tensor
    logits: Tensor


def group_norm(channels: int) -> nn.Module:
    """Four groups where channels allow: no running statistics, so that a clip's answer is its own."""
    return nn.GroupNorm(4 if channels % 4 == 0 else 1, channels)


class FixedTime(nn.Module):
    """The paper's temporal weights: ``sigmoid(W2 relu(W1 GAP(relu(conv_T(relu(BN(conv3x3x3(A))))))))``.

    Its last three layers mix steps by weights for each pair of them, so it knows one number of steps only.
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
                f"the temporal head is fixed to {self.steps} steps, got maps of shape {tuple(maps.shape)}, which "
                f"is (B, K', t, h, w): give clips of the length it was built for, or build it with temporal='any'"
            )
        squeezed = torch.relu(self.norm(self.squeeze(maps)))[:, 0]  # (B, t, h, w)
        pooled = torch.relu(self.mix(squeezed)).mean((2, 3))  # (B, t)
        return torch.sigmoid(self.weigh(pooled))[:, None, :, None, None]


class AnyTime(nn.Module):
    """Temporal weights for any number of steps: convolutions over time, whose ends see themselves, not zeros."""

    def __init__(self, channels: int, width: int, norm: Norm) -> None:
        super().__init__()
        self.squeeze = nn.Conv3d(channels, width, 3, padding=1, bias=False, padding_mode="replicate")
        self.norm = norm(width)
        # The mean says how much of a frame speaks, the maximum how clearly: evidence may be small.
        self.mix = nn.Conv1d(2 * width, width, 3, padding=1, padding_mode="replicate")
        self.weigh = nn.Conv1d(width, 1, 3, padding=1, padding_mode="replicate")

    def forward(self, maps: Tensor) -> Tensor:
        squeezed = torch.relu(self.norm(self.squeeze(maps)))
        pooled = torch.cat([squeezed.mean((3, 4)), squeezed.amax((3, 4))], 1)  # (B, 2 width, t)
        return torch.sigmoid(self.weigh(torch.relu(self.mix(pooled))))[..., None, None]


class Branch(nn.Module):
    """An attention branch over features ``(B, C, t, h, w)``.

    Example:
        >>> branch = Branch(nn.Conv3d(8, 16, 1), width=16, num_classes=5, steps=4)
        >>> gates = branch(torch.rand(2, 8, 4, 6, 6))
        >>> gates.spatial.shape, gates.temporal.shape, gates.logits.shape
        (torch.Size([2, 1, 4, 6, 6]), torch.Size([2, 1, 4, 1, 1]), torch.Size([2, 5]))

    Args:
        body: from C to ``width`` channels, with the features' own t, h and w.
        width: channels of the body's output.
        num_classes: K of its class scores.
        steps: t of the features that it is made for. With ``temporal="any"`` it takes others, too: class scores are
            then of evidence averaged to ``steps`` bins.
        temporal: ``"any"`` number of steps, or the paper's ``"fixed"``.
        maps: K', maps of class evidence; the paper has one for each class.
        norm: makes a normalization layer for a number of channels.
        dropout: before the linear layer of the class scores.

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
        """``(B, K' steps)`` means of the evidence ``(B, K', t, h, w)``, of which the class scores are linear."""
        return F.adaptive_avg_pool3d(evidence, (self.steps, 1, 1)).flatten(1)
