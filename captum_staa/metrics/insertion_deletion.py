"""Insertion and deletion: does the model's answer come and go with what the map calls relevant?"""

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

_BACKWARDS: dict[Order, Order] = {"morf": "lerf", "lerf": "morf"}


class Curve(NamedTuple):
    """The model's answer while cells are inserted or deleted one after the other.

    Attributes:
        score: ``(B,)`` float64, the area under each curve, by trapezoids over the fraction.
        curve: ``(B, steps + 1)`` float64, the target's output.
        fractions: ``(B, steps + 1)`` float64, how many of a clip's cells were inserted or deleted by then, 0 to 1.
    """

    score: Tensor
    curve: Tensor
    fractions: Tensor

    def _repr_html_(self) -> str:
        name = "clip 0" if len(self.score) == 1 else f"mean of {len(self.score)} clips"
        shown = notebook.curves({name: _course(self)}, "part of the cells", "output")
        return notebook.block("Curve", shown, notebook.by_clip({"score": self.score.tolist()}))


class InsertionDeletionResult(NamedTuple):
    """Both walks, and both of them backwards.

    Attributes:
        insertion: most relevant first; high is good.
        deletion: most relevant first; low is good. It is ``insertion_lerf`` backwards, and its score the same.
        insertion_lerf: least relevant first; low is good.
        deletion_lerf: least relevant first; high is good. It is ``insertion`` backwards, and its score the same.
    """

    insertion: Curve
    deletion: Curve
    insertion_lerf: Curve
    deletion_lerf: Curve

    def _repr_html_(self) -> str:
        lines = {"insertion": _course(self.insertion), "deletion": _course(self.deletion)}
        shown = notebook.curves(lines, "part of the cells", "output, most relevant first, mean of clips")
        scores = {name: curve.score.tolist() for name, curve in self._asdict().items()}
        return notebook.block("InsertionDeletionResult", shown, notebook.by_clip(scores))


def _course(curve: Curve) -> list[tuple[float, float]]:
    """The mean over clips, which are as many steps long."""
    return list(zip(curve.fractions.nanmean(0).tolist(), curve.curve.nanmean(0).tolist(), strict=True))


@metric(higher_is_better=True, lowest=0.0, highest=1.0)
def insertion(
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
    steps: int = 128,
    order: Order = "morf",
    axis: Axis = "joint",
    output: Output = "probability",
    perturbations_per_eval: int = 16,
) -> Curve:
    """The area under the target's probability while the clip's cells are inserted into a baseline.

    Example:
        >>> from captum_staa import VideoClassifier
        >>> from captum_staa.benchmark import PlantedClips
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> clip, label, truth = PlantedClips(seed=12, n=20)[16:17]
        >>> good = insertion(clf, clip, truth.float(), target=label, steps=16)
        >>> bad = insertion(clf, clip, -truth.float(), target=label, steps=16)
        >>> bool(good.score > 0.9), bool(bad.score < 0.5), good.curve.shape
        (True, True, torch.Size([1, 17]))

    Of a clip's ``n`` cells, ``round(k n / K)`` (halves up) stand after step ``k`` of ``K``, in the order of the mean
    attribution of their voxels; a sum would favor large cells. Equal means come in a fixed random order. With ``p_k``
    the target's output and ``f_k`` the fraction inserted, ``score = sum over k of (f_k - f_(k-1)) (p_k + p_(k-1)) / 2``

    Args:
        forward_func: a :class:`captum_staa.VideoClassifier`, or any function of a clip that gives logits ``(B, K)``.
        clip: finite floats of five axes.
        attributions: signed, finite, torch or numpy: of the clip's shape (channels are summed), or maps
            ``(B, T, H, W)``. Only their order matters; pass ``attributions.abs()`` where magnitude is meant.
        target: as in Captum, the class whose output is followed.
        layout: the order of the clip's axes. A classifier knows its own.
        additional_forward_args: further positional arguments of the model, as in Captum.
        cells: ``(t, h, w)``, the sides of a cell in frames and pixels; the last ones are cut off at the clip's end.
            None takes the classifier's tubelet, or else 16 x 16 cells in each frame.
        feature_mask: cells of any other shape, as whole numbers broadcastable to the clip with channels alike: one of
            ``captum_staa.feature_masks``, such as ``supervoxels``. Then ``cells`` and ``axis`` say nothing.
        baselines: what stands where nothing is inserted: a number, a tensor of the clip's shape or 1 along some axes,
            such as one of ``captum_staa.baselines``. None is 0.
        steps: points on the curve after the first; as many as there are cells where these are fewer.
        order: ``"morf"``, most relevant first, or ``"lerf"``, least relevant first: exactly the other way round.
        axis: what a cell spans. ``"joint"``, its own sides; ``"space"``, all frames, so that the map is judged by its
            sum over time; ``"time"``, whole frames, so that it is judged by its sum over each.
        output: ``"probability"``, a softmax of the logits, or ``"logit"``, the target's output as the model gives it,
            where scores have no bounds.
        perturbations_per_eval: points of the curve per call of the model, each a copy of the whole batch in memory.
            Changes speed, no number.

    Returns:
        :class:`Curve`. High is good with ``"morf"``, low with ``"lerf"``. Nan only where the model's output is. Each
        clip is scored alone: the others in its batch change nothing.

    Raises:
        ValueError: shapes that do not fit, nan or infinity, an unknown word, no layout, a missing target, ``cells`` and
            ``feature_mask`` both.
        TypeError: an argument of the wrong type, or an unknown one.

    Reference:
        Petsiuk, Das and Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC 2018. MoRF
        and LeRF: Samek et al., "Evaluating the Visualization of What a Deep Neural Network Has Learned", IEEE TNNLS 28
        (2017).
    """
    check_choice("order", order, _BACKWARDS)
    all_cells = cells_of(
        forward_func, clip, attributions, layout, cells, feature_mask, baselines, perturbations_per_eval, axis
    )
    score = score_of(forward_func, target, additional_forward_args, output, len(clip))
    return _insertions(all_cells, score, (order,), steps)[0]


@metric(higher_is_better=False, lowest=0.0, highest=1.0)
def deletion(
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
    steps: int = 128,
    order: Order = "morf",
    axis: Axis = "joint",
    output: Output = "probability",
    perturbations_per_eval: int = 16,
) -> Curve:
    """The area under the target's probability while the clip's cells are replaced by a baseline.

    Example:
        >>> from captum_staa import VideoClassifier
        >>> from captum_staa.benchmark import PlantedClips
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> clip, label, truth = PlantedClips(seed=12, n=20)[16:17]
        >>> good = deletion(clf, clip, truth.float(), target=label, steps=16)
        >>> bad = deletion(clf, clip, -truth.float(), target=label, steps=16)
        >>> bool(good.score < bad.score)
        True

    To delete the most relevant first is to insert the least relevant first, walked backwards: the same clips, and the
    same area. Whoever wants both calls :func:`insertion_deletion`.

    Args:
        forward_func: this, and whatever else is not named here, as for :func:`insertion`.

    Returns:
        :class:`Curve`; ``fractions`` count what is deleted. Low is good with ``"morf"``, high with ``"lerf"``. Nan only
        where the model's output is.

    Raises:
        ValueError, TypeError: as for :func:`insertion`.

    Reference:
        As for :func:`insertion`.
    """
    check_choice("order", order, _BACKWARDS)
    all_cells = cells_of(
        forward_func, clip, attributions, layout, cells, feature_mask, baselines, perturbations_per_eval, axis
    )
    score = score_of(forward_func, target, additional_forward_args, output, len(clip))
    return _backwards(_insertions(all_cells, score, (_BACKWARDS[order],), steps)[0])


@metric(higher_is_better=None, lowest=0.0, highest=1.0)
def insertion_deletion(
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
    steps: int = 128,
    axis: Axis = "joint",
    output: Output = "probability",
    perturbations_per_eval: int = 16,
) -> InsertionDeletionResult:
    """Insertion and deletion, most and least relevant first, at the price of two curves: ``2 steps`` clips in all.

    Example:
        >>> from captum_staa import VideoClassifier
        >>> from captum_staa.benchmark import PlantedClips
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> clip, label, truth = PlantedClips(seed=12, n=20)[16:17]
        >>> scores = insertion_deletion(clf, clip, truth.float(), target=label, steps=16)
        >>> bool(scores.insertion.score > scores.deletion.score)
        True
        >>> torch.equal(scores.deletion.curve, scores.insertion_lerf.curve.flip(1))
        True

    Args:
        forward_func: this, and whatever else is not named here, as for :func:`insertion`.

    Returns:
        :class:`InsertionDeletionResult`, as of :func:`insertion` and :func:`deletion`. nan only where the model's
        output is.

    Raises:
        ValueError, TypeError: as for :func:`insertion`.

    Reference:
        As for :func:`insertion`.
    """
    all_cells = cells_of(
        forward_func, clip, attributions, layout, cells, feature_mask, baselines, perturbations_per_eval, axis
    )
    score = score_of(forward_func, target, additional_forward_args, output, len(clip))
    morf, lerf = _insertions(all_cells, score, ("morf", "lerf"), steps)
    return InsertionDeletionResult(morf, _backwards(lerf), lerf, _backwards(morf))


def _insertions(cells: Cells, score: TargetScore, orders: tuple[Order, ...], steps: int) -> list[Curve]:
    """From the baseline to the clip in each order; these two ends are computed once."""
    check_count("steps", steps)
    counts = counts_of(cells, min(int(steps), int(cells.totals.max())))  # (steps + 1, B)
    fractions = (counts / counts[-1].double()).T.to(cells.clip.device)  # (B, steps + 1)
    first, *rest = orders
    curves = [walk(cells, score, first, counts).T]
    for order in rest:
        between = walk(cells, score, order, counts[1:-1]).T
        curves.append(torch.cat([curves[0][:, :1], between, curves[0][:, -1:]], dim=1))
    return [Curve(torch.trapezoid(curve, fractions), curve, fractions) for curve in curves]


def _backwards(curve: Curve) -> Curve:
    """Deletion of what was inserted last, first; the area is the same."""
    return Curve(curve.score, curve.curve.flip(1), 1 - curve.fractions.flip(1))
