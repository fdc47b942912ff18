"""``python -m captum_staa stream``: a file or a camera explained as it plays, and written with the maps on top."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from captum_staa.attr import STAA
from captum_staa.cli.explain import INTERRUPTED
from captum_staa.cli.prepare import load
from captum_staa.io import video_writer
from captum_staa.stream import FrameResult, STAAStream, StreamStats
from captum_staa.stream.picture import Painter
from captum_staa.stream.video import Feed, is_camera, opened

EVERY = 8  # frames between two texts beside the progress bar


@dataclass(frozen=True)
class Asked:
    """What ``python -m captum_staa stream`` was asked for; the words are those of ``--help``."""

    source: str
    model: str
    out: Path
    overwrite: bool = False
    window: int | None = None
    stride: int | None = None
    mode: str = "attention"
    layers: str | Sequence[int] | None = None
    target: str | None = None
    policy: str | None = None
    loop: bool = False
    limit: int | None = None
    device: str | None = None


class Latency:
    """Mean and maximum of a delay, without keeping the delays."""

    def __init__(self) -> None:
        self.count, self.total, self.most = 0, 0.0, 0.0

    def add(self, result: FrameResult) -> None:
        if result.explained:
            self.count += 1
            self.total += result.latency
            self.most = max(self.most, result.latency)

    def __str__(self) -> str:
        mean = self.total / max(self.count, 1)
        return f"{mean:.2f} s on average, {self.most:.2f} s at most"


def run(asked: Asked) -> int:
    """Explain, write and print; returns the exit code.

    Raises:
        ValueError, OSError: the source, the model, the target or an option is not as it should be. Where frames have
            been written by then, the file of these is kept.
        KeyboardInterrupt: Ctrl-C came before there was anything to keep.
    """
    camera = is_camera(asked.source)
    policy = asked.policy or ("drop" if camera else "wait")
    if asked.target is not None and asked.mode != "relevance":
        raise ValueError(f"--target {asked.target} needs --mode relevance; {asked.mode} is about no class")
    if asked.out.exists() and not asked.overwrite:
        raise FileExistsError(f"{asked.out} exists; pass --overwrite to replace it, or choose another name with --out")
    with opened(asked.source, loop=asked.loop, live=policy == "drop" and not camera) as feed:
        classifier = load(asked.model, asked.device)
        layers: Any = {} if asked.layers is None else {"layers": asked.layers}
        explainer = STAA(classifier, mode=asked.mode, **layers)  # type: ignore[arg-type]  # STAA itself checks it
        target = None if asked.target is None else classifier.class_index(asked.target)
        stream = STAAStream(explainer, asked.window, asked.stride, target=target, policy=policy)  # type: ignore[arg-type]
        return _follow(stream, feed, asked)


def _follow(stream: STAAStream, feed: Feed, asked: Asked) -> int:
    totals = [count for count in (feed.total, asked.limit) if count is not None]
    painter, latency = Painter(shares=asked.mode != "relevance"), Latency()
    interrupted = False
    failed: Exception | None = None
    seen: NDArray[np.uint8] | None = None  # the newest frame that was not dropped
    started = time.perf_counter()
    with (
        video_writer(asked.out, feed.fps, overwrite=asked.overwrite) as write,
        stream(itertools.islice(feed.frames, asked.limit)) as results,
        tqdm(desc="starting", total=min(totals, default=None), unit="frame", delay=0.5, leave=False) as bar,
    ):

        def show(result: FrameResult) -> None:
            nonlocal seen
            seen = seen if result.frame is None else result.frame
            if seen is not None:
                write(painter(result, seen))
            latency.add(result)
            if result.index % EVERY == 0:
                bar.set_description_str(result.label or "not explained", refresh=False)
                bar.set_postfix_str(f"latency {result.latency:.2f} s", refresh=False)
            bar.update()

        try:
            for result in results:
                show(result)
        except (KeyboardInterrupt, Exception) as error:
            if not results.stats.windows:
                raise  # nothing is worth keeping
            interrupted, failed = isinstance(error, KeyboardInterrupt), error if isinstance(error, Exception) else None
            for result in results.finish():
                show(result)
        stats = results.stats
    print(report(stream, feed, stats, latency, time.perf_counter() - started), flush=True)
    if interrupted:
        print(f"interrupted: {stats.frames} frames are done and kept", file=sys.stderr)
    print(f"written to {asked.out}")
    if failed is not None:
        raise failed
    return INTERRUPTED if interrupted else 0


def report(stream: STAAStream, feed: Feed, stats: StreamStats, latency: Latency, seconds: float) -> str:
    """What the terminal shows at the end."""
    fewest, most = stream.latency
    lines = [
        f"{feed.name}: {stats.frames} frames in {seconds:.1f} s, {stats.frames / seconds:.1f} per second with drawing "
        f"and writing (it plays {feed.fps:.4g} per second)",
        f"windows of {stream.window} frames, one every {stream.stride}, by STAA {stream.explainer.mode}: "
        f"{stats.windows} explained, {stats.skipped} skipped; policy {stream.policy}",
        f"latency: {latency}; a frame waits for {fewest} to {most} frames after it",
    ]
    if stats.unexplained:
        lines.append(f"{stats.unexplained} of {stats.frames} frames have no explanation")
    return "\n".join(lines)
