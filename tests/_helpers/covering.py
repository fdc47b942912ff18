"""Fewer test cases than the product of all parameters, with every value, or every pair of values, in some case.

Most faults show with one value or with a pair of values (Kuhn, Wallace, Gallo, IEEE TSE 2004). The decorators stand
above the ``parametrize`` marks of a test::

    @over_pairs                                             # 6 cases instead of 12
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("layout", ["BCTHW", "BTCHW"])
    @pytest.mark.parametrize("name", ["videomae", "vivit", "timesformer"])
    def test_...
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest

Test = Callable[..., None]


def all_pairs(columns: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Return rows with one value of each column, such that every two values of two columns meet in some row.

    Greedy: the next row is the combination that covers most of the missing pairs, the first one of equals. The result
    depends on nothing but the order of the values.

    >>> len(all_pairs(["abc", "xyz", "12"]))  # the product has 18
    9
    """
    if len(columns) == 1:
        return [(value,) for value in columns[0]]
    rows = list(product(*(range(len(column)) for column in columns)))
    pairs = {row: {(a, row[a], b, row[b]) for a, b in combinations(range(len(columns)), 2)} for row in rows}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        chosen.append(max(rows, key=lambda row: len(pairs[row] & missing)))
        missing -= pairs[chosen[-1]]
    return [tuple(column[at] for column, at in zip(columns, row, strict=True)) for row in chosen]


def each_value(columns: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Return rows with one value of each column, such that every value is in some row: as many as the longest has.

    >>> each_value(["abc", "12"])
    [('a', '1'), ('b', '2'), ('c', '1')]
    """
    return [tuple(column[i % len(column)] for column in columns) for i in range(max(map(len, columns)))]


def over_pairs(test: Test) -> Test:
    """Run a test on all pairs of values of its parameters."""
    return _combined(test, all_pairs)


def over_values(test: Test) -> Test:
    """Run a test on all values of its parameters, which do not meet in the code: a shared check and its callers."""
    return _combined(test, each_value)


def in_one_case(*names: str) -> Callable[[Test], Test]:
    """Run a test over a table in one case: all its parameters, or those named. A failure names the row.

    For parameters that ask one question, such as which invalid arguments raise.
    """

    def decorate(test: Test) -> Test:
        marks, others = _parameters(test, names)
        arguments = [name for mark in marks for name in _names(mark)]
        rows = [sum(row, ()) for row in product(*map(_rows, marks))]

        @functools.wraps(test)
        def run(**given: Any) -> None:
            for row in rows:
                try:
                    test(**dict(zip(arguments, row, strict=True)), **given)
                except (Exception, pytest.fail.Exception) as error:
                    raise AssertionError(f"{dict(zip(arguments, row, strict=True))}: {error}") from error

        whole = inspect.signature(test)
        left = [parameter for name, parameter in whole.parameters.items() if name not in arguments]
        run.__signature__ = whole.replace(parameters=left)  # type: ignore[attr-defined]
        run.pytestmark = others  # type: ignore[attr-defined]
        return run

    return decorate


def _combined(test: Test, choose: Callable[[Sequence[Sequence[Any]]], list[tuple[Any, ...]]]) -> Test:
    marks, others = _parameters(test)
    rows = [pytest.param(*sum(row, ())) for row in choose([_rows(mark) for mark in marks])]
    test.pytestmark = others  # type: ignore[attr-defined]
    return pytest.mark.parametrize(tuple(name for mark in marks for name in _names(mark)), rows)(test)


def _parameters(test: Test, names: Iterable[str] = ()) -> tuple[list[pytest.Mark], list[pytest.Mark]]:
    """Return the ``parametrize`` marks of a test, or those with some of the names, and its other marks."""
    every = list(getattr(test, "pytestmark", []))
    marks = [mark for mark in every if mark.name == "parametrize" and (not names or {*names} & {*_names(mark)})]
    assert marks and {*names} <= {name for mark in marks for name in _names(mark)}, f"{test.__name__} lacks parameters"
    return marks, [mark for mark in every if mark not in marks]


def _names(mark: pytest.Mark) -> list[str]:
    return [name.strip() for name in mark.args[0].split(",")] if isinstance(mark.args[0], str) else list(mark.args[0])


def _rows(mark: pytest.Mark) -> list[tuple[Any, ...]]:
    """Return the rows of a table, each as a tuple of values."""
    found = []
    for row in mark.args[1]:
        assert not getattr(row, "marks", ()), "a row with marks must stay a case"
        if hasattr(row, "marks"):  # pytest.param
            found.append(tuple(row.values))
        else:
            found.append((row,) if len(_names(mark)) == 1 else tuple(row))
    return found
