"""Means over models, with intervals from a bootstrap that draws models first, and then clips of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 2000


@dataclass(frozen=True)
class Scores:
    """Scores of M methods by one metric on clips of several models. Each model counts the same.

    Attributes:
        means: ``(M,)`` float64: the mean over models of the mean over clips; nan without a number.
        drawn: ``(R, M)`` the same in R bootstrap draws, which are the same for all methods.
        better: 1 if higher is better, -1 if lower is better.
    """

    means: Tensor
    drawn: Tensor
    better: int

    @classmethod
    def of(cls, tables: Sequence[Tensor], better: int = 1, draws: int = DRAWS) -> Scores:
        """Return the scores of tables ``(N, M)``, one for each model, nan where a number is missing.

        Each draw takes as many models as there are, with replacement, and of each as many of its clips, with
        replacement. A method without numbers on a model is averaged over the other models.
        """
        generator = torch.Generator().manual_seed(0)
        count = len(tables)
        chosen = torch.randint(count, (draws, count), generator=generator)
        sums = torch.zeros(draws, tables[0].shape[1], dtype=torch.float64)
        known = torch.zeros_like(sums)
        for place in range(count):
            for model, table in enumerate(tables):
                rows = (chosen[:, place] == model).nonzero()[:, 0]
                clips = torch.randint(len(table), (len(rows), len(table)), generator=generator)
                means = table.double()[clips].nanmean(1)  # (r, M); the same clips for all methods
                sums[rows] += means.nan_to_num()
                known[rows] += ~means.isnan()
        own = torch.stack([table.double().nanmean(0) for table in tables])  # (models, M)
        return cls(own.nanmean(0), sums / known, better)

    @property
    def intervals(self) -> Tensor:
        """``(M, 2)``: the limits of 95 % of the draws; nan for a method without a number."""
        return _limits(self.drawn)

    @property
    def first(self) -> int:
        """Index of the method with the best mean."""
        return int((self.better * self.means).nan_to_num(nan=-torch.inf).argmax())

    def clearly_best(self, among: Sequence[int]) -> int | None:
        """Return which of `among` has an interval that is beyond those of all others, controls included; or None."""
        low, high = (self.better * self.intervals).sort(1).values.unbind(1)
        known = [at for at in among if not low[at].isnan()]
        best = max(known, key=lambda at: float(low[at]), default=None)
        others = [at for at in range(len(low)) if at != best and not high[at].isnan()]
        return best if best is not None and all(low[best] > high[at] for at in others) else None

    def not_behind(self, first: int, among: Sequence[int]) -> list[int]:
        """Return which of `among` are not clearly behind `first`: the interval of their difference holds 0."""
        low = _limits(self.better * (self.drawn[:, first, None] - self.drawn))[:, 0]
        return [at for at in among if at != first and low[at] <= 0]  # nan is not

    def share_first(self, among: Sequence[int]) -> Tensor:
        """Return the share of draws in which each of `among` is the best of them; ties are shared."""
        part = (self.better * self.drawn[:, list(among)]).nan_to_num(nan=-torch.inf)
        best = (part == part.amax(1, keepdim=True)).double()
        return (best / best.sum(1, keepdim=True)).mean(0)


def _limits(drawn: Tensor) -> Tensor:
    limits = torch.tensor([0.025, 0.975], dtype=drawn.dtype)
    return drawn.nanquantile(limits, 0).T
