"""``python -m captum_staa demo``: explain a synthetic clip whose evidence is known, and score methods on such clips."""

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
from captum_staa.cli.explanation import Explanation, Options, report
from captum_staa.cli.loading import load
from captum_staa.cli.output import FILES, refuse_to_overwrite, write
from captum_staa.visualization import Frames, Style, show_frames, to_html

MODEL = "tiny-videomae-pattern"
REAL = "MCG-NJU/videomae-base-finetuned-kinetics"  # knows 400 actions of real videos
CLIPS = 12  # methods are scored on these; the first one is shown
SEED = 2_000_000_026  # of clips that are not in the training data of the model
FACTOR = 6  # each pixel becomes FACTOR x FACTOR pixels in the video file
LINE = 2  # width of an outline in pixels
FPS = 8.0
TABLES = ("table.md", "table.csv")
PAGE = "methods.html"  # maps of the first clip by all methods
METHODS = (
    "STAA (relevance)",
    "STAA",
    "STAA (last layer)",
    "ReleasedSTAA",
    "InputXGradient",
    "IntegratedGradients",
    "Occlusion",
)
METRICS = ("rivals", "rivals_time", "auroc", "forwards", "seconds")
SHEET = "planted.png"  # frames with outlines of the evidence and its rivals
COLORS = {"evidence": (0, 220, 90), "rivals": (255, 150, 0)}  # RGB colors of the outlines
WRITTEN = ("planted.mp4", SHEET, *FILES, *TABLES, PAGE)


def run(out: Path, *, clips: int = CLIPS, overwrite: bool = False) -> int:
    """Explain one clip and score methods on several clips.

    Args:
        out: output folder.
        clips: number of clips to score methods on.
        overwrite: whether to replace earlier results.

    Returns:
        The exit code: 0 on success; 1 if the prediction or the explanation differs from the planted evidence, or if a
        method failed (the table contains the reason).

    Raises:
        ValueError: ``out`` is a file.
        FileExistsError: ``out`` contains an earlier result and ``overwrite`` is False. Nothing is written.
        KeyboardInterrupt: Ctrl-C.
    """
    started = time.perf_counter()
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, got the file {out}. Choose another name.")
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

    print(
        "This demo explains a synthetic clip, in which the evidence for the class is known. The package contains no "
        "real video; the last lines say how to explain yours.\n"
    )
    first, last = (int(index) for index in when.nonzero()[[0, -1], 0])
    print(f"planted: {name}, from {explanation.video.moment(first)} to {explanation.video.moment(last)}")
    print(report(explanation, 4, sys.stdout.encoding))
    difference = verdict(explanation, name, when)
    print(difference or "as planted: the class, and every key frame", flush=True)

    print(
        f"\n{clips} planted clips that are not in the training data. rivals: does the map rank the evidence above "
        f"objects that look alike? Chance is 0.5. model-free: the difference from the mean frame."
    )
    with _one_thread():
        comparison = compare(load(MODEL, None), planted, METHODS, METRICS)
    if comparison.interrupted:  # a table of some of the clips would look like a table of all of them
        raise KeyboardInterrupt
    print(comparison.to_markdown(intervals=False))
    print("\n".join(f"{method}: {description}" for method, description in comparison.settings["methods"].items()))
    comparison.to_markdown(out / TABLES[0], overwrite=overwrite)
    comparison.to_csv(out / TABLES[1], overwrite=overwrite)
    maps = {} if comparison.sheet is None else comparison.sheet.maps
    shown = {name: torch.from_numpy(mask).float()[None] for name, mask in masks.items()}
    to_html(
        {**shown, **{method: maps[method] for method in METHODS if method in maps}},
        Frames(planted.frames(0), fps=FPS),
        out / PAGE,
        style=Style(sign="positive"),  # as in the scores: negative values are not evidence for the class
        overwrite=overwrite,
        play_fps=FPS,
        truth=when.numpy(),
        predictions=[(predicted, probability) for _, predicted, probability in explanation.prediction.top(4)],
        title=f"planted clip of class {name}, explained by several methods",
    )
    print(f"\nwritten to {out}: {', '.join(WRITTEN)} ({time.perf_counter() - started:.0f} s)")
    print(f"open {out / 'player.html'} and {out / PAGE} in a browser\n\n{next_commands(out, explanation)}")
    return 1 if difference or comparison.failures else 0


def next_commands(out: Path, explanation: Explanation) -> str:
    """Return the commands to try next: another class, a comparison, and a real video."""
    other = explanation.prediction.top(2)[1][1]
    commands = {
        f"why this class, and not {other}": f"explain {out / 'planted.mp4'} --model {MODEL} --versus {other} "
        f"--out {out}_versus",
        "all methods, in tables and a report": f"compare --model {MODEL} --planted 4 --out {out}_methods",
        "your video and a model of the Hugging Face hub (0.3 GB)": f"explain VIDEO --model {REAL}",
    }
    lines = [f"  {what}:\n    python -m captum_staa {command}" for what, command in commands.items()]
    return "\n".join(["try next:", *lines])


def outlined(frames: NDArray[np.uint8], masks: Mapping[str, NDArray[np.bool_]]) -> NDArray[np.uint8]:
    """Return the enlarged frames with an outline of each mask ``(T, H, W)``, in the color of its name."""
    drawn = enlarged(frames).copy()
    for name, mask in masks.items():
        large = mask.repeat(FACTOR, axis=1).repeat(FACTOR, axis=2)
        inner = large.copy()
        for axis in (1, 2):
            for step in (-LINE, LINE):
                inner &= np.roll(large, step, axis)  # objects wrap around the borders of a frame
        drawn[large & ~inner] = COLORS[name]
    return drawn


def save_sheet(path: Path, frames: NDArray[np.uint8], name: str, overwrite: bool) -> None:
    """Write every other frame as a contact sheet."""
    title = f"{name}: evidence (green) and rivals that look alike (orange)"
    figure, _ = show_frames(
        None,
        Frames(frames[::2], indices=range(0, len(frames), 2)),
        style=Style(method="original_image"),
        title=title,
        use_pyplot=False,
    )
    with atomic(path, overwrite) as part:
        figure.savefig(part, format="png", dpi=110)


def enlarged(frames: NDArray[np.uint8], factor: int = FACTOR) -> NDArray[np.uint8]:
    """Repeat each pixel of ``(T, H, W, 3)``: the frames get the size of real ones and survive video compression."""
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def verdict(explanation: Explanation, label: str, when: torch.Tensor) -> str:
    """Return a message about the difference from the planted evidence; empty if there is no difference."""
    predicted = explanation.prediction.top(1)[0][1]
    if predicted != label:
        return f"NOT as planted: the model predicts {predicted!r}, but {label!r} was planted"
    key_frames = explanation.key_frames()
    outside = [explanation.video.moment(frame.index) for frame in key_frames if not when[frame.position]]
    if not key_frames:
        return "NOT as planted: there are no key frames"
    if outside:
        return f"NOT as planted: key frames at {', '.join(outside)} lie outside of the evidence"
    return ""


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch with one thread: for a small model, more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
