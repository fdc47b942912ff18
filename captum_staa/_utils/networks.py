"""The modules that a forward function uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

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
