"""Where a model computes attention: the one word shared by the models that declare it and the code that reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["joint", "spatial", "temporal", "pool"]
Door = Literal["interface", "dropout", "call"]


@dataclass(frozen=True)
class AttentionSite:
    """One place in a model where attention is computed.

    Example:
        >>> AttentionSite("blocks.3.attn", block=3)
        AttentionSite(module='blocks.3.attn', block=3, role='joint', door='call')

    Args:
        module: dotted name of the module in whose forward the attention is computed.
        block: index of the residual block it belongs to. Two sites of one block (divided space-time attention)
            are read as one operator, in the order in which they run.
        role: what attends to what. ``"joint"``: every token to every token; ``"spatial"``: within a frame,
            frames in the batch axis; ``"temporal"``: within a patch position, positions in the batch axis;
            ``"pool"``: one learnt query to every token.
        door: how it is reached. ``"call"``: the module calls ``F.scaled_dot_product_attention`` or is an
            ``nn.MultiheadAttention``; ``"interface"``: the module asks transformers' ``AttentionInterface``;
            ``"dropout"``: ``module`` is the dropout layer that the attention probabilities pass through.
    """

    module: str
    block: int
    role: Role = "joint"
    door: Door = "call"
