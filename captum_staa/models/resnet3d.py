"""Residual 3D CNNs for clips: the small one of the bundled models, and the 3D ResNet-50 of the ST-ABN paper."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from captum_staa._utils.checks import check_choice, check_count, is_integer
from captum_staa._utils.files import atomic_files, save_tensors

Padding = Literal["zeros", "replicate"]
EXPANSION = 4  # channels of a bottleneck's last convolution, relative to the first


@dataclass(frozen=True)
class ResNet3DConfig:
    """The architecture of a :class:`ResNet3D`.

    >>> ResNet3DConfig(num_classes=4).channels
    (12, 24, 48)

    Args:
        num_classes: K, the number of logits per clip.
        width: number of channels of the first stage, a multiple of ``groups``. Each later stage doubles it.
        in_channels: C of the clips.
        stages: number of stages. Each is one residual block that halves height and width. Stages from
            ``time_strides_from`` on also halve time.
        groups: number of groups of the GroupNorm. With BatchNorm, logits would depend on running statistics.
        num_frames: T of the clips. The head has separate weights for each remaining time step.
        image_size: H and W of the training clips in pixels. Other sizes also run.
        time_strides_from: index of the first stage that halves time. 0 is the first stage.
        padding_mode: ``"zeros"``, or ``"replicate"``, which avoids border effects in the first and last frame.
    """

    num_classes: int
    width: int = 12
    in_channels: int = 3
    stages: int = 3
    groups: int = 4
    num_frames: int = 16
    image_size: int = 48
    time_strides_from: int = 1
    padding_mode: Padding = "zeros"

    def __post_init__(self) -> None:
        for name in ("num_classes", "width", "in_channels", "stages", "groups", "num_frames", "image_size"):
            check_count(name, getattr(self, name))
        check_count("time_strides_from", self.time_strides_from, least=0)
        for name, value in vars(self).copy().items():
            if is_integer(value):
                object.__setattr__(self, name, int(value))  # NumPy integers cannot be written to a config.json
        if self.width % self.groups:
            raise ValueError(f"width must be a multiple of groups = {self.groups}, got {self.width}")
        check_choice("padding_mode", self.padding_mode, get_args(Padding))

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(self.width * 2**i for i in range(self.stages))

    @property
    def time_steps(self) -> int:
        """Number of time steps after the last stage. A stride of 2 rounds up."""
        return -(-self.num_frames // 2 ** max(0, self.stages - self.time_strides_from))


class _Block(nn.Module):
    """Two 3x3x3 convolutions and a shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: tuple[int, int, int], groups: int, padding_mode: Padding) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(c_in, c_out, 3, stride, padding=1, bias=False, padding_mode=padding_mode)
        self.norm1 = nn.GroupNorm(groups, c_out)
        self.conv2 = nn.Conv3d(c_out, c_out, 3, padding=1, bias=False, padding_mode=padding_mode)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.shortcut = nn.Conv3d(c_in, c_out, 1, stride, bias=False)
        # Two modules instead of one used twice, because Captum's DeepLift and layer hooks need each ReLU called once.
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet3D(nn.Module):
    """Residual 3D CNN: stem, stages, mean over space, and a linear layer over the remaining time steps.

        >>> model = ResNet3D(num_classes=4)
        >>> model(torch.zeros(2, 3, 16, 48, 48)).shape
        torch.Size([2, 4])

    Time is not averaged, because the order of events would be lost in the mean.

    Args:
        num_classes: K, or a :class:`ResNet3DConfig`. A config cannot be combined with other arguments.
        **options: the other fields of :class:`ResNet3DConfig`.

    Raises:
        TypeError: a size is not an integer.
        ValueError: an option is out of range, or a clip does not have the T or C of the config.
    """

    def __init__(self, num_classes: int | ResNet3DConfig, **options: Any) -> None:
        super().__init__()
        if isinstance(num_classes, ResNet3DConfig):
            if options:
                raise ValueError(
                    f"options must be empty with a config, got {options}. Use dataclasses.replace(config, ...)."
                )
            self.config = num_classes
        else:
            self.config = ResNet3DConfig(num_classes, **options)
        config = self.config
        self.stem = nn.Sequential(
            nn.Conv3d(config.in_channels, config.width, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False),
            nn.GroupNorm(config.groups, config.width),
            nn.ReLU(),
        )
        blocks, c_in = [], config.width
        for i, c_out in enumerate(config.channels):
            stride = (1 if i < config.time_strides_from else 2, 2, 2)
            blocks.append(_Block(c_in, c_out, stride, config.groups, config.padding_mode))
            c_in = c_out
        self.stages = nn.Sequential(*blocks)
        self.head = nn.Linear(c_in * config.time_steps, config.num_classes)

    def forward(self, clips: Tensor) -> Tensor:
        """Return the logits (B, K) of clips (B, C, T, H, W)."""
        expected = (self.config.in_channels, self.config.num_frames)
        if clips.ndim != 5 or clips.shape[1:3] != expected:
            raise ValueError(
                f"clips must be (B, C, T, H, W) with (C, T) = {expected}, got shape {tuple(clips.shape)}. Swap axes "
                f"with clips.transpose(1, 2) if time comes before channels, or sample {expected[1]} frames."
            )
        features = self.stages(self.stem(clips))  # (B, C', T', H', W')
        return self.head(features.mean(dim=(3, 4)).flatten(1))


def save_pretrained(
    model: ResNet3D, folder: str | Path, labels: list[str], *, half: bool = False, overwrite: bool = False
) -> None:
    """Write ``config.json`` and ``model.safetensors``, in the format of Hugging Face.

    Args:
        model: the model to save.
        folder: the folder to write to. It is created if it does not exist.
        labels: one name per class, in the order of the logits.
        half: whether to store float16, which halves the size. :func:`from_pretrained` returns float32.
        overwrite: whether a model in the folder may be replaced.

    Raises:
        ValueError: the number of labels is not K.
        FileExistsError: the folder contains a model, and ``overwrite`` is False.
    """
    if len(labels) != model.config.num_classes:
        raise ValueError(f"labels must be {model.config.num_classes} names, one per class, got {len(labels)}: {labels}")
    config = {
        "model_type": "resnet3d",
        "architectures": ["ResNet3D"],
        **dataclasses.asdict(model.config),
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    dtype = torch.float16 if half else torch.float32
    weights = {name: value.detach().to(dtype).contiguous() for name, value in model.state_dict().items()}
    with atomic_files(folder, ["model.safetensors", "config.json"], overwrite=overwrite) as part:
        save_tensors(save_file, weights, part / "model.safetensors", {"format": "pt"})
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def from_pretrained(folder: str | Path) -> ResNet3D:
    """Load a model written by :func:`save_pretrained`. It is float32, in eval mode and on the CPU.

    Raises:
        ValueError: the folder contains another type of model.
    """
    folder = Path(folder)
    stored: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (kind := stored.get("model_type")) != "resnet3d":
        raise ValueError(
            f"model_type must be 'resnet3d', got model_type = {kind!r} in {folder}. "
            "Use VideoClassifier.from_pretrained."
        )
    fields = {field.name for field in dataclasses.fields(ResNet3DConfig)}
    model = ResNet3D(ResNet3DConfig(**{name: value for name, value in stored.items() if name in fields}))
    model.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    return model.eval()


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
        num_classes, width = int(num_classes), int(width)  # NumPy integers overflow, and JSON cannot hold them
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
