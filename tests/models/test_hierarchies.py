"""MViT 2 and Swin 3D rolled out, against a slow formula from matrices that the models keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hierarchical_models import MViT, Swin, WindowBlock
from tiny_models import randomize
from torch import Tensor
from undeclared_models import clip_of

from captum_staa import STAA, TokenGrid, VideoClassifier, models
from captum_staa._utils.tensors import gaussian
from captum_staa.attention.decomposition import class_contrast, decompose
from captum_staa.models.token_positions import in_order

SIZE = (8, 32, 32)


def found_in(model: Any) -> tuple[VideoClassifier, Tensor]:
    return VideoClassifier(model, layout="BCTHW"), clip_of("BCTHW", size=SIZE)


def divided(weights: Tensor, coarse: tuple[int, ...], fine: tuple[int, ...]) -> Tensor:
    """Divide the weight of each coarse cell evenly among its fine cells, ``(B, n)`` to ``(B, m)``."""
    values = weights.unflatten(1, coarse)
    for axis, (few, many) in enumerate(zip(coarse, fine, strict=True), 1):
        values = values.repeat_interleave(many // few, axis) / (many // few)
    return values.flatten(1)


def of_mvit(model: MViT) -> Tensor:
    """Every token of a coarser grid stands evenly for its patches, in attention and in the pooled residual."""
    grids, grid = [], (4, 8, 8)
    for block in model.blocks:
        steps = [tuple(pool.stride) for pool in block.attn.pools]  # type: ignore[union-attr]
        asked, keys = (tuple(n // s for n, s in zip(grid, step, strict=True)) for step in steps[:2])
        grids.append((grid, asked, keys))
        grid = asked
    matrices = [block.attn.matrix.mean(1) for block in model.blocks]  # type: ignore[union-attr, operator]
    cls = torch.ones(len(matrices[0]), 1)
    patches = torch.zeros(len(cls), 64)
    for (before, asked, keys), matrix in zip(reversed(grids), reversed(matrices), strict=True):
        pulled = (torch.cat([cls, patches], 1)[:, None] @ matrix)[:, 0]
        cls = (cls + pulled[:, :1]) / 2
        patches = (divided(patches, asked, before) + divided(pulled[:, 1:], keys, before)) / 2
    return patches.view(-1, 4, 8, 8)


def of_swin(model: Swin) -> Tensor:
    patches = torch.full((2, 4, 4, 4), 1 / 64)
    patches = through(model.second, patches)
    patches = divided(patches.flatten(1), (4, 4, 4), (4, 8, 8)).view(-1, 4, 8, 8)
    return through(model.first, patches)


def through(blocks: Any, patches: Tensor) -> Tensor:
    """Roll weights ``(B, t, h, w)`` out through blocks of windows, one query patch at a time."""
    for block in reversed(blocks):
        pulled = torch.zeros(len(patches), patches[0].numel())
        numbers = block.windows(torch.arange(patches[0].numel()).view(1, *patches.shape[1:], 1))[..., 0]
        matrix = block.attn.matrix.mean(1).unflatten(0, (len(patches), -1))  # (B, windows, n, n)
        for window, tokens in enumerate(numbers.tolist()):
            for place, token in enumerate(tokens):
                pulled[:, tokens] += patches.flatten(1)[:, token, None] * matrix[:, window, place]
        patches = (patches + pulled.view(patches.shape)) / 2
    return patches


def test_windows_of_the_helper_are_shifted_and_masked_as_in_swin() -> None:
    block = WindowBlock(8, 1, (2, 2, 2), True)
    x = torch.arange(64.0).view(1, 4, 4, 4, 1)
    windows, mask = block.windows(x)[..., 0], block.mask(x)
    assert windows[0].tolist() == [21, 22, 25, 26, 37, 38, 41, 42] and mask[0].abs().sum() == 0
    assert sorted(windows[-1].tolist()) == [0, 3, 12, 15, 48, 51, 60, 63]  # the corners, which see only themselves
    assert torch.equal(mask[-1] == 0, torch.eye(8, dtype=torch.bool))


def test_mvit_is_rolled_out_through_pooled_queries_keys_and_residuals() -> None:
    clf, clip = found_in(randomize(MViT(), 0, 0.2))
    report = models.inspect(clf, clip)
    assert report.grid == TokenGrid(4, 8, 8, 1, tubelet=(2, 4, 4)) and report.reads == "cls"
    assert [(found.queries, found.keys) for found in report.attention] == [(257, 17), (65, 65), (65, 17)]
    assert {grid.shape for grid in report.coarser} == {(4, 2, 2), (4, 4, 4)}
    assert report.patch_embedding == "embed" and report.own < 0.5
    found = STAA(clf, mode="attention", upsampling="nearest").attribute_maps(clip).joint
    clf(clip)
    expected = of_mvit(clf.module)
    pixels = torch.kron(expected, torch.ones(1, 2, 4, 4)) / 32
    torch.testing.assert_close(found, pixels, rtol=1e-4, atol=1e-8)
    assert expected.std() > 0.1 * expected.mean()


# centers of 8 cells, in cells: as measured behind overlapping convolutions, cropped by a cell, and of swapped neighbors
@pytest.mark.parametrize(
    ("centers", "placed"),
    [
        ([0.3, 0.71, 1.66, 2.71, 3.65, 4.72, 5.58, 6.11], True),
        ([0.9, 1.67, 2.45, 3.2, 3.98, 4.75, 5.5, 6.3], False),
        ([0.27, 1.04, 1.49, 2.97, 3.35, 4.93, 5.33, 6.0], False),
    ],
)
def test_centers_must_follow_the_cells_from_the_first_to_the_last_pixel(centers: list[float], placed: bool) -> None:
    rows = (torch.arange(8) + 0.5) / 8
    columns = (torch.tensor(centers) + 0.5) / 8
    tokens = torch.cartesian_prod(torch.tensor([0.2, 0.4, 0.65, 0.8]), rows, columns)  # (t * h * w, 3), 4 time steps
    found = in_order(tokens, torch.ones(len(tokens), dtype=torch.bool), (8, 32, 32))
    assert (found is not None) == placed
    if found is not None:
        index, cells, _ = found
        assert torch.equal(index, torch.arange(256)) and [(axis.count, axis.side) for axis in cells] == [
            (4, 2),
            (8, 4),
            (8, 4),
        ]


class Swaps(MViT):
    """Neighbors change their places."""

    def patches(self, clip: Tensor) -> Tensor:
        return super().patches(clip).unflatten(4, (-1, 2)).flip(5).flatten(4)


def test_overlapping_tokens_that_do_not_follow_each_other_in_order_are_not_placed() -> None:
    clf, clip = found_in(randomize(Swaps(), 0, 0.2))
    report = models.inspect(clf, clip)
    assert not report.ok and report.forwards <= 40 and "on no even grid" in report.problems[0]


def test_swin_is_rolled_out_through_windows_shifts_and_merged_patches() -> None:
    clf, clip = found_in(randomize(Swin(), 0, 0.2))
    report = models.inspect(clf, clip)
    assert report.grid == TokenGrid(4, 8, 8, tubelet=(2, 4, 4)) and report.reads == "mean"
    assert [found.layer.role for found in report.attention] == ["window"] * 4
    found = STAA(clf, mode="attention", upsampling="nearest").attribute_maps(clip).joint
    clf(clip)
    expected = of_swin(clf.module)
    torch.testing.assert_close(found, torch.kron(expected, torch.ones(1, 2, 4, 4)) / 32, rtol=1e-4, atol=1e-8)
    assert expected.std() > 0.1 * expected.mean()


# The first of three layers of the MViT attends among patches of 4 x 4 pixels, two of four of the Swin.
@pytest.mark.parametrize(("make", "side"), [(MViT, 8), (Swin, 8), (lambda: MViT(layers=1), 4)])
def test_relevance_is_smoothed_by_the_tokens_among_which_most_layers_attend(make: Any, side: int) -> None:
    clf, clip = found_in(randomize(make(), 0, 0.2))
    found = STAA(clf, pattern_weight=0).attribute_maps(clip, 1).joint
    shares = decompose(clf, clip, lambda y: class_contrast(y, y[:, 1]), tokens=clf.module.embed).contributions.sum(1)
    pixels = torch.kron(shares, torch.ones(1, 2, 4, 4)) / 32
    expected = gaussian(pixels, (0.75 * 2, 0.75 * side, 0.75 * side), keep_sums=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def weighted_attention(model: Any, clip: Tensor, target: int) -> list[Tensor]:
    """Return the positive part of gradient times attention of each layer, averaged over heads and queries."""
    attention = [module for module in model.modules() if hasattr(module, "matrix")]
    for module in attention:
        module.graph = True
    with torch.enable_grad():
        score = model(clip.requires_grad_())[:, target].sum()
        matrices = [module.matrix for module in attention]
        gradients = torch.autograd.grad(score, matrices)
    return [(a * g).clamp(min=0).mean((1, 2)).detach() for a, g in zip(matrices, gradients, strict=True)]


def enlarged(cells: Tensor) -> Tensor:
    """Repeat ``(B, t, h, w)`` to patches of 2 x 4 x 4 pixels, and divide by their number of pixels."""
    _, t, h, w = cells.shape
    return torch.kron(cells, torch.ones(1, 8 // t, 32 // h, 32 // w)) / 32


def test_layer_gradients_of_mvit_are_each_on_the_grid_of_their_keys() -> None:
    clf, clip = found_in(randomize(MViT(), 0, 0.2))
    found = STAA(clf, rule="layer_gradients", upsampling="nearest").attribute_maps(clip, target=1).joint
    layers = weighted_attention(clf.module, clip.clone(), 1)  # without the class token:
    sides = [(2, 2), (4, 4), (2, 2)]
    maps = [enlarged(layer[:, 1:].view(-1, 4, *grid)) for layer, grid in zip(layers, sides, strict=True)]
    expected = torch.stack(maps).sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-12)
    assert expected.std() > 0.1 * expected.mean()


def test_layer_gradients_of_swin_are_those_of_the_windows() -> None:
    clf, clip = found_in(randomize(Swin(), 0, 0.2))
    found = STAA(clf, rule="layer_gradients", upsampling="nearest").attribute_maps(clip, target=1).joint
    layers, expected = weighted_attention(clf.module, clip.clone(), 1), torch.zeros(())
    for block, layer, size in zip(
        [*clf.module.first, *clf.module.second], layers, [(4, 8, 8)] * 2 + [(4, 4, 4)] * 2, strict=True
    ):
        count = size[0] * size[1] * size[2]
        places = block.windows(torch.arange(count).view(1, *size, 1))[..., 0].flatten()
        cells = torch.zeros(len(clip), count)
        cells[:, places] = layer.view(len(clip), -1)
        expected = expected + enlarged(cells.view(-1, *size))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-12)
    assert expected.std() > 0.1 * expected.mean()
