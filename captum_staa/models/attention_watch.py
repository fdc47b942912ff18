"""Function mode that finds every attention computation of a forward, and what its queries and keys are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from threading import get_ident
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from captum_staa._utils.flex_attention import FLEX_ATTENTION, written_out

SOFTMAX = (
    F.softmax,
    torch.softmax,
    torch.Tensor.softmax,
    torch.special.softmax,
    torch._softmax,
    torch._safe_softmax,
    F.softmin,
)
KIND_OF: dict[Any, str] = {
    F.scaled_dot_product_attention: "sdpa",
    F.multi_head_attention_forward: "mha",
    **dict.fromkeys(SOFTMAX, "softmax"),
}


def softmax_axis(args: Any, kwargs: Any, ndim: int) -> int:
    """Return the axis, 0 to ndim - 1, of a call of a function in :data:`SOFTMAX`."""
    axis = args[1] if len(args) > 1 else kwargs.get("dim")
    if axis is None:  # the rule of F.softmax without dim, which is deprecated
        axis = 0 if ndim in (0, 1, 3) else 1
    return int(axis) % ndim


_FEATURES = 32  # of the projections that are kept of queries, values and other tokens
_PARTS = ("__getitem__", "narrow", "index_select", "slice")
_PRODUCTS = ("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum")


@dataclass
class Site:
    """A tensor of tokens, kept as a random projection of its features.

    Attributes:
        values: ``(L, n, P)`` of an attention, with its leading axes flattened; ``(L, P)`` of another tensor.
        made_by: node of the autograd graph that computed it, or None.
    """

    values: Tensor
    made_by: Any = None


@dataclass
class SeenAttention:
    """One attention computation of a forward.

    Attributes:
        module: the innermost module that ran.
        kind: ``"sdpa"``, ``"mha"`` or ``"softmax"``.
        call: index of the computation among those of the same kind inside the module, in one forward.
        lead: leading axes of the attention matrix, those of heads included.
        shape: ``(Q, N)``.
        axes: the axes of queries and of keys in the matrix that the module computes.
        queries: the queries, or None if the operands of the scores were not seen.
        values: the values, one per key.
        result: what takes the place of the attention's output if attention is replaced.
        changed: whether the matrix that is multiplied by the values is not the result of a softmax over keys, as
            behind talking heads, a mask or a second normalization.
    """

    module: nn.Module
    kind: str
    call: int
    lead: tuple[int, ...]
    shape: tuple[int, int]
    axes: tuple[int, int]
    queries: Site | None
    values: Site
    result: Tensor | None = None
    changed: bool = False


@dataclass
class Tokens:
    """A tensor before the first or after the last attention, which may hold tokens.

    Attributes:
        name: of the module whose output it is, or of the function that returned it.
        shape: of the tensor.
        last, second: projections ``(..., P)`` flattened to ``(L, P)``, with the features on the last axis or on axis 1.
        tensor: the tensor itself, if it requires a gradient.
    """

    name: str
    shape: tuple[int, ...]
    last: Tensor
    second: Tensor
    tensor: Tensor | None = None


@dataclass
class _Pattern:
    """The result of a softmax, until it is multiplied by values."""

    axis: int
    shape: tuple[int, ...]
    queries: Tensor | None  # (L, Q, d)
    counts: dict[nn.Module, int]
    heads: int | None  # of the nn.MultiheadAttention that computes it
    size: float  # of the result
    dtype: torch.dtype


@dataclass
class _Scores:
    """The operands of a product that may be queries times keys."""

    left: tuple[Tensor, str]
    right: tuple[Tensor, str]
    out: str


@dataclass
class Watch(TorchFunctionMode):
    """Function mode that records the attention of one forward.

    Args:
        replace: None runs the attention. Otherwise its result is replaced by what this function of the number of the
            attention and the shape of its result, ``(L, Q, d)``, returns; for zeros, every token stays on its own.
        tail: number of attention computations after which tensors of tokens are recorded as well; None records none.
        open_tail: whether gradients are enabled from the result of the last of these on, which is then a leaf.
    """

    replace: Callable[[int, tuple[int, int, int]], Tensor | None] | None = None
    tail: int | None = None
    open_tail: bool = False
    attention: list[SeenAttention] = field(default_factory=list)
    before: list[Tokens] = field(default_factory=list)
    after: list[Tokens] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._running: list[nn.Module] = []
        self._names: dict[nn.Module, str] = {}
        self._counts: Counter[tuple[nn.Module, str]] = Counter()
        self._scores: Any = WeakIdKeyDictionary()
        self._patterns: Any = WeakIdKeyDictionary()
        self._heads: int | None = None  # of the nn.MultiheadAttention that runs

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[Watch]:
        """Record the forward passes of ``model`` in this thread inside the block."""
        thread, handles = get_ident(), []
        names = self._names = {module: name for name, module in model.named_modules()}

        def enter(module: nn.Module, args: Any) -> None:
            if get_ident() == thread:
                self._running.append(module)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if get_ident() != thread or module not in self._running:
                return
            while self._running.pop() is not module:
                pass
            if not self.attention and isinstance(output, Tensor):
                with torch._C.DisableTorchFunction():  # a hook runs under this mode, unlike its own functions
                    self._keep(self.before, names[module], output)

        for module in names:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        enabled = torch.is_grad_enabled()
        try:
            with self:
                yield self
        finally:
            torch.set_grad_enabled(enabled)
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is FLEX_ATTENTION:
            with self:
                return written_out(*args, **kwargs)
        kind = KIND_OF.get(func)
        if kind == "mha":
            self._count("mha")
            with self, self._multi_head(args[4] if len(args) > 4 else kwargs["num_heads"]):
                return without_dispatch(func)(*args, **kwargs)
        if kind == "sdpa":
            return self._attend(func, args, kwargs)
        if kind == "softmax":
            return self._softmax(func, args, kwargs)
        name = getattr(func, "__name__", "")
        if name in _PRODUCTS:
            return self._product(func, name, args, kwargs)
        output = func(*args, **kwargs)
        if isinstance(output, Tensor) and output.is_floating_point():  # of attributes too, such as x.mT
            self._pass_on(name, args, kwargs, output)
            if self.tail is not None and len(self.attention) >= self.tail:
                self._keep(self.after, name, output)
        return output

    @contextmanager
    def _multi_head(self, heads: int) -> Iterator[None]:
        self._heads = heads
        try:
            yield
        finally:
            self._heads = None

    def count(self, seen: SeenAttention) -> int:
        """Return the number of computations of the same kind in the module, softmax of other things included."""
        return self._counts[seen.module, seen.kind]

    def _count(self, kind: str) -> dict[nn.Module, int]:
        """Count a computation in every module that runs, and return its index in each."""
        found = {module: self._counts[module, kind] for module in self._running}
        for module in found:
            self._counts[module, kind] += 1
        return found

    def _inside_mha(self) -> dict[nn.Module, int]:
        return {module: self._counts[module, "mha"] - 1 for module in self._running}

    def _keep(self, where: list[Tokens], name: str, output: Tensor) -> None:
        if output.ndim < 3 or not output.is_floating_point() or output.numel() == 0:
            return
        last = _projected(output.detach()).flatten(0, -2)
        second = _projected(output.detach().movedim(1, -1)).flatten(0, -2)
        where.append(Tokens(name, tuple(output.shape), last, second, output if output.requires_grad else None))

    # --- what passes on the marks of scores and patterns --------------------------------------------------------------

    def _pass_on(self, name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        for marks in (self._scores, self._patterns):
            part = name in _PARTS and marks is self._patterns  # without the columns of learned keys, for example
            for value in _tensors((*args, *kwargs.values())):
                if (part or value.numel() == output.numel()) and value in marks:
                    marks[output] = marks[value]
                    break

    # --- one attention ------------------------------------------------------------------------------------------------

    def _attend(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        def operands(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
            return query, value

        query, value = operands(*args, **kwargs)
        if query.ndim < 3 or not self._running:
            return func(*args, **kwargs)
        kind = "sdpa" if self._heads is None else "mha"
        counts = self._count("sdpa") if self._heads is None else self._inside_mha()
        lead = tuple(query.shape[:-2])
        if value.ndim > 2 and lead and value.shape[-3] != lead[-1]:  # heads share keys and values
            value = value.repeat_interleave(lead[-1] // value.shape[-3], -3)
        value = value.expand(*lead, *value.shape[-2:])
        seen = self._record(kind, counts, lead, (-2, -1), query.flatten(0, -3), value.flatten(0, -3))
        if self.replace is None:
            return self._opened(func(*args, **kwargs))
        return self._replaced(seen, value.shape[-1], query).view(*query.shape[:-1], value.shape[-1])

    def _softmax(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        output: Tensor = func(*args, **kwargs)
        if output.ndim < 3 or not self._running:
            return output
        counts = self._count("softmax") if self._heads is None else self._inside_mha()
        axis, scores = softmax_axis(args, kwargs, output.ndim), args[0] if args else kwargs["input"]
        found: _Scores | None = self._scores.get(scores)
        queries = None if found is None else _queries(found, tuple(scores.shape), axis)
        self._patterns[output] = _Pattern(
            axis, tuple(output.shape), queries, counts, self._heads, self._size(output), output.dtype
        )
        return output

    def _product(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        output = func(*args, **kwargs)
        factors = _factors(name, args, kwargs)
        if factors is None or not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        (left, of_left), (right, of_right), of_out = factors
        for (pattern, of_pattern), (values, of_values) in (
            ((left, of_left), (right, of_right)),
            ((right, of_right), (left, of_left)),
        ):
            found: _Pattern | None = self._patterns.get(pattern)
            if found is not None:
                return self._explicit(found, (pattern, of_pattern), (values, of_values), (output, of_out))
        for scores in (left, right):
            if scores in self._scores and _is_probability(scores, right is scores):
                self.unread.append(self._name())  # a softmax by hand
        if output.ndim >= 3:
            self._scores[output] = _Scores((left, of_left), (right, of_right), of_out)
        return output

    def _explicit(
        self, found: _Pattern, pattern: tuple[Tensor, str], values: tuple[Tensor, str], output: tuple[Tensor, str]
    ) -> Tensor:
        """Record the product of attention probabilities and values."""
        (_, of_pattern), (_, of_values), (result, of_out) = pattern, values, output
        keys = [letter for letter in of_pattern if letter in of_values and letter not in of_out]
        queries = [letter for letter in of_pattern if letter in of_out and letter not in of_values]
        features = [letter for letter in of_values if letter not in of_pattern]
        lead = [letter for letter in of_pattern if letter not in (*keys[:1], *queries[:1])]
        if not (len(keys) == len(queries) == len(features) == 1) or not set(lead) <= set(of_out):
            if result.shape == pattern[0].shape:  # a product with other things, such as one that mixes heads
                self._patterns[result] = found
            else:
                self.unread.append(self._name())
            return result
        sizes = dict(zip(of_pattern, pattern[0].shape, strict=True))
        standard = _standard(*values, lead, (keys[0], features[0]), sizes)
        place = of_pattern.index(queries[0])
        same = len(found.shape) == len(of_pattern) and found.axis == of_pattern.index(keys[0])
        query_axis = place if same else (found.axis - 1 if found.axis == len(found.shape) - 1 else found.axis + 1)
        axes = (query_axis - len(found.shape), found.axis - len(found.shape))
        kind = "softmax" if found.heads is None else "mha"
        taken = found.queries
        if taken is not None and tuple(taken.shape[:2]) != (len(standard), sizes[queries[0]]):
            taken = None
        sides = [sizes[letter] for letter in lead]
        if found.heads is not None and len(sides) == 1:
            sides = [sides[0] // found.heads, found.heads]
        seen = self._record(kind, found.counts, tuple(sides), axes, taken, standard)
        seen.shape = (sizes[queries[0]], sizes[keys[0]])
        seen.changed = self._is_changed(pattern[0], of_pattern.index(keys[0]), found)
        if self.replace is None:
            return self._opened(result)
        replaced = self._replaced(seen, result.shape[of_out.index(features[0])], result)  # (L, Q, d)
        order = [*lead, queries[0], features[0]]
        replaced = replaced.view([result.shape[of_out.index(letter)] for letter in order])
        return replaced.permute([order.index(letter) for letter in of_out]).contiguous()

    def _size(self, matrix: Tensor) -> float:
        """Return the norm, which no reordering changes; 0 if attention is replaced, so that nothing is compared."""
        return 0.0 if self.replace else float(torch.linalg.vector_norm(matrix.detach(), dtype=_wide(matrix)))

    def _is_changed(self, matrix: Tensor, axis: int, found: _Pattern) -> bool:
        """Return whether rows do not sum to 1 over the axis of keys, or the size is not that of the softmax's result.

        Rows whose keys are all masked may be 0.
        """
        if self.replace:
            return False
        close = max(1e-4, *(2 * torch.finfo(dtype).eps for dtype in (matrix.dtype, found.dtype)))
        sums = matrix.detach().sum(axis, dtype=_wide(matrix))
        whole = ((sums - 1).abs() < close) | (sums == 0)
        return not bool(whole.all()) or abs(self._size(matrix) - found.size) > close * found.size

    def _opened(self, result: Tensor) -> Tensor:
        if not self.open_tail or len(self.attention) != self.tail:
            return result
        torch.set_grad_enabled(True)  # until the end of :meth:`watching`
        return result.detach().requires_grad_().clone()

    def _record(
        self,
        kind: str,
        counts: dict[nn.Module, int],
        lead: tuple[int, ...],
        axes: tuple[int, int],
        queries: Tensor | None,
        values: Tensor,
    ) -> SeenAttention:
        module = next(m for m in reversed(self._running) if m in counts)
        asked = None if queries is None else Site(_projected(queries.detach()), queries.grad_fn)
        shape = (-1 if queries is None else queries.shape[1], values.shape[1])
        site = Site(_projected(values.detach()), values.grad_fn)
        self.attention.append(SeenAttention(module, kind, counts[module], lead, shape, axes, asked, site))
        return self.attention[-1]

    def _replaced(self, seen: SeenAttention, features: int, like: Tensor) -> Tensor:
        """Return what takes the place of the result, ``(L, Q, d)``. With gradients enabled, it is a leaf."""
        assert self.replace is not None
        shape = (len(seen.values.values), seen.shape[0], features)
        added = self.replace(len(self.attention) - 1, shape)
        with torch.no_grad():
            result = torch.zeros(shape, dtype=like.dtype, device=like.device)
            result = result if added is None else added.to(result)
        if torch.is_grad_enabled():
            seen.result = result.requires_grad_()
            result = result.clone()  # models may write into it
        return result

    def _name(self) -> str:
        return self._names[self._running[-1]] if self._running else ""


@cache
def without_dispatch(func: FunctionType) -> FunctionType:
    """Return a copy of a function of torch that does not dispatch to function modes, but its operations do."""
    never = dict.fromkeys(
        ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), lambda *_: False
    )
    copy = FunctionType(
        func.__code__, {**func.__globals__, **never}, func.__name__, func.__defaults__, func.__closure__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _is_probability(values: Tensor, over_rows: bool) -> bool:
    """Return whether a factor of a product is a probability over the axis that the product sums over."""
    with torch.no_grad():
        values = values.detach().float()
        sums = values.sum(-2 if over_rows else -1)
        return bool((values >= 0).all() and ((sums - 1).abs() < 1e-2).all())


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _projected(values: Tensor) -> Tensor:
    """Return a random projection of the last axis to at most 32 features, in float32."""
    count = values.shape[-1]
    values = values.float()
    if count <= _FEATURES:
        return values.clone()
    generator = torch.Generator().manual_seed(count)
    matrix = torch.randn(count, _FEATURES, generator=generator) / count**0.5
    return values @ matrix.to(values.device)


def _factors(name: str, args: Any, kwargs: Any) -> tuple[tuple[Tensor, str], tuple[Tensor, str], str] | None:
    """Return both factors of a product with a letter per axis, and the letters of the result, or None."""
    if name == "einsum":
        return _einsum_factors(*args)
    if name == "baddbmm":
        left, right = (*args[1:3], *(kwargs[key] for key in ("batch1", "batch2") if key in kwargs))[:2]
    elif name == "__rmatmul__":
        right, left = args
    else:
        left, right = (*args, *(kwargs[key] for key in ("other", "mat2", "tensor2") if key in kwargs))[:2]
    if min(left.ndim, right.ndim) < 2:
        return None
    lead = "abcdefg"[: max(left.ndim, right.ndim) - 2]
    return (
        (left, f"{lead[len(lead) + 2 - left.ndim :]}xy"),
        (right, f"{lead[len(lead) + 2 - right.ndim :]}yz"),
        f"{lead}xz",
    )


def _einsum_factors(equation: Any, *operands: Any) -> tuple[tuple[Tensor, str], tuple[Tensor, str], str] | None:
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    left, comma, right = inputs.partition(",")
    if not arrow or not comma:
        return None
    hidden = max(
        operand.ndim - len(spec.replace("...", "")) for operand, spec in zip(operands, (left, right), strict=True)
    )
    letters = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in equation][:hidden]

    def full(spec: str, ndim: int) -> str:
        shown = len(spec.replace("...", ""))
        return spec.replace("...", "".join(letters[len(letters) - (ndim - shown) :]) if ndim > shown else "")

    out = out.replace("...", "".join(letters))
    left, right = full(left, operands[0].ndim), full(right, operands[1].ndim)
    if len({*left}) != len(left) or len({*right}) != len(right):
        return None
    return (operands[0], left), (operands[1], right), out


def _standard(
    values: Tensor, letters: str, lead: Sequence[str], last: tuple[str, str], sizes: dict[str, int]
) -> Tensor:
    """Return an operand as ``(L, n, d)``; axes that it does not have, as for heads that share keys, are repeated."""
    own = [letter for letter in lead if letter in letters]
    values = values.permute([letters.index(letter) for letter in (*own, *last)])
    for place, letter in enumerate(lead):
        if letter not in letters:
            values = values.unsqueeze(place)
    shape = values.shape[-2:]
    return values.expand(*(sizes[letter] for letter in lead), *shape).reshape(-1, *shape)


def _queries(scores: _Scores, shape: tuple[int, ...], axis: int) -> Tensor | None:
    """Return the queries ``(L, Q, d)`` of the scores that a softmax over ``axis`` gets, or None."""
    out = scores.out
    if axis < len(shape) - 2:
        if len(shape) != len(out):
            return None
        key, query = out[axis], out[axis + 1 if axis + 1 < len(out) else axis - 1]
    else:
        key, query = (out[-1], out[-2]) if axis == len(shape) - 1 else (out[-2], out[-1])
    for (operand, letters), (other, of_other) in ((scores.left, scores.right), (scores.right, scores.left)):
        if query in letters and key in of_other and query not in of_other and key not in letters:
            lead = [letter for letter in out if letter not in (query, key)]
            features = [letter for letter in letters if letter not in out]
            if len(features) != 1:
                return None
            sizes: dict[str, int] = {}
            for letter in lead:  # axes of size 1 are broadcast
                sizes[letter] = max(
                    part.shape[spec.index(letter)]
                    for spec, part in ((letters, operand), (of_other, other))
                    if letter in spec
                )
            return _standard(operand, letters, lead, (query, features[0]), sizes)
    return None
