"""Find the logits in the output of a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def logits_of(output: Any) -> Tensor:
    """Return the logits of a module's output: a tensor, an output with ``.logits``, a mapping or a tuple.

    Example:
        >>> import torch
        >>> logits_of({"loss": 0.0, "logits": torch.tensor([[1.0, 2.0]])})
        tensor([[1., 2.]])

    Args:
        output: the output of a forward pass on B clips.

    Returns:
        ``(B, K)``.

    Raises:
        TypeError: the output contains no logits.
        ValueError: the logits are not ``(B, K)``.
    """
    kind = type(output).__name__
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif isinstance(getattr(output, "logits", None), Tensor):
        output = output.logits
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the module must return logits, got {kind}. Return a tensor (B, K), a tuple that begins with it, or an "
            f"output with .logits."
        )
    if output.ndim > 2 and output[0].numel() == max(output.shape[1:]):
        output = output.flatten(1)  # (B, 1, K) from VideoPrism's pooling query, (B, K, 1, 1, 1) from a 3D CNN's pool
    if output.ndim != 2:
        raise ValueError(
            f"the module must return logits (B, K), got logits of shape {tuple(output.shape)}. "
            f"Flatten or pool the other axes in the forward of the module."
        )
    return output
