"""Insertion and deletion: does the target's output rise and fall with the cells of highest attribution?

:class:`Ablation` is the part that all metrics that replace cells have in common, also those of
:mod:`captum_staa.metrics.faithfulness`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from captum_staa import feature_masks
from captum_staa._utils import notebook
from captum_staa._utils.captum import BaselineType, TargetType
from captum_staa._utils.checks import check_choice, check_count, is_triple
from captum_staa._utils.model_state import in_eval_mode
from captum_staa.feature_masks.regular import for_inputs
from captum_staa.layout import VideoLayout, layout_of
from captum_staa.masking.arguments import TargetScore, baselines_for, masks_for, with_probabilities, without_channels
from captum_staa.metrics._shared import SPANNED, Axis, metric
from captum_staa.models.classifier import VideoClassifier
from captum_staa.result import Array, clips_in, maps_for

Order = Literal["morf", "lerf"]
Output = Literal["probability", "logit"]

_REVERSED: dict[Order, Order] = {"morf": "lerf", "lerf": "morf"}
_PER_FRAME = 16  # default number of cells along each side of a frame


class Curve(NamedTuple):
    """The target's output while cells are inserted or deleted one after the other.

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
    """The curves of insertion and deletion in both orders.

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
@in_eval_mode
def insertion(
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
    steps: int = 128,
    order: Order = "morf",
    axis: Axis = "joint",
    output: Output = "probability",
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

    The ``n`` cells of a clip are ranked by their mean attribution. The mean is used because a sum would favor large
    cells. Cells with equal means come in a fixed random order. After step ``k`` of ``K``, the first ``k n / K`` cells
    are inserted, rounded to an integer with halves up. If ``p_k`` is the target's output after step ``k`` and ``f_k``
    the inserted fraction of the cells, ``score = sum over k of (f_k - f_(k-1)) (p_k + p_(k-1)) / 2``.

    Args:
        forward_func: a :class:`captum_staa.VideoClassifier`, or any function that returns ``(B, K)``: logits, or
            probabilities, whose rows sum to 1.
        inputs: clips, a 5-D tensor of finite floats, or a tuple of them (RGB and flow). The cells of all inputs are
            then ranked together.
        attributions: signed and finite, torch or numpy: in the shape of ``inputs`` (channels are summed), or maps
            ``(B, T, H, W)``. Only their order matters. Pass ``attributions.abs()`` if magnitude is meant. A tuple for a
            tuple of inputs.
        baselines: value of cells that are not inserted: a number, or a tensor broadcastable to ``inputs``, such as
            those of :mod:`captum_staa.baselines`, or a tuple of these. None is 0.
        target: class whose output is followed: a class index or label, or one per clip.
        additional_forward_args: further positional arguments of the model, as in Captum.
        feature_mask: cells of any shape: an integer tensor, broadcastable to ``inputs`` and equal for all channels,
            such as those of :mod:`captum_staa.feature_masks`. ``cells`` and ``axis`` must then have their defaults. A
            tuple for several inputs: cells with the same id are one cell, so ``(mask, mask)`` ranks places and moments
            of all inputs together.
        perturbations_per_eval: altered copies of the batch per call of the model. Affects speed and memory only.
        layout: order of the axes of ``inputs``, such as ``"BTCHW"``. Not needed for a classifier, which has its own.
        cells: ``(t, h, w)``, the sides of a cell in frames and pixels. Cells at the end of an axis are cut off. None
            takes the tubelet of a classifier that has one, and otherwise 16 x 16 cells in each frame.
        steps: K, number of points on the curve after the first. At most one point per cell is computed.
        order: ``"morf"``, most relevant first, or ``"lerf"``, least relevant first, which is exactly the reverse order.
        axis: the extent of a cell.

            - ``"joint"``: the sides of ``cells``.
            - ``"space"``: all frames, so the map is rated by its sum over time.
            - ``"time"``: whole frames, so the map is rated by its sum over each frame.
        output: ``"probability"``: the target's probability, according to the classifier's ``output``; for a
            ``"score"``, which has none, the score itself. ``"logit"``: the target's output without change. Areas under
            curves of scores and logits have no bounds.

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
    ablation = Ablation.of(
        forward_func, inputs, attributions, baselines, feature_mask, perturbations_per_eval, layout, cells, axis
    )
    return _insertions(ablation, (order,), steps, target, additional_forward_args, output)[0]


@metric(higher_is_better=False, lowest=0.0, highest=1.0)
@in_eval_mode
def deletion(
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
    steps: int = 128,
    order: Order = "morf",
    axis: Axis = "joint",
    output: Output = "probability",
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
    ablation = Ablation.of(
        forward_func, inputs, attributions, baselines, feature_mask, perturbations_per_eval, layout, cells, axis
    )
    (curve,) = _insertions(ablation, (_REVERSED[order],), steps, target, additional_forward_args, output)
    return _reversed(curve)


@metric(higher_is_better=None, lowest=0.0, highest=1.0)
@in_eval_mode
def insertion_deletion(
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
    steps: int = 128,
    axis: Axis = "joint",
    output: Output = "probability",
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
    ablation = Ablation.of(
        forward_func, inputs, attributions, baselines, feature_mask, perturbations_per_eval, layout, cells, axis
    )
    morf, lerf = _insertions(ablation, ("morf", "lerf"), steps, target, additional_forward_args, output)
    return InsertionDeletionResult(morf, _reversed(lerf), lerf, _reversed(morf))


def _insertions(
    ablation: Ablation,
    orders: Sequence[Order],
    steps: int,
    target: TargetType,
    additional_forward_args: object,
    output: Output,
) -> list[Curve]:
    """Return the insertion curve of each order. All start at the baseline and end at the inputs, computed once."""
    score = ablation.score(target, additional_forward_args, output)
    check_count("steps", steps)
    cells = ablation.totals.T.expand(1, ablation.batch)  # (1, B)
    steps = min(int(steps), int(cells.max()))
    counts = (2 * torch.arange(steps + 1)[:, None] * cells + steps) // (2 * steps)  # (steps + 1, B): rounded, halves up
    fractions = (counts / cells.double()).T.to(ablation.inputs[0].device)  # (B, steps + 1)
    first, *rest = orders
    curves = [_insert(ablation, score, first, counts)]
    for order in rest:
        between = _insert(ablation, score, order, counts[1:-1])
        curves.append(torch.cat([curves[0][:, :1], between, curves[0][:, -1:]], dim=1))
    return [Curve(torch.trapezoid(curve, fractions), curve, fractions) for curve in curves]


@torch.no_grad()
def _insert(ablation: Ablation, score: TargetScore, order: Order, counts: Tensor) -> Tensor:
    """Return the scores ``(B, S)`` float64 with the first ``counts`` ``(S, B)`` cells of the order inserted."""
    ranks = ablation.ranks()
    positions = ablation.spread((ranks if order == "morf" else ablation.totals - 1 - ranks)[None].float())
    scores = []
    for chunk in counts.split(ablation.perturbations_per_eval):
        first = chunk.view(*chunk.shape, 1, 1, 1, 1)  # (P, B, 1, 1, 1, 1)
        kept = tuple((first.to(at) - at).clamp_(0, 1) for at in positions)  # integers: 1 if position < count, else 0
        scores.append(score(ablation.blended(kept), len(chunk)))  # new tensors: the model may write to them
    return torch.cat(scores).double().T


def _reversed(curve: Curve) -> Curve:
    """Return the deletion curve that is the reverse of an insertion curve; the area is the same."""
    return Curve(curve.score, curve.curve.flip(1), 1 - curve.fractions.flip(1))


@dataclass(frozen=True)
class Ablation:
    """A model, its inputs, and the cells of the inputs that can be replaced by a baseline.

    Attributes:
        forward_func: the model, as a function of clips ``(B, T, C, H, W)``.
        inputs: clips ``(B, T, C, H, W)``, one tensor per input of the model.
        baselines: replace cells of the inputs; same shapes as ``inputs``.
        ids: int64 ``(1 or B, T, H, W)`` per input, the cell of each voxel, 0 to n - 1. A cell may span several inputs.
        means: ``(B, n)`` float64 on the CPU, the mean attribution of each cell.
        present: bool ``(1 or B, n)`` on the CPU. Not every clip has all cells of a mask that follows the image.
        perturbations_per_eval: altered copies of the batch per call of the model.
    """

    model: object
    forward_func: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    baselines: tuple[Tensor, ...]
    ids: tuple[Tensor, ...]
    means: Tensor
    present: Tensor
    perturbations_per_eval: int

    @classmethod
    def of(
        cls,
        forward_func: Callable[..., Any],
        inputs: Tensor | tuple[Tensor, ...],
        attributions: Array | tuple[Array, ...],
        baselines: BaselineType,
        feature_mask: Tensor | tuple[Tensor, ...] | None,
        perturbations_per_eval: int,
        layout: VideoLayout | str | None,
        cells: Sequence[int] | None,
        axis: Axis = "joint",
    ) -> Ablation:
        """Check the arguments of a metric, which are those of :func:`insertion`, and convert them."""
        if not callable(forward_func):
            raise TypeError(f"forward_func must be a function or a module, got {type(forward_func).__name__}.")
        layout = layout_of(forward_func, layout)
        clips = tuple(clip.detach() for clip in clips_in(inputs, layout))
        maps = maps_for(attributions, clips, layout)
        check_count("perturbations_per_eval", perturbations_per_eval)
        replacements = baselines_for(clips, baselines)
        check_choice("axis", axis, SPANNED)
        if feature_mask is None:

            def divided(clip: Tensor, layout: VideoLayout) -> Tensor:
                return feature_masks.grid(clip, layout, _sides(forward_func, clip, layout, cells, axis))

            feature_mask = for_inputs(clips, layout, divided)
        elif cells is not None or axis != "joint":
            raise ValueError(
                f"cells and axis must have their defaults if feature_mask is passed, because the mask defines the "
                f"cells, got {cells = }, {axis = }. Leave both out, or leave out feature_mask."
            )
        masks = masks_for(clips, feature_mask)
        ids = tuple(without_channels(mask, clip, layout) for mask, clip in zip(masks, clips, strict=True))
        rows = max(map(len, ids))  # 1 if all clips have the same cells, or B
        voxels = torch.cat([units.flatten(1).expand(rows, -1) for units in ids], dim=1)
        means, counts = _means(torch.cat([values.cpu().flatten(1) for values in maps], dim=1), voxels)
        return cls(
            forward_func,
            layout.forward_from_working(forward_func, len(clips)),
            tuple(map(layout.to_working, clips)),
            tuple(map(layout.to_working, replacements)),
            tuple(units.to(clip.device) for units, clip in zip(ids, clips, strict=True)),
            means,
            present=counts[:rows] > 0,
            perturbations_per_eval=int(perturbations_per_eval),
        )

    @property
    def batch(self) -> int:
        """B, the number of clips."""
        return len(self.inputs[0])

    @property
    def totals(self) -> Tensor:
        """``(1 or B, 1)`` int64 on the CPU, the number of cells of each clip."""
        return self.present.sum(1, keepdim=True)

    def score(self, target: TargetType, additional_forward_args: object, output: Output = "logit") -> TargetScore:
        """Return the target's output, or its probability, as a function of clips ``(B, T, C, H, W)``."""
        check_choice("output", output, ("probability", "logit"))
        forward_func = self.forward_func
        if output == "probability":
            fix = "Or pass output='logit' to take the target's output as it is."
            forward_func = with_probabilities(forward_func, self.model, fix)
        return TargetScore(forward_func, target, additional_forward_args, self.batch)

    def ranks(self) -> Tensor:
        """Return the rank of each cell by its mean attribution, ``(B, n)``, 0 for the highest. Absent cells come last.

        Cells with equal means are ranked in a random order that is the same in every call and for every clip. If they
        were ranked by their ids, a constant map would go from the first frame to the last and could not serve as a
        control.
        """
        means = self.means.masked_fill(~self.present, -torch.inf)
        # Random keys, not a permutation: the first n keys do not depend on how many follow, so the ranks of a clip do
        # not depend on the other clips of its batch.
        shuffle = random_keys(means.shape[1], seed=0).argsort()
        order = shuffle[means[:, shuffle].argsort(dim=1, descending=True, stable=True)]
        return order.argsort(1)

    def spread(self, values: Tensor) -> tuple[Tensor, ...]:
        """Expand one number per cell ``(P, 1 or B, n)`` to ``(P, 1 or B, T, 1, H, W)`` for each input."""
        spread = []
        for ids in self.ids:
            rows = values.to(ids.device).take_along_dim(ids.flatten(1)[None], 2)  # (P, 1 or B, T * H * W)
            spread.append(rows.unflatten(2, ids.shape[1:])[:, :, :, None])
        return tuple(spread)

    def blended(self, kept: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return copies ``(P * B, ...)``, batch by batch: the inputs where ``kept`` is 1, the baselines where it is 0.

        At 0 and 1, ``lerp`` returns exactly one of the two, in a fourth of the time that ``where`` takes.
        """
        parts = zip(self.baselines, self.inputs, kept, strict=True)
        return tuple(torch.lerp(baseline, clip, keep.to(clip)).flatten(0, 1) for baseline, clip, keep in parts)


def _sides(
    forward_func: object, clip: Tensor, layout: VideoLayout, cells: Sequence[int] | None, axis: Axis
) -> list[int]:
    """Return the sides of a cell ``(t, h, w)``: the full size along the axes that ``axis`` spans."""
    sizes = layout.size(clip)
    if cells is None:
        grid = forward_func.grid if isinstance(forward_func, VideoClassifier) else None
        cells = grid.tubelet if grid else (1, -(-sizes["H"] // _PER_FRAME), -(-sizes["W"] // _PER_FRAME))
    if not is_triple(cells):
        raise ValueError(f"cells must be (t, h, w), the sides of one cell in frames and pixels, got {cells!r}.")
    return [sizes[letter] if letter in SPANNED[axis] else side for letter, side in zip("THW", cells, strict=True)]


def _means(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the number of voxels of each cell, ``(B, n)``, from values ``(B, V)``.

    On the CPU, because the order of summation is fixed there. The rounding error of a sum depends on the number of its
    terms. The mean is clamped to the extremes of its voxels: the mean of equal values is then exactly this value, and
    cells of different size can tie.
    """
    rows = ids.expand_as(values)
    zeros = values.new_zeros(len(values), int(ids.max()) + 1)
    counts = zeros.scatter_add(1, rows, torch.ones_like(values))
    lowest, highest = (zeros.scatter_reduce(1, rows, values, how, include_self=False) for how in ("amin", "amax"))
    return (zeros.scatter_add(1, rows, values) / counts.clamp_min(1)).clamp(lowest, highest), counts


def random_keys(count: int, seed: int) -> Tensor:
    """Return random numbers in [0, 1), ``(count,)`` float64 on the CPU."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
