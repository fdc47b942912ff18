"""What constants contribute to a decomposed score, and in which module a decomposition does not sum up.

A network that is affine for autograd, as under :class:`~captum_staa.attention.frozen.FrozenPatterns`, is
linear in its embeddings and its constants together. So its score is gradient times value, summed over both. The sum
over embeddings is the relevance of the tokens. The sum over constants (biases, position embeddings, class tokens) is
computed here, during the same backward pass, from what each operation adds. The rest is the part of the score that
autograd does not see, such as values of the input that are added after a ``detach()``.

Reference:
    Euler's theorem on homogeneous functions; Ali et al., "XAI for Transformers: Better Explanations through
    Conservative Propagation", ICML 2022, arXiv 2202.07304 (conservation, layer by layer).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

from captum_staa._utils.networks import networks_of
from captum_staa.attention.linear_graph import PATTERN, Operation, gate_rank

Share = Callable[[Tensor], Tensor]


class ConstantShares:
    """Share of constants in a score, collected while a model runs forward and backward under ``FrozenPatterns``.

    Attributes:
        trace: the calls of modules, if the shares of each are wanted.
    """

    def __init__(self, trace: ModuleTrace | None = None) -> None:
        self.trace = trace
        self._frozen: Any = WeakIdKeyDictionary()  # values of the input without a gradient, and what computed them
        self._constants: list[Tensor] = []
        self._patterns: list[Tensor] = []
        self.dtypes: set[torch.dtype] = set()  # of results, because a model may use a lower precision inside
        self.convolved = False  # whether there are convolutions of values of the input

    def total(self) -> float:
        """Return the share of constants in the score, summed over the batch."""
        return _sum(self._constants)

    def size(self) -> float:
        """Return the sum of the absolute shares of all constants, which rounding errors are relative to."""
        return _sum([share.abs() for share in self._constants])

    def through_patterns(self) -> float:
        """Return what a positive ``pattern_weight`` adds to gradient times value."""
        return _sum(self._patterns)

    # --- during the forward pass ----------------------------------------------------------------------------------

    def freeze(self, value: Tensor, origin: str) -> None:
        """Note that a tensor without a gradient depends on the input."""
        self._frozen[value] = origin

    def freeze_results(self, name: str, values: Iterable[Tensor], result: Any) -> None:
        """Note that the results of a function depend on the input if its arguments do, and they have no gradient."""
        found = [part for part in (result if isinstance(result, (tuple, list)) else (result,)) if _is_constant(part)]
        if not found or name in _ONLY_LIKE:
            return
        for value in values if name not in _AS_OTHER else [next(iter(values))]:
            origin = self._frozen.get(value)
            if value.requires_grad:
                origin = repr(name) if self.trace is None else f"{name!r} in module {self.trace.current.name!r}"
            if origin is not None:
                for part in found:
                    self._frozen[part] = origin
                return

    def of(self, func: Any, name: str, args: Any, kwargs: Any) -> Share | None:
        """Return the share of the constants that a function adds to its result, as a function of the gradient, or None.

        Call it before the function, which may change its arguments.
        """
        open_values = [value for value in tensors_of(args, kwargs) if value.requires_grad]
        if name in _FACTORS or all(gate_rank(value) == PATTERN for value in open_values):
            return None  # what is added to a pattern is a part of what it multiplies
        if name in _BIAS:
            place, axis = _BIAS[name]
            self.convolved |= name.startswith("conv")
            bias = args[place] if len(args) > place else kwargs.get("bias")
            return (lambda gradient: dot(gradient, bias.detach(), axis)) if self._counts(bias) else None
        if name in _SUMMAND:
            summand, factor = args[0] if args else kwargs["input"], kwargs.get("beta", 1)
            return (lambda gradient: factor * dot(gradient, summand.detach())) if self._counts(summand) else None
        given = list(tensors_of(args, kwargs))
        counted = [value for value in given if self._counts(value)]
        if self.trace and name in _NUMBERS and any(gate_rank(value) == PATTERN for value in given):
            self.trace.current.reasons.append("adds the result of a softmax")
        if not counted and name not in _OFFSET and not _adds_number(name, args, kwargs):
            return None
        return self._at_zero(func, name, args, kwargs)

    def _at_zero(self, func: Any, name: str, args: Any, kwargs: Any) -> Share:
        """Return the share of what a function returns if all values of the input are zero."""
        changes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))  # its first argument
        small = name in _ELEMENTWISE
        in_place = changes and not small
        if small and changes:
            func = getattr(Tensor, name.removesuffix("_"))

        def kept(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return tuple(map(kept, value)) if isinstance(value, tuple) else list(map(kept, value))
            if not isinstance(value, Tensor):
                return value
            if value.requires_grad or (value.is_floating_point() and value in self._frozen):
                return _Zeros(_small_shape(name, value) if small else tuple(value.shape), value.dtype, value.device)
            return value.detach()

        given, options = list(map(kept, args)), {key: kept(value) for key, value in kwargs.items()}
        if changes and isinstance(given[0], Tensor):
            given[0] = given[0].clone()

        def share(gradient: Tensor) -> Tensor:
            values = list(map(_made, given))
            result = func(*values, **{key: _made(value) for key, value in options.items()})
            return dot(gradient, (values[0] if in_place else result).nan_to_num(0, 0, 0))

        return share

    def add(self, result: Tensor, share: Share) -> None:
        """Compute a share when the gradient of a result is known."""
        self._hook(result, share, self._constants, 1)

    def add_pattern(self, scores: Tensor, share: Share) -> None:
        """Compute what the gradient to queries, keys or scores of a pattern adds."""
        self._hook(scores, share, self._patterns, -1)

    def _hook(self, result: Tensor, share: Share, shares: list[Tensor], sign: int) -> None:
        call = self.trace.current if self.trace else None

        def hook(gradient: Tensor | None) -> None:
            if gradient is None:  # below an operation without a backward
                return
            with torch.no_grad(), torch._C.DisableTorchFunction():
                shares.append(share(gradient))
                if call is not None:
                    call.constants.append(sign * shares[-1])

        result.register_hook(hook)

    def _counts(self, value: Any) -> bool:
        """Return whether a value is a constant. Values of the input without a gradient are not."""
        if not _is_constant(value) or not (value.is_floating_point() or value.is_complex()):
            return False
        origin = self._frozen.get(value)
        if origin is not None and self.trace:
            self.trace.current.reasons.append(f"adds values of the input that have no gradient after {origin}")
        return origin is None


class _Zeros(NamedTuple):
    """A tensor of zeros that is made when it is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _made(value: Any) -> Any:
    if isinstance(value, _Zeros):  # a tuple
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    if isinstance(value, (tuple, list)):
        return tuple(map(_made, value)) if isinstance(value, tuple) else list(map(_made, value))
    return value


def _small_shape(name: str, value: Tensor) -> tuple[int, ...]:
    """Return the shape of one place, or of one place per channel."""
    return (1, value.shape[1], *[1] * (value.ndim - 2)) if name in _PER_CHANNEL else (1,) * value.ndim


def _is_constant(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.requires_grad


def tensors_of(args: Iterable[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors among the arguments of a function, also in tuples and lists."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_of(value, {})


def _adds_number(name: str, args: Any, kwargs: Any) -> bool:
    places = _NUMBERS.get(name, ())
    numbers = [args[place] for place in places if place < len(args)] + [kwargs.get("other"), kwargs.get("value")]
    return bool(places) and any(isinstance(number, (int, float)) and number != 0 for number in numbers)


_PART = 1 << 15  # numbers


def dot(gradient: Tensor, value: Tensor, axis: int = -1) -> Tensor:
    """Return the sum of gradient times value, which is broadcast. A vector lies along ``axis``."""
    if gradient.is_complex():
        gradient, value = torch.view_as_real(gradient.resolve_conj()), torch.view_as_real(value.to(gradient.dtype))
    wide = torch.promote_types(gradient.dtype, torch.float32)
    gradient, value = gradient.to(wide), value.to(wide)
    if value.numel() == 1:
        return gradient.sum() * value.reshape(())
    if value.ndim == 1 and axis == -1:
        return torch.mv(gradient.reshape(-1, len(value)), value).sum()
    if value.ndim == 1:
        return gradient.movedim(axis, 0).flatten(1).sum(1) @ value
    return (gradient * value).sum()


def dot_log(gradient: Tensor, pattern: Tensor) -> Tensor:
    """Return the sum of gradient times the logarithm of a pattern, in which 0 counts as the smallest number.

    On a CPU it goes through parts that fit into the cache: new memory for a matrix takes longer than its logarithm.
    """
    wide, smallest = torch.promote_types(gradient.dtype, torch.float32), torch.finfo(pattern.dtype).tiny
    gradient, pattern = gradient.reshape(-1), pattern.reshape(-1)
    part = _PART if pattern.device.type == "cpu" else max(len(pattern), 1)
    buffer = torch.empty(min(part, len(pattern)), dtype=wide, device=pattern.device)
    total = torch.zeros((), dtype=wide, device=pattern.device)
    for own, values in zip(gradient.split(part), pattern.split(part), strict=True):
        logs = buffer[: len(values)].copy_(values).clamp_min_(smallest).log_()
        total += own.to(wide) @ logs
    return total


def _sum(shares: list[Tensor]) -> float:
    return float(sum(share.item() for share in shares))


# --- kinds of functions, by name --------------------------------------------------------------------------------------


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Constants among the arguments are factors, masks, indices or options: without the other arguments the result is 0.
_FACTORS = _names(
    "mul multiply mul_ __rmul__ div divide true_divide div_ matmul __matmul__ __rmatmul__ mm bmm mv dot inner outer "
    "einsum tensordot kron scaled_dot_product_attention softmax _softmax _safe_softmax rms_norm dropout dropout_ "
    "alpha_dropout feature_dropout native_dropout to type type_as view view_as reshape reshape_as expand expand_as "
    "__getitem__ index_select gather take_along_dim masked_select __get__ requires_grad_ interpolate grid_sampler "
    "prelu lstm gru rnn_tanh rnn_relu"
)
# Of some arguments, only the shape, the dtype or the device counts.
_ONLY_LIKE = _names(
    "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full new_tensor"
)
_AS_OTHER = _names("to type_as view_as reshape_as expand_as")
# Place of the bias among the arguments, and the axis of the result along which it is added.
_BIAS = {
    "linear": (2, -1),
    "bilinear": (3, -1),
    "layer_norm": (3, -1),
    "group_norm": (3, 1),
    **{f"conv{transposed}{n}d": (2, -1 - n) for transposed in ("", "_transpose") for n in (1, 2, 3)},
}
_SUMMAND = _names("addmm baddbmm addbmm addmv addr addcmul")
_PER_CHANNEL = _names("batch_norm instance_norm")
# Functions that add numbers, and at which places these are.
_NUMBERS = {
    **dict.fromkeys(_names("add add_ sub sub_ subtract rsub __rsub__"), (0, 1)),
    **dict.fromkeys(_names("where masked_fill masked_fill_"), (1, 2)),
    "__setitem__": (2,),
    "pad": (3,),
}
# Functions that are not 0 at 0.
_OFFSET = _names(
    "sigmoid sigmoid_ expit hardsigmoid softplus log_sigmoid logsigmoid cos cos_ clamp clamp_ clip clip_ "
    "clamp_min clamp_max threshold"
)
# Each place of the result depends on the same place of the arguments only, so that at zero one place is enough.
_ELEMENTWISE = (
    _OFFSET
    | _PER_CHANNEL
    | (_NUMBERS.keys() - {"pad", "__setitem__"})
    | _names("lerp lerp_ addcdiv addcdiv_ maximum minimum")
)


# --- what is missing ------------------------------------------------------------------------------------------------

_TOO_MUCH = 0.5  # of the sum of the absolute score, relevance and share of constants
_PLACES = 3  # number of modules that a message names
_TF32 = 2.0**-10
_PRECISION = {"highest": 0.0, "high": _TF32, "medium": 2.0**-7}  # of factors of matrix products in float32
_SCRIPT = "is compiled by torch.jit, which hides its operations"


class Sums(NamedTuple):
    """Sums over the batch that must agree: ``remainder = score - relevance - constants``, up to ``rounding``."""

    score: float
    relevance: float
    constants: float
    remainder: float
    rounding: float


def rounding(dtypes: Iterable[torch.dtype], convolved_on_gpu: bool = False) -> float:
    """Return the largest remainder that is rounding, relative to the sum of all absolute shares.

    Args:
        dtypes: of the results of all operations.
        convolved_on_gpu: whether there are convolutions on a GPU, whose factors cuDNN may round to TF32.
    """
    precision = max(torch.finfo(dtype).eps for dtype in dtypes)
    precision = max(precision, _PRECISION[torch.get_float32_matmul_precision()], _TF32 if convolved_on_gpu else 0.0)
    return min(64 * precision, max(0.1 * precision**0.5, 4 * precision))


def report_missing(sums: Sums, places: list[Missing]) -> float:
    """Warn about what is missing in a decomposition, and return it, or raise a ValueError if it is too much.

    In a script, constants are not seen. If its operations are linear, what is missing there is counted as constants.

    Args:
        sums: the sums that do not agree.
        places: what is missing in each module, the largest first.
    """
    remainder = sums.remainder - sum(missing.share for missing in places if missing.reasons == (_SCRIPT,))
    if abs(remainder) <= sums.rounding:
        return remainder
    named = [place for place in places[:_PLACES] if abs(place.share) > abs(places[0].share) / 10]
    message = (
        f"contributions of tokens and constants must sum to the score, got a remainder of {remainder:.3g}: score "
        f"{sums.score:.3g}, tokens {sums.relevance:.3g}, constants {sums.constants:.3g} (sums over the batch). "
        f"Missing: {'; '.join(map(str, named))}."
    )
    way = (
        "Write the operation with functions of torch that keep the gradient, such as F.scaled_dot_product_attention, "
        "and pass a module that is not compiled by torch.jit"
    )
    if abs(remainder) > _TOO_MUCH * (abs(sums.score) + abs(sums.relevance) + abs(sums.constants)):
        raise ValueError(
            f"{message} So much is missing that the map would not describe the model. {way}, or use mode='attention', "
            f"RISE or VideoOcclusion, which need no gradient."
        )
    warnings.warn(f"{message} Contributions are a first-order approximation there. {way}.", stacklevel=4)
    return remainder


# --- the module in which the sum is broken --------------------------------------------------------------------------


@dataclass(eq=False)
class Call:
    """One call of a module: what it takes and gives, as gradient times value, and what its own constants add."""

    name: str
    kind: str
    parent: Call | None = None
    given: list[Tensor] = field(default_factory=list)
    taken: list[Tensor] = field(default_factory=list)
    constants: list[Tensor] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    nodes: tuple[int, int] = (0, 0)  # the numbers of autograd's nodes during the call

    def added(self) -> float:
        """Return what comes out of the module more than goes in."""
        return _sum(self.given) - _sum(self.taken)


class Missing(NamedTuple):
    """What is missing in a module: its name and class, the missing part of the score, and why."""

    module: str
    kind: str
    share: float
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        why = f", which {' and '.join(self.reasons)}" if self.reasons else ""
        return f"{self.share:.3g} in module {self.module!r} ({self.kind}){why}"


class ModuleTrace:
    """Context manager that records what each call of a module takes and gives, in this thread.

    It needs the memory of all inputs and outputs of modules, so it is only used to explain a failure.

    Args:
        forward_func: a module, or a function that uses modules.
    """

    def __init__(self, forward_func: object) -> None:
        networks = networks_of(forward_func)
        self.root = Call("", type(networks[0]).__name__ if networks else "forward_func")
        self.calls = [self.root]
        self.current = self.root
        self._modules = [(name, module) for network in networks for name, module in network.named_modules()]
        self._thread = get_ident()
        self._handles: list[Any] = []

    def __enter__(self) -> ModuleTrace:
        for name, module in self._modules:
            self._handles.append(module.register_forward_pre_hook(self._entered(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._left, with_kwargs=True, always_call=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self, leaf: Tensor) -> Tensor:
        """Return a copy of a tensor that is decomposed, which counts as a constant of the module that runs."""
        return self._copied(leaf, self.current.constants)[0]

    def missing(self, operations: Iterable[Operation], score: float) -> list[Missing]:
        """Return what is missing in each module, the largest first.

        Args:
            operations: operations without a rule.
            score: the sum of the scores over the batch.
        """
        for operation in operations:
            inside = [call for call in self.calls if call.nodes[0] <= operation.number < call.nodes[1]]
            (inside[-1] if inside else self.root).reasons.append(f"uses {operation.name}, which has no rule")
        own = {call: call.added() - _sum(call.constants) for call in self.calls}
        own[self.root] += score
        for call in self.calls:
            if call.parent is not None:
                own[call.parent] -= call.added()
        shares: dict[tuple[str, str], float] = {}
        reasons: dict[tuple[str, str], dict[str, None]] = {}
        for call, share in own.items():
            key = call.name, call.kind
            shares[key] = shares.get(key, 0.0) + share
            reasons.setdefault(key, {}).update(dict.fromkeys(call.reasons))
        found = [Missing(*key, share, tuple(reasons[key])) for key, share in shares.items()]
        return sorted(found, key=lambda missing: -abs(missing.share))

    def _entered(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if get_ident() != self._thread:
                return None
            self.current = Call(name, type(module).__name__, self.current)
            self.calls.append(self.current)
            if isinstance(module, torch.jit.ScriptModule):
                self.current.reasons.append(_SCRIPT)
            copies, numbers = self._copied((args, kwargs), self.current.taken)
            self.current.nodes = (max(numbers, default=0), 0)
            return copies

        return hook

    def _left(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if get_ident() != self._thread:
            return None
        call = self.current
        copies, numbers = self._copied(output, call.given)
        call.nodes = (call.nodes[0], max(numbers, default=0))
        self.current = call.parent or self.root
        return copies

    def _copied(self, values: Any, shares: list[Tensor]) -> tuple[Any, list[int]]:
        """Return copies of tensors, whose gradients are of one use only, and the numbers of their nodes."""
        numbers: list[int] = []

        def copied(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
            with torch._C.DisableTorchFunction():
                copy, kept = value.clone(), value.detach()
                copy.register_hook(lambda slope: None if slope is None else shares.append(dot(slope, kept)))
                assert copy.grad_fn is not None
                numbers.append(copy.grad_fn._sequence_nr())
            return copy

        return tree_map(copied, values), numbers
