"""Whether a model draws random numbers in eval mode, so that its explanations differ from call to call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from captum_staa._utils.networks import networks_of


@contextmanager
def random_draws_reported(forward_func: object, run: Callable[[], Any]) -> Iterator[None]:
    """Warn after the block if the model draws random numbers from torch's global generators in it.

    Methods and metrics use generators of their own, so that only the model, or a function of the caller, changes the
    global ones. The model is run once more to find the module, only if they changed.

    Args:
        forward_func: the model, or a function that uses it.
        run: function that runs the model on the inputs of the block.
    """
    before = _states()
    yield
    if all(map(torch.equal, before, _states())):
        return
    if where := _drawing_module(forward_func, run):
        warnings.warn(
            f"the model must give the same outputs for the same clip. It draws random numbers in eval mode {where}. "
            f"Attributions and scores then differ from call to call. Draw them in train mode only, as F.dropout(x, p, "
            f"training=self.training) does, or average over several calls inside models.model_state('as_is').",
            stacklevel=5,
        )


def _states() -> list[Tensor]:
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *on_gpu]


def _drawing_module(forward_func: object, run: Callable[[], Any]) -> str:
    """Return which module draws random numbers, as a phrase, or an empty string if none does."""
    names: list[str] = []
    handles: list[Any] = []
    draws = _Draws(names)
    for network in networks_of(forward_func):
        for name, module in network.named_modules():
            described = f"in module {name!r} ({type(module).__name__})" if name else f"in {type(module).__name__}"

            def enter(module: nn.Module, args: Any, described: str = described) -> None:
                names.append(described)

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                names.pop()

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with draws:
            run()
    except Exception:  # the model is only run to name a module in a warning
        return ""
    finally:
        for handle in handles:
            handle.remove()
    return draws.found or ""


class _Draws(TorchDispatchMode):
    """Context manager that finds the first operation of this thread that draws from a global generator."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.found is not None or torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        before = _states()
        result = func(*args, **(kwargs or {}))
        if not all(map(torch.equal, before, _states())):
            where = self.names[-1] if self.names else "in the forward function"
            self.found = f"{where}, by torch.{func.overloadpacket.__name__}"
        return result
