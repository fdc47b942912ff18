"""Backends of ``capture``: one context manager for each way in which models compute attention.

- ``"softmax"``: models that compute attention probabilities themselves and apply a dropout layer to them.
- ``"hf"``: models of transformers, whose attention is dispatched by ``AttentionInterface``.
- ``"sdpa"``: modules that call ``F.scaled_dot_product_attention``, and ``nn.MultiheadAttention``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from copy import copy
from threading import Lock
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_staa.attention.capture_state import ACTIVE, AttentionCall, CaptureState
from captum_staa.attention.tiles import Operands, operands_of
from captum_staa.models.families import AttentionLayer

_INTERFACE = "captum_staa"
_routes: dict[nn.Module, tuple[Any, int]] = {}  # module -> (its original config, number of active captures)
_routes_lock = Lock()
_LAYER: ContextVar[AttentionLayer | None] = ContextVar("captum_staa_layer", default=None)


# --- softmax --------------------------------------------------------------------------------------------------------


@contextmanager
def _softmax_backend(module: nn.Module, layer: AttentionLayer, state: CaptureState) -> Iterator[None]:
    """Read the probabilities that arrive at the dropout layer ``module``."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if state.active:
            state.take(AttentionCall(layer, None, ready=args[0]))

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# --- hf -------------------------------------------------------------------------------------------------------------


@contextmanager
def _hf_backend(module: nn.Module, layer: AttentionLayer, state: CaptureState) -> Iterator[None]:
    """Route the attention of one module to :func:`_attend` by a temporary copy of its config."""
    _register_interface()
    with _routes_lock:
        config, captures = _routes.get(module, (module.config, 0))
        _routes[module] = (config, captures + 1)
        if not captures:
            routed: Any = copy(config)
            routed._attn_implementation_internal = _INTERFACE
            module.config = routed
    try:
        yield
    finally:
        with _routes_lock:
            config, captures = _routes[module]
            if captures > 1:
                _routes[module] = (config, captures - 1)
            else:  # in this order, because a forward in another thread may read both at any moment
                module.config = config
                del _routes[module]


def _register_interface() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    if _INTERFACE not in AttentionInterface._global_mapping:
        AttentionInterface.register(_INTERFACE, _attend)
        # Without a mask function of the same name, a model would silently drop its attention mask.
        AttentionMaskInterface.register(_INTERFACE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention function for transformers: read captured layers of this thread, and run the original attention."""
    state = ACTIVE.get()
    layer = None if state is None else state.layers.get(module)
    if state is not None and layer is not None:
        mask = attention_mask
        if mask is not None and mask.ndim == 2:  # (B, N), the form of flash attention
            mask = mask[:, None, None].bool()
        causal = _is_causal(module, query, mask, options.get("is_causal"))
        operands = operands_of(query, key, value, mask, causal, options.get("scaling"), options.get("softcap"))
        call = AttentionCall(layer, operands, dropout=float(options.get("dropout") or 0))
        state.take(call)
        if call.output is not None:
            return call.output.transpose(1, 2).contiguous(), None
    return _original_attention(module)(module, query, key, value, attention_mask, **options)


def _is_causal(module: nn.Module, query: Tensor, mask: Tensor | None, is_causal: bool | None) -> bool:
    """Rule of transformers: fused kernels use this flag if there is no mask, and eager code never uses it."""
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return bool(is_causal) and mask is None and query.shape[2] > 1 and _config(module)._attn_implementation != "eager"


def _original_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get(_config(module)._attn_implementation, eager)


def _config(module: nn.Module) -> Any:
    """Return the original config of the module, also while a copy replaces it."""
    return _routes.get(module, (module.config, 0))[0]


# --- sdpa -----------------------------------------------------------------------------------------------------------


@contextmanager
def _sdpa_backend(module: nn.Module, layer: AttentionLayer, state: CaptureState) -> Iterator[None]:
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
    ) -> tuple[Tensor, Operands]:
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
        seen: list[Operands] = []

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


BACKENDS: dict[str, Callable[[nn.Module, AttentionLayer, CaptureState], AbstractContextManager[None]]] = {
    "softmax": _softmax_backend,
    "hf": _hf_backend,
    "sdpa": _sdpa_backend,
}
