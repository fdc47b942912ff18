"""Contributions and the shares of constants sum to the score, and a message names the module in which they do not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from covering import in_one_case
from frozen_models import MIXED, clips, contrast, vit
from tiny_models import randomize, snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captum_staa.attention.completeness import dot_log
from captum_staa.attention.decomposition import decompose


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


C, MASK = numbers(3, 4, seed=1), numbers(3, 4, seed=2) > 0
IN_PLACE = numbers(2, 5, 4, seed=3)


def changed(x: Tensor, change: Callable[[Tensor], object]) -> Tensor:
    """Return a copy of a tensor after an operation in place."""
    x = x * 1
    change(x)
    return x


def written(x: Tensor) -> Tensor:
    """Write into a constant, as models with a preallocated result do."""
    result = IN_PLACE.clone()
    result[:, 1:4] = x
    return result


CONSTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "x + c": lambda x: x + C,
    "c + x": lambda x: C + x,
    "alpha": lambda x: torch.add(x, C, alpha=3),
    "c - x": lambda x: C - x,
    "1 - x": lambda x: 1 - x,
    "rsub": lambda x: torch.rsub(x, 2.5),
    "x - 1": lambda x: x - 1,
    "add_": lambda x: changed(x, lambda y: y.add_(C)),
    "+= of a view": lambda x: changed(x, lambda y: y[:, 1].add_(C[1])),
    "+= of a slice": lambda x: changed(x, lambda y: y[:, 1:].mT.sub_(2)),
    "c += x": lambda x: C.expand(2, -1, -1).clone().add_(x),
    "x[i] = c": lambda x: changed(x, lambda y: y.__setitem__((slice(None), 1), C[1])),
    "x[i] = number": lambda x: changed(x, lambda y: y.__setitem__((slice(None), 1), 2.0)),
    "c[i] = x": written,
    "cat": lambda x: torch.cat([C.expand(2, -1, -1), x, x], 1),
    "stack": lambda x: torch.stack([x, C.expand(2, -1, -1)], 1),
    "where": lambda x: torch.where(MASK, x, C),
    "where with a number": lambda x: x.where(MASK, -1.5),
    "masked_fill": lambda x: x.masked_fill(MASK, 3.0),
    "masked_scatter": lambda x: C.expand(2, -1, -1).masked_scatter(MASK, x),
    "index_copy": lambda x: x.index_copy(1, torch.tensor([2]), C[None, :1].expand(2, -1, -1)),
    "index_put": lambda x: torch.index_put(x, (torch.tensor([0]), torch.tensor([2])), C[:1]),
    "scatter": lambda x: x.scatter(2, torch.zeros(2, 3, 1, dtype=torch.long), C[None, :, :1].expand(2, -1, -1)),
    "pad": lambda x: F.pad(x, (1, 2), value=0.7),
    "lerp": lambda x: torch.lerp(x, C, 0.3),
    "addcmul": lambda x: torch.addcmul(C, x, C, value=2),
    "addmm": lambda x: torch.stack([torch.addmm(C[:, :3], part, C.mT, beta=2) for part in x]),
    "baddbmm": lambda x: torch.baddbmm(C[:, :3], x, x.new_ones(2, 4, 3)),
    "linear": lambda x: F.linear(x, C, C[:, 0]),
    "linear with a keyword": lambda x: F.linear(x, C, bias=C[:, 1]),
    "conv1d": lambda x: F.conv1d(x, numbers(5, 3, 2), numbers(5), padding=1),
    "conv2d": lambda x: F.conv2d(x[:, :, None], numbers(5, 3, 1, 2), numbers(5)),
    "conv2d without a batch": lambda x: torch.stack([F.conv2d(y[:, None], numbers(5, 3, 1, 2), numbers(5)) for y in x]),
    "conv_transpose1d": lambda x: F.conv_transpose1d(x, numbers(3, 5, 2), numbers(5), stride=2),
    "batch norm": lambda x: F.batch_norm(
        x, numbers(3), numbers(3, seed=5).exp(), numbers(3, seed=6), numbers(3, seed=7)
    ),
    "instance norm": lambda x: F.instance_norm(x, None, None, numbers(3), numbers(3, seed=1), eps=1e9),
    "clamp": lambda x: x.clamp(0.5, 2),
    "threshold": lambda x: F.threshold(x, 0.3, 5.0),
    "sigmoid": lambda x: 2 * x.sigmoid(),
    "softplus": lambda x: F.softplus(x),
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (2, 2))) + (1 + 2j) * C[:, :2]),
}


@in_one_case()
@pytest.mark.parametrize("name", CONSTANTS)
def test_shares_of_constants_are_complete(name):
    """The remainder is 0, so the share of the constants, which is what no contribution explains, is found."""
    weights: list[Tensor] = []

    def score(outputs: Tensor) -> Tensor:
        if not weights:
            weights.append(numbers(*outputs.shape, seed=9))
        return (outputs * weights[0]).flatten(1).sum(1)

    result = decompose(lambda x: CONSTANTS[name](x), numbers(2, 3, 4, seed=8), score)
    assert abs(float(result.remainder)) < 1e-12
    assert result.constants.abs().max() > 1e-2  # a check of nothing otherwise


class Part(nn.Module):
    """A module with a bias and a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(16, 16), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


class Cubed(torch.autograd.Function):
    """An operation that no function mode sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3 * ctx.saved_tensors[0] ** 2


class Doubled(Cubed):
    """An operation that no function mode sees, but which is linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x.abs()
    return x + y


def drawn(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a random module in float64, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(make(), 0).double()


CODES, EYE = numbers(4, 16, seed=1), torch.eye(16, dtype=torch.float64)
LOST: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a custom operation": (lambda x: x + Cubed.apply(x), "uses CubedBackward, which has no rule"),
    "logsumexp": (lambda x: x + x.logsumexp(-1, keepdim=True), "uses LogsumexpBackward0, which has no rule"),
    "detached": (lambda x: x + x.cos().detach(), "no gradient after 'detach'"),
    "data": (lambda x: x + x.square().data, "no gradient after '__get__'"),
    "no_grad": (no_grad, "no gradient after 'abs'"),
    "a softmax that is added": (lambda x: x + 9 * x.softmax(-1), "softmax"),
    "an exponential": (lambda x: x + x.exp(), "no gradient after 'exp'"),
    "straight-through rounding": (lambda x: x + (x.round() - x).detach(), "no gradient after 'detach'"),
    "a bias made of the input": (
        lambda x: F.linear(x, EYE, x.cos().mean((0, 1)).detach()),
        "no gradient after 'detach'",
    ),
    "a summand made of the input": (
        lambda x: torch.baddbmm(x.cos().detach(), x, EYE.expand(len(x), -1, -1)),
        "'detach'",
    ),
    "codes": (lambda x: x / 9 + CODES[(x @ CODES.mT).argmax(-1)], "no gradient after 'argmax'"),
}


@in_one_case()
@pytest.mark.parametrize("pattern_weight", [0.0, 0.3])
@pytest.mark.parametrize("spelling", MIXED)
def test_patterns_whose_heads_are_mixed_are_complete(spelling, pattern_weight):
    model = vit(spelling)
    result = decompose(model, clips(), contrast, tokens=model.embed, pattern_weight=pattern_weight)
    assert result.nonlinear == () and abs(float(result.remainder)) < 1e-9


@in_one_case()
@pytest.mark.parametrize("pattern_weight", [0.0, 0.5])
@pytest.mark.parametrize("name", LOST)
def test_what_is_lost_is_reported_with_its_module(name, pattern_weight):
    """A module inside a block loses a part. The others do not, and their biases are not blamed."""
    model = vit()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.blocks[1]["mlp"].up = nn.Sequential(model.blocks[1]["mlp"].up, nn.Linear(32, 16), Part(LOST[name][0]))
        model.blocks[1]["mlp"].down = nn.Linear(16, 16)
        model = randomize(model, 3).double()
    before = snapshot(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            decompose(model, clips(), contrast, tokens=model.embed, pattern_weight=pattern_weight)
        except ValueError as error:
            caught.append(error)
    (message,) = [str(getattr(item, "message", item)) for item in caught]
    assert "in module 'blocks.1.mlp.up.2' (Part)" in message and LOST[name][1] in message
    assert message.count(" in module ") == 1 + message.count("' in module ")
    assert snapshot(model) == before


class Tail(nn.Module):
    """A model whose score is the sum of its tokens and of something else."""

    def __init__(self, function: Callable[[Tensor], Tensor], part: float) -> None:
        super().__init__()
        self.tokens, self.tail, self.part = nn.Linear(4, 4), Part(function), part
        self.tail.linear = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(x)
        return (y + self.part * self.tail(y)).sum(1, keepdim=True)


def test_a_small_part_that_is_missing_gives_a_warning_and_a_large_one_an_error():
    x = numbers(2, 4).abs() + 1
    for part, size in ((1e-15, None), (0.1, 0.1), (3.0, 3.0)):
        model = drawn(lambda part=part: Tail(lambda y: y.abs().detach(), part))
        missing = float((part * model.tokens(x).abs()).sum().detach())
        arguments = (model, x, lambda outputs: outputs[:, 0])
        if size is None:
            assert abs(float(decompose(*arguments, tokens=model.tokens).remainder) - missing) < 1e-14
        elif size < 1:
            with pytest.warns(UserWarning, match=r"sum to the score, got a remainder of .* first-order approximation"):
                result = decompose(*arguments, tokens=model.tokens)
            assert float(result.remainder) == pytest.approx(missing)
            torch.testing.assert_close(result.contributions.sum(1), model.tokens(x).sum(1))
        else:
            with pytest.raises(
                ValueError, match=r"after 'detach' in module 'tail'.* the map would not describe the model"
            ):
                decompose(*arguments, tokens=model.tokens)


def test_pixels_that_go_around_the_tokens_are_reported():
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit, self.stem = vit(), nn.Conv3d(3, 3, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.vit(x) + 0.1 * self.stem(x).flatten(2).mean(2)

    model = drawn(Around)
    around = float(contrast(0.1 * model.stem(clips()).flatten(2).mean(2)).sum().detach())
    with pytest.warns(UserWarning, match=r"module '' \(Around\).* no gradient after the cut at the tokens"):
        result = decompose(model, clips(), contrast, tokens=model.vit.embed)
    assert float(result.remainder) == pytest.approx(around)
    assert abs(float(decompose(model, clips(), contrast).remainder)) < 1e-12  # pixels are decomposed


def test_scripts_are_reported_unless_they_are_linear():
    model = vit()

    def traced(module: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch advises against scripts
            return torch.jit.trace(module, numbers(1, 25, 16))

    plain = decompose(model, clips(), contrast, tokens=model.embed)
    mlp = model.blocks[0]["mlp"]
    mlp.up = traced(mlp.up)  # a linear layer, whose bias is not seen
    result = decompose(model, clips(), contrast, tokens=model.embed)
    torch.testing.assert_close(result.contributions, plain.contributions)
    assert abs(float(result.remainder)) < 1e-10
    model.blocks[0]["mlp"] = traced(mlp)
    with pytest.warns(UserWarning, match=r"'blocks\.0\.mlp' \(TopLevelTracedModule\), which is compiled by torch\.jit"):
        decompose(model, clips(), contrast, tokens=model.embed)


def test_linear_operations_that_no_mode_sees_are_complete():
    model = drawn(lambda: Tail(Doubled.apply, 1.0))
    result = decompose(model, numbers(2, 4), lambda outputs: outputs[:, 0], tokens=model.tokens)
    assert result.nonlinear == ("DoubledBackward",) and abs(float(result.remainder)) < 1e-12


def test_checkpointed_parts_are_complete():
    model = vit()
    plain = decompose(model, clips(), contrast, tokens=model.embed, pattern_weight=0.125)
    for block in model.blocks:
        for part in block.values():
            part.forward = partial(checkpoint, part.forward, use_reentrant=False)
    result = decompose(model, clips(), contrast, tokens=model.embed, pattern_weight=0.125)
    assert abs(float(result.remainder)) < 1e-10
    torch.testing.assert_close(result.contributions, plain.contributions)


def test_the_input_of_a_module_can_be_the_tokens():
    model = drawn(lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)))
    expected = decompose(model, numbers(2, 4), contrast, tokens=model[0])
    result = decompose(model, numbers(2, 4), contrast, tokens=model[1], side="input")
    torch.testing.assert_close(result.contributions, expected.contributions)
    with pytest.raises(ValueError, match="side must be one of 'output', 'input', got 'middle'"):
        decompose(model, numbers(2, 4), contrast, tokens=model[1], side="middle")

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.head(x + self.norm(x))

    model = drawn(Residual)
    with pytest.warns(UserWarning, match=r"module '' \(Residual\).* no gradient after the cut at the tokens"):
        decompose(model, numbers(2, 4), contrast, tokens=model.norm, side="input")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_sum_with_a_logarithm_equals_the_formula_for_masked_and_permuted_patterns(dtype):
    generator = torch.Generator().manual_seed(0)
    pattern = (
        torch.randn(3, 150, 170, generator=generator).to(dtype).softmax(-1).masked_fill(torch.eye(150, 170) > 0, 0)
    )
    gradient = torch.randn(3, 170, 150, generator=generator).to(dtype).mT  # more numbers than one part, not contiguous
    logs = pattern.double().clamp_min(torch.finfo(dtype).tiny).log()
    expected = (gradient.double() * logs).sum()
    scale = float((gradient.double() * logs).abs().sum())
    assert abs(float(dot_log(gradient, pattern)) - float(expected)) < 1e-6 * scale
