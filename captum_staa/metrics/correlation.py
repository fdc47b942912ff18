"""Does the target's output fall more when cells of higher attribution are replaced?"""

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
    inputs: Tensor,
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
        inputs: clips, a 5-D tensor of finite floats.
        attributions: signed and finite, in the shape of ``inputs`` (channels are summed), or maps ``(B, T, H, W)``.
        target: class index, or one per example, as in Captum. Required if the model has several outputs.
        layout: order of the axes of ``inputs``, such as ``"BTCHW"``. Not needed for a classifier, which has its own.
        additional_forward_args: further positional arguments of the model.
        cells: ``(t, h, w)``, the sides of a cell in frames and pixels. Cells at the end of an axis are cut off. None
            takes the tubelet of a classifier that has one, and otherwise 16 x 16 cells in each frame.
        feature_mask: regions instead of cells: an integer tensor, such as those of :mod:`captum_staa.feature_masks`.
        baselines: value of replaced cells: a number, or a tensor broadcastable to ``inputs``, such as those of
            :mod:`captum_staa.baselines`. None is 0.
        perturbations_per_eval: altered copies of the batch per call of the model. Affects speed and memory only.
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
    all_cells = cells_of(
        forward_func, inputs, attributions, layout, cells, feature_mask, baselines, perturbations_per_eval
    )
    all_cells.check_part("fraction", fraction)
    size = all_cells.portion(fraction)
    seeds = torch.randint(2**62, (n_subsets,), generator=draw, device=draw.device).tolist()
    subsets = torch.stack([all_cells.subset(size, seed) for seed in seeds])  # (S, 1 or B, n)
    falls = _falls(all_cells, subsets, target, additional_forward_args)
    relative = all_cells.means - all_cells.means[:, :1]  # a constant map must give exactly equal sums
    sums = torch.stack([(subset * relative).sum(1) for subset in subsets])  # (S, B)
    if correlation == "spearman":
        values = pearson(midranks(sums.T), midranks(falls.T))
    else:
        values = pearson(sums.T, falls.T)
    return values.masked_fill(falls.isnan().any(0), torch.nan).to(inputs.device)


@metric(higher_is_better=True, lowest=float("-inf"), highest=float("inf"))
def aopc(
    forward_func: Callable[..., Any],
    inputs: Tensor,
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
    all_cells = cells_of(
        forward_func, inputs, attributions, layout, cells, feature_mask, baselines, perturbations_per_eval
    )
    all_cells.check_portions("steps", steps)
    ranks = all_cells.ranks()
    replaced = torch.stack([ranks < all_cells.portion(step / steps) for step in range(1, steps + 1)])
    falls = _falls(all_cells, replaced, target, additional_forward_args)
    return (falls.sum(0) / (steps + 1)).to(inputs.device)


@metric(higher_is_better=True, lowest=-1.0, highest=1.0)
def saco(
    forward_func: Callable[..., Any],
    inputs: Tensor,
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
    all_cells = cells_of(
        forward_func, inputs, attributions, layout, cells, feature_mask, baselines, perturbations_per_eval
    )
    all_cells.check_portions("groups", groups)
    group = all_cells.ranks() * groups // all_cells.totals  # absent cells come after the last group
    members = torch.stack([group == number for number in range(groups)])  # (G, B, n)
    falls = _falls(all_cells, members, target, additional_forward_args)
    relative = all_cells.means - all_cells.means[:, :1]  # groups of a constant map must be exactly equal
    salience = (members * relative).sum(2) / members.sum(2)  # (G, B)
    first, second = torch.triu_indices(groups, groups, offset=1)
    weights = salience[first] - salience[second]  # (pairs, B), never negative
    values = (weights * (falls[first] - falls[second]).sign()).sum(0) / weights.sum(0)
    return values.masked_fill(falls.isnan().any(0), torch.nan).to(inputs.device)  # the sign of nan is 0


@torch.no_grad()
def _falls(cells: Cells, replaced: Tensor, target: TargetType, extra: object) -> Tensor:
    """Return the fall of the output without the cells ``replaced`` ``(P, B, n)``, ``(P, B)`` float64 on the CPU."""
    score = TargetScore(cells.forward_func, target, extra, len(cells.inputs))
    whole = score((cells.inputs.clone(),))
    without = torch.cat([score((clips,), copies) for copies, clips in cells.altered(replaced)])
    return whole.cpu().double() - without.cpu().double()
