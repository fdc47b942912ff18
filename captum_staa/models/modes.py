"""A model in eval mode for a while, whatever each of its modules was in before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from torch import nn

# By module, the mode before each block, the blocks in the order in which they were entered. Of two threads on one model
# the first to leave must not set the other's modules training.
_open: list[dict[nn.Module, bool]] = []
_lock = Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module of the model in eval mode inside the block, and afterwards in its own again."""
    with _lock:
        before = {module: module.training for module in model.modules()}
        _open.append(before)
        model.eval()
    try:
        yield
    finally:
        with _lock:
            at = next(index for index, block in enumerate(_open) if block is before)
            _, *later = _open[at:]
            del _open[at]
            for module, training in before.items():
                heir = next((block for block in later if module in block), None)
                if heir is None:
                    module.training = training
                else:
                    heir[module] = training
