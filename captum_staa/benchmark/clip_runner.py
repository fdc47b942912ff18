"""Run all methods, controls and metrics of a comparison on one clip, and store each result at once."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from captum_staa._utils.checks import simplified
from captum_staa._utils.model_state import uncompiled
from captum_staa.benchmark.clips import MASKS, Load, Sample
from captum_staa.benchmark.methods import Method, seeded
from captum_staa.benchmark.records import (
    ALL,
    CONTROLS,
    INVERTED,
    MODEL_FREE,
    OTHER_CLASS,
    RANDOM_WEIGHTS,
    Entry,
    Storage,
    control_of,
)
from captum_staa.benchmark.registry import NotApplicableError
from captum_staa.benchmark.scoring import COSTS, Metric, MetricInput, MetricOptions, baseline_of
from captum_staa.layout import VideoLayout
from captum_staa.metrics import controls, model_free_controls
from captum_staa.metrics.sanity import redrawn
from captum_staa.models import VideoClassifier
from captum_staa.visualization import Frames

Call = Callable[[], Any]


# --- time and memory of one call --------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Time and memory of one call.

    Attributes:
        seconds: wall-clock time in seconds.
        forwards: the time as a multiple of a forward pass that ran directly before the call.
        memory: peak of the memory allocated during the call, as a multiple of that of a forward pass. Weights and the
            clip itself are not counted. nan if it was not measured.
    """

    seconds: float
    forwards: float
    memory: float


def with_cost(call: Call, classifier: VideoClassifier, clip: Tensor, *, memory: bool) -> tuple[Any, Cost]:
    """Return the result of a call and its cost.

    Example:
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> clip = torch.rand(1, 16, 3, 48, 48)
        >>> def five_forwards():
        ...     with torch.no_grad():
        ...         return [clf(clip.clone()) for _ in range(5)]
        >>> outputs, cost = with_cost(five_forwards, clf, clip, memory=True)
        >>> len(outputs), cost.forwards > 1, cost.memory < 2  # one after the other
        (5, True, True)

    Args:
        call: function without arguments.
        classifier: classifier whose forward pass is the unit.
        clip: input of that forward pass.
        memory: whether to measure memory as well. On a GPU, the allocator counts it at no extra cost. On other devices,
            the call runs a second time while every operator is observed; buffers inside an operator are not counted.

    Returns:
        The result of the call, and a :class:`Cost`.
    """

    copy = clip.clone()  # a model may write into its clip

    def forward() -> Tensor:
        with torch.no_grad():
            return classifier(copy)

    device = clip.device
    if device.type == "cuda":
        _, plain, plain_peak = _on_cuda(forward, device)
        result, seconds, peak = _on_cuda(call, device)
        return result, Cost(seconds, seconds / plain, peak / plain_peak if memory else torch.nan)
    _, plain = _timed(forward)
    result, seconds = _timed(call)
    return result, Cost(seconds, seconds / plain, _peak_of(call) / _peak_of(forward) if memory else torch.nan)


def warm_up(classifier: VideoClassifier, clip: Tensor, target: int) -> None:
    """Run one forward and, if possible, one backward pass, because the first pass is slow and must not be measured."""
    with torch.enable_grad():
        leaf = clip.clone().requires_grad_()
        outputs = classifier(leaf.clone())  # a clone, because a model may write into its clip but not into a leaf
        score = outputs[:, target].sum()
        if score.requires_grad:
            torch.autograd.grad(score, leaf)


class PeakMemory(TorchDispatchMode):
    """Context manager that counts the bytes that operators allocate, and their peak.

    Example:
        >>> with PeakMemory() as memory:
        ...     for _ in range(3):
        ...         ones = torch.ones(1000)  # each is freed once the next is there
        >>> memory.peak
        8000
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            self._register(leaf, counts=False)  # memory allocated before the call does not count
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self._register(leaf, counts=True)
        self.peak = max(self.peak, self._live)
        return result

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._known.clear()

    def _register(self, leaf: object, counts: bool) -> None:
        if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
            return
        storage = leaf.untyped_storage()  # views share one storage
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counts else 0
        self._known.add(key)
        self._live += size
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def _peak_of(call: Call) -> int:
    with PeakMemory() as memory:
        call()
    return max(memory.peak, 1)


def _timed(call: Call) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def _on_cuda(call: Call, device: torch.device) -> tuple[Any, float, int]:
    """Return the result of the call, its seconds, and its peak memory in bytes above the memory in use before."""
    torch.cuda.synchronize(device)  # a call returns before the GPU has finished its work
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    result = call()
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return result, seconds, max(torch.cuda.max_memory_allocated(device) - before, 1)


SHEETS = 1  # number of clips, from the first, whose maps are stored for a contact sheet


# --- all calls on one clip --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Settings of a comparison, the same for every clip.

    Attributes:
        classifier: the model that the methods explain.
        methods: methods made for the classifier, including those that do not apply.
        metrics: metrics by name.
        options: how metrics alter clips.
        perturbations_per_eval: altered copies of a clip per call of the model.
        seed: seed of all random draws, together with the index of the clip.
        model_controls: for each control that runs a method again, the name of that method.
    """

    classifier: VideoClassifier
    methods: list[Method]
    metrics: dict[str, Metric]
    options: MetricOptions
    perturbations_per_eval: int
    seed: int
    model_controls: dict[str, str] = field(default_factory=dict)

    @property
    def applied(self) -> list[Method]:
        """The methods that apply."""
        return [method for method in self.methods if method.call is not None]

    @property
    def names(self) -> list[str]:
        """Names of all methods that apply and of all controls; each has one entry per clip."""
        special = {RANDOM_WEIGHTS, OTHER_CLASS} if self.applied else {INVERTED, RANDOM_WEIGHTS, OTHER_CLASS}
        plain = [control for control in CONTROLS if control not in special]
        return [*(method.name for method in self.applied), *plain, *self.model_controls]

    @property
    def inverted(self) -> str | None:
        """The method whose map the control ``inverted`` negates: the first method that applies."""
        return self.applied[0].name if self.applied else None

    @cached_property
    def random_weights(self) -> RandomWeights:
        """Random weights for the model, made at the first use, the same in every process."""
        return RandomWeights(self.classifier, self.seed)


def run_clip(
    plan: Plan, storage: Storage, index: int, name: str, load: Load, bar: tqdm[Any], measured: set[str]
) -> None:
    """Compute and store all entries of one clip that are not stored yet.

    Any exception is stored as a reason, and the run continues: one broken file among thousands must not end a run of
    several days.

    Args:
        plan: settings of the comparison.
        storage: where entries are stored.
        index: index of the clip.
        name: name of the clip.
        load: returns the clip.
        bar: progress bar; advances by one for each map.
        measured: methods whose memory this process has already measured on the CPU; this function adds to it.
    """
    todo = [method for method in (ALL, *plan.names) if (index, method) not in storage.done]
    bar.update(len(plan.names) - sum(method != ALL for method in todo))
    if not todo:
        return
    try:
        sample = load()
        whole = _whole(plan, index, name, sample)
        runner = _Clip(plan, index, name, sample, whole.values["other"], measured)
    except Exception as error:
        storage.write(Entry(index, name, ALL, error=_reason(error)))
        bar.update(sum(method != ALL for method in todo))
        return
    if ALL in todo:
        storage.write(whole, _pictured(plan, sample) if index < SHEETS else None)
    for method in todo:
        if method != ALL:
            entry, maps = runner.entry(method)
            kept = None if maps is None or index >= SHEETS else {"maps": maps[0].float().cpu().numpy()}
            storage.write(entry, kept)
            bar.update()


class _Clip:
    """The methods, controls and metrics of one clip."""

    def __init__(self, plan: Plan, index: int, name: str, sample: Sample, other: float, measured: set[str]) -> None:
        self.plan, self.index, self.name, self.sample, self.measured = plan, index, name, sample, measured
        self.other = other  # index of the other class, nan if there is none
        self.methods = {method.name: method for method in plan.applied}
        self.baseline = baseline_of(plan.options.baseline, sample.clip, plan.classifier)
        self.metrics = {
            metric: known
            for metric, known in plan.metrics.items()
            if all(getattr(sample, part) is not None for part in known.needs)
        }
        self._first: Tensor | None = None  # the map that the control "inverted" negates
        self._failed: dict[str, Exception] = {}  # by method; a second run would take as long and fail again
        if any(metric in COSTS for metric in plan.metrics):
            warm_up(plan.classifier, sample.clip, sample.target)

    def entry(self, name: str) -> tuple[Entry, Tensor | None]:
        """Return the entry of a method or control, and its map ``(1, T, H, W)``; None if it failed."""
        try:
            maps, cost = self._measured(name) if name in self.methods else (self._control(name), None)
        except Exception as error:
            self._failed[name] = error
            if isinstance(error, NotApplicableError):
                return Entry(self.index, self.name, name, left_out=str(error) or "does not apply"), None
            return Entry(self.index, self.name, name, error=_reason(error)), None
        case = MetricInput(
            classifier=self.plan.classifier,
            sample=self.sample,
            maps=maps,
            baseline=self.baseline,
            steps=self.plan.options.steps,
            perturbations_per_eval=self.plan.perturbations_per_eval,
        )
        values: dict[str, float] = {}
        reasons: dict[str, str] = {}
        for metric, known in self.metrics.items():
            try:
                value = known.score(case) if known.score else getattr(cost, metric, None)
                if value is None or (metric == "memory" and math.isnan(value)):
                    continue  # not measured: the cost of a control, or the memory on a later clip
                values[metric] = float(value)
            except Exception as error:
                reasons[metric] = _reason(error)
        return Entry(self.index, self.name, name, values, _points(case), reasons), maps

    def _measured(self, name: str) -> tuple[Tensor, Cost | None]:
        plan, clip = self.plan, self.sample.clip
        call = partial(self._map, name, self.sample.target)
        cost: Cost | None = None
        if any(metric in COSTS for metric in plan.metrics):
            # On the CPU, memory needs a second call, so it is measured for one clip only: all clips have the same size.
            memory = "memory" in plan.metrics and (clip.device.type == "cuda" or name not in self.measured)
            maps, cost = with_cost(call, plan.classifier, clip, memory=memory)
            self.measured.add(name)
        else:
            maps = call()
        if name == plan.inverted:
            self._first = maps
        return maps, cost

    def _map(self, name: str, target: int) -> Tensor:
        """Return the map of a method; its random draws are the same for every target and on random weights."""
        method, clip = self.methods[name], self.sample.clip
        assert method.call is not None
        if name in self._failed:
            raise self._failed[name]
        with seeded(self.plan.seed, self.index, name, clip.device):
            attributions = method.call(clip.clone(), target)  # a copy, because a method may write into its clip
        return method.map_of(attributions, clip, self.plan.classifier)

    def _control(self, name: str) -> Tensor:
        """Return the map of a control."""
        clip, layout = self.sample.clip, self.plan.classifier.layout
        if name in self.plan.model_controls:
            return self._model_control(self.plan.model_controls[name], control_of(name))
        if name == MODEL_FREE:
            return model_free(clip, layout)
        first = self._first_map() if name == INVERTED else None
        draw = torch.Generator().manual_seed(self.plan.seed * 2**32 + self.index)
        return controls(clip, layout, first, draw)[name]

    def _model_control(self, method: str, kind: str | None) -> Tensor:
        """Return the map of a method on random weights, or for the other class."""
        if kind == RANDOM_WEIGHTS:
            weights = self.plan.random_weights
            with weights.in_place():
                return self._map(method, self.sample.target)
        if math.isnan(self.other):
            raise NotApplicableError("other class needs a model with two or more outputs, got one output")
        return self._map(method, int(self.other))

    def _first_map(self) -> Tensor:
        """Return the map to negate; it is computed again if an earlier run stored its entry."""
        return self._map(str(self.plan.inverted), self.sample.target) if self._first is None else self._first


def progress(total: int | None, shown: bool) -> tqdm[Any]:
    """Return a progress bar over maps that shows the rate and the remaining time."""
    return tqdm(total=total, desc="comparing", unit="map", disable=not shown, smoothing=0.05, delay=0.5)


def _whole(plan: Plan, index: int, name: str, sample: Sample) -> Entry:
    """Return the entry of the clip itself, with the output of the model."""
    with torch.no_grad():
        logits = plan.classifier(sample.clip.clone())[0]
    if sample.target >= len(logits):
        raise ValueError(
            f"target must be below the number of logits of the model, which is {len(logits)}, got {sample.target}. "
            f"Pass the index of a class of this model."
        )
    if lost := int(logits.isnan().sum()):
        raise ValueError(
            f"the logits of the whole clip must be finite, got nan in {lost} of {len(logits)} classes. Check the clip, "
            f"its preprocessing and the model."
        )
    other = other_class(logits, sample.target, plan.classifier.contrasted)
    values = {
        "target": sample.target,
        "answer": int(logits.argmax()),
        "other": math.nan if other is None else other,
        **{name: getattr(sample, name) is not None for name in MASKS},
    }
    return Entry(index, name, ALL, {key: float(value) for key, value in values.items()})


def _pictured(plan: Plan, sample: Sample) -> dict[str, np.ndarray[Any, Any]] | None:
    """Return the clip as frames, and its truth; None for clips without colors, such as optical flow."""
    if plan.classifier.layout.size(sample.clip)["C"] not in (1, 3):
        return None
    pictures: dict[str, np.ndarray[Any, Any]] = {"frames": Frames.from_inputs(sample.clip, plan.classifier).pixels}
    return pictures if sample.truth is None else {**pictures, "truth": sample.truth[0].cpu().numpy()}


def _points(case: MetricInput) -> dict[str, list[float]]:
    """Return the insertion and deletion curves if a metric has computed them and all their points are finite."""
    if "curves" not in vars(case):
        return {}
    curves = case.curves
    if not (curves.insertion.curve.isfinite().all() and curves.deletion.curve.isfinite().all()):
        return {}
    return {
        "fractions": curves.insertion.fractions[0].tolist(),
        "insertion": curves.insertion.curve[0].tolist(),
        "deletion": curves.deletion.curve[0].tolist(),
    }


def _reason(error: Exception) -> str:
    """Return the type and the message of an error in one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:300]}" if message else type(error).__name__


# --- controls ---------------------------------------------------------------------------------------------------------


def model_free(inputs: Tensor, layout: VideoLayout) -> Tensor:
    """Return a map that depends on the clip but not on the model: the difference from the mean frame.

    Among the maps of :func:`captum_staa.metrics.model_free_controls`, this one scored best on the first planted clips.
    For a clip of a single frame, which has no such difference, it is the absolute input.

    Example:
        >>> clip = torch.zeros(1, 4, 1, 16, 16)
        >>> clip[0, 1, 0, 4:12, 4:12] = 1.0
        >>> model_free(clip, VideoLayout("BTCHW")).shape
        torch.Size([1, 4, 16, 16])

    Args:
        inputs: ``(1, ...)``, a clip in ``layout``.
        layout: layout of the clip.

    Returns:
        ``(1, T, H, W)`` float64.

    Raises:
        ValueError: frames are smaller than 2 x 2 pixels.
    """
    name = "absolute input" if layout.extent(inputs)[0] == 1 else "difference from mean frame"
    return model_free_controls(inputs, layout, [name])[name]


def other_class(logits: Tensor, target: int, contrasted: int | None = None) -> int | None:
    """Return the class with the highest logit except the target; None if there is no other class.

    Example:
        >>> other_class(torch.tensor([0.5, 3.0, 1.0]), target=1)
        2

    Args:
        logits: ``(K,)``.
        target: index of the class to leave out.
        contrasted: index of the class that ``versus`` subtracts, whose map would be zero.
    """
    others = [index for index in range(len(logits)) if index not in (target, contrasted)]
    return max(others, key=logits.tolist().__getitem__, default=None)


class RandomWeights:
    """Random weights for a classifier, which replace its weights inside a ``with`` block.

    The weights are drawn once, on a copy of the module, as in :func:`captum_staa.metrics.sanity.randomization`: a
    module is initialized with its own initialization if it has one. Inside the block, the classifier itself has the
    random weights. So methods that hold the classifier, such as Captum instances and functions, also see them. No other
    thread may use the classifier during the block.

    Example:
        >>> clf = VideoClassifier(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), "BTCHW")
        >>> clip, weights = torch.ones(1, 4, 3, 2, 2), RandomWeights(clf, seed=0)
        >>> before = clf(clip)
        >>> with weights.in_place():
        ...     bool((clf(clip) == before).any())
        False
        >>> bool((clf(clip) == before).all())
        True

    Args:
        classifier: classifier whose parameters are drawn at random; buffers such as running statistics are reset.
        seed: seed of the random weights.

    Raises:
        NotApplicableError: the module has no parameters, or none of them changes when drawn at random.
    """

    def __init__(self, classifier: VideoClassifier, seed: int) -> None:
        self._module = uncompiled(classifier.module)
        if next(self._module.parameters(), None) is None:
            raise NotApplicableError(
                f"random weights need a model with parameters, got {type(self._module).__name__} without parameters"
            )
        copy = redrawn(self._module, torch.Generator().manual_seed(seed))
        if all(map(torch.equal, _tensors(self._module), _tensors(copy))):  # each parameter has one value throughout
            raise NotApplicableError(
                f"random weights need parameters that change when drawn at random, got "
                f"{type(self._module).__name__}, whose parameters stay the same"
            )
        self._drawn = [tensor.detach() for tensor in _tensors(copy)]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the classifier the random weights inside the block, and restore its weights afterwards."""
        tensors = _tensors(self._module)
        original = [tensor.data for tensor in tensors]
        try:
            for tensor, drawn in zip(tensors, self._drawn, strict=True):
                tensor.data = drawn
            yield
        finally:
            for tensor, values in zip(tensors, original, strict=True):
                tensor.data = values


def model_controls(wanted: bool | Sequence[str], methods: Sequence[Method]) -> dict[str, str]:
    """Return the controls that run a method again, each with the name of that method.

    Example:
        >>> from captum_staa.benchmark.methods import made
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> methods = made(["STAA (relevance)", "Saliency"], clf, perturbations_per_eval=8)
        >>> model_controls(True, methods)
        {'random weights': 'STAA (relevance)', 'other class': 'STAA (relevance)'}
        >>> model_controls(["saliency"], methods)
        {'Saliency, random weights': 'Saliency', 'Saliency, other class': 'Saliency'}

    Args:
        wanted: True for the first method that applies, False for none, or names of methods.
        methods: all methods of the comparison. Methods that do not apply have no controls.

    Raises:
        ValueError: a name is not the name of a method, or occurs twice.
        TypeError: ``wanted`` is neither a bool nor a list of names.
    """
    names = [method.name for method in methods]
    applied = [method.name for method in methods if method.call is not None]
    kinds = (RANDOM_WEIGHTS, OTHER_CLASS)
    if isinstance(wanted, bool):
        return dict.fromkeys(kinds, applied[0]) if wanted and applied else {}
    if not isinstance(wanted, (list, tuple)) or not all(isinstance(name, str) for name in wanted):
        raise TypeError(
            f"model_controls must be True, False or a list of method names, got {wanted!r}. Pass ['STAA'], for example."
        )
    simple = {simplified(name): name for name in names}
    found = [name if name in names else simple.get(simplified(name)) for name in wanted]
    if unknown := [name for name, method in zip(wanted, found, strict=True) if method is None]:
        raise ValueError(
            f"model_controls must name methods of the comparison, got {unknown}. They are {', '.join(names)}."
        )
    if len(set(found)) < len(found):
        raise ValueError(f"model_controls must name each method once, got {list(wanted)}. Leave one out.")
    return {f"{name}, {kind}": name for name in found if name in applied for kind in kinds}


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
