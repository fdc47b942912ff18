"""Gradients of the input alone: parameters asked for none meanwhile, so that layers need not keep their inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from torch import Tensor, nn

# Counted per parameter, so that two threads on one model do not restore each other's state.
_frozen: dict[Tensor, int] = {}
_lock = Lock()


@contextmanager
def parameters_frozen(model: nn.Module) -> Iterator[None]:
    """``requires_grad`` of all parameters is False inside the block, and afterwards what it was before."""
    with _lock:
        mine = [p for p in model.parameters() if p.requires_grad or p in _frozen]
        for parameter in mine:
            _frozen[parameter] = _frozen.get(parameter, 0) + 1
            parameter.requires_grad_(False)
    try:
        yield
    finally:
        with _lock:
            for parameter in mine:
                _frozen[parameter] -= 1
                if not _frozen[parameter]:
                    del _frozen[parameter]
                    parameter.requires_grad_(True)
