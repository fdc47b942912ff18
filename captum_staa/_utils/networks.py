"""The networks that a forward function uses, where they lose a gradient, and which operation in place breaks them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def networks_of(forward_func: object) -> list[nn.Module]:
    """Return the modules that a forward function uses.

    They are searched in the function itself: a module, a method of a module, a ``functools.partial``, the variables
    that a function or a lambda uses, and the attributes of a callable object.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> networks_of(lambda x: net(x).softmax(1)) == [net]
        True
    """
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()

    def visit(value: Any, depth: int) -> None:
        if isinstance(value, nn.Module):
            found[id(value)] = value
            return
        if depth == 0 or id(value) in seen or isinstance(value, (type, ModuleType, Tensor, str)):
            return
        seen.add(id(value))
        for part in _parts(value):
            visit(part, depth - 1)

    visit(forward_func, depth=4)
    return list(found.values())


def _parts(value: Any) -> Iterable[Any]:
    """Return the values that a function, a container or an object refers to."""
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, partial):
        return value.func, *value.args, *value.keywords.values()
    if isinstance(value, MethodType):
        return value.__self__, value.__func__
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        used = [value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return *cells, *defaults, *(part for part in used if isinstance(part, nn.Module) or callable(part))
    return vars(value).values() if hasattr(value, "__dict__") else ()


def _names(code: CodeType) -> set[str]:
    """Return the global names that a function and the functions defined in it use."""
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that is not assigned yet
        return False


_INPLACE = "modified by an inplace operation"


def lost_gradient(forward_func: object, run: Callable[[], Any]) -> str:
    """Return a sentence that names the module in which the gradient of the outputs is lost, or an empty string.

    Example:
        >>> class Rounds(nn.Module):
        ...     def forward(self, x):
        ...         return x.round()
        >>> net = nn.Sequential(nn.Linear(2, 2), Rounds())
        >>> lost_gradient(net, lambda: net(torch.rand(1, 2).requires_grad_()))
        "The gradient is lost in module '1' (Rounds)."

    Args:
        forward_func: the model, or a function that uses it.
        run: function that runs the model on inputs that require a gradient, and returns its outputs.
    """
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    with torch.enable_grad(), _hooked(forward_func, lambda *call: calls.append(call)):
        outputs: Any = run()
    reached: set[int] = set()
    if getattr(outputs, "requires_grad", False):
        taking = [tensor for *_, inside, outside in calls for tensor in (inside, outside) if tensor.requires_grad]
        try:
            slopes: Any = torch.autograd.grad(outputs.sum(), taking, allow_unused=True) if taking else ()
        except RuntimeError:
            return ""
        reached = {
            id(tensor)
            for tensor, slope in zip(taking, slopes, strict=True)
            if slope is not None and bool((slope != 0).any())
        }
    for name, module, inside, outside in reversed(calls):
        lost = id(outside) in reached or not outside.requires_grad
        if lost and inside.requires_grad and id(inside) not in reached:
            return f"The gradient is lost in module {name!r} ({type(module).__name__})."
    last = next((call for call in reversed(calls) if call[3].requires_grad), None)
    return "" if last is None else f"The last module with a gradient is {last[0]!r} ({type(last[1]).__name__})."


def lacks_backward(node: Any) -> bool:
    """Return whether a graph contains an operation without a backward, such as a quantized layer.

    Torch gives such an operation a gradient of zero, with a warning.

    Args:
        node: ``grad_fn`` of the outputs.
    """
    return any("NotImplemented" in each.name() for each in _graph(node))


def leaves_before(value: Tensor) -> list[Tensor]:
    """Return the leaves with a gradient on which a value depends.

    Example:
        >>> first, second = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> [leaf is first for leaf in leaves_before(first.exp() + second.detach())]
        [True]
    """
    if value.grad_fn is None:
        return [value] if value.requires_grad else []
    return [node.variable for node in _graph(value.grad_fn) if hasattr(node, "variable")]


def _graph(node: Any) -> Iterator[Any]:
    """Yield all nodes of a graph that begins with ``grad_fn`` of the outputs."""
    seen, open_nodes = set(), [node]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        open_nodes += [following for following, _ in node.next_functions]


@contextmanager
def inplace_explained(forward_func: object, run: Callable[[], Any]) -> Iterator[None]:
    """Turn torch's error about an operation in place into a ValueError that names the module and the way out.

    Args:
        forward_func: the model, or a function that uses it.
        run: function that runs the model on the inputs of the failing call.
    """
    try:
        yield
    except RuntimeError as error:
        if _INPLACE not in str(error):
            raise
        raise ValueError(
            f"the model must be differentiable, but an operation in place (such as x += y) changes a value that its "
            f"backward pass needs.{_changed_in_place(forward_func, run)} Write it as x = x + y in the model. "
            f"VideoOcclusion, VideoFeatureAblation, RISE and the metrics need no gradient. The error of torch: {error}"
        ) from error


def _changed_in_place(forward_func: object, run: Callable[[], Any]) -> str:
    calls: list[tuple[str, nn.Module, Tensor, int]] = []
    try:
        with torch.enable_grad(), _hooked(forward_func, lambda n, m, i, out: calls.append((n, m, out, out._version))):
            run()
    except Exception:  # the model is only run to name a module in another error
        return ""
    changed = [f"{name!r} ({type(module).__name__})" for name, module, out, version in calls if out._version != version]
    return f" The output of module {' or '.join(changed[:3])} is changed after it is returned." if changed else ""


@contextmanager
def _hooked(forward_func: object, keep: Callable[[str, nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Pass the name, the first input and the first output of every innermost module to ``keep`` as it runs."""
    handles = []
    for network in networks_of(forward_func):
        for name, module in network.named_modules():
            if next(module.children(), None) is None:

                def hook(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                    inside = next((value for value in args if isinstance(value, Tensor)), None)
                    outside = next((value for value in _flat(output) if isinstance(value, Tensor)), None)
                    if inside is not None and outside is not None:
                        keep(name, module, inside, outside)

                handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _flat(output: Any) -> tuple[Any, ...]:
    return tuple(output) if isinstance(output, (tuple, list)) else (output,)
