"""Models of transformers, whose attention goes through its ``AttentionInterface``."""

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
_routes: dict[nn.Module, tuple[Any, int]] = {}  # module -> (its own config, captures that route it)
_routes_lock = Lock()


@contextmanager
def hf_backend(module: nn.Module, site: AttentionLayer, session: CaptureState) -> Iterator[None]:
    """Route one module's attention to :func:`_attend` by lending it a copy of its config."""
    _register_interface()
    with _routes_lock:
        config, captures = _routes.get(module, (module.config, 0))
        _routes[module] = (config, captures + 1)
        if not captures:
            lent: Any = copy(config)
            lent._attn_implementation_internal = _INTERFACE
            module.config = lent
    try:
        yield
    finally:
        with _routes_lock:
            config, captures = _routes[module]
            if captures > 1:
                _routes[module] = (config, captures - 1)
            else:  # in this order: a forward in another thread finds its way at any moment
                module.config = config
                del _routes[module]


def _register_interface() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    if _INTERFACE not in AttentionInterface._global_mapping:
        AttentionInterface.register(_INTERFACE, _attend)
        # without a mask function of the same name a model would drop its attention mask in silence
        AttentionMaskInterface.register(_INTERFACE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: reads where a capture of this thread asks for it, else the module's own attention."""
    session = ACTIVE.get()
    site = None if session is None else session.sites.get(module)
    if session is not None and site is not None:
        mask = attention_mask
        if mask is not None and mask.ndim == 2:  # (B, N), what flash attention is handed
            mask = mask[:, None, None].bool()
        causal = _is_causal(module, query, mask, options.get("is_causal"))
        operands = operands_of(query, key, value, mask, causal, options.get("scaling"), options.get("softcap"))
        call = AttentionCall(site, operands, dropout=float(options.get("dropout") or 0))
        session.take(call)
        if call.output is not None:
            return call.output.transpose(1, 2).contiguous(), None
    return _own_attention(module)(module, query, key, value, attention_mask, **options)


def _is_causal(module: nn.Module, query: Tensor, mask: Tensor | None, asked: bool | None) -> bool:
    """transformers' own rule: without a mask its fused kernels look at this flag, and its eager code never does."""
    asked = getattr(module, "is_causal", True) if asked is None else asked
    return bool(asked) and mask is None and query.shape[2] > 1 and _config(module)._attn_implementation != "eager"


def _own_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get(_config(module)._attn_implementation, eager)


def _config(module: nn.Module) -> Any:
    """The module's own config, also while another one is lent to it."""
    return _routes.get(module, (module.config, 0))[0]
