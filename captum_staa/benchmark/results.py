"""What a comparison found: tidy rows, and means, intervals, ranks and reasons of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captum_staa._utils.generators import generator_or_seeded
from captum_staa.benchmark.records import ALL, ERROR, LEFT_OUT, NOT_APPLICABLE, Mean, Row, Sheet, control_of
from captum_staa.benchmark.scoring import COSTS
from captum_staa.metrics import Reliability, reliability
from captum_staa.metrics._shared import draws, interval, midranks

DRAWS = 1000  # of clips, that intervals come from
CLEAR = 0.1  # by which a method must be better than the random map, or its controls say nothing of it


@dataclass(frozen=True)
class Results:
    """Methods beside each other, with controls that lack the model, the class, or both.

    Attributes:
        rows: tidy, one number each; and every reason why a number is missing.
        methods: names in the order in which they were asked for, the controls last. Those that do not apply included.
        metrics: names in the order in which they were asked for.
        better: by metric: 1 where high is good, -1 where low is, 0 where the value describes and does not judge.
        settings: whatever fixed the numbers.
        answers: by clip, the class that is explained, and the one that the model answers.
        curves: by method, then ``"insertion"`` or ``"deletion"``: ``(101,)``, the mean over clips of the target's
            probability, at every hundredth of the clip.
        sheet: of the first clip, for pictures.
        interrupted: whether Ctrl-C came before the end.
    """

    rows: list[Row]
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
        return list(dict.fromkeys(row.clip for row in self.rows if row.clip != ALL))

    @cached_property
    def failures(self) -> list[Row]:
        """What went wrong: a clip that could not be read, a method or a metric that raised."""
        return [row for row in self.rows if row.metric == ERROR]

    def values(self, metric: str) -> Tensor:
        """``(N, M)`` float64, clips by methods; nan where there is no number."""
        if metric not in self._tables:
            raise ValueError(f"there is no metric {metric!r} in this comparison; there are {', '.join(self.metrics)}")
        return self._tables[metric]

    def means(self) -> dict[str, dict[str, Mean]]:
        """By method and metric: the mean over clips; of the costs, the median. Each with its 95 % interval.

        All methods and metrics meet the same draws of clips, as they met the same clips.
        """
        return self._means

    def ranks(self) -> dict[str, dict[str, float]]:
        """By method and metric: the mean rank over clips, 1 the best; equal values share theirs.

        Only over clips on which every method has a number that has any, as ranks among fewer are others. Metrics that
        do not judge have no ranks.
        """
        found: dict[str, dict[str, float]] = {method: {} for method in self.methods}
        for metric in (metric for metric in self.metrics if self.better[metric]):
            table = self.values(metric)
            there = ~table.isnan().all(0)
            complete = table[:, there]
            complete = complete[~complete.isnan().any(1)]
            ranks = midranks(-self.better[metric] * complete) + 0.5  # (n, m), from 1
            mean = torch.full((table.shape[1],), torch.nan, dtype=torch.float64)
            mean[there] = ranks.mean(0)
            for method, rank in zip(self.methods, mean.tolist(), strict=True):
                found[method][metric] = rank
        return found

    def trust(self) -> dict[str, Reliability]:
        """By metric: does it rank the methods alike on every clip? :func:`captum_staa.metrics.reliability` of it.

        For the metrics that judge, over the methods with a number on most clips; none where these, or clips, are fewer
        than two.
        """
        found = {}
        for metric in (metric for metric in self.metrics if self.better[metric] and metric not in COSTS):
            table = self.better[metric] * self.values(metric)
            there = table.isnan().double().mean(0) < 0.5
            names = [name for name, keep in zip(self.methods, there.tolist(), strict=True) if keep]
            if len(table) > 1 and len(names) > 1:
                random = names.index("random") if "random" in names else None
                found[metric] = reliability(table[:, there], random=random, n_bootstrap=200)
        return found

    def reasons(self) -> dict[str, str]:
        """By method: why it has no numbers, or fewer than others."""
        found = {row.method: f"does not apply: {row.reason}" for row in self.rows if row.metric == NOT_APPLICABLE}
        left_out = [row for row in self.rows if row.metric == LEFT_OUT]
        for method in self.methods:
            for rows, what in ((left_out, "left out"), (self.failures, "failed")):
                if own := [row for row in rows if row.method == method]:
                    clips = len({row.clip for row in own})
                    found[method] = f"{what} on {clips} of {len(self.clips)} clips: {own[0].reason}"
        return found

    def retained(self) -> dict[str, dict[str, float]]:
        """Return how much of a method's advantage is left on random weights and for another class.

        By method, then by ``"random weights"`` and ``"other class"``: ``(c - r) / (m - r)``, with ``m``, ``c`` and
        ``r`` the means of the method, of its control and of the random map, over the clips on which all three have a
        number. The metric is ``rivals``, or ``auroc`` where that has no numbers. 1: the control is as good as the
        method, which shows the clip rather than the model, or does not say why this class; 0: it is no better than the
        random map. Only methods with such controls (``model_controls`` of :func:`compare`), and only those that are
        better than the random map by more than 0.1.
        """
        found: dict[str, dict[str, float]] = {}
        for control, method in self.settings.get("model_controls", {}).items():
            kind = control_of(control)
            means = self._paired(method, control, "random")
            if kind is not None and means is not None:
                own, other, random = means
                if own - random > CLEAR:
                    found.setdefault(method, {})[kind] = (other - random) / (own - random)
        return found

    def _paired(self, *names: str) -> list[float] | None:
        """Means over the clips on which all of these have a number, by the metric of :meth:`retained`."""
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
    def _tables(self) -> dict[str, Tensor]:
        across = {name: at for at, name in enumerate(self.methods)}
        down = {name: at for at, name in enumerate(self.clips)}
        nothing = torch.full((len(down), len(across)), torch.nan, dtype=torch.float64)
        tables = {metric: nothing.clone() for metric in self.metrics}
        for row in self.rows:
            if not row.reason:
                tables[row.metric][down[row.clip], across[row.method]] = row.value
        return tables

    @cached_property
    def _means(self) -> dict[str, dict[str, Mean]]:
        copies = draws(DRAWS, len(self.clips), generator_or_seeded(None))  # the same in every call
        found: dict[str, dict[str, Mean]] = {method: {} for method in self.methods}
        for metric in self.metrics:
            each = _medians(self.values(metric)) if metric in COSTS else _means(self.values(metric), copies)
            for method, mean in zip(self.methods, each, strict=True):
                found[method][metric] = mean
        return found


def _means(table: Tensor, copies: Tensor) -> list[Mean]:
    """Of each column of ``(N, M)``, with intervals from draws ``(R, N)``."""
    there = ~table.isnan()
    filled = table.where(there, 0.0)
    means = filled.sum(0) / there.sum(0)
    drawn = (copies @ filled) / (copies @ there.double())  # (R, M); nan where a draw met no number
    low, high = interval(drawn)
    return [
        Mean(*numbers)
        for numbers in zip(means.tolist(), low.tolist(), high.tolist(), there.sum(0).tolist(), strict=True)
    ]


def _medians(table: Tensor) -> list[Mean]:
    """Of each column of ``(N, M)``; the interval is that of order statistics, which needs no draws."""
    found = []
    for column in table.unbind(1):
        values = column[~column.isnan()].sort().values
        count = len(values)
        if not count:
            found.append(Mean(math.nan, math.nan, math.nan, 0))
            continue
        # the number of values below the true median is binomial: n / 2, give or take 1.96 sqrt(n) / 2
        at = max(math.floor(count / 2 - 0.98 * math.sqrt(count)), 0)
        found.append(Mean(values.quantile(0.5).item(), values[at].item(), values[count - 1 - at].item(), count))
    return found
