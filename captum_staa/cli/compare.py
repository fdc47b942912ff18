"""``python -m captum_staa compare``: compare explanation methods on clips; write tables, pictures and a report."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from captum_staa._utils.files import atomic
from captum_staa.benchmark import Comparison, JoinedClips, PlantedClips, SceneOptions, Videos, compare
from captum_staa.benchmark.runner import local_device, processes
from captum_staa.cli import INTERRUPTED
from captum_staa.cli.loading import load
from captum_staa.models import VideoClassifier
from captum_staa.models.classifier import DEFAULT_FRAMES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SEED = 2_000_000_010  # of planted clips that are not in the training data of any bundled model
TABLES = {"rows.csv": "to_csv", "table.md": "to_markdown", "table.tex": "to_latex", "comparison.json": "to_json"}
REPORT = "report.html"
DPI = 150
SOME_FAILED = 1


@dataclass(frozen=True)
class ClipOptions:
    """Where the clips of a comparison come from: either planted clips or videos."""

    planted: int | None = None
    task: str | None = None
    videos: Path | None = None
    labels: Path | None = None
    boxes: Path | None = None
    joined: bool = False


@dataclass(frozen=True)
class CompareOptions:
    """Options of ``python -m captum_staa compare``, as described by ``--help``."""

    model: str
    out: Path
    clips: ClipOptions
    device: str | None
    dtype: str
    arguments: Mapping[str, Any]  # the keyword arguments of captum_staa.benchmark.compare


def run(options: CompareOptions) -> int:
    """Compare methods, write the results and print a table. With several processes, only the first writes and prints.

    Returns:
        The exit code: 0 on success; 1 if a clip, a method or a metric failed (the table contains the reasons); 130
        after Ctrl-C (finished results stay in the folder).
    """
    started = time.perf_counter()
    _check(options.clips)
    classifier = load(options.model, local_device(options.device)).to(DTYPES[options.dtype])
    with processes() as group:
        try:
            comparison = compare(
                classifier,
                _clips(options, classifier),
                out=options.out,
                **options.arguments,
            )
        except KeyboardInterrupt:
            _print_interrupted(options.out)
            return INTERRUPTED
        if group.rank == 0:
            files = write(comparison, options.out)
            print(comparison.to_markdown(intervals=False))
            print(f"written to {options.out}: {', '.join(files)} ({time.perf_counter() - started:.0f} s)")
            _print_failures(comparison)
        group.wait()  # torchrun ends the run with the first process that exits, so all wait until the files are written
    if comparison.interrupted:
        _print_interrupted(options.out)
        return INTERRUPTED
    return SOME_FAILED if comparison.failures else 0


def write(comparison: Comparison, folder: Path) -> list[str]:
    """Write the tables, the pictures and the report next to the stored results. Earlier files are replaced.

    Returns:
        The names of the files.
    """
    for name, method in TABLES.items():
        getattr(comparison, method)(folder / name, overwrite=True)
    pictures = []
    for name, figure in comparison.plot().items():
        pictures.append(f"{name}.png")
        with atomic(folder / pictures[-1], overwrite=True) as partial:
            figure.savefig(partial, dpi=DPI)
    comparison.to_report(folder / REPORT, overwrite=True)
    return [*TABLES, *pictures, REPORT]


def names(text: str) -> list[str]:
    """Split a comma-separated list of names.

    Example:
        >>> names("STAA, saliency,feature-ablation-frames")
        ['STAA', 'saliency', 'feature-ablation-frames']
    """
    return [name.strip() for name in text.split(",") if name.strip()]


def _check(clips: ClipOptions) -> None:
    """Raise ValueError if options contradict each other, before the model is loaded."""
    if (clips.planted is None) == (clips.videos is None):
        got = "neither" if clips.planted is None else "both"
        raise ValueError(f"clips must come from either --planted N or --videos DIR, got {got}. Pass one of the two.")
    if (clips.videos is None) != (clips.labels is None):
        got = "--videos" if clips.labels is None else "--labels"
        raise ValueError(
            f"--videos DIR and --labels CSV must be passed together, got only {got}. The table lists the files and "
            f"their classes."
        )
    if clips.boxes is not None and clips.videos is None:
        raise ValueError("--boxes needs --videos, got --planted. Planted clips include their evidence: drop --boxes.")
    if clips.boxes is not None and clips.joined:
        raise ValueError("--joined defines the evidence in time, so it cannot be combined with --boxes. Drop --boxes.")
    if clips.task is not None and clips.planted is None:
        raise ValueError(f"--task needs --planted, got --task {clips.task} with --videos. Drop --task.")


def _clips(options: CompareOptions, classifier: VideoClassifier) -> Any:
    chosen = options.clips
    clips: Any
    if chosen.videos is not None and chosen.labels is not None:
        clips = Videos(chosen.videos, chosen.labels, classifier, chosen.boxes)
    else:
        assert chosen.planted is not None
        size = classifier.image_size[0] if classifier.image_size else 48
        scene = SceneOptions(num_frames=classifier.num_frames or DEFAULT_FRAMES, image_size=size)
        clips = PlantedClips(SEED, chosen.planted, _task(options), scene=scene)
    return JoinedClips(clips, classifier, seed=options.arguments["seed"]) if chosen.joined else clips


def _task(options: CompareOptions) -> str:
    """Return ``--task``, or the task at the end of the name of a bundled model."""
    if options.clips.task is not None:
        return options.clips.task
    task = options.model.rsplit("-", 1)[-1]
    if task not in ("pattern", "motion", "order"):
        raise ValueError(
            f"the planted task must be part of the model name or be passed as --task, got --model {options.model!r} "
            f"without --task. Pass --task pattern, motion or order."
        )
    return task


def _print_interrupted(folder: Path) -> None:
    print(f"interrupted: finished results are kept in {folder}; continue with --resume", file=sys.stderr)


def _print_failures(comparison: Comparison) -> None:
    for row in comparison.failures[:10]:
        print(f"failed: {row.clip}, {row.method}: {row.reason}", file=sys.stderr)
    if len(comparison.failures) > 10:
        print(f"and {len(comparison.failures) - 10} more, in rows.csv", file=sys.stderr)
