"""Methods given by name, instance or function, converted to one form: a function of a clip and its target."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from captum.attr import Attribution
from torch import Tensor, nn

from captum_staa._utils.model_state import eval_mode
from captum_staa._utils.tensors import SPREAD, gaussian
from captum_staa.attr._base import VideoMethod
from captum_staa.benchmark.registry import (
    METHODS,
    Call,
    Explainer,
    MethodSpec,
    NotApplicableError,
    cell,
    find_method,
)
from captum_staa.models import VideoClassifier
from captum_staa.result import VideoAttribution, maps_of

Given: TypeAlias = Any  # a name, a MethodSpec, a Captum Attribution, or a function of a clip and its target


@dataclass(frozen=True)
class Method:
    """A method made for one classifier, or the reason why it does not apply.

    Attributes:
        name: name in tables.
        description: settings of the method.
        call: function of a clip ``(1, ...)`` and its target that returns attributions of the clip's shape, or maps;
            None if the method does not apply.
        smoothed: whether maps are smoothed, with their signs, as in :class:`MethodSpec`.
        reason: why the method does not apply; empty if it applies.
    """

    name: str
    description: str
    call: Call | None
    smoothed: bool = False
    reason: str = ""

    def map_of(self, attributions: Tensor, clip: Tensor, classifier: VideoClassifier) -> Tensor:
        """Return attributions as a map ``(1, T, H, W)`` float64, smoothed if ``smoothed`` is True."""
        maps = maps_of(attributions, clip, classifier.layout)
        if not self.smoothed:
            return maps
        t, h, w = (SPREAD * side for side in cell(classifier, clip))
        return gaussian(maps, (t, h, w))

    def maps(self, clip: Tensor, target: int, classifier: VideoClassifier) -> VideoAttribution:
        """Return the map of a clip in float32, with all else that ``attribute_maps`` of the method returns."""
        assert self.call is not None
        with eval_mode(classifier):
            own = None if self.smoothed or not isinstance(self.call, Explainer) else self.call.maps(clip, target)
            if own is not None:
                return own
            attributions = self.call(clip.clone(), target)
        return VideoAttribution.from_joint(self.map_of(attributions, clip, classifier).float())


def made(
    methods: Sequence[Given] | Mapping[str, Given] | None, classifier: VideoClassifier, perturbations_per_eval: int
) -> list[Method]:
    """Return methods for one classifier, in the order of the argument.

    Example:
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> for method in made(["staa-relevance", "guided-backprop"], clf, perturbations_per_eval=8):
        ...     print(method.name, method.reason or "applies")
        STAA (relevance) applies
        GuidedBackprop VideoMAEForVideoClassification is a transformer: GuidedBackprop changes nn.ReLU modules ...

    Args:
        methods: names among ``METHODS`` (case, spaces and punctuation do not matter), Captum ``Attribution`` instances,
            or functions of a clip and its target that return attributions of its shape or maps ``(1, T, H, W)``. A
            mapping assigns a name to each, and may also hold a :class:`MethodSpec`. None takes all of ``METHODS``.
        classifier: the model to explain.
        perturbations_per_eval: altered copies of a clip per call of the model.

    Raises:
        ValueError: a name is unknown or occurs twice, or there are no methods.
        TypeError: ``methods`` or one of them has the wrong type.
    """
    if methods is None:
        methods = list(METHODS)
    value: Any = methods
    if isinstance(value, (str, Attribution)) or callable(value) or not isinstance(value, Iterable):
        raise TypeError(f"methods must be a list or a mapping from names, got {methods!r}. Put it into a list.")
    pairs = list(methods.items()) if isinstance(methods, Mapping) else [(None, item) for item in methods]
    if not pairs:
        raise ValueError(
            f"methods must hold at least one method, got {methods!r}. Leave methods out to take all that apply."
        )
    result = [_made(name, item, classifier, perturbations_per_eval) for name, item in pairs]
    names = [method.name for method in result]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"names of methods must be unique, got {duplicates} more than once. Pass a mapping from names."
        )
    return result


@contextmanager
def seeded(seed: int, index: int, name: str, device: torch.device) -> Iterator[None]:
    """Seed all global random generators inside the block, and restore them afterwards.

    The state depends on the seed, the clip and the method only, because Captum draws from these generators. It does not
    depend on earlier work of the process: a process may be restarted, or another process may take this clip.
    """
    start = zlib.crc32(f"{seed}/{index}/{name}".encode())
    devices = [device] if device.type == "cuda" else []
    arrays, words = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(start)  # torch.manual_seed would initialize all GPUs
        if devices:
            torch.cuda.default_generators[device.index].manual_seed(start)
        np.random.seed(start)
        random.seed(start)
        try:
            yield
        finally:
            np.random.set_state(arrays)
            random.setstate(words)


def _made(name: str | None, method: Given, classifier: VideoClassifier, perturbations_per_eval: int) -> Method:
    """Return a method given by name, instance or function for one classifier."""
    if isinstance(method, str):
        known, method = find_method(method)
        name = name or known
    if isinstance(method, MethodSpec):
        if name is None:
            raise TypeError(f"a MethodSpec must have a name, got {method!r} in a list. Pass a mapping from names.")
        try:
            call = method.make(classifier, perturbations_per_eval)
        except NotApplicableError as error:
            return Method(name, method.description, None, reason=str(error))
        return Method(name, method.description, call, method.smoothed)
    if isinstance(method, Attribution):
        kind = method.get_name() if isinstance(method, VideoMethod) else type(method).__name__
        attribute: Any = method.attribute
        layers = {module: layer for layer, module in classifier.module.named_modules() if layer}
        description = f"an instance of {_describe(method, layers)}"
        return Method(name or kind, description, lambda clip, target: attribute(clip, target=target))
    if callable(method):
        function_name = getattr(method, "__name__", type(method).__name__)
        return Method(name or function_name, f"a function, {function_name}", method)
    raise TypeError(
        f"a method must be a name, a Captum Attribution, a MethodSpec, or a function of a clip and its target, got "
        f"{method!r}"
    )


def _describe(value: Any, layers: Mapping[nn.Module, str]) -> str | None:
    """Return a setting as text that is the same in every process; None for a function, a tensor and the like."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, nn.Module):
        return layers.get(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(str(_describe(item, layers)) for item in value)}]"
    if isinstance(value, Attribution) or (is_dataclass(value) and not isinstance(value, type)):
        public = {name: _describe(item, layers) for name, item in vars(value).items() if not name.startswith("_")}
        settings = ", ".join(f"{name}={text}" for name, text in public.items() if text is not None)
        return f"{type(value).__name__}({settings})"
    return None
