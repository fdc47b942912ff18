"""Read attention while a forward runs, where it is computed, and leave nothing behind.

    >>> import torch
    >>> from captum_staa import VideoClassifier
    >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    >>> sites = clf.family.attention(clf.module)
    >>> with torch.no_grad(), capture(clf.module, sites[-1:], lambda call: call.column_means()) as read:
    ...     logits = clf(torch.zeros(1, 16, 3, 48, 48))
    >>> read[sites[-1]].shape  # one attention weight per token
    torch.Size([1, 288])
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from copy import copy
from threading import Lock
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_staa.attention import tiles
from captum_staa.sites import AttentionSite

T = TypeVar("T")


class AttentionCall:
    """One attention on its way: ask for what you need of it, and the model's output comes with it.

    Attributes:
        site: where it happens.
        output: ``(B, heads, Q, dv)``, set where reading computed the attention's output too.
    """

    def __init__(self, site: AttentionSite, operands: tiles.Operands | None, ready: Tensor | None = None) -> None:
        self.site = site
        self.output: Tensor | None = None
        self._operands = operands
        self._ready = ready

    def row(self, index: int = 0) -> Tensor:
        """``(B, N)``: what one query attends to, averaged over heads."""
        if self._ready is not None:
            return self._ready[:, :, index].float().mean(1)
        return self._known.row(index)

    def column_means(self) -> Tensor:
        """``(B, N)``: how much all queries together attend to each token, averaged over queries and heads."""
        if self._ready is not None:
            return self._ready.float().mean((1, 2))
        self.output, columns = tiles.attend_and_average_rows(self._known)
        return columns

    def head_mean(self) -> Tensor:
        """``(B, Q, N)``: the attention matrix averaged over heads; no part of a graph."""
        if self._ready is not None:
            return self._ready.detach().float().mean(1)
        if torch.is_grad_enabled():  # tiles keep no graph, so the model computes its output itself
            return tiles.average_heads(self._known)
        self.output, matrix = tiles.attend_and_average_heads(self._known)
        return matrix

    def probabilities(self) -> Tensor:
        """``(B, heads, Q, N)``: the whole attention, part of the graph that leads to the model's output."""
        if self._ready is None:
            self._ready = self._known.probabilities()
            self.output = self._ready @ self._known.value
        return self._ready

    @property
    def _known(self) -> tiles.Operands:
        assert self._operands is not None
        return self._operands


class _Enough(BaseException):
    """Ends a forward from which all has been read. No Exception: a model's own ``except`` must not catch it."""


class _Session:
    def __init__(self, read: Callable[[AttentionCall], Any], last: AttentionSite | None) -> None:
        self.readings: dict[AttentionSite, Any] = {}
        self.sites: dict[nn.Module, AttentionSite] = {}
        self.read, self.last = read, last
        self.enough = _Enough()

    @property
    def active(self) -> bool:
        """Whether this thread is inside this capture, and not inside another one within it."""
        return _ACTIVE.get() is self

    def take(self, call: AttentionCall) -> None:
        if call.site in self.readings:
            raise ValueError(
                f"{call.site.module!r} computes attention more than once in a forward; declare the module inside it "
                f"that computes it once as the AttentionSite"
            )
        self.readings[call.site] = self.read(call)
        if call.site == self.last:
            raise self.enough


_ACTIVE: ContextVar[_Session | None] = ContextVar("captum_staa_capture", default=None)


@contextmanager
def capture(
    model: nn.Module,
    sites: Sequence[AttentionSite],
    read: Callable[[AttentionCall], T],
    *,
    stop: bool = False,
) -> Iterator[dict[AttentionSite, T]]:
    """While the block runs, every forward's attention at ``sites`` is handed to ``read``.

    Other threads that run the same model meanwhile, and captures inside this one, do not mix with it; afterwards,
    and after an exception, the model is what it was.

    Args:
        model: the model that the sites are declared for; the block calls its forward once, itself or through a wrapper.
        sites: where to read, in the order in which the model reaches them.
        read: called with each :class:`AttentionCall`; what it returns is kept.
        stop: end the forward as soon as the last site has been read. The block's own code after the call is not
            run then: nothing in it should be needed.

    Yields:
        What was read, by site; complete when the block ends.

    Raises:
        ValueError: a site's module is not there, or the forward ended without computing attention at a site.
    """
    if not sites:
        raise ValueError("no attention site to read: pass at least one AttentionSite")
    session = _Session(read, sites[-1] if stop else None)
    with ExitStack() as stack:
        for site in sites:
            module = _submodule(model, site.module)
            session.sites[module] = site
            stack.enter_context(_DOORS[site.door](module, site, session))
        token = _ACTIVE.set(session)
        stack.callback(_ACTIVE.reset, token)
        if any(site.door == "call" for site in sites):
            stack.enter_context(_CallMode(session))
        # fused kernels and compiled graphs would run past the doors
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield session.readings
        except _Enough as enough:
            if enough is not session.enough:
                raise
    missing = [site.module for site in sites if site not in session.readings]
    if missing:
        raise ValueError(
            f"the forward computed no attention at {missing}; a site with door='call' must call "
            f"F.scaled_dot_product_attention or be an nn.MultiheadAttention, and the model must run in this thread"
        )


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{type(model).__name__} has no module {name!r}; name one of model.named_modules() in AttentionSite"
        ) from None


# --- door "dropout": the model computes the probabilities itself and sends them through a dropout layer -------------


@contextmanager
def _dropout_door(module: nn.Module, site: AttentionSite, session: _Session) -> Iterator[None]:
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
def _interface_door(module: nn.Module, site: AttentionSite, session: _Session) -> Iterator[None]:
    """Route one module's attention to :func:`_attend` by lending it a copy of its config."""
    _register_interface()
    with _routes_lock:
        config, captures = _routes.get(module, (module.config, 0))
        if not captures:
            lent: Any = copy(config)
            lent._attn_implementation_internal = _INTERFACE
            module.config = lent
        _routes[module] = (config, captures + 1)
    try:
        yield
    finally:
        with _routes_lock:
            config, captures = _routes.pop(module)
            if captures > 1:
                _routes[module] = (config, captures - 1)
            else:
                module.config = config


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
    session = _ACTIVE.get()
    site = None if session is None else session.sites.get(module)
    if session is not None and site is not None:
        scale = options.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        operands = tiles.Operands(query, key, value, scale, attention_mask, options.get("softcap"))
        call = AttentionCall(site, operands)
        session.take(call)
        if call.output is not None:
            return call.output.transpose(1, 2).contiguous(), None
    return _own_attention(module)(module, query, key, value, attention_mask, **options)


def _own_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config, _ = _routes.get(module, (module.config, 0))
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation, eager)  # type: ignore[no-any-return]


# --- door "call": any module that calls F.scaled_dot_product_attention, or nn.MultiheadAttention ----------------


@contextmanager
def _call_door(module: nn.Module, site: AttentionSite, session: _Session) -> Iterator[None]:
    """Remember, while ``module`` runs, that the attention computed now is its own."""

    def enter(module: nn.Module, args: Any) -> None:
        if session.active:
            _SITE.set(site)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if session.active:
            _SITE.set(None)

    handles = module.register_forward_pre_hook(enter), module.register_forward_hook(leave)
    try:
        yield
    finally:
        _SITE.set(None)
        for handle in handles:
            handle.remove()


_SITE: ContextVar[AttentionSite | None] = ContextVar("captum_staa_site", default=None)


class _CallMode(TorchFunctionMode):
    """Sees every torch function of this thread; steps in at the two that compute attention, inside a site."""

    def __init__(self, session: _Session) -> None:
        super().__init__()
        self.session = session

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        site = _SITE.get()
        if site is not None and self.session.active:
            if func is F.scaled_dot_product_attention:
                return self._scaled_dot_product(site, func, *args, **kwargs)
            if func is F.multi_head_attention_forward:
                return self._multi_head(site, func, args, kwargs)
        return func(*args, **kwargs)

    def _scaled_dot_product(
        self,
        site: AttentionSite,
        func: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        bias = attn_mask
        if is_causal:
            bias = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        known_key, known_value = key, value
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            known_key, known_value = (x.repeat_interleave(repeats, -3) for x in (key, value))
        used_scale = query.shape[-1] ** -0.5 if scale is None else scale
        call = AttentionCall(site, tiles.Operands(query, known_key, known_value, used_scale, bias))
        self.session.take(call)
        if call.output is not None:
            return call.output
        options = {"enable_gqa": True} if enable_gqa else {}
        return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)  # type: ignore[no-any-return]

    def _multi_head(self, site: AttentionSite, func: Any, args: Any, kwargs: Any) -> Any:
        """nn.MultiheadAttention returns its own weights on request: no second implementation of it is needed."""
        asked = kwargs.get("need_weights", True), kwargs.get("average_attn_weights", True)
        output, weights = func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
        ready = weights if weights.ndim == 4 else weights[None]
        self.session.take(AttentionCall(site, None, ready=ready))
        if not asked[0]:
            return output, None
        return output, weights.mean(-3) if asked[1] else weights


_DOORS: dict[str, Callable[[nn.Module, AttentionSite, _Session], AbstractContextManager[None]]] = {
    "dropout": _dropout_door,
    "interface": _interface_door,
    "call": _call_door,
}
