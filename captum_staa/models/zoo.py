"""Small trained models that come with the package, read offline; ``benchmarks/train_zoo.py`` trained them."""

from __future__ import annotations

from pathlib import Path

_WEIGHTS = Path(__file__).parent / "weights"


def names() -> list[str]:
    """Names that ``VideoClassifier.from_pretrained`` finds without a network.

    Example:
        >>> names()[0], len(names())
        ('tiny-resnet3d-motion', 21)
    """
    return sorted(path.parent.name for path in _WEIGHTS.glob("*/config.json"))


def folder(name: str) -> Path | None:
    """The folder of a shipped model, or None where there is none of that name.

    Example:
        >>> folder("tiny-videomae-pattern").name
        'tiny-videomae-pattern'
        >>> folder("no-such-model") is None
        True
    """
    return _WEIGHTS / name if name in names() else None
