"""``python -m captum_staa demo``: a synthetic clip whose right explanation is known, from the file to the score."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from captum_staa import io
from captum_staa._utils.files import atomic
from captum_staa.benchmark import PlantedClips, compare
from captum_staa.cli.explain import explain
from captum_staa.cli.explanation import Explanation, Options, moment, report
from captum_staa.cli.output import FILES, refuse_to_overwrite, write
from captum_staa.cli.prepare import load
from captum_staa.visualization import show_frames, to_html

MODEL = "tiny-videomae-pattern"
CLIPS = 12  # that methods are scored on; the first of them is shown
SEED = 2_000_000_026  # of clips that the model has not been trained on
FACTOR = 6  # by which each pixel grows in the file
LINE = 2  # width of an outline, pixels
FPS = 8.0
TABLES = ("table.md", "table.csv")
PAGE = "methods.html"  # the first clip's maps by all methods
METHODS = (
    "STAA",
    "STAA(attention)",
    "STAA(attention-last)",
    "STAA(released)",
    "InputXGradient",
    "IntegratedGradients",
    "Occlusion",
)
METRICS = ("rivals", "rivals_time", "auroc", "forwards", "seconds")
SHEET = "planted.png"  # where the evidence and its rivals are
COLORS = {"evidence": (0, 220, 90), "rivals": (255, 150, 0)}  # of their outlines
WRITTEN = ("planted.mp4", SHEET, *FILES, *TABLES, PAGE)


def run(out: Path, *, clips: int = CLIPS, overwrite: bool = False) -> int:
    """Show one clip and score methods on several.

    Args:
        out: folder of the results.
        clips: how many to score on.
        overwrite: whether earlier results may be replaced.

    Returns:
        The exit code: 0, or 1 where the model's answer or the explanation is not what was planted, or where a method
        failed, whose reason is in the table.

    Raises:
        ValueError: ``out`` is a file.
        FileExistsError: ``out`` holds one of the files, and ``overwrite`` is False; nothing is written then.
        KeyboardInterrupt: Ctrl-C.
    """
    started = time.perf_counter()
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out names a folder, but {out} is a file; choose another name")
    refuse_to_overwrite(out, overwrite, WRITTEN)
    planted = PlantedClips(SEED, clips)
    _, label, truth = planted[0]
    name, when = planted.labels[int(label)], truth.flatten(1).any(1)  # (T,)

    out.mkdir(parents=True, exist_ok=True)
    video = out / "planted.mp4"
    io.write_video(video, enlarged(planted.frames(0)), FPS, crf=6, overwrite=overwrite)
    masks = {"evidence": truth.numpy(), "rivals": planted.rivals(0).numpy()}
    save_sheet(out / SHEET, outlined(planted.frames(0), masks), name, overwrite)
    explanation = explain(Options(video=video, model=MODEL, out=out, overwrite=True))
    write(explanation, out, overwrite=overwrite, truth=when)

    first, last = (int(index) for index in when.nonzero()[[0, -1], 0])
    print(f"planted: {name}, from {moment(explanation, first)} to {moment(explanation, last)}")
    print(report(explanation, 4, sys.stdout.encoding))
    good = verdict(explanation, name, when)
    print(good or "as planted: the class, and every key frame", flush=True)

    print(
        f"\n{clips} planted clips that the model has not seen. rivals: does the map prefer the evidence to objects "
        f"that look alike? Chance is 0.5. model-free: the difference from the mean frame."
    )
    with _one_thread():
        found = compare(load(MODEL, None), planted, METHODS, METRICS)
    if found.interrupted:  # a table of a part of the clips would pass for one of all
        raise KeyboardInterrupt
    print(found.to_markdown(intervals=False))
    print("\n".join(f"{method}: {description}" for method, description in found.settings["methods"].items()))
    found.to_markdown(out / TABLES[0], overwrite=overwrite)
    found.to_csv(out / TABLES[1], overwrite=overwrite)
    maps = {} if found.sheet is None else found.sheet.maps
    shown = {name: torch.from_numpy(mask).float()[None] for name, mask in masks.items()}
    to_html(
        planted.frames(0),
        {**shown, **{method: maps[method] for method in METHODS if method in maps}},
        sign="positive",  # as they are scored: what speaks against the class is no evidence
        path=out / PAGE,
        overwrite=overwrite,
        fps=FPS,
        play_fps=FPS,
        truth=when.numpy(),
        predictions=[(said, probability) for _, said, probability in explanation.top(4)],
        title=f"{name}, planted, and where methods find it",
    )
    print(f"\nwritten to {out}: {', '.join(WRITTEN)} ({time.perf_counter() - started:.0f} s)")
    return 1 if good or found.failures else 0


def outlined(frames: NDArray[np.uint8], masks: Mapping[str, NDArray[np.bool_]]) -> NDArray[np.uint8]:
    """Enlarged frames with a line around each mask ``(T, H, W)``, in its color."""
    drawn = enlarged(frames).copy()
    for name, mask in masks.items():
        large = mask.repeat(FACTOR, axis=1).repeat(FACTOR, axis=2)
        inner = large.copy()
        for axis in (1, 2):
            for step in (-LINE, LINE):
                inner &= np.roll(large, step, axis)  # frames wrap around, as the objects do
        drawn[large & ~inner] = COLORS[name]
    return drawn


def save_sheet(path: Path, frames: NDArray[np.uint8], name: str, overwrite: bool) -> None:
    """Write every other frame as a contact sheet."""
    title = f"{name}: evidence (green) and rivals that look alike (orange)"
    figure, _ = show_frames(
        frames[::2],
        method="original_image",
        indices=range(0, len(frames), 2),
        title=title,
        show_colorbar=False,
        use_pyplot=False,
    )
    with atomic(path, overwrite) as part:
        figure.savefig(part, format="png", dpi=110)


def enlarged(frames: NDArray[np.uint8], factor: int = FACTOR) -> NDArray[np.uint8]:
    """``(T, H, W, 3)`` with every pixel a square, as large as real frames and robust to compression."""
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def verdict(explanation: Explanation, label: str, when: torch.Tensor) -> str:
    """What differs from what was planted; empty where nothing does."""
    said = explanation.top(1)[0][1]
    if said != label:
        return f"NOT as planted: the model answers {said!r}, but {label!r} was planted"
    key = explanation.key_frames()
    outside = [moment(explanation, frame.index) for frame in key if not when[frame.position]]
    if outside or not key:
        return f"NOT as planted: key frames at {', '.join(outside) or 'no time at all'} lie outside of the evidence"
    return ""


@contextmanager
def _one_thread() -> Iterator[None]:
    """A small model's threads wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
