"""Rows of a comparison, and what is calculated from them: means with intervals, ranks, trust, and reasons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captum_staa._utils.checks import generator_or_seeded, known_name
from captum_staa.benchmark.records import ERROR, LEFT_OUT, NOT_APPLICABLE, Mean, Row, Sheet, control_of
from captum_staa.benchmark.scoring import COSTS
from captum_staa.benchmark.table import Table
from captum_staa.metrics import Reliability, reliability
from captum_staa.metrics._shared import draws_in_blocks, interval, midranks

DRAWS = 1000  # bootstrap draws of clips for intervals
CLEAR = 0.1  # a method must be better than the random map by this margin, or its controls say nothing about it


@dataclass(frozen=True)
class Results:
    """Scores of methods and controls on all clips. See :class:`Comparison`."""

    rows: Sequence[Row]
    methods: list[str]
    metrics: list[str]
    better: dict[str, int]
    settings: dict[str, Any]
    answers: dict[str, tuple[int, int]] = field(default_factory=dict)
    curves: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=dict)
    sheet: Sheet | None = None
    interrupted: bool = False

    @cached_property
    def clips(self) -> list[str]:
        """Names of all clips, in order."""
        return self.table.clips

    @cached_property
    def failures(self) -> list[Row]:
        """Rows of failures: clips that could not be read, and methods or metrics that raised."""
        return [row for row in self.reason_rows if row.metric == ERROR]

    @property
    def reason_rows(self) -> list[Row]:
        """Rows that hold a reason instead of a number."""
        return self.table.reasons

    def values(self, metric: str) -> Tensor:
        """Return a table of numbers, clips by methods.

        Args:
            metric: name of a metric of this comparison.

        Returns:
            ``(N, M)`` float64; nan if a number is missing.

        Raises:
            ValueError: the comparison does not have this metric.
        """
        if metric not in self.metrics:
            metric = known_name("metric", metric, self.metrics)
        return torch.from_numpy(self.table.numbers[:, self.metrics.index(metric)].copy())

    def means(self) -> dict[str, dict[str, Mean]]:
        """Return the mean over clips by method and metric, or the median for costs, each with its 95 % interval.

        The bootstrap uses the same draws of clips for all methods and metrics.
        """
        return self._means

    def ranks(self) -> dict[str, dict[str, float]]:
        """Return the mean rank over clips by method and metric. 1 is best; equal values share a rank.

        Methods without any number are ignored. The mean is over the clips on which all other methods have a number.
        Metrics that only describe (0 in ``better``) have no ranks.
        """
        result: dict[str, dict[str, float]] = {method: {} for method in self.methods}
        for metric in (metric for metric in self.metrics if self.better[metric]):
            table = self.values(metric)
            there = ~table.isnan().all(0)
            complete = table[:, there]
            complete = complete[~complete.isnan().any(1)]
            ranks = midranks(-self.better[metric] * complete) + 0.5  # (n, m), from 1
            mean = torch.full((table.shape[1],), torch.nan, dtype=torch.float64)
            mean[there] = ranks.mean(0)
            for method, rank in zip(self.methods, mean.tolist(), strict=True):
                result[method][metric] = rank
        return result

    def trust(self) -> dict[str, Reliability]:
        """Return by metric how similar its rankings of the methods are on different clips.

        See :func:`captum_staa.metrics.reliability`. It covers metrics that have a better direction, without costs, and
        methods that have a number on more than half of the clips. A metric with fewer than two such methods, or a
        comparison with fewer than two clips, has no entry.
        """
        result = {}
        for metric in (metric for metric in self.metrics if self.better[metric] and metric not in COSTS):
            table = self.better[metric] * self.values(metric)
            there = table.isnan().double().mean(0) < 0.5
            names = [name for name, keep in zip(self.methods, there.tolist(), strict=True) if keep]
            if len(table) > 1 and len(names) > 1:
                random = names.index("random") if "random" in names else None
                result[metric] = reliability(table[:, there], random=random, n_bootstrap=200)
        return result

    def reasons(self) -> dict[str, str]:
        """Return by method why it has no numbers, or fewer than others."""
        rows = self.reason_rows
        reasons = {row.method: f"does not apply: {row.reason}" for row in rows if row.metric == NOT_APPLICABLE}
        left_out = [row for row in rows if row.metric == LEFT_OUT]
        for method in self.methods:
            for rows, kind in ((left_out, "left out"), (self.failures, "failed")):
                if matching := [row for row in rows if row.method == method]:
                    clips = len({row.clip for row in matching})
                    reasons[method] = f"{kind} on {clips} of {len(self.clips)} clips: {matching[0].reason}"
        return reasons

    def retained(self) -> dict[str, dict[str, float]]:
        """Return how much of a method's advantage over the random map remains in its controls.

        By method, then by ``"random weights"`` and ``"other class"``: ``(c - r) / (m - r)``, where ``m``, ``c`` and
        ``r`` are the means of the method, of its control and of the random map, over the clips on which all three have
        a number. The metric is ``rivals``, or ``auroc`` if ``rivals`` has no numbers. At 1, the control is as good as
        the method: the method shows the clip rather than the model, or does not explain this class. At 0, the control
        is not better than the random map. Only methods with such controls (``model_controls`` of :func:`compare`) that
        are better than the random map by more than 0.1 have an entry.
        """
        shares: dict[str, dict[str, float]] = {}
        for control, method in self.settings.get("model_controls", {}).items():
            kind = control_of(control)
            means = self._paired(method, control, "random")
            if kind is not None and means is not None:
                score, control_score, random = means
                if score - random > CLEAR:
                    shares.setdefault(method, {})[kind] = (control_score - random) / (score - random)
        return shares

    def _paired(self, *names: str) -> list[float] | None:
        """Return the means over the clips on which all names have a number, for the metric of :meth:`retained`."""
        if set(names) <= set(self.methods):
            columns = [self.methods.index(name) for name in names]
            for metric in ("rivals", "auroc"):
                if self.better.get(metric) == 1:
                    values = self.values(metric)[:, columns]
                    values = values[~values.isnan().any(1)]
                    if len(values):
                        means: list[float] = values.mean(0).tolist()
                        return means
        return None

    @cached_property
    def table(self) -> Table:
        """The numbers of all rows as arrays."""
        return self.rows if isinstance(self.rows, Table) else Table.of(self.rows, self.methods, self.metrics)

    @cached_property
    def _means(self) -> dict[str, dict[str, Mean]]:
        means: dict[str, dict[str, Mean]] = {method: {} for method in self.methods}
        averaged = [metric for metric in self.metrics if metric not in COSTS]
        drawn: dict[str, list[Tensor]] = {metric: [] for metric in averaged}  # (R, M) in blocks
        for copies in draws_in_blocks(DRAWS, len(self.clips), generator_or_seeded(None)):  # the same in every call
            for metric in averaged:
                drawn[metric].append(_drawn_means(self.values(metric), copies))
        for metric in self.metrics:
            table = self.values(metric)
            column_means = _medians(table) if metric in COSTS else _means(table, torch.cat(drawn[metric]))
            for method, mean in zip(self.methods, column_means, strict=True):
                means[method][metric] = mean
        return means


def _drawn_means(table: Tensor, copies: Tensor) -> Tensor:
    """Return the means ``(R, M)`` of the columns of ``(N, M)`` in bootstrap draws ``(R, N)``; nan if none is drawn."""
    there = ~table.isnan()
    return (copies @ table.where(there, 0.0)) / (copies @ there.double())


def _means(table: Tensor, drawn: Tensor) -> list[Mean]:
    """Return the mean of each column of ``(N, M)``, with intervals from its means in bootstrap draws ``(R, M)``."""
    there = ~table.isnan()
    means = table.where(there, 0.0).sum(0) / there.sum(0)
    low, high = interval(drawn)
    return [
        Mean(*numbers)
        for numbers in zip(means.tolist(), low.tolist(), high.tolist(), there.sum(0).tolist(), strict=True)
    ]


def _medians(table: Tensor) -> list[Mean]:
    """Return the median of each column of ``(N, M)``, with an interval from order statistics."""
    medians = []
    for column in table.unbind(1):
        values = column[~column.isnan()].sort().values
        count = len(values)
        if not count:
            medians.append(Mean(math.nan, math.nan, math.nan, 0))
            continue
        # the number of values below the true median is binomial: n / 2 plus or minus 1.96 sqrt(n) / 2
        at = max(math.floor(count / 2 - 0.98 * math.sqrt(count)), 0)
        medians.append(Mean(values.quantile(0.5).item(), values[at].item(), values[count - 1 - at].item(), count))
    return medians
