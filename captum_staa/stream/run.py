"""Explain the windows of a stream, and return each frame as soon as its result is final."""

from __future__ import annotations

import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from captum_staa.stream.sources import Arrived, Source
from captum_staa.stream.window import Merged, WindowExplainer


@dataclass(frozen=True)
class FrameResult:
    """One frame with its prediction and explanation.

    Example:
        >>> import torch
        >>> result = FrameResult(
        ...     index=7, frame=None, windows=2, labels=["left", "right"], probabilities=torch.tensor([0.25, 0.75]),
        ...     joint=torch.full((2, 2), 0.5), temporal=2.0, crop=(0, 0, 48, 48), latency=0.5, latency_frames=12)
        >>> result.label, result.top(1), result.explained
        ('right', [('right', 0.75)], True)

    Attributes:
        index: index of the frame in the stream, from 0.
        frame: ``(H, W, 3)`` uint8, a copy; None if the frame was dropped.
        windows: number of windows that contain the frame and were explained; 0 if there were none.
        labels: names of the K classes.
        probabilities: ``(K,)``, mean over the windows; None without windows.
        joint: ``(H', W')`` float32 on the CPU in pixels of the model's input, mean over the windows; None without
            windows. Attention: a frame with an even share of its window sums to 1. Relevance: signed, in units of the
            logit; with Chefer's rule nonnegative and without a unit.
        temporal: sum of the map; nan without windows.
        crop: ``(top, left, height, width)`` of the map in pixels of the frame, for ``Frames(crop=)`` of
            :mod:`captum_staa.visualization`.
        latency: seconds from the arrival of the frame to this result; nan if the frame was dropped.
        latency_frames: number of frames that arrived after the frame and before this result.
    """

    index: int
    frame: NDArray[np.uint8] | None
    windows: int
    labels: list[str]
    probabilities: Tensor | None
    joint: Tensor | None
    temporal: float
    crop: tuple[float, float, float, float]
    latency: float
    latency_frames: int

    @property
    def explained(self) -> bool:
        """Whether at least one window explained the frame."""
        return self.windows > 0

    @property
    def label(self) -> str | None:
        """The most likely class; None if no window explained the frame."""
        return self.top(1)[0][0] if self.explained else None

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """Return the ``k`` most likely classes as (label, probability); empty if no window explained the frame."""
        if self.probabilities is None:
            return []
        best = self.probabilities.topk(min(k, len(self.labels)))
        return [(self.labels[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


@dataclass
class StreamStats:
    """Counters of a stream.

    Attributes:
        frames: results returned.
        unexplained: results without an explanation.
        windows: windows explained.
        skipped: windows skipped because frames arrived faster than they were explained.
    """

    frames: int = 0
    unexplained: int = 0
    windows: int = 0
    skipped: int = 0


class StreamRun(Iterator[FrameResult]):
    """Iterator over the results of a stream, one per frame in order; :class:`STAAStream` returns it.

    It holds at most two windows plus one stride of frames, for a stream of any length. A thread that reads frames stops
    at the end of the stream, after an exception, or with :meth:`close`, which a ``with`` block calls.

    Attributes:
        stats: :class:`StreamStats`, the counters so far.
    """

    def __init__(self, explain: WindowExplainer, window: int, stride: int, source: Source) -> None:
        self.stats = StreamStats()
        self._explain, self._window, self._stride, self._source = explain, window, stride, source
        self._merged = Merged()
        self._held: deque[Arrived] = deque()  # consecutive frames that later windows or results need
        self._pending: deque[Arrived] = deque()  # taken from the source, but not yet held
        self._last = -1  # index of the last frame held so far
        self._next_start = 0  # start of the first window that is neither explained nor skipped
        self._explained = -1  # start of the last window explained
        self._given, self._final = 0, 0  # results returned; results of frames before this index are final
        self._ended = self._warned = False
        self._error: BaseException | None = None
        self._labels: list[str] = []
        self._crop: tuple[float, float, float, float] | None = None
        weakref.finalize(self, source.stop)  # a loop that ends with break does not call close

    def __iter__(self) -> StreamRun:
        return self

    def __next__(self) -> FrameResult:
        try:
            while self._given == self._final:
                if self._ended:
                    error, self._error = self._error, None
                    if error is not None:
                        raise error
                    raise StopIteration
                self._advance()
        except BaseException:
            self._end()
            raise
        return self._give()

    def finish(self) -> Iterator[FrameResult]:
        """Stop reading frames and running the model, and yield the results of frames that are still held.

        After an interrupt, these results contain the windows that were explained before it.
        """
        self._end()
        self._final = max(self._final, self._last + 1)
        while self._given < self._final:
            yield self._give()

    def close(self) -> None:
        """Stop reading frames, release held frames, and wait at most 5 seconds for the reading thread to end."""
        self._end()
        self._held.clear()
        self._merged = Merged()
        self._final, self._last = self._given, self._given - 1

    def __enter__(self) -> StreamRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- one step -----------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Take the frames that have arrived, and explain the newest complete window."""
        self._trim()
        self._pending = self._pending or self._source.take()
        if not self._pending:
            self._conclude()
            return
        first = self._pending[0].index
        if first > self._last + 1:  # frames in between were dropped, so no window covers them
            if self._final < first:
                self._final = first  # return the results of held frames first, then those of dropped frames
                self._warn(f"{first - self._last - 1} frames from frame {self._last + 1} on were dropped")
                return
            self._held.clear()
        self._held.extend(self._pending)
        self._pending.clear()
        self._last = self._held[-1].index
        start = self._newest_start()
        if start >= max(self._next_start, self._held[0].index):
            skipped = (start - self._next_start) // self._stride
            if skipped:
                self._skip(skipped)
            self._explain_window(start)
            self._next_start = self._final = start + self._stride

    def _conclude(self) -> None:
        """At the end of the stream, explain one more window that ends with the last frame, if frames are left."""
        total = self._last + 1
        self._error = self._source.error
        if total < self._window and self._error is None:
            raise ValueError(
                f"a stream must have at least window={self._window} frames, got {total}. Pass a longer stream"
                + (f", or repeat its last frame {self._window - total} times." if total else ".")
            )
        missed = max(0, (self._newest_start() - self._next_start) // self._stride + 1) if total >= self._window else 0
        if missed:
            self._skip(missed)
        tail = total - self._window
        if self._held and tail >= self._held[0].index and tail > self._explained:
            self._explain_window(tail)
        self._final = total
        self._end()

    def _newest_start(self) -> int:
        """Return the start of the newest complete window among the windows at multiples of the stride."""
        return (self._last + 1 - self._window) // self._stride * self._stride

    def _explain_window(self, start: int) -> None:
        """Explain the window that starts at a frame."""
        at = start - self._held[0].index
        frames = list(islice(self._held, at, at + self._window))
        if self._crop is None:
            self._crop = self._explain.explainer.forward_func.crop_box(*frames[0].frame.shape[:2])
        joint, temporal, probabilities = self._explain(frames)
        self._labels = self._labels or self._explain.explainer.forward_func.label_names(len(probabilities))
        per_frame = probabilities.expand(self._window, -1)
        # The last window of the stream may contain frames whose results are already returned.
        known = max(self._given - start, 0)
        self._merged.add(range(start + known, start + self._window), joint[known:], temporal[known:], per_frame[known:])
        self._explained = start
        self.stats.windows += 1

    def _give(self) -> FrameResult:
        """Return the result of the next frame."""
        index, self._given = self._given, self._given + 1
        at = index - self._held[0].index if self._held else -1
        held = self._held[at] if 0 <= at < len(self._held) else None
        windows = self._merged.count(index)
        joint, temporal, probabilities = self._merged.take(index) if windows else (None, None, None)
        self.stats.frames += 1
        self.stats.unexplained += not windows
        return FrameResult(
            index=index,
            frame=None if held is None else held.frame,
            windows=windows,
            labels=self._labels,
            probabilities=probabilities,
            joint=joint,
            temporal=float("nan") if temporal is None else float(temporal),
            crop=self._crop or (0.0, 0.0, 0.0, 0.0),
            latency=float("nan") if held is None else time.perf_counter() - held.time,
            latency_frames=self._source.count - 1 - index,
        )

    def _trim(self) -> None:
        """Release frames that no later window and no result needs."""
        needed = min(self._next_start, self._last + 1 - self._window, self._given)
        while self._held and self._held[0].index < needed:
            self._held.popleft()

    def _skip(self, count: int) -> None:
        self._warn(f"{count} window{'s' * (count > 1)} from frame {self._next_start} on skipped")
        self.stats.skipped += count

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"frames arrive faster than they are explained: {what}. Results of frames without an explanation have "
                f"explained=False. This warning is shown only once; see .stats for the counts. Use a larger stride, or "
                f"policy='wait' if the source can wait.",
                stacklevel=5,
            )

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._source.join()
