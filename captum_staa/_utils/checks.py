"""Checks of argument values. Every error message says what was expected and what was received."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sized
from typing import Any

import numpy as np
import torch


def is_number(value: Any) -> bool:
    """Return whether ``value`` is an int or a float of Python or NumPy, and not nan."""
    return isinstance(value, (int, float, np.integer, np.floating)) and bool(value == value)


def is_integer(value: Any) -> bool:
    """Return whether ``value`` is an int of Python or NumPy. Booleans do not count as integers."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_triple(value: Any) -> bool:
    """Return whether ``value`` is a sequence of three items, such as ``(t, h, w)``. Strings and sets are not."""
    return isinstance(value, Sized) and hasattr(value, "__getitem__") and not isinstance(value, str) and len(value) == 3


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ValueError unless ``value`` is one of the strings in ``choices``."""
    if not isinstance(value, str) or value not in choices:  # arrays and lists cannot be compared or hashed
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def known_name(what: str, name: str, names: Iterable[str]) -> str:
    """Return the one of ``names`` that is meant. Case, spaces and punctuation do not matter.

    Example:
        >>> known_name("a method", "guided-backprop", ["Saliency", "GuidedBackprop"])
        'GuidedBackprop'
        >>> known_name("a method", "salency", ["Saliency", "GuidedBackprop"])
        Traceback (most recent call last):
        ValueError: a method must be one of Saliency, GuidedBackprop, got 'salency'. Did you mean Saliency?

    Raises:
        ValueError: there is no such name.
    """
    simple = {simplified(known): known for known in names}
    if simplified(name) not in simple:
        close = [simple[found] for found in difflib.get_close_matches(simplified(name), simple)]
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"{what} must be one of {', '.join(simple.values())}, got {name!r}.{hint}")
    return simple[simplified(name)]


def simplified(name: str) -> str:
    """Return the letters and digits of a name in lower case, so that ``guided-backprop`` is ``GuidedBackprop``."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def check_count(name: str, value: Any, least: int = 1, most: int | None = None, of: str = "") -> None:
    """Raise unless ``value`` is an integer (of Python or NumPy) from ``least`` to ``most``.

    Example:
        >>> check_count("n", 3, most=8, of="frames of a clip")
        >>> check_count("n", 9, most=8, of="frames of a clip")
        Traceback (most recent call last):
        ValueError: n must be an integer from 1 to 8 (frames of a clip), got 9

    Args:
        name: name of the argument.
        value: the value to check.
        least: the smallest allowed value.
        most: the largest allowed value. None sets no upper bound.
        of: what is counted. It is used only in the message.

    Raises:
        TypeError: ``value`` is not an integer.
        ValueError: ``value`` is out of range.
    """
    span = f"of at least {least}" if most is None else f"from {least} to {most}"
    expected = f"{name} must be an integer {span}{of and f' ({of})'}"
    if not is_integer(value):
        raise TypeError(f"{expected}, got {value!r} of type {type(value).__name__}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{expected}, got {value}")


def check_sides(name: str, value: Any, least: int = 1) -> None:
    """Raise unless ``value`` is ``(t, h, w)``, three integers of at least ``least``."""
    if not is_triple(value):
        raise ValueError(f"{name} must be (t, h, w), three integers of at least {least}, got {value!r}")
    for axis, side in zip("thw", value, strict=True):
        check_count(f"{axis} of {name} = {value!r}", side, least)


def generator_or_seeded(generator: torch.Generator | None) -> torch.Generator:
    """Return ``generator``, or a new CPU generator seeded with 0 if it is None. PyTorch's global generator is not used.

    Example:
        >>> first, again = (torch.rand(1, generator=generator_or_seeded(None)) for _ in range(2))
        >>> bool(first == again)
        True

    Raises:
        TypeError: ``generator`` is neither a ``torch.Generator`` nor None.
    """
    if generator is None:
        return torch.Generator().manual_seed(0)
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {generator!r}. Pass torch.Generator().manual_seed(1)."
        )
    return generator
