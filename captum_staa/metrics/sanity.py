"""Does an attribution depend on what it should: the trained weights, the labels, the class that is asked about?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_staa._utils import notebook
from captum_staa._utils.generators import generator_or_seeded
from captum_staa.layout import VideoLayout
from captum_staa.metrics._shared import metric, midranks, pearson
from captum_staa.result import Array, as_maps


@dataclass(frozen=True)
class Similarity:
    """Spearman's rank correlation of two maps, float64, -1 to 1; nan where one of them has no contrast.

    Attributes:
        signed: ``(..., B)``, of the maps as they are.
        magnitude: the same of their absolute values, as most pictures show them.
    """

    signed: Tensor
    magnitude: Tensor

    def _repr_html_(self) -> str:
        if self.signed.ndim == 1:
            shown = notebook.by_clip({"signed": self.signed.tolist(), "magnitude": self.magnitude.tolist()})
        else:
            names = self._names()
            means = self.signed.nanmean(-1).tolist(), self.magnitude.nanmean(-1).tolist()
            shown = notebook.table((names[0], "signed", "magnitude"), list(zip(names[1:], *means, strict=True)))
        return notebook.block(f"{type(self).__name__}: correlation with the map, {self.signed.shape[-1]} clips", shown)

    def _names(self) -> list[str]:
        return ["map", *map(str, range(len(self.signed)))]


@dataclass(frozen=True)
class Randomization(Similarity):
    """What is left of a map as layers lose what they learned: ``signed`` and ``magnitude`` are ``(L, B)``.

    Attributes:
        layers: L names of modules, in the order in which they were randomized; ``""`` is the model itself.
    """

    layers: tuple[str, ...]

    def _names(self) -> list[str]:
        return ["layer set back", *(name or "the model" for name in self.layers)]


@metric(higher_is_better=None, lowest=-1.0, highest=1.0)
def randomization(
    explain: Callable[[nn.Module, Tensor], Array],
    model: nn.Module,
    clip: Tensor,
    *,
    layout: VideoLayout | str | None = None,
    layers: Sequence[str] | None = None,
    independent: bool = False,
    generator: torch.Generator | None = None,
) -> Randomization:
    """How like the original map is one of a model whose layers are set back, from the output to the input?

    Example:
        >>> import torch
        >>> from captum.attr import Saliency
        >>> model = torch.nn.Sequential(torch.nn.Conv3d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 2 * 6 * 6, 2))
        >>> clip = torch.rand(1, 3, 4, 8, 8).requires_grad_()
        >>> def gradient(model, clip):
        ...     return Saliency(model).attribute(clip, target=0, abs=False)
        >>> result = randomization(gradient, model, clip, layout="BCTHW")
        >>> result.layers, bool((result.signed.abs() < 0.6).all())  # it reads the weights
        (('2', '0'), True)
        >>> randomization(lambda m, x: x.diff(dim=2, append=x[:, :, -1:]), model, clip, layout="BCTHW").signed
        tensor([[1.],
                [1.]], dtype=torch.float64)

    The last is a detector of motion: it may look like an explanation, and says nothing about any model.

    Args:
        explain: ``explain(model, clip)`` gives attributions of the model that it is handed. A method that was bound to
            another model beforehand explains that one, and scores 1 throughout.
        model: is copied, and never explained or altered itself.
        clip: any batch that ``explain`` takes.
        layout: the order of the attributions' axes, such as ``"BTCHW"``; channels are summed. None where ``explain``
            gives maps ``(B, T, H, W)``.
        layers: names as in ``model.named_modules()``, in the order of the cascade; all parameters below a name are one
            layer. None takes every module with parameters of its own, the last registered first, which is from the
            output to the input wherever modules are registered in the order in which they run.
        independent: set back one layer at a time, with all others as trained, rather than also all before it.
        generator: draws the new parameters; None is one seeded with 0, for this call alone.

    Returns:
        :class:`Randomization`. A method that explains the model must fall towards 0; one that stays near 1 shows the
        clip alone. Low is no merit: a random map is at 0. What a method multiplies with the clip stays like the clip,
        so compare with ``explain=lambda model, clip: clip``. nan where either map of a clip has no contrast.

    Raises:
        TypeError: ``model`` is no module, ``clip`` no tensor, ``generator`` no generator, ``layers`` a string.
        ValueError: there is no such layer, one has no parameters, or ``explain`` gives no finite maps of one shape.

    Note:
        A parameter gets what its module's ``reset_parameters`` gives, with normalization layers' running statistics.
        Where there is none, or it leaves the parameter alone, it is drawn from a normal of the parameter's own mean and
        deviation; so one that has a single value throughout stays.

    Reference:
        Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018, section 3: cascading and independent
        randomization.
    """
    _check(explain, model, clip)
    plan = _plan(model, layers)
    generator = generator_or_seeded(generator)
    original = _map(explain, model, clip, layout)
    randomized, maps = deepcopy(model), []
    for _, modules in plan:
        if independent:
            randomized = deepcopy(model)
        for module in modules:
            _set_back(randomized.get_submodule(module), generator)
        maps.append(_map(explain, randomized, clip, layout))
    found = _similarity(original, maps)
    return Randomization(found.signed, found.magnitude, tuple(name for name, _ in plan))


def redrawn(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Return a copy of a model whose parameters are all drawn anew, as in :func:`randomization`.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> bool((redrawn(model, torch.Generator().manual_seed(0)).weight == model.weight).any())
        False

    Args:
        model: is copied, and not altered.
        generator: draws the new parameters.

    Raises:
        ValueError: the model has no parameters.
    """
    copy = deepcopy(model)
    modules = dict(copy.named_modules())  # a traced module has no get_submodule
    for _, names in _plan(copy, None):
        for name in names:
            _set_back(modules[name], generator)
    return copy


@metric(higher_is_better=None, lowest=-1.0, highest=1.0)
def label_randomization(
    explain: Callable[[nn.Module, Tensor], Array],
    model: nn.Module,
    other_model: nn.Module,
    clip: Tensor,
    *,
    layout: VideoLayout | str | None = None,
) -> Similarity:
    """How like are the maps of two models, one trained on the true labels, one on shuffled labels?

    Example:
        >>> import torch
        >>> from captum.attr import Saliency
        >>> def trained(sign):  # in place of a training
        ...     model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 1, bias=False))
        ...     model[1].weight.data = sign * torch.arange(48.0)[None]
        ...     return model
        >>> clip = torch.ones(1, 3, 4, 2, 2).requires_grad_()
        >>> def explain(model, clip):
        ...     return Saliency(model).attribute(clip, abs=False)
        >>> label_randomization(explain, trained(1), trained(-1), clip, layout="BCTHW")
        Similarity(signed=tensor([-1.], dtype=torch.float64), magnitude=tensor([1.], dtype=torch.float64))

    Args:
        explain: ``explain(model, clip)`` gives attributions of the model that it is handed.
        model: trained on the true labels; copied, and never explained itself.
        other_model: of the same kind, trained to fit the same clips with their labels shuffled; copied likewise.
        clip: clips of the training set, where the other model can have learned nothing but by heart.
        layout: the order of the attributions' axes; None where ``explain`` gives maps ``(B, T, H, W)``.

    Returns:
        :class:`Similarity`, ``(B,)`` each. Near 1, the maps do not depend on the labels. nan where either
        map of a clip has no contrast.

    Raises:
        TypeError: a model is no module, ``clip`` no tensor.
        ValueError: both models are one, or ``explain`` gives no finite maps of one shape.

    Reference:
        Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018, section 4: the data randomization test.
    """
    _check(explain, model, clip)
    _check(explain, other_model, clip)
    if model is other_model:
        raise ValueError("model and other_model are one and the same module; pass one trained on shuffled labels")
    found = _similarity(_map(explain, model, clip, layout), [_map(explain, other_model, clip, layout)])
    return Similarity(found.signed[0], found.magnitude[0])


@metric(higher_is_better=None, lowest=-1.0, highest=1.0)
def class_sensitivity(
    explain: Callable[[nn.Module, Tensor, Tensor], Array],
    model: nn.Module,
    clip: Tensor,
    target: int | Sequence[int] | Tensor,
    others: Sequence[int | Sequence[int] | Tensor],
    *,
    layout: VideoLayout | str | None = None,
) -> Similarity:
    """How like is the map for the target to those for other classes?

    Example:
        >>> import torch
        >>> from captum_staa import STAA, VideoClassifier
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> clip = torch.rand(1, 16, 3, 48, 48, generator=torch.Generator().manual_seed(0))
        >>> def attention(model, clip, target):  # explains no class in particular
        ...     return STAA(model, mode="attention").attribute(clip, target)
        >>> class_sensitivity(attention, clf, clip, 0, others=[1], layout="BTCHW").signed
        tensor([[1.]], dtype=torch.float64)

    Args:
        explain: ``explain(model, clip, target)`` gives attributions; ``target`` is int64 ``(B,)``, as Captum takes it.
        model: copied, and never explained itself.
        clip: any batch that ``explain`` takes.
        target: one class for all clips, or one per clip.
        others: the classes to compare it with, each for all clips or one per clip, and none the clip's own target.
        layout: the order of the attributions' axes; None where ``explain`` gives maps ``(B, T, H, W)``.

    Returns:
        :class:`Similarity`, ``(len(others), B)`` each. A method that explains a class must differ from 1; of two
        classes, a signed one may well reach -1, and its magnitude 1, since what speaks for one speaks against the
        other. nan where either map of a clip has no contrast.

    Raises:
        TypeError: ``model`` is no module, ``clip`` no tensor, or a class no whole number.
        ValueError: classes do not fit the batch, one is the target, or ``explain`` gives no finite maps of one shape.
    """
    _check(explain, model, clip)
    wanted = _classes("target", target, clip)
    if not isinstance(others, (list, tuple, Tensor)):
        raise TypeError(f"others is a list of classes to compare the target with, got {others!r}; others=[1, 2]")
    compared = [_classes(f"others[{i}]", other, clip) for i, other in enumerate(others)]
    if not compared:
        raise ValueError("others names the classes to compare the target with, but it is empty; others=[1, 2]")
    for i, other in enumerate(compared):
        if bool((other == wanted).any()):
            raise ValueError(
                f"others[{i}] = {other.tolist()} is a clip's own target of {wanted.tolist()}; leave it out"
            )

    def of(classes: Tensor) -> Tensor:
        return _map(lambda copy, x: explain(copy, x, classes.clone()), model, clip, layout)

    return _similarity(of(wanted), [of(other) for other in compared])


# --- the parts ------------------------------------------------------------------------------------------------------


def _check(explain: object, model: nn.Module, clip: Tensor) -> None:
    if not callable(explain) or isinstance(explain, type):
        raise TypeError(f"explain is a function of a model and a clip, got {explain!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model must be an nn.Module, whose parameters can be copied, got {type(model).__name__}")
    if not isinstance(clip, Tensor):
        raise TypeError(f"clip must be a tensor with a row per example, got {type(clip).__name__}")
    if clip.ndim == 0 or clip.numel() == 0:
        raise ValueError(f"clip must be a batch that is not empty, but its shape is {tuple(clip.shape)}")


def _classes(name: str, value: int | Sequence[int] | Tensor, clip: Tensor) -> Tensor:
    """``(B,)`` int64."""
    try:
        classes = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} is a class index or one per clip, got {value!r}: {error}") from error
    if classes.is_meta or classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise TypeError(f"{name} is a class index or one per clip, got {value!r}")
    if classes.ndim > 1 or (classes.ndim == 1 and len(classes) != len(clip)):
        raise ValueError(
            f"{name} is one class index or one for each of {len(clip)} clips, got shape {tuple(classes.shape)}"
        )
    if bool((classes < 0).any()):
        raise ValueError(f"{name} is a class index or one per clip, none of them negative, got {value!r}")
    return classes.long().to(clip.device).expand(len(clip))


def _plan(model: nn.Module, layers: Sequence[str] | None) -> list[tuple[str, list[str]]]:
    """Each layer's name, and the modules with parameters of their own that it stands for."""
    own = [name for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    if not own:
        raise ValueError(f"{type(model).__name__} has no parameters that could be randomized")
    if layers is None:
        return [(name, [name]) for name in reversed(own)]
    if not isinstance(layers, (list, tuple)) or not layers:
        kind = ValueError if isinstance(layers, (list, tuple)) else TypeError
        raise kind(f"layers is a list of names such as {own[-1:]}, got {layers!r}; leave it out for all")
    plan = [
        (layer, [name for name in own if not layer or name == layer or name.startswith(f"{layer}.")])
        for layer in layers
    ]
    if missing := [layer for layer, modules in plan if not modules]:
        raise ValueError(f"no parameters under the layers {missing}; those with some are, from the output, {own[::-1]}")
    return plan


@torch.no_grad()
def _set_back(module: nn.Module, generator: torch.Generator) -> None:
    """New values for a module's own parameters, not for those of its children."""
    fresh = deepcopy(module).cpu()  # there, the draws are the same for every device, and only the CPU's state moves
    reset = getattr(fresh, "reset_parameters", None)
    if callable(reset):
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            reset()
    for old, new in zip(module.parameters(recurse=False), fresh.parameters(recurse=False), strict=True):
        if torch.equal(old.cpu(), new):
            draws = torch.randn(old.shape, generator=generator, device=generator.device).to(old.device)
            old.copy_(old.float().mean() + old.float().std(correction=0) * draws)
        else:
            old.copy_(new)
    for kept, stored in zip(module.buffers(recurse=False), fresh.buffers(recurse=False), strict=True):
        kept.copy_(stored)


def _map(
    explain: Callable[[nn.Module, Tensor], Array], model: nn.Module, clip: Tensor, layout: VideoLayout | str | None
) -> Tensor:
    """``(B, T, H, W)`` of a copy of the model and of the clip: whatever ``explain`` does to them is lost with them."""
    given = clip.detach().clone().requires_grad_(clip.requires_grad)
    maps = as_maps(explain(deepcopy(model), given), layout)
    if len(maps) != len(clip):
        raise ValueError(f"explain must give a map per clip, got {len(maps)} for a batch of {len(clip)}")
    return maps


def _similarity(original: Tensor, maps: list[Tensor]) -> Similarity:
    """Of ``(B, T, H, W)`` with each of several: ``(len(maps), B)``."""
    if wrong := [tuple(other.shape) for other in maps if other.shape != original.shape]:
        raise ValueError(f"explain gave maps of shape {tuple(original.shape)} first, then of {wrong[0]}")
    return Similarity(
        torch.stack([_spearman(original, other) for other in maps]),
        torch.stack([_spearman(original.abs(), other.abs()) for other in maps]),
    )


def _spearman(first: Tensor, second: Tensor) -> Tensor:
    """``(B,)``: the correlation of ranks; equal values share the mean of theirs."""
    return pearson(midranks(first.flatten(1)), midranks(second.flatten(1)))
