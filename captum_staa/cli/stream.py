"""``python -m captum_staa stream``: explain a video file or a camera live, and write a video with the maps on top."""

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
from captum_staa.cli.loading import load
from captum_staa.io import video_writer
from captum_staa.stream import FrameResult, STAAStream, StreamStats
from captum_staa.stream.picture import Painter
from captum_staa.stream.sources import Feed, is_camera, opened

EVERY = 8  # number of frames between updates of the text of the progress bar


@dataclass(frozen=True)
class SourceOptions:
    """The frames to read."""

    name: str  # a file, or a camera
    loop: bool = False
    limit: int | None = None


@dataclass(frozen=True)
class MapOptions:
    """The arguments of STAA, and the class to explain."""

    mode: str = "attention"
    layers: str | Sequence[int] | None = None
    target: str | None = None


@dataclass(frozen=True)
class StreamOptions:
    """Options of ``python -m captum_staa stream``, as described by ``--help``."""

    source: SourceOptions
    maps: MapOptions
    model: str
    out: Path
    overwrite: bool = False
    window: int | None = None
    stride: int | None = None
    policy: str | None = None
    device: str | None = None


class Latency:
    """Running mean and maximum of the latency of explained frames, in seconds."""

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


def run(options: StreamOptions) -> int:
    """Explain a stream, write the video and print a report. Return the exit code.

    Raises:
        ValueError, OSError: the source, the model, the target or an option is invalid. Frames that are already written
            are kept.
        KeyboardInterrupt: Ctrl-C before there is a result to keep.
    """
    camera = is_camera(options.source.name)
    policy = options.policy or ("drop" if camera else "wait")
    if options.maps.target is not None and options.maps.mode != "relevance":
        raise ValueError(
            f"--target needs --mode relevance, got --target {options.maps.target} with --mode {options.maps.mode}, "
            f"whose maps do not depend on a class. Drop --target, or pass --mode relevance."
        )
    if options.out.exists() and not options.overwrite:
        raise FileExistsError(
            f"{options.out} already exists. Pass --overwrite to replace it, or choose another name with --out."
        )
    with opened(options.source.name, loop=options.source.loop, live=policy == "drop" and not camera) as feed:
        classifier = load(options.model, options.device)
        layers: Any = {} if options.maps.layers is None else {"layers": options.maps.layers}
        explainer = STAA(classifier, mode=options.maps.mode, **layers)  # type: ignore[arg-type]  # STAA checks the mode
        target = None if options.maps.target is None else classifier.class_index(options.maps.target)
        stream = STAAStream(
            explainer,
            options.window,
            options.stride,
            target=target,
            policy=policy,  # type: ignore[arg-type]  # STAAStream checks the policy
        )
        return _follow(stream, feed, options)


def _follow(stream: STAAStream, feed: Feed, options: StreamOptions) -> int:
    totals = [count for count in (feed.total, options.source.limit) if count is not None]
    painter, latency = Painter(shares=options.maps.mode != "relevance"), Latency()
    interrupted = False
    failed: Exception | None = None
    seen: NDArray[np.uint8] | None = None  # the newest frame that was not dropped
    started = time.perf_counter()
    with (
        video_writer(options.out, feed.fps, overwrite=options.overwrite) as write,
        stream(itertools.islice(feed.frames, options.source.limit)) as results,
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
                raise  # there is no result to keep
            interrupted, failed = isinstance(error, KeyboardInterrupt), error if isinstance(error, Exception) else None
            for result in results.finish():
                show(result)
        stats = results.stats
    print(report(stream, feed, stats, latency, time.perf_counter() - started), flush=True)
    if interrupted:
        print(f"interrupted: {stats.frames} finished frames are kept", file=sys.stderr)
    print(f"written to {options.out}")
    if failed is not None:
        raise failed
    return INTERRUPTED if interrupted else 0


def report(stream: STAAStream, feed: Feed, stats: StreamStats, latency: Latency, seconds: float) -> str:
    """Return the report for the terminal."""
    fewest, most = stream.latency
    lines = [
        f"{feed.name}: {stats.frames} frames in {seconds:.1f} s, {stats.frames / seconds:.1f} frames per second "
        f"including drawing and writing (source: {feed.fps:.4g} frames per second)",
        f"windows of {stream.window} frames, one every {stream.stride}, by {stream.explainer.get_name()}: "
        f"{stats.windows} explained, {stats.skipped} skipped; policy {stream.policy}",
        f"latency: {latency}; each frame waits for {fewest} to {most} later frames",
    ]
    if stats.unexplained:
        lines.append(f"{stats.unexplained} of {stats.frames} frames have no explanation")
    return "\n".join(lines)
