"""One comparison from beginning to end, by one process or by many."""

from __future__ import annotations

import hashlib
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from captum_staa._utils.checks import check_choice, check_count
from captum_staa._utils.files import FilePath
from captum_staa._utils.versions import versions
from captum_staa.benchmark.clip_runner import Plan, progress, run_clip
from captum_staa.benchmark.clips import described, each, share, source_of
from captum_staa.benchmark.comparison import Comparison
from captum_staa.benchmark.controls import model_controls as controls_of
from captum_staa.benchmark.methods import Given, made
from captum_staa.benchmark.processes import Processes, processes, restarted
from captum_staa.benchmark.records import ALL, ERROR, GRID, LEFT_OUT, NOT_APPLICABLE, Row, Sheet, control_of
from captum_staa.benchmark.scoring import BASELINES, Metric, chosen
from captum_staa.benchmark.storage import WHOLE, Entry, Storage
from captum_staa.models import VideoClassifier

_SIGNS = {True: 1, False: -1, None: 0}


def compare(
    classifier: VideoClassifier,
    clips: Iterable[Any],
    methods: Sequence[Given] | Mapping[str, Given] | None = None,
    metrics: Sequence[str] | Mapping[str, Any] | None = None,
    *,
    out: FilePath | None = None,
    resume: bool = False,
    baseline: str = "zero",
    steps: int = 32,
    perturbations_per_eval: int = 8,
    model_controls: bool | Sequence[str] = True,
    seed: int = 0,
    show_progress: bool = True,
) -> Comparison:
    """Which explanation to trust for a model and its clips, and what each costs.

    Example:
        >>> from captum_staa.benchmark import PlantedClips
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> found = compare(
        ...     clf, PlantedClips(seed=12, n=2), ["STAA", "Saliency"], ["auroc", "forwards"], show_progress=False)
        >>> found.methods
        ['STAA', 'Saliency', 'random', 'uniform', 'center', 'model-free', 'inverted', 'random weights', 'other class']
        >>> found.rows[0][:3], found.means()["uniform"]["auroc"].value
        (('pattern-00000', 'STAA', 'auroc'), 0.5)

    Every method explains the clip's own target, one clip at a time, and is scored by every metric. Controls are scored
    beside them, to show which part of a score comes from the clip, the model and the class:

    - ``random``, ``uniform`` and ``center`` use neither the clip nor the model.
    - ``model-free`` uses the clip, but not the model: the difference from the mean frame, one of
      :func:`metrics.model_free_controls`.
    - ``inverted`` is minus the map of the first method that applies.
    - ``random weights`` is the map of a method after all parameters of the model were drawn anew, with the same seed on
      all clips. ``other class`` is its map for the class with the highest logit besides the target. A method that
      scores as well there shows the clip rather than the model, or does not say why this class; tables mark it
      (:meth:`Comparison.retained`).

    Under torchrun, or in a process group that is there already, each process takes every n-th clip. No number but time
    depends on how many there are, nor on what was done before: what is drawn at random is drawn by clip and method.

    Args:
        classifier: in eval mode; its layout, its preprocessing and its grid are read.
        clips: :class:`PlantedClips`, :class:`Videos`, :class:`JoinedClips`, or any iterable of ``(clip, target)``,
            ``(clip, target, truth)`` or ``(clip, target, truth, rivals)``: floats in the classifier's layout with a
            batch axis of 1 or none; a label or an index; where the evidence is, bool ``(T, H, W)`` or None; where
            objects are that look like evidence and are not, likewise. A fifth part is bool ``(K, T, H, W)``, the
            evidence and each rival as an object of its own, for ``object_pointing``. A sequence is read clip by clip,
            and one that fails is one error row; another iterable is run through by every process, and ends the run
            where it raises.
        methods: names among ``METHODS``, Captum ``Attribution`` instances, or functions of a clip and its target that
            give attributions of the clip's shape or maps ``(1, T, H, W)``; a mapping names them. Maps of instances and
            functions are taken as they are, signs and all; return ``.abs()`` where magnitude is meant. None takes
            all of ``METHODS``; those that do not apply to the model say why.
        metrics: names among ``METRICS``, or a mapping to functions of a :class:`MetricInput`. None takes a choice.
        out: a folder that keeps every finished clip and method, so that nothing is lost; needed by several processes.
            None keeps them until the end of the call.
        resume: go on with what is in ``out``, if it was asked for in the same way. What has failed is tried again.
        baseline: what hides cells in metrics that alter the clip: a name of ``captum_staa.baselines``.
        steps: points on the insertion and deletion curves after the first.
        perturbations_per_eval: altered copies of a clip per call of the model. Changes speed and memory.
        model_controls: True makes ``random weights`` and ``other class`` of the first method that applies, at the price
            of two more runs of it per clip. A list of names makes both of each of these methods, in rows such as
            ``"STAA, random weights"``. False makes none.
        seed: of everything that is drawn at random.
        show_progress: draw a bar with the rate and the time left, in the first process.

    Returns:
        :class:`Comparison`. After Ctrl-C, of what was done until then.

    Raises:
        ValueError: an argument is not as said above, or ``out`` holds a run that was asked for in another way.
        FileExistsError: ``out`` holds an earlier run and ``resume`` is False, or something else.
        TypeError: an argument of the wrong type.
        KeyboardInterrupt: Ctrl-C, where there are several processes; what is in ``out`` stays.

    Reference:
        The controls: Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS (2018), and Judd et al., ICCV (2009).
    """
    if not isinstance(classifier, VideoClassifier):
        raise TypeError(f"compare explains a VideoClassifier, got {type(classifier).__name__}; wrap it in one")
    check_choice("baseline", baseline, BASELINES)
    if resume and out is None:
        raise ValueError("resume goes on with what a folder holds: pass out=")
    for name, value in (("steps", steps), ("perturbations_per_eval", perturbations_per_eval)):
        check_count(name, value)
    check_count("seed", seed, least=0)
    asked = made(methods, classifier, int(perturbations_per_eval))
    plan = Plan(
        classifier=classifier,
        methods=asked,
        metrics=chosen(metrics),
        baseline=baseline,
        steps=int(steps),
        perturbations_per_eval=int(perturbations_per_eval),
        seed=int(seed),
        model_controls=controls_of(model_controls, asked),
    )
    if taken := [method.name for method in plan.methods if method.name == ALL or control_of(method.name)]:
        raise ValueError(f"{taken} are names of controls; pass a mapping that names the methods otherwise")
    source = source_of(clips, classifier)
    settings = _settings(plan, source)
    with processes() as group, _folder(out, group) as folder:
        storage = Storage(folder)
        group.first(lambda: storage.open(settings, resume=resume or restarted()))
        interrupted = _run(plan, storage, source, group, show_progress)
        group.wait()
        if not interrupted:
            _check_whole(storage, share(source, 0, 1))
        return _gathered(plan, storage, settings, interrupted)


def _run(plan: Plan, storage: Storage, source: Iterable[Any], group: Processes, show_progress: bool) -> bool:
    """Whether Ctrl-C came before the end."""
    mine = share(source, group.rank, group.world)
    total = None if mine is None else mine * len(plan.names)
    measured: set[str] = set()
    try:
        with progress(total, show_progress and group.rank == 0) as bar:
            for index, name, load in each(source, plan.classifier, group.rank, group.world):
                run_clip(plan, storage, index, name, load, bar, measured)
    except KeyboardInterrupt:
        if group.world > 1:  # the others may be gone, and must not be waited for
            raise
        return True
    return False


def _check_whole(storage: Storage, count: int | None) -> None:
    """Raise where the others' results are not to be seen: a table without them would look like a whole one."""
    if count is not None and (missing := count - len(storage.clips())):
        raise OSError(
            f"{missing} of {count} clips are not in {storage.folder}, though all processes are done; every machine "
            f"must see the same folder, such as one on a shared disk"
        )


@contextmanager
def _folder(out: FilePath | None, group: Processes) -> Iterator[Path]:
    """Where entries go: the folder that was asked for, or one that vanishes."""
    if out is not None:
        yield Path(out)
        return
    if group.world > 1:
        raise ValueError(f"{group.world} processes find each other's results in a folder: pass out=")
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _settings(plan: Plan, source: Iterable[Any]) -> dict[str, Any]:
    """Whatever fixes the numbers. How many processes there are does not."""
    classifier = plan.classifier
    parameter = next(classifier.parameters(), None)
    return {
        "versions": versions(),
        "model": type(classifier.module).__name__,
        "weights": _fingerprint(classifier),
        "dtype": "none" if parameter is None else str(parameter.dtype).removeprefix("torch."),
        "device": "cpu" if parameter is None else parameter.device.type,
        "layout": classifier.layout.axes,
        "preprocessing": repr(classifier.preprocessing),
        "clips": described(source),
        "methods": {method.name: method.about for method in plan.methods},
        "metrics": list(plan.metrics),
        "inverted": plan.inverted,
        "model_controls": plan.model_controls,
        "baseline": plan.baseline,
        "steps": plan.steps,
        "perturbations_per_eval": plan.perturbations_per_eval,
        "seed": plan.seed,
    }


def _fingerprint(classifier: VideoClassifier) -> str:
    """Of all weights: two models of one name are not one model."""
    digest = hashlib.sha256()
    for name, tensor in classifier.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _gathered(plan: Plan, storage: Storage, settings: dict[str, Any], interrupted: bool) -> Comparison:
    """Everything that is in the storage, in the order of clips, then methods, then metrics."""
    names = [method.name for method in plan.methods]
    rows = [
        Row(ALL, method.name, NOT_APPLICABLE, np.nan, method.reason) for method in plan.methods if method.call is None
    ]
    answers: dict[str, tuple[int, int]] = {}
    curves: dict[str, _Curves] = defaultdict(_Curves)
    # On the CPU every process and every start measures memory once: the first clip's is told, as of one process.
    once = settings["device"] != "cuda" and "memory" in plan.metrics and plan.metrics["memory"].score is None
    remembered: set[str] = set()
    for index in storage.clips():
        found = {entry.method: entry for entry in storage.of(index)}
        whole = found.get(WHOLE)
        if whole is not None and not whole.error:
            answers[whole.clip] = (int(whole.values["target"]), int(whole.values["answer"]))
            if lacking := _lacking(plan.metrics, whole.values):
                rows.append(Row(whole.clip, ALL, LEFT_OUT, np.nan, lacking))
        for name in (WHOLE, *plan.names):
            entry = found.get(name)
            if entry is not None:
                again = once and name in remembered
                metrics = [metric for metric in plan.metrics if not (again and metric == "memory")]
                rows += _rows(entry, [] if name == WHOLE else metrics)  # of a clip, "rivals" is whether there are any
                if "memory" in entry.values:
                    remembered.add(name)
                if entry.curves:
                    curves[name].add(entry.curves)
    return Comparison(
        rows=sorted(rows, key=lambda row: row.metric == NOT_APPLICABLE),
        methods=[*names, *(name for name in plan.names if control_of(name))],
        metrics=list(plan.metrics),
        better={name: _SIGNS[metric.higher_is_better] for name, metric in plan.metrics.items()},
        settings=settings,
        answers=answers,
        curves={name: found.means() for name, found in curves.items()},
        sheet=_sheet(plan, storage),
        interrupted=interrupted,
    )


class _Curves:
    """Means over clips of insertion and deletion, without holding the points of all of them."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: dict[str, NDArray[np.float64]] = {}

    def add(self, points: dict[str, list[float]]) -> None:
        """One clip's points; clips may have unequal numbers of cells, and so of points."""
        self._count += 1
        for kind in ("insertion", "deletion"):
            self._sums[kind] = self._sums.get(kind, 0) + np.interp(GRID, points["fractions"], points[kind])

    def means(self) -> dict[str, NDArray[np.float64]]:
        return {kind: total / self._count for kind, total in self._sums.items()}


def _lacking(metrics: Mapping[str, Metric], known: Mapping[str, float]) -> str:
    """What a clip does not come with, and which metrics are left out for this; empty where none is."""
    found: dict[str, list[str]] = {}
    for name, metric in metrics.items():
        part = next((part for part in metric.needs if not known[part]), None)
        if part is not None:
            found.setdefault(part, []).append(name)
    return "; ".join(f"no {part} (needed by {', '.join(names)})" for part, names in found.items())


def _rows(entry: Entry, metrics: list[str]) -> Iterator[Row]:
    if entry.error:
        yield Row(entry.clip, entry.method, ERROR, np.nan, entry.error)
    if entry.left_out:
        yield Row(entry.clip, entry.method, LEFT_OUT, np.nan, entry.left_out)
    for metric in metrics:
        if metric in entry.reasons:
            yield Row(entry.clip, entry.method, ERROR, np.nan, f"{metric}: {entry.reasons[metric]}")
        elif metric in entry.values:
            yield Row(entry.clip, entry.method, metric, entry.values[metric])


def _sheet(plan: Plan, storage: Storage) -> Sheet | None:
    """The first clip, where it could be had."""
    whole = next((entry for entry in storage.of(0) if entry.method == WHOLE), None)
    pictured = storage.maps(0, WHOLE)
    if whole is None or whole.error or not pictured:
        return None
    maps = {name: found["maps"] for name in plan.names if (found := storage.maps(0, name))}
    return Sheet(whole.clip, pictured["frames"], pictured.get("truth"), maps)
