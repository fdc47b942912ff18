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

from captum_staa.benchmark.rows import ALL, ERROR, NO_USE, Mean, Row, Sheet
from captum_staa.benchmark.scoring import COSTS
from captum_staa.metrics import Reliability, reliability
from captum_staa.metrics.bootstrap import draws, interval
from captum_staa.metrics.ranks import midranks
from captum_staa.randomness import generator_or_seeded

DRAWS = 1000  # of clips, that intervals come from


@dataclass(frozen=True)
class Results:
    """Methods beside each other, with controls that know nothing of the model.

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
        found = {row.method: f"does not apply: {row.reason}" for row in self.rows if row.metric == NO_USE}
        for method in self.methods:
            failed = [row for row in self.failures if row.method == method]
            if failed:
                clips = len({row.clip for row in failed})
                found[method] = f"failed on {clips} of {len(self.clips)} clips: {failed[0].reason}"
        return found

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
