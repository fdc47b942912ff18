"""A simulated device: tensors that report another device, and raise the errors that CUDA tensors raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")  # the only device without hardware that supports gradients
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")


class There(Tensor):
    """Numbers on the CPU that report :data:`DEVICE` as their device."""

    here: Tensor
    is_meta = False  # the tensor contains numbers

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
            requires_grad=here.requires_grad,
        )
        made.here = here.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"There({tuple(self.shape)})"

    def tolist(self) -> Any:
        return self.here.tolist()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return send(torch.tensor(data, **options))


class FromNumbers(TorchFunctionMode):
    """Creates tensors of Python numbers on the device. A dispatch mode cannot see this."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.unravel_index and isinstance(args[0], There):  # creates such tensors internally
            return tuple(send(place) for place in func(args[0].here, *args[1:], **kwargs))
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device) == DEVICE:
            made = func(*args, **{**kwargs, "device": None})
            return made if isinstance(made, There) else send(made)
        return func(*args, **kwargs)


class Elsewhere(TorchDispatchMode):
    """Creates tensors on the device, and records how many numbers were moved from the device to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, self.moved)


def run(func: Any, args: Any, kwargs: dict[str, Any], moved: list[int] | None = None) -> Any:
    """Run an operator on the numbers. The result is on the device of the arguments, or on the requested device."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    there = [value for value in tensors if isinstance(value, There)]
    asked = kwargs.get("device")
    copying = func.name().split(".")[0] in ("aten::_to_copy", "aten::copy_", "aten::copy")
    indexing = func.name().split(".")[0] in INDEXED
    strange = [value for value in tensors if not isinstance(value, There) and value.ndim > 0]
    if there and strange and not copying and not (indexing and isinstance(args[0], There)):
        raise RuntimeError(
            f"{func.name()}: expected all tensors on one device, but found {DEVICE} and cpu, shapes "
            f"{[tuple(value.shape) for value in tensors]}"
        )
    if copying and there and asked is not None and asked.type == "cpu" and moved is not None:
        moved.append(there[0].numel())
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    stays = asked.type == DEVICE.type if asked is not None else bool(there)
    if copying and func.name() != "aten::_to_copy":
        return args[0]  # written in place, on any device
    first = func._schema.arguments[0] if func._schema.arguments else None
    if first is not None and first.alias_info is not None and first.alias_info.is_write:
        return args[0]  # of an in-place operator
    return tree_map(_wrap, result) if stays else result


def _wrap(value: Any) -> Any:
    return There(value) if isinstance(value, Tensor) and not isinstance(value, There) else value


def _unwrap(value: Any) -> Any:
    return value.here if isinstance(value, There) else value


def send(value: Tensor) -> Tensor:
    """Move a tensor to the device."""
    return There(value.detach())


@contextmanager
def elsewhere(*models: nn.Module) -> Iterator[Elsewhere]:
    """Move models to the device, and turn on the modes that simulate it."""
    for model in models:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(send(parameter), requires_grad=parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = send(buffer)
    with Elsewhere() as mode, FromNumbers():
        yield mode
