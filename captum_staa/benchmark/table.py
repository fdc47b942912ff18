"""The numbers of a comparison: arrays of clips by metrics by methods, which are read as tidy rows."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from captum_staa.benchmark.records import ALL, ERROR, LEFT_OUT, Entry, Row


class Table(Sequence[Row]):
    """Tidy rows that are made when they are read. A number takes nine bytes here, and some hundred in a row.

    The order is: clips; for each clip its methods; for each method first its reasons, then its metrics. Rows about all
    clips are the last.

    Example:
        >>> rows = [Row("a", "STAA", "auroc", 0.9), Row("b", "STAA", "error", np.nan, "out of memory")]
        >>> table = Table.of(rows, ["STAA"], ["auroc"])
        >>> table.numbers.shape, len(table), table[0].value, table.reasons[0].clip
        ((2, 1, 1), 2, 0.9, 'b')

    Args:
        clips: names of N clips.
        methods: names of M methods and controls.
        metrics: names of K metrics.
        numbers: ``(N, K, M)`` float64; nan if a number is undefined or missing.
        present: ``(N, K, M)`` bool, False if a number is missing.
        reasons: rows that hold a reason instead of a number, by line of the clip, in the order of the methods; those
            about all clips have the line N.
    """

    def __init__(
        self,
        clips: Sequence[str],
        methods: Sequence[str],
        metrics: Sequence[str],
        numbers: NDArray[np.float64],
        present: NDArray[np.bool_],
        reasons: dict[int, list[Row]],
    ) -> None:
        self.clips, self.methods, self.metrics = list(clips), list(methods), list(metrics)
        self.numbers, self.present, self._reasons = numbers, present, reasons

    @classmethod
    def of(cls, rows: Iterable[Row], methods: Sequence[str], metrics: Sequence[str]) -> Table:
        """Return the table of a list of rows."""
        rows = list(rows)
        clips = list(dict.fromkeys(row.clip for row in rows if row.clip != ALL))
        lines, depths, columns = ({name: at for at, name in enumerate(names)} for names in (clips, metrics, methods))
        shape = (len(clips), len(metrics), len(methods))
        numbers, present = np.full(shape, np.nan), np.zeros(shape, bool)
        reasons = defaultdict(list)
        for row in rows:
            if row.reason:
                reasons[lines.get(row.clip, len(clips))].append(row)
            else:
                at = lines[row.clip], depths[row.metric], columns[row.method]
                numbers[at], present[at] = row.value, True
        return cls(clips, methods, metrics, numbers, present, dict(reasons))

    def with_arrays(self, numbers: NDArray[np.float64], present: NDArray[np.bool_]) -> Table:
        """Return the same table with other arrays."""
        return Table(self.clips, self.methods, self.metrics, numbers, present, self._reasons)

    @cached_property
    def reasons(self) -> list[Row]:
        """All rows that hold a reason instead of a number."""
        return [row for line in sorted(self._reasons) for row in self._reasons[line]]

    def __len__(self) -> int:
        return self._ends[-1]

    def __iter__(self) -> Iterator[Row]:
        for line in range(len(self.clips) + 1):
            yield from self._of(line)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        line = bisect_right(self._ends, at)
        return list(self._of(line))[at - (self._ends[line - 1] if line else 0)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def _of(self, line: int) -> Iterator[Row]:
        """Yield the rows of one clip; for the line after the last clip, those about all clips."""
        reasons = self._reasons.get(line, [])
        if line == len(self.clips):
            yield from reasons
            return
        yield from (row for row in reasons if row.method == ALL)
        clip, numbers, present = self.clips[line], self.numbers[line].T.tolist(), self.present[line].T.tolist()
        for column, method in enumerate(self.methods):
            yield from (row for row in reasons if row.method == method)
            for metric, value, there in zip(self.metrics, numbers[column], present[column], strict=True):
                if there:
                    yield Row(
                        clip, method, metric, value if value == value else np.nan
                    )  # rows of equal tables are equal

    @cached_property
    def _ends(self) -> list[int]:
        """Number of rows up to the end of each clip, and of the rows about all clips."""
        counts = [*self.present.sum((1, 2)).tolist(), 0]
        for line, reasons in self._reasons.items():
            counts[line] += len(reasons)
        return list(accumulate(counts))


class TableBuilder:
    """Makes a :class:`Table` from entries in any order.

    Args:
        methods: names of methods and controls.
        metrics: names of metrics.
        name_of: returns the name of the clip of an index. Entries of another clip are ignored.
        count: number of clips, if it is known.
    """

    def __init__(
        self, methods: Sequence[str], metrics: Sequence[str], name_of: Callable[[int], str], count: int | None = None
    ) -> None:
        self._methods, self._metrics, self._name_of = list(methods), list(metrics), name_of
        self._columns = {method: at for at, method in enumerate((*methods, ALL))}
        self._numbers = np.empty((0, len(metrics), len(methods)))
        self._present = np.empty((0, len(metrics), len(methods)), bool)
        self._state = np.empty((0, len(self._columns)), np.uint8)  # 0 missing, 1 incomplete, 2 complete
        self._reasons: dict[int, dict[int, list[Row]]] = defaultdict(dict)  # by index, then by column
        self._grow(count or 0)

    def add(self, entry: Entry) -> bool:
        """Add an entry, unless it is of an unknown method, of another clip, or there is a complete one already.

        Returns:
            Whether it was added.
        """
        column = self._columns.get(entry.method)
        if column is None or entry.clip != self._name_of(entry.index):
            return False
        if entry.index >= len(self._state):
            self._grow(max(entry.index + 1, 2 * len(self._state)))
        if self._state[entry.index, column] == 2:
            return False
        self._state[entry.index, column] = 2 if entry.complete else 1
        if entry.method != ALL:  # in the entry of a clip, "rivals" is not a score
            values = entry.values
            self._numbers[entry.index, :, column] = [values.get(metric, np.nan) for metric in self._metrics]
            self._present[entry.index, :, column] = [metric in values for metric in self._metrics]
        reasons = [(ERROR, entry.error), (LEFT_OUT, entry.left_out)]
        reasons += [(ERROR, f"{k}: {entry.reasons[k]}") for k in self._metrics if k in entry.reasons]
        rows = [Row(entry.clip, entry.method, kind, np.nan, reason) for kind, reason in reasons if reason]
        self._reasons[entry.index].pop(column, None)
        if rows:
            self._reasons[entry.index][column] = rows
        return True

    def leave_out(self, index: int, reason: str) -> None:
        """Add a reason about all methods of one clip."""
        row = Row(self._name_of(index), ALL, LEFT_OUT, np.nan, reason)
        self._reasons[index].setdefault(self._columns[ALL], []).append(row)

    def keep_first(self, metric: str) -> None:
        """Keep only the number of the first clip, for each method."""
        present = self._present[:, self._metrics.index(metric)]  # (N, M)
        later = present & (present.cumsum(0) > 1)
        self._numbers[:, self._metrics.index(metric)][later] = np.nan
        present[later] = False

    def table(self, general: Iterable[Row] = ()) -> Table:
        """Return the table of the clips that have entries.

        Args:
            general: rows about all clips.
        """
        there: NDArray[np.int64] = np.flatnonzero(self._state.any(1))
        lines = {index: line for line, index in enumerate(there.tolist())}
        reasons = {
            lines[index]: [row for column in sorted(by_column) for row in by_column[column]]
            for index, by_column in self._reasons.items()
            if by_column
        }
        if last := list(general):
            reasons[len(there)] = last
        full = len(there) and there[-1] == len(there) - 1  # no clip is missing in between: a view is enough
        select: Any = slice(len(there)) if full else there
        return Table(
            [self._name_of(index) for index in lines],
            self._methods,
            self._metrics,
            self._numbers[select],
            self._present[select],
            reasons,
        )

    def _grow(self, count: int) -> None:
        more = count - len(self._state)
        if more > 0:
            self._numbers = np.concatenate([self._numbers, np.full((more, *self._numbers.shape[1:]), np.nan)])
            self._present = np.concatenate([self._present, np.zeros((more, *self._present.shape[1:]), bool)])
            self._state = np.concatenate([self._state, np.zeros((more, self._state.shape[1]), np.uint8)])
