"""Cells of a clip with the mean attribution of each: their order, random subsets, and clips without some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_staa._captum import BaselineType
from captum_staa.checks import is_number
from captum_staa.layout import VideoLayout
from captum_staa.maps import Array, maps_of
from captum_staa.metrics._axis import Axis
from captum_staa.metrics._cell_ids import cell_ids
from captum_staa.models.layouts import layout_of
from captum_staa.perturbation.arguments import baselines_for, check_perturbations_per_eval


@dataclass(frozen=True)
class Cells:
    """A clip, and what may be replaced of it.

    Attributes:
        clip: in its layout.
        cover: what replaces it, of its shape.
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
    def totals(self) -> Tensor:
        """``(1 or B, 1)`` int64 on the CPU, how many cells each clip has."""
        return self.present.sum(1, keepdim=True)

    def check_part(self, name: str, fraction: float) -> None:
        """Raise where a fraction of a clip's cells, rounded, is none of them or all: any map has the same."""
        if not is_number(fraction):
            raise TypeError(f"{name} is a number between 0 and 1, but {fraction!r} came")
        if not 0 < fraction < 1:
            raise ValueError(f"{name} is a number between 0 and 1, but {fraction} came")
        count = self.portion(fraction)
        if bool((wrong := (count == 0) | (count == self.totals)).any()):
            raise ValueError(
                f"{name} is the part of the cells that a subset holds, one at least and not all, but {fraction} of "
                f"{int(self.totals[wrong].min())} cells came; change it, or use more cells"
            )

    def check_portions(self, name: str, count: int) -> None:
        """Raise where a clip has fewer cells than it is to be divided into."""
        if count > (fewest := int(self.totals.min())):
            raise ValueError(f"{name} is at most the number of cells, {fewest}, but {count} came; use smaller cells")

    def portion(self, fraction: float) -> Tensor:
        """``(1 or B, 1)``: how many of a clip's cells a fraction is, rounded."""
        return (fraction * self.totals.double()).round().long()

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

    def spread(self, values: Tensor) -> Tensor:
        """A number per cell ``(P, 1 or B, n)`` to the clip's axes behind ``P``, of size 1 along channels."""
        rows = values.to(self.ids.device).take_along_dim(self.ids.flatten(1)[None], 2)  # (P, 1 or B, T * H * W)
        voxels = rows.flatten(0, 1).unflatten(1, self.ids.shape[1:])[:, :, None]
        return self.layout.from_working(voxels).unflatten(0, rows.shape[:2])

    def blended(self, shown: Tensor) -> Tensor:
        """Copies ``(P * B, ...)`` of the clips, batch after batch: the clip where ``shown`` is 1, the cover where 0.

        ``lerp`` gives exactly the one or the other, in a fourth of the time that ``where`` takes.
        """
        return torch.lerp(self.cover, self.clip, shown.to(self.clip)).flatten(0, 1)

    def altered(self, replaced: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Copies of the clips, in chunks.

        Args:
            replaced: bool ``(P, 1 or B, n)``, the cells to replace in each copy.

        Yields:
            How many copies, and the clips ``(copies * B, ...)``.
        """
        for choices in replaced.split(self.per_eval):
            yield len(choices), self.blended(self.spread((~choices).float()))


def cells_of(
    forward_func: Callable[..., Any],
    clip: Tensor,
    attributions: Array,
    layout: VideoLayout | str | None,
    cells: Sequence[int] | None,
    feature_mask: Tensor | None,
    baselines: BaselineType,
    perturbations_per_eval: int,
    axis: Axis = "joint",
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
    ids = cell_ids(forward_func, clip, layout, cells, feature_mask, axis)
    means, counts = _means(maps.cpu().flatten(1), ids.flatten(1))
    present = counts[: len(ids)] > 0
    return Cells(clip, cover, layout, ids.to(clip.device), means, present, int(perturbations_per_eval))


def _means(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the number of voxels of each cell, ``(B, n)``, of ``(B, V)``; on the CPU, where sums have an order.

    The rounding of a sum depends on the number of its terms. Held within the extremes of its voxels, the mean of a cell
    of one value is this value, so that cells of different size can tie.
    """
    rows = ids.expand_as(values)
    zeros = values.new_zeros(len(values), int(ids.max()) + 1)
    counts = zeros.scatter_add(1, rows, torch.ones_like(values))
    lowest, highest = (zeros.scatter_reduce(1, rows, values, how, include_self=False) for how in ("amin", "amax"))
    return (zeros.scatter_add(1, rows, values) / counts.clamp_min(1)).clamp(lowest, highest), counts


def _random_keys(count: int, seed: int) -> Tensor:
    """``(count,)`` float64 in 0 .. 1, on the CPU."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
