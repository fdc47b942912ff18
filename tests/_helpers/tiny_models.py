"""Random tiny transformers of every family, and clips for them, for several test files."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    TimesformerConfig,
    TimesformerForVideoClassification,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VivitConfig,
    VivitForVideoClassification,
    VJEPA2Config,
    VJEPA2ForVideoClassification,
)
from transformers.models.videoprism.configuration_videoprism import VideoPrismVisionConfig
from transformers.models.videoprism.modeling_videoprism import VideoPrismForVideoClassification

from captum_staa import TokenGrid, VideoClassifier
from captum_staa.models import AttentionLayer, Family

# t = 4, h = 3, w = 2 in every family, so that a swap of two axes is detected.
SIZE = (24, 16)
CLASSES = 3
COMMON = {"hidden_size": 24, "num_attention_heads": 2, "num_labels": CLASSES}
NAMES = ("videomae", "videomae-first", "timesformer", "timesformer-joint", "vivit", "vjepa2", "videoprism")


def _videomae(mean: bool) -> nn.Module:
    config = VideoMAEConfig(
        image_size=SIZE,
        patch_size=8,
        num_frames=8,
        tubelet_size=2,
        num_hidden_layers=2,
        intermediate_size=32,
        use_mean_pooling=mean,
        **COMMON,
    )
    return VideoMAEForVideoClassification(config)


def _timesformer(kind: str) -> nn.Module:
    # The config only has square images. The embeddings accept others.
    config = TimesformerConfig(
        image_size=16,
        patch_size=8,
        num_frames=4,
        num_hidden_layers=2,
        intermediate_size=32,
        attention_type=kind,
        **COMMON,
    )
    return TimesformerForVideoClassification(config)


def _vivit() -> nn.Module:
    config = VivitConfig(
        image_size=SIZE,
        num_frames=8,
        tubelet_size=[2, 8, 8],
        num_hidden_layers=2,
        intermediate_size=32,
        **COMMON,
    )
    return VivitForVideoClassification(config)


def _vjepa2() -> nn.Module:
    config = VJEPA2Config(
        crop_size=16,
        patch_size=8,
        frames_per_clip=8,
        tubelet_size=2,
        num_hidden_layers=2,
        num_pooler_layers=1,
        mlp_ratio=2,
        pred_hidden_size=12,
        pred_num_attention_heads=1,
        pred_num_hidden_layers=1,
        **COMMON,
    )
    return VJEPA2ForVideoClassification(config)


def _videoprism() -> nn.Module:
    config = VideoPrismVisionConfig(
        image_size=SIZE,
        num_frames=4,
        tubelet_size=(1, 8, 8),
        num_spatial_layers=2,
        num_temporal_layers=1,
        intermediate_size=32,
        attn_logit_softcapping=2.0,
        **COMMON,
    )
    return VideoPrismForVideoClassification(config)


_MAKERS: dict[str, Callable[[], nn.Module]] = {
    "videomae": lambda: _videomae(True),
    "videomae-first": lambda: _videomae(False),
    "timesformer": lambda: _timesformer("divided_space_time"),
    "timesformer-joint": lambda: _timesformer("joint_space_time"),
    "vivit": _vivit,
    "vjepa2": _vjepa2,
    "videoprism": _videoprism,
}


def randomize(module: nn.Module, seed: int, spread: float = 0.3) -> nn.Module:
    """Draw weights so large that attention is far from uniform, and class tokens and positions are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(noise if parameter.ndim > 1 else parameter + 0.3 * noise)
    return module.eval()


def tiny_module(name: str, seed: int = 0) -> nn.Module:
    """Return a random model of a family, with the default attention implementation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomize(_MAKERS[name](), seed)


def tiny(name: str, seed: int = 0) -> VideoClassifier:
    """Return a random model of a family as a classifier of clips with frames of 24 x 16 pixels."""
    return VideoClassifier(tiny_module(name, seed), image_size=SIZE)


def clip_for(clf: VideoClassifier, batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    sizes = {"B": batch, "T": clf.num_frames, "C": 3, "H": SIZE[0], "W": SIZE[1]}
    clip = torch.randn([sizes[axis] for axis in "BTCHW"], generator=torch.Generator().manual_seed(seed)).to(dtype)
    return clf.layout.from_working(clip).contiguous()


class CallsSdpa(nn.Module):
    """Attention with F.scaled_dot_product_attention, as in many repositories."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)  # each (B, h, N, d)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def explicit(self, x: Tensor) -> Tensor:
        """Return the attention weights ``(B, h, N, N)``, computed from the formula."""
        q, k, _ = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)


class MultiHead(nn.Module):
    """Attention with nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int, batch_first: bool, **options: bool) -> None:
        super().__init__()
        self.inner, self.batch_first = nn.MultiheadAttention(width, heads, batch_first=batch_first), batch_first
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.inner(x, x, x, **self.options)[0]
        return y if self.batch_first else y.transpose(0, 1)

    def explicit(self, x: Tensor) -> Tensor:
        q, k, _ = F.linear(x, self.inner.in_proj_weight, self.inner.in_proj_bias).chunk(3, -1)
        q, k = (y.unflatten(-1, (self.inner.num_heads, -1)).transpose(1, 2) for y in (q, k))
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)


class OwnViT(nn.Module):
    """A video ViT of no known family: class token, (B, C, T, H, W), tubelets of 2 x 8 x 8."""

    def __init__(self, attention: Callable[[], nn.Module], layers: int = 2, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv3d(3, width, (2, 8, 8), (2, 8, 8))
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(width), "attn": attention()}) for _ in range(layers)
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.embed(clip).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = x + block["attn"](block["norm"](x))
        return self.head(x[:, 0])


def own_family(suffix: str = "") -> Family:
    return Family(
        name="own",
        grid=lambda model: TokenGrid(t=4, h=3, w=2, prefix=1, tubelet=(2, 8, 8)),
        attention=lambda model: [
            AttentionLayer(f"blocks.{i}.attn{suffix}", block=i, backend="mha" if suffix else "sdpa")
            for i in range(len(model.blocks))
        ],
        pooling=lambda model: "cls",
        layout="BCTHW",
        num_frames=lambda model: 8,
        image_size=lambda model: SIZE,
        patch_embedding="embed",
    )


OWN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "sdpa": (lambda: CallsSdpa(16, 2), ""),
    "mha": (lambda: MultiHead(16, 2, batch_first=True), ".inner"),
    "mha, time first": (lambda: MultiHead(16, 2, batch_first=False), ".inner"),
    "mha, no weights": (lambda: MultiHead(16, 2, batch_first=True, need_weights=False), ".inner"),
    "mha, all heads": (lambda: MultiHead(16, 2, batch_first=False, average_attn_weights=False), ".inner"),
}


def own(kind: str, seed: int = 0) -> VideoClassifier:
    attention, suffix = OWN[kind]
    with torch.random.fork_rng():
        return VideoClassifier(randomize(OwnViT(attention), seed), family=own_family(suffix))


def classifier(name: str) -> VideoClassifier:
    """Return a classifier of a known family, or of a model without a known family."""
    return own(name) if name in OWN else tiny(name)


ALL = (*NAMES, *OWN)


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Return the state that a call must not change; compare with ``==``, or with :func:`changes`."""
    state: dict[str, Any] = {
        "random state of torch": torch.get_rng_state().tolist(),
        "random state of NumPy": repr(np.random.get_state()),
        "random state of Python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "autocast": torch.is_autocast_enabled(),
        "threads": torch.get_num_threads(),
        "backends": (torch.backends.cudnn.enabled, torch.backends.cuda.math_sdp_enabled()),
    }
    for name, part in module.named_modules():
        config = getattr(part, "config", None)
        state[f"module {name}"] = (
            part.training,
            id(config),
            getattr(config, "_attn_implementation", None),
            [list(part.__dict__[hooks]) for hooks in sorted(part.__dict__) if hooks.endswith("_hooks")],
            sorted(key for key in part.__dict__),
        )
    for name, parameter in module.named_parameters():
        grad = None if parameter.grad is None else (id(parameter.grad), _bytes(parameter.grad))
        state[f"parameter {name}"] = (id(parameter), parameter.requires_grad, grad, parameter._version)
        state[f"value of {name}"] = _bytes(parameter)
    for name, buffer in module.named_buffers():
        state[f"buffer {name}"] = (id(buffer), _bytes(buffer))
    return state


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of the parts of two snapshots that differ."""
    return [name for name in {**before, **after} if before.get(name, ()) != after.get(name, ())]


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().double().numpy().tobytes()  # in which nan equals nan
