"""Faithfulness: do the cells of high attribution determine the model's output?

``faithfulness`` and ``monotonicity`` compare the outputs for all classes with those for the top cells alone.
``faithfulness_correlation``, ``aopc`` and ``saco`` compare attributions with the fall of the target's output when cells
are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_staa._utils.captum import (
    BaselineType,
    ExpansionTypes,
    TargetType,
    _expand_additional_forward_args,
    _format_additional_forward_args,
    _run_forward,
)
from captum_staa._utils.checks import check_choice, check_count, generator_or_seeded, is_number
from captum_staa._utils.model_state import in_eval_mode
from captum_staa.layout import VideoLayout
from captum_staa.masking.arguments import selected
from captum_staa.metrics._shared import metric, midranks, pearson
from captum_staa.metrics.insertion_deletion import Ablation, random_keys
from captum_staa.result import Array

TENTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@metric(higher_is_better=True, lowest=0.0, highest=1.0)
@in_eval_mode
def faithfulness(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Array | tuple[Array, ...],
    *,
    baselines: BaselineType = None,
    target: TargetType = None,
    additional_forward_args: object = None,
    feature_mask: Tensor | tuple[Tensor, ...] | None = None,
    perturbations_per_eval: int = 16,
    layout: VideoLayout | str | None = None,
    cells: Sequence[int] | None = None,
    kept: float = 0.7,
) -> Tensor:
    """Return STAA's F: how similar the outputs are for the inputs and for their top cells alone; 1 if they are equal.

    Example:
        >>> def model(inputs):  # three classes: the brightness of frame 0, of frame 1, and of frames 2 and 3
        ...     light = inputs.mean((2, 3, 4))
        ...     return torch.stack([light[:, 0], light[:, 1], light[:, 2] + light[:, 3]], dim=1)
        >>> inputs = torch.tensor([8.0, 2.0, 0.0, 0.0]).reshape(1, 4, 1, 1, 1)
        >>> true = torch.tensor([4.0, 3.0, 2.0, 1.0]).reshape(1, 4, 1, 1)  # the first two frames first
        >>> faithfulness(model, inputs, true, layout="BTCHW", kept=0.5).item()
        1.0
        >>> round(faithfulness(model, inputs, true, layout="BTCHW", kept=0.25).item(), 3)  # no frame 1: 1 - 0.25 / 3
        0.917

    ``F = 1 - mean over classes |m(inputs) - m(masked inputs)|``, where ``m`` are the outputs of all classes, scaled to
    0 .. 1 by their minimum and maximum. In the masked inputs, the cells with the highest attribution are kept and the
    others are replaced by the baseline.

    F has no natural zero, because a large part of any clip preserves most outputs: report the F of a random and of an
    inverted map beside it. With two classes, the scaled outputs are always 0 and 1, and F only shows whether their
    order is preserved.

    Args:
        forward_func: a :class:`captum_staa.VideoClassifier`, or any function that maps inputs to outputs ``(B, K)``;
            the paper uses logits.
        inputs: clips, a 5-D tensor of finite floats, or a tuple of them. This and all arguments that are not listed
            here are as for :func:`insertion`.
        target: None takes the mean over all classes, as in the paper. A class index, or one per example, takes the
            difference of this class alone; the scaled output of the predicted class is 1 as long as it is the highest.
        kept: fraction of the cells to keep, between 0 and 1, the highest mean attribution first. It is rounded to a
            number of cells, which must be at least one and not all.

    Returns:
        ``(B,)`` float64, 0 to 1, 1 is best. nan where the outputs of all classes are equal, or one of them is nan.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit, nan or infinity, an option out of range, fewer than two classes, or a
            ``kept`` that keeps no cell or all cells, which gives all maps the same score.

    Reference:
        Wang and Liu, "STAA: Spatio-Temporal Attention Attribution for Real-Time Interpreting Transformer-based Video
        Models", arXiv 2411.00630. Its code masks with an attention matrix resized to the image, not with the map.
    """
    ablation = Ablation.of(
        forward_func, inputs, attributions, baselines, feature_mask, perturbations_per_eval, layout, cells
    )
    _check_fraction(ablation, "kept", kept)
    return 1 - _differences(ablation, [kept], target, additional_forward_args)[0]


@metric(higher_is_better=False, lowest=-1.0, highest=1.0)
@in_eval_mode
def monotonicity(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Array | tuple[Array, ...],
    *,
    baselines: BaselineType = None,
    target: TargetType = None,
    additional_forward_args: object = None,
    feature_mask: Tensor | tuple[Tensor, ...] | None = None,
    perturbations_per_eval: int = 16,
    layout: VideoLayout | str | None = None,
    cells: Sequence[int] | None = None,
    fractions: Sequence[float] = TENTHS,
) -> Tensor:
    """Return Kendall's tau between the kept fraction and the difference of the outputs; -1 is best.

    Example:
        >>> def model(inputs):
        ...     light = inputs.mean((2, 3, 4))
        ...     return torch.stack([light[:, 0], light[:, 1], light[:, 2] + light[:, 3]], dim=1)
        >>> inputs = torch.tensor([8.0, 2.0, 1.0, 0.0]).reshape(1, 4, 1, 1, 1)
        >>> first = torch.tensor([4.0, 3.0, 2.0, 1.0]).reshape(1, 4, 1, 1)
        >>> monotonicity(model, inputs, first, layout="BTCHW", fractions=(0.25, 0.5, 0.75)).item()
        -1.0

    Tau-b is computed between the kept fraction and the difference ``1 - F`` of :func:`faithfulness`. The sign is that
    of the paper: the difference should fall as more cells are kept, so negative is good.

    This is a weak test by itself. The outputs approach those of the whole clip as more cells are kept in any order, so
    an inverted map can also reach -1. Report it beside a random and an inverted map, and beside :func:`faithfulness`.

    Args:
        forward_func: this and all arguments that are not listed here are as for :func:`faithfulness`.
        fractions: fractions of the cells to keep: at least two, in ascending order, between 0 and 1. Each is rounded to
            a number of cells. The first must keep at least one cell, and the last must not keep all: the default needs
            6 cells.

    Returns:
        ``(B,)`` float64, -1 to 1, -1 is best. nan where the difference is the same for all fractions, or is nan.

    Raises:
        TypeError, ValueError: as for :func:`faithfulness`.

    Reference:
        Wang and Liu, as for :func:`faithfulness`. Tau-b: Kendall, "The Treatment of Ties in Ranking Problems",
        Biometrika 33 (1945).
    """
    several = isinstance(fractions, (list, tuple, np.ndarray)) and len(fractions) > 1 and all(map(is_number, fractions))
    if not several or not all(a < b for a, b in pairwise((0, *fractions, 1))):
        raise ValueError(
            f"fractions must be two or more numbers between 0 and 1 in ascending order, got {fractions!r}."
        )
    ablation = Ablation.of(
        forward_func, inputs, attributions, baselines, feature_mask, perturbations_per_eval, layout, cells
    )
    for outermost in (fractions[0], fractions[-1]):
        _check_fraction(ablation, "each of fractions", outermost)
    differences = _differences(ablation, fractions, target, additional_forward_args)
    return _kendall(torch.tensor(fractions, dtype=torch.float64).to(differences), differences.T)


@metric(higher_is_better=True, lowest=-1.0, highest=1.0)
@in_eval_mode
def faithfulness_correlation(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Array | tuple[Array, ...],
    *,
    baselines: BaselineType = None,
    target: TargetType = None,
    additional_forward_args: object = None,
    feature_mask: Tensor | tuple[Tensor, ...] | None = None,
    perturbations_per_eval: int = 16,
    layout: VideoLayout | str | None = None,
    cells: Sequence[int] | None = None,
    fraction: float = 0.2,
    n_subsets: int = 100,
    correlation: str = "pearson",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the correlation, over random subsets of cells, of the sum of attributions with the fall of the output.

    Example:
        >>> inputs = torch.rand(1, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> weights = torch.arange(8.0).reshape(1, 8, 1, 1, 1)
        >>> def model(inputs):
        ...     return (weights * inputs).sum((1, 2, 3, 4))
        >>> round(faithfulness_correlation(model, inputs, weights * inputs, layout="BTCHW").item(), 6)
        1.0
        >>> round(faithfulness_correlation(model, inputs, -weights * inputs, layout="BTCHW").item(), 6)
        -1.0

    The attribution of a cell is the mean over its voxels, so its size has no influence. The result does not depend on
    scale and offset of a map.

    Args:
        forward_func: a :class:`captum_staa.VideoClassifier`, or any function that returns one row of outputs per
            example: logits, or probabilities if it ends in a softmax.
        inputs: clips, a 5-D tensor of finite floats, or a tuple of them. This and all arguments that are not listed
            here are as for :func:`insertion`.
        attributions: as for :func:`insertion`, but their values matter, and not only their order.
        target: class index, or one per example. Required if the model has several outputs.
        fraction: fraction of the cells in a subset, between 0 and 1, rounded to a number of cells, which must be at
            least one and not all.
        n_subsets: number of subsets, at least 3. Clips with the same cells get the same subsets.
        correlation: ``"pearson"``, as in the paper, or ``"spearman"``, the correlation of ranks.
        generator: draws the subsets. None uses a new generator with seed 0 in each call.

    Returns:
        ``(B,)`` float64, -1 to 1, 1 is best and 0 is chance. nan where the map is constant, or where the output is
        constant or nan.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit, nan or infinity, an option out of range, a ``fraction`` that selects no cell
            or all cells, or a missing target.

    Reference:
        Bhatt, Weller and Moura, "Evaluating and Aggregating Feature-based Model Explanations", IJCAI 2020, equation 3.
    """
    check_count("n_subsets", n_subsets, least=3)
    check_choice("correlation", correlation, ("pearson", "spearman"))
    draw = generator_or_seeded(generator)
    ablation = Ablation.of(
        forward_func, inputs, attributions, baselines, feature_mask, perturbations_per_eval, layout, cells
    )
    _check_fraction(ablation, "fraction", fraction)
    size = _portion(ablation, fraction)
    seeds = torch.randint(2**62, (n_subsets,), generator=draw, device=draw.device).tolist()
    subsets = torch.stack([_subset(ablation, size, seed) for seed in seeds])  # (S, 1 or B, n)
    falls = _falls(ablation, subsets, target, additional_forward_args)
    relative = ablation.means - ablation.means[:, :1]  # a constant map must give exactly equal sums
    sums = torch.stack([(subset * relative).sum(1) for subset in subsets])  # (S, B)
    if correlation == "spearman":
        values = pearson(midranks(sums.T), midranks(falls.T))
    else:
        values = pearson(sums.T, falls.T)
    return values.masked_fill(falls.isnan().any(0), torch.nan).to(ablation.inputs[0].device)


@metric(higher_is_better=True, lowest=float("-inf"), highest=float("inf"))
@in_eval_mode
def aopc(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Array | tuple[Array, ...],
    *,
    baselines: BaselineType = None,
    target: TargetType = None,
    additional_forward_args: object = None,
    feature_mask: Tensor | tuple[Tensor, ...] | None = None,
    perturbations_per_eval: int = 16,
    layout: VideoLayout | str | None = None,
    cells: Sequence[int] | None = None,
    steps: int = 10,
) -> Tensor:
    """Return the area over the perturbation curve: the mean fall of the output while cells are replaced, best first.

    Example:
        >>> inputs = torch.tensor([8.0, 2.0, 1.0, 1.0]).reshape(1, 4, 1, 1, 1)
        >>> def model(inputs):
        ...     return inputs.sum((1, 2, 3, 4))
        >>> aopc(model, inputs, inputs, layout="BTCHW", steps=4).item()  # (0 + 8 + 10 + 11 + 12) / 5
        8.2
        >>> aopc(model, inputs, -inputs, layout="BTCHW", steps=4).item()  # (0 + 1 + 2 + 4 + 12) / 5
        3.8

    After step k of L, the fraction ``k / L`` of the cells with the highest attribution is replaced; step L replaces all
    cells. The result is ``1 / (L + 1) * sum over k = 0 .. L of f(inputs) - f(inputs after step k)``. It has the units
    of the output, so compare only maps of the same clip and model.

    Args:
        forward_func: this and all arguments that are not listed here are as for :func:`faithfulness_correlation`.
        steps: L, at most the number of cells. Cells with equal attribution come in a fixed random order.

    Returns:
        ``(B,)`` float64 in units of the output, higher is better; nan where the output is nan.

    Raises:
        TypeError, ValueError: as for :func:`faithfulness_correlation`.

    Reference:
        Samek et al., "Evaluating the Visualization of What a Deep Neural Network Has Learned", IEEE TNNLS 28 (2017),
        equation 12. There, a step replaces one small square, and the curve ends long before all of the image is
        replaced.
    """
    check_count("steps", steps)
    steps = int(steps)  # small numpy integers overflow
    ablation = Ablation.of(
        forward_func, inputs, attributions, baselines, feature_mask, perturbations_per_eval, layout, cells
    )
    _check_at_most_cells(ablation, "steps", steps)
    ranks = ablation.ranks()
    replaced = torch.stack([ranks < _portion(ablation, step / steps) for step in range(1, steps + 1)])
    falls = _falls(ablation, replaced, target, additional_forward_args)
    return (falls.sum(0) / (steps + 1)).to(ablation.inputs[0].device)


@metric(higher_is_better=True, lowest=-1.0, highest=1.0)
@in_eval_mode
def saco(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Array | tuple[Array, ...],
    *,
    baselines: BaselineType = None,
    target: TargetType = None,
    additional_forward_args: object = None,
    feature_mask: Tensor | tuple[Tensor, ...] | None = None,
    perturbations_per_eval: int = 16,
    layout: VideoLayout | str | None = None,
    cells: Sequence[int] | None = None,
    groups: int = 10,
) -> Tensor:
    """Return the salience-guided faithfulness coefficient (SaCo): do more salient groups lower the output more?

    Example:
        >>> inputs = torch.tensor([8.0, 4.0, 2.0, 1.0]).reshape(1, 4, 1, 1, 1)
        >>> def model(inputs):
        ...     return inputs.sum((1, 2, 3, 4))
        >>> saco(model, inputs, inputs, layout="BTCHW", groups=4).item()
        1.0
        >>> saco(model, inputs, -inputs, layout="BTCHW", groups=4).item()
        -1.0
        >>> swapped = torch.tensor([8.0, 1.0, 2.0, 4.0]).reshape(1, 4, 1, 1)  # frames 1 and 3 swapped
        >>> round(saco(model, inputs, swapped, layout="BTCHW", groups=4).item(), 3)  # (7 + 6 + 4 - 1 - 2 - 3) / 23
        0.478

    Cells are ranked and split into groups of equal size, and one group at a time is replaced. The weight of each pair
    of groups is the difference of their saliences. It is positive if the output falls more for the more salient group,
    and negative if it falls less. The sum over pairs is divided by the sum of the absolute weights. Unlike in
    :func:`aopc`, the result depends on the values of the map and not only on their order.

    Args:
        forward_func: this and all arguments that are not listed here are as for :func:`faithfulness_correlation`. The
            paper uses probabilities, and the mean color of the image as baseline.
        groups: number of groups, at least 2, at most the number of cells. If it does not divide the number of cells,
            some groups have one cell more. Larger groups lower the output more because of their size alone, so a
            perfect map then scores less than 1. Cells with equal attribution come in a fixed random order.

    Returns:
        ``(B,)`` float64, -1 to 1, 1 is best and 0 is chance. nan where all groups have the same salience, as in a
        constant map, and where the output is nan.

    Raises:
        TypeError, ValueError: as for :func:`faithfulness_correlation`.

    Note:
        The salience of a group is the mean over its cells. For groups of equal size, this is the paper's sum up to a
        factor that cancels. A pair with two equal falls counts 0 here. In the paper it counts as positive, so a model
        with a constant output would score 1.

    Reference:
        Wu et al., "On the Faithfulness of Vision Transformer Explanations", CVPR 2024, algorithm 1.
    """
    check_count("groups", groups, least=2)
    ablation = Ablation.of(
        forward_func, inputs, attributions, baselines, feature_mask, perturbations_per_eval, layout, cells
    )
    _check_at_most_cells(ablation, "groups", groups)
    group = ablation.ranks() * groups // ablation.totals  # absent cells come after the last group
    members = torch.stack([group == number for number in range(groups)])  # (G, B, n)
    falls = _falls(ablation, members, target, additional_forward_args)
    relative = ablation.means - ablation.means[:, :1]  # groups of a constant map must be exactly equal
    salience = (members * relative).sum(2) / members.sum(2)  # (G, B)
    first, second = torch.triu_indices(groups, groups, offset=1)
    weights = salience[first] - salience[second]  # (pairs, B), never negative
    values = (weights * (falls[first] - falls[second]).sign()).sum(0) / weights.sum(0)
    return values.masked_fill(falls.isnan().any(0), torch.nan).to(ablation.inputs[0].device)  # the sign of nan is 0


def _differences(ablation: Ablation, fractions: Sequence[float], target: TargetType, extra: object) -> Tensor:
    """Return the difference of scaled outputs, inputs against top cells alone, ``(len(fractions), B)`` float64."""
    batch = ablation.batch
    extra = _format_additional_forward_args(extra)

    def scaled(clips: tuple[Tensor, ...], copies: int) -> Tensor:
        """Return the outputs scaled to 0 .. 1, ``(copies, B, K)``."""
        args = _expand_additional_forward_args(extra, copies, expansion_type=ExpansionTypes.repeat) if extra else None
        outputs = _run_forward(ablation.forward_func, clips, None, args)
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != copies * batch:
            got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(
                f"the model must return outputs (B, K) for all classes, with B = {copies * batch}, got {got}. Return "
                f"one row per example."
            )
        if outputs.shape[1] < 2:
            raise ValueError(
                "the model must return outputs of at least 2 classes, got 1 output per example. Use aopc or saco "
                "instead."
            )
        outputs = outputs.double()
        low, high = outputs.aminmax(dim=1, keepdim=True)
        return ((outputs - low) / (high - low)).unflatten(0, (copies, batch))

    ranks = ablation.ranks()
    replaced = torch.stack([ranks >= _portion(ablation, fraction) for fraction in fractions])  # (P, B, n)
    whole, without = _evaluated(ablation, scaled, replaced)
    differences = (whole - without).abs()  # (P, B, K)
    if target is None:
        return differences.mean(2)
    return torch.stack([selected(row, target) for row in differences])


def _falls(ablation: Ablation, replaced: Tensor, target: TargetType, extra: object) -> Tensor:
    """Return the fall of the output without the cells ``replaced`` ``(P, B, n)``, ``(P, B)`` float64 on the CPU."""
    score = ablation.score(target, extra)
    whole, without = _evaluated(ablation, score, replaced)
    return whole.cpu().double() - without.cpu().double()


@torch.no_grad()
def _evaluated(
    ablation: Ablation, evaluate: Callable[[tuple[Tensor, ...], int], Tensor], replaced: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the values of the inputs, and of copies of the inputs with some cells replaced.

    Args:
        ablation: the inputs and their cells.
        evaluate: function of ``copies * B`` clips and of ``copies`` that returns ``(copies, B, ...)``.
        replaced: bool ``(P, 1 or B, n)``, the cells to replace in each copy.

    Returns:
        ``(1, B, ...)`` and ``(P, B, ...)``.
    """
    whole = evaluate(tuple(clip.clone() for clip in ablation.inputs), 1)  # the model may write to its input
    chunks = replaced.split(ablation.perturbations_per_eval)
    altered = [evaluate(ablation.blended(ablation.spread((~chunk).float())), len(chunk)) for chunk in chunks]
    return whole, torch.cat(altered)


def _portion(ablation: Ablation, fraction: float) -> Tensor:
    """Return the number of cells ``(1 or B, 1)`` in a fraction of each clip's cells, rounded."""
    return (fraction * ablation.totals.double()).round().long()


def _subset(ablation: Ablation, size: Tensor, seed: int) -> Tensor:
    """Return a random subset of each clip's cells, bool ``(1 or B, n)``, with ``size`` ``(1 or B, 1)`` cells."""
    keys = random_keys(ablation.present.shape[1], seed).where(ablation.present, torch.inf)
    return keys <= keys.sort(1).values.take_along_dim(size - 1, 1)


def _check_fraction(ablation: Ablation, name: str, fraction: float) -> None:
    """Raise if the fraction, rounded, is none or all of a clip's cells: then all maps get the same score."""
    if not is_number(fraction):
        raise TypeError(f"{name} must be a number between 0 and 1, got {fraction!r} of type {type(fraction).__name__}.")
    if not 0 < fraction < 1:
        raise ValueError(f"{name} must be between 0 and 1 (both excluded), got {fraction}.")
    count = _portion(ablation, fraction)
    if bool((wrong := (count == 0) | (count == ablation.totals)).any()):
        raise ValueError(
            f"{name} must select at least one cell and not all cells, got {fraction} of "
            f"{int(ablation.totals[wrong].min())} cells, which rounds to {int(count[wrong].min())}. Change {name}, or "
            f"use smaller cells."
        )


def _check_at_most_cells(ablation: Ablation, name: str, count: int) -> None:
    """Raise if a clip has fewer than ``count`` cells."""
    if count > (fewest := int(ablation.totals.min())):
        raise ValueError(f"{name} must be at most the number of cells, {fewest}, got {count}. Use smaller cells.")


def _kendall(x: Tensor, y: Tensor) -> Tensor:
    """Return tau-b ``(B,)`` of ``x`` ``(P,)`` and each row of ``y`` ``(B, P)``; nan if a row is constant or has nan."""
    above_x = (x[:, None] - x).sign()  # (P, P)
    above_y = (y[:, :, None] - y[:, None]).sign()  # (B, P, P)
    pairs = above_x.square().sum() * above_y.square().sum((1, 2))  # number of pairs untied in x, times that in y
    tau = (above_x * above_y).sum((1, 2)) / pairs.sqrt()
    return tau.masked_fill(y.isnan().any(1), torch.nan)  # the sign of nan is 0
