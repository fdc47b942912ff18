"""What a call costs beside one plain forward of the model: time, and memory at its peak."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from captum_staa.models import VideoClassifier

Call = Callable[[], Any]


class Cost(NamedTuple):
    """What one call took.

    Attributes:
        seconds: of the clock on the wall.
        forwards: these as a multiple of a plain forward that ran right before it, so that both met the same machine.
        memory: the peak of what was allocated during the call, as a multiple of a plain forward's; weights and the
            clip itself are not counted. nan where it was not measured.
    """

    seconds: float
    forwards: float
    memory: float


def with_cost(call: Call, classifier: VideoClassifier, clip: Tensor, *, memory: bool) -> tuple[Any, Cost]:
    """What a call gives, and what it cost.

    Example:
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> clip = torch.rand(1, 16, 3, 48, 48)
        >>> def five_forwards():
        ...     with torch.no_grad():
        ...         return [clf(clip.clone()) for _ in range(5)]
        >>> found, cost = with_cost(five_forwards, clf, clip, memory=True)
        >>> len(found), cost.forwards > 1, cost.memory < 2  # one after the other
        (5, True, True)

    Args:
        call: without arguments.
        classifier: whose plain forward is the unit.
        clip: for that forward.
        memory: whether to measure memory, too. On a GPU its allocator tells, at no price. Elsewhere the call is made a
            second time with every operator watched, and buffers inside of an operator are not seen.
    """

    own = clip.clone()  # a model may write into its clip

    def forward() -> Tensor:
        with torch.no_grad():
            return classifier(own)

    device = clip.device
    if device.type == "cuda":
        _, plain, plain_peak = _on_cuda(forward, device)
        found, seconds, peak = _on_cuda(call, device)
        return found, Cost(seconds, seconds / plain, peak / plain_peak if memory else torch.nan)
    _, plain = _timed(forward)
    found, seconds = _timed(call)
    return found, Cost(seconds, seconds / plain, _peak_of(call) / _peak_of(forward) if memory else torch.nan)


def warm_up(classifier: VideoClassifier, clip: Tensor, target: int) -> None:
    """One forward, and one backward where there is one: the first call of anything is slow, and is nobody's cost."""
    with torch.enable_grad():
        leaf = clip.clone().requires_grad_()
        score = classifier(leaf.clone())[:, target].sum()  # a model may write into its clip, and not into a leaf
        if score.requires_grad:
            torch.autograd.grad(score, leaf)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes that operators allocate while it is entered, and how many lived at once.

    Example:
        >>> with PeakMemory() as memory:
        ...     for _ in range(3):
        ...         ones = torch.ones(1000)  # each is freed once the next is there
        >>> memory.peak
        8000
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            self._meet(leaf, counts=False)  # what was there before the call is nobody's cost
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            self._meet(leaf, counts=True)
        self.peak = max(self.peak, self._live)
        return found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._known.clear()

    def _meet(self, leaf: object, counts: bool) -> None:
        if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
            return
        storage = leaf.untyped_storage()  # views share theirs
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counts else 0
        self._known.add(key)
        self._live += size
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def _peak_of(call: Call) -> int:
    with PeakMemory() as memory:
        call()
    return max(memory.peak, 1)


def _timed(call: Call) -> tuple[Any, float]:
    start = time.perf_counter()
    found = call()
    return found, time.perf_counter() - start


def _on_cuda(call: Call, device: torch.device) -> tuple[Any, float, int]:
    """What the call gives, its seconds, and the bytes that its peak lies above what was there."""
    torch.cuda.synchronize(device)  # a GPU's work is only queued when a call returns
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    found = call()
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return found, seconds, max(torch.cuda.max_memory_allocated(device) - before, 1)
