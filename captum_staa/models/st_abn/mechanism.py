"""Mechanisms: how the gates act on the features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from captum_staa.models.st_abn.branch import Norm


class Mix(nn.Module):
    """The mechanism of the paper: ``relu(BN(conv1x1x1[(1 + M) g ; alpha g]))``, residual in space only.

    Args:
        channels: C of the features.
        norm: function from a number of channels to a normalization layer.

    Reference:
        Mitsuhara et al., arXiv 2110.15574, section 3.
    """

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.mix = nn.Conv3d(2 * channels, channels, 1, bias=False)
        self.norm = norm(channels)

    def forward(self, features: Tensor, spatial: Tensor, temporal: Tensor) -> Tensor:
        gated = torch.cat([(1 + spatial) * features, temporal * features], 1)  # (B, 2 C, t, h, w)
        return torch.relu(self.norm(self.mix(gated)))


class Residual(nn.Module):
    """``g + conv1x1x1[M g ; alpha g]``. The convolution starts at zero, so an untrained branch changes no output."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv3d(2 * channels, channels, 1, bias=False)
        nn.init.zeros_(self.mix.weight)

    def forward(self, features: Tensor, spatial: Tensor, temporal: Tensor) -> Tensor:
        return features + self.mix(torch.cat([spatial * features, temporal * features], 1))


class Observe(nn.Module):
    """Returns the features unchanged. The gates are trained by masking the clip."""

    def forward(self, features: Tensor, spatial: Tensor, temporal: Tensor) -> Tensor:
        return features
