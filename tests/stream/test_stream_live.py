"""Live streams: frames that arrive too fast, early exits, failing sources and endless streams."""

from __future__ import annotations

import gc
import threading
import tracemalloc
import warnings
from collections import deque
from itertools import cycle, islice, repeat
from threading import Semaphore
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from captum_staa import STAAStream, VideoClassifier
from captum_staa.benchmark import PlantedClips
from captum_staa.stream import StreamRun, sources
from captum_staa.stream.sources import Dropping, Waiting

W, S = 4, 2
ENOUGH = 60  # seconds after which a test that waits for another thread gives up


def frame(index: int) -> np.ndarray:
    return np.full((6, 8, 3), index % 256, np.uint8)


class Fake:
    """Replacement of the model whose map is the start of the window; ``during`` is called in each explanation."""

    def __init__(self, during=lambda start: None) -> None:
        model = SimpleNamespace(crop_box=lambda *size: (0, 0, *size), label_names=lambda count: ["a", "b"])
        self.explainer, self.during, self.starts = SimpleNamespace(forward_func=model), during, deque(maxlen=9)

    def __call__(self, frames):
        assert [one.index for one in frames] == list(range(frames[0].index, frames[0].index + W))
        assert all((one.frame == one.index % 256).all() for one in frames)
        start = frames[0].index
        self.starts.append(start)
        self.during(start)
        return torch.full((W, 2, 2), float(start)), torch.full((W,), float(start)), torch.tensor([0.25, 0.75])


class Gated:
    """A source whose frames are released by the test."""

    def __init__(self, total: int, first: int) -> None:
        self.total, self.first = total, first
        self._allowed, self._asked = Semaphore(first), Semaphore(0)

    def __iter__(self):
        for index in range(self.total):
            self._asked.release()
            assert self._allowed.acquire(timeout=ENOUGH)
            yield frame(index)
        self._asked.release()

    def give(self, count: int) -> None:
        """Let so many more come, and return when they have reached the queue: then the next one is asked for."""
        for _ in range(count):
            self._allowed.release()
        for _ in range(count + self.first):
            assert self._asked.acquire(timeout=ENOUGH)
        self.first = 0


def drain(run, results: list) -> None:
    """Collect results up to an exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a thread may read faster than the test
        for result in run:
            results.append(result)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "captum_staa stream"]


@pytest.fixture(autouse=True)
def no_threads_are_left():
    assert not readers()
    yield
    assert not readers()


def test_a_slow_model_skips_windows_and_drops_frames():
    """Five frames arrive during window 0, twenty during window 4, and none after that."""
    gate = Gated(total=29, first=W)
    gate._asked.release()  # the request for frame 0 stands for none that has come
    explain = Fake(during=lambda start: gate.give({0: 5, 4: 20}.get(start, 0)))
    gate._asked.acquire()
    run = StreamRun(explain, W, S, Dropping(gate, maxlen=W + S))
    with pytest.warns(UserWarning, match="arrive faster than they are explained: 1 window from frame 2 on") as said:
        results = list(run)
    assert len(said) == 1
    assert list(explain.starts) == [0, 4, 24, 25]  # the last one ends with the stream
    assert [result.index for result in results] == list(range(29))
    seen = {0: [0, 1, 2, 3], 4: [4, 5, 6, 7], 24: [24, 25, 26, 27], 25: [26, 27, 28]}
    for result in results:
        windows = [start for start, indices in seen.items() if result.index in indices]
        assert result.windows == len(windows) and result.explained == bool(windows)
        assert result.label == ("b" if windows else None)
        assert result.top() == ([("b", 0.75), ("a", 0.25)] if windows else [])
        if windows:
            assert result.temporal == np.mean(windows) and (result.joint == np.mean(windows)).all()
        else:
            assert result.joint is None and np.isnan(result.temporal)
        lost = 9 <= result.index < 23  # six unread frames are kept, of 14 + 6
        assert (result.frame is None) == lost == np.isnan(result.latency)
        assert lost or (result.frame == result.index).all()
    assert results[0].latency_frames == 8 and results[4].latency_frames == 24
    assert (run.stats.frames, run.stats.windows, run.stats.skipped) == (29, 4, 1 + 9)
    assert run.stats.unexplained == sum(not result.explained for result in results) == 16


def test_a_fast_model_drops_no_frames():
    gate = Gated(total=12, first=W)
    explain = Fake(during=lambda start: gate.give(S if start < 8 else 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = list(StreamRun(explain, W, S, Dropping(gate, maxlen=W + S)))
    assert list(explain.starts) == [0, 2, 4, 6, 8]
    expected = list(StreamRun(Fake(), W, S, Waiting(frame(i) for i in range(12))))
    assert [result.temporal for result in results] == [result.temporal for result in expected]


@pytest.mark.parametrize("kind", [Waiting, lambda frames: Dropping(frames, maxlen=100)])
def test_an_exception_of_the_source_is_raised_after_its_frames(kind):
    def unplugged():
        yield from map(frame, range(7))
        raise OSError("unplugged")

    source = kind(unplugged())
    run, results = StreamRun(Fake(), W, S, source), []
    with pytest.raises(OSError, match="unplugged"):
        drain(run, results)
    assert [result.index for result in results] == list(range(7))
    assert run.stats.unexplained == 0 or isinstance(source, Dropping)
    assert next(run, None) is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_keeps_finished_frames(error):
    def during(start):
        if start == 6:
            raise error("now")

    run, results = StreamRun(Fake(during), W, S, Waiting(map(frame, range(100)))), []
    with pytest.raises(error):
        drain(run, results)
    assert len(results) == 6
    results.extend(run.finish())
    assert [result.index for result in results] == list(range(10))
    assert [result.windows for result in results[6:]] == [1, 1, 0, 0]  # of window 4; its other frames had gone out
    assert next(run, None) is None and list(run.finish()) == []


def test_closing_ends_the_thread():
    with StreamRun(Fake(), W, S, Dropping(map(frame, cycle(range(9))), maxlen=6)) as run, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert next(run).index == 0
        assert len(readers()) == 1
    assert not readers()
    assert next(run, None) is None and list(run.finish()) == []


def test_breaking_out_of_the_loop_ends_the_thread():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in StreamRun(Fake(), W, S, Dropping(map(frame, cycle(range(9))), maxlen=6)):
            (thread,) = readers()
            break
    gc.collect()
    thread.join(ENOUGH)
    assert not thread.is_alive()


def test_no_thread_before_the_first_result():
    StreamRun(Fake(), W, S, Dropping(repeat(frame(0)), maxlen=6)).close()


def test_a_blocking_source_is_warned_about(monkeypatch):
    monkeypatch.setattr(sources, "TIMEOUT", 0.05)
    gate = Gated(total=100, first=W)
    run = StreamRun(Fake(), W, S, Dropping(gate, maxlen=6))
    assert next(run).index == 0
    (thread,) = readers()
    with pytest.warns(ResourceWarning, match="still runs. Close the source"):
        run.close()
    gate._allowed.release()
    thread.join(ENOUGH)
    assert not thread.is_alive()


def test_a_camera_may_reuse_its_buffer():
    def camera():
        buffer = frame(0)
        for index in range(9):
            buffer[:] = index
            yield buffer

    for result in StreamRun(Fake(), W, S, Waiting(camera())):
        assert (result.frame == result.index).all()


def test_memory_is_bounded():
    """Held frames and allocated memory of an endless stream, after 1000 and after 4000 frames."""
    run = StreamRun(Fake(), W, S, Waiting(map(frame, islice(cycle(range(256)), 4000))))
    most = (0, 0)
    tracemalloc.start()
    try:
        for result in run:
            most = max(most[0], len(run._held)), max(most[1], len(run._merged))
            if result.index == 1000:
                early = tracemalloc.get_traced_memory()[0]
        late = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert most[0] <= 2 * W and most[1] <= W
    assert late - early < 100 * frame(0).nbytes


def test_memory_is_bounded_with_a_model():
    clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    frames = PlantedClips(seed=1, n=1).frames(0)
    run = STAAStream(clf, 16, 8)(islice(cycle(frames), 160))
    tensors = []
    for result in run:
        assert len(run._explain._prepared) <= 16 and len(run._held) <= 32 and len(run._merged) <= 16
        if result.index in (31, 127):
            tensors.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
    assert tensors[0] == tensors[1]  # that live, window after window


@pytest.mark.slow
def test_resident_memory_does_not_grow():
    """Resident memory over 6400 frames of a loop, after a warm-up."""
    clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    frames = PlantedClips(seed=1, n=1).frames(0)

    def resident() -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096

    sizes = [
        resident() for result in STAAStream(clf, 16, 16)(islice(cycle(frames), 8000)) if result.index % 1600 == 1599
    ]
    assert sizes[-1] - sizes[0] < 8e6
