"""Metrics by name, each a function of one map and its clip."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

from torch import Tensor

from captum_staa import baselines, metrics
from captum_staa._utils.checks import check_choice, check_count, known_name
from captum_staa.benchmark.clips import Sample
from captum_staa.benchmark.records import ERROR, LEFT_OUT, NOT_APPLICABLE
from captum_staa.models import VideoClassifier

BASELINES: dict[str, Callable[..., Tensor]] = {
    name: getattr(baselines, name) for name in ("zero", "mean_frame", "blur", "freeze", "shuffle", "reverse", "noise")
}


@dataclass(frozen=True)
class MetricInput:
    """One map of one clip, and all data that a metric may use.

    Attributes:
        classifier: the explained model.
        sample: the clip, its target and its masks, which are also attributes of this object: ``clip``, ``target``,
            ``truth``, ``rivals`` and ``objects``.
        maps: ``(1, T, H, W)`` float64, signed.
        baseline: tensor of the clip's shape whose values replace hidden cells.
        steps: points on the insertion and deletion curves after the first.
        perturbations_per_eval: altered copies of the clip per call of the model.
    """

    classifier: VideoClassifier
    sample: Sample
    maps: Tensor
    baseline: Tensor
    steps: int
    perturbations_per_eval: int

    @property
    def clip(self) -> Tensor:
        """``(1, ...)`` in the layout of the classifier."""
        return self.sample.clip

    @property
    def target(self) -> int:
        """Class index."""
        return self.sample.target

    @property
    def truth(self) -> Tensor | None:
        """Bool ``(1, T, H, W)``, True where the evidence is; None if unknown."""
        return self.sample.truth

    @property
    def rivals(self) -> Tensor | None:
        """Bool ``(1, T, H, W)``, True where objects are that look like evidence and are not; None if unknown."""
        return self.sample.rivals

    @property
    def objects(self) -> Tensor | None:
        """Bool ``(1, K, T, H, W)``, one mask for the evidence and one for each rival; None if unknown."""
        return self.sample.objects

    @cached_property
    def curves(self) -> metrics.InsertionDeletionResult:
        """Insertion and deletion curves, computed once with ``2 * steps`` forward passes and shared by all metrics."""
        return metrics.insertion_deletion(*self._altered, target=self.target, steps=self.steps, **self._options)

    def altered(self, metric: Callable[..., Tensor], **options: Any) -> Tensor:
        """Return a metric that hides cells of the clip and reads the output of the model."""
        return metric(*self._altered, **options, **self._options)

    def placed(self, metric: Callable[..., Tensor], **options: Any) -> Tensor:
        """Return a metric that compares the map with the truth."""
        assert self.truth is not None  # the runner leaves such metrics out for clips without truth
        return metric(self.maps, self.truth, **options)

    @property
    def _altered(self) -> tuple[VideoClassifier, Tensor, Tensor]:
        return self.classifier, self.clip, self.maps

    @property
    def _options(self) -> dict[str, Any]:
        return {"baselines": self.baseline, "perturbations_per_eval": self.perturbations_per_eval}


@dataclass(frozen=True)
class MetricOptions:
    """Options of the metrics that alter clips.

    Attributes:
        baseline: name of the function of ``captum_staa.baselines`` that hides cells.
        steps: points on the insertion and deletion curves after the first.

    Raises:
        ValueError: there is no such baseline, or ``steps`` is less than 1.
        TypeError: ``steps`` is not an integer.
    """

    baseline: str = "zero"
    steps: int = 32

    def __post_init__(self) -> None:
        check_choice("baseline", self.baseline, BASELINES)
        check_count("steps", self.steps)
        object.__setattr__(self, "steps", int(self.steps))  # a NumPy integer has no JSON


class Metric(NamedTuple):
    """A metric and how to read its values.

    Attributes:
        score: function of a :class:`MetricInput` that returns ``(1,)`` or a number; None for costs, which are measured.
        higher_is_better: True or False; None if the metric only describes.
        needs: fields that a clip must have, or the metric is left out: ``"truth"``, ``"rivals"``, ``"objects"``.
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
    curve: metrics.Curve = getattr(case.curves, kind)
    if lost := int((~curve.curve.isfinite()).sum()):
        raise ValueError(
            f"the output of the model must be finite, got nan or infinity at {lost} of the {curve.curve.numel()} "
            f"points of the {kind} curve. Check the model on clips with hidden cells."
        )
    return curve.score


def _pointing(case: MetricInput) -> Tensor:
    """Return the pointing game with a tolerance of one tubelet, if the model has tubelets."""
    grid = case.classifier.grid
    return case.placed(metrics.pointing_game, tolerance=(0, 0, 0) if grid is None else grid.tubelet)


METRICS: dict[str, Metric] = {
    "insertion": Metric(partial(_area, kind="insertion"), True),
    "deletion": Metric(partial(_area, kind="deletion"), False),
    "faithfulness": _altered("faithfulness", of_target=False),  # as in its paper, over all classes
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
    "pointing_game": Metric(_pointing, True, needs=("truth",)),
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
COSTS = ("seconds", "forwards", "memory")  # fields of captum_staa.benchmark.clip_runner.Cost
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
    """Return metrics by name, in the order of the argument.

    Example:
        >>> list(chosen(["IoU", "forwards"]))
        ['iou', 'forwards']
        >>> metrics = chosen({"auroc": None, "brightest": lambda case: case.maps.amax()})
        >>> metrics["brightest"].higher_is_better is None
        True

    Args:
        wanted: names among ``METRICS``, whose case, spaces and punctuation do not matter; or a mapping from names to
            None, for one of ``METRICS``, a :class:`Metric`, or a function of a :class:`MetricInput` that returns a
            number. The function may have an attribute ``higher_is_better``: True, False or None. None takes a selection
            of all kinds.

    Raises:
        ValueError: a name is unknown or occurs twice, or there are no names; a name is one that marks rows without a
            number (``"error"``, ``"left out"``, ``"does not apply"``); ``higher_is_better`` is invalid.
        TypeError: ``wanted`` or one of its parts has the wrong type.
    """
    if wanted is None:
        wanted = DEFAULT
    if isinstance(wanted, str) or not isinstance(wanted, Iterable):
        raise TypeError(f"metrics must be a list of names or a mapping from names, got {wanted!r}. Pass [{wanted!r}].")
    pairs = list(wanted.items()) if isinstance(wanted, Mapping) else [(name, None) for name in wanted]
    names = [name if given is not None else _exact(name) for name, given in pairs]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"metrics must hold at least one name, and each name once, got {names}. Leave out repeated names."
        )
    return {name: _chosen(name, given) for name, (_, given) in zip(names, pairs, strict=True)}


def _exact(name: object) -> str:
    if not isinstance(name, str):
        check_choice("metrics", name, METRICS)
    return known_name("metrics", str(name), METRICS)


def baseline_of(name: str, clip: Tensor, classifier: VideoClassifier) -> Tensor:
    """Return the baseline of a clip that replaces hidden cells, by its name in ``captum_staa.baselines``."""
    return BASELINES[name](clip, classifier.layout)


def _chosen(name: str, given: Any) -> Metric:
    if given is None:
        return METRICS[name]
    if not isinstance(name, str):
        raise TypeError(f"names of metrics must be strings, got {name!r} of type {type(name).__name__}")
    if name in (ERROR, LEFT_OUT, NOT_APPLICABLE):
        raise ValueError(
            f"the name of a metric must not be {ERROR!r}, {LEFT_OUT!r} or {NOT_APPLICABLE!r}, which mark rows "
            f"without a number, got {name!r}. Give the metric another name."
        )
    if not isinstance(given, Metric):
        if not callable(given):
            raise TypeError(
                f"metric {name!r} must be a function of a MetricInput, a Metric, or None for a metric of METRICS, got "
                f"{given!r}"
            )
        given = Metric(given, getattr(given, "higher_is_better", None))
    if given.score is None and name not in COSTS:
        raise ValueError(
            f"metric {name!r} must have a function of a MetricInput as its score, got None. Only {', '.join(COSTS)} "
            f"are measured without one."
        )
    if not any(given.higher_is_better is known for known in (True, False, None)):
        raise ValueError(
            f"higher_is_better of metric {name!r} must be True, False or None, got {given.higher_is_better!r}"
        )
    return given
