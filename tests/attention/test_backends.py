"""The backends "mha" and "softmax": a module's own softmax in every spelling, and what is no probability."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from capture_readings import OF_FULL, READINGS
from covering import in_one_case
from frozen_models import SPELLINGS, clips, vit
from tiny_models import randomize
from torch import Tensor, nn
from undeclared_models import ATTENTION, HEADS, WIDTH, Explicit

from captum_staa.attention.capture import capture
from captum_staa.grid import TokenRows
from captum_staa.models import AttentionLayer

X = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(0))


@in_one_case("reading")
@pytest.mark.parametrize("reading", [*READINGS, "pulled"])
@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if s != "by hand"])
def test_every_spelling_of_attention_is_read_as_the_formula_says(spelling: str, reading: str) -> None:
    model, clip = vit(spelling), clips()
    backend = "sdpa" if spelling.startswith("sdpa") else "mha" if spelling.startswith("mha") else "softmax"
    name = "blocks.{}.attn.inner" if backend == "mha" else "blocks.{}.attn"
    layers = [AttentionLayer(name.format(i), i, backend=backend) for i in range(2)]
    weights = torch.rand(2, 25, generator=torch.Generator().manual_seed(1))
    read = READINGS.get(reading, lambda call: call.pulled(weights))
    slow = vit("sdpa")
    full: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x, inner = args[0], module.inner
        q, k, _ = F.linear(x, inner.in_proj_weight, inner.in_proj_bias).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        full.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))

    for block in slow.blocks:
        block["attn"].register_forward_pre_hook(keep)
    with torch.no_grad():
        expected, plain = slow(clip), model(clip)
        with capture(model, layers, read) as readings:
            logits = model(clip)
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-10)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-8)
    for layer, matrix in zip(layers, full, strict=True):
        of_full = OF_FULL[reading](matrix) if reading in OF_FULL else (weights[:, None].double() @ matrix.mean(1))[:, 0]
        torch.testing.assert_close(readings[layer].double(), of_full, rtol=0, atol=1e-5)


@in_one_case()
@pytest.mark.parametrize("used", [1, 2, 7])
@pytest.mark.parametrize("name", ATTENTION)
def test_weighted_rows_equal_the_product_whether_few_or_all_are_used(name: str, used: int) -> None:
    """With heads folded into the batch or in front of it, and with keys before queries."""
    model = nn.Sequential(randomize(ATTENTION[name](), 0))
    weights = torch.zeros(3, 7)
    weights[:, :used] = torch.rand(3, used, generator=torch.Generator().manual_seed(2))
    every = torch.arange(7)[None]
    rows, backend, where = None, {"fused": "sdpa", "flexible": "sdpa", "multi head": "mha"}.get(name, "softmax"), "0"
    if name == "softmax module":
        rows = TokenRows(every, every, 7, order=torch.arange(HEADS))
    elif name == "keys first":
        rows = TokenRows(every, every, 7, heads=False, outer=HEADS, order=torch.arange(HEADS), axes=(-1, -2))
    elif name == "multi head":
        where = "0.attn"
    layer = AttentionLayer(where, 0, "joint", backend, rows=rows)  # type: ignore[arg-type]
    rows = rows or TokenRows(every, every, 7)
    with torch.no_grad(), capture(model, [layer], lambda call: call.pulled(rows.fold(weights[:, None]))) as readings:
        model(X)
    pulled = rows.unfold(readings[layer], 3)[:, 0]
    expected = (weights[:, None] @ model[0].explicit(X).mean(1).detach())[:, 0]
    torch.testing.assert_close(pulled, expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad(), capture(model, [layer], lambda call: call.head_mean()) as readings:
        model(X)
    torch.testing.assert_close(rows.unfold(readings[layer], 3)[:, 0], model[0].explicit(X).mean(1).detach())


@in_one_case()
@pytest.mark.parametrize("name", ["explicit", "softmax module", "einsum", "keys first"])
def test_gradients_of_explicit_probabilities_are_on_the_way_to_the_output(name: str) -> None:
    """d output / d A times a change of A is the change of the output, for every layout of the matrix."""
    module = randomize(ATTENTION[name](), 0).double()
    axes = (-1, -2) if name == "keys first" else (-2, -1)
    every = torch.arange(7)[None]
    rows = TokenRows(every, every, 7, heads=name in ("einsum", "explicit"), axes=axes)
    layer = AttentionLayer("0", 0, "joint", "softmax", rows=rows)
    with capture(nn.Sequential(module), [layer], lambda call: call.probabilities()) as readings:
        output = module(X.double())[0, 2, 5]
    (slope,) = torch.autograd.grad(output, readings[layer])
    value = module.parts(X.double())[2]  # (B, h, N, d)
    head, key = 1, 3
    moved = torch.zeros(WIDTH, dtype=torch.double)
    moved[head * WIDTH // HEADS : (head + 1) * WIDTH // HEADS] = value[0, head, key]
    expected = module.proj.weight[5] @ moved
    folded = {"softmax module": (head, 0), "keys first": (head * len(X), 0)}.get(name, (0, head))
    torch.testing.assert_close(slope[(*folded, 2, key)].double(), expected, rtol=1e-5, atol=1e-7)


def test_a_dropout_layer_is_read_only_if_probabilities_arrive() -> None:
    model = nn.Sequential(randomize(Explicit(), 0))
    full = model[0].explicit(X).mean(1).detach()
    layer = AttentionLayer("0.drop", 0, "joint", "softmax")
    with torch.no_grad(), capture(model, [layer], READINGS["head_mean"]) as readings:
        model(X)
    torch.testing.assert_close(readings[layer], full)

    class Scores(Explicit):  # drops scores, and not probabilities
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.parts(x)
            return self.proj((self.drop(q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))

    model = nn.Sequential(randomize(Scores(), 0))
    message = r"must be probabilities over keys, got values from -.* sum to .*Declare the module that computes"
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=message),
        capture(model, [layer], READINGS["head_mean"]),
    ):
        model(X)


def test_nn_softmax_itself_is_read() -> None:
    """Not what arrives at it: scores are no probabilities."""
    model = nn.Sequential(randomize(ATTENTION["softmax module"](), 0))
    layer = AttentionLayer("0.attend", 0, "joint", "softmax")
    with torch.no_grad(), capture(model, [layer], READINGS["head_mean"]) as readings:
        model(X)
    folded = model[0].explicit(X).flatten(0, 1).detach()  # (B * h, Q, N)
    torch.testing.assert_close(readings[layer], folded)


def test_a_softmax_over_another_axis_is_an_error() -> None:
    model = nn.Sequential(randomize(ATTENTION["keys first"](), 0))
    with (
        pytest.raises(ValueError, match=r"over keys on axis -1, got a softmax over axis 2.*Leave out family="),
        capture(model, [AttentionLayer("0", 0, "joint", "softmax")], READINGS["row"]),
    ):
        model(X)


@in_one_case()
@pytest.mark.parametrize(("name", "where", "backend", "right"), [
    ("fused", "0", "mha", "sdpa"),
    ("multi head", "0.attn", "sdpa", "mha"),
    ("explicit", "0", "sdpa", "softmax"),
])  # fmt: skip
def test_a_wrong_backend_is_an_error_that_names_the_right_one(name: str, where: str, backend: str, right: str) -> None:
    model = nn.Sequential(randomize(ATTENTION[name](), 0))
    with (
        pytest.raises(ValueError, match=f"no attention of backend='{backend}' at '{where}'.*backend='{right}'"),
        capture(model, [AttentionLayer(where, 0, "joint", backend)], READINGS["row"]),  # type: ignore[arg-type]
    ):
        model(X)


def test_one_call_of_several_is_read() -> None:
    """A module that runs twice, and one with a softmax over experts beside its attention."""

    class Gated(Explicit):
        def forward(self, x: Tensor) -> Tensor:
            gates = x[..., :4].softmax(-1)
            return super().forward(x) * gates.amax(-1, keepdim=True)

    block = randomize(Gated(), 0)
    model = nn.Sequential(block, block)
    layers = [AttentionLayer("0", n, "joint", "softmax", call=2 * n + 1) for n in range(2)]
    with torch.no_grad(), capture(model, layers, READINGS["head_mean"]) as readings:
        model(X)
    torch.testing.assert_close(readings[layers[0]], block.explicit(X).mean(1).detach())
    torch.testing.assert_close(readings[layers[1]], block.explicit(block(X)).mean(1).detach())
    with (
        pytest.raises(ValueError, match=r"once per forward, got a second call of '0'.*call=0"),
        capture(model, [AttentionLayer("0", 0, "joint", "softmax")], READINGS["row"]),
    ):
        model(X)
