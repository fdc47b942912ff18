"""Read attention where it is computed during a forward pass, and restore the model afterwards.

Example:
    >>> import torch
    >>> from captum_staa import VideoClassifier
    >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    >>> layers = clf.family.attention(clf.module)
    >>> with torch.no_grad(), capture(clf.module, layers[-1:], lambda call: call.column_means()) as read:
    ...     logits = clf(torch.zeros(1, 16, 3, 48, 48))
    >>> read[layers[-1]].shape  # one attention weight per token
    torch.Size([1, 288])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from torch import nn

from captum_staa._utils.model_state import without_compiling
from captum_staa.attention.backends import BACKENDS, CallMode
from captum_staa.attention.capture_state import ACTIVE, AttentionCall, CaptureState, StopForward
from captum_staa.models.families import AttentionLayer

__all__ = ["AttentionCall", "capture"]

T = TypeVar("T")


@contextmanager
def capture(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    read: Callable[[AttentionCall], T],
    *,
    stop: bool = False,
) -> Iterator[dict[AttentionLayer, T]]:
    """Context manager that passes the attention of each layer in ``layers`` to ``read`` during the forward pass.

    It is safe to run the same model in other threads at the same time, and to nest captures. The model is restored when
    the block ends, also after an exception.

    Args:
        model: the model that contains the layers. The block must call its forward once, directly or through a wrapper.
        layers: the attention layers to read, in the order in which the model runs them.
        read: function that is called with the :class:`AttentionCall` of each layer. Its return value is kept.
        stop: end the forward as soon as the last layer has been read. The code in the block after the call of the
            model is then skipped.

    Yields:
        A dictionary from each layer to the return value of ``read``. It is complete when the block ends.

    Raises:
        ValueError: ``layers`` is empty, a layer's module does not exist, or the forward computed no attention at a
            layer.
    """
    if not layers:
        raise ValueError("layers must not be empty, got no AttentionLayer. Pass at least one AttentionLayer.")
    state = CaptureState(read, layers[-1] if stop else None)
    with ExitStack() as stack:
        for layer in layers:
            module = _submodule(model, layer.module)
            if module not in state.layers or layer.backend not in [other.backend for other in state.layers[module]]:
                stack.enter_context(BACKENDS[layer.backend](module, layer, state))
            state.layers.setdefault(module, []).append(layer)
        token = ACTIVE.set(state)
        stack.callback(ACTIVE.reset, token)
        if any(layer.backend != "hf" for layer in layers):
            stack.enter_context(CallMode(state))
        stack.enter_context(without_compiling())
        try:
            yield state.readings
        except StopForward as stopped:
            if stopped.state is not state:
                raise
            stopped.__traceback__ = None  # its frames keep the activations of the interrupted forward alive
    missing = [layer for layer in layers if layer not in state.readings]
    if missing:
        raise ValueError(
            _not_read(missing, [state.seen.get(_submodule(model, each.module), set()) for each in missing])
        )


def _not_read(missing: Sequence[AttentionLayer], seen: Sequence[set[str]]) -> str:
    """Return the message about layers whose attention was not read. ``seen`` are the backends that would have."""
    for layer, others in zip(missing, seen, strict=True):
        if others - {layer.backend}:
            other = min(others - {layer.backend})
            return (
                f"the forward must compute attention at every layer, got no attention of backend={layer.backend!r} at "
                f"{layer.module!r}, which computes it in another way. Use AttentionLayer(..., backend={other!r})."
            )
    return (
        f"the forward must compute attention at every layer, got no attention at "
        f"{[layer.module for layer in missing]}. Run the model in this thread. A layer with backend='sdpa' must call "
        f"F.scaled_dot_product_attention, with 'mha' be an nn.MultiheadAttention, with 'softmax' call softmax or be "
        f"the dropout layer behind it, with 'hf' use the AttentionInterface of transformers. "
        f"captum_staa.models.inspect(model, inputs) finds the layers."
    )


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"AttentionLayer must name a module of {type(model).__name__}, got {name!r}. Use a name from "
            f"model.named_modules()."
        ) from None
