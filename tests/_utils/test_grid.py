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
