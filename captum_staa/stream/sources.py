"""Sources of frames: read one by one on demand, or read in a separate thread that never waits."""

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

TIMEOUT = 5.0  # seconds to wait for the next frame of a source when the stream is closed


@dataclass(frozen=True)
class Arrived:
    """A frame, its index in the stream, and its arrival time."""

    index: int
    frame: NDArray[np.uint8]  # (H, W, 3)
    time: float  # seconds of time.perf_counter


class Source(Protocol):
    """Source of the frames of a run."""

    count: int  # frames that have arrived
    error: BaseException | None  # the exception that the iterable of frames raised after its last frame

    def take(self) -> deque[Arrived]:
        """Return frames in order, at least one; empty at the end of the stream."""

    def stop(self) -> None:
        """Stop reading frames."""

    def join(self) -> None:
        """Wait until the reading thread has ended."""


class Waiting:
    """Source that reads each frame on demand, so that no frame is dropped; the iterable waits."""

    def __init__(self, frames: Iterable[Any]) -> None:
        self.count, self.error = 0, None  # type: int, BaseException | None
        self._arrivals = _arrivals(frames)

    def take(self) -> deque[Arrived]:
        try:
            arrived = deque([next(self._arrivals)])
        except StopIteration:
            return deque()
        except Exception as error:  # the run raises it again after the frames before it
            self.error = error
            return deque()
        self.count += 1
        return arrived

    def stop(self) -> None:
        pass

    def join(self) -> None:
        pass


class Dropping:
    """Source that reads in a thread without waiting, keeps the newest frames, and drops older frames."""

    def __init__(self, frames: Iterable[Any], maxlen: int) -> None:
        self.count, self.error = 0, None  # type: int, BaseException | None
        self._arrivals = _arrivals(frames)
        self._queue: deque[Arrived] = deque(maxlen=maxlen)
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
                f"the source of a closed stream must return its next frame within {TIMEOUT:.0f} s, got no frame, so "
                f"the reading thread still runs. Close the source to end it.",
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
        except BaseException as error:  # the run raises it again in the thread of its caller
            self.error = error
        finally:
            self.stop()


def _arrivals(frames: Iterable[Any]) -> Iterator[Arrived]:
    """Yield each frame checked and copied, because cameras often return the same buffer for every frame."""
    size: tuple[int, ...] | None = None
    for index, item in enumerate(frames):
        frame = np.array(as_frames(item, f"frame {index} of the stream", "H, W, 3"), order="C")
        if size is not None and frame.shape != size:
            raise ValueError(
                f"frame {index} of the stream must be {size[0]} x {size[1]} pixels like the frames before it, got "
                f"{frame.shape[0]} x {frame.shape[1]}. Resize the frames to one size, or start a new stream."
            )
        size = frame.shape
        yield Arrived(index, frame, time.perf_counter())
