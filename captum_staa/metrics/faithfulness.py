"""Do the cells with the highest attribution preserve the model's outputs for all classes?"""

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
        inputs: clips, a 5-D tensor of finite floats.
        attributions: signed and finite, in the shape of ``inputs`` (channels are summed), or maps ``(B, T, H, W)``.
        target: None takes the mean over all classes, as in the paper. A class index, or one per example, takes the
            difference of this class alone; the scaled output of the predicted class is 1 as long as it is the highest.
        layout: order of the axes of ``inputs``, such as ``"BTCHW"``. Not needed for a classifier, which has its own.
        additional_forward_args: further positional arguments of the model.
        cells: ``(t, h, w)``, the sides of a cell in frames and pixels. Cells at the end of an axis are cut off. None
            takes the tubelet of a classifier that has one, and otherwise 16 x 16 cells in each frame.
        feature_mask: regions instead of cells: an integer tensor, such as those of :mod:`captum_staa.feature_masks`.
        baselines: value of replaced cells: a number, or a tensor broadcastable to ``inputs``, such as those of
            :mod:`captum_staa.baselines`. None is 0.
        perturbations_per_eval: altered copies of the batch per call of the model. Affects speed and memory only.
        kept: fraction of the cells to keep, between 0 and 1, the highest mean attribution first. It is rounded to a
            number of cells, which must be at least one and not all. Cells with equal means come in a fixed random
            order.

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
    all_cells = cells_of(
        forward_func, inputs, attributions, layout, cells, feature_mask, baselines, perturbations_per_eval
    )
    all_cells.check_part("kept", kept)
    return 1 - _differences(all_cells, [kept], target, additional_forward_args)[0]


@metric(higher_is_better=False, lowest=-1.0, highest=1.0)
def monotonicity(
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
    all_cells = cells_of(
        forward_func, inputs, attributions, layout, cells, feature_mask, baselines, perturbations_per_eval
    )
    for outermost in (fractions[0], fractions[-1]):
        all_cells.check_part("each of fractions", outermost)
    differences = _differences(all_cells, fractions, target, additional_forward_args)
    return _kendall(torch.tensor(fractions, dtype=torch.float64).to(differences), differences.T)


@torch.no_grad()
def _differences(cells: Cells, fractions: Sequence[float], target: TargetType, extra: object) -> Tensor:
    """Return the difference of scaled outputs, inputs against top cells alone, ``(len(fractions), B)`` float64."""
    batch = len(cells.inputs)
    extra = _format_additional_forward_args(extra)

    def scaled(clips: Tensor, copies: int) -> Tensor:
        """Return the outputs scaled to 0 .. 1, ``(copies, B, K)``."""
        args = _expand_additional_forward_args(extra, copies, expansion_type=ExpansionTypes.repeat) if extra else None
        outputs = _run_forward(cells.forward_func, clips, None, args)
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

    whole = scaled(cells.inputs.clone(), 1)
    ranks = cells.ranks()
    replaced = torch.stack([ranks >= cells.portion(fraction) for fraction in fractions])  # (P, B, n)
    without = torch.cat([scaled(clips, copies) for copies, clips in cells.altered(replaced)])
    differences = (whole - without).abs()  # (P, B, K)
    if target is None:
        return differences.mean(2)
    return torch.stack([selected(row, target) for row in differences])


def _kendall(x: Tensor, y: Tensor) -> Tensor:
    """Return tau-b ``(B,)`` of ``x`` ``(P,)`` and each row of ``y`` ``(B, P)``; nan if a row is constant or has nan."""
    above_x = (x[:, None] - x).sign()  # (P, P)
    above_y = (y[:, :, None] - y[:, None]).sign()  # (B, P, P)
    pairs = above_x.square().sum() * above_y.square().sum((1, 2))  # number of pairs untied in x, times that in y
    tau = (above_x * above_y).sum((1, 2)) / pairs.sqrt()
    return tau.masked_fill(y.isnan().any(1), torch.nan)  # the sign of nan is 0
