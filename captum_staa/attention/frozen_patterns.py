"""Function mode under which autograd sees a transformer as an affine function of its embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from captum_staa.attention.frozen_norms import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from captum_staa.attention.linear_graph import (
    PATTERN,
    Attended,
    FrozenGate,
    FrozenRatio,
    FrozenSquash,
    Pattern,
    PatternShare,
    SharedFactor,
    gate_rank,
)

Rule = Callable[[Any, Any, Any], Any]


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

    def __init__(self, pattern_weight: float = 0.0) -> None:
        super().__init__()
        self.pattern_weight = pattern_weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if (rule is None and func not in _EXPANDED) or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if not any(value.requires_grad for value in _tensors(args, kwargs)):
            return func(*args, **kwargs)
        if rule is None:
            return self.expand(func)(*args, **kwargs)
        if self.pattern_weight and func in _OPEN_RULES:
            return _OPEN_RULES[func](func, args, kwargs, self.pattern_weight)
        return rule(func, args, kwargs)

    def expand(self, func: Any) -> Callable[..., Any]:
        """Return a version of a Python function of torch whose code runs under this mode, operation by operation."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return _without_dispatch(func)(*args, **kwargs)

        return run


@cache
def _without_dispatch(func: FunctionType) -> FunctionType:
    """Return a copy of a function of torch that does not dispatch to function modes."""
    never = dict.fromkeys(
        ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), lambda *_: False
    )
    names = {**func.__globals__, **never}
    copy = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _depends(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _tensors(args: Iterable[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value, {})


def _constant(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


# --- rules: (func, args, kwargs) -> result --------------------------------------------------------------------------


def _detached(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*map(_constant, args), **{name: _constant(value) for name, value in kwargs.items()})


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


def _open_attention(func: Any, args: Any, kwargs: Any, weight: float) -> Tensor:
    """Rule of fused attention with a weighted gradient to queries, keys and mask."""

    def run(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
    ) -> Any:
        query, key = _weighted(query, weight), _weighted(key, weight)
        result = func(query, key, value, _weighted(attn_mask, 2 * weight), *rest, **options)
        return Attended.apply(result, value) if _depends(value) else Pattern.apply(result)

    return run(*args, **kwargs)


def _open_softmax(func: Any, args: Any, kwargs: Any, weight: float) -> Tensor:
    """Rule of softmax. The weight is doubled, because queries and keys each take half of their product."""

    def run(input: Tensor, *rest: Any, **options: Any) -> Tensor:
        return Pattern.apply(func(_weighted(input, 2 * weight), *rest, **options))

    return run(*args, **kwargs)


def _weighted(value: Any, weight: float) -> Any:
    return PatternShare.apply(value, weight) if _depends(value) else value


def _product(summand: int | None = None) -> Rule:
    """Return the rule of a product. Every tensor is a factor, except a bias and the one at position ``summand``."""
    summands = {"bias", "input"} if summand == 0 else {"bias"}

    def rule(func: Any, args: Any, kwargs: Any) -> Any:
        candidates = [value for place, value in enumerate(args) if place != summand]
        candidates += [value for name, value in kwargs.items() if name not in summands]
        factors = [value for value in _tensors(candidates, {}) if value.requires_grad]
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
        at_zero, slope_at_zero = _at_zero(func, rest, tuple(options.items()))

        def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
            value = func(x, *rest, **options)
            if at_zero == 0:
                return value, (value / x).masked_fill_(x == 0, slope_at_zero)
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

_BY_NAME: dict[Rule, str] = {
    _with_constants((0, "query"), (1, "key"), (3, "attn_mask")): "scaled_dot_product_attention",
    _detached: (
        "softmax _softmax _safe_softmax exp exp2 rsqrt reciprocal __rdiv__ __rtruediv__ __rpow__ norm vector_norm "
        "matrix_norm var std"
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
    _activation(FrozenRatio): "gelu silu mish elu selu celu hardswish hardtanh relu6 sqrt",
    _activation(FrozenSquash): "tanh erf",
    _activation(FrozenGate): "sigmoid expit hardsigmoid softplus log_sigmoid logsigmoid",
    _product(): "mul multiply matmul mm bmm mv dot inner outer einsum",
    _product(0): "addmm baddbmm addbmm addmv addcmul",
    _product(2): "linear conv1d conv2d conv3d",
}


def _functions(names: Iterable[str]) -> Iterator[tuple[str, Any, Any]]:
    """Yield every function of torch with one of these names, with its namespace."""
    for space in (torch, Tensor, F, torch._C._nn, torch.special, torch.linalg):
        for name in names:
            if hasattr(space, name):
                yield name, space, getattr(space, name)


def _register() -> tuple[dict[Any, Rule], frozenset[Any]]:
    rules: dict[Any, Rule] = {}
    for rule, names in _BY_NAME.items():
        for name, space, function in _functions(names.split()):
            rules[function] = rule
            in_place = "__ipow__" if name == "__pow__" else f"{name}_"
            if hasattr(space, in_place):
                rules[getattr(space, in_place)] = _in_place(rule, function)
    # Python functions of torch.nn.functional call only functions that are in the table.
    expanded = {function for function in rules if getattr(function, "__module__", "") == F.__name__}
    expanded = {function for function in expanded if isinstance(function, FunctionType)}
    others = ("multi_head_attention_forward", "normalize", "softmin", "gumbel_softmax", "softsign", "tanhshrink")
    expanded.update(getattr(F, name) for name in others)
    return {function: rule for function, rule in rules.items() if function not in expanded}, frozenset(expanded)


_RULES, _EXPANDED = _register()
# Rules that replace those above if pattern_weight is above 0.
_OPEN_RULES: dict[Any, Callable[[Any, Any, Any, float], Any]] = {
    **{function: _open_softmax for *_, function in _functions(("softmax", "_softmax", "_safe_softmax"))},
    F.scaled_dot_product_attention: _open_attention,
}
