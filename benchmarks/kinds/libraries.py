"""Models built by other libraries: pytorchvideo, vit-pytorch, timesformer-pytorch and perceiver-pytorch.

Nothing about them is declared: attention and tokens are found by running them.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_staa import VideoClassifier
from kinds.networks import CLASSES
from kinds.subjects import ByHand, Kind, Subject, clips, plain, same, tokens, trained

PYTORCHVIDEO = ("pytorchvideo", "fvcore", "iopath", "torchvision")


def strong(net: nn.Module) -> nn.Module:
    """Make attention far from uniform in the networks of lucidrains' libraries, and the outputs different."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ("to_qkv", "to_q", "to_kv"):
            module.weight.data.mul_(3)
    return trained(net)


def mean_of_heads(matrix: Tensor, batch: int) -> Tensor:
    """Return ``(batch, rows, Q, N)`` from ``(batch * rows, heads, Q, N)`` or ``(batch * heads, Q, N)``."""
    if matrix.ndim == 3:
        matrix = matrix.unflatten(0, (batch, -1))
    return matrix.mean(1).unflatten(0, (batch, -1))


def rolled_out(matrices: Sequence[Tensor]) -> Tensor:
    """Return the product of all matrices ``(..., N, N)`` with half of the identity each."""
    product = torch.eye(matrices[0].shape[-1])
    for matrix in matrices:
        product = (matrix + torch.eye(matrix.shape[-1])) @ product / 2
    return product


# --- pytorchvideo -------------------------------------------------------------------------------------------------


def slow_fast() -> Subject:
    """SlowFast R50 with a quarter of its channels."""
    library = importlib.import_module("pytorchvideo.models.slowfast")
    clip = clips("BCTHW", 8, (64, 64))
    net = library.create_slowfast(
        model_num_class=CLASSES, stem_dim_outs=(16, 2), head_pool_kernel_sizes=((2, 2, 2), (8, 2, 2))
    )
    net = trained(net, [clip[:, :, ::4], clip])
    reference = ByHand(net, lambda net, clip: net([clip[:, :, [0, 4]], clip]))
    clf = VideoClassifier(net, layout="BCTHW", pack=lambda clip: [clip[:, :, ::4], clip])
    layer = "blocks.2.multipathway_blocks.1"
    return Subject(clf, reference, clip, layer, same, cell=(4, 32, 32), steps=2)


def x3d() -> Subject:
    """X3D, whose head returns logits in train mode, and probabilities in eval mode."""
    library = importlib.import_module("pytorchvideo.models.x3d")
    clip = clips("BCTHW", 4, (64, 64))
    net = library.create_x3d(input_clip_length=4, input_crop_size=64, model_num_class=CLASSES)
    net = trained(net, clip)
    clf = VideoClassifier(net, layout="BCTHW")
    reference = ByHand(net, plain, "probabilities")
    return Subject(clf, reference, clip, "blocks.2", same, cell=(2, 32, 32), steps=2)


def mvit() -> Subject:
    """Multiscale Vision Transformer of four blocks, of which the second merges 2 x 2 tokens."""
    library = importlib.import_module("pytorchvideo.models.vision_transformers")
    net = library.create_multiscale_vision_transformers(
        spatial_size=64,
        temporal_size=8,
        depth=4,
        embed_dim_mul=[[1, 2.0]],
        atten_head_mul=[[1, 2.0]],
        pool_q_stride_size=[[1, 1, 2, 2]],
        pool_kv_stride_adaptive=[1, 2, 2],
        pool_kvq_kernel=[3, 3, 3],
        head_num_classes=CLASSES,
        patch_embed_dim=32,
    )

    def map_of(softmaxes: list[Tensor]) -> Tensor:
        matrices = [matrix.mean(1) for matrix in softmaxes]
        merge = torch.zeros(257, 1025)  # the mean of 2 x 2 tokens
        merge[0, 0] = 1
        places = torch.arange(1, 1025).view(4, 8, 2, 8, 2).permute(0, 1, 3, 2, 4).reshape(256, 4)
        merge[1:].scatter_(1, places, 0.25)
        weights = torch.zeros(len(matrices[0]), 1, 257)
        weights[..., 0] = 1  # the class token
        for matrix in (matrices[3], matrices[2]):
            weights = (weights + weights @ matrix) / 2
        weights = (weights @ merge + weights @ matrices[1]) / 2
        weights = (weights + weights @ matrices[0] @ merge) / 2
        return weights[:, 0, 1:].unflatten(1, (4, 16, 16))

    clf, fold = VideoClassifier(trained(net), layout="BCTHW"), tokens((4, 8, 8), prefix=1)
    known: dict[str, Any] = {"embedding": ("patch_embed.patch_model", (2, 4, 4)), "merged": 2, "attention": map_of}
    clip = clips("BCTHW", 8, (64, 64))
    return Subject(clf, ByHand(net, plain), clip, "blocks.3.norm1", fold, cell=(4, 32, 32), steps=2, **known)


# --- lucidrains -----------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"image_size": 32, "num_classes": CLASSES, "dim": 32, "heads": 2, "mlp_dim": 64, "dim_head": 16}
OF_CUBES: dict[str, Any] = {**SMALL, "image_patch_size": 8, "frames": 8, "frame_patch_size": 2}


def vit_3d() -> Subject:
    """Joint attention among tubelets, with a class token."""
    net = strong(importlib.import_module("vit_pytorch.vit_3d").ViT(**OF_CUBES, depth=2))

    def map_of(softmaxes: list[Tensor]) -> Tensor:
        return rolled_out([matrix.mean(1) for matrix in softmaxes])[:, 0, 1:].unflatten(1, (4, 4, 4))

    clf, fold = VideoClassifier(net, layout="BCTHW"), tokens((4, 4, 4), prefix=1)
    known: dict[str, Any] = {
        "embedding": ("to_patch_embedding.2", (2, 8, 8)),
        "embedded": tokens((4, 4, 4)),
        "inspected": True,
    }
    layer = "transformer.layers.1.0.norm"
    return Subject(clf, ByHand(net, plain), clips("BCTHW", 8, (32, 32)), layer, fold, attention=map_of, **known)


def vivit() -> Subject:
    """A transformer over each step, below one over the class tokens of all steps."""
    library = importlib.import_module("vit_pytorch.vivit")
    net = strong(library.ViViT(**OF_CUBES, spatial_depth=2, temporal_depth=2, variant="factorized_encoder"))

    def map_of(softmaxes: list[Tensor]) -> Tensor:
        space = [mean_of_heads(matrix, 2) for matrix in softmaxes[:2]]  # (B, t, N, N)
        time = rolled_out([matrix.mean(1) for matrix in softmaxes[2:]])[:, 0, 1:]  # (B, t)
        cells = rolled_out(space)[:, :, 0, 1:] * time[..., None]
        return cells.unflatten(2, (4, 4))

    def embedded(value: Tensor) -> Tensor:
        return value.movedim(-1, 1).unflatten(3, (4, 4))  # (B, t, h * w, D)

    def fold(value: Tensor) -> Tensor:
        return embedded(value[:, 1:].unflatten(0, (-1, 4)))  # (B * t, 1 + h * w, D)

    clf = VideoClassifier(net, layout="BCTHW")
    known: dict[str, Any] = {"embedding": ("to_patch_embedding.2", (2, 8, 8)), "embedded": embedded, "inspected": True}
    layer = "spatial_transformer.layers.1.0.norm"
    return Subject(clf, ByHand(net, plain), clips("BCTHW", 8, (32, 32)), layer, fold, attention=map_of, **known)


def timesformer() -> Subject:
    """TimeSformer, whose class token attends in a separate computation beside those of the patches."""
    library = importlib.import_module("timesformer_pytorch")
    options = {name: value for name, value in SMALL.items() if name != "mlp_dim"}
    net = strong(library.TimeSformer(**options, patch_size=8, num_frames=8, depth=2))
    clf, fold = VideoClassifier(net, layout="BTCHW"), tokens((8, 4, 4), prefix=1)
    known: dict[str, Any] = {
        "embedding": ("to_patch_embedding", (1, 8, 8)),
        "embedded": tokens((8, 4, 4)),
        "inspected": True,
    }
    return Subject(clf, ByHand(net, plain), clips("BTCHW", 8, (32, 32)), "layers.1.1.norm", fold, **known)


class Perceiver(nn.Module):
    """The Perceiver, which takes channels last: eight latent tokens attend to all pixels, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.net = importlib.import_module("perceiver_pytorch").Perceiver(
            input_channels=3,
            input_axis=3,
            num_freq_bands=4,
            max_freq=8.0,
            depth=2,
            num_latents=8,
            latent_dim=32,
            cross_heads=1,
            latent_heads=2,
            cross_dim_head=16,
            latent_dim_head=16,
            num_classes=CLASSES,
            self_per_cross_attn=1,
        )

    def forward(self, clip: Tensor) -> Tensor:
        return self.net(clip.movedim(1, -1))


def perceiver() -> Subject:
    net = strong(Perceiver())

    def map_of(softmaxes: list[Tensor]) -> Tensor:
        first, latent, second, last = (mean_of_heads(matrix, 2)[:, 0] for matrix in softmaxes)
        pulled = first / 2  # the other half stays with the latent tokens
        pulled = (pulled + latent @ pulled) / 2
        pulled = (pulled + second) / 2
        pulled = (pulled + last @ pulled) / 2
        return pulled.mean(1).unflatten(1, (4, 8, 8))

    clf, clip = VideoClassifier(net, layout="BCTHW"), clips("BCTHW", 4, (8, 8))
    known: dict[str, Any] = {"embedding": (None, (1, 1, 1)), "attention": map_of, "cell": (2, 4, 4), "inspected": True}
    return Subject(clf, ByHand(net, plain), clip, "net.layers.0.cross_attn.norm_context", tokens((4, 8, 8)), **known)


KINDS: list[Kind] = [
    Kind("pytorchvideo SlowFast", slow_fast, PYTORCHVIDEO),
    Kind("pytorchvideo X3D", x3d, PYTORCHVIDEO),
    Kind("pytorchvideo MViT", mvit, PYTORCHVIDEO),
    Kind("vit-pytorch `vit_3d`", vit_3d, ("vit_pytorch", "einops")),
    Kind("vit-pytorch `ViViT`", vivit, ("vit_pytorch", "einops")),
    Kind("timesformer-pytorch", timesformer, ("timesformer_pytorch", "einops")),
    Kind("perceiver-pytorch", perceiver, ("perceiver_pytorch", "einops")),
]
