"""Modules that call ``F.scaled_dot_product_attention``, and ``nn.MultiheadAttention``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_staa.attention import tiles
from captum_staa.attention.capture_state import AttentionCall, CaptureState
from captum_staa.attention.tiles import operands_of
from captum_staa.models.families import AttentionLayer


@contextmanager
def sdpa_backend(module: nn.Module, site: AttentionLayer, session: CaptureState) -> Iterator[None]:
    """Remember, while ``module`` runs, that the attention computed now is its own."""

    def enter(module: nn.Module, args: Any) -> None:
        if session.active:
            _LAYER.set(site)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if session.active:
            _LAYER.set(None)

    handles = module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        _LAYER.set(None)
        for handle in handles:
            handle.remove()


_LAYER: ContextVar[AttentionLayer | None] = ContextVar("captum_staa_site", default=None)


class CallMode(TorchFunctionMode):
    """Sees every torch function of this thread; steps in at the two that compute attention, inside a site."""

    def __init__(self, session: CaptureState) -> None:
        super().__init__()
        self.session = session

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        site = _LAYER.get()
        if site is not None and self.session.active:
            if func is F.scaled_dot_product_attention:
                return self._attend(site, *args, **kwargs)[0]
            if func is F.multi_head_attention_forward:
                return self._multi_head(site, func, args, kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        site: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> tuple[Tensor, tiles.Operands]:
        """``F.scaled_dot_product_attention``, read on its way."""
        operands = operands_of(query, key, value, attn_mask, is_causal, scale)
        call = AttentionCall(site, operands, dropout=dropout_p)
        self.session.take(call)
        if call.output is not None:
            return call.output.view(*query.shape[:-1], value.shape[-1]), operands
        options = {"enable_gqa": True} if enable_gqa else {}
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options
        )
        return output, operands

    def _multi_head(self, site: AttentionLayer, func: Any, args: Any, kwargs: Any) -> Any:
        """Run torch's own code of nn.MultiheadAttention, with the attention inside it read like any other.

        Asked for its weights, that code would hand out a view of them that is no part of the way to its output, and
        has no gradient. So it is never asked, and weights that the model wants are computed beside it.
        """
        seen: list[tiles.Operands] = []

        def attend(*inner: Any, **options: Any) -> Tensor:
            output, operands = self._attend(site, *inner, **options)
            seen.append(operands)
            return output

        # a mode further out, that of a capture around this one, must not catch the call and run the original
        inside = {"scaled_dot_product_attention": attend, "has_torch_function": lambda operands: False}
        names = {**func.__globals__, **inside}
        own = FunctionType(func.__code__, names, func.__name__, func.__defaults__)
        output, _ = own(*args, **{**kwargs, "need_weights": False})
        if not kwargs.get("need_weights", True):
            return output, None
        weights = seen[0].probabilities()  # (B, heads, Q, N)
        weights = weights.mean(1) if kwargs.get("average_attn_weights", True) else weights
        return output, weights if output.ndim == 3 else weights[0]
