"""Context managers that change the state of a model (eval mode, frozen parameters, no compiling) and restore it.

All of them can be nested, and can be used by several threads that share a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

# For each open block, the mode of every module before the block, in the order in which the blocks were entered. If two
# threads share a model, the first thread that leaves its block must not set the other thread's modules to training.
_open: list[dict[nn.Module, bool]] = []
_modes_lock = Lock()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set every module of the model to eval mode inside the block, and restore each module's mode afterwards."""
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
                still_open = next((block for block in later if module in block), None)
                if still_open is None:
                    module.training = training
                else:  # the last block to leave restores the mode
                    still_open[module] = training


# Number of open blocks per parameter, so that two threads with one model do not restore each other's state.
_frozen: dict[Tensor, int] = {}
_frozen_lock = Lock()


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Set ``requires_grad`` of all parameters to False inside the block, and restore it afterwards.

    A backward pass to the input then does not need to keep the inputs of each layer, which saves memory.
    """
    with _frozen_lock:
        frozen_here = [p for p in model.parameters() if p.requires_grad or p in _frozen]
        for parameter in frozen_here:
            _frozen[parameter] = _frozen.get(parameter, 0) + 1
            parameter.requires_grad_(False)
    try:
        yield
    finally:
        with _frozen_lock:
            for parameter in frozen_here:
                _frozen[parameter] -= 1
                if not _frozen[parameter]:
                    del _frozen[parameter]
                    parameter.requires_grad_(True)


_stance: list[Any] = []  # the compiler's stance, one item per open block. The first item restores the original stance
_stance_lock = Lock()


@contextmanager
def without_compiling() -> Iterator[None]:
    """Run compiled models eagerly inside the block, because compiled graphs skip hooks.

    The compiler's stance is global, so all threads share it.
    """
    with _stance_lock:
        _stance.append(None if _stance else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _stance_lock:
            if len(_stance) > 1:
                _stance.pop()  # other blocks are still open
            else:
                _stance.pop().__exit__(None, None, None)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module inside a ``torch.compile`` wrapper, or ``model`` itself if it is not compiled."""
    return getattr(model, "_orig_mod", model)
