"""One stream under way: windows explained as they fill, frames given out as soon as no later window can see them."""

from __future__ import annotations

import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from itertools import islice
from types import TracebackType

from captum_staa.stream.results import FrameResult, StreamStats
from captum_staa.stream.sources import Arrived, Source
from captum_staa.stream.window import Merged, WindowExplainer


class StreamRun(Iterator[FrameResult]):
    """What calling a :class:`STAAStream` gives: an iterator over results, one per frame and in order.

    It holds at most two windows and a stride of frames, however long the stream. A thread that reads frames ends with
    the stream, with an exception, or with :meth:`close`, which a ``with`` block calls.

    Attributes:
        stats: :class:`StreamStats`, what has been counted so far.
    """

    def __init__(self, explain: WindowExplainer, window: int, stride: int, source: Source) -> None:
        self.stats = StreamStats()
        self._explain, self._window, self._stride, self._source = explain, window, stride, source
        self._merged = Merged()
        self._held: deque[Arrived] = deque()  # frames in a row, which windows to come or results need
        self._came: deque[Arrived] = deque()  # taken from the source, and not yet held
        self._last = -1  # index of the last frame held so far
        self._next_start = 0  # of the first window that is neither explained nor skipped
        self._explained = -1  # start of the last window explained
        self._given, self._final = 0, 0  # results given; frames before this one change no more
        self._ended = self._warned = False
        self._error: BaseException | None = None
        self._labels: list[str] = []
        self._crop: tuple[float, float, float, float] | None = None
        weakref.finalize(self, source.stop)  # a loop that breaks off closes nothing

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
        """Take no more frames, run the model no more, and give the frames that are still held.

        After an interrupt these carry what was explained of them by then.
        """
        self._end()
        self._final = max(self._final, self._last + 1)
        while self._given < self._final:
            yield self._give()

    def close(self) -> None:
        """Take no more frames and let go of those held; the reading thread has ended when this returns."""
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
        """Take what has come, and explain the newest window that is complete."""
        self._trim()
        self._came = self._came or self._source.take()
        if not self._came:
            self._conclude()
            return
        first = self._came[0].index
        if first > self._last + 1:  # frames in between were dropped: no window spans them
            if self._final < first:
                self._final = first  # what is held goes out, and the dropped ones after it
                self._warn(f"{first - self._last - 1} frames from {self._last + 1} on were dropped unseen")
                return
            self._held.clear()
        self._held.extend(self._came)
        self._came.clear()
        self._last = self._held[-1].index
        start = self._newest_start()
        if start >= max(self._next_start, self._held[0].index):
            skipped = (start - self._next_start) // self._stride
            if skipped:
                self._skip(skipped)
            self._see(start)
            self._next_start = self._final = start + self._stride

    def _conclude(self) -> None:
        """The stream has ended: one more window, aligned to its end, where frames are left."""
        total = self._last + 1
        self._error = self._source.error
        if total < self._window and self._error is None:
            raise ValueError(
                f"the stream ended after {total} frames, but a window spans {self._window}; give a longer stream, or "
                f"repeat its last frame {self._window - total} times" + (" (it was empty)" if total == 0 else "")
            )
        missed = max(0, (self._newest_start() - self._next_start) // self._stride + 1) if total >= self._window else 0
        if missed:
            self._skip(missed)
        tail = total - self._window
        if self._held and tail >= self._held[0].index and tail > self._explained:
            self._see(tail)
        self._final = total
        self._end()

    def _newest_start(self) -> int:
        """Of the newest window on the stride's steps whose last frame has come."""
        return (self._last + 1 - self._window) // self._stride * self._stride

    def _see(self, start: int) -> None:
        at = start - self._held[0].index
        frames = list(islice(self._held, at, at + self._window))
        if self._crop is None:
            self._crop = self._explain.explainer.forward_func.crop_box(*frames[0].frame.shape[:2])
        joint, temporal, probabilities = self._explain(frames)
        self._labels = self._labels or self._explain.explainer.forward_func.label_names(len(probabilities))
        answers = probabilities.expand(self._window, -1)
        # The windows that end the stream may reach back to frames that are given out already.
        known = max(self._given - start, 0)
        self._merged.add(range(start + known, start + self._window), joint[known:], temporal[known:], answers[known:])
        self._explained = start
        self.stats.windows += 1

    def _give(self) -> FrameResult:
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
        """Let go of frames that no window to come and no result needs."""
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
                f"the stream comes faster than it is explained: {what}. Frames that no window saw say explained=False; "
                f"this is said once, .stats counts on",
                stacklevel=5,
            )

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._source.join()
