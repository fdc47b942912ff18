"""Small sets of test cases that cover all values, or all pairs of values, instead of a full product.

Most faults show with one value or with a pair of values (Kuhn, Wallace, Gallo, IEEE TSE 2004). Products repeat them.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest


def all_pairs(**factors: Iterable[Any]) -> list[dict[str, Any]]:
    """Return rows ``{factor: value}`` such that every two values of two factors occur together in some row.

    Greedy: the next row is the combination that covers most of the missing pairs, the first one of equals. The result
    depends on the order of the values only.

    >>> len(all_pairs(model="abc", dtype="xyz", chunk="12"))  # the product has 18
    9
    """
    names, values = list(factors), [list(column) for column in factors.values()]
    if len(names) == 1:
        return [{names[0]: value} for value in values[0]]
    rows = list(product(*(range(len(column)) for column in values)))
    pairs = {row: {(a, row[a], b, row[b]) for a, b in combinations(range(len(names)), 2)} for row in rows}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        chosen.append(max(rows, key=lambda row: len(pairs[row] & missing)))
        missing -= pairs[chosen[-1]]
    return [{name: values[i][at] for i, (name, at) in enumerate(zip(names, row, strict=True))} for row in chosen]


def each_value(**factors: Iterable[Any]) -> list[dict[str, Any]]:
    """Return rows ``{factor: value}`` such that every value occurs in some row: as many as the longest factor has.

    Enough where the factors do not meet in the code, such as the function that calls a shared check and the kind of
    invalid input.
    """
    columns = {name: list(column) for name, column in factors.items()}
    count = max(map(len, columns.values()))
    return [{name: column[i % len(column)] for name, column in columns.items()} for i in range(count)]


def over_pairs(**factors: Iterable[Any]) -> pytest.MarkDecorator:
    """Run a test over :func:`all_pairs` of its arguments."""
    return _parametrize(factors, all_pairs(**factors))


def over_values(**factors: Iterable[Any]) -> pytest.MarkDecorator:
    """Run a test over :func:`each_value` of its arguments."""
    return _parametrize(factors, each_value(**factors))


def _parametrize(factors: dict[str, Iterable[Any]], rows: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(tuple(factors), [tuple(row.values()) for row in rows])
