"""Captum's own test configuration, which is part of its wheel: models, arguments, and their methods."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from captum.attr import Attribution, NoiseTunnel
from captum.testing.attr.helpers.gen_test_utils import get_target_layer, parse_test_config
from captum.testing.attr.helpers.test_config import config
from captum.testing.helpers.basic_models import BasicModel_ConvNet, BasicModel_MultiLayer
from torch import Tensor, nn

from .models import Tensors


class Lifted(nn.Module):
    """A network of rows ``(B, n)`` or images ``(B, C, H, W)`` that takes ``(B, 1, 1, 1, n)`` or ``(B, C, 1, H, W)``."""

    def __init__(self, net: nn.Module, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.net, self.ranks = net, ranks

    def forward(self, *args: Any) -> Tensor:
        clips, rest = args[: len(self.ranks)], args[len(self.ranks) :]
        return self.net(*(lowered(clip, rank) for clip, rank in zip(clips, self.ranks, strict=True)), *rest)


def lifted(value: Any) -> Any:
    """Return a row or an image as a clip of one frame, in BCTHW. Numbers are not changed."""
    if not isinstance(value, Tensor):
        return value
    return value[:, None, None, None] if value.ndim == 2 else value[:, :, None]


def lowered(clip: Tensor, rank: int) -> Tensor:
    """Return a clip of one frame as a row or an image, the inverse of :func:`lifted`."""
    return clip[:, 0, 0, 0] if rank == 2 else clip[:, :, 0]


class Constant(nn.Module):
    """A network as a function of its tensors only, so that it can be traced. Its other arguments are constant."""

    def __init__(self, net: nn.Module, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.net, self.args = net, args

    def forward(self, *tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        return self.net(*(next(rest) if isinstance(arg, Tensor) else arg for arg in self.args))


class Traced(nn.Module):
    """A traced network that takes the arguments of the original network."""

    def __init__(self, net: nn.Module, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.core = torch.jit.trace(Constant(net, args), tuple(arg for arg in args if isinstance(arg, Tensor)))

    def forward(self, *args: Any) -> Tensor:
        return self.core(*(arg for arg in args if isinstance(arg, Tensor)))


@dataclass(frozen=True)
class Donated:
    """One case of Captum's configuration.

    Attributes:
        name: Captum's name of the case.
        net: the model.
        inputs: rows or images, as a tuple.
        keywords: the other arguments of ``attribute``; with ``noise``, those of NoiseTunnel.
        noise: whether the method is wrapped in NoiseTunnel.
        layer: name of the layer, for methods that explain a layer.
    """

    name: str
    net: nn.Module
    inputs: Tensors
    keywords: dict[str, Any]
    noise: bool
    layer: str | None

    @property
    def layer_module(self) -> nn.Module:
        """The layer, in the network or in the lifted network."""
        assert self.layer is not None
        return get_target_layer(getattr(self.net, "net", self.net), self.layer)

    @property
    def extra(self) -> tuple[Any, ...]:
        """``additional_forward_args`` as a tuple."""
        extra = self.keywords.get("additional_forward_args", ())
        return extra if isinstance(extra, tuple) else (extra,)

    @property
    def lifted(self) -> Donated:
        """The same case with clips."""
        ranks = tuple(x.ndim for x in self.inputs)
        keywords = dict(self.keywords)
        if "baselines" in keywords:
            keywords["baselines"] = _each(keywords["baselines"], lifted)
        return replace(
            self, net=Lifted(self.net, ranks), inputs=tuple(lifted(x) for x in self.inputs), keywords=keywords
        )

    @property
    def traced(self) -> Donated:
        """The same case with a traced network."""
        return replace(self, net=Traced(self.net, (*self.inputs, *self.extra)))

    def part(self, i: int) -> Donated:
        """Return one example alone, with its own target, baseline and arguments."""
        batch = len(self.inputs[0])

        def example(value: Any) -> Any:
            batched = isinstance(value, (Tensor, list)) and len(value) == batch
            return value[i : i + 1] if batched else value

        keywords = {
            name: _each(value, example) if name in ("baselines", "additional_forward_args") else example(value)
            for name, value in self.keywords.items()
        }
        return replace(self, inputs=tuple(x[i : i + 1] for x in self.inputs), keywords=keywords)

    def attribute(self, method: Attribution, **changed: Any) -> Tensors:
        """Return the attributions of a method, with NoiseTunnel if the case uses it, seeded."""
        keywords = {**self.keywords, **changed}
        clips = self.inputs[0] if len(self.inputs) == 1 else self.inputs
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = (NoiseTunnel(method) if self.noise else method).attribute(clips, **keywords)
        return found if isinstance(found, tuple) else (found,)


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    return tuple(change(part) for part in value) if isinstance(value, tuple) else change(value)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _own_net(net: nn.Module) -> nn.Module:
    """Return a copy in float64 with different weights for each class. In Captum's networks, all classes are equal."""
    copied = copy.deepcopy(net).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if isinstance(copied, BasicModel_ConvNet):
            copied.fc2.weight.copy_(1e-3 * torch.randn(copied.fc2.weight.shape, generator=generator))
        elif isinstance(copied, BasicModel_MultiLayer):
            copied.linear2.weight.add_(0.5 * torch.randn(copied.linear2.weight.shape, generator=generator))
    return copied


def donated(algorithm: type[Attribution]) -> list[Donated]:
    """Return Captum's cases for one of its algorithms, in float64, because some differences are tiny."""
    found = []
    for entry in config:
        algorithms, net, args, layer, noise, _ = parse_test_config(entry)
        if algorithm in algorithms:
            keywords = {name: _each(value, _double) for name, value in args.items()}
            inputs = keywords.pop("inputs")
            inputs = inputs if isinstance(inputs, tuple) else (inputs,)
            found.append(Donated(entry["name"], _own_net(net), inputs, keywords, noise, layer))
    return found
