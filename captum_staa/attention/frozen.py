"""Function mode under which autograd sees a transformer as an affine function of its embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode

from captum_staa._utils.flex_attention import FLEX_ATTENTION, written_out
from captum_staa._utils.tensors import wide
from captum_staa.attention.completeness import ConstantShares, dot, dot_log, tensors_of
from captum_staa.attention.linear_graph import (
    PATTERN,
    Attended,
    FrozenGate,
    FrozenLayerNorm,
    FrozenRatio,
    FrozenSquash,
    Pattern,
    PatternShare,
    SharedFactor,
    gate_rank,
)
from captum_staa.models.attention_watch import without_dispatch

# --- normalization with a constant scale ------------------------------------------------------------------------------


def layer_norm(func: Any, args: Any, kwargs: Any) -> Any:
    def run(
        input: Tensor,
        normalized_shape: Iterable[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enable: bool = True,
    ) -> Any:
        return FrozenLayerNorm.apply(input, tuple(normalized_shape), weight, bias, eps)

    return run(*args, **kwargs)


def rms_norm(func: Any, args: Any, kwargs: Any) -> Any:
    def run(
        input: Tensor, normalized_shape: Iterable[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Any:
        dims = tuple(range(-len(tuple(normalized_shape)), 0))

        def evaluate(x: Tensor) -> tuple[Tensor, ...]:
            scale = _inverse_root(wide(x).square().mean(dims, keepdim=True), eps, x.dtype)
            return (func(x, normalized_shape, weight, eps), scale, *([] if weight is None else [weight.detach()]))

        return FrozenRatio.apply(input, evaluate)

    return run(*args, **kwargs)


def group_norm(func: Any, args: Any, kwargs: Any) -> Any:
    def run(
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enabled: bool = True,
    ) -> Tensor:
        x = wide(input).reshape(len(input), num_groups, -1)
        centered = x - x.mean(-1, keepdim=True)
        scale = _inverse_root(centered.detach().square().mean(-1, keepdim=True), eps, input.dtype)
        return _per_channel((centered * scale).reshape(input.shape), weight, bias).to(input.dtype)

    return run(*args, **kwargs)


def instance_norm(func: Any, args: Any, kwargs: Any) -> Any:
    def run(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        use_input_stats: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Any:
        if not use_input_stats:
            return func(*args, **kwargs)  # already affine
        return group_norm(func, (input, input.shape[1], weight, bias, eps), {})

    return run(*args, **kwargs)


def batch_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """Rule of batch norm. Mean and scale are constants, because batch statistics mix the examples of a batch."""

    def run(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Any:
        if not training:
            return func(*args, **kwargs)
        dims = (0, *range(2, input.ndim))

        def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
            scale = _inverse_root(wide(x).var(dims, unbiased=False, keepdim=True), eps, x.dtype)
            value = func(x, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)
            return value, _per_channel(scale, weight, None)

        return FrozenRatio.apply(input, evaluate)

    return run(*args, **kwargs)


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Return the cosine similarity as a product of two normalized tensors, written with functions that have rules."""
    return (F.normalize(x1, dim=dim, eps=eps) * F.normalize(x2, dim=dim, eps=eps)).sum(dim)


def _inverse_root(squares: Tensor, eps: float | None, dtype: torch.dtype) -> Tensor:
    return (squares + (torch.finfo(dtype).eps if eps is None else eps)).rsqrt()


def _per_channel(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = (-1, *[1] * (x.ndim - 2))
    x = x if weight is None else x * weight.detach().view(shape)
    return x if bias is None else x + bias.view(shape)


State = tuple[Tensor, ...]
Step = Callable[[Tensor, Tensor, State], State]  # from the parts of the input and of the state to the next state


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    opened, forgotten, content, shown = (x + h).chunk(4, -1)
    cell = forgotten.sigmoid() * state[1] + opened.sigmoid() * content.tanh()
    return shown.sigmoid() * cell.tanh(), cell


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    (reset, update, content), (of_reset, of_update, of_content) = x.chunk(3, -1), h.chunk(3, -1)
    kept = (update + of_update).sigmoid()
    return ((1 - kept) * (content + (reset + of_reset).sigmoid() * of_content).tanh() + kept * state[0],)


_STEPS: dict[Any, Step] = {
    torch.lstm: _lstm,
    torch.gru: _gru,
    torch.rnn_tanh: lambda x, h, state: ((x + h).tanh(),),
    torch.rnn_relu: lambda x, h, state: ((x + h).relu(),),
}
RECURRENT = frozenset(_STEPS)


def unrolled(func: Any) -> Callable[..., Any]:
    """Return a recurrent layer of torch, such as ``torch.lstm``, as a loop over steps. Packed sequences are not."""

    def run(
        input: Tensor,
        states: Tensor | Sequence[Tensor],
        weights: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        *batch_first: bool,
    ) -> tuple[Tensor, ...]:
        if not batch_first:  # the last argument is missing for packed sequences
            return func(input, states, weights, has_biases, num_layers, dropout, train, bidirectional)
        starts = (states,) if isinstance(states, Tensor) else tuple(states)
        directions = 2 if bidirectional else 1
        per_run = len(weights) // (num_layers * directions)
        sequence = list(input.unbind(1 if batch_first[0] else 0))
        last: list[State] = []
        for layer in range(num_layers):
            results = []
            for reverse in range(directions):
                number = layer * directions + reverse
                own = weights[number * per_run : (number + 1) * per_run]
                start = tuple(state[number] for state in starts)
                outputs, state = _one_direction(func, sequence[::-1] if reverse else sequence, start, own, has_biases)
                results.append(outputs[::-1] if reverse else outputs)
                last.append(state)
            sequence = [torch.cat(parts, -1) for parts in zip(*results, strict=True)] if bidirectional else results[0]
            if layer < num_layers - 1:
                sequence = [F.dropout(step, dropout, train) for step in sequence]
        return torch.stack(sequence, 1 if batch_first[0] else 0), *map(torch.stack, zip(*last, strict=True))

    return run


def _one_direction(
    func: Any, sequence: Sequence[Tensor], state: State, weights: Sequence[Tensor], has_biases: bool
) -> tuple[list[Tensor], State]:
    """Return the outputs of all steps, in the order of the steps, and the last state."""
    of_input, of_state = weights[:2]
    biases: Sequence[Any] = weights[2:4] if has_biases else (None, None)
    projection = weights[4 if has_biases else 2 :]
    outputs = []
    for x in sequence:
        state = _STEPS[func](F.linear(x, of_input, biases[0]), F.linear(state[0], of_state, biases[1]), state)
        if projection:
            state = (F.linear(state[0], projection[0]), *state[1:])
        outputs.append(state[0])
    return outputs, state


Rule = Callable[[Any, Any, Any], Any]


# --- the function mode ------------------------------------------------------------------------------------------------


class FrozenPatterns(TorchFunctionMode):
    """Function mode that makes patterns, scales and gates constants for autograd: a network becomes affine.

    Only gradients change, values do not. Every tensor that requires a gradient is assumed to depend on the embeddings,
    so freeze the parameters first. The rules for operations on such tensors are:

    - Attention: queries, keys and masks of ``F.scaled_dot_product_attention`` are constants, also inside
      ``nn.MultiheadAttention``. The result of every softmax is a constant.
    - Normalization: the scale of layer, RMS, group and instance norm is a constant, the mean is not. For
      hand-written normalization, ``rsqrt``, ``exp``, powers below 1, norms, ``std``, ``var`` and every denominator are
      constants.
    - Activations: ``f(x) = f(0) + x * ratio``, where ``ratio = (f(x) - f(0)) / x`` is a constant (``f'(0)`` at 0). This
      holds for GELU, SiLU, tanh, sigmoid and others. ReLU and max pooling are already piecewise linear.
    - Products: the output of sigmoid, tanh or erf is a gate and a constant. So a hand-written GELU equals
      ``F.gelu``, and ``F.glu`` passes a gradient to its first half only. In other products, such as
      ``silu(gate) * up``, each factor gets half of the product.
    - Recurrent layers run step by step, with the rules for gates and activations.

    With a ``pattern_weight`` above 0, the gradient also passes through attention patterns to queries and keys, each
    multiplied by this weight. The network is then not affine: the share of each token includes, in first order, its
    effect on the attention of other tokens.

    A function mode does not see compiled and scripted code.
    :func:`~captum_staa.attention.linear_graph.nonlinear_operations` finds the operations without a rule.

    Example:
        >>> x = torch.tensor([3.0], requires_grad=True)
        >>> with FrozenPatterns():
        ...     y = F.gelu(x)
        >>> bool(torch.autograd.grad(y, x)[0] == y / x)
        True

    Args:
        pattern_weight: weight of the gradient through the patterns of ``F.scaled_dot_product_attention`` and softmax,
            applied to queries and to keys. With 0, patterns are constants.
    """

    def __init__(self, pattern_weight: float = 0.0, shares: ConstantShares | None = None) -> None:
        super().__init__()
        self.pattern_weight, self.shares = pattern_weight, shares

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values = list(tensors_of(args, kwargs))
        depends = torch.is_grad_enabled() and any(value.requires_grad for value in values)
        if depends and (func in _EXPANDED or func in _WRITTEN_OUT):
            return self.expand(func)(*args, **kwargs)
        if self.shares is None:
            return self._apply(func, args, kwargs) if depends else func(*args, **kwargs)
        name = _name(func)
        if not depends:
            result = func(*args, **kwargs)
        else:
            share = self.shares.of(func, name, args, kwargs)
            if share is not None and name in _IN_PLACE and args[0]._is_view():
                # autograd gives no gradient to a view that is changed in place, only to its base
                result = self._apply(_IN_PLACE[name], args, kwargs)
                self.shares.add(result, share)
                return args[0].copy_(result)
            result = self._apply(func, args, kwargs)
            if isinstance(result, Tensor) and result.is_floating_point():
                self.shares.dtypes.add(result.dtype)
            if share is not None:
                self.shares.add(args[0] if result is None else result, share)
                return result
        self.shares.freeze_results(name, values, args[0] if name == "__setitem__" else result)
        return result

    def _apply(self, func: Any, args: Any, kwargs: Any) -> Any:
        rule = _rule_of(func)
        if rule is None:
            return func(*args, **kwargs)
        if self.pattern_weight and rule in _OPEN_RULES:
            return _OPEN_RULES[rule](func, args, kwargs, self.pattern_weight, self.shares)
        return rule(func, args, kwargs)

    def expand(self, func: Any) -> Callable[..., Any]:
        """Return a version of a Python function of torch whose code runs under this mode, operation by operation."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return (_WRITTEN_OUT.get(func) or without_dispatch(func))(*args, **kwargs)

        return run


def _depends(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _constant(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


# --- rules: (func, args, kwargs) -> result --------------------------------------------------------------------------


def _detached(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*map(_constant, args), **{name: _constant(value) for name, value in kwargs.items()})


def _softmax(func: Any, args: Any, kwargs: Any) -> Any:
    return _detached(func, args, kwargs)


def _detach_first(func: Any, args: Any, kwargs: Any) -> Any:
    """Rule of ``var_mean`` and ``std_mean``: the scale is a constant, the mean is not."""
    scale, *rest = func(*args, **kwargs)
    return (scale.detach(), *rest)


def _with_constants(*operands: tuple[int, str]) -> Rule:
    """Return a rule that makes some operands constants. Each is given by its position and name."""

    def rule(func: Any, args: Any, kwargs: Any) -> Any:
        places, names = {place for place, _ in operands}, {name for _, name in operands}
        args = [_constant(value) if place in places else value for place, value in enumerate(args)]
        return func(*args, **{name: _constant(value) if name in names else value for name, value in kwargs.items()})

    return rule


def _open_attention(func: Any, args: Any, kwargs: Any, weight: float, shares: ConstantShares | None) -> Tensor:
    """Rule of fused attention with a weighted gradient to queries, keys and mask."""

    def run(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
    ) -> Any:
        query, key = _weighted(query, weight, shares), _weighted(key, weight, shares)
        result = func(query, key, value, _weighted(attn_mask, 2 * weight, shares), *rest, **options)
        return Attended.apply(result, value) if _depends(value) else Pattern.apply(result)

    return run(*args, **kwargs)


def _open_softmax(func: Any, args: Any, kwargs: Any, weight: float, shares: ConstantShares | None) -> Tensor:
    """Rule of softmax. The weight is doubled, because queries and keys each take half of their product."""

    def run(input: Tensor, *rest: Any, **options: Any) -> Tensor:
        if not _depends(input):
            return func(input, *rest, **options)
        scores = PatternShare.apply(input, 2 * weight)
        pattern = func(scores, *rest, **options)
        if shares is not None:
            # Scores are the logarithm of the pattern up to a constant per row, and their gradient sums to 0 in a row.
            kept = pattern.detach()
            shares.add_pattern(scores, lambda gradient: 2 * weight * dot_log(gradient, kept))
        return Pattern.apply(pattern)

    return run(*args, **kwargs)


def _weighted(value: Any, weight: float, shares: ConstantShares | None) -> Any:
    if not _depends(value):
        return value
    shared = PatternShare.apply(value, weight)
    if shares is not None:
        kept = shared.detach()
        shares.add_pattern(shared, lambda gradient: weight * dot(gradient, kept))
    return shared


def _product(summand: int | None = None) -> Rule:
    """Return the rule of a product. Every tensor is a factor, except a bias and the one at position ``summand``."""
    summands = {"bias", "input"} if summand == 0 else {"bias"}

    def rule(func: Any, args: Any, kwargs: Any) -> Any:
        candidates = [value for place, value in enumerate(args) if place != summand]
        candidates += [value for name, value in kwargs.items() if name not in summands]
        factors = [value for value in tensors_of(candidates, {}) if value.requires_grad]
        if len(factors) < 2:
            return func(*args, **kwargs)
        ranks = {id(factor): gate_rank(factor) for factor in factors}
        content = min(ranks.values())
        shares = sum(ranks[id(factor)] == content for factor in factors)

        def share(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(map(share, value))
            if not _depends(value):
                return value
            if ranks[id(value)] > content:
                return value if ranks[id(value)] == PATTERN else value.detach()
            return SharedFactor.apply(value, 1 / shares) if shares > 1 else value

        return func(
            *(value if place == summand else share(value) for place, value in enumerate(args)),
            **{name: value if name in summands else share(value) for name, value in kwargs.items()},
        )

    return rule


def _power(func: Any, args: Any, kwargs: Any) -> Any:
    """Rule of powers: ``x ** n`` is ``x`` times the constant ``x ** (n - 1)`` for n >= 1. Smaller powers are scales."""
    base = args[0] if args else kwargs.get("input")
    exponent = args[1] if len(args) > 1 else kwargs.get("exponent", 2)
    if not _depends(base) or isinstance(exponent, Tensor) or exponent < 1:
        return _detached(func, args, kwargs)
    return FrozenRatio.apply(base, lambda x: (x**exponent, x ** (exponent - 1)))


def _in_place(rule: Rule, out_of_place: Any) -> Rule:
    return lambda func, args, kwargs: args[0].copy_(rule(out_of_place, args, kwargs))


def _activation(kind: Any) -> Rule:
    def rule(func: Any, args: Any, kwargs: Any) -> Any:
        x, rest = (args[0], args[1:]) if args else (kwargs["input"], ())
        options = {name: value for name, value in kwargs.items() if name != "input"}
        if any(isinstance(value, Tensor) for value in (*rest, *options.values())):
            return func(*args, **kwargs)  # a clamp to tensors
        at_zero, slope_at_zero = _at_zero(func, rest, tuple(options.items()))

        def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
            value = func(x, *rest, **options)
            if at_zero == 0:
                return value, (value / x).nan_to_num_(slope_at_zero)  # at 0
            # near 0 the difference loses its digits to rounding, and the ratio is f'(0) up to rounding
            near = x.abs() < torch.finfo(x.dtype).eps ** 0.5
            return value, ((value - at_zero) / x).masked_fill_(near, slope_at_zero)

        return kind.apply(x, evaluate)

    return rule


@cache
def _at_zero(func: Any, rest: tuple[Any, ...], options: tuple[tuple[str, Any], ...]) -> tuple[float, float]:
    """Return ``f(0)`` and ``f'(0)``. An infinite slope, as of a square root, counts as 0."""
    with torch.enable_grad():
        zero = torch.zeros((), dtype=torch.float64, device="cpu", requires_grad=True)
        value = func(zero, *rest, **dict(options))
        (slope,) = torch.autograd.grad(value, zero)
    return float(value.detach()), float(slope) if slope.isfinite() else 0.0


def _glu(func: Any, args: Any, kwargs: Any) -> Tensor:
    def run(input: Tensor, dim: int = -1) -> Tensor:
        value, gate = input.chunk(2, dim)
        return value * gate.detach().sigmoid()

    return run(*args, **kwargs)


def _log_softmax(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Rule of ``x - log sum exp x``: the second term is a constant."""
    x = args[0] if args else kwargs["input"]
    value = func(*args, **kwargs)
    return x.to(value.dtype) + (value - x).detach()


# --- table of rules -------------------------------------------------------------------------------------------------

_ATTENTION = _with_constants((0, "query"), (1, "key"), (3, "attn_mask"))

_BY_NAME: dict[Rule, str] = {
    _ATTENTION: "scaled_dot_product_attention",
    _softmax: "softmax _softmax _safe_softmax",
    _detached: (
        "exp exp2 rsqrt reciprocal __rdiv__ __rtruediv__ __rpow__ norm vector_norm matrix_norm var std sign sgn round "
        "floor ceil trunc heaviside"
    ),
    _detach_first: "var_mean std_mean",
    _with_constants((1, "other")): "div divide true_divide",
    _with_constants((2, "weight")): "lerp",
    _with_constants((2, "tensor2")): "addcdiv",
    layer_norm: "layer_norm",
    rms_norm: "rms_norm",
    group_norm: "group_norm",
    instance_norm: "instance_norm",
    batch_norm: "batch_norm",
    _glu: "glu",
    _log_softmax: "log_softmax",
    _power: "pow __pow__ square",
    _activation(FrozenRatio): (
        "gelu silu mish elu selu celu hardswish hardtanh relu6 sqrt clamp clip clamp_min clamp_max hardshrink "
        "softshrink threshold log1p expm1 atan arctan asinh arcsinh sin cos"
    ),
    _activation(FrozenSquash): "tanh erf",
    _activation(FrozenGate): "sigmoid expit hardsigmoid softplus log_sigmoid logsigmoid",
    _product(): "mul multiply matmul mm bmm mv dot inner outer einsum tensordot kron",
    _product(0): "addmm baddbmm addbmm addmv addr addcmul",
    _product(3): "bilinear",
    _product(2): "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
}
# Functions that are replaced by Python code of functions in the table.
_WRITTEN_OUT: dict[Any, Callable[..., Any]] = {
    **{function: unrolled(function) for function in RECURRENT},
    torch.cosine_similarity: cosine_similarity,
    FLEX_ATTENTION: written_out,
}
# Rules that replace those above if pattern_weight is above 0.
_OPEN_RULES: dict[Rule, Callable[[Any, Any, Any, float, ConstantShares | None], Any]] = {
    _softmax: _open_softmax,
    _ATTENTION: _open_attention,
}


def _functions(names: Iterable[str]) -> Iterator[tuple[str, Any, Any]]:
    """Yield every function of torch with one of these names, with its namespace."""
    for space in (torch, Tensor, F, torch._C._nn, torch.special, torch.linalg):
        for name in names:
            if hasattr(space, name):
                yield name, space, getattr(space, name)


def _register() -> tuple[dict[Any, Rule], dict[str, Rule], frozenset[Any], dict[str, Any]]:
    rules: dict[Any, Rule] = {}
    by_name: dict[str, Rule] = {}
    # Python functions of torch.nn.functional only call functions that are in the table.
    python = (function for name, function in vars(F).items() if name[0] != "_" and isinstance(function, FunctionType))
    expanded = frozenset(function for function in python if function.__globals__ is vars(F))
    for rule, names in _BY_NAME.items():
        by_name.update(dict.fromkeys(names.split(), rule))
        for name, space, function in _functions(names.split()):
            rules[function] = rule
            in_place = "__ipow__" if name == "__pow__" else f"{name}_"
            if hasattr(space, in_place):
                rules[getattr(space, in_place)] = _in_place(rule, function)
    out_of_place = {
        f"{name}_": getattr(Tensor, name)
        for name in ("add", "sub", "masked_fill", "lerp", "addcdiv", "addcmul", "clamp", "clip", "sigmoid", "cos")
    }
    rules = {function: rule for function, rule in rules.items() if function not in expanded}
    return rules, by_name, expanded, out_of_place


_RULES, _RULES_BY_NAME, _EXPANDED, _IN_PLACE = _register()


@cache
def _name(func: Any) -> str:
    """Return the name of a function of torch, for an operator such as ``aten::add.Tensor`` without the overload."""
    name = str(getattr(func, "__name__", ""))
    return name.split(".")[0] if isinstance(func, OpOverload) else name


@cache
def _rule_of(func: Any) -> Rule | None:
    if not isinstance(func, (OpOverload, OpOverloadPacket)):
        return _RULES.get(func)
    name = _name(func)
    rule = _RULES_BY_NAME.get(name)
    if rule is None and name.removesuffix("_") in _RULES_BY_NAME:
        return _in_place(_RULES_BY_NAME[name[:-1]], getattr(torch.ops.aten, name[:-1]))
    return rule
