"""Time and peak memory of a call, relative to one forward pass of the model."""

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
    """Time and memory of one call.

    Attributes:
        seconds: wall-clock time in seconds.
        forwards: the time as a multiple of a forward pass that ran directly before the call.
        memory: peak of the memory allocated during the call, as a multiple of that of a forward pass. Weights and the
            clip itself are not counted. nan if it was not measured.
    """

    seconds: float
    forwards: float
    memory: float


def with_cost(call: Call, classifier: VideoClassifier, clip: Tensor, *, memory: bool) -> tuple[Any, Cost]:
    """Return the result of a call and its cost.

    Example:
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> clip = torch.rand(1, 16, 3, 48, 48)
        >>> def five_forwards():
        ...     with torch.no_grad():
        ...         return [clf(clip.clone()) for _ in range(5)]
        >>> outputs, cost = with_cost(five_forwards, clf, clip, memory=True)
        >>> len(outputs), cost.forwards > 1, cost.memory < 2  # one after the other
        (5, True, True)

    Args:
        call: function without arguments.
        classifier: classifier whose forward pass is the unit.
        clip: input of that forward pass.
        memory: whether to measure memory as well. On a GPU, the allocator counts it at no extra cost. On other devices,
            the call runs a second time while every operator is observed; buffers inside an operator are not counted.

    Returns:
        The result of the call, and a :class:`Cost`.
    """

    copy = clip.clone()  # a model may write into its clip

    def forward() -> Tensor:
        with torch.no_grad():
            return classifier(copy)

    device = clip.device
    if device.type == "cuda":
        _, plain, plain_peak = _on_cuda(forward, device)
        result, seconds, peak = _on_cuda(call, device)
        return result, Cost(seconds, seconds / plain, peak / plain_peak if memory else torch.nan)
    _, plain = _timed(forward)
    result, seconds = _timed(call)
    return result, Cost(seconds, seconds / plain, _peak_of(call) / _peak_of(forward) if memory else torch.nan)


def warm_up(classifier: VideoClassifier, clip: Tensor, target: int) -> None:
    """Run one forward and, if possible, one backward pass, because the first pass is slow and must not be measured."""
    with torch.enable_grad():
        leaf = clip.clone().requires_grad_()
        outputs = classifier(leaf.clone())  # a clone, because a model may write into its clip but not into a leaf
        score = outputs[:, target].sum()
        if score.requires_grad:
            torch.autograd.grad(score, leaf)


class PeakMemory(TorchDispatchMode):
    """Context manager that counts the bytes that operators allocate, and their peak.

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
            self._register(leaf, counts=False)  # memory allocated before the call does not count
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self._register(leaf, counts=True)
        self.peak = max(self.peak, self._live)
        return result

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._known.clear()

    def _register(self, leaf: object, counts: bool) -> None:
        if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
            return
        storage = leaf.untyped_storage()  # views share one storage
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
    result = call()
    return result, time.perf_counter() - start


def _on_cuda(call: Call, device: torch.device) -> tuple[Any, float, int]:
    """Return the result of the call, its seconds, and its peak memory in bytes above the memory in use before."""
    torch.cuda.synchronize(device)  # a call returns before the GPU has finished its work
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    result = call()
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return result, seconds, max(torch.cuda.max_memory_allocated(device) - before, 1)
