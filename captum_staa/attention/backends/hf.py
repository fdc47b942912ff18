"""Backend for models of transformers, whose attention is dispatched by ``AttentionInterface``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from threading import Lock
from typing import Any

from torch import Tensor, nn

from captum_staa.attention.capture_state import ACTIVE, AttentionCall, CaptureState
from captum_staa.attention.tiles import operands_of
from captum_staa.models.families import AttentionLayer

_INTERFACE = "captum_staa"
_routes: dict[nn.Module, tuple[Any, int]] = {}  # module -> (its original config, number of active captures)
_routes_lock = Lock()


@contextmanager
def hf_backend(module: nn.Module, layer: AttentionLayer, state: CaptureState) -> Iterator[None]:
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
