"""Backend for modules that call ``F.scaled_dot_product_attention``, and for ``nn.MultiheadAttention``."""

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
def sdpa_backend(module: nn.Module, layer: AttentionLayer, state: CaptureState) -> Iterator[None]:
    """Mark ``layer`` as the current one while ``module`` runs."""

    def enter(module: nn.Module, args: Any) -> None:
        if state.active:
            _LAYER.set(layer)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if state.active:
            _LAYER.set(None)

    handles = module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        _LAYER.set(None)
        for handle in handles:
            handle.remove()


_LAYER: ContextVar[AttentionLayer | None] = ContextVar("captum_staa_layer", default=None)


class CallMode(TorchFunctionMode):
    """Function mode that intercepts the two attention functions of torch while a captured layer runs."""

    def __init__(self, state: CaptureState) -> None:
        super().__init__()
        self.state = state

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        layer = _LAYER.get()
        if layer is not None and self.state.active:
            if func is F.scaled_dot_product_attention:
                return self._attend(layer, *args, **kwargs)[0]
            if func is F.multi_head_attention_forward:
                return self._multi_head(layer, func, args, kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> tuple[Tensor, tiles.Operands]:
        """Read one call of ``F.scaled_dot_product_attention``; return its output and its operands."""
        operands = operands_of(query, key, value, attn_mask, is_causal, scale)
        call = AttentionCall(layer, operands, dropout=dropout_p)
        self.state.take(call)
        if call.output is not None:
            return call.output.view(*query.shape[:-1], value.shape[-1]), operands
        options = {"enable_gqa": True} if enable_gqa else {}
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options
        )
        return output, operands

    def _multi_head(self, layer: AttentionLayer, func: Any, args: Any, kwargs: Any) -> Any:
        """Run torch's own code of nn.MultiheadAttention and read the attention inside it.

        With ``need_weights=True``, torch returns a view of the weights from which its output is not computed, so this
        view has no gradient. The code therefore runs with ``need_weights=False``, and weights that the model needs are
        computed separately.
        """
        seen: list[tiles.Operands] = []

        def attend(*inner: Any, **options: Any) -> Tensor:
            output, operands = self._attend(layer, *inner, **options)
            seen.append(operands)
            return output

        # An outer mode, of a capture around this one, must not intercept the call and run the original function.
        replaced = {"scaled_dot_product_attention": attend, "has_torch_function": lambda operands: False}
        names = {**func.__globals__, **replaced}
        run = FunctionType(func.__code__, names, func.__name__, func.__defaults__)
        output, _ = run(*args, **{**kwargs, "need_weights": False})
        if not kwargs.get("need_weights", True):
            return output, None
        weights = seen[0].probabilities()  # (B, heads, Q, N)
        weights = weights.mean(1) if kwargs.get("average_attn_weights", True) else weights
        return output, weights if output.ndim == 3 else weights[0]
