"""How frames reach the explainer: one by one as it asks, or read in a thread of their own that never waits."""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from captum_staa.models.preprocessing import as_frames

TIMEOUT = 5.0  # seconds to wait for a source that is inside its next frame, when the stream is closed


@dataclass(frozen=True)
class Arrived:
    """A frame, its place in the stream, and when it came."""

    index: int
    frame: NDArray[np.uint8]  # (H, W, 3)
    time: float  # seconds of time.perf_counter


class Source(Protocol):
    """Where a run takes its frames from."""

    count: int  # frames that have come
    error: BaseException | None  # what the frames' own iterator raised, after the last of them

    def take(self) -> deque[Arrived]:
        """Frames in order, as soon as there is one; empty at the end."""

    def stop(self) -> None:
        """Read no further frame."""

    def join(self) -> None:
        """Leave nothing running."""


class Waiting:
    """Each frame is read when it is asked for, so that none is ever dropped; the source waits meanwhile."""

    def __init__(self, frames: Iterable[Any]) -> None:
        self.count, self.error = 0, None  # type: int, BaseException | None
        self._arrivals = _arrivals(frames)

    def take(self) -> deque[Arrived]:
        try:
            arrived = deque([next(self._arrivals)])
        except StopIteration:
            return deque()
        except Exception as error:  # raised again by the run, after the frames that had come
            self.error = error
            return deque()
        self.count += 1
        return arrived

    def stop(self) -> None:
        pass

    def join(self) -> None:
        pass


class Dropping:
    """A thread reads on whatever happens, and keeps the newest frames; older ones that nobody took are dropped."""

    def __init__(self, frames: Iterable[Any], room: int) -> None:
        self.count, self.error = 0, None  # type: int, BaseException | None
        self._arrivals = _arrivals(frames)
        self._queue: deque[Arrived] = deque(maxlen=room)
        self._changed = threading.Condition()
        self._done = False
        self._thread = threading.Thread(target=self._read, name="captum_staa stream", daemon=True)

    def take(self) -> deque[Arrived]:
        with self._changed:
            if self._thread.ident is None and not self._done:
                self._thread.start()
            while not self._queue and not self._done:
                self._changed.wait()
            taken = deque(self._queue)
            self._queue.clear()
        return taken

    def stop(self) -> None:
        with self._changed:
            self._done = True
            self._changed.notify_all()

    def join(self) -> None:
        self.stop()
        if self._thread.ident is None:
            return
        self._thread.join(TIMEOUT)
        if self._thread.is_alive():
            warnings.warn(
                f"the stream's source has not given its next frame for {TIMEOUT:.0f} s, and its thread waits on; "
                f"close the source itself to end it",
                ResourceWarning,
                stacklevel=3,
            )

    def _read(self) -> None:
        try:
            for arrived in self._arrivals:
                with self._changed:
                    if self._done:
                        return
                    self._queue.append(arrived)
                    self.count = arrived.index + 1
                    self._changed.notify_all()
        except BaseException as error:  # raised again by the run, in the thread that can act on it
            self.error = error
        finally:
            self.stop()


def _arrivals(frames: Iterable[Any]) -> Iterator[Arrived]:
    """The frames, each checked and copied: cameras often give the same buffer again and again."""
    size: tuple[int, ...] | None = None
    for index, given in enumerate(frames):
        frame = np.array(as_frames(given, f"frame {index} of the stream", "H, W, 3"), order="C")
        if size is not None and frame.shape != size:
            raise ValueError(
                f"frame {index} of the stream is {frame.shape[0]} x {frame.shape[1]} pixels, but those before it are "
                f"{size[0]} x {size[1]}; begin a new stream where the size changes, or resize the frames to one size"
            )
        size = frame.shape
        yield Arrived(index, frame, time.perf_counter())
