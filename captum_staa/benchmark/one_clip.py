"""Everything that a comparison does with one clip: every method and control, every metric, each put down at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from captum_staa.benchmark.clips import Load, Sample
from captum_staa.benchmark.cost import Cost, warm_up, with_cost
from captum_staa.benchmark.ledger import WHOLE, Entry, Ledger
from captum_staa.benchmark.methods import Method, seeded
from captum_staa.benchmark.rows import CONTROLS
from captum_staa.benchmark.scoring import COSTS, Case, Metric, baseline_of
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
        copies: of a clip per call of the model.
        seed: of all that is drawn at random, together with the clip's number.
    """

    classifier: VideoClassifier
    methods: list[Method]
    metrics: dict[str, Metric]
    baseline: str
    steps: int
    copies: int
    seed: int

    @property
    def applied(self) -> list[Method]:
        """The methods that apply."""
        return [method for method in self.methods if method.call is not None]

    @property
    def names(self) -> list[str]:
        """Whatever has an entry for each clip: methods that apply, and the controls."""
        return [*(method.name for method in self.applied), *(CONTROLS if self.applied else CONTROLS[:-1])]

    @property
    def inverted(self) -> str | None:
        """The method that the control of this name turns round: the first that applies."""
        return self.applied[0].name if self.applied else None


def run_clip(plan: Plan, ledger: Ledger, index: int, name: str, load: Load, bar: tqdm[Any], measured: set[str]) -> None:
    """Everything that is not yet there for one clip.

    What fails is written down with its reason, whatever it is, and the next thing is done: one broken file among
    twenty thousand must not end a run of days.

    Args:
        plan: what is asked.
        ledger: where it is put down.
        index: the clip's number.
        name: its name.
        load: gives the clip.
        bar: is moved by every map.
        measured: methods whose memory this process has measured on the CPU; it grows.
    """
    todo = [method for method in (WHOLE, *plan.names) if not _done(ledger.read(index, name, method))]
    bar.update(len(plan.names) - sum(method != WHOLE for method in todo))
    if not todo:
        return
    try:
        sample = load()
        whole = _whole(plan, index, name, sample)
        runner = _Clip(plan, index, name, sample, measured)
    except Exception as error:
        ledger.write(Entry(index, name, WHOLE, error=_reason(error)))
        bar.update(sum(method != WHOLE for method in todo))
        return
    ledger.write(whole, _pictured(plan, sample) if index < SHEETS else None)
    for method in todo:
        if method != WHOLE:
            entry, maps = runner.entry(method)
            kept = None if maps is None or index >= SHEETS else {"maps": maps[0].float().cpu().numpy()}
            ledger.write(entry, kept)
            bar.update()


class _Clip:
    """One clip while its methods are run."""

    def __init__(self, plan: Plan, index: int, name: str, sample: Sample, measured: set[str]) -> None:
        self.plan, self.index, self.name, self.sample, self.measured = plan, index, name, sample, measured
        self.methods = {method.name: method for method in plan.applied}
        self.baseline = baseline_of(plan.baseline, sample.clip, plan.classifier)
        self.metrics = {
            metric: known for metric, known in plan.metrics.items() if sample.truth is not None or not known.needs_truth
        }
        self._first: Tensor | Exception | None = None  # the map that is turned round, or why there is none
        if any(metric in COSTS for metric in plan.metrics):
            warm_up(plan.classifier, sample.clip, sample.target)

    def entry(self, name: str) -> tuple[Entry, Tensor | None]:
        """What came out for a method or control, and its map ``(1, T, H, W)``."""
        try:
            maps, cost = self._measured(name) if name in self.methods else (self._control(name), None)
        except Exception as error:
            if name == self.plan.inverted:
                self._first = error  # asking again would cost as much, and fail as well
            return Entry(self.index, self.name, name, error=_reason(error)), None
        case = Case(
            classifier=self.plan.classifier,
            clip=self.sample.clip,
            maps=maps,
            target=self.sample.target,
            truth=self.sample.truth,
            baseline=self.baseline,
            steps=self.plan.steps,
            copies=self.plan.copies,
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
        call = partial(self._map, self.methods[name])
        if not any(metric in COSTS for metric in plan.metrics):
            return call(), None
        # On the CPU memory takes a second call, so it is measured once: sizes are the same on all clips.
        memory = "memory" in plan.metrics and (clip.device.type == "cuda" or name not in self.measured)
        found, cost = with_cost(call, plan.classifier, clip, memory=memory)
        self.measured.add(name)
        return found, cost

    def _map(self, method: Method) -> Tensor:
        assert method.call is not None
        clip = self.sample.clip
        with seeded(self.plan.seed, self.index, method.name, clip.device):
            found = method.call(clip.clone(), self.sample.target)  # what it writes into its clip is nobody else's
        maps = method.map_of(found, clip, self.plan.classifier)
        if method.name == self.plan.inverted:
            self._first = maps
        return maps

    def _control(self, name: str) -> Tensor:
        first = self._first_map() if name == "inverted" else None
        draw = torch.Generator().manual_seed(self.plan.seed * 2**32 + self.index)
        return controls(self.sample.clip, self.plan.classifier.layout, first, draw)[name]

    def _first_map(self) -> Tensor:
        """The map that is turned round; made again where an earlier start has put its entry down already."""
        first = self._map(self.methods[str(self.plan.inverted)]) if self._first is None else self._first
        if isinstance(first, Exception):
            raise first
        return first


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
    values = {"target": sample.target, "answer": int(logits.argmax()), "truth": sample.truth is not None}
    return Entry(index, name, WHOLE, {key: float(value) for key, value in values.items()})


def _pictured(plan: Plan, sample: Sample) -> dict[str, np.ndarray[Any, Any]] | None:
    """The clip as frames, and its truth; None of what has no colours, such as optical flow."""
    if plan.classifier.layout.size(sample.clip)["C"] not in (1, 3):
        return None
    known = plan.classifier.preprocessing
    mean, std = (known.mean, known.std) if known is not None else (None, None)
    found: dict[str, np.ndarray[Any, Any]] = {
        "frames": as_pictures(sample.clip.cpu(), plan.classifier.layout, mean=mean, std=std)
    }
    return found if sample.truth is None else {**found, "truth": sample.truth[0].cpu().numpy()}


def _points(case: Case) -> dict[str, list[float]]:
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
