"""TokenGrid: reshaping, pixels, and the order of tokens in every model family, measured on the models themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from covering import in_one_case
from tiny_models import ALL, NAMES, OWN, SIZE, classifier, clip_for
from torch import Tensor, nn

from captum_staa import TokenGrid
from captum_staa.attention.capture import capture
from captum_staa.grid import TokenRows

ORDERS = ("thw", "hwt")


@in_one_case()
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_to_grid_and_to_tokens_are_inverse(order, prefix):
    grid = TokenGrid(4, 3, 2, prefix=prefix, order=order, tubelet=(2, 5, 7))
    assert (grid.shape, grid.num_patches, grid.num_tokens) == ((4, 3, 2), 24, 24 + prefix)
    assert grid.pixels == (8, 15, 14)
    tokens = torch.arange(2.0 * grid.num_tokens).view(2, -1)
    reshaped = grid.to_grid(tokens)
    for t in range(4):
        for h in range(3):
            for w in range(2):
                index = (t * 3 + h) * 2 + w if order == "thw" else (h * 2 + w) * 4 + t
                assert reshaped[1, t, h, w] == tokens[1, prefix + index]
    assert torch.equal(grid.to_tokens(reshaped), tokens[:, prefix:])
    assert torch.equal(grid.to_grid(tokens[:, prefix:]), reshaped)  # also without the prefix
    assert grid.to_grid(tokens.view(1, 2, 1, -1)).shape == (1, 2, 1, 4, 3, 2)


def test_to_pixels_nearest_and_trilinear():
    grid = TokenGrid(4, 3, 2, tubelet=(2, 5, 7))
    values = torch.rand(2, 4, 3, 2)
    nearest = grid.to_pixels(values)
    for t, h, w in ((0, 0, 0), (3, 2, 1), (1, 2, 0), (2, 0, 1)):
        block = nearest[:, 2 * t : 2 * t + 2, 5 * h : 5 * h + 5, 7 * w : 7 * w + 7]
        assert torch.equal(block, values[:, t, h, w, None, None, None].expand_as(block))
    smooth = grid.to_pixels(values, "trilinear")
    # the middle of an odd block has the value of its token; frame 3 is a quarter of the way to the next token's center
    torch.testing.assert_close(smooth[:, 3, 7, 10], 0.75 * values[:, 1, 1, 1] + 0.25 * values[:, 2, 1, 1])
    for pixels in (nearest, smooth):  # upsampling preserves the sum
        torch.testing.assert_close(pixels.sum((1, 2, 3)), values.sum((1, 2, 3)) * 2 * 5 * 7)


def test_to_pixels_is_zero_outside_the_tokens():
    grid = TokenGrid(2, 1, 2, tubelet=(1, 4, 4))
    pixels = grid.to_pixels(torch.ones(1, 2, 1, 2), size=(3, 5, 11))
    assert pixels.shape == (1, 3, 5, 11)
    assert pixels.sum() == 2 * 4 * 8 and pixels[:, :2, :4, :8].min() == 1


@in_one_case()
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: TokenGrid(0, 3, 2), ["t of a token grid", "at least 1, got 0"]),
        (lambda: TokenGrid(1, 3, 2, prefix=-1), ["prefix", "at least 0, got -1"]),
        (lambda: TokenGrid(1, 3, 2, tubelet=(2, 8)), ["tubelet must be (t, h, w)", "got (2, 8)"]),  # type: ignore[arg-type]
        (lambda: TokenGrid(1, 3, 2, tubelet=(1, 0.5, 8)), ["a side of tubelet", "at least 1 pixel or frame, got 0.5"]),
        (lambda: TokenGrid(1, 1, 2, positions=(0, 0)), ["2 different indices", "1 of them different"]),
        (lambda: TokenGrid(1, 1, 2, prefix=1, positions=(1, 3)), ["0..2", "got 1 to 3", "Count the other tokens"]),
        (lambda: TokenGrid(1, 1, 2, order="hwt", positions=(1, 0)), ["'thw' with positions", "got 'hwt'"]),
        (lambda: TokenRows.of("diagonal", TokenGrid(1, 1, 2)), ["role", "'diagonal'"]),
        (
            lambda: TokenRows.of("spatial", TokenGrid(2, 1, 2)).pull(torch.ones(3, 4), torch.ones(6, 3, 2)),
            ["2 rows of 2 queries and 2 keys for each of 3 clips", "(6, 3, 2), and not (6, 2, 2)", "leave out family="],
        ),
        (lambda: TokenGrid(1, 3, 2, order="wht"), ["'wht'", "'thw', 'hwt'"]),  # type: ignore[arg-type]
        (
            lambda: TokenGrid(4, 3, 2, prefix=1).to_grid(torch.zeros(2, 26)),
            ["25 values", "24 without the other tokens", "(2, 26)", "(4, 3, 2)"],
        ),
        (lambda: TokenGrid(4, 3, 2).to_tokens(torch.zeros(2, 3, 4, 2)), ["(4, 3, 2)", "(2, 3, 4, 2)"]),
        (lambda: TokenGrid(4, 3, 2).to_pixels(torch.zeros(4, 3, 2)), ["(B, t, h, w)", "(4, 3, 2)"]),
        (lambda: TokenGrid(4, 3, 2).to_pixels(torch.zeros(1, 4, 3, 2), "cubic"), ["'cubic'", "trilinear"]),  # type: ignore[arg-type]
        (
            lambda: TokenGrid(4, 3, 2, tubelet=(2, 8, 8)).to_pixels(torch.zeros(1, 4, 3, 2), size=(8, 23, 16)),
            ["got (8, 23, 16)", "at least (8, 24, 16)"],
        ),
    ],
)
def test_errors_report_expected_and_received(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


# The module of each model that turns pixels into tokens, before any attention, and its output as (B, N, width).
EMBEDDINGS: dict[str, tuple[str, Callable[[Tensor, TokenGrid], Tensor]]] = {
    "videomae": ("videomae.embeddings", lambda x, grid: x),
    "videomae-first": ("videomae.embeddings", lambda x, grid: x),
    "timesformer": ("timesformer.embeddings", lambda x, grid: x),
    "timesformer-joint": ("timesformer.embeddings", lambda x, grid: x),
    "vivit": ("vivit.embeddings", lambda x, grid: x),
    "vjepa2": ("vjepa2.encoder.embeddings", lambda x, grid: x),
    # frames are in the batch axis until the last reshape, which makes them the slowest axis of the tokens
    "videoprism": ("vision_model.spatial_embeddings", lambda x, grid: x.unflatten(0, (-1, grid.t)).flatten(1, 2)),
} | {name: ("blocks.0.norm", lambda x, grid: x) for name in OWN}


def output_of(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        run()
    handle.remove()
    return outputs[0]


@in_one_case()
@pytest.mark.parametrize("name", ALL)
def test_one_block_of_pixels_changes_one_token(name):
    """Change one block of pixels. Exactly one token must change, and the grid must map it to this block."""
    clf = classifier(name)
    grid = clf.grid
    assert grid is not None and grid.shape == (4, 3, 2) and grid.pixels == (clf.num_frames, *SIZE)
    where, tokens_of = EMBEDDINGS[name]
    module = clf.module.get_submodule(where)
    unlit = clip_for(clf, batch=1)
    before = tokens_of(output_of(module, lambda: clf(unlit)), grid)
    assert before.shape[1] == grid.num_tokens
    for t in range(grid.t):
        for h in range(grid.h):
            for w in range(grid.w):
                block = torch.zeros(1, *grid.pixels)
                tt, hh, ww = grid.tubelet
                block[:, t * tt : (t + 1) * tt, h * hh : (h + 1) * hh, w * ww : (w + 1) * ww] = 1
                lit = unlit + clf.layout.expand(block, unlit)
                after = tokens_of(output_of(module, lambda lit=lit: clf(lit)), grid)
                changed = (after - before).abs().amax(-1)  # (1, N)
                token = (changed > 1e-6).float()
                assert token.sum() == 1, f"{int(token.sum())} tokens changed for one block of {name}"
                assert torch.equal(grid.to_pixels(grid.to_grid(token)), block), f"{name}: wrong block for {t, h, w}"


def test_last_tokens_of_videoprism_are_frame_by_frame():
    """The pooling head, which STAA reads, gets the tokens in the order of the grid. Attention is switched off here."""
    clf = classifier("videoprism")
    for layer in clf.module.vision_model.temporal_layers:
        nn.init.zeros_(layer.attention.o_proj.weight)
    for layer in clf.module.vision_model.spatial_layers:
        nn.init.zeros_(layer.attention.o_proj.weight)
    grid, module, unlit = clf.grid, clf.module.vision_model, clip_for(clf, batch=1)
    assert grid is not None
    before = output_of(module, lambda: clf(unlit)).last_hidden_state
    for t, h, w in ((0, 0, 1), (0, 2, 0), (3, 1, 1), (1, 0, 0)):
        lit = unlit.clone()
        lit[:, t, :, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8] += 1
        token = ((output_of(module, lambda lit=lit: clf(lit)).last_hidden_state - before).abs().amax(-1) > 1e-6).float()
        expected = torch.zeros(1, 4, 3, 2)
        expected[0, t, h, w] = 1
        assert torch.equal(grid.to_grid(token), expected)


@in_one_case()
@pytest.mark.parametrize("name", [n for n in NAMES if n != "timesformer-joint"])
def test_attention_sizes_match_the_grid(name):
    """The declared roles are correct: spatial layers have frames in the batch axis, temporal layers have patches."""
    clf = classifier(name)
    grid, sites = clf.grid, clf.family.attention(clf.module)
    assert grid is not None
    counts = {"joint": grid.num_tokens, "pool": grid.num_tokens, "spatial": grid.prefix + 6, "temporal": 4}
    with torch.no_grad(), capture(clf.module, sites, lambda call: call.head_mean()) as read:
        clf(clip_for(clf, batch=2))
    for site in sites:
        matrix = read[site]
        assert matrix.shape[-1] == counts[site.role]
        assert len(matrix) == {"spatial": 2 * 4, "temporal": 2 * 6}.get(site.role, 2)
        torch.testing.assert_close(matrix.sum(-1), torch.ones(matrix.shape[:-1]))


def test_other_tokens_may_be_anywhere():
    """Suffix, and places of the grid in a sequence of a language model: a text, two frames, a text between them."""
    tokens = torch.arange(2.0 * 17).view(2, 17)
    grid = TokenGrid(2, 3, 2, prefix=2, suffix=3, tubelet=(1, 4, 4))
    assert torch.equal(grid.to_grid(tokens), tokens[:, 2:14].view(2, 2, 3, 2))
    assert torch.equal(grid.indices(), torch.arange(2, 14).view(2, 3, 2))
    places = (*range(3, 9), *range(10, 16))
    grid = TokenGrid(2, 3, 2, prefix=3, suffix=2, positions=places, tubelet=(1, 4, 4))
    assert grid.num_tokens == 17
    reshaped = grid.to_grid(tokens)
    for t in range(2):
        for h in range(3):
            for w in range(2):
                assert torch.equal(reshaped[:, t, h, w], tokens[:, places[(t * 3 + h) * 2 + w]])
    shuffled = TokenGrid(1, 2, 2, positions=(2, 0, 3, 1))
    assert shuffled.to_grid(torch.tensor([10, 11, 12, 13])).tolist() == [[[12, 10], [13, 11]]]
    assert shuffled.to_tokens(torch.tensor([[[12, 10], [13, 11]]])).tolist() == [10, 11, 12, 13]
    for each in (grid, shuffled):
        values = torch.rand(2, *each.shape)
        assert torch.equal(each.to_grid(each.to_tokens(values)), values)
        assert torch.equal(each.indices().flatten(), torch.tensor(each.positions))


@in_one_case()
@pytest.mark.parametrize("mode", ["nearest", "trilinear"])
@pytest.mark.parametrize("tubelet", [(2, 8, 8), (1.5, 384 / 14, 2.75), (1, 7 / 3, 5)])
def test_spread_keeps_the_sum_of_every_token(tubelet, mode):
    grid = TokenGrid(4, 3, 5, tubelet=tubelet)
    size = tuple(side + 3 for side in grid.pixels)
    for token in ((0, 0, 0), (3, 2, 4), (1, 1, 2)):
        values = torch.zeros(1, 4, 3, 5)
        values[(0, *token)] = 2.5
        pixels = grid.spread(values, mode, size)
        assert pixels.shape == (1, *size) and pixels[:, grid.pixels[0] :].sum() == 0
        torch.testing.assert_close(pixels.sum(), torch.tensor(2.5))
    steps = torch.rand(2, 4)
    torch.testing.assert_close(grid.spread_frames(steps, size[0]).sum(1), steps.sum(1))


def test_pixels_of_fractional_cells_belong_to_the_token_that_contains_their_center():
    grid = TokenGrid(1, 1, 14, tubelet=(1, 1, 384 / 14))
    pixels = grid.to_pixels(torch.arange(14.0).view(1, 1, 1, 14))[0, 0, 0]
    assert pixels.shape == (384,)
    for x in range(384):
        assert pixels[x] == (x + 0.5) // (384 / 14)


@in_one_case()
@pytest.mark.parametrize("batch_at", ["outside", "inside"])
@pytest.mark.parametrize("copies", [1, 3])
def test_rows_of_tokens_are_pulled_as_dense_matrices(batch_at, copies):
    """Rows that share a token, lack one, and have keys that are no tokens; heads and the batch folded in any order."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.tensor([[0, 1, 2], [0, 4, 3]]), torch.tensor([[1, 2, 5, -1], [3, 0, 4, -1]])
    order = None if copies == 1 else torch.randperm(2 * copies, generator=generator)
    rows = TokenRows(queries, keys, 7, outer=2 * copies if batch_at == "inside" else 1, order=order)
    matrix = torch.rand(2, 2, copies, 3, 4, generator=generator)  # (B, R, copies, Q, N)
    entries = torch.empty(2, 2 * copies, 3, 4)
    entries[:, torch.arange(2 * copies) if order is None else order] = matrix.flatten(1, 2)
    entries = (entries.transpose(0, 1) if batch_at == "inside" else entries).flatten(0, 1)
    dense = torch.zeros(2, 7, 7)
    dense[:, [5, 6], [5, 6]] = 1  # no queries
    for row in range(2):
        for q, query in enumerate(queries[row].tolist()):
            for k, key in enumerate(keys[row].tolist()):
                if key >= 0:
                    dense[:, query, key] += matrix.mean(2)[:, row, q, k] / (2 if query == 0 else 1)
    weights = torch.rand(2, 7, generator=generator)
    expected = (weights[:, None] @ dense)[:, 0]
    torch.testing.assert_close(rows.pull(weights, entries), expected)
    folded = rows.fold(rows.gather(weights))
    torch.testing.assert_close(rows.pull(weights, (folded[:, None] @ entries)[:, 0]), expected)


def test_trilinear_equals_interpolate():
    grid = TokenGrid(4, 3, 2, order="hwt", prefix=1, tubelet=(2, 3, 5))
    tokens = torch.rand(2, 25)
    slow = F.interpolate(tokens[:, 1:].view(2, 3, 2, 4).permute(0, 3, 1, 2)[:, None], size=(8, 9, 10), mode="trilinear")
    torch.testing.assert_close(grid.to_pixels(grid.to_grid(tokens), "trilinear"), slow[:, 0])


def test_to_frames_repeats_steps():
    grid = TokenGrid(t=2, h=1, w=1, tubelet=(3, 4, 4))
    assert grid.to_frames(torch.tensor([[1.0, 2.0]]), 7).tolist() == [[1, 1, 1, 2, 2, 2, 0]]
    maps = torch.arange(4.0).view(1, 2, 1, 2)
    assert grid.to_frames(maps, 6)[0, :, 0].tolist() == [[0, 1]] * 3 + [[2, 3]] * 3
    with pytest.raises(ValueError, match=r"num_frames must be at least 6.*got 5"):
        grid.to_frames(torch.ones(1, 2), 5)
