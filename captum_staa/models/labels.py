"""Class names: reading them from a config, and finding the index of a name."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Mapping, Sequence
from typing import SupportsIndex

from torch import nn


def labels_of(module: nn.Module) -> list[str] | None:
    """Return the class names in a Hugging Face model's config, in the order of its logits, or None for other modules.

    Example:
        >>> labels_of(nn.Linear(2, 2)) is None
        True
    """
    return in_order(getattr(getattr(module, "config", None), "id2label", None))


def in_order(id2label: object) -> list[str] | None:
    """Return the names of ``{0: name, "1": name}`` ordered by index. A missing name is replaced by its index.

    The keys may be integers, or strings as in JSON.

    Example:
        >>> in_order({"3": "c", "1": "b", 0: "a"})
        ['a', 'b', '2', 'c']
    """
    if not isinstance(id2label, Mapping) or not id2label:
        return None
    if bad := [key for key in id2label if not str(key).isdecimal()]:
        raise ValueError(f"id2label must map class indices to names, got the keys {bad[:3]}. Fix config.json.")
    names = {int(key): str(name) for key, name in id2label.items()}
    return [names.get(index, str(index)) for index in range(max(names) + 1)]


def index_of(target: str | SupportsIndex, labels: Sequence[str], count: int | None = None) -> int:
    """Return the class index of a label, or check a class index.

    Example:
        >>> index_of("High Jump", ["running", "high jump"]), index_of(0, ["running", "high jump"])
        (1, 0)

    Args:
        target: a label (upper and lower case are equal), or an index 0..K-1.
        labels: the K class names, or an empty sequence.
        count: K, if it is known.

    Raises:
        ValueError: the label does not exist or belongs to several classes, or the index is out of range.
        TypeError: ``target`` is neither a string nor an integer.
    """
    if isinstance(target, str):
        folded = [name.casefold().strip() for name in labels]
        wanted = target.casefold().strip()
        hits = [i for i, name in enumerate(labels) if name == target]
        hits = hits or [i for i, name in enumerate(folded) if name == wanted]
        if len(hits) == 1:
            return hits[0]
        if hits:
            raise ValueError(f"label {target!r} belongs to several classes: {hits}. Pass one of these indices.")
        if not wanted.isdecimal():
            raise ValueError(_unknown(target, wanted, labels, folded))
        target = int(wanted)
    if isinstance(target, bool):
        raise TypeError(f"target must be a label or a class index, got {target!r}")
    try:
        index = operator.index(target)
    except TypeError as error:
        raise TypeError(f"target must be a label or a class index, got {target!r}") from error
    if index < 0 or (count is not None and index >= count):
        raise ValueError(f"class index must be from 0 to {'K-1' if count is None else count - 1}, got {index}")
    return index


def _unknown(label: str, wanted: str, labels: Sequence[str], folded: list[str]) -> str:
    if not labels:
        return (
            f"target must be a class index because the classifier has no labels, got {label!r}. Pass an index, or pass "
            f"labels=[...] to VideoClassifier."
        )
    near = [labels[folded.index(name)] for name in difflib.get_close_matches(wanted, folded, n=5, cutoff=0.5)]
    near = near or [name for name in labels if wanted in name.casefold()][:5]
    if near:
        known = f"Similar labels: {near}"
    elif len(labels) <= 5:
        known = f"The labels are {list(labels)}"
    else:
        known = f"The first of the {len(labels)} labels are {list(labels[:5])}"
    return f"there is no label {label!r}. {known}"
