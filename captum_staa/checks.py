"""Checks of an argument's value that hold for every method and metric: each says what came and what was expected."""

from __future__ import annotations

from collections.abc import Collection


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise unless ``value`` is one of the words."""
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(map(repr, choices))}, but {value!r} came")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise unless ``value`` is a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is a whole number of at least {least}, but {value!r} came")
