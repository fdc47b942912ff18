"""Every spelling of attention, normalization, activations and gates is affine under the mode, as its formula says."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from covering import in_one_case
from frozen_models import ACTIVATIONS, MLPS, NORMS, SPELLINGS, clips, contrast, share_of_parameters, vit
from tiny_models import randomize
from torch import Tensor, nn

from captum_staa.attention.decomposition import decompose
from captum_staa.attention.frozen import FrozenPatterns
from captum_staa.attention.linear_graph import nonlinear_operations


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Of the (weighted) sum of the outputs under the mode, which must be affine and keep the values."""
    leaf = x.clone().requires_grad_()
    with FrozenPatterns(), torch.random.fork_rng():
        y = function(leaf * 1)
    torch.testing.assert_close(y, function(x.clone()))
    assert set(nonlinear_operations(y.grad_fn, leaf)) == set()
    (result,) = torch.autograd.grad((y if weights is None else y * weights).sum(), leaf)
    return result


def check_parameters(model: nn.Module) -> Tensor:
    result = decompose(model, clips(1), contrast, tokens=model.embed)
    tokens, constants = share_of_parameters(model, model.embed, clips(1), contrast)
    assert result.nonlinear == () and abs(float(result.remainder)) < 1e-10
    assert float(result.contributions.sum()) == pytest.approx(tokens, abs=1e-10)
    assert float(result.constants) == pytest.approx(constants, abs=1e-10)
    torch.testing.assert_close(result.outputs, model(clips(1)))
    return result.contributions


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_all_implementations_of_attention_give_the_same_contributions(spelling):
    torch.testing.assert_close(check_parameters(vit(spelling)), check_parameters(vit("sdpa")))


@in_one_case()
@pytest.mark.parametrize("norm", NORMS)
def test_all_implementations_of_normalization_give_the_same_contributions(norm):
    contributions = check_parameters(vit(norm=norm))
    same = "layer" if norm.startswith("layer") else "rms" if norm.startswith("rms") else norm
    torch.testing.assert_close(contributions, check_parameters(vit(norm=same)))


AT_ZERO = {"sigmoid": 0.5, "softplus": float(torch.tensor(2.0).double().log())}  # f(0) belongs to the constants


@in_one_case()
@pytest.mark.parametrize("mlp", [mlp for mlp in MLPS if mlp not in AT_ZERO])
def test_all_implementations_of_mlps_give_the_same_contributions(mlp):
    contributions = check_parameters(vit(mlp=mlp))
    for same in ("gelu tanh", "gelu", "silu", "mish", "glu"):
        if mlp.startswith(same):
            return torch.testing.assert_close(contributions, check_parameters(vit(mlp=same)))


@in_one_case()
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_their_ratio_times_the_input(name):
    function, offset = ACTIVATIONS[name], AT_ZERO.get(name, 0.0)
    x = torch.tensor([-30.0, -3.0, -0.5, -1e-9, 0.0, 1e-9, 1e-3, 0.5, 2.0, 9.0], dtype=torch.float64)
    y = function(x.clone())
    slope = gradient(function, x)
    torch.testing.assert_close(x * slope + offset, y)
    nearby = torch.tensor([1e-4], dtype=torch.float64)
    at_zero = 0.0 if name.startswith("relu") else float((function(nearby.clone()) - offset) / nearby)
    assert float(slope[4]) == pytest.approx(at_zero, abs=1e-3)
    assert slope.abs().max() <= 9


@in_one_case()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_near_zero_have_the_slope_at_zero(name, dtype):
    """A difference of nearly equal numbers over a tiny one would be noise."""
    smallest = 4 * torch.finfo(dtype).smallest_normal
    if name == "elu" and F.elu(torch.tensor([-1e-9])) == 0:
        smallest = 1e-3  # this PyTorch computes exp(x) - 1, which is 0 for small numbers
    tiny = torch.logspace(math.log10(smallest), -2, 400, dtype=torch.float64)
    x = torch.cat([tiny, -tiny, torch.zeros(1)]).to(dtype).requires_grad_()
    with FrozenPatterns():
        y = ACTIVATIONS[name](x * 1)
    (slope,) = torch.autograd.grad(y.sum(), x)
    if name.startswith("relu"):
        assert slope.min() >= 0 and slope.max() <= 1
    else:
        assert (slope - slope[-1]).abs().max() < 0.05


def test_products_share_equally_unless_one_factor_is_a_gate():
    a = numbers(6)
    b = torch.tensor(0.7, dtype=torch.float64)
    torch.testing.assert_close(gradient(lambda x: x * (3 * x), a), 3 * a)  # half of 3 x, twice
    torch.testing.assert_close(gradient(lambda x: torch.mul(input=x, other=x + 2), a), a / 2 + (a + 2) / 2)
    silu, up = F.silu(a), 2 * a - 1
    expected = silu / 2 * 2 + (silu / a) * up / 2
    torch.testing.assert_close(gradient(lambda x: F.silu(x) * (2 * x - 1), a), expected)
    for gate in (torch.sigmoid, torch.tanh, torch.erf, lambda x: 1 + 2 * torch.tanh(x)[None, :].clone()[0]):
        torch.testing.assert_close(gradient(lambda x, gate=gate: (2 * x - 1) * gate(x), a), 2 * gate(a))
    # of a sigmoid and a tanh, the tanh is the content
    torch.testing.assert_close(
        gradient(lambda x: torch.sigmoid(x) * torch.tanh(b * x), a), a.sigmoid() * (b * a).tanh() / a
    )
    torch.testing.assert_close(gradient(lambda x: x.sigmoid() * x.sigmoid(), a), a.sigmoid() * (a.sigmoid() - 0.5) / a)
    torch.testing.assert_close(gradient(lambda x: F.glu(x), a), torch.cat([a[3:].sigmoid(), torch.zeros(3).double()]))
    # squeeze and excitation
    x = numbers(1, 4, 5)
    w = numbers(4, 4, seed=1)
    gated = gradient(lambda x: x * torch.sigmoid(x.mean(-1) @ w)[..., None], x)
    torch.testing.assert_close(gated, (x.mean(-1) @ w).sigmoid()[..., None].expand_as(x))


@in_one_case()
@pytest.mark.parametrize(
    "product",
    [
        lambda x: x @ (2 * x).mT,
        lambda x: torch.bmm(x, (2 * x).mT),
        lambda x: torch.einsum("bij,bkj->bik", x, 2 * x),
        lambda x: torch.einsum("bij,bkj->bik", [x, 2 * x]),
        lambda x: torch.baddbmm(torch.zeros(2, 3, 3, dtype=x.dtype), x, (2 * x).mT),
        lambda x: torch.stack([F.linear(part, 2 * part) for part in x]),
        lambda x: torch.stack([torch.addmm(torch.zeros(3, 3, dtype=x.dtype), part, 2 * part.mT) for part in x]),
        lambda x: torch.addcmul(torch.zeros((), dtype=x.dtype), x[:, :, None], 2 * x[:, None]).sum(-1),
    ],
)
def test_matrix_products_share_equally(product):
    x, weights = numbers(2, 3, 4), numbers(2, 3, 3, seed=1)
    torch.testing.assert_close(gradient(product, x, weights), weights @ x + weights.mT @ x)


def test_three_factors_get_a_third_each():
    x = numbers(5)
    torch.testing.assert_close(gradient(lambda x: torch.einsum("i,i,i->i", x, x, x), x), x**2)


@in_one_case()
@pytest.mark.parametrize(
    ("function", "factor"),
    [
        (lambda x: x / (x.abs() + 1), lambda x: 1 / (x.abs() + 1)),
        (lambda x: F.softsign(x), lambda x: 1 / (x.abs() + 1)),
        (lambda x: F.normalize(x, dim=0), lambda x: 1 / x.norm()),
        (lambda x: x / x.std(), lambda x: 1 / x.std()),
        (lambda x: x * torch.linalg.vector_norm(x), lambda x: x.norm()),
        (lambda x: x * (1 / (2 + x.var())), lambda x: 1 / (2 + x.var())),
        (lambda x: x * 2**x, lambda x: 2**x),
        (lambda x: x**3, lambda x: x**2),
        (lambda x: x.pow_(2), lambda x: x),
        (lambda x: torch.pow(input=x, exponent=2), lambda x: x),
        (lambda x: torch.square(x), lambda x: x),
        (lambda x: (x * x).sqrt(), lambda x: x / x.abs()),
        (lambda x: x.div_(x.exp()), lambda x: (-x).exp()),
        (lambda x: torch.addcdiv(x, x, 2 + x.exp()), lambda x: 1 + 1 / (2 + x.exp())),
        (lambda x: torch.lerp(x, 3 * x, x.exp()), lambda x: 1 + 2 * x.exp()),
        (lambda x: x * F.gumbel_softmax(x, dim=0), None),
        (lambda x: x.mul_(x.sigmoid()), lambda x: x.sigmoid()),
        (lambda x: F.tanhshrink(x), lambda x: 1 - x.tanh() / x),
        (lambda x: x.clamp(-0.5, 0.5), lambda x: x.clamp(-0.5, 0.5) / x),
        (lambda x: x.clamp_(max=0.5), lambda x: x.clamp(max=0.5) / x),
        (lambda x: F.threshold(x, 0.2, 0), lambda x: (x > 0.2).double()),
        (lambda x: torch.sin(x), lambda x: x.sin() / x),
        (lambda x: x.log1p() if x.min() > -1 else x.abs().log1p(), lambda x: x.abs().log1p() / x),
        (lambda x: F.cosine_similarity(x, x.detach().flip(0), 0).expand(6), lambda x: 6 * x.flip(0) / x.norm() ** 2),
        (lambda x: torch.ops.aten.gelu(x), lambda x: F.gelu(x) / x),
        (lambda x: torch.ops.aten.mul_.Tensor(x, torch.ops.aten.sigmoid.default(x)), lambda x: x.sigmoid()),
        (
            lambda x: F.batch_norm(x[:, None], None, None, training=True)[:, 0],
            lambda x: 1 / (x.var(correction=0) + 1e-5) ** 0.5,
        ),
    ],
)
def test_scales_and_denominators_are_constants(function, factor):
    x = numbers(6)
    torch.manual_seed(0)  # of gumbel_softmax
    result = gradient(function, x)
    torch.manual_seed(0)
    expected = F.gumbel_softmax(x, dim=0) if factor is None else factor(x)
    torch.testing.assert_close(result, expected.expand(6))


@in_one_case()
@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.7},
        {"attn_mask": torch.tensor([[True, True, False, True, True]])},
        {"attn_mask": numbers(5, 5, seed=3)},
        {"enable_gqa": True},
        {"dropout_p": 0.0},
    ],
)
def test_scaled_dot_product_attention_passes_gradients_to_values_only(options, by_keyword):
    """The gradient to values is the pattern; that to queries, keys and the mask is zero."""
    heads = 2 if options.get("enable_gqa") else 4
    q, k, v = numbers(2, 4, 5, 3), numbers(2, heads, 5, 3, seed=1), numbers(2, heads, 5, 3, seed=2)
    pattern = F.scaled_dot_product_attention(q, k, torch.eye(5).double().expand(2, heads, 5, 5), **options)
    weights = numbers(2, 4, 5, 3, seed=4)
    expected = (pattern.mT @ weights).unflatten(1, (heads, -1)).sum(2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if "attn_mask" in options and options["attn_mask"].dtype != torch.bool:
        leaves.append(options["attn_mask"].clone().requires_grad_())
        options = {"attn_mask": leaves[3]}
    with FrozenPatterns():
        if by_keyword:
            y = F.scaled_dot_product_attention(query=q, key=k, value=v, **options)
        elif "attn_mask" in options:
            y = F.scaled_dot_product_attention(q, k, v, options["attn_mask"], 0.0)
        else:
            y = F.scaled_dot_product_attention(q, k, v, **options)
    gradients = torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True)
    torch.testing.assert_close(gradients[2], expected)
    assert [part is None for part in gradients] == [True, True, False, True][: len(leaves)]
    assert set(nonlinear_operations(y.grad_fn, v)) == set()


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_fast_path_of_transformer_encoders_is_not_taken(norm_first):
    """In eval mode without gradients, nn.TransformerEncoder would run one fused operation past the mode."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True, norm_first=norm_first)
            self.embed = nn.Conv3d(3, 16, (2, 8, 8), (2, 8, 8))
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(16, 3)

        def forward(self, clips: Tensor) -> Tensor:
            return self.head(self.layers(self.embed(clips).flatten(2).mT).mean(1))

    model = randomize(Encoder(), 1).double().requires_grad_(False).eval()
    check_parameters(model)
    with torch.no_grad():
        torch.testing.assert_close(decompose(model, clips(1), contrast, tokens=model.embed).outputs, model(clips(1)))


@in_one_case()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm((3, 4)),
        nn.LayerNorm(4, elementwise_affine=False),
        nn.LayerNorm(4, bias=False),
        nn.RMSNorm(4),
        nn.RMSNorm((3, 4), elementwise_affine=False),
        nn.GroupNorm(3, 6),
        nn.GroupNorm(2, 6, affine=False),
        nn.InstanceNorm2d(6, affine=True),
        nn.InstanceNorm2d(6, track_running_stats=True),
        nn.BatchNorm2d(6),
        nn.BatchNorm2d(6, track_running_stats=False),
    ],
    ids=str,
)
def test_norms_keep_their_values_and_are_complete(norm, dtype):
    """The input times its gradient, plus what the layer returns without an input, is the output."""
    with torch.random.fork_rng():
        norm = randomize(norm, 2).to(dtype).requires_grad_(False)
    x, weights = numbers(2, 6, 3, 4).to(dtype), numbers(2, 6, 3, 4, seed=1).to(dtype)
    leaf = x.clone().requires_grad_()
    with FrozenPatterns():
        y = norm(leaf)
    exact = dtype == torch.float32
    torch.testing.assert_close(y, norm(x), rtol=1e-4 if exact else 0.03, atol=1e-5 if exact else 0.03)
    assert y.dtype == dtype and set(nonlinear_operations(y.grad_fn, leaf)) == set()
    (result,) = torch.autograd.grad((y * weights).sum(), leaf)
    constants = norm(torch.zeros_like(x)).float()
    if isinstance(norm, nn.BatchNorm2d) and not norm.track_running_stats:  # the mean of the batch is a constant
        mean, scale = x.float().mean((0, 2, 3), keepdim=True), x.float().var((0, 2, 3), correction=0, keepdim=True)
        constants = constants - mean / (scale + norm.eps).sqrt() * norm.weight.float().view(-1, 1, 1)
    total = (result.float() * x.float()).sum() + (constants * weights.float()).sum()
    of = (norm(x) * weights).float().sum()
    assert float(total) == pytest.approx(float(of), abs=1e-3 if exact else 0.5)


def test_gradients_and_values_without_a_rule_are_unchanged():
    x = numbers(3, 4).requires_grad_()
    with FrozenPatterns():
        y = F.relu(x) @ numbers(4, 2, seed=1) + F.softmax(numbers(3, 2, seed=2), -1)
        with torch.no_grad():
            assert torch.equal(F.gelu(x), F.gelu(x.detach()))
        (result,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad((F.relu(x) @ numbers(4, 2, seed=1)).sum(), x)
    torch.testing.assert_close(result, expected)


@in_one_case()
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.gelu, "GeluBackward0"),
        (lambda x: x.softmax(-1), "SoftmaxBackward0"),
        (lambda x: F.layer_norm(x, (4,)), "NativeLayerNormBackward0"),
        (lambda x: x * x, "MulBackward0"),
        (lambda x: x @ x.mT, "BmmBackward0"),
        (lambda x: x / x.sum(), "DivBackward0"),
        (lambda x: F.scaled_dot_product_attention(x[None].detach(), x[None], x[None]), "ScaledDotProduct"),
        (lambda x: torch.var_mean(x, -1)[0], "VarMeanBackward0"),
        (lambda x: F.conv1d(x, x), "ConvolutionBackward0"),
        (lambda x: x + torch.ones(1, requires_grad=True), "a parameter that requires a gradient"),
        (lambda x: torch.var_mean(x, -1)[1], None),
        (lambda x: F.max_pool1d(F.relu(x).flip(1)[:, 1:], 2).repeat(2, 1, 1).cumsum(0), None),
        (lambda x: F.scaled_dot_product_attention(x[None].detach(), x[None].detach(), x[None]), None),
    ],
)
def test_nonlinear_operations_are_found(function, name):
    """In graphs that were recorded without the mode."""
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = [operation.name for operation in nonlinear_operations(function(x).sum().grad_fn, x)]
    assert [item.startswith(name) for item in found] == [True] if name else found == []
