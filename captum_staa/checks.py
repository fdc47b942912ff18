"""Checks of an argument's value that hold for every method and metric: each says what came and what was expected."""

from __future__ import annotations

from collections.abc import Collection, Sized
from typing import Any

import numpy as np


def is_number(value: Any) -> bool:
    """Whether it can be compared with a number: an int, a float, or numpy's; but nan is neither above nor below."""
    return isinstance(value, (int, float, np.integer, np.floating)) and bool(value == value)


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether it is an int, or numpy's, of at least so much; True and False are words, and no counts."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= least)


def is_triple(value: Any) -> bool:
    """Whether it holds three things, as ``(t, h, w)`` does; a word and a set hold none in this sense."""
    return isinstance(value, Sized) and hasattr(value, "__getitem__") and not isinstance(value, str) and len(value) == 3


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise unless ``value`` is one of the words."""
    if not isinstance(value, str) or value not in choices:  # an array is in nothing, and a list has no hash
        raise ValueError(f"{name} is one of {', '.join(map(repr, choices))}, but {value!r} came")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise unless ``value`` is a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is a whole number of at least {least}, but {value!r} came")
