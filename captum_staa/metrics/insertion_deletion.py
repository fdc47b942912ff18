"""Insertion and deletion: does the target's output rise and fall with the cells of highest attribution?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_staa._utils import notebook
from captum_staa._utils.captum import TargetType
from captum_staa._utils.checks import check_choice, check_count
from captum_staa.layout import VideoLayout
from captum_staa.masking.scores import TargetScore
from captum_staa.metrics._cells import Cells, Order, Output, cells_of, counts_of, score_of, walk
from captum_staa.metrics._shared import Axis, metric
from captum_staa.result import Array

_REVERSED: dict[Order, Order] = {"morf": "lerf", "lerf": "morf"}


class Curve(NamedTuple):
    """Class that holds the target's output while cells are inserted or deleted one after the other.

    Attributes:
        score: ``(B,)`` float64, the area under each curve over the fraction, by the trapezoidal rule.
        curve: ``(B, steps + 1)`` float64, the target's output.
        fractions: ``(B, steps + 1)`` float64, the fraction of a clip's cells inserted or deleted so far, 0 to 1.
    """

    score: Tensor
    curve: Tensor
    fractions: Tensor

    def _repr_html_(self) -> str:
        name = "clip 0" if len(self.score) == 1 else f"mean of {len(self.score)} clips"
        figure = notebook.curves({name: _mean_curve(self)}, "part of the cells", "output")
        return notebook.block("Curve", figure, notebook.by_clip({"score": self.score.tolist()}))


class InsertionDeletionResult(NamedTuple):
    """Class that holds the curves of insertion and deletion in both orders.

    Attributes:
        insertion: most relevant first; higher is better.
        deletion: most relevant first; lower is better. It is ``insertion_lerf`` reversed and has the same score.
        insertion_lerf: least relevant first; lower is better.
        deletion_lerf: least relevant first; higher is better. It is ``insertion`` reversed and has the same score.
    """

    insertion: Curve
    deletion: Curve
    insertion_lerf: Curve
    deletion_lerf: Curve

    def _repr_html_(self) -> str:
        lines = {"insertion": _mean_curve(self.insertion), "deletion": _mean_curve(self.deletion)}
        figure = notebook.curves(lines, "part of the cells", "output, most relevant first, mean of clips")
        scores = {name: curve.score.tolist() for name, curve in self._asdict().items()}
        return notebook.block("InsertionDeletionResult", figure, notebook.by_clip(scores))


def _mean_curve(curve: Curve) -> list[tuple[float, float]]:
    """Return the points of the mean curve over clips; all clips have the same number of steps."""
    return list(zip(curve.fractions.nanmean(0).tolist(), curve.curve.nanmean(0).tolist(), strict=True))


@metric(higher_is_better=True, lowest=0.0, highest=1.0)
def insertion(
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
    steps: int = 128,
    order: Order = "morf",
    axis: Axis = "joint",
    output: Output = "probability",
    perturbations_per_eval: int = 16,
) -> Curve:
    """Return the area under the curve of the target's probability while cells are inserted into a baseline.

    Example:
        >>> from captum_staa import VideoClassifier
        >>> from captum_staa.benchmark import PlantedClips
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> inputs, label, truth = PlantedClips(seed=12, n=20)[16:17]
        >>> good = insertion(clf, inputs, truth.float(), target=label, steps=16)
        >>> bad = insertion(clf, inputs, -truth.float(), target=label, steps=16)
        >>> bool(good.score > 0.9), bool(bad.score < 0.5), good.curve.shape
        (True, True, torch.Size([1, 17]))

    After step ``k`` of ``K``, ``round(k n / K)`` of a clip's ``n`` cells are inserted (halves are rounded up), in the
    order of their mean attribution. The mean is used because a sum would favor large cells. Cells with equal means come
    in a fixed random order. With the target's output ``p_k`` and the inserted fraction ``f_k``,
    ``score = sum over k of (f_k - f_(k-1)) (p_k + p_(k-1)) / 2``.

    Args:
        forward_func: a :class:`captum_staa.VideoClassifier`, or any function that maps inputs to logits ``(B, K)``.
        inputs: clips, a 5-D tensor of finite floats.
        attributions: signed and finite, torch or numpy: in the shape of ``inputs`` (channels are summed), or maps
            ``(B, T, H, W)``. Only their order matters; pass ``attributions.abs()`` if magnitude is meant.
        target: class whose output is followed, as in Captum.
        layout: order of the axes of ``inputs``, such as ``"BTCHW"``. Not needed for a classifier, which has its own.
        additional_forward_args: further positional arguments of the model, as in Captum.
        cells: ``(t, h, w)``, the sides of a cell in frames and pixels. Cells at the end of an axis are cut off. None
            takes the tubelet of a classifier that has one, and otherwise 16 x 16 cells in each frame.
        feature_mask: cells of any other shape: an integer tensor, broadcastable to ``inputs`` and equal for all
            channels, such as those of :mod:`captum_staa.feature_masks`. ``cells`` and ``axis`` must then be left out.
        baselines: value of cells that are not inserted: a number, or a tensor broadcastable to ``inputs``, such as
            those of :mod:`captum_staa.baselines`. None is 0.
        steps: number of points on the curve after the first, limited to the number of cells.
        order: ``"morf"``, most relevant first, or ``"lerf"``, least relevant first, which is exactly the reverse order.
        axis: the extent of a cell.

            - ``"joint"``: the sides of ``cells``.
            - ``"space"``: all frames, so the map is rated by its sum over time.
            - ``"time"``: whole frames, so the map is rated by its sum over each frame.
        output: ``"probability"``, a softmax of the logits, or ``"logit"``, the target's output without change. Scores
            of logits have no bounds.
        perturbations_per_eval: points of the curve per call of the model, each a copy of the whole batch in memory.
            Affects speed and memory only.

    Returns:
        :class:`Curve`. Higher is better with ``"morf"``, lower is better with ``"lerf"``. nan only where the model's
        output is nan. The score of a clip does not depend on the other clips of the batch.

    Raises:
        ValueError: shapes that do not fit, nan or infinity, an unknown option, a missing layout or target, or ``cells``
            together with ``feature_mask``.
        TypeError: an argument of the wrong type, or an unknown one.

    Reference:
        Petsiuk, Das and Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC 2018. MoRF
        and LeRF: Samek et al., "Evaluating the Visualization of What a Deep Neural Network Has Learned", IEEE TNNLS 28
        (2017).
    """
    check_choice("order", order, _REVERSED)
    all_cells = cells_of(
        forward_func, inputs, attributions, layout, cells, feature_mask, baselines, perturbations_per_eval, axis
    )
    score = score_of(all_cells.forward_func, target, additional_forward_args, output, len(inputs))
    return _insertions(all_cells, score, (order,), steps)[0]


@metric(higher_is_better=False, lowest=0.0, highest=1.0)
def deletion(
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
    steps: int = 128,
    order: Order = "morf",
    axis: Axis = "joint",
    output: Output = "probability",
    perturbations_per_eval: int = 16,
) -> Curve:
    """Return the area under the curve of the target's probability while cells are replaced by a baseline.

    Example:
        >>> from captum_staa import VideoClassifier
        >>> from captum_staa.benchmark import PlantedClips
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> inputs, label, truth = PlantedClips(seed=12, n=20)[16:17]
        >>> good = deletion(clf, inputs, truth.float(), target=label, steps=16)
        >>> bad = deletion(clf, inputs, -truth.float(), target=label, steps=16)
        >>> bool(good.score < bad.score)
        True

    Deletion of the most relevant cells first is insertion of the least relevant cells first in reverse: the model sees
    the same clips, and the area is the same. Call :func:`insertion_deletion` to compute both at once.

    Args:
        forward_func: this and all other arguments are as for :func:`insertion`.

    Returns:
        :class:`Curve`, with the deleted fraction in ``fractions``. Lower is better with ``"morf"``, higher is better
        with ``"lerf"``. nan only where the model's output is nan.

    Raises:
        ValueError, TypeError: as for :func:`insertion`.

    Reference:
        As for :func:`insertion`.
    """
    check_choice("order", order, _REVERSED)
    all_cells = cells_of(
        forward_func, inputs, attributions, layout, cells, feature_mask, baselines, perturbations_per_eval, axis
    )
    score = score_of(all_cells.forward_func, target, additional_forward_args, output, len(inputs))
    return _reversed(_insertions(all_cells, score, (_REVERSED[order],), steps)[0])


@metric(higher_is_better=None, lowest=0.0, highest=1.0)
def insertion_deletion(
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
    steps: int = 128,
    axis: Axis = "joint",
    output: Output = "probability",
    perturbations_per_eval: int = 16,
) -> InsertionDeletionResult:
    """Return insertion and deletion in both orders. The model is called on ``2 steps`` copies of each clip in all.

    Example:
        >>> from captum_staa import VideoClassifier
        >>> from captum_staa.benchmark import PlantedClips
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> inputs, label, truth = PlantedClips(seed=12, n=20)[16:17]
        >>> scores = insertion_deletion(clf, inputs, truth.float(), target=label, steps=16)
        >>> bool(scores.insertion.score > scores.deletion.score)
        True
        >>> torch.equal(scores.deletion.curve, scores.insertion_lerf.curve.flip(1))
        True

    Args:
        forward_func: this and all other arguments are as for :func:`insertion`.

    Returns:
        :class:`InsertionDeletionResult`, with the results of :func:`insertion` and :func:`deletion`. nan only where the
        model's output is nan.

    Raises:
        ValueError, TypeError: as for :func:`insertion`.

    Reference:
        As for :func:`insertion`.
    """
    all_cells = cells_of(
        forward_func, inputs, attributions, layout, cells, feature_mask, baselines, perturbations_per_eval, axis
    )
    score = score_of(all_cells.forward_func, target, additional_forward_args, output, len(inputs))
    morf, lerf = _insertions(all_cells, score, ("morf", "lerf"), steps)
    return InsertionDeletionResult(morf, _reversed(lerf), lerf, _reversed(morf))


def _insertions(cells: Cells, score: TargetScore, orders: tuple[Order, ...], steps: int) -> list[Curve]:
    """Return the insertion curve of each order. All start at the baseline and end at the inputs, computed once."""
    check_count("steps", steps)
    counts = counts_of(cells, min(int(steps), int(cells.totals.max())))  # (steps + 1, B)
    fractions = (counts / counts[-1].double()).T.to(cells.inputs.device)  # (B, steps + 1)
    first, *rest = orders
    curves = [walk(cells, score, first, counts).T]
    for order in rest:
        between = walk(cells, score, order, counts[1:-1]).T
        curves.append(torch.cat([curves[0][:, :1], between, curves[0][:, -1:]], dim=1))
    return [Curve(torch.trapezoid(curve, fractions), curve, fractions) for curve in curves]


def _reversed(curve: Curve) -> Curve:
    """Return the deletion curve that is the reverse of an insertion curve; the area is the same."""
    return Curve(curve.score, curve.curve.flip(1), 1 - curve.fractions.flip(1))
