"""Controls of a comparison: maps that show how much of a score comes from the clip, the model and the class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from captum_staa._utils.model_state import uncompiled
from captum_staa.benchmark.methods import Method
from captum_staa.benchmark.records import OTHER_CLASS, RANDOM_WEIGHTS
from captum_staa.benchmark.registry import NotApplicableError, simplified
from captum_staa.layout import VideoLayout
from captum_staa.metrics import model_free_controls
from captum_staa.metrics.sanity import redrawn
from captum_staa.models import VideoClassifier


def model_free(inputs: Tensor, layout: VideoLayout) -> Tensor:
    """Return a map that depends on the clip but not on the model: the difference from the mean frame.

    Among the maps of :func:`captum_staa.metrics.model_free_controls`, this one scored best on the first planted clips.
    For a clip of a single frame, which has no such difference, it is the absolute input.

    Example:
        >>> clip = torch.zeros(1, 4, 1, 16, 16)
        >>> clip[0, 1, 0, 4:12, 4:12] = 1.0
        >>> model_free(clip, VideoLayout("BTCHW")).shape
        torch.Size([1, 4, 16, 16])

    Args:
        inputs: ``(1, ...)``, a clip in ``layout``.
        layout: layout of the clip.

    Returns:
        ``(1, T, H, W)`` float64.

    Raises:
        ValueError: frames are smaller than 2 x 2 pixels.
    """
    name = "absolute input" if layout.extent(inputs)[0] == 1 else "difference from mean frame"
    return model_free_controls(inputs, layout, [name])[name]


def other_class(logits: Tensor, target: int) -> int | None:
    """Return the class with the highest logit except the target; None if the model has only one class.

    Example:
        >>> other_class(torch.tensor([0.5, 3.0, 1.0]), target=1)
        2

    Args:
        logits: ``(K,)``.
        target: index of the class to leave out.
    """
    others = [index for index in range(len(logits)) if index != target]
    return max(others, key=logits.tolist().__getitem__, default=None)


class RandomWeights:
    """Random weights for a classifier, which replace its weights inside a ``with`` block.

    The weights are drawn once, on a copy of the module, as in :func:`captum_staa.metrics.sanity.randomization`: a
    module is initialized with its own initialization if it has one. Inside the block, the classifier itself has the
    random weights. So methods that hold the classifier, such as Captum instances and functions, also see them. No other
    thread may use the classifier during the block.

    Example:
        >>> clf = VideoClassifier(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), "BTCHW")
        >>> clip, weights = torch.ones(1, 4, 3, 2, 2), RandomWeights(clf, seed=0)
        >>> before = clf(clip)
        >>> with weights.in_place():
        ...     bool((clf(clip) == before).any())
        False
        >>> bool((clf(clip) == before).all())
        True

    Args:
        classifier: classifier whose parameters are drawn at random; buffers such as running statistics are reset.
        seed: seed of the random weights.

    Raises:
        NotApplicableError: the module has no parameters, or none of them changes when drawn at random.
    """

    def __init__(self, classifier: VideoClassifier, seed: int) -> None:
        self._module = uncompiled(classifier.module)
        if next(self._module.parameters(), None) is None:
            raise NotApplicableError(
                f"random weights need a model with parameters, got {type(self._module).__name__} without parameters"
            )
        copy = redrawn(self._module, torch.Generator().manual_seed(seed))
        if all(map(torch.equal, _tensors(self._module), _tensors(copy))):  # each parameter has one value throughout
            raise NotApplicableError(
                f"random weights need parameters that change when drawn at random, got "
                f"{type(self._module).__name__}, whose parameters stay the same"
            )
        self._drawn = [tensor.detach() for tensor in _tensors(copy)]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the classifier the random weights inside the block, and restore its weights afterwards."""
        tensors = _tensors(self._module)
        original = [tensor.data for tensor in tensors]
        try:
            for tensor, drawn in zip(tensors, self._drawn, strict=True):
                tensor.data = drawn
            yield
        finally:
            for tensor, values in zip(tensors, original, strict=True):
                tensor.data = values


def model_controls(wanted: bool | Sequence[str], methods: Sequence[Method]) -> dict[str, str]:
    """Return the controls that run a method again, each with the name of that method.

    Example:
        >>> from captum_staa.benchmark.methods import made
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> methods = made(["STAA (relevance)", "Saliency"], clf, perturbations_per_eval=8)
        >>> model_controls(True, methods)
        {'random weights': 'STAA (relevance)', 'other class': 'STAA (relevance)'}
        >>> model_controls(["saliency"], methods)
        {'Saliency, random weights': 'Saliency', 'Saliency, other class': 'Saliency'}

    Args:
        wanted: True for the first method that applies, False for none, or names of methods.
        methods: all methods of the comparison. Methods that do not apply have no controls.

    Raises:
        ValueError: a name is not the name of a method, or occurs twice.
        TypeError: ``wanted`` is neither a bool nor a list of names.
    """
    names = [method.name for method in methods]
    applied = [method.name for method in methods if method.call is not None]
    kinds = (RANDOM_WEIGHTS, OTHER_CLASS)
    if isinstance(wanted, bool):
        return dict.fromkeys(kinds, applied[0]) if wanted and applied else {}
    if not isinstance(wanted, (list, tuple)) or not all(isinstance(name, str) for name in wanted):
        raise TypeError(
            f"model_controls must be True, False or a list of method names, got {wanted!r}. Pass ['STAA'], for example."
        )
    simple = {simplified(name): name for name in names}
    found = [name if name in names else simple.get(simplified(name)) for name in wanted]
    if unknown := [name for name, method in zip(wanted, found, strict=True) if method is None]:
        raise ValueError(
            f"model_controls must name methods of the comparison, got {unknown}. They are {', '.join(names)}."
        )
    if len(set(found)) < len(found):
        raise ValueError(f"model_controls must name each method once, got {list(wanted)}. Leave one out.")
    return {f"{name}, {kind}": name for name in found if name in applied for kind in kinds}


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
