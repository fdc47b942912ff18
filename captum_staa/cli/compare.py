"""``python -m captum_staa compare``: from a model's name and clips to a table of methods, pictures and a report."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from captum_staa._utils.files import atomic
from captum_staa.benchmark import Comparison, JoinedClips, PlantedClips, Videos, compare
from captum_staa.benchmark.processes import local_device, processes
from captum_staa.cli.explain import INTERRUPTED
from captum_staa.cli.prepare import load
from captum_staa.models import VideoClassifier
from captum_staa.models.classifier import DEFAULT_FRAMES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SEED = 2_000_000_010  # of planted clips that no shipped model has been trained on
TABLES = {"rows.csv": "to_csv", "table.md": "to_markdown", "table.tex": "to_latex", "comparison.json": "to_json"}
REPORT = "report.html"
DPI = 150
SOME_FAILED = 1


@dataclass(frozen=True)
class Asked:
    """What was asked on the command line."""

    model: str
    out: Path
    planted: int | None = None
    task: str | None = None
    videos: Path | None = None
    labels: Path | None = None
    boxes: Path | None = None
    joined: bool = False
    methods: Sequence[str] | None = None
    metrics: Sequence[str] | None = None
    resume: bool = False
    device: str | None = None
    dtype: str = "float32"
    baseline: str = "zero"
    steps: int = 32
    perturbations_per_eval: int = 8
    seed: int = 0
    model_controls: bool = True


def run(asked: Asked) -> int:
    """Compare, write and print; of several processes the first does the latter two.

    Returns:
        The exit code: 0; 1 where a clip, a method or a metric failed, whose reasons are in the table; 130 after Ctrl-C,
        which leaves everything that is done in the folder.
    """
    started = time.perf_counter()
    _check(asked)
    classifier = load(asked.model, local_device(asked.device)).to(DTYPES[asked.dtype])
    with processes() as group:
        try:
            found = compare(
                classifier,
                _clips(asked, classifier),
                asked.methods,
                asked.metrics,
                out=asked.out,
                resume=asked.resume,
                baseline=asked.baseline,
                steps=asked.steps,
                perturbations_per_eval=asked.perturbations_per_eval,
                seed=asked.seed,
                model_controls=asked.model_controls,
            )
        except KeyboardInterrupt:
            print(f"interrupted: what is done is kept in {asked.out}; go on with --resume", file=sys.stderr)
            return INTERRUPTED
        if group.rank == 0:
            files = write(found, asked.out)
            print(found.to_markdown(intervals=False))
            print(f"written to {asked.out}: {', '.join(files)} ({time.perf_counter() - started:.0f} s)")
            _print_failures(found)
        group.wait()  # nobody leaves before the files are whole, or torchrun would call the run done
    if found.interrupted:
        print(f"interrupted: what is done is kept in {asked.out}; go on with --resume", file=sys.stderr)
        return INTERRUPTED
    return SOME_FAILED if found.failures else 0


def write(found: Comparison, folder: Path) -> list[str]:
    """The tables, the pictures and the report beside the entries they were made of; each replaces an earlier one.

    Returns:
        Their names.
    """
    for name, method in TABLES.items():
        getattr(found, method)(folder / name, overwrite=True)
    pictures = []
    for name, figure in found.plot().items():
        pictures.append(f"{name}.png")
        with atomic(folder / pictures[-1], overwrite=True) as partial:
            figure.savefig(partial, dpi=DPI)
    found.to_report(folder / REPORT, overwrite=True)
    return [*TABLES, *pictures, REPORT]


def names(text: str) -> list[str]:
    """What stands between commas.

    Example:
        >>> names("STAA, saliency,feature-ablation-frames")
        ['STAA', 'saliency', 'feature-ablation-frames']
    """
    return [name.strip() for name in text.split(",") if name.strip()]


def _check(asked: Asked) -> None:
    """Refuse what contradicts itself, before anything is loaded."""
    if (asked.planted is None) == (asked.videos is None):
        raise ValueError("clips come from --planted N or from --videos DIR: give one of the two")
    if (asked.videos is None) != (asked.labels is None):
        raise ValueError("--videos DIR and --labels CSV go together: the table names the files and their classes")
    if asked.boxes is not None and asked.videos is None:
        raise ValueError("--boxes belongs to --videos; planted clips bring their truth")
    if asked.boxes is not None and asked.joined:
        raise ValueError("--joined makes a truth of its own, in time, so drop --boxes")
    if asked.task is not None and asked.planted is None:
        raise ValueError("--task belongs to --planted; leave it out")


def _clips(asked: Asked, classifier: VideoClassifier) -> Any:
    clips: Any
    if asked.videos is not None and asked.labels is not None:
        clips = Videos(asked.videos, asked.labels, classifier, asked.boxes)
    else:
        assert asked.planted is not None
        size = classifier.image_size[0] if classifier.image_size else 48
        clips = PlantedClips(SEED, asked.planted, _task(asked), classifier.num_frames or DEFAULT_FRAMES, size)
    return JoinedClips(clips, classifier, seed=asked.seed) if asked.joined else clips


def _task(asked: Asked) -> str:
    """As asked, or by the name of a shipped model."""
    if asked.task is not None:
        return asked.task
    task = asked.model.rsplit("-", 1)[-1]
    if task not in ("pattern", "motion", "order"):
        raise ValueError(
            f"the name {asked.model!r} does not say which planted task the model was trained for: --task pattern, "
            f"motion or order"
        )
    return task


def _print_failures(found: Comparison) -> None:
    for row in found.failures[:10]:
        print(f"failed: {row.clip}, {row.method}: {row.reason}", file=sys.stderr)
    if len(found.failures) > 10:
        print(f"and {len(found.failures) - 10} more, in rows.csv", file=sys.stderr)
