"""A model in eval mode for a while, whatever each of its modules was in before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from torch import nn

# Counted per module, so that of two threads on one model the first to leave does not set the other's modules training.
_held: dict[nn.Module, tuple[int, bool]] = {}  # how many blocks, and the mode before the first of them
_lock = Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module of the model in eval mode inside the block, and afterwards in its own again."""
    with _lock:
        modules = list(model.modules())
        for module in modules:
            blocks, training = _held.get(module, (0, module.training))
            _held[module] = (blocks + 1, training)
        model.eval()
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                blocks, training = _held.pop(module)
                if blocks > 1:
                    _held[module] = (blocks - 1, training)
                else:
                    module.training = training
