"""Explain the windows of a stream, and return each frame as soon as its result is final."""

from __future__ import annotations

import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captum_staa.attr.staa import STAA
from captum_staa.models.preprocessing import Preprocessing
from captum_staa.stream.sources import Arrived, Source


class WindowExplainer:
    """Explains windows that move forward over a stream.

    Args:
        explainer: STAA with a classifier that has its preprocessing.
        target: index of the class to explain; None for the most likely class of each window.
    """

    def __init__(self, explainer: STAA, target: int | None) -> None:
        self.explainer, self.target = explainer, target
        self._prepared: dict[int, Tensor] = {}  # the last window's frames by index, (C, H', W') on the model's device

    def __call__(self, frames: Sequence[Arrived]) -> tuple[Tensor, Tensor, Tensor]:
        """Explain T consecutive frames.

        Returns:
            joint ``(T, H', W')``, temporal ``(T,)`` and probabilities ``(K,)``, float32 on the CPU. Shares of attention
            are multiplied by T, so that an even share of the window is 1 per frame for any T.
        """
        classifier = self.explainer.forward_func
        clip = self.clip(frames)
        if self.target is None:
            parts = self.explainer.attribute_predicted(clip)
        else:
            parts = self.explainer.attribute_maps(clip, target=self.target)
        unit = 1 if self.explainer.mode == "relevance" else len(frames)
        joint, temporal = ((part[0].float() * unit).cpu() for part in (parts.joint, parts.temporal))
        assert parts.logits is not None  # attribute_maps sets them
        return joint, temporal, classifier.values(parts.logits)[0].float().cpu()

    def clip(self, frames: Sequence[Arrived]) -> Tensor:
        """Return ``classifier.preprocess`` of the whole window, from frames that were preprocessed one by one."""
        classifier = self.explainer.forward_func
        if type(classifier.preprocessing) is not Preprocessing:  # other preprocessing may depend on all frames together
            return classifier.preprocess(np.stack([arrived.frame for arrived in frames]))
        device = next((parameter.device for parameter in classifier.module.parameters()), None)
        before, self._prepared = self._prepared, {}
        for arrived in frames:
            prepared = before.get(arrived.index)
            if prepared is None:
                prepared = classifier.preprocessing(arrived.frame[None])[0, 0].to(device)
            self._prepared[arrived.index] = prepared
        working = torch.stack(list(self._prepared.values()))[None]  # (1, T, C, H', W')
        return classifier.layout.from_working(working).contiguous()


class Merged:
    """Results of overlapping windows, merged for each frame by the mean over the windows that contain it.

    Example:
        >>> merged = Merged()
        >>> for start, level in ((0, 1.0), (2, 3.0)):
        ...     merged.add(range(start, start + 4), torch.full((4, 1, 1), level), torch.full((4,), level))
        >>> indices, (joint, temporal) = merged.result()
        >>> indices, temporal.tolist()
        ([0, 1, 2, 3, 4, 5], [1.0, 1.0, 2.0, 2.0, 3.0, 3.0])
        >>> merged.take(3)[1].item(), merged.count(3), len(merged)
        (2.0, 0, 5)
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[int, tuple[Tensor, ...]]] = {}  # by frame: number of windows, and sums over them

    def __len__(self) -> int:
        return len(self._held)

    def add(self, indices: Iterable[int], *parts: Tensor) -> None:
        """Add the parts of one window, each ``(T, ...)``. An interrupt leaves the mean of every frame correct."""
        for index, *ones in zip(indices, *parts, strict=True):
            count, sums = self._held.get(index, (0, ()))
            added = tuple(total + one for total, one in zip(sums, ones, strict=True)) if count else tuple(ones)
            self._held[index] = (count + 1, added)

    def count(self, index: int) -> int:
        """Return the number of windows that contain a frame."""
        return self._held[index][0] if index in self._held else 0

    def mean(self, index: int) -> tuple[Tensor, ...]:
        """Return the means of the parts of one frame, without the time axis."""
        count, sums = self._held[index]
        return tuple(total / count for total in sums)

    def take(self, index: int) -> tuple[Tensor, ...]:
        """Return :meth:`mean` of a frame, and remove the frame."""
        parts = self.mean(index)
        del self._held[index]
        return parts

    def result(self) -> tuple[list[int], list[Tensor]]:
        """Return the indices of all frames in order, and each part as ``(frames, ...)``."""
        indices = sorted(self._held)
        return indices, [torch.stack(part) for part in zip(*map(self.mean, indices), strict=True)]


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
