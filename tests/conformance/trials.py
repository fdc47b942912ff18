"""What a trial is: one method on one model, with the numbers that it should give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from captum.attr import Attribution
from torch import Tensor

from .models import BRANCHED, MODELS, Case, Tensors, case

Keywords = dict[str, Any]
Kind = Literal["gradient", "perturbation", "attention", "learning"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Subject:
    """One method in one of its modes.

    Attributes:
        name: says which, in the ids of the tests.
        method: the class.
        kind: ``"gradient"`` differentiates, ``"perturbation"`` calls the model on altered clips, ``"learning"`` does
            both, ``"attention"`` reads one forward and explains no class in particular.
        counterpart: the class of Captum whose order of arguments it keeps.
        make: the method for a case.
        oracle: its slow formula.
        keywords: of ``attribute``, beside the target; few and quick.
        models: those it explains.
        branched: whether it explains them with an attention branch in them.
        exempt: tests whose line is not meant for it, and why.
        fails: tests whose line it does not keep, and why; strict, so that the entry goes when it is mended.
        inside: whether it watches layers inside the network, which a trace hides.
        warns: the beginning of a warning of Captum's that comes with every call, as a pattern.
    """

    name: str
    method: type[Attribution]
    kind: Kind
    counterpart: type[Attribution]
    make: Callable[[Case], Attribution]
    oracle: Callable[..., Tensors]
    keywords: Callable[[Case], Keywords] = lambda case: {}
    models: tuple[str, ...] = MODELS
    branched: bool = False
    exempt: Mapping[str, str] = field(default_factory=dict)
    fails: Mapping[str, str] = field(default_factory=dict)
    inside: bool = False
    warns: str = ""

    def on(self, model: str) -> Trial:
        """The trial on a model by its name."""
        return Trial(self, case(model + BRANCHED if self.branched else model))

    @property
    def ours(self) -> bool:
        """Whether it is a class of this library."""
        return self.method.__module__.startswith("captum_staa")


@dataclass(frozen=True)
class Trial:
    """A subject on a case."""

    subject: Subject
    case: Case

    def __str__(self) -> str:
        return f"{self.subject.name}-{self.case.name}"

    def on(self, case: Case) -> Trial:
        """The same subject on another case."""
        return replace(self, case=case)

    @property
    def method(self) -> Attribution:
        """A new instance."""
        return self.subject.make(self.case)

    @property
    def keywords(self) -> Keywords:
        """All that ``attribute`` needs beside the inputs."""
        return {"target": list(self.case.target), **self.subject.keywords(self.case)}

    def attribute(self, inputs: Tensor | Tensors | None = None, **changed: Any) -> Tensor | Tensors:
        """What a new instance gives for the case's clips, or for others."""
        clips = self.case.clips if inputs is None else inputs
        return self.method.attribute(clips, **{**self.keywords, **changed})

    def expected(self, **changed: Any) -> Tensors:
        """What the slow formula gives."""
        return self.subject.oracle(self.case, **{**self.subject.keywords(self.case), **changed})


def as_tuple(attributions: Tensor | Tensors) -> Tensors:
    return attributions if isinstance(attributions, tuple) else (attributions,)


def assert_close(found: Tensor | Tensors, expected: Tensor | Tensors, within: float = 1e-5) -> None:
    """Equal up to a share of the largest value, which must not be zero: two empty maps agree about nothing."""
    found, expected = as_tuple(found), as_tuple(expected)
    assert len(found) == len(expected)
    for part, wanted in zip(found, expected, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(part, wanted, rtol=0, atol=within * wanted.abs().max().item())
