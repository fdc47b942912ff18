"""The one rule about chance: what is random comes from a generator that is given, or is the same in every call."""

from __future__ import annotations

import torch


def generator_or_seeded(generator: torch.Generator | None) -> torch.Generator:
    """The generator that is given, or a new one seeded with 0, on the CPU; never PyTorch's global one.

    Example:
        >>> first, again = (torch.rand(1, generator=generator_or_seeded(None)) for _ in range(2))
        >>> bool(first == again)
        True

    Raises:
        TypeError: ``generator`` is something else.
    """
    if generator is None:
        return torch.Generator().manual_seed(0)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a torch.Generator, got {generator!r}; torch.Generator().manual_seed(1)")
    return generator
