"""Cells of a clip and their mean attributions: their order, random subsets, and clips with some cells replaced."""

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
from captum_staa.masking.scores import TargetScore, with_probabilities
from captum_staa.metrics._shared import SPANNED, Axis
from captum_staa.models.classifier import VideoClassifier
from captum_staa.models.layouts import layout_of
from captum_staa.result import Array, maps_of

_PER_FRAME = 16  # default number of cells along each side of a frame


def cell_ids(
    forward_func: object,
    inputs: Tensor,
    layout: VideoLayout,
    cells: Sequence[int] | None,
    feature_mask: Tensor | None,
    axis: Axis = "joint",
) -> Tensor:
    """Return the cell that each voxel belongs to, ``(1 or B, T, H, W)`` int64 on the CPU.

    With a feature mask, its features are the cells.
    """
    check_choice("axis", axis, SPANNED)
    if feature_mask is None:
        mask = feature_masks.grid(inputs, layout, _cell(forward_func, layout.size(inputs), cells, axis))
    elif cells is not None or axis != "joint":
        raise ValueError(
            f"cells and axis must have their defaults if feature_mask is passed, because the mask defines the cells, "
            f"got {cells = }, {axis = }. Leave both out, or leave out feature_mask."
        )
    else:
        return units_for(inputs, feature_mask, layout)
    return layout.mask_to_working(mask).cpu()


def _cell(forward_func: object, sizes: dict[str, int], cells: Sequence[int] | None, axis: Axis) -> list[int]:
    """Return the sides of a cell ``(t, h, w)``: the full size along the axes that ``axis`` spans."""
    if cells is None:
        grid = forward_func.grid if isinstance(forward_func, VideoClassifier) else None
        cells = grid.tubelet if grid else (1, -(-sizes["H"] // _PER_FRAME), -(-sizes["W"] // _PER_FRAME))
    if not is_triple(cells):
        raise ValueError(f"cells must be (t, h, w), the sides of one cell in frames and pixels, got {cells!r}.")
    return [sizes[letter] if letter in SPANNED[axis] else side for letter, side in zip("THW", cells, strict=True)]


@dataclass(frozen=True)
class Cells:
    """Inputs, their baseline, and the cells that can be replaced.

    Attributes:
        forward_func: the model, as a function of clips ``(B, T, C, H, W)``.
        inputs: clips ``(B, T, C, H, W)``.
        baseline: replaces cells of the inputs; same shape as ``inputs``.
        ids: int64 ``(1 or B, T, H, W)``, 0 to n - 1.
        means: ``(B, n)`` float64 on the CPU, the mean attribution of each cell.
        present: bool ``(1 or B, n)`` on the CPU. The number of regions that follow the image can differ between clips.
        perturbations_per_eval: copies of the batch per call of the model.
    """

    forward_func: Callable[..., Any]
    inputs: Tensor
    baseline: Tensor
    ids: Tensor
    means: Tensor
    present: Tensor
    perturbations_per_eval: int

    @property
    def totals(self) -> Tensor:
        """``(1 or B, 1)`` int64 on the CPU, the number of cells of each clip."""
        return self.present.sum(1, keepdim=True)

    def check_part(self, name: str, fraction: float) -> None:
        """Raise if the fraction, rounded, is none or all of a clip's cells: then all maps get the same score."""
        if not is_number(fraction):
            raise TypeError(
                f"{name} must be a number between 0 and 1, got {fraction!r} of type {type(fraction).__name__}."
            )
        if not 0 < fraction < 1:
            raise ValueError(f"{name} must be between 0 and 1 (both excluded), got {fraction}.")
        count = self.portion(fraction)
        if bool((wrong := (count == 0) | (count == self.totals)).any()):
            raise ValueError(
                f"{name} must select at least one cell and not all cells, got {fraction} of "
                f"{int(self.totals[wrong].min())} cells, which rounds to {int(count[wrong].min())}. Change {name}, or "
                f"use smaller cells."
            )

    def check_portions(self, name: str, count: int) -> None:
        """Raise if a clip has fewer than ``count`` cells."""
        if count > (fewest := int(self.totals.min())):
            raise ValueError(f"{name} must be at most the number of cells, {fewest}, got {count}. Use smaller cells.")

    def portion(self, fraction: float) -> Tensor:
        """Return the number of cells ``(1 or B, 1)`` in a fraction of each clip's cells, rounded."""
        return (fraction * self.totals.double()).round().long()

    def ranks(self) -> Tensor:
        """Return the rank of each cell by its mean attribution, ``(B, n)``, 0 for the highest. Absent cells come last.

        Cells with equal means are ranked in a random order that is the same in every call and for every clip. If they
        were ranked by their ids, a constant map would go from the first frame to the last and could not serve as a
        control.
        """
        means = self.means.masked_fill(~self.present, -torch.inf)
        # Random keys, not a permutation: the first n keys do not depend on how many follow, so the ranks of a clip do
        # not depend on the other clips of its batch.
        shuffle = _random_keys(means.shape[1], seed=0).argsort()
        order = shuffle[means[:, shuffle].argsort(dim=1, descending=True, stable=True)]
        return order.argsort(1)

    def subset(self, size: Tensor, seed: int) -> Tensor:
        """Return a random subset of each clip's cells, bool ``(1 or B, n)``, with ``size`` ``(1 or B, 1)`` cells."""
        keys = _random_keys(self.present.shape[1], seed).where(self.present, torch.inf)
        return keys <= keys.sort(1).values.take_along_dim(size - 1, 1)

    def spread(self, values: Tensor) -> Tensor:
        """Expand one number per cell ``(P, 1 or B, n)`` to ``(P, 1 or B, T, 1, H, W)``."""
        rows = values.to(self.ids.device).take_along_dim(self.ids.flatten(1)[None], 2)  # (P, 1 or B, T * H * W)
        return rows.unflatten(2, self.ids.shape[1:])[:, :, :, None]

    def blended(self, kept: Tensor) -> Tensor:
        """Return copies ``(P * B, ...)``, batch by batch: the inputs where ``kept`` is 1, the baseline where it is 0.

        At 0 and 1, ``lerp`` returns exactly one of the two, in a fourth of the time that ``where`` takes.
        """
        return torch.lerp(self.baseline, self.inputs, kept.to(self.inputs)).flatten(0, 1)

    def altered(self, replaced: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield copies of the inputs with some cells replaced, in chunks.

        Args:
            replaced: bool ``(P, 1 or B, n)``, the cells to replace in each copy.

        Yields:
            The number of copies, and the copies ``(copies * B, ...)``.
        """
        for chunk in replaced.split(self.perturbations_per_eval):
            yield len(chunk), self.blended(self.spread((~chunk).float()))


def cells_of(
    forward_func: Callable[..., Any],
    inputs: Tensor,
    attributions: Array,
    layout: VideoLayout | str | None,
    cells: Sequence[int] | None,
    feature_mask: Tensor | None,
    baselines: BaselineType,
    perturbations_per_eval: int,
    axis: Axis = "joint",
) -> Cells:
    """Check the arguments that all metrics with a model have in common, and return them as :class:`Cells`."""
    if not callable(forward_func):
        raise TypeError(f"forward_func must be a function or a module, got {type(forward_func).__name__}.")
    layout = layout_of(forward_func, layout)
    layout.check_values(inputs, "inputs")
    inputs = inputs.detach()
    maps = maps_of(attributions, inputs, layout)
    check_perturbations_per_eval(perturbations_per_eval)
    (baseline,) = baselines_for((inputs,), baselines)
    ids = cell_ids(forward_func, inputs, layout, cells, feature_mask, axis)
    means, counts = _means(maps.cpu().flatten(1), ids.flatten(1))
    present = counts[: len(ids)] > 0
    return Cells(
        forward_func=layout.forward_from_working(forward_func),
        inputs=layout.to_working(inputs),
        baseline=layout.to_working(baseline),
        ids=ids.to(inputs.device),
        means=means,
        present=present,
        perturbations_per_eval=int(perturbations_per_eval),
    )


def _means(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the number of voxels of each cell, ``(B, n)``, from values ``(B, V)``.

    On the CPU, because the order of summation is fixed there. The rounding error of a sum depends on the number of its
    terms. The mean is clamped to the extremes of its voxels: the mean of equal values is then exactly this value, and
    cells of different size can tie.
    """
    rows = ids.expand_as(values)
    zeros = values.new_zeros(len(values), int(ids.max()) + 1)
    counts = zeros.scatter_add(1, rows, torch.ones_like(values))
    lowest, highest = (zeros.scatter_reduce(1, rows, values, how, include_self=False) for how in ("amin", "amax"))
    return (zeros.scatter_add(1, rows, values) / counts.clamp_min(1)).clamp(lowest, highest), counts


def _random_keys(count: int, seed: int) -> Tensor:
    """Return random numbers in [0, 1), ``(count,)`` float64 on the CPU."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Order = Literal["morf", "lerf"]
Output = Literal["probability", "logit"]


def score_of(
    forward_func: Callable[..., Any], target: TargetType, additional_forward_args: object, output: Output, batch: int
) -> TargetScore:
    """Return a score that is the probability of the target, or the output of the target."""
    check_choice("output", output, ("probability", "logit"))
    if output == "probability" and target is None:
        raise ValueError(
            "target must be a class index if output is 'probability', got None. Pass target=class index (or one per "
            "example)."
        )
    if output == "probability":
        fix = "pass output='logit' to take the target's output as it is"
        forward_func = with_probabilities(forward_func, forward_func, fix)
    return TargetScore(forward_func, target, additional_forward_args, batch)


def counts_of(cells: Cells, steps: int) -> Tensor:
    """Return the number of inserted cells after each step, ``(steps + 1, B)``: ``k * n / steps``, halves rounded up."""
    k = torch.arange(steps + 1)[:, None]
    totals = cells.totals.T.expand(1, len(cells.inputs))
    return (2 * k * totals + steps) // (2 * steps)


@torch.no_grad()
def walk(cells: Cells, score: TargetScore, order: Order, counts: Tensor) -> Tensor:
    """Return the scores ``(S, B)``, float64, with the first ``counts`` ``(S, B)`` cells kept and the rest replaced."""
    ranks = cells.ranks()
    positions = cells.spread((ranks if order == "morf" else cells.totals - 1 - ranks)[None].float())
    shape = (-1, counts.shape[1], *[1] * (cells.inputs.ndim - 1))
    scores = []
    for chunk in counts.split(cells.perturbations_per_eval):
        kept = (chunk.to(positions).view(shape) - positions).clamp_(0, 1)  # integers: 1 if position < count, else 0
        scores.append(score((cells.blended(kept),), len(chunk)))  # a new tensor: the model may write to it
    return torch.cat(scores).double()
