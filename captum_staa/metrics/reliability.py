"""Does a metric rank the methods the same way on every input? A judgment on metrics, not on maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from captum_staa._utils import notebook
from captum_staa._utils.checks import check_choice, check_count
from captum_staa._utils.generators import generator_or_seeded
from captum_staa.metrics._shared import draws, interval, metric
from captum_staa.result import Array, as_tensor

Level = Literal["nominal", "ordinal", "interval"]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Reliability:
    """How alike one metric ranks the methods on different inputs: 1 the same way on all, 0 without any agreement.

    Attributes:
        weighted: weighted mean of Spearman's correlation over pairs of inputs; an input counts for little where the
            metric took the random map for a good one. nan where no random map was named. Chance is above 0.
        spearman: the mean over pairs, unweighted.
        krippendorff: Krippendorff's alpha of the ranks, ordinal; inputs are the observers, methods the units.
        weighted_interval, spearman_interval, krippendorff_interval: (low, high), between which 95 % of the bootstrap
            values lie.
    """

    weighted: float
    weighted_interval: Interval
    spearman: float
    spearman_interval: Interval
    krippendorff: float
    krippendorff_interval: Interval

    def _repr_html_(self) -> str:
        rows = [
            (name, getattr(self, name), *getattr(self, f"{name}_interval"))
            for name in ("weighted", "spearman", "krippendorff")
        ]
        return notebook.block("Reliability", notebook.table(("agreement", "value", "95 % from", "to"), rows))


@metric(higher_is_better=True, lowest=-1.0, highest=1.0)
def reliability(
    scores: Array, random: int | None = None, n_bootstrap: int = 1000, generator: torch.Generator | None = None
) -> Reliability:
    """Agreement of a metric with itself over inputs, from its scores of several methods on each.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[0.2, 0.6, 0.9], [0.1, 0.7, 0.8], [0.3, 0.4, 0.5], [0.6, 0.9, 0.7]])
        >>> found = reliability(scores, random=0)  # the last input swaps the two methods that are not random
        >>> found.weighted, found.spearman, found.krippendorff
        (0.75, 0.75, 0.77)
        >>> found.spearman_interval
        (0.5, 1.0)

    ``s_i`` are the M scores of input i, ``rho_ij`` is Spearman's correlation of ``s_i`` and ``s_j``, ``r_i`` the place
    of the random map among the M, from 0 for the worst to M - 1 for the best, and equal scores share their mean place.
    Then ``w_i = (M - 1 - r_i) / (M - 1)``, and over pairs i < j,
    ``weighted = sum w_i w_j (rho_ij + 1) / sum w_i w_j - 1``, ``spearman = mean rho_ij``. With every score there and
    none equal, ``krippendorff = 1 - (1 - spearman) (1 - 1 / (N M))``.

    A metric that is noise scores 0 in the latter two, but ``(M + 1) / (3 (M - 1)²)`` in the weighted mean: 1/3 for
    three methods, 0.05 for ten. The weights choose inputs where the random map is low, and these agree on that.

    Intervals: the inputs are drawn anew with replacement, N each time. A pair of copies of one input agrees with
    itself whatever the metric does, so such pairs do not count; draws without any other pair are passed over.

    Args:
        scores: ``(N, M)`` floats, N inputs by M methods, one metric. Higher is better: pass minus the scores of a
            metric such as deletion, or the weights stand on their head. nan is a missing score, infinity is a score.
        random: the column of the random map, 0 .. M - 1.
        n_bootstrap: how many draws the intervals come from.
        generator: draws them; None is one seeded with 0, for this call alone.

    Returns:
        :class:`Reliability`. Both Spearman means take the inputs with every score, not all of them equal, because no
        other input ranks all methods; Krippendorff's alpha takes every score there is. nan where nothing can be said:
        fewer than two such inputs; for ``weighted``, no two inputs where the random map is not the best.

    Raises:
        TypeError: ``scores`` is no tensor or array of floats, ``generator`` no torch.Generator, ``random`` or
            ``n_bootstrap`` no whole number.
        ValueError: fewer than two inputs or methods, no score at all, or an argument out of range.

    Reference:
        Weighted: Li et al., "Spatio-Temporal Perturbations for Video Attribution", IEEE TCSVT (2021). Inputs as
        observers: Tomsett et al., "Sanity Checks for Saliency Metrics", AAAI (2020).
    """
    table = _table("scores", scores, "N inputs, M methods", fewest=(2, 2))
    count, methods = table.shape
    if random is not None:
        check_count("random, the column of the random map,", random, least=0, most=methods - 1)
    check_count("n_bootstrap", n_bootstrap)
    copies = draws(int(n_bootstrap), count, generator_or_seeded(generator))

    ranks = _ranks(table)
    centerd = ranks - (methods + 1) / 2
    size = centerd.norm(dim=1, keepdim=True)
    usable = size > 0  # (N, 1); not for nan
    directions = (centerd / size).where(usable, 0.0)  # (N, M): their inner products are Spearman's correlations
    even = usable[:, 0].double()
    weights = torch.zeros(count) if random is None else (methods - ranks[:, random]).nan_to_num() / (methods - 1)
    alpha = _Alpha(ranks, "ordinal")

    weighted, weighted_interval = _with_interval(lambda times: _mean_rho(directions, even * weights * times), copies)
    spearman, spearman_interval = _with_interval(lambda times: _mean_rho(directions, even * times), copies)
    krippendorff, krippendorff_interval = _with_interval(alpha, copies)
    return Reliability(weighted, weighted_interval, spearman, spearman_interval, krippendorff, krippendorff_interval)


@metric(higher_is_better=True, lowest=-1.0, highest=1.0)
def krippendorff_alpha(ratings: Array, level: Level = "ordinal") -> float:
    """Krippendorff's alpha: agreement of observers beyond chance, with any scores missing.

    Example:
        >>> import torch
        >>> nan = float("nan")
        >>> ratings = torch.tensor([[1.0, 2, 3, 3, nan], [1, 2, 3, 3, 2], [nan, 3, 3, 3, 2]])
        >>> krippendorff_alpha(ratings, "nominal"), krippendorff_alpha(ratings, "interval")
        (0.76, 0.87)

    ``alpha = 1 - D_o / D_e``: the mean squared difference ``δ²`` of two values of one unit, where a unit of m values
    has weight m, over that of any two values. ``δ²(c, k)`` is 1 for unlike values where the level is nominal,
    ``(c - k)²`` on an interval scale, and for ordinal ``(n_c / 2 + n_between + n_k / 2)²``: how many values lie from
    one to the other. That is the interval form of mean ranks over the whole table.

    Args:
        ratings: ``(N, U)`` floats, N observers by U units; nan where one gave no value.
        level: what the values are: names, an order, or numbers whose differences count.

    Returns:
        1 for perfect agreement, 0 for chance, negative where observers disagree. nan where nothing can be said: no
        unit has two values, or all values of those that have are equal.

    Raises:
        TypeError: ``ratings`` is no tensor or array of floats.
        ValueError: it is not two-dimensional, holds no value at all or an infinite one on an interval scale, or
            ``level`` is unknown.

    Reference:
        Krippendorff, "Computing Krippendorff's Alpha-Reliability", University of Pennsylvania (2011).
    """
    check_choice("level", level, ("nominal", "ordinal", "interval"))
    table = _table("ratings", ratings, "N observers, U units", fewest=(1, 1))
    if level == "interval" and bool(table.isinf().any()):
        raise ValueError(f"{int(table.isinf().sum())} of the ratings are infinite: no number; pass level='ordinal'")
    return _Alpha(table, level)(torch.ones(1, len(table), dtype=torch.float64)).item()


class _Alpha:
    """Krippendorff's alpha of one table ``(N, U)``, for any number of copies of each observer."""

    def __init__(self, table: Tensor, level: Level) -> None:
        self.units, self.level = table.shape[1], level
        self.given = ~table.isnan()
        values, codes = table[self.given].unique(return_inverse=True)  # (V,) in order
        self.cells = self.given.nonzero()[:, 1] * len(values) + codes  # (unit, value) of each rating
        shifted = values - values[:1]
        self.values = shifted / shifted[-1:]  # in 0 .. 1: the squares of 1e-200 and 1e200 are out of range

    def __call__(self, copies: Tensor) -> Tensor:
        """``(R,)`` of copies ``(R, N)``."""
        return torch.stack([self._one(times) for times in copies])

    def _one(self, times: Tensor) -> Tensor:
        each = times[:, None].expand_as(self.given)[self.given]  # copies of each rating
        counts = self._by_unit(each)  # (U, V)
        size = counts.sum(1)
        pairs = size.square() - self._by_unit(each.square()).sum(1)  # a rating is no pair with its own copies
        counts = counts * (pairs > 0)[:, None]  # Krippendorff leaves out what has nothing to be compared with
        paired = each.square() * (pairs > 0)[self.cells // len(self.values)]
        marginal = counts.sum(0)
        total = marginal.sum()
        observed = (size / pairs * self._differences(counts, marginal)).where(pairs > 0, 0.0).sum() / total
        expected = self._differences(marginal, marginal) / (total.square() - paired.sum())
        return (1 - observed / expected).where((marginal > 0).sum() > 1, torch.nan)

    def _by_unit(self, each: Tensor) -> Tensor:
        width = len(self.values)
        return torch.bincount(self.cells, weights=each, minlength=self.units * width).reshape(self.units, width)

    def _differences(self, counts: Tensor, marginal: Tensor) -> Tensor:
        """Sum of ``δ²`` over all ordered pairs of values, of counts ``(..., V)``."""
        size = counts.sum(-1)
        if self.level == "nominal":
            return size.square() - counts.square().sum(-1)
        places = self.values if self.level == "interval" else marginal.cumsum(0) - marginal / 2
        return 2 * (size * (counts @ places.square()) - (counts @ places).square())


def _mean_rho(directions: Tensor, weights: Tensor) -> Tensor:
    """``(R,)`` weighted means over pairs of inputs, of weights ``(R, N)``; no pair is ever formed.

    Of all ordered pairs, ``sum_ij w_i w_j rho_ij = |sum_i w_i z_i|²``; those of an input with itself go off again.
    """
    alone = weights.square().sum(1)
    agreement = (weights @ directions).square().sum(1) - alone
    mass = weights.sum(1).square() - alone
    return (agreement / mass).clamp(-1, 1).where(mass > 0, torch.nan)  # rounding alone goes beyond


def _with_interval(estimate: Callable[[Tensor], Tensor], copies: Tensor) -> tuple[float, Interval]:
    """The estimate of the inputs themselves, and the 95 % percentile interval of their draws ``(R, N)``."""
    low, high = interval(estimate(copies))
    return estimate(torch.ones_like(copies[:1])).item(), (low.item(), high.item())


def _ranks(table: Tensor) -> Tensor:
    """``(N, M)`` ranks from 1 in each row; equal scores share their mean, missing ones have none and take none."""
    below = (table[:, :, None] > table[:, None]).sum(2)
    equal = (table[:, :, None] == table[:, None]).sum(2)
    return (below + (equal + 1.0).double() / 2).where(~table.isnan(), torch.nan)


def _table(name: str, table: Array, axes: str, fewest: tuple[int, int]) -> Tensor:
    table = as_tensor(table, name, axes)
    if table.ndim != 2 or any(size < least for size, least in zip(table.shape, fewest, strict=True)):
        raise ValueError(f"{name} must be ({axes}), at least {fewest}, got shape {tuple(table.shape)}")
    if not table.is_floating_point():
        raise TypeError(f"{name} must hold floats, nan where one is missing, got {table.dtype}; pass .double()")
    if bool(table.isnan().all()):
        raise ValueError(f"all {table.numel()} {name} are nan, shape {tuple(table.shape)}: none is there to compare")
    return table.detach().double().cpu()
