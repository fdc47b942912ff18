"""Do the cells with the highest attribution suffice for the model's answer, class against class?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_staa._utils.captum import (
    ExpansionTypes,
    TargetType,
    _expand_additional_forward_args,
    _format_additional_forward_args,
    _run_forward,
)
from captum_staa._utils.checks import is_number
from captum_staa.layout import VideoLayout
from captum_staa.masking.scores import selected
from captum_staa.metrics._cells import Cells, cells_of
from captum_staa.metrics._shared import metric
from captum_staa.result import Array

TENTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@metric(higher_is_better=True, lowest=0.0, highest=1.0)
def faithfulness(
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
    kept: float = 0.7,
) -> Tensor:
    """How alike the model's answers are to the clip and to its top cells alone: STAA's F, 1 where they are the same.

    Example:
        >>> def model(clip):  # three classes: the light in frame 0, in frame 1, and in frames 2 and 3
        ...     light = clip.mean((2, 3, 4))
        ...     return torch.stack([light[:, 0], light[:, 1], light[:, 2] + light[:, 3]], dim=1)
        >>> clip = torch.tensor([8.0, 2.0, 0.0, 0.0]).reshape(1, 4, 1, 1, 1)
        >>> true = torch.tensor([4.0, 3.0, 2.0, 1.0]).reshape(1, 4, 1, 1)  # the first two frames first
        >>> faithfulness(model, clip, true, layout="BTCHW", kept=0.5).item()
        1.0
        >>> round(faithfulness(model, clip, true, layout="BTCHW", kept=0.25).item(), 3)  # frame 1 is lost: 1 - 0.25 / 3
        0.917

    With ``m`` the outputs of all classes stretched to 0 .. 1, ``F = 1 - mean over classes |m(clip) - m(masked clip)|``.
    The mask is the map's own: its cells of highest attribution are kept, the rest becomes the baseline.

    F has no natural zero, since much of any clip suffices for most answers: report it beside a random and an inverted
    map. Of two classes, the stretched outputs are always 0 and 1, and F only says whether their order stays.

    Args:
        forward_func: a :class:`captum_staa.VideoClassifier`, or any function that gives outputs ``(B, K)``; the paper
            takes logits.
        clip: floats of five axes.
        attributions: signed, of the clip's shape, or maps ``(B, T, H, W)``.
        target: None is the mean over all classes, as in the paper. A target, as in Captum, takes the difference at this
            class alone: the class that the model predicts is at 1 until another one overtakes it.
        layout: the order of the clip's axes; may be left out for a classifier, which knows its own.
        additional_forward_args: further positional arguments of the model.
        cells: ``(t, h, w)``, the sides of a cell in frames and pixels, cut off at the clip's end. None takes the
            tubelets of a classifier that has some, and else 16 x 16 cells in every frame.
        feature_mask: regions instead of cells, one of ``captum_staa.feature_masks``.
        baselines: what replaces a cell: a number, or a tensor, one of ``captum_staa.baselines``.
        perturbations_per_eval: altered copies of the batch per call of the model. Changes speed, no number.
        kept: fraction of the cells to keep, rounded to whole ones, one at least and not all, the highest mean
            attribution first. Cells of equal attribution come in a fixed random order.

    Returns:
        ``(B,)`` float64, 0 to 1. nan where all classes of an answer have the same output, or one is nan.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a clip, a map, a mask or a baseline that do not fit each other, nan among them, an option out of
            range, no cell kept or all, where any map scores alike, fewer than two classes.

    Reference:
        Wang and Liu, "STAA: Spatio-Temporal Attention Attribution for Real-Time Interpreting Transformer-based Video
        Models", arXiv 2411.00630. Its code masks by an attention matrix stretched over the picture, not by the map.
    """
    all_cells = cells_of(
        forward_func, clip, attributions, layout, cells, feature_mask, baselines, perturbations_per_eval
    )
    all_cells.check_part("kept", kept)
    return 1 - _differences(forward_func, all_cells, [kept], target, additional_forward_args)[0]


@metric(higher_is_better=False, lowest=-1.0, highest=1.0)
def monotonicity(
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
    fractions: Sequence[float] = TENTHS,
) -> Tensor:
    """Does the answer come steadily nearer as more of the top cells are kept? Kendall's tau, and -1 is best.

    Example:
        >>> def model(clip):
        ...     light = clip.mean((2, 3, 4))
        ...     return torch.stack([light[:, 0], light[:, 1], light[:, 2] + light[:, 3]], dim=1)
        >>> clip = torch.tensor([8.0, 2.0, 1.0, 0.0]).reshape(1, 4, 1, 1, 1)
        >>> first = torch.tensor([4.0, 3.0, 2.0, 1.0]).reshape(1, 4, 1, 1)
        >>> monotonicity(model, clip, first, layout="BTCHW", fractions=(0.25, 0.5, 0.75)).item()
        -1.0

    Tau-b between the kept fraction and the difference ``1 - F`` of :func:`faithfulness`, with the paper's sign: the
    difference should fall, so negative is good.

    It is a weak test by itself. More of a clip is nearer to the whole clip in any order, and an inverted map may well
    reach -1, too: report it beside a random and an inverted map, and beside :func:`faithfulness`.

    Args:
        forward_func: this, and whatever else is not named here, as for :func:`faithfulness`.
        fractions: of the cells to keep, at least two, rising, between 0 and 1, each rounded to whole cells, of which
            the first keeps one at least and the last not all: the default needs 6 cells.

    Returns:
        ``(B,)`` float64, -1 to 1. nan where the difference is the same at all fractions, or is nan.

    Raises:
        TypeError, ValueError: as :func:`faithfulness`.

    Reference:
        Wang and Liu, as for :func:`faithfulness`. Tau-b: Kendall, "The Treatment of Ties in Ranking Problems",
        Biometrika 33 (1945).
    """
    several = isinstance(fractions, (list, tuple, np.ndarray)) and len(fractions) > 1 and all(map(is_number, fractions))
    if not several or not all(a < b for a, b in pairwise((0, *fractions, 1))):
        raise ValueError(f"fractions are two or more, rising and between 0 and 1, got {fractions!r}")
    all_cells = cells_of(
        forward_func, clip, attributions, layout, cells, feature_mask, baselines, perturbations_per_eval
    )
    for outermost in (fractions[0], fractions[-1]):
        all_cells.check_part("each of fractions", outermost)
    differences = _differences(forward_func, all_cells, fractions, target, additional_forward_args)
    return _kendall(torch.tensor(fractions, dtype=torch.float64).to(differences), differences.T)


@torch.no_grad()
def _differences(
    forward_func: Callable[..., Any], cells: Cells, fractions: Sequence[float], target: TargetType, extra: object
) -> Tensor:
    """``(len(fractions), B)`` float64: between the stretched outputs of the clip and of the top cells alone."""
    batch = len(cells.clip)
    extra = _format_additional_forward_args(extra)

    def stretched(clips: Tensor, copies: int) -> Tensor:
        """``(copies, B, K)`` in 0 .. 1."""
        args = _expand_additional_forward_args(extra, copies, expansion_type=ExpansionTypes.repeat) if extra else None
        outputs = _run_forward(forward_func, clips, None, args)
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != copies * batch:
            came = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(f"the model must give outputs (B, K), B = {copies * batch} here, got {came}")
        if outputs.shape[1] < 2:
            raise ValueError("the model gives 1 output, but outputs of classes are compared here; aopc and saco take 1")
        outputs = outputs.double()
        low, high = outputs.aminmax(dim=1, keepdim=True)
        return ((outputs - low) / (high - low)).unflatten(0, (copies, batch))

    whole = stretched(cells.clip.clone(), 1)
    ranks = cells.ranks()
    replaced = torch.stack([ranks >= cells.portion(fraction) for fraction in fractions])  # (P, B, n)
    answers = torch.cat([stretched(clips, copies) for copies, clips in cells.altered(replaced)])
    differences = (whole - answers).abs()  # (P, B, K)
    if target is None:
        return differences.mean(2)
    return torch.stack([selected(each, target) for each in differences])


def _kendall(x: Tensor, y: Tensor) -> Tensor:
    """Tau-b ``(B,)`` of ``x`` ``(P,)`` with each row of ``y`` ``(B, P)``; nan where a row is constant or holds nan."""
    above_x = (x[:, None] - x).sign()  # (P, P)
    above_y = (y[:, :, None] - y[:, None]).sign()  # (B, P, P)
    pairs = above_x.square().sum() * above_y.square().sum((1, 2))  # those untied in x, times those untied in y
    tau = (above_x * above_y).sum((1, 2)) / pairs.sqrt()
    return tau.masked_fill(y.isnan().any(1), torch.nan)  # the sign of nan is 0
