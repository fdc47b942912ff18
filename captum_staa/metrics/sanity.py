"""Does an attribution depend on the trained weights, on the training labels, and on the target class?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_staa._utils import notebook
from captum_staa._utils.checks import generator_or_seeded
from captum_staa._utils.model_state import class_indices, eval_mode
from captum_staa.layout import VideoLayout
from captum_staa.metrics._shared import metric, midranks, pearson
from captum_staa.result import Array, as_maps, as_tuple

Maps = Array | tuple[Array, ...]


@dataclass(frozen=True)
class Similarity:
    """Spearman's rank correlation of two maps, float64, -1 to 1; nan where one of them is constant.

    Attributes:
        signed: ``(..., B)``, the correlation of the signed maps.
        magnitude: ``(..., B)``, the correlation of their absolute values, which most figures show.
    """

    signed: Tensor
    magnitude: Tensor

    def _repr_html_(self) -> str:
        if self.signed.ndim == 1:
            table = notebook.by_clip({"signed": self.signed.tolist(), "magnitude": self.magnitude.tolist()})
        else:
            names = self._names()
            means = self.signed.nanmean(-1).tolist(), self.magnitude.nanmean(-1).tolist()
            table = notebook.table((names[0], "signed", "magnitude"), list(zip(names[1:], *means, strict=True)))
        return notebook.block(f"{type(self).__name__}: correlation with the map, {self.signed.shape[-1]} clips", table)

    def _names(self) -> list[str]:
        return ["map", *map(str, range(len(self.signed)))]


@dataclass(frozen=True)
class Randomization(Similarity):
    """Similarity after each randomized layer: ``signed`` and ``magnitude`` are ``(L, B)``.

    Attributes:
        layers: L names of modules in the order of randomization; ``""`` is the model itself.
    """

    layers: tuple[str, ...]

    def _names(self) -> list[str]:
        return ["randomized layer", *(name or "the model" for name in self.layers)]


@metric(higher_is_better=None, lowest=-1.0, highest=1.0)
def randomization(
    explain: Callable[[nn.Module, Any], Maps],
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    *,
    layout: VideoLayout | str | None = None,
    layers: Sequence[str] | None = None,
    independent: bool = False,
    generator: torch.Generator | None = None,
) -> Randomization:
    """Return the similarity of the map to those of models with randomized layers, from the output to the input.

    Example:
        >>> import torch
        >>> from captum.attr import Saliency
        >>> model = torch.nn.Sequential(torch.nn.Conv3d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 2 * 6 * 6, 2))
        >>> inputs = torch.rand(1, 3, 4, 8, 8).requires_grad_()
        >>> def gradient(model, inputs):
        ...     return Saliency(model).attribute(inputs, target=0, abs=False)
        >>> result = randomization(gradient, model, inputs, layout="BCTHW")
        >>> result.layers, bool((result.signed.abs() < 0.6).all())  # the gradient depends on the weights
        (('2', '0'), True)
        >>> randomization(lambda m, x: x.diff(dim=2, append=x[:, :, -1:]), model, inputs, layout="BCTHW").signed
        tensor([[1.],
                [1.]], dtype=torch.float64)

    The last call explains with a motion detector. Its map can look like an explanation, but it does not depend on the
    model.

    Args:
        explain: ``explain(model, inputs)`` returns attributions of the model that it is called with. A function that
            ignores this argument and explains another model always scores 1.
        model: model to explain. It is copied, and it is not changed.
        inputs: batch that ``explain`` accepts, a tensor or a tuple of tensors. For a tuple, ``explain`` may return a
            tuple of attributions, whose values are ranked together.
        layout: order of the axes of the attributions, such as ``"BTCHW"``; channels are summed. None if ``explain``
            returns maps ``(B, T, H, W)``.
        layers: names as in ``model.named_modules()``, in the order of randomization. All parameters below a name are
            one layer. None takes all modules that own parameters, the last registered first. This is the order from
            the output to the input if modules are registered in the order in which they run.
        independent: randomize one layer at a time and keep all others as trained. False also keeps all earlier layers
            randomized (cascading).
        generator: draws the new parameters. None uses a new generator with seed 0 in each call.

    Returns:
        :class:`Randomization`. The values of a method that explains the model fall towards 0. Values that stay near 1
        show that the map depends only on the inputs. A low value alone is not a merit: a random map has 0. A method
        that multiplies by the inputs stays similar to them, so compare with ``explain=lambda model, inputs: inputs``.
        nan where one of the two maps is constant.

    Raises:
        TypeError: ``model`` is not a module, ``inputs`` is not a tensor, ``generator`` is not a generator, or
            ``layers`` is a string.
        ValueError: a layer does not exist or has no parameters, or ``explain`` does not return finite maps of one
            shape.

    Note:
        Parameters get new values from ``reset_parameters`` of their module, which also resets the running statistics of
        normalization layers. If a module does not have this method, or the method does not change a parameter, new
        values are drawn from a normal distribution with the mean and the standard deviation of the parameter. A
        parameter with equal values therefore does not change.

    Reference:
        Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018, section 3: cascading and independent
        randomization.
    """
    _check(explain, model, inputs)
    plan = _plan(model, layers)
    generator = generator_or_seeded(generator)
    original = _map(explain, model, inputs, layout)
    randomized, maps = deepcopy(model), []
    for _, modules in plan:
        if independent:
            randomized = deepcopy(model)
        for module in modules:
            _reset(randomized.get_submodule(module), generator)
        maps.append(_map(explain, randomized, inputs, layout))
    similarity = _similarity(original, maps)
    return Randomization(similarity.signed, similarity.magnitude, tuple(name for name, _ in plan))


def redrawn(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Return a copy of a model in which all parameters have new random values, as in :func:`randomization`.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> bool((redrawn(model, torch.Generator().manual_seed(0)).weight == model.weight).any())
        False

    Args:
        model: model to copy. It is not changed.
        generator: draws the new parameters.

    Raises:
        ValueError: the model has no parameters.
    """
    copy = deepcopy(model)
    modules = dict(copy.named_modules())  # a traced module has no get_submodule
    for _, names in _plan(copy, None):
        for name in names:
            _reset(modules[name], generator)
    return copy


@metric(higher_is_better=None, lowest=-1.0, highest=1.0)
def label_randomization(
    explain: Callable[[nn.Module, Any], Maps],
    model: nn.Module,
    other_model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    *,
    layout: VideoLayout | str | None = None,
) -> Similarity:
    """Return the similarity of the maps of two models, one trained on true labels and one on shuffled labels.

    Example:
        >>> import torch
        >>> from captum.attr import Saliency
        >>> def trained(sign):  # replaces training
        ...     model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 1, bias=False))
        ...     model[1].weight.data = sign * torch.arange(48.0)[None]
        ...     return model
        >>> inputs = torch.ones(1, 3, 4, 2, 2).requires_grad_()
        >>> def explain(model, inputs):
        ...     return Saliency(model).attribute(inputs, abs=False)
        >>> label_randomization(explain, trained(1), trained(-1), inputs, layout="BCTHW")
        Similarity(signed=tensor([-1.], dtype=torch.float64), magnitude=tensor([1.], dtype=torch.float64))

    Args:
        explain: ``explain(model, inputs)`` returns attributions of the model that it is called with.
        model: model trained on the true labels. It is copied, and it is not changed.
        other_model: model of the same architecture, trained on the same clips with shuffled labels. It is copied too.
        inputs: clips of the training set. The other model can only have memorized their labels.
        layout: order of the axes of the attributions. None if ``explain`` returns maps ``(B, T, H, W)``.

    Returns:
        :class:`Similarity`, ``(B,)`` each. Values near 1 show that the maps do not depend on the labels. nan where one
        of the two maps is constant.

    Raises:
        TypeError: a model is not a module, or ``inputs`` is not a tensor.
        ValueError: the two models are the same object, or ``explain`` does not return finite maps of one shape.

    Reference:
        Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018, section 4: the data randomization test.
    """
    _check(explain, model, inputs)
    _check(explain, other_model, inputs)
    if model is other_model:
        raise ValueError(
            "model and other_model must be two modules, got the same object twice. Pass a model trained on shuffled "
            "labels."
        )
    similarity = _similarity(_map(explain, model, inputs, layout), [_map(explain, other_model, inputs, layout)])
    return Similarity(similarity.signed[0], similarity.magnitude[0])


@metric(higher_is_better=None, lowest=-1.0, highest=1.0)
def class_sensitivity(
    explain: Callable[[nn.Module, Any, Tensor], Maps],
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    target: int | str | Sequence[int | str] | Tensor,
    others: Sequence[int | str | Sequence[int | str] | Tensor],
    *,
    layout: VideoLayout | str | None = None,
) -> Similarity:
    """Return the similarity of the map for the target to the maps for other classes.

    Example:
        >>> import torch
        >>> from captum_staa import STAA, VideoClassifier
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> inputs = torch.rand(1, 16, 3, 48, 48, generator=torch.Generator().manual_seed(0))
        >>> def attention(model, inputs, target):  # does not depend on the class
        ...     return STAA(model, mode="attention").attribute(inputs, target)
        >>> class_sensitivity(attention, clf, inputs, 0, others=[1], layout="BTCHW").signed
        tensor([[1.]], dtype=torch.float64)

    Args:
        explain: ``explain(model, inputs, target)`` returns attributions. ``target`` is int64 ``(B,)``, as for Captum.
        model: model to explain. It is copied, and it is not changed.
        inputs: batch that ``explain`` accepts.
        target: class index, or label that the model knows, one for all clips or one per clip.
        others: classes to compare with, each one for all clips or one per clip. They must differ from the target.
        layout: order of the axes of the attributions. None if ``explain`` returns maps ``(B, T, H, W)``.

    Returns:
        :class:`Similarity`, ``(len(others), B)`` each. The values of a method that explains a class differ from 1. With
        two classes, signed maps can have -1 and their magnitudes 1, because evidence for one class is evidence against
        the other. nan where one of the two maps is constant.

    Raises:
        TypeError: ``model`` is not a module, ``inputs`` is not a tensor, or a class is not an int.
        ValueError: classes do not fit the batch, one of ``others`` is the target, or ``explain`` does not return finite
            maps of one shape.
    """
    _check(explain, model, inputs)
    targets = _classes("target", class_indices(target, model), inputs)
    if not isinstance(others, (list, tuple, Tensor)):
        raise TypeError(f"others must be a list of classes, got {others!r}. Pass for example others=[1, 2].")
    compared = [_classes(f"others[{i}]", class_indices(other, model), inputs) for i, other in enumerate(others)]
    if not compared:
        raise ValueError("others must have at least one class, got an empty list. Pass for example others=[1, 2].")
    for i, other in enumerate(compared):
        if bool((other == targets).any()):
            raise ValueError(
                f"others[{i}] must differ from the target of each clip, got {other.tolist()} with targets "
                f"{targets.tolist()}. Leave the target out of others."
            )

    def map_for(classes: Tensor) -> list[Tensor]:
        return _map(lambda copy, x: explain(copy, x, classes.clone()), model, inputs, layout)

    return _similarity(map_for(targets), [map_for(other) for other in compared])


# --- helpers --------------------------------------------------------------------------------------------------------


def _check(explain: object, model: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> None:
    if not callable(explain) or isinstance(explain, type):
        raise TypeError(f"explain must be a function of a model and inputs, got {explain!r}.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model must be an nn.Module, because its parameters are copied, got {type(model).__name__}.")
    for values in as_tuple(inputs):
        if values.ndim == 0 or values.numel() == 0:
            raise ValueError(f"inputs must be a batch that is not empty, got shape {tuple(values.shape)}.")


def _classes(name: str, value: int | Sequence[int] | Tensor, inputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Check and return class indices, ``(B,)`` int64."""
    first, *_ = as_tuple(inputs)
    try:
        classes = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a class index or one per clip, got {value!r}: {error}") from error
    if classes.is_meta or classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise TypeError(f"{name} must be a class index or one per clip, got {value!r}.")
    if classes.ndim > 1 or (classes.ndim == 1 and len(classes) != len(first)):
        raise ValueError(
            f"{name} must be one class index, or one for each of {len(first)} clips, got shape {tuple(classes.shape)}."
        )
    if bool((classes < 0).any()):
        raise ValueError(f"{name} must be a class index of at least 0, or one per clip, got {value!r}.")
    return classes.long().to(first.device).expand(len(first))


def _plan(model: nn.Module, layers: Sequence[str] | None) -> list[tuple[str, list[str]]]:
    """Return the name of each layer, with the names of its modules that own parameters."""
    names = [name for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    if not names:
        raise ValueError(f"a model must have parameters to randomize, got {type(model).__name__} without any.")
    if layers is None:
        return [(name, [name]) for name in reversed(names)]
    if not isinstance(layers, (list, tuple)) or not layers:
        kind = ValueError if isinstance(layers, (list, tuple)) else TypeError
        raise kind(f"layers must be a list of names such as {names[-1:]}, got {layers!r}. Leave it out for all layers.")
    plan = [
        (layer, [name for name in names if not layer or name == layer or name.startswith(f"{layer}.")])
        for layer in layers
    ]
    if missing := [layer for layer, modules in plan if not modules]:
        raise ValueError(
            f"layers must be names of modules with parameters, got {missing} without any. Modules with parameters are, "
            f"from output to input, {names[::-1]}."
        )
    return plan


@torch.no_grad()
def _reset(module: nn.Module, generator: torch.Generator) -> None:
    """Assign new random values to the parameters that a module owns, without those of its children."""
    fresh = deepcopy(module).cpu()  # draws on the CPU do not depend on the device of the model
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
    for old_buffer, new_buffer in zip(module.buffers(recurse=False), fresh.buffers(recurse=False), strict=True):
        old_buffer.copy_(new_buffer)


def _map(
    explain: Callable[[nn.Module, Any], Maps],
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    layout: VideoLayout | str | None,
) -> list[Tensor]:
    """Return the maps ``(B, T, H, W)``. ``explain`` gets copies of model and inputs, so it cannot change them."""
    copies = tuple(values.detach().clone().requires_grad_(values.requires_grad) for values in as_tuple(inputs))
    explained = deepcopy(model)
    with eval_mode(explained):
        made = explain(explained, copies if isinstance(inputs, tuple) else copies[0])
    maps = [as_maps(part, layout) for part in (made if isinstance(made, tuple) else (made,))]
    for part in maps:
        if len(part) != len(copies[0]):
            raise ValueError(f"explain must return one map per clip, got {len(part)} for a batch of {len(copies[0])}.")
    return maps


def _similarity(original: list[Tensor], maps: list[list[Tensor]]) -> Similarity:
    """Return the similarity ``(len(maps), B)`` of maps ``(B, T, H, W)``, one per input, to those of other calls."""
    first, *shapes = ([tuple(part.shape) for part in parts] for parts in (original, *maps))
    if wrong := [other for other in shapes if other != first]:
        raise ValueError(
            f"explain must return maps of the same shape in each call, got {', '.join(map(str, first))} first, then "
            f"{', '.join(map(str, wrong[0]))}."
        )
    values, *others = (torch.cat([part.flatten(1) for part in parts], dim=1) for parts in (original, *maps))  # (B, V)
    return Similarity(
        torch.stack([_spearman(values, other) for other in others]),
        torch.stack([_spearman(values.abs(), other.abs()) for other in others]),
    )


def _spearman(first: Tensor, second: Tensor) -> Tensor:
    """Return the correlation of ranks, ``(B,)``; equal values share the mean of their ranks."""
    return pearson(midranks(first), midranks(second))
