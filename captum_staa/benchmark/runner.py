"""Run a comparison in one process or in several."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.rendezvous import rendezvous

from captum_staa._utils.checks import check_count
from captum_staa._utils.files import FilePath
from captum_staa._utils.model_state import eval_mode
from captum_staa.benchmark.clip_runner import Plan, progress, run_clip
from captum_staa.benchmark.clip_runner import model_controls as controls_of
from captum_staa.benchmark.clips import described, each, name_of, share, source_of
from captum_staa.benchmark.comparison import Comparison
from captum_staa.benchmark.methods import Given, made
from captum_staa.benchmark.records import (
    ALL,
    GRID,
    NOT_APPLICABLE,
    Row,
    Sheet,
    Storage,
    control_of,
    versions,
)
from captum_staa.benchmark.scoring import Metric, MetricOptions, chosen
from captum_staa.benchmark.table import Table, TableBuilder
from captum_staa.models import VideoClassifier

POLL = 0.05  # seconds
Result = TypeVar("Result")
TIMEOUT = timedelta(days=30)  # finished processes wait for the slowest one; a dead process is noticed at once


# --- processes that share the clips -----------------------------------------------------------------------------------


class Processes:
    """The rank of this process, and the number of processes.

    Example:
        >>> single = Processes()
        >>> single.rank, single.world, single.first(lambda: "computed by rank 0, returned by all")
        (0, 1, 'computed by rank 0, returned by all')
    """

    def __init__(self, rank: int = 0, world: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.world, self._group = rank, world, group

    def first(self, function: Callable[[], Result]) -> Result:
        """Run a function in the first process and return its result in all processes.

        If it raises ValueError or OSError, all processes raise that error.
        """
        outcome: list[tuple[bool, object]] = [(False, None)]
        if self.rank == 0:
            try:
                outcome = [(True, function())]
            except (ValueError, OSError) as error:
                outcome = [(False, error)]
        if self.world > 1:
            outcome = [self._broadcast(outcome[0])]
        succeeded, result = outcome[0]
        if not succeeded:
            assert isinstance(result, Exception)
            raise result
        return result  # type: ignore[return-value]

    def every(self, function: Callable[[], object]) -> None:
        """Run a function in every process. If it raises OSError in one of them, all processes raise OSError."""
        error: OSError | None = None
        try:
            function()
        except OSError as caught:
            error = caught
        errors: list[OSError | None] = [error]
        if self.world > 1:
            errors = [None] * self.world
            dist.all_gather_object(errors, error, group=self._group)
        for error in errors:
            if error is not None:
                raise error

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.world > 1:
            dist.barrier(group=self._group)

    def array(self, array: NDArray[Any] | None) -> NDArray[Any]:
        """Return the array of the first process in all processes; the others pass None. It is sent without copies."""
        if self.world == 1:
            assert array is not None
            return array
        kind = self._broadcast(None if array is None else (array.shape, array.dtype.str))
        if array is None:
            array = np.empty(*kind)
        dist.broadcast(torch.from_numpy(np.ravel(array).view(np.uint8)), 0, group=self._group)
        return array

    def _broadcast(self, value: Any) -> Any:
        """Return the object of the first process in all processes."""
        message = [value]
        dist.broadcast_object_list(message, group=self._group)
        return message[0]


@contextmanager
def processes() -> Iterator[Processes]:
    """Yield the processes of torchrun, of an existing process group, or this single process.

    Processes exchange a few short strings and, at the end, one table. So the backend is gloo on every device. An
    existing process group of the caller stays as it is: another group of the same processes is made, because finished
    processes wait here for hours, and its timeout is in minutes.
    """
    if not dist.is_available() or not (dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        yield Processes()
        return
    initialize, group = not dist.is_initialized(), None
    if initialize:
        store, rank, world = next(rendezvous("env://", timeout=TIMEOUT))
        fresh = dist.PrefixStore(_start_id(store, rank, world), store)
        dist.init_process_group("gloo", store=fresh, rank=rank, world_size=world, timeout=TIMEOUT)
    else:
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group(group)


def _start_id(store: dist.Store, rank: int, world: int) -> str:
    """Return an identifier that all processes of this start share, and that no earlier start has used.

    The store of torchrun survives a restart, together with the addresses of dead processes, so its old content must not
    be used. Each process writes a new random identifier. The first process answers each of them with its own
    identifier, which becomes the shared one, until all have confirmed it.
    """
    identifier = uuid.uuid4().hex
    others = range(1, world)

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    if rank == 0:
        while any(read(f"captum_staa/got/{other}") != identifier for other in others):
            for other in others:
                store.set(f"captum_staa/answer/{other}", f"{read(f'captum_staa/question/{other}')} {identifier}")
            time.sleep(POLL)
        return identifier
    store.set(f"captum_staa/question/{rank}", identifier)
    while not (answer := read(f"captum_staa/answer/{rank}")).startswith(f"{identifier} "):
        time.sleep(POLL)
    shared = answer.split()[1]
    store.set(f"captum_staa/got/{rank}", shared)
    return shared


def restarted() -> bool:
    """Return whether torchrun has restarted the processes after one of them died (``--max-restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def local_device(device: str | None) -> str | None:
    """Return the device of this process: ``"cuda"`` becomes the GPU with its local rank; others stay unchanged."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


_SIGNS = {True: 1, False: -1, None: 0}
_STEP = 2.0**-30  # sums of multiples of it are exact, so no mean curve depends on the order of the clips


# --- the comparison ---------------------------------------------------------------------------------------------------


def compare(
    classifier: VideoClassifier,
    clips: Iterable[Any],
    methods: Sequence[Given] | Mapping[str, Given] | None = None,
    metrics: Sequence[str] | Mapping[str, Any] | None = None,
    *,
    out: FilePath | None = None,
    resume: bool = False,
    metric_options: MetricOptions | None = None,
    perturbations_per_eval: int = 8,
    model_controls: bool | Sequence[str] = True,
    seed: int = 0,
    show_progress: bool = True,
) -> Comparison:
    """Compare attribution methods on clips: their quality, their cost, and how far to trust them.

    Example:
        >>> from captum_staa.benchmark import PlantedClips
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> comparison = compare(
        ...     clf, PlantedClips(seed=12, n=2), ["STAA", "Saliency"], ["auroc", "forwards"], show_progress=False)
        >>> comparison.methods
        ['STAA', 'Saliency', 'random', 'uniform', 'center', 'model-free', 'inverted', 'random weights', 'other class']
        >>> comparison.rows[0][:3], comparison.means()["uniform"]["auroc"].value
        (('pattern-00000', 'STAA', 'auroc'), 0.5)

    Every method explains the target of each clip, one clip at a time, and every metric scores its map. Controls are
    scored in the same way. They show how much of a score comes from the clip, the model and the class:

    - ``random``, ``uniform`` and ``center`` use neither the clip nor the model.
    - ``model-free`` uses the clip, but not the model: the difference from the mean frame, one of
      :func:`metrics.model_free_controls`.
    - ``inverted`` is minus the map of the first method that applies.
    - ``random weights`` is the map of a method after all parameters of the model were drawn at random, with the same
      seed on all clips. ``other class`` is its map for the class with the highest logit besides the target. If these
      score as well as the method, the method shows the clip rather than the model, or does not explain this class.
      Tables mark it (:meth:`Comparison.retained`).

    Under torchrun, or in an existing process group, each of n processes takes every n-th clip. Except for time, no
    number depends on the number of processes or on earlier runs, because random draws depend on the seed, the clip and
    the method only.

    Args:
        classifier: the model to explain, in eval mode; its layout, preprocessing and grid are used.
        clips: :class:`PlantedClips`, :class:`Videos`, :class:`JoinedClips`, or any iterable of ``(clip, target)``,
            ``(clip, target, truth)`` or ``(clip, target, truth, rivals)``. The clip is a float tensor in the layout of
            the classifier, with a batch axis of 1 or without one. The target is a label or an index. The truth is bool
            ``(T, H, W)``, True where the evidence is, or None. The rivals are bool ``(T, H, W)``, True where objects
            are that look like evidence and are not, or None. An optional fifth part for ``object_pointing`` is bool
            ``(K, T, H, W)``, one mask for the evidence and one for each rival, the evidence first. A clip of a sequence
            that cannot be read becomes one error row. Every process iterates over the whole of any other iterable, and
            an exception of that iterable ends the run.
        methods: names among ``METHODS``, Captum ``Attribution`` instances, or functions of a clip and its target that
            return attributions of the clip's shape or maps ``(1, T, H, W)``. A mapping assigns a name to each, and may
            also hold a :class:`MethodSpec`. Maps of instances and functions keep their signs; return ``.abs()`` if you
            want the magnitude. None takes all of ``METHODS``; methods that do not apply to the model get a row with the
            reason.
        metrics: names among ``METRICS``, or a mapping from names to functions of a :class:`MetricInput`. None takes a
            selection of ``METRICS``. In names of methods and metrics, case, spaces and punctuation do not matter.
        out: a folder that stores the entry of every finished clip and method, one file per process, so that the
            comparison can be resumed after any end of a process. Only one run at a time may use it. Required for
            several processes, for which it must be on a disk that all machines share. None uses a temporary folder.
        resume: whether to continue the run in ``out``, which must have the same settings. Failed entries are tried
            again.
        metric_options: options of the metrics that alter clips, such as ``MetricOptions(baseline="blur", steps=16)``.
            None takes :class:`MetricOptions` with its defaults.
        perturbations_per_eval: altered copies of a clip per call of the model. Changes speed and memory.
        model_controls: True adds ``random weights`` and ``other class`` for the first method that applies; it runs two
            more times per clip. A list of names adds both controls for each of these methods, in rows such as
            ``"STAA, random weights"``. False adds none.
        seed: seed of all random draws, at least 0.
        show_progress: whether the first process shows a progress bar.

    Returns:
        :class:`Comparison`, the same in all processes. The first process reads the files. After Ctrl-C, it contains
        what was finished before.

    Raises:
        ValueError: an argument is out of range or unknown, or ``out`` holds a run with other settings.
        FileExistsError: ``out`` holds an earlier run and ``resume`` is False, or ``out`` holds other files, or another
            process runs a comparison in ``out``.
        TypeError: an argument has the wrong type.
        OSError: the disk is full, or the results of other processes are not visible in ``out``. Finished entries stay
            in ``out``.
        KeyboardInterrupt: Ctrl-C with several processes; finished entries stay in ``out``.

    Reference:
        The controls: Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS (2018), and Judd et al., ICCV (2009).
    """
    if not isinstance(classifier, VideoClassifier):
        raise TypeError(
            f"classifier must be a VideoClassifier, got {type(classifier).__name__}. Pass VideoClassifier(model, ...)."
        )
    if metric_options is not None and not isinstance(metric_options, MetricOptions):
        raise TypeError(
            f"metric_options must be a MetricOptions or None, got {metric_options!r}. Pass MetricOptions(steps=16), "
            f"for example."
        )
    if resume and out is None:
        raise ValueError("resume=True must come with out, the folder of the earlier run, got out=None. Pass out=.")
    check_count("perturbations_per_eval", perturbations_per_eval)
    check_count("seed", seed, least=0)
    all_methods = made(methods, classifier, int(perturbations_per_eval))
    plan = Plan(
        classifier=classifier,
        methods=all_methods,
        metrics=chosen(metrics),
        options=metric_options or MetricOptions(),
        perturbations_per_eval=int(perturbations_per_eval),
        seed=int(seed),
        model_controls=controls_of(model_controls, all_methods),
    )
    if taken := [method.name for method in plan.methods if method.name == ALL or control_of(method.name)]:
        raise ValueError(
            f"names of methods must differ from names of controls, got {taken}. Pass a mapping with other names."
        )
    source = source_of(clips, classifier)
    settings = _settings(plan, source)
    with (
        eval_mode(classifier),
        processes() as group,
        _folder(out, group) as folder,
        Storage(folder, group.rank) as storage,
    ):
        group.first(lambda: storage.open(settings, resume=resume or restarted()))
        group.every(storage.claim)
        storage.done = group.first(lambda: storage.read_done((ALL, *plan.names), name_of(source)))
        interrupted = _run(plan, storage, source, group, show_progress)
        storage.release()
        group.wait()
        return _in_all(group, lambda: _gathered(plan, storage, source, settings, interrupted))


def _run(plan: Plan, storage: Storage, source: Iterable[Any], group: Processes, show_progress: bool) -> bool:
    """Run all clips of this process; return whether Ctrl-C stopped it."""
    count = share(source, group.rank, group.world)
    total = None if count is None else count * len(plan.names)
    measured: set[str] = set()
    try:
        with progress(total, show_progress and group.rank == 0) as bar:
            for index, name, load in each(source, plan.classifier, group.rank, group.world):
                run_clip(plan, storage, index, name, load, bar, measured)
    except KeyboardInterrupt:
        if group.world > 1:  # do not wait for the other processes, which may have ended
            raise
        return True
    return False


@contextmanager
def _folder(out: FilePath | None, group: Processes) -> Iterator[Path]:
    """Yield the folder for entries: ``out``, or a temporary one if ``out`` is None."""
    if out is not None:
        yield Path(out)
        return
    if group.world > 1:
        raise ValueError(
            f"several processes must have out, a folder that they share, got out=None with {group.world} "
            f"processes. Pass out=."
        )
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _settings(plan: Plan, source: Iterable[Any]) -> dict[str, Any]:
    """Return all settings that determine the numbers; the number of processes does not."""
    classifier = plan.classifier
    parameter = next(classifier.parameters(), None)
    return {
        "versions": versions(),
        "model": type(classifier.module).__name__,
        "notice": classifier.notice,
        "weights": _fingerprint(classifier),
        "dtype": "none" if parameter is None else str(parameter.dtype).removeprefix("torch."),
        "device": "cpu" if parameter is None else parameter.device.type,
        "layout": classifier.layout.axes,
        "preprocessing": repr(classifier.preprocessing),
        "clips": described(source),
        "methods": {method.name: method.description for method in plan.methods},
        "metrics": list(plan.metrics),
        "inverted": plan.inverted,
        "model_controls": plan.model_controls,
        **asdict(plan.options),
        "perturbations_per_eval": plan.perturbations_per_eval,
        "seed": plan.seed,
    }


def _fingerprint(classifier: VideoClassifier) -> str:
    """Return a hash of all weights, because different models can have the same name."""
    digest = hashlib.sha256()
    for name, tensor in classifier.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _gathered(
    plan: Plan, storage: Storage, source: Iterable[Any], settings: dict[str, Any], interrupted: bool
) -> Comparison:
    """Return all stored results, in the order of clips, then methods, then metrics; in one pass over the files.

    Raises:
        OSError: results of other processes are missing; a table without them would look complete.
    """
    names = [method.name for method in plan.methods]
    methods, metrics = [*names, *(name for name in plan.names if control_of(name))], list(plan.metrics)
    count, names_by_index = share(source, 0, 1), name_of(source)
    builder = TableBuilder(methods, metrics, names_by_index, count)
    answers: dict[int, tuple[int, int]] = {}
    missing: dict[int, str] = {}
    curves: dict[str, _Curves] = {}
    for entry in storage.entries():
        if not builder.add(entry):
            continue
        if entry.method == ALL and not entry.error:
            answers[entry.index] = (int(entry.values["target"]), int(entry.values["answer"]))
            missing[entry.index] = _missing_parts(plan.metrics, entry.values)
        elif entry.curves:
            curves.setdefault(entry.method, _Curves()).add(entry.curves)
    for index in filter(missing.get, missing):
        builder.leave_out(index, missing[index])
    if settings["device"] != "cuda" and "memory" in plan.metrics and plan.metrics["memory"].score is None:
        # On the CPU, every process and every run measures the memory of a method once. Only the first of these values
        # is reported, as with one process.
        builder.keep_first("memory")
    rows = builder.table(
        Row(ALL, method.name, NOT_APPLICABLE, np.nan, method.reason) for method in plan.methods if method.call is None
    )
    if not interrupted and count is not None and (lost := count - len(rows.clips)):
        raise OSError(
            f"{storage.folder} must hold the results of all {count} clips, got {count - lost} after all processes "
            f"have finished. Use a folder that all machines share, such as one on a shared disk."
        )
    return Comparison(
        rows=rows,
        methods=methods,
        metrics=metrics,
        better={name: _SIGNS[metric.higher_is_better] for name, metric in plan.metrics.items()},
        settings=settings,
        answers={names_by_index(index): answers[index] for index in sorted(answers)},
        curves={name: curves[name].means() for name in methods if name in curves},
        sheet=_sheet(plan, storage, rows.clips[0]) if 0 in answers else None,
        interrupted=interrupted,
    )


def _in_all(group: Processes, gather: Callable[[], Comparison]) -> Comparison:
    """Return the comparison that the first process gathers in all processes; large arrays are sent separately."""
    whole: list[Table] = []

    def small() -> Comparison:
        comparison = gather()
        whole.append(comparison.table)
        return replace(comparison, rows=whole[0].with_arrays(np.empty((0, 0, 0)), np.empty((0, 0, 0), bool)))

    comparison = group.first(small)
    numbers, present = (group.array(getattr(whole[0], name) if whole else None) for name in ("numbers", "present"))
    return replace(comparison, rows=comparison.table.with_arrays(numbers, present))


class _Curves:
    """Running means of insertion and deletion curves over clips."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: dict[str, NDArray[np.float64]] = {}

    def add(self, points: dict[str, list[float]]) -> None:
        """Add the points of one clip; the number of points may differ between clips."""
        self._count += 1
        for kind in ("insertion", "deletion"):
            steps = np.round(np.interp(GRID, points["fractions"], points[kind]) / _STEP)
            self._sums[kind] = self._sums.get(kind, 0) + steps

    def means(self) -> dict[str, NDArray[np.float64]]:
        """Return the mean curves ``(101,)`` by kind."""
        return {kind: total * _STEP / self._count for kind, total in self._sums.items()}


def _missing_parts(metrics: Mapping[str, Metric], known: Mapping[str, float]) -> str:
    """Return which masks a clip does not have, and which metrics are left out for this; empty if none are."""
    metrics_by_part: dict[str, list[str]] = {}
    for name, metric in metrics.items():
        part = next((part for part in metric.needs if not known[part]), None)
        if part is not None:
            metrics_by_part.setdefault(part, []).append(name)
    return "; ".join(f"no {part} (needed by {', '.join(names)})" for part, names in metrics_by_part.items())


def _sheet(plan: Plan, storage: Storage, clip: str) -> Sheet | None:
    """Return the data of the contact sheet of the first clip; None if it has no pictures."""
    pictured = storage.maps(0, ALL)
    if not pictured:
        return None
    maps = {name: stored["maps"] for name in plan.names if (stored := storage.maps(0, name))}
    return Sheet(clip, pictured["frames"], pictured.get("truth"), maps)
