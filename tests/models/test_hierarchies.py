"""MViT 2 and Swin 3D rolled out, against a slow formula from matrices that the models keep."""

from __future__ import annotations

from typing import Any

import torch
from hierarchical_models import MViT, Swin, WindowBlock
from tiny_models import randomize
from torch import Tensor
from undeclared_models import clip_of

from captum_staa import STAA, TokenGrid, VideoClassifier, models

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
