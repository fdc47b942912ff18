"""Everything that a comparison does with one clip: every method and control, every metric, each put down at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from captum_staa.benchmark.clips import MASKS, Load, Sample
from captum_staa.benchmark.controls import RandomWeights, model_free, other_class
from captum_staa.benchmark.cost import Cost, warm_up, with_cost
from captum_staa.benchmark.method_spec import NotApplicableError
from captum_staa.benchmark.methods import Method, seeded
from captum_staa.benchmark.records import CONTROLS, INVERTED, MODEL_FREE, OTHER_CLASS, RANDOM_WEIGHTS, control_of
from captum_staa.benchmark.scoring import COSTS, Metric, MetricInput, baseline_of
from captum_staa.benchmark.storage import WHOLE, Entry, Storage
from captum_staa.metrics import controls
from captum_staa.models import VideoClassifier
from captum_staa.visualization.saliency import as_pictures

SHEETS = 1  # clips whose maps are kept for a contact sheet, from the first on


@dataclass(frozen=True)
class Plan:
    """What is asked of every clip.

    Attributes:
        classifier: whom the methods explain.
        methods: made for it, those among them that do not apply.
        metrics: by name.
        baseline: name of what hides cells.
        steps: of the causal curves.
        perturbations_per_eval: of a clip per call of the model.
        seed: of all that is drawn at random, together with the clip's number.
        model_controls: names of the controls that run a method again, and that method's name.
    """

    classifier: VideoClassifier
    methods: list[Method]
    metrics: dict[str, Metric]
    baseline: str
    steps: int
    perturbations_per_eval: int
    seed: int
    model_controls: dict[str, str] = field(default_factory=dict)

    @property
    def applied(self) -> list[Method]:
        """The methods that apply."""
        return [method for method in self.methods if method.call is not None]

    @property
    def names(self) -> list[str]:
        """Whatever has an entry for each clip: methods that apply, and the controls."""
        own = {RANDOM_WEIGHTS, OTHER_CLASS} if self.applied else {INVERTED, RANDOM_WEIGHTS, OTHER_CLASS}  # of a method
        plain = [control for control in CONTROLS if control not in own]
        return [*(method.name for method in self.applied), *plain, *self.model_controls]

    @property
    def inverted(self) -> str | None:
        """The method that the control of this name turns round: the first that applies."""
        return self.applied[0].name if self.applied else None

    @cached_property
    def random_weights(self) -> RandomWeights:
        """Made when first needed, the same in every process."""
        return RandomWeights(self.classifier, self.seed)


def run_clip(
    plan: Plan, storage: Storage, index: int, name: str, load: Load, bar: tqdm[Any], measured: set[str]
) -> None:
    """Everything that is not yet there for one clip.

    What fails is written down with its reason, whatever it is, and the next thing is done: one broken file among
    twenty thousand must not end a run of days.

    Args:
        plan: what is asked.
        storage: where it is put down.
        index: the clip's number.
        name: its name.
        load: gives the clip.
        bar: is moved by every map.
        measured: methods whose memory this process has measured on the CPU; it grows.
    """
    todo = [method for method in (WHOLE, *plan.names) if not _done(storage.read(index, name, method))]
    bar.update(len(plan.names) - sum(method != WHOLE for method in todo))
    if not todo:
        return
    try:
        sample = load()
        whole = _whole(plan, index, name, sample)
        runner = _Clip(plan, index, name, sample, whole.values["other"], measured)
    except Exception as error:
        storage.write(Entry(index, name, WHOLE, error=_reason(error)))
        bar.update(sum(method != WHOLE for method in todo))
        return
    storage.write(whole, _pictured(plan, sample) if index < SHEETS else None)
    for method in todo:
        if method != WHOLE:
            entry, maps = runner.entry(method)
            kept = None if maps is None or index >= SHEETS else {"maps": maps[0].float().cpu().numpy()}
            storage.write(entry, kept)
            bar.update()


class _Clip:
    """One clip while its methods are run."""

    def __init__(self, plan: Plan, index: int, name: str, sample: Sample, other: float, measured: set[str]) -> None:
        self.plan, self.index, self.name, self.sample, self.measured = plan, index, name, sample, measured
        self.other = other  # the other class, nan if there is none
        self.methods = {method.name: method for method in plan.applied}
        self.baseline = baseline_of(plan.baseline, sample.clip, plan.classifier)
        self.metrics = {
            metric: known
            for metric, known in plan.metrics.items()
            if all(getattr(sample, part) is not None for part in known.needs)
        }
        self._first: Tensor | None = None  # the map that is turned round
        self._failed: dict[str, Exception] = {}  # by method: asking again would cost as much, and fail as well
        if any(metric in COSTS for metric in plan.metrics):
            warm_up(plan.classifier, sample.clip, sample.target)

    def entry(self, name: str) -> tuple[Entry, Tensor | None]:
        """What came out for a method or control, and its map ``(1, T, H, W)``."""
        try:
            maps, cost = self._measured(name) if name in self.methods else (self._control(name), None)
        except Exception as error:
            self._failed[name] = error
            if isinstance(error, NotApplicableError):
                return Entry(self.index, self.name, name, left_out=str(error) or "it does not apply"), None
            return Entry(self.index, self.name, name, error=_reason(error)), None
        case = MetricInput(
            classifier=self.plan.classifier,
            clip=self.sample.clip,
            maps=maps,
            target=self.sample.target,
            truth=self.sample.truth,
            rivals=self.sample.rivals,
            objects=self.sample.objects,
            baseline=self.baseline,
            steps=self.plan.steps,
            perturbations_per_eval=self.plan.perturbations_per_eval,
        )
        values: dict[str, float] = {}
        reasons: dict[str, str] = {}
        for metric, known in self.metrics.items():
            try:
                value = known.score(case) if known.score else getattr(cost, metric, None)
                if value is not None and not (metric == "memory" and math.isnan(value)):  # a control costs nothing
                    values[metric] = float(value)
            except Exception as error:
                reasons[metric] = _reason(error)
        return Entry(self.index, self.name, name, values, _points(case), reasons), maps

    def _measured(self, name: str) -> tuple[Tensor, Cost | None]:
        plan, clip = self.plan, self.sample.clip
        call = partial(self._map, name, self.sample.target)
        cost: Cost | None = None
        if any(metric in COSTS for metric in plan.metrics):
            # On the CPU memory takes a second call, so it is measured once: sizes are the same on all clips.
            memory = "memory" in plan.metrics and (clip.device.type == "cuda" or name not in self.measured)
            maps, cost = with_cost(call, plan.classifier, clip, memory=memory)
            self.measured.add(name)
        else:
            maps = call()
        if name == plan.inverted:
            self._first = maps
        return maps, cost

    def _map(self, name: str, target: int) -> Tensor:
        """A method's map; its random draws are the same for every target and on random weights."""
        method, clip = self.methods[name], self.sample.clip
        assert method.call is not None
        if name in self._failed:
            raise self._failed[name]
        with seeded(self.plan.seed, self.index, name, clip.device):
            found = method.call(clip.clone(), target)  # what it writes into its clip is nobody else's
        return method.map_of(found, clip, self.plan.classifier)

    def _control(self, name: str) -> Tensor:
        clip, layout = self.sample.clip, self.plan.classifier.layout
        if name in self.plan.model_controls:
            return self._model_control(self.plan.model_controls[name], control_of(name))
        if name == MODEL_FREE:
            return model_free(clip, layout)
        first = self._first_map() if name == INVERTED else None
        draw = torch.Generator().manual_seed(self.plan.seed * 2**32 + self.index)
        return controls(clip, layout, first, draw)[name]

    def _model_control(self, method: str, kind: str | None) -> Tensor:
        """The map of a method on random weights, or for the other class."""
        if kind == RANDOM_WEIGHTS:
            weights = self.plan.random_weights
            with weights.in_place():
                return self._map(method, self.sample.target)
        if math.isnan(self.other):
            raise NotApplicableError("the model has one output, so there is no other class")
        return self._map(method, int(self.other))

    def _first_map(self) -> Tensor:
        """The map that is turned round; made again where an earlier start has put its entry down already."""
        return self._map(str(self.plan.inverted), self.sample.target) if self._first is None else self._first


def progress(total: int | None, shown: bool) -> tqdm[Any]:
    """A bar over maps, with how many a second there are and how long the rest will take."""
    return tqdm(total=total, desc="comparing", unit="map", disable=not shown, smoothing=0.05, delay=0.5)


def _done(entry: Entry | None) -> bool:
    """What failed is tried again by the next start: a disk may be back, a file mended."""
    return entry is not None and not entry.error and not entry.reasons


def _whole(plan: Plan, index: int, name: str, sample: Sample) -> Entry:
    """The model's answer to the clip."""
    with torch.no_grad():
        logits = plan.classifier(sample.clip.clone())[0]
    if sample.target >= len(logits):
        raise ValueError(f"class {sample.target} is explained, but the model gives {len(logits)} logits")
    if lost := int(logits.isnan().sum()):
        raise ValueError(f"the model answers the whole clip with nan in {lost} of {len(logits)} classes; look upstream")
    other = other_class(logits, sample.target)
    values = {
        "target": sample.target,
        "answer": int(logits.argmax()),
        "other": math.nan if other is None else other,
        **{name: getattr(sample, name) is not None for name in MASKS},
    }
    return Entry(index, name, WHOLE, {key: float(value) for key, value in values.items()})


def _pictured(plan: Plan, sample: Sample) -> dict[str, np.ndarray[Any, Any]] | None:
    """The clip as frames, and its truth; None of what has no colors, such as optical flow."""
    if plan.classifier.layout.size(sample.clip)["C"] not in (1, 3):
        return None
    known = plan.classifier.preprocessing
    mean, std = (known.mean, known.std) if known is not None else (None, None)
    found: dict[str, np.ndarray[Any, Any]] = {
        "frames": as_pictures(sample.clip.cpu(), plan.classifier.layout, mean=mean, std=std)
    }
    return found if sample.truth is None else {**found, "truth": sample.truth[0].cpu().numpy()}


def _points(case: MetricInput) -> dict[str, list[float]]:
    """The causal curves, where a metric has asked for them and the model has answered at every point."""
    if "curves" not in vars(case):
        return {}
    found = case.curves
    if not (found.insertion.curve.isfinite().all() and found.deletion.curve.isfinite().all()):
        return {}
    return {
        "fractions": found.insertion.fractions[0].tolist(),
        "insertion": found.insertion.curve[0].tolist(),
        "deletion": found.deletion.curve[0].tolist(),
    }


def _reason(error: Exception) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:300]}" if said else type(error).__name__
