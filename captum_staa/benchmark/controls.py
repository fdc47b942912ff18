"""Controls of a comparison: maps that show which part of a score comes from the clip, the model and the class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from captum_staa._utils.model_state import uncompiled
from captum_staa.benchmark.method_spec import NotApplicableError
from captum_staa.benchmark.methods import Method, simplified
from captum_staa.benchmark.records import OTHER_CLASS, RANDOM_WEIGHTS
from captum_staa.layout import VideoLayout
from captum_staa.metrics import model_free_controls
from captum_staa.metrics.sanity import redrawn
from captum_staa.models import VideoClassifier


def model_free(inputs: Tensor, layout: VideoLayout) -> Tensor:
    """Return a map that knows the clip and not the model: the difference from the mean frame.

    Of the maps in :func:`captum_staa.metrics.model_free_controls` this one solved the first planted clips best. Of a
    single frame, which has no such difference, it is the absolute input.

    Example:
        >>> clip = torch.zeros(1, 4, 1, 16, 16)
        >>> clip[0, 1, 0, 4:12, 4:12] = 1.0
        >>> model_free(clip, VideoLayout("BTCHW")).shape
        torch.Size([1, 4, 16, 16])

    Args:
        inputs: ``(1, ...)``, a clip in ``layout``.
        layout: order of its axes.

    Returns:
        ``(1, T, H, W)`` float64.

    Raises:
        ValueError: frames are smaller than 2 x 2 pixels.
    """
    maps = model_free_controls(inputs, layout)
    return maps["absolute input" if layout.extent(inputs)[0] == 1 else "difference from mean frame"]


def other_class(logits: Tensor, target: int) -> int | None:
    """Return the class with the highest logit besides the target; None if there is no other class.

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
    """A classifier's parameters, drawn anew, to be used in place of its own for the length of a block.

    The draws are made once, on a copy of the module, as in :func:`captum_staa.metrics.sanity.randomization`: each
    module's own initialization where it has one. In the block the classifier itself holds them, so that methods that
    hold the classifier, such as Captum instances and functions, are run on random weights as well. No other thread may
    use the classifier in the meantime.

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
        classifier: whose parameters are drawn anew; buffers such as running statistics are reset.
        seed: of the draws.

    Raises:
        NotApplicableError: the module has no parameters, or all of them are the same when drawn anew.
    """

    def __init__(self, classifier: VideoClassifier, seed: int) -> None:
        self._module = uncompiled(classifier.module)
        if next(self._module.parameters(), None) is None:
            raise NotApplicableError(f"{type(self._module).__name__} has no parameters that could be drawn at random")
        copy = redrawn(self._module, torch.Generator().manual_seed(seed))
        if all(map(torch.equal, _tensors(self._module), _tensors(copy))):  # each parameter has one value throughout
            raise NotApplicableError(f"the parameters of {type(self._module).__name__} are the same when drawn anew")
        self._drawn = [tensor.detach() for tensor in _tensors(copy)]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In the block, the classifier has the random weights; afterwards, its own."""
        tensors = _tensors(self._module)
        own = [tensor.data for tensor in tensors]
        try:
            for tensor, drawn in zip(tensors, self._drawn, strict=True):
                tensor.data = drawn
            yield
        finally:
            for tensor, values in zip(tensors, own, strict=True):
                tensor.data = values


def model_controls(wanted: bool | Sequence[str], methods: Sequence[Method]) -> dict[str, str]:
    """Return the controls that run a method again, and the method that each of them runs.

    Example:
        >>> from captum_staa.benchmark.methods import made
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> methods = made(["STAA", "Saliency"], clf, perturbations_per_eval=8)
        >>> model_controls(True, methods)
        {'random weights': 'STAA', 'other class': 'STAA'}
        >>> model_controls(["saliency"], methods)
        {'Saliency, random weights': 'Saliency', 'Saliency, other class': 'Saliency'}

    Args:
        wanted: True for the first method that applies, False for none, or names of methods.
        methods: all methods of the comparison. Those that do not apply have no controls.

    Raises:
        ValueError: a name that no method has, or one twice.
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
