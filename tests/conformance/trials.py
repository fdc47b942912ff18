"""A trial is one method on one model, with the expected numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from captum.attr import Attribution
from torch import Tensor

from .models import MODELS, Case, Tensors, case

Keywords = dict[str, Any]
Kind = Literal["gradient", "perturbation", "attention", "learning"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Subject:
    """One method in one of its modes.

    Attributes:
        name: name of the method in the ids of the tests.
        method: the class.
        kind: ``"gradient"`` differentiates, ``"perturbation"`` calls the model on changed clips, ``"learning"`` does
            both, ``"attention"`` reads one forward and does not depend on a class.
        counterpart: the class of Captum with the same order of arguments.
        make: function that creates the method for a case.
        oracle: slow reference formula.
        keywords: arguments of ``attribute``, except for the target; small and fast.
        models: names of the models that it can explain.
        needs: what it needs of a model: ``BRANCHED``, an attention branch, or ``ANSWERING``, a language model in place
            of the model. It is the end of the names of such cases.
        exempt: tests that do not apply, and the reason.
        fails: tests that fail, and the reason. They are strict, so an entry must be removed when the test passes.
        inside: whether it reads layers inside the network, which is not possible in a trace.
        warns: pattern of the beginning of a warning that Captum raises in every call.
    """

    name: str
    method: type[Attribution]
    kind: Kind
    counterpart: type[Attribution]
    make: Callable[[Case], Attribution]
    oracle: Callable[..., Tensors]
    keywords: Callable[[Case], Keywords] = lambda case: {}
    models: tuple[str, ...] = MODELS
    needs: str = ""
    exempt: Mapping[str, str] = field(default_factory=dict)
    fails: Mapping[str, str] = field(default_factory=dict)
    inside: bool = False
    warns: str = ""

    def on(self, model: str) -> Trial:
        """Return the trial on a model, given by its name."""
        return Trial(self, case(model + self.needs))

    @property
    def ours(self) -> bool:
        """Whether the method is a class of this library."""
        return self.method.__module__.startswith("captum_staa")


@dataclass(frozen=True)
class Trial:
    """A subject on a case."""

    subject: Subject
    case: Case

    def __str__(self) -> str:
        return f"{self.subject.name}-{self.case.name}"

    def on(self, case: Case) -> Trial:
        """Return the same subject on another case."""
        return replace(self, case=case)

    @property
    def method(self) -> Attribution:
        """A new instance of the method."""
        return self.subject.make(self.case)

    @property
    def keywords(self) -> Keywords:
        """All arguments of ``attribute`` except for the inputs."""
        return {"target": list(self.case.target), **self.subject.keywords(self.case)}

    def attribute(self, inputs: Tensor | Tensors | None = None, **changed: Any) -> Tensor | Tensors:
        """Return the attributions of a new instance for the clips of the case, or for other clips."""
        clips = self.case.clips if inputs is None else inputs
        return self.method.attribute(clips, **{**self.keywords, **changed})

    def expected(self, **changed: Any) -> Tensors:
        """Return the result of the slow formula."""
        return self.subject.oracle(self.case, **{**self.subject.keywords(self.case), **changed})


def as_tuple(attributions: Tensor | Tensors) -> Tensors:
    return attributions if isinstance(attributions, tuple) else (attributions,)


def assert_close(found: Tensor | Tensors, expected: Tensor | Tensors, within: float = 1e-5) -> None:
    """Check that tensors are equal up to a fraction of the largest value, which must not be zero."""
    found, expected = as_tuple(found), as_tuple(expected)
    assert len(found) == len(expected)
    for part, wanted in zip(found, expected, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(part, wanted, rtol=0, atol=within * wanted.abs().max().item())
