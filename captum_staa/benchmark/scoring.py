"""Metrics by name, each a function of one map and all that is known of its clip."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

from torch import Tensor

from captum_staa import baselines, metrics
from captum_staa._utils.checks import check_choice
from captum_staa.benchmark.records import ERROR, LEFT_OUT, NOT_APPLICABLE
from captum_staa.models import VideoClassifier

BASELINES: dict[str, Callable[..., Tensor]] = {
    name: getattr(baselines, name) for name in ("zero", "mean_frame", "blur", "freeze", "shuffle", "reverse", "noise")
}


@dataclass(frozen=True)
class MetricInput:
    """One map of one clip, and what a metric may ask about them.

    Attributes:
        classifier: that was explained.
        clip: ``(1, ...)`` in its layout.
        maps: ``(1, T, H, W)`` float64, signs and all.
        target: class index.
        truth: bool ``(1, T, H, W)``, or None where nothing is known.
        rivals: bool ``(1, T, H, W)``, where objects are that look like evidence and are not; None where unknown.
        objects: bool ``(1, K, T, H, W)``, the evidence and each rival as an object; None where unknown.
        baseline: of the clip's shape, what takes the place of a cell.
        steps: points on a causal curve after the first.
        perturbations_per_eval: altered copies of the clip per call of the model.
    """

    classifier: VideoClassifier
    clip: Tensor
    maps: Tensor
    target: int
    truth: Tensor | None
    rivals: Tensor | None
    objects: Tensor | None
    baseline: Tensor
    steps: int
    perturbations_per_eval: int

    @cached_property
    def curves(self) -> metrics.InsertionDeletionResult:
        """Insertion and deletion; whoever asks first pays the ``2 steps`` forwards for all."""
        return metrics.insertion_deletion(*self._altered, target=self.target, steps=self.steps, **self._options)

    def altered(self, metric: Callable[..., Tensor], **options: Any) -> Tensor:
        """A metric that hides cells of the clip and looks at the model's answer."""
        return metric(*self._altered, **options, **self._options)

    def placed(self, metric: Callable[..., Tensor], **options: Any) -> Tensor:
        """A metric that compares the map with the truth."""
        assert self.truth is not None  # the runner leaves such metrics out where there is none
        return metric(self.maps, self.truth, **options)

    @property
    def _altered(self) -> tuple[VideoClassifier, Tensor, Tensor]:
        return self.classifier, self.clip, self.maps

    @property
    def _options(self) -> dict[str, Any]:
        return {"baselines": self.baseline, "perturbations_per_eval": self.perturbations_per_eval}


class Metric(NamedTuple):
    """What a table must know of a metric.

    Attributes:
        score: of a :class:`MetricInput`, ``(1,)`` or a number; None where the cost of the call is what counts.
        higher_is_better: None where neither is.
        needs: fields without which a clip is left out: ``"truth"``, ``"rivals"``, ``"objects"``.
    """

    score: Callable[[MetricInput], Any] | None
    higher_is_better: bool | None
    needs: tuple[str, ...] = ()


def _altered(name: str, of_target: bool = True) -> Metric:
    metric = getattr(metrics, name)

    def score(case: MetricInput) -> Tensor:
        return case.altered(metric, **({"target": case.target} if of_target else {}))

    return Metric(score, metric.higher_is_better)


def _placed(name: str, **options: Any) -> Metric:
    metric = getattr(metrics, name)
    return Metric(partial(MetricInput.placed, metric=metric, **options), metric.higher_is_better, needs=("truth",))


def _against_rivals(axis: Literal["joint", "space", "time"]) -> Metric:
    def score(case: MetricInput) -> Tensor:
        assert case.rivals is not None  # as above
        return case.placed(metrics.evidence_against_rivals, rivals=case.rivals, axis=axis)

    return Metric(score, True, needs=("truth", "rivals"))


def _object_pointing(case: MetricInput) -> Tensor:
    assert case.objects is not None  # as above
    return metrics.object_pointing(case.maps, case.objects)


def _area(case: MetricInput, kind: str) -> Tensor:
    found: metrics.Curve = getattr(case.curves, kind)
    if lost := int((~found.curve.isfinite()).sum()):
        raise ValueError(
            f"the model's answer is nan or infinite at {lost} of the {found.curve.numel()} points of the curve"
        )
    return found.score


def _pointing(case: MetricInput) -> Tensor:
    grid = case.classifier.grid
    return case.placed(metrics.pointing_game, tolerance=(0, 0, 0) if grid is None else grid.tubelet)


METRICS: dict[str, Metric] = {
    "insertion": Metric(partial(_area, kind="insertion"), True),
    "deletion": Metric(partial(_area, kind="deletion"), False),
    "faithfulness": _altered("faithfulness", of_target=False),  # the paper's, over all classes
    "monotonicity": _altered("monotonicity", of_target=False),
    "faithfulness_correlation": _altered("faithfulness_correlation"),
    "aopc": _altered("aopc"),
    "saco": _altered("saco"),
    "auroc": _placed("auroc"),
    "auroc_time": _placed("auroc", axis="time"),
    "auroc_space": _placed("auroc", axis="space"),
    "average_precision": _placed("average_precision"),
    "rivals": _against_rivals("joint"),
    "rivals_time": _against_rivals("time"),
    "rivals_space": _against_rivals("space"),
    "object_pointing": Metric(_object_pointing, True, needs=("objects",)),
    "pointing_game": Metric(_pointing, True, needs=("truth",)),  # one tubelet of tolerance, where there are some
    "temporal_pointing": _placed("temporal_pointing"),
    "iou": _placed("iou"),
    "energy_pointing_game": _placed("energy_pointing_game"),
    "relevance_rank_accuracy": _placed("relevance_rank_accuracy"),
    "signal_to_noise": _placed("signal_to_noise"),
    "smoothness_space": Metric(lambda case: metrics.smoothness(case.maps).space, None),
    "smoothness_time": Metric(lambda case: metrics.smoothness(case.maps).time, None),
    "sparsity": Metric(lambda case: metrics.sparsity(case.maps), None),
    "complexity": Metric(lambda case: metrics.complexity(case.maps), None),
    "seconds": Metric(None, False),
    "forwards": Metric(None, False),
    "memory": Metric(None, False),
}
COSTS = ("seconds", "forwards", "memory")  # fields of captum_staa.benchmark.cost.Cost
DEFAULT = (
    "insertion",
    "deletion",
    "faithfulness",
    "aopc",
    "saco",
    "auroc",
    "auroc_time",
    "auroc_space",
    "rivals",
    "rivals_time",
    "object_pointing",
    "pointing_game",
    "iou",
    "energy_pointing_game",
    "smoothness_space",
    "smoothness_time",
    "sparsity",
    *COSTS,
)


def chosen(wanted: Sequence[str] | Mapping[str, Any] | None) -> dict[str, Metric]:
    """Metrics by name, in the order in which they were asked for.

    Example:
        >>> list(chosen(["auroc", "forwards"]))
        ['auroc', 'forwards']
        >>> mine = chosen({"auroc": None, "brightest": lambda case: case.maps.amax()})
        >>> mine["brightest"].higher_is_better is None
        True

    Args:
        wanted: names among ``METRICS``; or a mapping from names to None, for one of ``METRICS``, a :class:`Metric`, or
            a function of a :class:`MetricInput` to a number, with an attribute ``higher_is_better``:
            True, False or None. None takes a choice of all kinds.

    Raises:
        ValueError: an unknown name, one twice, or none at all; a name that tables give to rows without a number
            (``"error"``, ``"left out"``, ``"does not apply"``); a ``higher_is_better`` that is none of the three.
        TypeError: something else.
    """
    if wanted is None:
        wanted = DEFAULT
    if isinstance(wanted, str) or not isinstance(wanted, Iterable):
        raise TypeError(f"metrics come as a list of names or a mapping from them, got {wanted!r}: [{wanted!r}]")
    names = list(wanted)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"metrics are one name or more, each once, got {names}")
    return {name: _chosen(name, wanted[name] if isinstance(wanted, Mapping) else None) for name in names}


def baseline_of(name: str, clip: Tensor, classifier: VideoClassifier) -> Tensor:
    """What hides cells of a clip: one of ``captum_staa.baselines`` by name."""
    check_choice("baseline", name, BASELINES)
    return BASELINES[name](clip, classifier.layout)


def _chosen(name: str, given: Any) -> Metric:
    if given is None:
        check_choice("metrics", name, METRICS)
        return METRICS[name]
    if not isinstance(name, str):
        raise TypeError(f"metrics are named by words, got {name!r} of type {type(name).__name__}")
    if name in (ERROR, LEFT_OUT, NOT_APPLICABLE):
        raise ValueError(f"{name!r} marks rows without a number in tables; give the metric another name")
    if not isinstance(given, Metric):
        if not callable(given):
            raise TypeError(f"metric {name!r} is a function of a MetricInput, or None for a known one, got {given!r}")
        given = Metric(given, getattr(given, "higher_is_better", None))
    if given.score is None and name not in COSTS:
        raise ValueError(
            f"metric {name!r} has no function of a MetricInput; only {', '.join(COSTS)} are measured without one"
        )
    if not any(given.higher_is_better is known for known in (True, False, None)):
        raise ValueError(f"higher_is_better of metric {name!r} is True, False or None, got {given.higher_is_better!r}")
    return given
