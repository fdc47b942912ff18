"""Randomness: numbers come from the generator that the caller passes, or are the same in every call."""

from __future__ import annotations

import torch


def generator_or_seeded(generator: torch.Generator | None) -> torch.Generator:
    """Return ``generator``, or a new CPU generator seeded with 0 if it is None. PyTorch's global generator is not used.

    Example:
        >>> first, again = (torch.rand(1, generator=generator_or_seeded(None)) for _ in range(2))
        >>> bool(first == again)
        True

    Raises:
        TypeError: ``generator`` is neither a ``torch.Generator`` nor None.
    """
    if generator is None:
        return torch.Generator().manual_seed(0)
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {generator!r}. Pass torch.Generator().manual_seed(1)."
        )
    return generator
