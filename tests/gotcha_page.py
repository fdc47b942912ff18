"""docs/gotchas.md as data: both sides of every entry, to be run as they stand, and slow formulas to hold them to."""

from __future__ import annotations

import builtins
import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

PAGE = (Path(__file__).parents[1] / "docs" / "gotchas.md").read_text("utf-8")
SECTIONS = {text.split("\n", 1)[0]: text for text in PAGE.split("\n### ")[1:]}
MENDED = "Captum has mended this: remove the gotcha"


@contextmanager
def seeded() -> Iterator[None]:
    """PyTorch's global generator from a known state, which is put back."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def run(code: str, names: dict[str, object]) -> SimpleNamespace:
    """The names that a block leaves."""
    with seeded():
        exec(compile(code, "gotchas.md", "exec"), names)
    return SimpleNamespace(**names)


@functools.cache
def setup() -> SimpleNamespace:
    """What all entries begin with."""
    return run(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0], {"__name__": "gotchas"})


def fresh() -> dict[str, object]:
    """The same with tensors of its own: a Captum call that fails leaves its input changed."""
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in vars(setup()).items()
    }


def page() -> SimpleNamespace:
    """The same for formulas: the label as a number."""
    return SimpleNamespace(**{**fresh(), "label": int(setup().label)})


class Gotcha:
    """One entry of the page; its sides run after the page's setup, some names of which may be replaced."""

    def __init__(self, heading: str) -> None:
        self.text = SECTIONS[heading]
        self.sides = re.findall(r"```py\n(.*?)```", self.text, re.DOTALL)

    def wrong(self, **replaced: object) -> SimpleNamespace:
        return run(self.sides[0], {**fresh(), **replaced})

    def right(self, *edit: str, **replaced: object) -> SimpleNamespace:
        """The right side, as it stands or with one text in place of another."""
        code = self.sides[1]
        if edit:
            assert edit[0] in code
            code = code.replace(*edit)
        return run(code, {**fresh(), **replaced})

    @contextmanager
    def still_fails(self, symptom: int = 0) -> Iterator[None]:
        """What runs inside raises the error that the entry quotes as ``KindOfError: message``."""
        prose = " ".join(self.text.split("Wrong:")[0].split())
        kind, message = re.findall(r"`(\w+Error|UserWarning): (.+?)`", prose)[symptom]
        try:
            yield
        except getattr(builtins, kind) as caught:
            if message not in str(caught):
                pytest.fail(f"the page quotes {message!r}, but Captum now says {str(caught)!r}")
        else:
            pytest.fail(MENDED)


def entry(heading: str) -> pytest.MarkDecorator:
    """The test of an entry gets it as ``gotcha``."""
    return pytest.mark.parametrize("gotcha", [Gotcha(heading)], ids=[heading.split()[0]])


def gradient(f: Callable[[Tensor], Tensor], clip: Tensor, target: int) -> Tensor:
    leaf = clip.detach().clone().requires_grad_()
    return torch.autograd.grad(f(leaf)[:, target].sum(), leaf)[0]


@torch.no_grad()
def falls(f: Callable[..., Tensor], target: int, *pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Feature ablation of inputs and their masks: every id's region is zeroed once, in all inputs that have it."""
    inputs, masks = zip(*pairs, strict=True)
    found = [torch.zeros_like(clip) for clip in inputs]
    for number in torch.cat([mask.flatten() for mask in masks]).unique():
        without = [clip * (mask != number) for clip, mask in pairs]
        fall = (f(*inputs) - f(*without))[:, target]
        for part, mask in zip(found, masks, strict=True):
            part += fall.view(-1, 1, 1, 1, 1) * (mask == number)
    return found


def close(found: Tensor, expected: Tensor, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """Equal numbers, in a tensor that Captum's own tools can go on with."""
    assert found.is_contiguous()
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def apart(found: Tensor, expected: Tensor) -> bool:
    """More than a tenth of the largest number away."""
    return bool((found - expected).abs().max() > 0.1 * expected.abs().max())


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, clip: Tensor) -> Tensor:
        return self.function(clip)


class Fresh(TorchDispatchMode):
    """Counts the numbers in all tensors that are made anew, views and changes in place left out."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            given = {part.untyped_storage().data_ptr() for part in args if isinstance(part, Tensor)}
            self.numbers += result.numel() * (result.untyped_storage().data_ptr() not in given)
        return result
