"""Cells of a clip with the mean attribution of each: their ranks, random subsets, and clips without some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_staa._captum import BaselineType
from captum_staa.layout import VideoLayout
from captum_staa.metrics._metric import Array
from captum_staa.metrics._units import maps_of, units_of
from captum_staa.models.layouts import layout_of
from captum_staa.perturbation.arguments import baselines_for, check_perturbations_per_eval


@dataclass(frozen=True)
class Cells:
    """A clip, and what may be replaced of it.

    Attributes:
        clip: in its layout.
        cover: what replaces it, broadcastable to it.
        layout: the order of its axes.
        ids: int64 ``(1 or B, T, H, W)``, 0 .. n-1.
        means: ``(B, n)`` float64 on the CPU, the mean attribution of each cell.
        present: bool ``(1 or B, n)`` on the CPU; regions that follow the picture may be fewer in one clip than another.
        per_eval: copies of the batch in a call of the model.
    """

    clip: Tensor
    cover: Tensor
    layout: VideoLayout
    ids: Tensor
    means: Tensor
    present: Tensor
    per_eval: int

    @property
    def fewest(self) -> int:
        """How many cells the clip that has the fewest has."""
        return int(self.present.sum(1).min())

    def portion(self, fraction: float) -> Tensor:
        """``(1 or B, 1)``: how many of a clip's cells a fraction is, rounded."""
        return (fraction * self.present.sum(1, keepdim=True).double()).round().long()

    def ranks(self) -> Tensor:
        """``(B, n)``: the place of each cell by its mean, 0 for the highest; absent ones come last.

        Equal means are ranked at random, the same way in every call and clip: by their ids, a flat map would be a
        sweep from the first frame to the last, and no control.
        """
        means = self.means.masked_fill(~self.present, -torch.inf)
        # Random keys, not a permutation: the first n are the same for every longer row of cells, so that no clip's
        # ranks depend on the others of its batch.
        shuffle = _random_keys(means.shape[1], seed=0).argsort()
        order = shuffle[means[:, shuffle].argsort(dim=1, descending=True, stable=True)]
        return order.argsort(1)

    def subset(self, held: Tensor, seed: int) -> Tensor:
        """Bool ``(1 or B, n)``: ``held`` ``(1 or B, 1)`` random cells of each clip."""
        keys = _random_keys(self.present.shape[1], seed).where(self.present, torch.inf)
        return keys <= keys.sort(1).values.take_along_dim(held - 1, 1)

    def altered(self, replaced: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Copies of the clips, batch after batch, in chunks.

        Args:
            replaced: bool ``(P, 1 or B, n)``, the cells to replace in each copy.

        Yields:
            How many copies, and the clips ``(copies * B, ...)``.
        """
        ids = self.ids.flatten(1)[None]  # (1, 1 or B, T * H * W)
        for choices in replaced.split(self.per_eval):
            rows = choices.to(ids.device).take_along_dim(ids, 2)  # (copies, 1 or B, T * H * W)
            hidden = rows.flatten(0, 1).unflatten(1, self.ids.shape[1:])[:, :, None]
            mask = self.layout.from_working(hidden).unflatten(0, rows.shape[:2])  # (copies, 1 or B, ...), one channel
            yield len(choices), torch.where(mask, self.cover, self.clip).flatten(0, 1)


def cells_of(
    forward_func: Callable[..., Any],
    clip: Tensor,
    attributions: Array,
    layout: VideoLayout | str | None,
    cells: Sequence[int] | None,
    feature_mask: Tensor | None,
    baselines: BaselineType,
    perturbations_per_eval: int,
) -> Cells:
    """The checked arguments that every metric with a model shares, as :class:`Cells`."""
    if not callable(forward_func):
        raise TypeError(f"forward_func is a function or module, but {type(forward_func).__name__} came")
    layout = layout_of(forward_func, layout)
    layout.check_values(clip, "clip")
    clip = clip.detach()
    maps = maps_of(attributions, clip, layout)
    check_perturbations_per_eval(perturbations_per_eval)
    (cover,) = baselines_for((clip,), baselines)
    ids = units_of(forward_func, clip, layout, cells, feature_mask)
    # On the CPU, where sums are added up in a fixed order. Less one of its values, a flat map is exactly flat.
    rows = ids.flatten(1).expand(len(clip), -1)  # (B, T * H * W)
    flat = maps.cpu().flatten(1)
    sums = torch.zeros(len(clip), int(ids.max()) + 1, dtype=torch.float64)
    counts = torch.zeros_like(sums).scatter_add_(1, rows, torch.ones_like(flat))
    sums.scatter_add_(1, rows, flat - flat[:, :1])
    means = flat[:, :1] + sums / counts.clamp_min(1)
    return Cells(clip, cover, layout, ids.to(clip.device), means, counts[: len(ids)] > 0, perturbations_per_eval)


def _random_keys(count: int, seed: int) -> Tensor:
    """``(count,)`` float64 in 0 .. 1, on the CPU."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
