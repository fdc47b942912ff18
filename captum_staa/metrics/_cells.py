"""Cells of a clip with the mean attribution of each: their order, random subsets, and clips without some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from captum_staa import feature_masks
from captum_staa._utils.captum import BaselineType, TargetType
from captum_staa._utils.checks import check_choice, is_number, is_triple
from captum_staa.layout import VideoLayout
from captum_staa.masking.arguments import baselines_for, check_perturbations_per_eval, units_for
from captum_staa.masking.scores import TargetScore, over_classes
from captum_staa.metrics._shared import SPANNED, Axis
from captum_staa.models.classifier import VideoClassifier
from captum_staa.models.layouts import layout_of
from captum_staa.result import Array, maps_of

_PER_FRAME = 16  # cells along each side of a frame where nothing is said


def cell_ids(
    forward_func: object,
    clip: Tensor,
    layout: VideoLayout,
    cells: Sequence[int] | None,
    feature_mask: Tensor | None,
    axis: Axis = "joint",
) -> Tensor:
    """Which cell each voxel belongs to, ``(1 or B, T, H, W)`` int64 on the CPU; the features of a mask are such."""
    check_choice("axis", axis, SPANNED)
    if feature_mask is None:
        mask = feature_masks.grid(clip, layout, _cell(forward_func, layout.size(clip), cells, axis))
    elif cells is not None or axis != "joint":
        raise ValueError(
            f"a feature_mask says itself how far its cells reach, got {cells = }, {axis = } with it; leave both "
            f"out, or leave out the mask"
        )
    else:
        return units_for(clip, feature_mask, layout)
    return layout.to_working(mask)[:, :, 0].cpu()


def _cell(forward_func: object, sizes: dict[str, int], cells: Sequence[int] | None, axis: Axis) -> list[int]:
    """Sides of a cell ``(t, h, w)``, those that ``axis`` spans made whole."""
    if cells is None:
        grid = forward_func.grid if isinstance(forward_func, VideoClassifier) else None
        cells = grid.tubelet if grid else (1, -(-sizes["H"] // _PER_FRAME), -(-sizes["W"] // _PER_FRAME))
    if not is_triple(cells):
        raise ValueError(f"cells is (t, h, w), the sides of one in frames and pixels, got {cells!r}")
    return [sizes[letter] if letter in SPANNED[axis] else side for letter, side in zip("THW", cells, strict=True)]


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
        perturbations_per_eval: copies of the batch in a call of the model.
    """

    clip: Tensor
    cover: Tensor
    layout: VideoLayout
    ids: Tensor
    means: Tensor
    present: Tensor
    perturbations_per_eval: int

    @property
    def totals(self) -> Tensor:
        """``(1 or B, 1)`` int64 on the CPU, how many cells each clip has."""
        return self.present.sum(1, keepdim=True)

    def check_part(self, name: str, fraction: float) -> None:
        """Raise where a fraction of a clip's cells, rounded, is none of them or all: any map has the same."""
        if not is_number(fraction):
            raise TypeError(f"{name} is a number between 0 and 1, got {fraction!r}")
        if not 0 < fraction < 1:
            raise ValueError(f"{name} is a number between 0 and 1, got {fraction}")
        count = self.portion(fraction)
        if bool((wrong := (count == 0) | (count == self.totals)).any()):
            raise ValueError(
                f"{name} is the part of the cells that a subset holds, one at least and not all, but {fraction} of "
                f"{int(self.totals[wrong].min())} cells came; change it, or use more cells"
            )

    def check_portions(self, name: str, count: int) -> None:
        """Raise where a clip has fewer cells than it is to be divided into."""
        if count > (fewest := int(self.totals.min())):
            raise ValueError(f"{name} is at most the number of cells, {fewest}, got {count}; use smaller cells")

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
        for choices in replaced.split(self.perturbations_per_eval):
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
        raise TypeError(f"forward_func is a function or module, got {type(forward_func).__name__}")
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


Order = Literal["morf", "lerf"]
Output = Literal["probability", "logit"]


def score_of(
    forward_func: Callable[..., Any], target: TargetType, additional_forward_args: object, output: Output, batch: int
) -> TargetScore:
    """The target's probability, or its output as it comes."""
    check_choice("output", output, ("probability", "logit"))
    if output == "probability" and target is None:
        raise ValueError("a probability is that of a class: pass target=class index (or one per example)")
    if output == "probability":
        way_out = "pass output='logit' to take the target's output as it is"
        forward_func = over_classes(forward_func, lambda logits: logits.softmax(1), way_out)
    return TargetScore(forward_func, target, additional_forward_args, batch)


def counts_of(cells: Cells, steps: int) -> Tensor:
    """Cells inserted after each step, ``(steps + 1, B)``: ``k * n / steps``, halves rounded up."""
    k = torch.arange(steps + 1)[:, None]
    totals = cells.totals.T.expand(1, len(cells.clip))
    return (2 * k * totals + steps) // (2 * steps)


@torch.no_grad()
def walk(cells: Cells, score: TargetScore, order: Order, counts: Tensor) -> Tensor:
    """The scores ``(S, B)`` of clips that show their first ``counts`` ``(S, B)`` cells, and else the cover; float64."""
    ranks = cells.ranks()
    places = cells.spread((ranks if order == "morf" else cells.totals - 1 - ranks)[None].float())
    shape = (-1, counts.shape[1], *[1] * (cells.clip.ndim - 1))
    found = []
    for chunk in counts.split(cells.perturbations_per_eval):
        shown = (chunk.to(places).view(shape) - places).clamp_(0, 1)  # whole numbers: 1 where place < count, else 0
        found.append(score((cells.blended(shown),), len(chunk)))  # a new tensor, the model may write into it
    return torch.cat(found).double()
