"""Autograd functions with the gradient of a linear form, and a check that a recorded graph is linear in its leaf."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class FrozenRatio(torch.autograd.Function):
    """Function whose gradient is that of ``x`` times constant factors plus a constant. The factors broadcast.

    ``evaluate`` returns the value and the factors.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, evaluate: Callable[[Tensor], tuple[Tensor, ...]]) -> Tensor:
        value, *factors = evaluate(x)
        ctx.save_for_backward(*factors)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        for factor in ctx.saved_tensors:
            gradient = gradient * factor
        return gradient, None


class FrozenSquash(FrozenRatio):
    """Output of tanh or erf: a gate in a product, unless the other factor is a :class:`FrozenGate`."""


class FrozenGate(FrozenRatio):
    """Output of sigmoid or a similar function: a gate in a product."""


class _ScaledGradient(torch.autograd.Function):
    """The identity, with a gradient times a weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.weight, None


class SharedFactor(_ScaledGradient):
    """A factor that has an equal share of a product: the weight is one over the number of factors."""


class PatternShare(_ScaledGradient):
    """Queries, keys or scores of an attention pattern that keeps a part of its gradient."""


class Pattern(torch.autograd.Function):
    """The identity. It marks an attention pattern that keeps a gradient, so that a product can recognize it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Attended(torch.autograd.Function):
    """The identity. It marks the output of fused attention, and refers to its values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class FrozenLayerNorm(torch.autograd.Function):
    """Layer norm with a constant scale. The mean that it subtracts is not a constant."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        value, _, scale = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(scale, weight)
        ctx.dims = tuple(range(-len(shape), 0))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scale, weight = ctx.saved_tensors
        of_bias = gradient.flatten(0, -len(ctx.dims) - 1).sum(0) if ctx.needs_input_grad[3] else None
        weighted = gradient.clone() if weight is None else gradient * weight
        centered = weighted.sub_(weighted.mean(ctx.dims, keepdim=True))  # in place: no new memory
        return centered.mul_(scale), None, None, of_bias, None


# --- analysis of the graph -----------------------------------------------------------------------------------

PATTERN = 3  # rank of a pattern among gates
# Names of autograd nodes, without "Backward" and the number.
_SHAPE = re.compile(
    "Alias|AsStrided|Clone|Copy|Expand|Permute|ReshapeAlias|Select|Slice|Split|SplitWithSizes|Squeeze|T|ToCopy|"
    "Transpose|Unbind|UnsafeSplit|UnsafeView|Unsqueeze|View"
)
_AFFINE = re.compile(f"{_SHAPE.pattern}|Add|Div|Mul|Neg|Rsub|Sub")  # what may lie between a gate and a product
_LINEAR = re.compile(  # or piecewise linear, such as max pooling
    f"{_AFFINE.pattern}|Attended|Pattern|FrozenGate|FrozenLayerNorm|FrozenRatio|FrozenSquash|SharedFactor|"
    "(Adaptive)?(Avg|Max)Pool[123]D(WithIndices)?|(Reflection|Replication|Constant)Pad(Nd|[123]D)|Upsample\\w+|Fft\\w+|"
    "Index\\w*|Masked(Fill|Scatter|Select)|(Native|Cudnn|Miopen)BatchNorm|NativeDropout|Gather|Scatter(Add)?|"
    "Abs|Clamp(Max|Min)?|LeakyRelu|PreluKernel|Relu|Threshold|Amax|Amin|Max|Maximum|Min|Minimum|Sort|Topk|"
    "Sum|Mean|Cumsum|Trace|Cat|Stack|CopySlices|Diagonal|Flip|Repeat|Roll|Rot90|Tril|Triu|Unfold|Im2Col|Col2Im|"
    "Pixel(Unshuffle|Shuffle)|Addcdiv|Lerp|NanToNum|Real|ViewAsComplex|ViewAsReal|Where"
)
_PRODUCTS = {  # which inputs of a node are factors
    **dict.fromkeys(("Bmm", "Dot", "Linear", "Mm", "Mul", "Mv"), (0, 1)),
    **dict.fromkeys(("Convolution", "CudnnConvolution", "MkldnnConvolution", "MpsConvolution"), (0, 1)),
    **dict.fromkeys(("Addbmm", "Addcmul", "Addmm", "Addmv", "Baddbmm"), (1, 2)),
}


class Operation(NamedTuple):
    """An operation that autograd has recorded: its name, and its place in the order of recording, -1 for a leaf.

    It is read while the graph lives. The node of a custom function must not be used after that: in PyTorch 2.6, asking
    it for its number ends the process.
    """

    name: str
    number: int

    @classmethod
    def of(cls, node: Any) -> Operation:
        if hasattr(node, "variable"):
            return cls("a parameter that requires a gradient", -1)
        return cls(str(node.name()), node._sequence_nr())


def _kind(node: Any) -> str:
    return _short(node.name())


@cache
def _short(name: str) -> str:
    """Shorten ``MulBackward0`` and ``torch::autograd::CopyBackwards`` to ``Mul`` and ``Copy``."""
    return re.sub(r"Backwards?\d*$", "", name.rsplit("::", 1)[-1])


@cache
def _is_listed(kind: str) -> bool:
    return _LINEAR.fullmatch(kind) is not None


def gate_rank(value: Tensor) -> int:
    """Return 3 for a :class:`Pattern`, 2 for a :class:`FrozenGate`, 1 for a :class:`FrozenSquash`, else 0.

    The rank does not change if the value is shifted, scaled or reshaped. Patterns may also be mixed with constant
    weights and normalized, as the heads of attention are in some networks.
    """
    return _gate_rank(value.grad_fn)


def _gate_rank(node: Any) -> int:
    mixed = False
    while node is not None:
        kind = _kind(node)
        if not _AFFINE.fullmatch(kind):
            if kind not in _PRODUCTS and kind != "FrozenLayerNorm":
                break
            mixed = True
        open_edges = [edge for edge, _ in node.next_functions if edge is not None]
        if kind == "Copy":  # into a tensor that has its own history
            open_edges = open_edges[-1:]
        node = open_edges[0] if len(open_edges) == 1 else None
    rank = 0 if node is None else {"Pattern": PATTERN, "FrozenGate": 2, "FrozenSquash": 1}.get(_kind(node), 0)
    return rank if rank == PATTERN or not mixed else 0


def nonlinear_operations(root: Any, *leaves: Tensor) -> Iterator[Operation]:
    """Yield the operations below ``root`` that are not known to be linear in the leaves.

    A product of two tensors that both depend on them is linear if :class:`SharedFactor` marks its factors, or if
    one is a :class:`Pattern`. Other leaves, such as parameters that require a gradient, count as nonlinear,
    because the rules cannot distinguish them from the leaves.
    """
    for node, output in _nodes(root):
        kind = _kind(node)
        if hasattr(node, "variable"):
            if not any(node.variable is leaf for leaf in leaves):
                yield Operation.of(node)
        elif kind in ("VarMean", "StdMean") and output == 1:  # the mean
            continue
        elif not _is_linear(kind, [edge for edge, _ in node.next_functions]):
            yield Operation.of(node)


def reaches(root: Any, *leaves: Tensor) -> bool:
    """Return whether ``root`` depends on one of the leaves by a path that does not pass a pattern."""
    return any(getattr(node, "variable", None) is leaf for node, _ in _nodes(root) for leaf in leaves)


def _nodes(root: Any) -> Iterator[tuple[Any, int]]:
    """Yield the nodes below ``root`` and the index of the output that is used. Nodes below a pattern are left out."""
    seen, stack = set(), [(root, 0)]
    while stack:
        node, output = stack.pop()
        if node is None or (node, output) in seen:
            continue
        seen.add((node, output))
        yield node, output
        kind = _kind(node)
        if kind == "Attended":  # its second input is the values
            stack += node.next_functions[1:]
        elif kind != "Pattern":
            stack += node.next_functions


def _is_linear(kind: str, edges: list[Any]) -> bool:
    if kind in _PRODUCTS:
        factors = _factors(kind, edges)
        return (
            len(factors) < 2
            or all(map(_is_shared, factors))
            or sum(_gate_rank(factor) == PATTERN for factor in factors) == 1
        )
    if kind == "Div":
        return len(edges) < 2 or edges[1] is None
    if kind.startswith("ScaledDotProduct"):
        return edges[0] is None and edges[1] is None
    return _is_listed(kind)


def _factors(kind: str, edges: list[Any]) -> list[Any]:
    return [edges[place] for place in _PRODUCTS[kind] if place < len(edges) and edges[place] is not None]


def _is_shared(node: Any) -> bool:
    kind = _kind(node)
    while _SHAPE.fullmatch(kind) or kind == "Sum":
        *_, node = (edge for edge, _ in node.next_functions if edge is not None)
        kind = _kind(node)
    edges = [edge for edge, _ in node.next_functions]
    return kind == "SharedFactor" or (kind in _PRODUCTS and all(map(_is_shared, _factors(kind, edges))))  # in an einsum
