"""The three ways in which models compute attention, and how each is read: one context manager per way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from copy import copy
from threading import Lock
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_staa.attention import tiles
from captum_staa.attention.session import ACTIVE, AttentionCall, Session
from captum_staa.sites import AttentionSite

# --- door "dropout": the model computes the probabilities itself and sends them through a dropout layer -------------


@contextmanager
def _dropout_door(module: nn.Module, site: AttentionSite, session: Session) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if session.active:
            session.take(AttentionCall(site, None, ready=args[0]))

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# --- door "interface": transformers' AttentionInterface ---------------------------------------------------------

_INTERFACE = "captum_staa"
_routes: dict[nn.Module, tuple[Any, int]] = {}  # module -> (its own config, captures that route it)
_routes_lock = Lock()


@contextmanager
def _interface_door(module: nn.Module, site: AttentionSite, session: Session) -> Iterator[None]:
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
        operands = _operands(query, key, value, mask, causal, options.get("scaling"), options.get("softcap"))
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


# --- door "call": any module that calls F.scaled_dot_product_attention, or nn.MultiheadAttention ----------------


@contextmanager
def _call_door(module: nn.Module, site: AttentionSite, session: Session) -> Iterator[None]:
    """Remember, while ``module`` runs, that the attention computed now is its own."""

    def enter(module: nn.Module, args: Any) -> None:
        if session.active:
            _SITE.set(site)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if session.active:
            _SITE.set(None)

    handles = module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        _SITE.set(None)
        for handle in handles:
            handle.remove()


_SITE: ContextVar[AttentionSite | None] = ContextVar("captum_staa_site", default=None)


class CallMode(TorchFunctionMode):
    """Sees every torch function of this thread; steps in at the two that compute attention, inside a site."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        site = _SITE.get()
        if site is not None and self.session.active:
            if func is F.scaled_dot_product_attention:
                return self._attend(site, *args, **kwargs)[0]
            if func is F.multi_head_attention_forward:
                return self._multi_head(site, func, args, kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        site: AttentionSite,
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
        operands = _operands(query, key, value, attn_mask, is_causal, scale)
        call = AttentionCall(site, operands, dropout=dropout_p)
        self.session.take(call)
        if call.output is not None:
            return call.output.view(*query.shape[:-1], value.shape[-1]), operands
        options = {"enable_gqa": True} if enable_gqa else {}
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options
        )
        return output, operands

    def _multi_head(self, site: AttentionSite, func: Any, args: Any, kwargs: Any) -> Any:
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


def _operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    softcap: float | None = None,
) -> tiles.Operands:
    """Any operands that F.scaled_dot_product_attention takes, brought to ``(B, heads, N, d)``."""
    if query.ndim < 3:
        raise ValueError(f"queries must be (B, N, d) or (..., heads, N, d), but their shape is {tuple(query.shape)}")
    if causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if query.ndim == 3:  # a single head
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        mask = mask.unsqueeze(1) if mask is not None and mask.ndim == 3 else mask
    lead = query.shape[:-3]
    if mask is not None and mask.ndim > 4:
        mask = mask.expand(*lead, *mask.shape[-3:]).flatten(0, -4)
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:  # heads share keys and values
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    return tiles.Operands(query, key, value, query.shape[-1] ** -0.5 if scale is None else float(scale), mask, softcap)


DOORS: dict[str, Callable[[nn.Module, AttentionSite, Session], AbstractContextManager[None]]] = {
    "dropout": _dropout_door,
    "interface": _interface_door,
    "call": _call_door,
}
