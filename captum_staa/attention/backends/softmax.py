"""Backend for models that compute attention probabilities themselves and apply a dropout layer to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from captum_staa.attention.capture_state import AttentionCall, CaptureState
from captum_staa.models.families import AttentionLayer


@contextmanager
def softmax_backend(module: nn.Module, layer: AttentionLayer, state: CaptureState) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if state.active:
            state.take(AttentionCall(layer, None, ready=args[0]))

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
