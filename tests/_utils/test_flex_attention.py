"""``flex_attention`` written out equals that of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from covering import in_one_case
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.overrides import TorchFunctionMode

from captum_staa._utils.flex_attention import FLEX_ATTENTION, written_out
from captum_staa._utils.model_state import without_compiling

TABLE = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1))
NAMES = torch.randn(8, 3, generator=torch.Generator().manual_seed(2))
MODS = {
    "none": None,
    "table": lambda score, b, h, q, k: score + TABLE[h, q, k],
    "soft cap": lambda score, b, h, q, k: 2 * torch.tanh(score / 2),
    "vectors": lambda score, b, h, q, k: score + (NAMES[q] * NAMES[k]).sum(),
}
MASKS = {
    "none": None,
    "causal": lambda b, h, q, k: q >= k,
    "queries without a key": lambda b, h, q, k: (q > 2 * b) & (k < 5),
}


class WrittenOut(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is FLEX_ATTENTION:
            self.calls += 1
            return written_out(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@in_one_case()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:return_lse is deprecated")
@pytest.mark.parametrize(
    ("mod", "mask", "kv_heads", "dtype"),
    [
        ("none", "none", 2, torch.float32),
        ("table", "causal", 2, torch.float32),
        ("soft cap", "queries without a key", 1, torch.float32),
        ("vectors", "none", 2, torch.float64),
        ("table", "none", 1, torch.bfloat16),
    ],
)
def test_written_out_equals_torch(mod: str, mask: str, kv_heads: int, dtype: torch.dtype) -> None:
    drawn = torch.randn(3, 2, 3, 8, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    query, (key, value) = drawn[:, :, 0], drawn[:, :kv_heads, 1:].unbind(2)
    block = None if MASKS[mask] is None else create_block_mask(MASKS[mask], 3, None, 8, 8, device="cpu")

    def run() -> tuple[Tensor, Tensor]:
        return flex_attention(query, key, value, MODS[mod], block, enable_gqa=kv_heads < 2, return_lse=True)

    with without_compiling():
        expected = run()
        with WrittenOut() as mode:
            found = run()
    assert mode.calls == 1
    atol = 1e-2 if dtype == torch.bfloat16 else 1e-5  # the added mask is rounded, too
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol)
