"""A model as it is lent to an explanation: in eval mode, with frozen parameters, uncompiled; afterwards as before.

Each holds in blocks within each other, and in threads that share a model and overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

# By module, the mode before each block, the blocks in the order in which they were entered. Of two threads on one model
# the first to leave must not set the other's modules training.
_open: list[dict[nn.Module, bool]] = []
_modes_lock = Lock()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module of the model in eval mode inside the block, and afterwards in its own again."""
    with _modes_lock:
        before = {module: module.training for module in model.modules()}
        _open.append(before)
        model.eval()
    try:
        yield
    finally:
        with _modes_lock:
            at = next(index for index, block in enumerate(_open) if block is before)
            _, *later = _open[at:]
            del _open[at]
            for module, training in before.items():
                heir = next((block for block in later if module in block), None)
                if heir is None:
                    module.training = training
                else:
                    heir[module] = training


# Counted per parameter, so that two threads on one model do not restore each other's state.
_frozen: dict[Tensor, int] = {}
_frozen_lock = Lock()


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """``requires_grad`` of all parameters is False inside the block, and afterwards what it was before.

    So a backward pass to the input keeps no layer's own inputs.
    """
    with _frozen_lock:
        mine = [p for p in model.parameters() if p.requires_grad or p in _frozen]
        for parameter in mine:
            _frozen[parameter] = _frozen.get(parameter, 0) + 1
            parameter.requires_grad_(False)
    try:
        yield
    finally:
        with _frozen_lock:
            for parameter in mine:
                _frozen[parameter] -= 1
                if not _frozen[parameter]:
                    del _frozen[parameter]
                    parameter.requires_grad_(True)


_stance: list[Any] = []  # of the compiler, one per capture under way; the first one holds what it was before
_stance_lock = Lock()


@contextmanager
def without_compiling() -> Iterator[None]:
    """Run compiled models eagerly, as compiled graphs skip hooks. The stance is global, so threads share it."""
    with _stance_lock:
        _stance.append(None if _stance else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _stance_lock:
            if len(_stance) > 1:
                _stance.pop()  # not the first: others are still under way
            else:
                _stance.pop().__exit__(None, None, None)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module behind ``torch.compile``, or the module itself."""
    return getattr(model, "_orig_mod", model)
