"""A 3D ResNet with bottlenecks and without temporal stride, the backbone of the ST-ABN paper."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from captum_staa._utils.checks import check_count

EXPANSION = 4  # channels of a bottleneck's last convolution, relative to the first


class _Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions within a frame. If inflated, the first convolution also sees adjacent frames."""

    def __init__(self, c_in: int, planes: int, stride: int, inflated: bool) -> None:
        super().__init__()
        c_out, time = planes * EXPANSION, 3 if inflated else 1
        self.conv1 = nn.Conv3d(c_in, planes, (time, 1, 1), padding=(time // 2, 0, 0), bias=False)
        self.norm1 = nn.BatchNorm3d(planes)
        self.conv2 = nn.Conv3d(planes, planes, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False)
        self.norm2 = nn.BatchNorm3d(planes)
        self.conv3 = nn.Conv3d(planes, c_out, 1, bias=False)
        self.norm3 = nn.BatchNorm3d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            shortcut = nn.Conv3d(c_in, c_out, 1, (1, stride, stride), bias=False)
            self.shortcut = nn.Sequential(shortcut, nn.BatchNorm3d(c_out))
        # Three modules, because Captum's DeepLift and layer hooks need each ReLU called once.
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.relu2(self.norm2(self.conv2(y)))
        return self.relu3(self.norm3(self.conv3(y)) + self.shortcut(x))


class SlowResNet(nn.Module):
    """Residual 3D CNN without temporal stride. By default only the last two stages have temporal convolutions.

        >>> import torch
        >>> model = SlowResNet(num_classes=5, layers=(1, 1, 1, 1), width=8)
        >>> model(torch.zeros(2, 3, 4, 32, 32)).shape
        torch.Size([2, 5])

    The defaults are the 3D ResNet-50 of the ST-ABN paper. For 32 frames of 224 pixels, the output of its third stage is
    1024 x 32 x 14 x 14.

    Args:
        num_classes: K, the number of logits per clip.
        layers: number of bottlenecks in each stage.
        width: number of channels of the stem and of the first stage's inner convolutions. Each later stage doubles it.
        inflated: for each stage, whether its bottlenecks have temporal convolutions.
        dropout: dropout probability before the linear head.

    Raises:
        TypeError: ``num_classes`` or ``width`` is not an integer.
        ValueError: an option is out of range.

    Reference:
        The slow pathway of Feichtenhofer et al., "SlowFast Networks for Video Recognition", ICCV 2019, table 1, which
        Mitsuhara et al., arXiv 2110.15574, take with one frame per step and K = 174.
    """

    def __init__(
        self,
        num_classes: int,
        layers: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        inflated: Sequence[bool] = (False, False, True, True),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_count("num_classes", num_classes)
        check_count("width", width)
        num_classes, width = (
            int(num_classes),
            int(width),
        )  # NumPy integers overflow, and cannot be written to a config.json
        if len(layers) != len(inflated) or min(layers, default=0) < 1:
            raise ValueError(
                f"layers and inflated must have one entry per stage, with layers of at least 1, got {layers = }, "
                f"{inflated = }"
            )
        self.config = {
            "num_classes": num_classes,
            "layers": list(layers),
            "width": width,
            "inflated": list(inflated),
            "dropout": dropout,
        }
        self.stem = nn.Sequential(
            nn.Conv3d(3, width, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        )
        stages, c_in = [], width
        for i, (count, sees_time) in enumerate(zip(layers, inflated, strict=True)):
            blocks = []
            for j in range(count):
                blocks.append(_Bottleneck(c_in, width * 2**i, 2 if i and not j else 1, sees_time))
                c_in = width * 2**i * EXPANSION
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(c_in, num_classes)

    def forward(self, clips: Tensor) -> Tensor:
        """Return the logits (B, K) of clips (B, 3, T, H, W) of any size."""
        if clips.ndim != 5 or clips.shape[1] != 3:
            raise ValueError(
                f"clips must be (B, 3, T, H, W), got shape {tuple(clips.shape)}. Swap axes with clips.transpose(1, 2) "
                f"if time comes before channels."
            )
        return self.head(self.dropout(self.stages(self.stem(clips)).mean((2, 3, 4))))
