"""Every form of PyTorch's attention calls is read as the formula says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture_readings import OF_FULL, READINGS, explicit_sdpa, layers_of, read
from covering import in_one_case
from tiny_models import (
    CallsSdpa,
    classifier,
    clip_for,
    randomize,
    tiny,
)
from torch import Tensor, nn

from captum_staa.attention.capture import capture
from captum_staa.models import AttentionLayer


class _Shapes(nn.Module):
    """One call of F.scaled_dot_product_attention with given operands."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> None:
        super().__init__()
        self.operands, self.options = (query, key, value), options
        self.inner = nn.Identity()
        self.inner.forward = lambda: F.scaled_dot_product_attention(*self.operands, **self.options)  # type: ignore

    def forward(self) -> Tensor:
        return self.inner()


@in_one_case()
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize(
    ("lead", "options"),
    [
        ((2, 3), {}),
        ((2, 3), {"scale": 0.7}),
        ((2, 3), {"is_causal": True}),
        ((2, 3), {"attn_mask": torch.randn(5, 7, generator=torch.Generator().manual_seed(0))}),
        ((2, 3), {"attn_mask": torch.randn(2, 1, 5, 7) > 0}),
        ((2, 3), {"attn_mask": torch.tensor([True, True, False, True, True, False, True])[None]}),
        ((2, 3), {"attn_mask": torch.tensor([True, False, True, True, True])[:, None].expand(5, 7)}),
        ((4,), {}),  # no axis of heads
        ((4,), {"attn_mask": torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0))}),
        ((2, 4, 3), {}),  # two batch axes
        ((2, 4, 3), {"attn_mask": torch.randn(2, 1, 3, 5, 7, generator=torch.Generator().manual_seed(0))}),
        ((2, 4, 3), {"attn_mask": torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)) > -1}),
        ((2, 6), {"enable_gqa": True}),
    ],
)
def test_every_form_of_scaled_dot_product_attention(lead, options, reading):
    generator = torch.Generator().manual_seed(3)
    shared = (*lead[:-1], 3) if options.get("enable_gqa") else lead
    q = torch.randn(*lead, 5, 4, generator=generator)
    k, v = (torch.randn(*shared, 7, d, generator=generator) for d in (4, 6))
    model = _Shapes(q, k, v, **options)
    with torch.no_grad():
        plain = model()
        with capture(model, [AttentionLayer("inner", 0)], READINGS[reading]) as readings:
            output = model()
    torch.testing.assert_close(output, plain, rtol=0, atol=1e-5)
    if options.get("enable_gqa"):
        k = k.repeat_interleave(2, -3)
    full = explicit_sdpa(q, k, options.get("attn_mask"), options.get("scale"), options.get("is_causal", False))
    full = full[:, None] if len(lead) == 1 else full.flatten(0, len(lead) - 2)
    (value,) = readings.values()
    torch.testing.assert_close(value, OF_FULL[reading](full), rtol=0, atol=1e-5)


@in_one_case("reading")
@pytest.mark.parametrize("reading", READINGS)
def test_multihead_masks_and_options(reading):
    """Masks, unbatched input, weights on request, extra keys: all arguments of nn.MultiheadAttention."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, n, 8, generator=generator) for n in (5, 6))
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    blocked = torch.ones(5, 6, dtype=torch.bool).triu(2)
    cases: list[tuple[dict[str, Any], tuple[Tensor, ...], dict[str, Any]]] = [
        ({}, (x, y, y), {"key_padding_mask": padding}),
        ({}, (x, y, y), {"attn_mask": blocked}),
        ({}, (x, y, y), {"attn_mask": blocked, "key_padding_mask": padding, "average_attn_weights": False}),
        ({}, (x[0], y[0], y[0]), {}),
        ({}, (x[0], y[0], y[0]), {"average_attn_weights": False}),
        ({"add_bias_kv": True, "add_zero_attn": True}, (x, y, y), {}),
        ({"kdim": 3, "vdim": 4}, (x, y[..., :3], y[..., :4]), {}),
    ]
    for made, operands, options in cases:
        model = nn.Module()
        model.inner = randomize(nn.MultiheadAttention(8, 2, batch_first=True, **made), 1)
        model.forward = model.inner.forward  # type: ignore[method-assign]
        with torch.no_grad():
            plain, weights = model.inner(*operands, **options)
            _, full = model.inner(*operands, **{**options, "average_attn_weights": False})
            with capture(model, [AttentionLayer("inner", 0, backend="mha")], READINGS[reading]) as readings:
                output, same = model.inner(*operands, **options)
        torch.testing.assert_close(output, plain, rtol=0, atol=1e-6)
        torch.testing.assert_close(same, weights, rtol=0, atol=1e-6)
        full = full if full.ndim == 4 else full[None]
        (value,) = readings.values()
        torch.testing.assert_close(value, OF_FULL[reading](full), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["vivit", "sdpa", "mha"])
def test_model_in_training_mode_keeps_its_dropout(name):
    """Attention that is dropped out stays so: a reading beside it uses up the same random numbers."""
    clf = classifier(name)
    for module in clf.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.5
    if name == "sdpa":
        for block in clf.module.blocks:
            block["attn"].forward = _dropping(block["attn"])
    clf.train()
    clip = clip_for(clf)
    for reading in ("row", "column_means", "head_mean"):
        with torch.no_grad():
            torch.manual_seed(5)
            if name == "mha":  # asked for weights, torch drops out by other random numbers than if not
                outcomes = {round(read(clf, clip, reading)[0][0, 0].item(), 5) for _ in range(4)}
                assert len(outcomes) == 4
                continue
            plain = clf(clip)
            assert (plain - clf(clip)).abs().max() > 1e-4
            torch.manual_seed(5)
            logits, _ = read(clf, clip, reading)
        torch.testing.assert_close(logits, plain, rtol=0, atol=1e-6)


def _dropping(module: CallsSdpa) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        q, k, v = module.qkv(x).unflatten(-1, (3, module.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        dropped = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if module.training else 0.0)
        return module.out(dropped.transpose(1, 2).flatten(2))

    return forward


@pytest.mark.parametrize("fast", ["mha", "encoder layer"])
def test_fused_kernels_are_captured(fast):
    """In eval mode and without gradients torch takes one fused kernel for all of these."""
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    model = nn.Sequential(layer) if fast == "mha" else nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    randomize(model, 0)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    name = "0" if fast == "mha" else "self_attn"

    def run() -> Tensor:
        return model[0](x, x, x)[0] if fast == "mha" else model(x)  # type: ignore[index]

    with torch.no_grad():
        plain = run()
        with capture(model, [AttentionLayer(name, 0, backend="mha")], READINGS["head_mean"]) as readings:
            output = run()
    torch.testing.assert_close(output, plain, rtol=0, atol=1e-5)
    (matrix,) = readings.values()
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 5))


def test_two_dimensional_mask_of_flash_attention():
    """Flash attention is handed (B, N); on a CPU it cannot run, but its mask can be read."""
    clf = tiny("vivit")
    layer = layers_of(clf)[0]
    module = clf.module.get_submodule(layer.module)
    q = torch.randn(2, 2, 25, 12, generator=torch.Generator().manual_seed(0))
    keep = torch.ones(2, 25, dtype=torch.long)
    keep[1, 20:] = 0
    wrapper = _Calls(module, q, keep)
    with (
        torch.no_grad(),
        capture(wrapper, [AttentionLayer("inner", 0, "joint", "hf")], READINGS["head_mean"]) as r,
    ):
        wrapper()
    (matrix,) = r.values()
    assert matrix[1, :, 20:].max() == 0 < matrix[0, :, 20:].min()


class _Calls(nn.Module):
    def __init__(self, inner: nn.Module, q: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.inner, self.q, self.mask = inner, q, mask

    def forward(self) -> Any:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.inner.config._attn_implementation, None)
        return attend(self.inner, self.q, self.q, self.q, self.mask, scaling=0.3)
