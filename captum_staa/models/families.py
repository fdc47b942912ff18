"""Descriptions of families of video transformers: token grid, attention layers, classification head.

A new family takes a few lines. Then all methods of this library can use the model:

    >>> from captum_staa import TokenGrid
    >>> family = Family(
    ...     name="my-vit",
    ...     grid=lambda model: TokenGrid(t=8, h=6, w=6, prefix=1, tubelet=(2, 8, 8)),
    ...     attention=lambda model: [AttentionLayer(f"blocks.{i}.attn", block=i) for i in range(4)],
    ...     pooling=lambda model: "cls",
    ...     layout="BCTHW",
    ... )

Pass it to ``VideoClassifier(model, family=family)``. The descriptions below are those of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from captum_staa._utils.model_state import uncompiled
from captum_staa.grid import TokenGrid, TokenRows

Role = Literal["joint", "spatial", "temporal", "pool", "window"]
Backend = Literal["hf", "sdpa", "mha", "softmax"]


@dataclass(frozen=True)
class AttentionLayer:
    """A module of a model that computes attention.

    Example:
        >>> AttentionLayer("blocks.3.attn", block=3)
        AttentionLayer(module='blocks.3.attn', block=3, role='joint', backend='sdpa', call=None)

    Args:
        module: dotted name of the module in whose forward the attention is computed.
        block: index of the residual block. Two layers of the same block (divided space-time attention) are treated
            as one operator, in the order in which they run.
        role: which tokens attend to which. ``"joint"``: every token to every token. ``"spatial"``: tokens within a
            frame, with frames in the batch axis. ``"temporal"``: tokens at the same patch position, with positions in
            the batch axis. ``"pool"``: one learned query to every token. ``"window"``: other groups of tokens, which
            ``rows`` lists.
        backend: how attention is read. ``"sdpa"``: the module calls ``F.scaled_dot_product_attention``. ``"mha"``: it
            is
            an ``nn.MultiheadAttention``. ``"hf"``: it uses the ``AttentionInterface`` of transformers. ``"softmax"``:
            it computes the softmax itself, with any function or module for it; or it is the dropout layer that gets the
            attention probabilities.
        call: which attention computation of the module is meant, counted from 0 in one forward, if it computes several.
            None if it computes one.
        rows: the tokens of each row of the attention. None are those of the role.
    """

    module: str
    block: int
    role: Role = "joint"
    backend: Backend = "sdpa"
    call: int | None = None
    rows: TokenRows | None = field(default=None, repr=False)

    def rows_on(self, grid: TokenGrid) -> TokenRows:
        """Return :attr:`rows`, or those of the role on a grid."""
        return TokenRows.of(self.role, grid) if self.rows is None else self.rows


Pooling = Literal["cls", "mean", "pool"] | Tensor | Callable[..., Tensor]


def _nothing(*args: Any) -> None:
    return None


@dataclass(frozen=True)
class Family:
    """Description of one family of video transformers.

    Args:
        name: a short name, such as the ``model_type`` of Hugging Face.
        grid: function that returns the :class:`TokenGrid` of a model.
        attention: function that returns the attention layers of a model, in the order in which they run.
        pooling: function that returns what the classification head reads: ``"cls"`` (the first token), ``"mean"`` (the
            mean of all tokens), ``"pool"`` (the last attention layer is the head's own query), a tensor with the weight
            of each token of the sequence, a function of a classifier and clips that returns weights ``(B, N)``, or None
            if unknown; it is then measured.
        layout: the order of the axes of the clips that the model takes.
        input_name: the keyword of the clip in ``forward``. None passes the clip as the first positional argument.
        num_frames: function that returns the number of frames per clip.
        image_size: function that returns ``(H, W)`` of the clips.
        classes: names of the model classes that belong to the family.
        patch_embedding: dotted name of the module whose output is the patch tokens, before positions are added:
            (B, D, t, h, w), (B * t, D, h, w), (B, N, D) or (B * t, h * w, D). None if unknown.
        backbone: the class of these models without a head, and its name inside them, such as
            ``("VideoMAEModel", "videomae")``. It is then recognized inside a module that puts its own head on it.
        rows: function of a model, one of its attention layers and the grid of the clips that returns the tokens of each
            row, or None for those of the layer's role.
    """

    name: str
    grid: Callable[[Any], TokenGrid]
    attention: Callable[[Any], Sequence[AttentionLayer]]
    pooling: Callable[[Any], Pooling | None]
    layout: str = "BTCHW"
    input_name: str | None = None
    num_frames: Callable[[Any], int | None] = _nothing
    image_size: Callable[[Any], tuple[int, int] | None] = _nothing
    classes: tuple[str, ...] = ()
    patch_embedding: str | None = None
    backbone: tuple[str, str] | None = None
    rows: Callable[[Any, AttentionLayer, TokenGrid], TokenRows | None] = _nothing


def family_of(model: nn.Module) -> Family | None:
    """Return the family of a model by the name of its class or of a parent class, or None if there is none.

    Example:
        >>> from transformers import VivitConfig, VivitForVideoClassification
        >>> config = VivitConfig(image_size=16, num_frames=4, tubelet_size=[2, 8, 8], hidden_size=8,
        ...                      num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> family = family_of(VivitForVideoClassification(config))
        >>> family.name
        'vivit'
    """
    return next(filter(None, (_matching(model, family) for family in FAMILIES.values())), None)


class FoundTransformer(NamedTuple):
    """A transformer inside a module, its dotted name there (``""`` for the module itself), and its family."""

    name: str
    transformer: nn.Module
    family: Family


def find_transformer(module: nn.Module, family: Family | None = None) -> FoundTransformer | None:
    """Return the transformer of a known family that ``module`` is or contains, or None unless there is exactly one.

    Example:
        >>> from transformers import VivitConfig, VivitForVideoClassification
        >>> config = VivitConfig(image_size=16, num_frames=4, tubelet_size=[2, 8, 8], hidden_size=8,
        ...                      num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> wrapped = nn.Sequential(VivitForVideoClassification(config))
        >>> find_transformer(wrapped).name, find_transformer(nn.Linear(2, 2)) is None
        ('0', True)

    Args:
        module: any module, such as a model inside a wrapper of PEFT, Lightning or ``torch.compile``.
        family: the family to look for. A family of your own describes ``module`` itself.

    Raises:
        ValueError: ``family`` is one of :data:`FAMILIES`, and ``module`` neither is nor contains such a model.
    """
    model = uncompiled(module)
    if family is not None and not family.classes:
        return FoundTransformer("", model, family)
    known = FAMILIES.values() if family is None else (family,)
    found: list[FoundTransformer] = []
    for name, part in model.named_modules():
        inside = any(not outer.name or name.startswith(f"{outer.name}.") for outer in found)
        match = None if inside else next(filter(None, (_matching(part, each) for each in known)), None)
        if match is not None:
            found.append(FoundTransformer(name, part, match))
    if len(found) == 1:
        return found[0]
    if family is not None:
        if getattr(model, "config", None) is not None:
            return FoundTransformer("", model, family)  # of the user's own class, but built like the family
        raise ValueError(
            f"family {family.name!r} describes {' and '.join(family.classes)}, got {type(model).__name__}, which has "
            f"no .config and contains {len(found)} such models. Pass a module that is or contains exactly one, or "
            f"describe yours with captum_staa.models.Family(...)."
        )
    return None


def _matching(model: nn.Module, family: Family) -> Family | None:
    """Return the family of a model by its class, for a backbone without its head one with the names inside it."""
    names = {cls.__name__ for cls in type(uncompiled(model)).__mro__}
    if names.intersection(family.classes):
        return family
    if family.backbone is None or family.backbone[0] not in names:
        return None
    prefix = f"{family.backbone[1]}."

    def attention(model: Any) -> list[AttentionLayer]:
        layers = [layer for layer in family.attention(model) if layer.module.startswith(prefix)]
        return [replace(layer, module=layer.module.removeprefix(prefix)) for layer in layers]

    embedding, known = family.patch_embedding, FAMILIES.get(family.name)
    return replace(
        family,
        attention=attention,
        # the head is the user's, who may have stated what it reads
        pooling=family.pooling if known is None or family.pooling is not known.pooling else _nothing,
        patch_embedding=None if embedding is None else embedding.removeprefix(prefix),
        classes=(family.backbone[0],),
        backbone=None,
    )


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, Sequence) else (size, size)
    return int(height), int(width)


def _config_grid(frames: int, image: Any, tubelet: Sequence[int], **options: Any) -> TokenGrid:
    t, h, w = tubelet
    height, width = _pair(image)
    return TokenGrid(frames // t, height // h, width // w, tubelet=(t, h, w), **options)


def _videomae_grid(model: Any) -> TokenGrid:
    c = model.config
    return _config_grid(c.num_frames, c.image_size, (c.tubelet_size, *_pair(c.patch_size)))


def _timesformer_grid(model: Any) -> TokenGrid:
    c = model.config
    # Patches are the outer axis and frames the inner axis: TimesformerEmbeddings permutes (T, P) to (P, T).
    # Joint attention has the same class token and order. With attention_type="space_only" the model never mixes frames.
    return _config_grid(c.num_frames, c.image_size, (1, *_pair(c.patch_size)), prefix=1, order="hwt")


def _timesformer_attention(model: Any) -> list[AttentionLayer]:
    base, kind = "timesformer.encoder.layer", model.config.attention_type
    if kind == "space_only":
        raise ValueError(
            "attention_type of a TimeSformer must be 'divided_space_time' or 'joint_space_time', got 'space_only'. "
            "Such a model does not mix frames, so it has no space-time attention. Load another model."
        )
    sites: list[AttentionLayer] = []
    for i in range(model.config.num_hidden_layers):
        if kind == "divided_space_time":
            sites.append(AttentionLayer(f"{base}.{i}.temporal_attention.attention", i, "temporal", "softmax"))
        role: Literal["spatial", "joint"] = "spatial" if kind == "divided_space_time" else "joint"
        sites.append(AttentionLayer(f"{base}.{i}.attention.attention", i, role, "softmax"))
    return sites


def _timesformer_rows(model: Any, layer: AttentionLayer, grid: TokenGrid) -> TokenRows | None:
    """Return the rows for clips of another number of frames than that of the config.

    The layers reshape the sequence with the number of the config, so tokens of several frames count as one frame.
    """
    frames = model.config.num_frames
    if layer.role == "joint" or grid.t == frames:
        return None
    tracks = torch.arange(1, grid.num_tokens).view(-1, frames)
    if layer.role == "spatial":
        tracks = torch.cat([torch.zeros(frames, 1, dtype=torch.long), tracks.T], 1)
    return TokenRows(tracks, tracks, grid.num_tokens)


def _vivit_grid(model: Any) -> TokenGrid:
    c = model.config
    return _config_grid(c.num_frames, c.image_size, c.tubelet_size, prefix=1)


def _vjepa2_grid(model: Any) -> TokenGrid:
    c = model.config
    return _config_grid(c.frames_per_clip, c.crop_size, (c.tubelet_size, c.patch_size, c.patch_size))


def _vjepa2_attention(model: Any) -> list[AttentionLayer]:
    c = model.config
    layers = [f"vjepa2.encoder.layer.{i}.attention" for i in range(c.num_hidden_layers)]
    layers += [f"pooler.self_attention_layers.{i}.self_attn" for i in range(c.num_pooler_layers)]
    sites = [AttentionLayer(name, i, "joint", "hf") for i, name in enumerate(layers)]
    return [*sites, AttentionLayer("pooler.cross_attention_layer.cross_attn", len(sites), "pool", "hf")]


def _videoprism_grid(model: Any) -> TokenGrid:
    c = model.config
    return _config_grid(c.num_frames, c.image_size, c.tubelet_size)


def _videoprism_attention(model: Any) -> list[AttentionLayer]:
    c = model.config
    sites = [
        AttentionLayer(f"vision_model.spatial_layers.{i}.attention", i, "spatial", "hf")
        for i in range(c.num_spatial_layers)
    ]
    sites += [
        AttentionLayer(f"vision_model.temporal_layers.{i}.attention", len(sites) + i, "temporal", "hf")
        for i in range(c.num_temporal_layers)
    ]
    return [*sites, AttentionLayer("head", len(sites), "pool", "hf")]


def _layers(pattern: str) -> Callable[[Any], list[AttentionLayer]]:
    """Return a function that lists one joint attention layer per block, with the backend ``"hf"``."""
    return lambda model: [
        AttentionLayer(pattern.format(i), i, "joint", "hf") for i in range(model.config.num_hidden_layers)
    ]


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="videomae",
            grid=_videomae_grid,
            attention=_layers("videomae.encoder.layer.{}.attention.attention"),
            # without mean pooling the head reads the first patch token, because there is no class token
            pooling=lambda model: "mean" if model.config.use_mean_pooling else "cls",
            input_name="pixel_values",
            num_frames=lambda model: model.config.num_frames,
            image_size=lambda model: _pair(model.config.image_size),
            classes=("VideoMAEForVideoClassification",),
            patch_embedding="videomae.embeddings.patch_embeddings.projection",
            backbone=("VideoMAEModel", "videomae"),
        ),
        Family(
            name="timesformer",
            grid=_timesformer_grid,
            attention=_timesformer_attention,
            pooling=lambda model: "cls",
            input_name="pixel_values",
            num_frames=lambda model: model.config.num_frames,
            image_size=lambda model: _pair(model.config.image_size),
            classes=("TimesformerForVideoClassification",),
            patch_embedding="timesformer.embeddings.patch_embeddings.projection",
            backbone=("TimesformerModel", "timesformer"),
            rows=_timesformer_rows,
        ),
        Family(
            name="vivit",
            grid=_vivit_grid,
            attention=_layers("vivit.layers.{}.attention"),
            pooling=lambda model: "cls",
            input_name="pixel_values",
            num_frames=lambda model: model.config.num_frames,
            image_size=lambda model: _pair(model.config.image_size),
            classes=("VivitForVideoClassification",),
            patch_embedding="vivit.embeddings.patch_embeddings.projection",
            backbone=("VivitModel", "vivit"),
        ),
        Family(
            name="vjepa2",
            grid=_vjepa2_grid,
            attention=_vjepa2_attention,
            pooling=lambda model: "pool",
            input_name="pixel_values_videos",
            num_frames=lambda model: model.config.frames_per_clip,
            image_size=lambda model: _pair(model.config.crop_size),
            classes=("VJEPA2ForVideoClassification",),
            patch_embedding="vjepa2.encoder.embeddings.patch_embeddings.proj",
            backbone=("VJEPA2Model", "vjepa2"),
        ),
        Family(
            name="videoprism",
            grid=_videoprism_grid,
            attention=_videoprism_attention,
            pooling=lambda model: "pool",
            input_name="pixel_values_videos",
            num_frames=lambda model: model.config.num_frames,
            image_size=lambda model: _pair(model.config.image_size),
            classes=("VideoPrismForVideoClassification",),
            patch_embedding="vision_model.spatial_embeddings.patch_embeddings.projection",
            backbone=("VideoPrismVisionModel", "vision_model"),
        ),
    )
}
