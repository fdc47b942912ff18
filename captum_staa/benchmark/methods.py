"""Methods by name, instance or function, in one form: from a clip and its target to a map."""

from __future__ import annotations

import random
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from captum.attr import Attribution
from torch import Tensor, nn

from captum_staa._utils.gaussian import SPREAD, gaussian
from captum_staa.benchmark.builtin_methods import OURS
from captum_staa.benchmark.captum_methods import CAPTUM
from captum_staa.benchmark.method_spec import Call, MethodSpec, NotApplicableError, cell
from captum_staa.models import VideoClassifier
from captum_staa.result import maps_of

METHODS: dict[str, MethodSpec] = {**OURS, **CAPTUM}
Given: TypeAlias = Any  # a name, a Captum Attribution, or a function of a clip and its target


@dataclass(frozen=True)
class Method:
    """A method made for one classifier, or the reason why there is none.

    Attributes:
        name: in tables.
        about: its settings in words.
        call: from a clip ``(1, ...)`` and its target to attributions of its shape or maps; None where it does not
            apply.
        smoothed: whether maps are smoothed, with their signs, as in :class:`MethodSpec`.
        reason: why it does not apply.
    """

    name: str
    about: str
    call: Call | None
    smoothed: bool = False
    reason: str = ""

    def map_of(self, attributions: Tensor, clip: Tensor, classifier: VideoClassifier) -> Tensor:
        """``(1, T, H, W)`` float64 of what the method gave."""
        maps = maps_of(attributions, clip, classifier.layout)
        if not self.smoothed:
            return maps
        t, h, w = (SPREAD * side for side in cell(classifier, clip))
        return gaussian(maps, (t, h, w))


def made(
    methods: Sequence[Given] | Mapping[str, Given] | None, classifier: VideoClassifier, perturbations_per_eval: int
) -> list[Method]:
    """Methods for one classifier, in the order in which they were asked for.

    Example:
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> for method in made(["staa", "guided-backprop"], clf, perturbations_per_eval=8):
        ...     print(method.name, method.reason or "applies")
        STAA applies
        GuidedBackprop VideoMAEForVideoClassification is a transformer: GuidedBackprop changes nn.ReLU modules ...

    Args:
        methods: names among ``METHODS`` (case, spaces and punctuation do not matter), Captum ``Attribution`` instances,
            or functions of a clip and its target that give attributions of its shape or maps ``(1, T, H, W)``; a
            mapping names them. None takes all of ``METHODS``.
        classifier: whom they explain.
        perturbations_per_eval: altered copies of a clip per call of the model.

    Raises:
        ValueError: an unknown name, or two methods of one name.
        TypeError: something else.
    """
    if methods is None:
        methods = list(METHODS)
    asked: Any = methods
    if isinstance(asked, (str, Attribution)) or callable(asked) or not isinstance(asked, Iterable):
        raise TypeError(f"methods come as a list or a mapping from names, got {methods!r}; put it into a list")
    pairs = list(methods.items()) if isinstance(methods, Mapping) else [(None, given) for given in methods]
    if not pairs:
        raise ValueError("there are no methods to compare; leave methods out to take all that apply")
    found = [_made(name, given, classifier, perturbations_per_eval) for name, given in pairs]
    names = [method.name for method in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"methods are told apart by their names, got {twice} twice; pass a mapping from names")
    return found


@contextmanager
def seeded(seed: int, index: int, name: str, device: torch.device) -> Iterator[None]:
    """Every global generator in a state that depends on the seed, the clip and the method alone; afterwards as before.

    Captum draws from them. The state must not depend on what a process has done before: it may have been restarted, and
    another may have had this clip.
    """
    start = zlib.crc32(f"{seed}/{index}/{name}".encode())
    devices = [device] if device.type == "cuda" else []
    arrays, words = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(start)  # torch.manual_seed would reach for every GPU there is
        if devices:
            torch.cuda.default_generators[device.index].manual_seed(start)
        np.random.seed(start)
        random.seed(start)
        try:
            yield
        finally:
            np.random.set_state(arrays)
            random.setstate(words)


def _made(name: str | None, given: Given, classifier: VideoClassifier, perturbations_per_eval: int) -> Method:
    if isinstance(given, str):
        known, recipe = _known(given)
        try:
            call = recipe.make(classifier, perturbations_per_eval)
        except NotApplicableError as error:
            return Method(name or known, recipe.about, None, reason=str(error))
        return Method(name or known, recipe.about, partial(_quietly, call), recipe.smoothed)
    if isinstance(given, Attribution):
        kind = type(given).__name__
        attribute: Any = given.attribute
        layers = {module: layer for layer, module in classifier.module.named_modules() if layer}
        about = f"an instance of {_told(given, layers)}"
        return Method(name or kind, about, lambda clip, target: attribute(clip, target=target))
    if callable(given):
        own = getattr(given, "__name__", type(given).__name__)
        return Method(name or own, f"a function, {own}", given)
    raise TypeError(f"a method is a name, a Captum Attribution, or a function of a clip and its target, got {given!r}")


def _told(value: Any, layers: Mapping[nn.Module, str]) -> str | None:
    """A setting in words that every process would choose; None of what has none, such as a function or a tensor."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, nn.Module):
        return layers.get(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(str(_told(each, layers)) for each in value)}]"
    if isinstance(value, Attribution) or (is_dataclass(value) and not isinstance(value, type)):
        public = {name: _told(each, layers) for name, each in vars(value).items() if not name.startswith("_")}
        settings = ", ".join(f"{name}={said}" for name, said in public.items() if said is not None)
        return f"{type(value).__name__}({settings})"
    return None


def _known(name: str) -> tuple[str, MethodSpec]:
    simple = {simplified(known): known for known in METHODS}
    if simplified(name) not in simple:
        raise ValueError(f"there is no method {name!r}; there are {', '.join(METHODS)}")
    known = simple[simplified(name)]
    return known, METHODS[known]


def simplified(name: str) -> str:
    """Letters and digits alone: ``featureablation-frames`` is ``FeatureAblation(frames)``."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _quietly(call: Call, clip: Tensor, target: int) -> Tensor:
    """Without Captum's remarks on what it does to its copy of the clip and to nn.ReLU: it does so on purpose."""
    with warnings.catch_warnings():
        for remark in (
            "Input Tensor .* did not already require gradients",
            "Setting (forward, )?backward hooks",
        ):
            warnings.filterwarnings("ignore", message=remark)
        return call(clip, target)
