"""The attention branch: from the features of a layer to gates and logits, and how the gates act on the features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_staa._utils import notebook
from captum_staa._utils.checks import check_choice, check_count
from captum_staa._utils.tensors import short_repr
from captum_staa.result import VideoAttribution

Norm = Callable[[int], nn.Module]
NormName = Literal["group", "batch"]
Mechanism = Literal["mix", "residual", "observe", "bottleneck"]
Body = Literal["stage", "light", "stages", "pyramid"]
Temporal = Literal["any", "fixed"]
OPEN = 2.0  # initial logit of both gates of a bottleneck: 88 % open, so that the head first sees what it was trained on
MEMORY = 0.02  # weight of a new batch in the mean features of a bottleneck
UNUSED = 0.01  # smaller changes of the target's probability do not count as use of the gates


def group_norm(channels: int) -> nn.Module:
    """Return a group norm. It keeps no running statistics, so the output for a clip does not depend on other clips."""
    return nn.GroupNorm(4 if channels % 4 == 0 else 1, channels)


NORMS: dict[NormName, Norm] = {"group": group_norm, "batch": nn.BatchNorm3d}


@dataclass(frozen=True)
class BranchConfig:
    """Options of the attention branch that :meth:`STABN.inject` adds to a model.

    Example:
        >>> BranchConfig("observe", maps=16).mechanism
        'observe'

    Args:
        mechanism: how the gates act on the features.

            - ``"residual"`` adds a learned function of the gated features to the features. It starts at zero, so the
              outputs of the model do not change until the branch is trained.
            - ``"observe"`` does not change the features, for gates that are trained to mask the clip
              (``STABNLoss("posthoc")``).
            - ``"mix"`` is that of the paper. It changes the outputs from the start.
            - ``"bottleneck"`` replaces what the gates close by a constant, so the rest of the network receives only
              what the gates let through. It changes the outputs from the start. Use an early layer, whose features
              depend on few pixels and frames, and train it with ``STABNLoss("faithful")``.
        body: the first part of the branch, from the features to any number of channels, with the same t, h and w.

            - ``"light"`` is one convolution.
            - ``"stage"`` is a copy of the last of the model's ``.stages`` with stride 1, as in the paper.
            - ``"pyramid"`` is a small encoder and decoder that sees most of the frame, for early layers.
            - ``"stages"`` is the same with copies of all but the last of the model's ``.stages`` as the encoder, for a
              layer in front of them.
            - your own module. Such a branch cannot be saved by :meth:`STABN.save_pretrained`.
            - None is ``"pyramid"`` for a bottleneck, otherwise ``"light"``.
        width: number of channels of the body, at least 1, unless the body is ``"stage"`` or your own.
        maps: number of maps of class evidence, at least 1. None is one per class, as in the paper; for a bottleneck it
            is ``width``.
        temporal: a temporal head for ``"any"`` number of steps, or the paper's head for a ``"fixed"`` number.
        norm: normalization layers of the branch, ``"group"`` or ``"batch"``.
        dropout: dropout probability before the linear layer of the branch's logits, in [0, 1).
        noise: for a bottleneck: standard deviation of the noise that is added to the logits of the gates in train mode,
            at least 0. With noise, a gate that is nearly closed lets nothing through.
        drop: for a bottleneck: part of the steps of time that are closed at random in train mode, in [0, 1). Then a
            part of the evidence is not enough, and the gates open for all of it.
        layer_axes: the order of the axes of the layer's output, such as ``"BTHWC"``
            (:class:`captum_staa.models.layers.LayerAxes`). None reads it from the modules around the layer.

    Raises:
        TypeError: ``width`` or ``maps`` is not an integer.
        ValueError: an option is unknown or out of range.
    """

    mechanism: Mechanism = "residual"
    body: Body | nn.Module | None = None
    width: int = 32
    maps: int | None = None
    temporal: Temporal = "any"
    norm: NormName = "group"
    dropout: float = 0.0
    layer_axes: str | None = None
    noise: float = 0.5
    drop: float = 0.3

    def __post_init__(self) -> None:
        check_choice("mechanism", self.mechanism, get_args(Mechanism))
        if self.body is None:
            object.__setattr__(self, "body", "pyramid" if self.mechanism == "bottleneck" else "light")
        if not isinstance(self.body, nn.Module):
            check_choice("body", self.body, get_args(Body))
        check_choice("temporal", self.temporal, get_args(Temporal))
        check_choice("norm", self.norm, NORMS)
        for name in ("width", "maps"):
            if (count := getattr(self, name)) is not None or name == "width":
                check_count(name, count)
                object.__setattr__(self, name, int(count))  # NumPy integers cannot be written to config.json
        for name in ("dropout", "drop"):
            if not 0 <= (share := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, got {share!r}. Pass, e.g., 0.5.")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must be a finite number of at least 0, got {self.noise!r}. Pass, e.g., 0.5.")


@dataclass(frozen=True)
class Gates:
    """The output of a branch for features ``(B, C, t, h, w)``.

    Attributes:
        spatial: ``(B, 1, t, h, w)`` in (0, 1), the paper's M: the weight of each position in each step of time.
        temporal: ``(B, 1, t, 1, 1)`` in (0, 1), the paper's alpha: the weight of each step of time.
        evidence: ``(B, K', t, h, w)``, maps from which the branch's logits are computed, by a mean and a linear layer.
            With a ``"pyramid"`` or ``"stages"`` body, their cells are larger, those of the body's first level.
        logits: ``(B, K)``, the logits of the branch.
    """

    spatial: Tensor
    temporal: Tensor
    evidence: Tensor
    logits: Tensor

    def flat(self) -> Gates:
        """Return the gates with the mean of each clip in every place: they have the same size and say nothing."""
        spatial, temporal = (
            gate.mean((1, 2, 3, 4), keepdim=True).expand_as(gate) for gate in (self.spatial, self.temporal)
        )
        return replace(self, spatial=spatial, temporal=temporal)


@dataclass(frozen=True)
class BranchExplanation:
    """The gates of a branch in frames and pixels of the clip and in cells of the layer, and the logits of the model.

    The gates say where the branch is open. They are not an attribution: see :class:`captum_staa.AttentionBranch`.

    Attributes:
        logits: ``(B, K)``, the logits of the model.
        spatial_gates: ``(B, T, H, W)`` in (0, 1), the weight of each pixel, interpolated between the layer's cells.
        temporal_gates: ``(B, T)`` in (0, 1), the weight of each frame. All frames of a step have the same value.
        gates: the gates of the layer's cells, with the evidence and the logits of the branch.
    """

    logits: Tensor
    spatial_gates: Tensor
    temporal_gates: Tensor
    gates: Gates

    __repr__ = short_repr

    @property
    def attention_logits(self) -> Tensor:
        """The logits of the branch, ``(B, K)``."""
        return self.gates.logits

    @property
    def grid(self) -> tuple[int, int, int]:
        """The number of cells of the layer, ``(t, h, w)``."""
        steps, height, width = self.gates.spatial.shape[2:]
        return steps, height, width

    @property
    def resolution(self) -> str:
        """The resolution of the gates, as text."""
        return resolution(self.grid, tuple(self.spatial_gates.shape[1:]))

    def _repr_html_(self) -> str:
        """Return HTML for notebooks: the gates, and the classes predicted by model and branch."""
        gates = VideoAttribution(self.spatial_gates, self.spatial_gates.mean(1), self.temporal_gates)
        answers = [logits.argmax(1).tolist() for logits in (self.logits, self.attention_logits)]
        rows = [[at, *pair] for at, pair in enumerate(zip(*answers, strict=True))]
        classes = notebook.block(self.resolution, notebook.table(["clip", "class", "class by the branch"], rows))
        return f"<div>{gates._repr_html_()}{classes}</div>"


def resolution(grid: tuple[int, ...], size: tuple[int, ...]) -> str:
    """Return the resolution of a grid ``(t, h, w)`` over a clip of ``size`` ``(T, H, W)``, as text.

    Example:
        >>> resolution((8, 6, 6), (16, 48, 48))
        'each bar covers 2 frames, each cell 8 x 8 pixels'
    """
    t, h, w = (f"{pixels / cells:.3g}" for cells, pixels in zip(grid, size, strict=True))
    return f"each bar covers {t} frame{'' if t == '1' else 's'}, each cell {h} x {w} pixels"


class FixedTime(nn.Module):
    """Logits of the paper's temporal weights: ``W2 relu(W1 GAP(relu(conv_T(relu(BN(conv3x3x3(A)))))))``.

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
        return self.weigh(pooled)[:, None, :, None, None]


class AnyTime(nn.Module):
    """Logits of temporal weights for any number of steps: convolutions over time with replicated padding."""

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
        return self.weigh(torch.relu(self.mix(pooled)))[..., None, None]


class Pyramid(nn.Module):
    """Encoder and decoder: features at several scales, upsampled, joined and mixed, at the size of the first scale.

    Args:
        levels: modules that are applied one after the other, each with a stride.
        channels: number of output channels of each level.
        width: number of channels of the output.
        norm: function from a number of channels to a normalization layer.
    """

    def __init__(self, levels: Iterable[nn.Module], channels: list[int], width: int, norm: Norm) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.join = nn.Sequential(_conv(sum(channels), width), norm(width), nn.ReLU())

    def forward(self, features: Tensor) -> Tensor:
        found, x = [], features
        for level in self.levels:
            x = level(x)
            found.append(x)
        size = found[0].shape[2:]
        return self.join(torch.cat([_resized(x, size) for x in found], 1))

    @classmethod
    def new(cls, channels: int, width: int, norm: Norm) -> Pyramid:
        """Return a pyramid with two new levels, each of which halves height and width."""
        levels, c_in = [], channels
        for c_out in (width, 2 * width):
            halve = [_conv(c_in, c_out, (1, 2, 2)), norm(c_out), nn.ReLU()]
            levels.append(nn.Sequential(*halve, _conv(c_out, c_out), norm(c_out), nn.ReLU()))
            c_in = c_out
        return cls(levels, [width, 2 * width], width, norm)


def _conv(c_in: int, c_out: int, stride: tuple[int, int, int] = (1, 1, 1)) -> nn.Conv3d:
    # Zeros around the clip would make the first and last frame differ from the others.
    return nn.Conv3d(c_in, c_out, 3, stride, padding=1, bias=False, padding_mode="replicate")


def _resized(features: Tensor, size: torch.Size) -> Tensor:
    return features if features.shape[2:] == size else F.interpolate(features, size=size, mode="trilinear")


class Branch(nn.Module):
    """The attention branch: computes :class:`Gates` from features ``(B, C, t, h, w)``.

    Example:
        >>> branch = Branch(nn.Conv3d(8, 16, 1), width=16, num_classes=5, steps=4)
        >>> gates = branch(torch.rand(2, 8, 4, 6, 6))
        >>> gates.spatial.shape, gates.temporal.shape, gates.logits.shape
        (torch.Size([2, 1, 4, 6, 6]), torch.Size([2, 1, 4, 1, 1]), torch.Size([2, 5]))

    Args:
        body: module from C to ``width`` channels that keeps t, h and w of the features. If its output is smaller, the
            logits of the gates are upsampled.
        width: number of channels of the body's output.
        num_classes: K, the number of classes.
        steps: expected t of the features. With ``temporal="any"``, other values work as well: the evidence is averaged
            to ``steps`` bins before the logits are computed.
        temporal: ``"any"`` for any number of steps, or the paper's ``"fixed"``.
        maps: K', number of maps of class evidence; None for one per class, as in the paper.
        norm: function from a number of channels to a normalization layer.
        dropout: dropout probability before the linear layer of the logits, in [0, 1).
        noise: standard deviation of the noise that is added to the logits of the gates in train mode, for a bottleneck:
            its gates are open at first, and M has a bias in place of the norm. None is the paper's branch.

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
        noise: float | None = None,
    ) -> None:
        super().__init__()
        maps = maps or num_classes
        self.steps, self.noise = steps, noise
        self.body = body
        self.body_norm = norm(width)
        self.to_maps = nn.Conv3d(width, maps, 1, bias=False)
        self.maps_norm = norm(maps)
        # A norm would open the same share of every clip. The gates of a bottleneck must be able to close.
        self.to_spatial = nn.Conv3d(maps, 1, 1, bias=noise is not None)
        self.spatial_norm = norm(1) if noise is None else nn.Identity()
        self.to_temporal = AnyTime(maps, 8, norm) if temporal == "any" else FixedTime(maps, steps, norm)
        self.to_evidence = nn.Conv3d(maps, maps, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(maps * steps, num_classes)
        if noise is not None:
            for gate in (self.to_spatial, self.to_temporal):  # the last bias is that of the logits
                nn.init.constant_(list(gate.parameters())[-1], OPEN)

    def forward(self, features: Tensor) -> Gates:
        maps = torch.relu(self.maps_norm(self.to_maps(self.body_norm(self.body(features)))))  # the paper's A
        evidence = self.to_evidence(maps)
        return Gates(
            spatial=self._gate(self.spatial_norm(self.to_spatial(maps)), features.shape[2:]),
            temporal=self._gate(self.to_temporal(maps), torch.Size([features.shape[2], 1, 1])),
            evidence=evidence,
            logits=self.classify(self.dropout(self.pooled(evidence))),
        )

    def _gate(self, logits: Tensor, size: torch.Size) -> Tensor:
        if self.noise and self.training:
            logits = logits + self.noise * torch.randn_like(logits)
        return torch.sigmoid(_resized(logits, size))

    def pooled(self, evidence: Tensor) -> Tensor:
        """Return means ``(B, K' steps)`` of the evidence ``(B, K', t, h, w)``: the input of the linear layer."""
        return F.adaptive_avg_pool3d(evidence, (self.steps, 1, 1)).flatten(1)


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


class Bottleneck(nn.Module):
    """``mu + M alpha (g - mu)``: what the gates close is replaced by the mean feature mu, a constant per channel.

    mu is a running mean over the batches of the training, in which it follows the features. It carries nothing of the
    clip, so what is closed cannot reach the rest of the network.

    Args:
        channels: C of the features.
        drop: part of the steps of time that are closed at random in train mode.
    """

    mean: Tensor
    batches: Tensor

    def __init__(self, channels: int, drop: float = 0.0) -> None:
        super().__init__()
        self.drop = drop
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, features: Tensor, spatial: Tensor, temporal: Tensor) -> Tensor:
        if self.training:
            self._follow(features)
            temporal = temporal * (torch.rand_like(temporal) >= self.drop)
        closed = self.mean.to(features)[:, None, None, None]
        return closed + spatial * temporal * (features - closed)

    @torch.no_grad()
    def _follow(self, features: Tensor) -> None:
        self.batches += 1
        weight = (1 / self.batches).clamp(min=MEMORY).to(self.mean)  # a plain mean over the first batches
        self.mean.lerp_(features.float().mean((0, 2, 3, 4)).to(self.mean), weight)


def mechanism_of(config: BranchConfig, channels: int) -> nn.Module:
    """Return the mechanism of a config for features of C = ``channels``."""
    if config.mechanism == "mix":
        return Mix(channels, NORMS[config.norm])
    if config.mechanism == "bottleneck":
        return Bottleneck(channels, config.drop)
    return Residual(channels) if config.mechanism == "residual" else Observe()
