"""Does the target's output fall when cells are replaced, and the more, the higher their attribution?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_staa._utils.captum import TargetType
from captum_staa._utils.checks import check_choice, check_count
from captum_staa._utils.generators import generator_or_seeded
from captum_staa.layout import VideoLayout
from captum_staa.masking.scores import TargetScore
from captum_staa.metrics._cells import Cells, cells_of
from captum_staa.metrics._shared import metric, midranks, pearson
from captum_staa.result import Array


@metric(higher_is_better=True, lowest=-1.0, highest=1.0)
def faithfulness_correlation(
    forward_func: Callable[..., Any],
    clip: Tensor,
    attributions: Array,
    *,
    target: TargetType = None,
    layout: VideoLayout | str | None = None,
    additional_forward_args: object = None,
    cells: Sequence[int] | None = None,
    feature_mask: Tensor | None = None,
    baselines: float | Tensor | None = 0,
    perturbations_per_eval: int = 16,
    fraction: float = 0.2,
    n_subsets: int = 100,
    correlation: str = "pearson",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Over random subsets of cells, how the sum of their attributions goes with the fall of the output without them.

    Example:
        >>> clip = torch.rand(1, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> weights = torch.arange(8.0).reshape(1, 8, 1, 1, 1)
        >>> def model(clip):
        ...     return (weights * clip).sum((1, 2, 3, 4))
        >>> round(faithfulness_correlation(model, clip, weights * clip, layout="BTCHW").item(), 6)
        1.0
        >>> round(faithfulness_correlation(model, clip, -weights * clip, layout="BTCHW").item(), 6)
        -1.0

    A cell counts with its mean attribution, whatever its size. Scale and offset of a map cancel.

    Args:
        forward_func: a :class:`captum_staa.VideoClassifier`, or any function that gives one row of outputs per example:
            logits, or probabilities where it ends in a softmax.
        clip: floats of five axes.
        attributions: signed, of the clip's shape, or maps ``(B, T, H, W)``.
        target: as in Captum; needed where the model has several outputs.
        layout: the order of the clip's axes; may be left out for a classifier, which knows its own.
        additional_forward_args: further positional arguments of the model.
        cells: ``(t, h, w)``, the sides of a cell in frames and pixels, cut off at the clip's end. None takes the
            tubelets of a classifier that has some, and else 16 x 16 cells in every frame.
        feature_mask: regions instead of cells, one of ``captum_staa.feature_masks``.
        baselines: what replaces a cell: a number, or a tensor, one of ``captum_staa.baselines``.
        perturbations_per_eval: altered copies of the batch per call of the model. Changes speed, no number.
        fraction: of the cells that a subset holds, rounded to whole ones.
        n_subsets: how many, at least 3; all clips that share their cells get the same ones.
        correlation: ``"pearson"``, as in the paper, or ``"spearman"``, of ranks.
        generator: draws the subsets; None is one seeded with 0, for this call alone.

    Returns:
        ``(B,)`` float64, -1 to 1, 1 is best and 0 is chance. nan where one side has no contrast: a flat map, or an
        output that never changes, or is nan.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a clip, a map, a mask or a baseline that do not fit each other, nan among them, an option out of
            range, a subset that would hold no cell or all, a missing target.

    Reference:
        Bhatt, Weller and Moura, "Evaluating and Aggregating Feature-based Model Explanations", IJCAI 2020, equation 3.
    """
    check_count("n_subsets", n_subsets, least=3)
    check_choice("correlation", correlation, ("pearson", "spearman"))
    draw = generator_or_seeded(generator)
    all_cells = cells_of(
        forward_func, clip, attributions, layout, cells, feature_mask, baselines, perturbations_per_eval
    )
    all_cells.check_part("fraction", fraction)
    held = all_cells.portion(fraction)
    seeds = torch.randint(2**62, (n_subsets,), generator=draw, device=draw.device).tolist()
    subsets = torch.stack([all_cells.subset(held, seed) for seed in seeds])  # (S, 1 or B, n)
    falls = _falls(forward_func, all_cells, subsets, target, additional_forward_args)
    relative = all_cells.means - all_cells.means[:, :1]  # a flat map must give sums that are equal to the last digit
    sums = torch.stack([(subset * relative).sum(1) for subset in subsets])  # (S, B)
    if correlation == "spearman":
        values = pearson(midranks(sums.T), midranks(falls.T))
    else:
        values = pearson(sums.T, falls.T)
    return values.masked_fill(falls.isnan().any(0), torch.nan).to(clip.device)


@metric(higher_is_better=True, lowest=float("-inf"), highest=float("inf"))
def aopc(
    forward_func: Callable[..., Any],
    clip: Tensor,
    attributions: Array,
    *,
    target: TargetType = None,
    layout: VideoLayout | str | None = None,
    additional_forward_args: object = None,
    cells: Sequence[int] | None = None,
    feature_mask: Tensor | None = None,
    baselines: float | Tensor | None = 0,
    perturbations_per_eval: int = 16,
    steps: int = 10,
) -> Tensor:
    """Area over the perturbation curve: the mean fall of the output while cells go, most relevant first.

    Example:
        >>> clip = torch.tensor([8.0, 2.0, 1.0, 1.0]).reshape(1, 4, 1, 1, 1)
        >>> def model(clip):
        ...     return clip.sum((1, 2, 3, 4))
        >>> aopc(model, clip, clip, layout="BTCHW", steps=4).item()  # (0 + 8 + 10 + 11 + 12) / 5
        8.2
        >>> aopc(model, clip, -clip, layout="BTCHW", steps=4).item()  # (0 + 1 + 2 + 4 + 12) / 5
        3.8

    After step k of L, the top ``k / L`` of the cells are replaced, at last all of them: ``1 / (L + 1) * sum over k = 0
    .. L of f(clip) - f(clip after step k)``. The fall has the output's units: compare maps of one clip and one model.

    Args:
        forward_func: this, and whatever else is not named here, as for :func:`faithfulness_correlation`.
        steps: L, at most the number of cells. Cells of equal attribution come in a fixed random order.

    Returns:
        ``(B,)`` float64 in units of the output; nan where the output is nan.

    Raises:
        TypeError, ValueError: as :func:`faithfulness_correlation`.

    Reference:
        Samek et al., "Evaluating the Visualization of What a Deep Neural Network Has Learned", IEEE TNNLS 28 (2017),
        equation 12. There a step replaces one small square, and the curve ends long before the picture does.
    """
    check_count("steps", steps)
    steps = int(steps)  # numpy's small ones overflow
    all_cells = cells_of(
        forward_func, clip, attributions, layout, cells, feature_mask, baselines, perturbations_per_eval
    )
    all_cells.check_portions("steps", steps)
    ranks = all_cells.ranks()
    replaced = torch.stack([ranks < all_cells.portion(step / steps) for step in range(1, steps + 1)])
    falls = _falls(forward_func, all_cells, replaced, target, additional_forward_args)
    return (falls.sum(0) / (steps + 1)).to(clip.device)


@metric(higher_is_better=True, lowest=-1.0, highest=1.0)
def saco(
    forward_func: Callable[..., Any],
    clip: Tensor,
    attributions: Array,
    *,
    target: TargetType = None,
    layout: VideoLayout | str | None = None,
    additional_forward_args: object = None,
    cells: Sequence[int] | None = None,
    feature_mask: Tensor | None = None,
    baselines: float | Tensor | None = 0,
    perturbations_per_eval: int = 16,
    groups: int = 10,
) -> Tensor:
    """Salience-guided faithfulness coefficient: of two groups of cells, does the more salient one matter more?

    Example:
        >>> clip = torch.tensor([8.0, 4.0, 2.0, 1.0]).reshape(1, 4, 1, 1, 1)
        >>> def model(clip):
        ...     return clip.sum((1, 2, 3, 4))
        >>> saco(model, clip, clip, layout="BTCHW", groups=4).item()
        1.0
        >>> saco(model, clip, -clip, layout="BTCHW", groups=4).item()
        -1.0
        >>> swapped = torch.tensor([8.0, 1.0, 2.0, 4.0]).reshape(1, 4, 1, 1)  # frames 1 to 3 are the wrong way round
        >>> round(saco(model, clip, swapped, layout="BTCHW", groups=4).item(), 3)  # (7 + 6 + 4 - 1 - 2 - 3) / 23
        0.478

    Cells are ranked and split into groups of equal size, and one group at a time is replaced. Each pair of groups
    weighs as much as their saliences differ, and counts + where the output falls more for the more salient one, - where
    it falls less; the sum is divided by that of all weights. Unlike in :func:`aopc`, the values themselves count, not
    their order alone.

    Args:
        forward_func: this, and whatever else is not named here, as for :func:`faithfulness_correlation`. The
            paper takes probabilities, and the picture's mean color as baseline.
        groups: how many, at least 2, at most the number of cells. Where it does not divide that number, groups differ
            by one cell, the larger of which matter more for their size alone: a perfect map is then below 1. Cells of
            equal attribution come in a fixed random order.

    Returns:
        ``(B,)`` float64, -1 to 1, 1 is best and 0 is chance. nan where all groups are equally salient, as in a flat
        map, and where the output is nan.

    Raises:
        TypeError, ValueError: as :func:`faithfulness_correlation`.

    Note:
        A group's salience is the mean over its cells, which for groups of equal size is the paper's sum up to a factor
        that cancels. Two equal falls count 0 here; in the paper they count +, so that a model that always gives the
        same answer would score 1.

    Reference:
        Wu et al., "On the Faithfulness of Vision Transformer Explanations", CVPR 2024, algorithm 1.
    """
    check_count("groups", groups, least=2)
    all_cells = cells_of(
        forward_func, clip, attributions, layout, cells, feature_mask, baselines, perturbations_per_eval
    )
    all_cells.check_portions("groups", groups)
    group = all_cells.ranks() * groups // all_cells.totals  # absent cells come after the last group
    members = torch.stack([group == number for number in range(groups)])  # (G, B, n)
    falls = _falls(forward_func, all_cells, members, target, additional_forward_args)
    relative = all_cells.means - all_cells.means[:, :1]  # the groups of a flat map must be equal to the last digit
    salience = (members * relative).sum(2) / members.sum(2)  # (G, B)
    first, second = torch.triu_indices(groups, groups, offset=1)
    weights = salience[first] - salience[second]  # (pairs, B), never negative
    values = (weights * (falls[first] - falls[second]).sign()).sum(0) / weights.sum(0)
    return values.masked_fill(falls.isnan().any(0), torch.nan).to(clip.device)  # the sign of nan is 0


@torch.no_grad()
def _falls(
    forward_func: Callable[..., Any], cells: Cells, replaced: Tensor, target: TargetType, extra: object
) -> Tensor:
    """``(P, B)`` float64 on the CPU: the output of the clip, less that without the cells ``replaced`` ``(P, B, n)``."""
    score = TargetScore(forward_func, target, extra, len(cells.clip))
    whole = score((cells.clip.clone(),))
    answers = torch.cat([score((clips,), copies) for copies, clips in cells.altered(replaced)])
    return whole.cpu().double() - answers.cpu().double()
