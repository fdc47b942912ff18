"""The entries of docs/gotchas.md as data: the wrong and the right code of every entry, and slow reference formulas."""

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

PAGE = (Path(__file__).parents[2] / "docs" / "gotchas.md").read_text("utf-8")
SECTIONS = {text.split("\n", 1)[0]: text for text in PAGE.split("\n### ")[1:]}
FIXED = "Captum has fixed this. Remove the gotcha."


@contextmanager
def seeded() -> Iterator[None]:
    """Seed PyTorch's global generator, and restore its state afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def run(code: str, names: dict[str, object]) -> SimpleNamespace:
    """Run a code block and return its names."""
    with seeded():
        exec(compile(code, "gotchas.md", "exec"), names)
    return SimpleNamespace(**names)


@functools.cache
def setup() -> SimpleNamespace:
    """Return the names of the setup block of the page."""
    return run(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0], {"__name__": "gotchas"})


def fresh() -> dict[str, object]:
    """Return the setup with copied tensors, because a failed Captum call changes its input."""
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in vars(setup()).items()
    }


def page() -> SimpleNamespace:
    """Return the setup for formulas, with the label as a number."""
    return SimpleNamespace(**{**fresh(), "label": int(setup().label)})


class Gotcha:
    """One entry of the page. Its code blocks run after the setup, whose names can be replaced."""

    def __init__(self, heading: str) -> None:
        self.text = SECTIONS[heading]
        self.sides = re.findall(r"```py\n(.*?)```", self.text, re.DOTALL)

    def wrong(self, **replaced: object) -> SimpleNamespace:
        return run(self.sides[0], {**fresh(), **replaced})

    def right(self, *edit: str, **replaced: object) -> SimpleNamespace:
        """Run the right code, optionally with one text replaced by another."""
        code = self.sides[1]
        if edit:
            assert edit[0] in code
            code = code.replace(*edit)
        return run(code, {**fresh(), **replaced})

    @contextmanager
    def still_fails(self, symptom: int = 0) -> Iterator[None]:
        """Check that the code in this context raises the error that the entry quotes as ``KindOfError: message``."""
        prose = " ".join(self.text.split("Wrong:")[0].split())
        kind, message = re.findall(r"`(\w+Error|UserWarning): (.+?)`", prose)[symptom]
        try:
            yield
        except getattr(builtins, kind) as caught:
            if message not in str(caught):
                pytest.fail(f"the page quotes {message!r}, but Captum now says {str(caught)!r}")
        else:
            pytest.fail(FIXED)


def entry(heading: str) -> pytest.MarkDecorator:
    """Pass the entry to its test as ``gotcha``."""
    return pytest.mark.parametrize("gotcha", [Gotcha(heading)], ids=[heading.split()[0]])


def gradient(f: Callable[[Tensor], Tensor], clip: Tensor, target: int) -> Tensor:
    leaf = clip.detach().clone().requires_grad_()
    return torch.autograd.grad(f(leaf)[:, target].sum(), leaf)[0]


@torch.no_grad()
def falls(f: Callable[..., Tensor], target: int, *pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Feature ablation of inputs and their masks: each region is zeroed once, in all inputs that contain it."""
    inputs, masks = zip(*pairs, strict=True)
    found = [torch.zeros_like(clip) for clip in inputs]
    for number in torch.cat([mask.flatten() for mask in masks]).unique():
        without = [clip * (mask != number) for clip, mask in pairs]
        fall = (f(*inputs) - f(*without))[:, target]
        for part, mask in zip(found, masks, strict=True):
            part += fall.view(-1, 1, 1, 1, 1) * (mask == number)
    return found


def close(found: Tensor, expected: Tensor, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """Check that the numbers are equal, and that Captum's tools accept the tensor."""
    assert found.is_contiguous()
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def apart(found: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors differ by more than a tenth of the largest number."""
    return bool((found - expected).abs().max() > 0.1 * expected.abs().max())


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, clip: Tensor) -> Tensor:
        return self.function(clip)


class Fresh(TorchDispatchMode):
    """Counts the numbers in all new tensors, without views and in-place changes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            known = {part.untyped_storage().data_ptr() for part in args if isinstance(part, Tensor)}
            self.numbers += result.numel() * (result.untyped_storage().data_ptr() not in known)
        return result
