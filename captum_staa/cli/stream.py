"""``python -m captum_staa stream``: explain a video file or a camera live, and write a video with the maps on top."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from captum_staa.attr import STAA
from captum_staa.cli import INTERRUPTED
from captum_staa.cli.loading import load
from captum_staa.io import video_writer
from captum_staa.stream import FrameResult, STAAStream, StreamStats
from captum_staa.stream.sources import Feed, is_camera, opened
from captum_staa.visualization import Frames, Overlay, Style
from captum_staa.visualization.frames import reduced
from captum_staa.visualization.overlay import LUMINANCE
from captum_staa.visualization.saliency import Maps, Saliency, saliency

EVERY = 8  # number of frames between updates of the text of the progress bar
EDGE = 360  # maximum pixels of the shorter edge of a picture; larger pictures would take longer than the model
STRIP = 44  # height in pixels of the strip below the picture
PAST = 96  # frames of the timeline
BAR, LATEST, TEXT, GROUND = (150, 110, 60), (255, 190, 80), (235, 235, 235), (24, 24, 24)
STYLE = Style(sign="positive")  # evidence for the class
LEAST = 4.0  # the strongest color is at least this many even shares of attention


@dataclass(frozen=True)
class SourceOptions:
    """The frames to read."""

    name: str  # a file, or a camera
    loop: bool = False
    limit: int | None = None


@dataclass(frozen=True)
class MapOptions:
    """The arguments of STAA, and the class to explain."""

    mode: str = "relevance"
    layers: str | Sequence[int] | None = None  # only of attention
    target: str | None = None  # only of relevance


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
            f"--target needs --mode relevance, got --target {options.maps.target} with attention, whose maps do not "
            f"depend on a class. Drop --target, or drop --mode and --layers."
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
    notice = stream.explainer.forward_func.notice
    painter, latency = Painter(options.maps.mode != "relevance", notice), Latency()
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
    if stream.explainer.forward_func.notice:
        lines.append(stream.explainer.forward_func.notice)
    if stats.unexplained:
        lines.append(f"{stats.unexplained} of {stats.frames} frames were not explained")
    return "\n".join(lines)


class Painter:
    """Draw results one after the other on a common color scale.

    Future frames are unknown, so the scale is that of the strongest frame so far. It grows and never falls. Evenly
    distributed attention is not evidence, so the strongest color is at least four even shares.

    Example:
        >>> import torch
        >>> result = FrameResult(0, np.zeros((48, 64, 3), np.uint8), 1, ["walking"], torch.ones(1), torch.rand(6, 6),
        ...                      1.0, (0, 8, 48, 48), latency=0.5, latency_frames=12)
        >>> Painter()(result, result.frame).shape  # including the strip with the prediction and the timeline
        (92, 64, 3)

    Args:
        shares: whether maps are shares of attention.
        notice: what must be said with the predictions, such as that the model is a toy; drawn up to the first comma.
    """

    def __init__(self, shares: bool = True, notice: str = "") -> None:
        self._notice = notice.split(",")[0]  # there is no space for more
        self.scale = 0.0
        self._shares, self._past = shares, deque([math.nan] * PAST, maxlen=PAST)  # type: bool, deque[float]
        self._font = ImageFont.load_default(14)

    def __call__(self, result: FrameResult, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Draw one picture.

        Args:
            result: the result to draw.
            frame: ``(H, W, 3)`` uint8, the frame of the result; if it was dropped, an earlier frame.

        Returns:
            ``(h + 44, w, 3)`` uint8; the shorter edge of the ``(h, w)`` above the strip has at most 360 pixels.
        """
        self._past.append(result.temporal)
        size, frame = frame.shape, reduced(frame, EDGE)
        gray = (frame @ LUMINANCE / 2).round().astype(np.uint8)
        picture = gray[..., None].repeat(3, axis=-1)  # dark gray outside the explained part
        if result.joint is not None:
            scaled = saliency(Maps.of(result.joint[None]).joint, STYLE.sign)
            even = LEAST / result.joint.numel() if self._shares else 0.0
            self.scale = max(self.scale, scaled.scale, even)
            values = (result.joint.numpy() / (self.scale or 1)).clip(0, 1)[None]
            down, right = frame.shape[0] / size[0], frame.shape[1] / size[1]
            top, left, height, width = result.crop
            crop = (top * down, left * right, height * down, width * right)
            shown = Saliency(values.astype(np.float32), self.scale)
            picture = Overlay(Frames(frame[None], crop), shown, STYLE).picture(0)
        return np.concatenate([picture, self._strip(result, frame.shape[1])])

    def _strip(self, result: FrameResult, width: int) -> NDArray[np.uint8]:
        """Draw the strip with the prediction and the timeline."""
        strip = Image.new("RGB", (width, STRIP), GROUND)
        draw = ImageDraw.Draw(strip)
        middle = width // 2
        top = max((value for value in self._past if not math.isnan(value)), default=0.0) or 1.0
        for at, value in enumerate(self._past):
            if value > 0:  # no bar for a frame without an explanation, or with evidence against the class
                x = middle + at * (width - middle) // PAST
                end = max(middle + (at + 1) * (width - middle) // PAST - 2, x)
                y = STRIP - 3 - round(value / top * (STRIP - 8))
                draw.rectangle((x, y, end, STRIP - 3), fill=LATEST if at == PAST - 1 else BAR)
        answer = "  ".join(f"{label} {probability:.0%}" for label, probability in result.top(1)) or "not explained"
        draw.rectangle((0, 0, middle - 4, STRIP), fill=GROUND)
        draw.text((6, 4), answer, fill=TEXT, font=self._font)
        below = "  ".join(filter(None, (f"frame {result.index}", self._notice)))
        draw.text((6, 23), below, fill=BAR, font=self._font)
        return np.asarray(strip)
