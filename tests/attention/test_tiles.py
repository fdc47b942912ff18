"""Attention computed tile by tile is attention."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from capture_readings import explicit_sdpa, read
from covering import in_one_case
from tiny_models import (
    NAMES,
    clip_for,
    tiny,
)

from captum_staa.attention import tiles

BIASES: dict[str, tuple[int, ...] | None] = {
    "none": None,
    "(N)": (1, 9),
    "(Q, N)": (6, 9),
    "(h, Q, N)": (3, 6, 9),
    "(B, 1, 1, N)": (2, 1, 1, 9),
    "(B, 1, Q, N)": (2, 1, 6, 9),
    "(1, h, Q, 1)": (1, 3, 6, 1),
    "(B, h, Q, N)": (2, 3, 6, 9),
}


@in_one_case("budget", "boolean")
@pytest.mark.parametrize("budget", [1, 7, 20, 100, 250, 1 << 18])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("boolean", [False, True])
def test_tiles_of_any_size_equal_the_explicit_matrix(monkeypatch, budget, bias, boolean):
    """The tiles' cuts fall between rows, between heads and between examples; none of it shows."""
    monkeypatch.setattr(tiles, "CPU_TILE_PER_THREAD", budget)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, d, generator=generator) for n, d in ((6, 4), (9, 4), (9, 5)))
    shape = BIASES[bias]
    mask = None if shape is None else torch.randn(shape, generator=generator)
    if mask is not None and boolean:
        mask = mask > -0.7
    softcap = 1.5
    x = tiles.Operands(q, k, v, 0.6, mask, softcap)
    scores = softcap * torch.tanh(0.6 * torch.einsum("bhqd,bhnd->bhqn", q, k) / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if boolean else scores + mask
    full = scores.softmax(-1).nan_to_num(0)
    output, columns = tiles.attend_and_average_rows(x)
    torch.testing.assert_close(output, full @ v)
    torch.testing.assert_close(columns, full.mean((1, 2)))
    output, matrix = tiles.attend_and_average_heads(x)
    torch.testing.assert_close(output, full @ v)
    torch.testing.assert_close(matrix, full.mean(1))
    torch.testing.assert_close(tiles.average_rows(x), full.mean((1, 2)))
    torch.testing.assert_close(tiles.average_heads(x), full.mean(1))
    for capped in (x, dataclasses.replace(x, softcap=None)):
        plain = full if capped is x else explicit_sdpa(q, k, mask, 0.6, False)
        for width in (1, 4):  # narrower and wider, with the values, than a query
            columns = torch.randn(2, 9, width, generator=generator)
            output, carried = tiles.attend_and_carry(dataclasses.replace(capped, value=v[..., :2]), columns)
            torch.testing.assert_close(output, plain @ v[..., :2], rtol=0, atol=1e-5)
            torch.testing.assert_close(carried, plain.mean(1) @ columns, rtol=0, atol=1e-5)
    torch.testing.assert_close(x.probabilities(), full)
    torch.testing.assert_close(x.probabilities(slice(2, 5)), full[:, :, 2:5])
    torch.testing.assert_close(x.row(4), full[:, :, 4].mean(1))


@pytest.mark.parametrize("name", NAMES)
def test_tile_size_does_not_change_the_result(monkeypatch, name):
    clf = tiny(name)
    clip = clip_for(clf, batch=3)
    with torch.no_grad():
        for reading in ("column_means", "head_mean"):
            monkeypatch.undo()
            logits, readings = read(clf, clip, reading)
            monkeypatch.setattr(tiles, "CPU_TILE_PER_THREAD", 11)
            small_logits, small = read(clf, clip, reading)
            torch.testing.assert_close(small_logits, logits, rtol=0, atol=1e-5)
            for layer in readings:
                torch.testing.assert_close(small[layer], readings[layer], rtol=0, atol=1e-6)


def test_tiles_are_bounded(monkeypatch):
    """No tile is larger than its budget allows, and none is smaller than one row."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    x = tiles.Operands(torch.randn(2, 3, 50, 4), torch.randn(2, 3, 40, 4), torch.randn(2, 3, 40, 4), 1.0)
    for budget in (1, 79, 80, 2000, 4000, 4001, 10**6):
        monkeypatch.setattr(tiles, "CPU_TILE_PER_THREAD", budget)
        covered = torch.zeros(6, 50)
        for group, rows, tile in tiles._tiles(x, None):
            assert tile.numel() <= max(budget, 40)
            covered[group, rows] += 1
        assert covered.eq(1).all()
