"""Checks of an argument's value that hold for every method and metric: each says what came and what was expected."""

from __future__ import annotations

from collections.abc import Collection, Sized
from typing import Any

import numpy as np


def is_number(value: Any) -> bool:
    """Whether it can be compared with a number: an int, a float, or numpy's; but nan is neither above nor below."""
    return isinstance(value, (int, float, np.integer, np.floating)) and bool(value == value)


def is_whole(value: Any) -> bool:
    """Whether it is an int, or numpy's; True and False are words, and no numbers."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_triple(value: Any) -> bool:
    """Whether it holds three things, as ``(t, h, w)`` does; a word and a set hold none in this sense."""
    return isinstance(value, Sized) and hasattr(value, "__getitem__") and not isinstance(value, str) and len(value) == 3


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise unless ``value`` is one of the words."""
    if not isinstance(value, str) or value not in choices:  # an array is in nothing, and a list has no hash
        raise ValueError(f"{name} is one of {', '.join(map(repr, choices))}, got {value!r}")


def check_count(name: str, value: Any, least: int = 1, most: int | None = None, of: str = "") -> None:
    """Raise unless ``value`` is a whole number, an int or numpy's, of ``least`` to ``most``.

    Example:
        >>> check_count("n", 3, most=8, of="frames of a clip")
        >>> check_count("n", 9, most=8, of="frames of a clip")
        Traceback (most recent call last):
        ValueError: n is a whole number of 1 to 8 frames of a clip, got 9

    Args:
        name: of the argument.
        value: what came.
        least: the smallest that is taken.
        most: the largest; None sets no bound.
        of: what is counted, for the message alone.

    Raises:
        TypeError: ``value`` is no whole number.
        ValueError: it is out of range.
    """
    span = f"at least {least}" if most is None else f"{least} to {most}"
    wanted = f"{name} is a whole number of {span}{of and f' {of}'}"
    if not is_whole(value):
        raise TypeError(f"{wanted}, got {value!r} of type {type(value).__name__}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{wanted}, got {value}")


def check_sides(name: str, value: Any, least: int = 1) -> None:
    """Raise unless ``value`` is ``(t, h, w)``, three whole numbers of at least ``least``."""
    if not is_triple(value):
        raise ValueError(f"{name} is (t, h, w), three whole numbers of at least {least}, got {value!r}")
    for axis, side in zip("thw", value, strict=True):
        check_count(f"{axis} of {name} = {value!r}", side, least)
