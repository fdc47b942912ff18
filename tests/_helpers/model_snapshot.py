"""The state of a model that a call must not change."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    state = {
        f"value of {name}": value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in model.state_dict().items()  # quantized layers have values that are no tensors
    }
    state |= {f"identity of {name}": id(value) for name, value in (*model.named_parameters(), *model.named_buffers())}
    state |= {f"mode of {name}": module.training for name, module in model.named_modules()}
    state |= {f"gradient of {name}": (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    state |= {f"{h} of {name}": dict(getattr(m, h)) for name, m in model.named_modules() for h in hooks}
    state |= {f"attributes of {name}": sorted(vars(module)) for name, module in model.named_modules()}
    return state | {"random state": torch.random.get_rng_state()}


def same(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what differs."""
    return [name for name, value in before.items() if not _equal(value, after[name])]


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor):
        return isinstance(other, Tensor) and value.dtype == other.dtype and torch.equal(value, other)
    if isinstance(value, tuple) and isinstance(other, tuple) and len(value) == len(other):
        return all(map(_equal, value, other))
    return bool(value == other)
