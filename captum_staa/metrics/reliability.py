"""Does a metric rank the methods in the same order on every input? This rates metrics and not maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from captum_staa._utils import notebook
from captum_staa._utils.checks import check_choice, check_count, generator_or_seeded
from captum_staa.metrics._shared import draws_in_blocks, interval, metric
from captum_staa.result import Array, as_tensor

Level = Literal["nominal", "ordinal", "interval"]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Reliability:
    """Agreement of one metric's rankings on different inputs: 1 if equal, 0 without agreement.

    Attributes:
        weighted: weighted mean of Spearman's correlation over pairs of inputs. An input has a low weight if the metric
            gave the random map a high rank on it. nan if no random map was passed. Chance is above 0.
        spearman: unweighted mean of Spearman's correlation over pairs of inputs.
        krippendorff: Krippendorff's alpha (ordinal) of the ranks, with inputs as observers and methods as units.
        weighted_interval, spearman_interval, krippendorff_interval: (low, high), the limits of 95 % of the bootstrap
            values.
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
    """Return the agreement of one metric's rankings of several methods over inputs.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[0.2, 0.6, 0.9], [0.1, 0.7, 0.8], [0.3, 0.4, 0.5], [0.6, 0.9, 0.7]])
        >>> result = reliability(scores, random=0)  # the last input swaps the two methods that are not random
        >>> result.weighted, result.spearman, result.krippendorff
        (0.75, 0.75, 0.77)
        >>> result.spearman_interval
        (0.5, 1.0)

    Let ``s_i`` be the M scores of input i, ``rho_ij`` Spearman's correlation of ``s_i`` and ``s_j``, and ``r_i`` the
    rank of the random map, from 0 for the worst to M - 1 for the best. Equal scores share the mean of their ranks. Then
    ``w_i = (M - 1 - r_i) / (M - 1)``, and over pairs i < j,
    ``weighted = sum w_i w_j (rho_ij + 1) / sum w_i w_j - 1`` and ``spearman = mean rho_ij``. If no scores are missing
    or equal, ``krippendorff = 1 - (1 - spearman) (1 - 1 / (N M))``.

    A metric that returns noise has 0 in ``spearman`` and ``krippendorff``, but ``(M + 1) / (3 (M - 1)²)`` in
    ``weighted``: 1/3 for three methods, 0.05 for ten. The weights select inputs on which the random map has a low rank,
    so these inputs agree on that rank.

    For the intervals, N inputs are drawn with replacement. Two copies of one input always agree, so pairs of copies are
    ignored. Draws without any other pair are ignored too.

    Args:
        scores: ``(N, M)`` floats, N inputs by M methods, of one metric. Higher must be better: pass the negative scores
            of a metric such as deletion, because otherwise the weights are wrong. nan is a missing score; infinity is a
            valid score.
        random: column of the random map, 0 to M - 1.
        n_bootstrap: number of bootstrap draws for the intervals.
        generator: draws the inputs. None uses a new generator with seed 0 in each call.

    Returns:
        :class:`Reliability`. The two Spearman means use only inputs that rank all methods: none of their scores is
        missing, and their scores are not all equal. Krippendorff's alpha uses all scores. nan for fewer than two such
        inputs; ``weighted`` is also nan without two inputs on which the random map is not the best.

    Raises:
        TypeError: ``scores`` is not a tensor or an array of floats, ``generator`` is not a torch.Generator, or
            ``random`` or ``n_bootstrap`` is not an int.
        ValueError: fewer than two inputs or methods, no scores, or an argument out of range.

    Reference:
        Weighted: Li et al., "Spatio-Temporal Perturbations for Video Attribution", IEEE TCSVT (2021). Inputs as
        observers: Tomsett et al., "Sanity Checks for Saliency Metrics", AAAI (2020).
    """
    table = _table("scores", scores, "N inputs, M methods", fewest=(2, 2))
    count, methods = table.shape
    if random is not None:
        check_count("random (the column of the random map)", random, least=0, most=methods - 1)
    check_count("n_bootstrap", n_bootstrap)
    copies = list(draws_in_blocks(int(n_bootstrap), count, generator_or_seeded(generator)))

    ranks = _ranks(table)
    centered = ranks - (methods + 1) / 2
    size = centered.norm(dim=1, keepdim=True)
    usable = size > 0  # (N, 1); not for nan
    directions = (centered / size).where(usable, 0.0)  # (N, M): their inner products are Spearman's correlations
    equal = usable[:, 0].double()
    weights = torch.zeros(count) if random is None else (methods - ranks[:, random]).nan_to_num() / (methods - 1)
    alpha = _Alpha(ranks, "ordinal")

    weighted, weighted_interval = _with_interval(lambda times: _mean_rho(directions, equal * weights * times), copies)
    spearman, spearman_interval = _with_interval(lambda times: _mean_rho(directions, equal * times), copies)
    krippendorff, krippendorff_interval = _with_interval(alpha, copies)
    return Reliability(weighted, weighted_interval, spearman, spearman_interval, krippendorff, krippendorff_interval)


@metric(higher_is_better=True, lowest=-1.0, highest=1.0)
def krippendorff_alpha(ratings: Array, level: Level = "ordinal") -> float:
    """Return Krippendorff's alpha: the agreement of observers beyond chance. Scores can be missing.

    Example:
        >>> import torch
        >>> nan = float("nan")
        >>> ratings = torch.tensor([[1.0, 2, 3, 3, nan], [1, 2, 3, 3, 2], [nan, 3, 3, 3, 2]])
        >>> krippendorff_alpha(ratings, "nominal"), krippendorff_alpha(ratings, "interval")
        (0.76, 0.87)

    ``alpha = 1 - D_o / D_e``. ``D_o`` is the mean squared difference ``δ²`` of two values of the same unit, where a
    unit with m values has weight m. ``D_e`` is that of any two values. ``δ²(c, k)`` depends on the level:

    - nominal: 1 for different values.
    - interval: ``(c - k)²``.
    - ordinal: ``(n_c / 2 + n_between + n_k / 2)²``, the squared number of values from one to the other. This is the
      interval form applied to mean ranks over the whole table.

    Args:
        ratings: ``(N, U)`` floats, N observers by U units; nan for a missing value.
        level: ``"nominal"`` for names, ``"ordinal"`` for an order, ``"interval"`` for numbers with meaningful
            differences.

    Returns:
        1 for perfect agreement, 0 for chance, negative for disagreement. nan if no unit has two values, or if all
        values of units with at least two values are equal.

    Raises:
        TypeError: ``ratings`` is not a tensor or an array of floats.
        ValueError: ``ratings`` is not 2-D, has no values, or has infinite values with the level interval, or ``level``
            is unknown.

    Reference:
        Krippendorff, "Computing Krippendorff's Alpha-Reliability", University of Pennsylvania (2011).
    """
    check_choice("level", level, ("nominal", "ordinal", "interval"))
    table = _table("ratings", ratings, "N observers, U units", fewest=(1, 1))
    if level == "interval" and bool(table.isinf().any()):
        raise ValueError(
            f"ratings must not be infinite for level='interval', got {int(table.isinf().sum())} infinite values. Pass "
            f"level='ordinal'."
        )
    return _Alpha(table, level)(torch.ones(1, len(table), dtype=torch.float64)).item()


class _Alpha:
    """Compute Krippendorff's alpha of one table ``(N, U)`` for any number of copies of each observer."""

    def __init__(self, table: Tensor, level: Level) -> None:
        self.units, self.level = table.shape[1], level
        self.present = ~table.isnan()
        values, codes = table[self.present].unique(return_inverse=True)  # (V,) ascending
        self.cells = self.present.nonzero()[:, 1] * len(values) + codes  # (unit, value) of each rating
        shifted = values - values[:1]
        self.values = shifted / shifted[-1:]  # in 0 .. 1, because squares of 1e-200 and 1e200 would be out of range

    def __call__(self, copies: Tensor) -> Tensor:
        """Return alpha ``(R,)`` for copies ``(R, N)``."""
        return torch.stack([self._one(times) for times in copies])

    def _one(self, times: Tensor) -> Tensor:
        weights = times[:, None].expand_as(self.present)[self.present]  # copies of each rating
        counts = self._by_unit(weights)  # (U, V)
        size = counts.sum(1)
        pairs = size.square() - self._by_unit(weights.square()).sum(1)  # copies of one rating are not a pair
        counts = counts * (pairs > 0)[:, None]  # values without a second value in their unit are left out
        paired = weights.square() * (pairs > 0)[self.cells // len(self.values)]
        marginal = counts.sum(0)
        total = marginal.sum()
        observed = (size / pairs * self._differences(counts, marginal)).where(pairs > 0, 0.0).sum() / total
        expected = self._differences(marginal, marginal) / (total.square() - paired.sum())
        return (1 - observed / expected).where((marginal > 0).sum() > 1, torch.nan)

    def _by_unit(self, weights: Tensor) -> Tensor:
        width = len(self.values)
        return torch.bincount(self.cells, weights=weights, minlength=self.units * width).reshape(self.units, width)

    def _differences(self, counts: Tensor, marginal: Tensor) -> Tensor:
        """Return the sum of ``δ²`` over all ordered pairs of values, for counts ``(..., V)``."""
        size = counts.sum(-1)
        if self.level == "nominal":
            return size.square() - counts.square().sum(-1)
        positions = self.values if self.level == "interval" else marginal.cumsum(0) - marginal / 2
        return 2 * (size * (counts @ positions.square()) - (counts @ positions).square())


def _mean_rho(directions: Tensor, weights: Tensor) -> Tensor:
    """Return weighted means over pairs of inputs, ``(R,)``, for weights ``(R, N)``, without a loop over pairs.

    Over all ordered pairs, ``sum_ij w_i w_j rho_ij = |sum_i w_i z_i|²``. Pairs of an input with itself are subtracted.
    """
    itself = weights.square().sum(1)
    agreement = (weights @ directions).square().sum(1) - itself
    mass = weights.sum(1).square() - itself
    return (agreement / mass).clamp(-1, 1).where(mass > 0, torch.nan)  # only rounding errors leave this range


def _with_interval(estimate: Callable[[Tensor], Tensor], copies: list[Tensor]) -> tuple[float, Interval]:
    """Return the estimate for the inputs, and the 95 % percentile interval over blocks ``(R, N)`` of their draws."""
    low, high = interval(torch.cat([estimate(block) for block in copies]))
    return estimate(torch.ones_like(copies[0][:1])).item(), (low.item(), high.item())


def _ranks(table: Tensor) -> Tensor:
    """Return the ranks from 1 in each row, ``(N, M)``. Equal scores share their mean rank, missing scores have nan."""
    below = (table[:, :, None] > table[:, None]).sum(2)
    equal = (table[:, :, None] == table[:, None]).sum(2)
    return (below + (equal + 1.0).double() / 2).where(~table.isnan(), torch.nan)


def _table(name: str, table: Array, axes: str, fewest: tuple[int, int]) -> Tensor:
    table = as_tensor(table, name, axes)
    if table.ndim != 2 or any(size < least for size, least in zip(table.shape, fewest, strict=True)):
        raise ValueError(f"{name} must be ({axes}) of at least {fewest}, got shape {tuple(table.shape)}.")
    if not table.is_floating_point():
        raise TypeError(f"{name} must be floats, with nan for missing values, got {table.dtype}. Pass {name}.double().")
    if bool(table.isnan().all()):
        raise ValueError(
            f"{name} must have values that are not nan, got nan in all {table.numel()} of shape {tuple(table.shape)}."
        )
    return table.detach().double().cpu()
