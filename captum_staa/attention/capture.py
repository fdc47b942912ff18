"""Read attention where it is computed during a forward pass, and restore the model afterwards.

Example:
    >>> import torch
    >>> from captum_staa import VideoClassifier
    >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    >>> layers = clf.family.attention(clf.module)
    >>> with torch.no_grad(), capture(clf.module, layers[-1:], lambda call: call.column_means()) as read:
    ...     logits = clf(torch.zeros(1, 16, 3, 48, 48))
    >>> read[layers[-1]].shape  # one attention weight per token
    torch.Size([1, 288])

``BACKENDS`` has one context manager for each way in which models compute attention:

- ``"hf"``: models of transformers, whose attention is dispatched by ``AttentionInterface``.
- ``"sdpa"``: modules that call ``F.scaled_dot_product_attention`` or ``flex_attention``.
- ``"mha"``: ``nn.MultiheadAttention``, and modules that call ``F.multi_head_attention_forward``.
- ``"softmax"``: modules that compute attention probabilities themselves, with any function for softmax; or the dropout
  layer that gets the probabilities.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from copy import copy
from threading import Lock
from types import FunctionType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_staa._utils.flex_attention import FLEX_ATTENTION, written_out
from captum_staa._utils.model_state import without_checkpointing, without_compiling
from captum_staa._utils.tensors import without_autocast
from captum_staa.attention import tiles
from captum_staa.attention.tiles import Operands, operands_of
from captum_staa.models.attention_watch import KIND_OF, softmax_axis
from captum_staa.models.families import AttentionLayer

# --- what a reader gets -----------------------------------------------------------------------------------------------


class AttentionCall:
    """One attention computation of a forward. Each method computes one quantity of the attention matrix.

    Attributes:
        layer: the attention layer.
        output: ``(B, heads, Q, dv)``, the output of the attention, if the method has computed it as well. Otherwise
            None.
        final: whether the forward ends after this reading.
    """

    def __init__(
        self,
        layer: AttentionLayer,
        operands: tiles.Operands | None,
        ready: Tensor | None = None,
        dropout: float = 0.0,
    ) -> None:
        self.layer = layer
        self.output: Tensor | None = None
        self._operands = operands
        self._ready = ready
        self._dropout = dropout
        self.final = False  # if the forward ends here, the output is not needed

    def row(self, index: int = 0) -> Tensor:
        """Return the attention of one query, averaged over heads, ``(B, N)``, detached."""
        if self._ready is not None:
            return self._ready.detach()[:, :, index].float().mean(1)
        with torch.no_grad():
            return self._checked_operands.row(index)

    def rows(self, rows: slice) -> Tensor:
        """Return the attention of some queries, averaged over heads, ``(B, R, N)``, detached."""
        if self._ready is not None:
            return self._ready.detach()[:, :, rows].float().mean(1)
        with torch.no_grad():
            return self._checked_operands.probabilities(rows).float().mean(1)

    def column_means(self) -> Tensor:
        """Return the mean attention that each token receives from all queries and heads, ``(B, N)``, detached."""
        if self._ready is not None:
            return self._ready.detach().float().mean((1, 2))
        return self._weighted_rows(None)

    def pulled(self, weights: Tensor) -> Tensor:
        """Return ``weights`` ``(B, Q)`` times the head-mean matrix, ``(B, N)``, detached.

        If few queries have a weight, only their rows are computed.
        """
        used = weights.any(0).nonzero()[:, 0]
        few = 4 * len(used) <= weights.shape[1]
        if not few and self._ready is None:
            return self._weighted_rows(weights)
        with torch.no_grad():
            if self._ready is not None:
                rows = self._ready.detach()[:, :, used] if few else self._ready.detach()
            else:
                rows = self._checked_operands.probabilities(used)
            weights = (weights[:, used] if few else weights)[:, None, None].float()  # (B, 1, 1, used)
            with without_autocast(rows):
                return (weights @ rows.float())[:, :, 0].mean(1)

    def _weighted_rows(self, weights: Tensor | None) -> Tensor:
        if self._separate:
            return tiles.average_rows(self._checked_operands, weights)
        self.output, columns = tiles.attend_and_average_rows(self._checked_operands, weights)
        return columns

    def head_mean(self) -> Tensor:
        """Return the attention matrix averaged over heads, ``(B, Q, N)``, detached."""
        if self._ready is not None:
            return self._ready.detach().float().mean(1)
        if self._separate:
            return tiles.average_heads(self._checked_operands)
        self.output, matrix = tiles.attend_and_average_heads(self._checked_operands)
        return matrix

    def carry(self, columns: Tensor) -> Tensor:
        """Return the head-mean matrix times ``columns`` ``(B, N, c)``, without forming it: ``(B, Q, c)``, detached."""
        if self._ready is not None:
            with without_autocast(columns):
                return self._ready.detach().float().mean(1) @ columns
        with torch.no_grad():
            output, carried = tiles.attend_and_carry(self._checked_operands, columns)
        if not self._separate:
            self.output = output
        return carried

    def probabilities(self) -> Tensor:
        """Return the attention probabilities ``(B, heads, Q, N)``, as a part of the model's autograd graph."""
        if self._ready is None:
            self._ready = self._checked_operands.probabilities()
            self.output = F.dropout(self._ready, self._dropout) @ self._checked_operands.value
        return self._ready

    @property
    def _separate(self) -> bool:
        """Whether the model must compute its output itself: tiles do not keep a graph and do not apply dropout."""
        return self.final or torch.is_grad_enabled() or self._dropout > 0

    @property
    def _checked_operands(self) -> tiles.Operands:
        assert self._operands is not None
        return self._operands


class StopForward(BaseException):
    """Raised to end a forward after the last reading. A BaseException, so that ``except Exception`` cannot catch it."""

    def __init__(self, state: CaptureState) -> None:
        super().__init__("all layers of the capture have been read")
        self.state = state


class CaptureState:
    """The layers, the reader and the readings of one ``capture``."""

    def __init__(self, read: Callable[[AttentionCall], Any], last: AttentionLayer | None) -> None:
        self.readings: dict[AttentionLayer, Any] = {}
        self.layers: dict[nn.Module, list[AttentionLayer]] = {}
        self.seen: dict[nn.Module, set[str]] = {}  # backends of the attention that a captured module computed
        self.read, self.last = read, last
        self._calls: Counter[AttentionLayer] = Counter()

    @property
    def active(self) -> bool:
        """Whether this capture is the innermost one of this thread."""
        return ACTIVE.get() is self

    def layer_of(self, modules: Iterable[nn.Module], backend: str) -> AttentionLayer | None:
        """Return the layer that an attention computation inside some modules belongs to, or None, and count it."""
        found = None
        for module in modules:
            self.seen.setdefault(module, set()).add(backend)
            for layer in self.layers.get(module, ()):
                if layer.backend == backend:
                    if layer.call in (None, self._calls[layer]):
                        found = layer
                    self._calls[layer] += 1
        return found

    def take(self, call: AttentionCall) -> None:
        """Pass the call to the reader, and end the forward after the last layer if ``stop`` was set."""
        if call.layer in self.readings:
            raise ValueError(
                f"an AttentionLayer must compute attention once per forward, got a second call of "
                f"{call.layer.module!r}. Declare the module inside it that computes attention once, or state which "
                f"call is meant with AttentionLayer(..., call=0)."
            )
        call.final = call.layer == self.last
        self.readings[call.layer] = self.read(call)
        if call.final:
            raise StopForward(self)


ACTIVE: ContextVar[CaptureState | None] = ContextVar("captum_staa_capture", default=None)


_INTERFACE = "captum_staa"
_routes: dict[nn.Module, tuple[Any, int]] = {}  # module -> (its original config, number of active captures)
_routes_lock = Lock()
_RUNNING: ContextVar[tuple[nn.Module, ...]] = ContextVar("captum_staa_running", default=())


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
    layer = None if state is None else state.layer_of([module], "hf")
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


# --- sdpa, mha, softmax ---------------------------------------------------------------------------------------------


@contextmanager
def _call_backend(module: nn.Module, layer: AttentionLayer, state: CaptureState) -> Iterator[None]:
    """Note that ``module`` runs, for :class:`CallMode`."""

    def enter(module: nn.Module, args: Any) -> None:
        if state.active:
            _RUNNING.set((*_RUNNING.get(), module))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running = _RUNNING.get()
        if state.active and module in running:  # modules inside that raised have not left
            _RUNNING.set(running[: len(running) - 1 - running[::-1].index(module)])

    before = _RUNNING.get()
    handles = module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        _RUNNING.set(before)
        for handle in handles:
            handle.remove()


@contextmanager
def _softmax_backend(module: nn.Module, layer: AttentionLayer, state: CaptureState) -> Iterator[None]:
    """Read the softmax inside ``module``; or the probabilities that arrive at it, if it is a dropout layer."""
    if not isinstance(module, (nn.Dropout, nn.Identity)):
        with _call_backend(module, layer, state):
            yield
        return

    def arrive(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        found = state.layer_of([module], "softmax") if state.active else None
        if found is None:
            return None
        _check_probabilities(args[0], found)
        return (_read_ready(state, found, args[0]), *args[1:])

    handle = module.register_forward_pre_hook(arrive)
    try:
        yield
    finally:
        handle.remove()


def _check_probabilities(matrix: Tensor, layer: AttentionLayer) -> None:
    """Raise ValueError unless every row is a probability over keys. A row without any key to attend to is zero."""
    with torch.no_grad():
        sums = matrix.float().sum(-1)
        close = 1e-3 if matrix.dtype in (torch.float32, torch.float64) else 3e-2
        if bool((matrix >= 0).all() & (((sums - 1).abs() < close) | (sums == 0)).all()):
            return
    raise ValueError(
        f"attention at {layer.module!r} must be probabilities over keys, got values from {float(matrix.min()):.3g} to "
        f"{float(matrix.max()):.3g} in rows that sum to {float(sums.min()):.3g} up to {float(sums.max()):.3g}. Declare "
        f"the module that computes the softmax, or the dropout layer behind it. captum_staa.models.inspect(model, "
        f"inputs) finds the layers."
    )


def _read_ready(state: CaptureState, layer: AttentionLayer, matrix: Tensor) -> Tensor:
    """Read explicit probabilities, and return those with which the model goes on."""
    query, key = (axis % matrix.ndim for axis in (layer.rows.axes if layer.rows is not None else (-2, -1)))
    usual = (query, key) == (matrix.ndim - 2, matrix.ndim - 1)
    standard = matrix if usual else matrix.movedim((query, key), (-2, -1))
    shape = standard.shape
    if layer.rows is not None and not layer.rows.heads:
        standard = standard.flatten(0, -3)
    if standard.ndim == 3:
        standard = standard.unsqueeze(1)
    if standard.ndim > 4:
        standard = standard.flatten(0, -4)
    state.take(AttentionCall(layer, None, ready=standard))
    # The gradient with respect to what was read exists only if the model goes on with it.
    return matrix if standard is matrix else standard.view(shape).movedim((-2, -1), (query, key))


class CallMode(TorchFunctionMode):
    """Function mode that intercepts the attention functions of torch while a captured layer runs."""

    def __init__(self, state: CaptureState) -> None:
        super().__init__()
        self.state = state

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is FLEX_ATTENTION and self.state.active and _RUNNING.get():
            with self:
                return written_out(*args, **kwargs)
        kind = KIND_OF.get(func)
        if kind is None or not self.state.active or not (running := _RUNNING.get()):
            return func(*args, **kwargs)
        if kind == "softmax":
            return self._softmax(func, args, kwargs, running)
        layer = self.state.layer_of(running, kind)
        if layer is None:
            return func(*args, **kwargs)
        if kind == "mha":
            return self._multi_head(layer, func, args, kwargs)
        return self._attend(layer, *args, **kwargs)[0]

    def _softmax(self, func: Any, args: Any, kwargs: Any, running: tuple[nn.Module, ...]) -> Any:
        output = func(*args, **kwargs)
        if output.ndim < 3:  # of classes or experts
            return output
        layer = self.state.layer_of(running, "softmax")
        if layer is None:
            return output
        axis, key = softmax_axis(args, kwargs, output.ndim), -1 if layer.rows is None else layer.rows.axes[1]
        if axis != key % output.ndim:
            raise ValueError(
                f"attention at {layer.module!r} must be probabilities over keys on axis {key}, got a softmax over axis "
                f"{axis} of shape {tuple(output.shape)}. Leave out family=, so that the axes are found, or declare the "
                f"module whose softmax is the attention."
            )
        return _read_ready(self.state, layer, output)

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
        rows = operands if layer.rows is None or layer.rows.heads else operands.without_heads()
        call = AttentionCall(layer, rows, dropout=dropout_p)
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
    "hf": _hf_backend,
    "sdpa": _call_backend,
    "mha": _call_backend,
    "softmax": _softmax_backend,
}


T = TypeVar("T")


# --- the context manager ----------------------------------------------------------------------------------------------


@contextmanager
def capture(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    read: Callable[[AttentionCall], T],
    *,
    stop: bool = False,
) -> Iterator[dict[AttentionLayer, T]]:
    """Context manager that passes the attention of each layer in ``layers`` to ``read`` during the forward pass.

    It is safe to run the same model in other threads at the same time, and to nest captures. The model is restored when
    the block ends, also after an exception.

    Args:
        model: the model that contains the layers. The block must call its forward once, directly or through a wrapper.
        layers: the attention layers to read, in the order in which the model runs them.
        read: function that is called with the :class:`AttentionCall` of each layer. Its return value is kept.
        stop: end the forward as soon as the last layer has been read. The code in the block after the call of the
            model is then skipped.

    Yields:
        A dictionary from each layer to the return value of ``read``. It is complete when the block ends.

    Raises:
        ValueError: ``layers`` is empty, a layer's module does not exist, or the forward computed no attention at a
            layer.
    """
    if not layers:
        raise ValueError("layers must not be empty, got no AttentionLayer. Pass at least one AttentionLayer.")
    state = CaptureState(read, layers[-1] if stop else None)
    with ExitStack() as stack:
        for layer in layers:
            module = _submodule(model, layer.module)
            if module not in state.layers or layer.backend not in [other.backend for other in state.layers[module]]:
                stack.enter_context(BACKENDS[layer.backend](module, layer, state))
            state.layers.setdefault(module, []).append(layer)
        token = ACTIVE.set(state)
        stack.callback(ACTIVE.reset, token)
        if any(layer.backend != "hf" for layer in layers):
            stack.enter_context(CallMode(state))
        stack.enter_context(without_compiling())
        stack.enter_context(without_checkpointing())
        try:
            yield state.readings
        except StopForward as stopped:
            if stopped.state is not state:
                raise
            stopped.__traceback__ = None  # its frames keep the activations of the interrupted forward alive
    missing = [layer for layer in layers if layer not in state.readings]
    if missing:
        raise ValueError(
            _not_read(missing, [state.seen.get(_submodule(model, each.module), set()) for each in missing])
        )


def _not_read(missing: Sequence[AttentionLayer], seen: Sequence[set[str]]) -> str:
    """Return the message about layers whose attention was not read. ``seen`` are the backends that would have."""
    for layer, others in zip(missing, seen, strict=True):
        if others - {layer.backend}:
            other = min(others - {layer.backend})
            return (
                f"the forward must compute attention at every layer, got no attention of backend={layer.backend!r} at "
                f"{layer.module!r}, which computes it in another way. Use AttentionLayer(..., backend={other!r})."
            )
    return (
        f"the forward must compute attention at every layer, got no attention at "
        f"{[layer.module for layer in missing]}. Run the model in this thread. A layer with backend='sdpa' must call "
        f"F.scaled_dot_product_attention or flex_attention, with 'mha' be an nn.MultiheadAttention, with 'softmax' "
        f"call softmax or be the dropout layer behind it, with 'hf' use the AttentionInterface of transformers. "
        f"captum_staa.models.inspect(model, inputs) finds the layers."
    )


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"AttentionLayer must name a module of {type(model).__name__}, got {name!r}. Use a name from "
            f"model.named_modules()."
        ) from None
