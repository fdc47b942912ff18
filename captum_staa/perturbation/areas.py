"""Constrain the area of masks: exactly, by a threshold on scores, or approximately, by a penalty on sorted values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_staa.perturbation.mask_grid import MaskGrid

_HALVINGS = 30


def masks_with_area(
    scores: Tensor, areas: Tensor, grid: MaskGrid, softness: float, *, per_frame: bool = False
) -> Tensor:
    """Return nested masks of exactly these areas: a sigmoid of the scores minus a threshold, one threshold per area.

    Example:
        >>> from captum_staa.perturbation.mask_grid import RegionGrid
        >>> grid = RegionGrid(torch.arange(4).view(1, 1, 2, 2))
        >>> scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
        >>> masks_with_area(scores, torch.tensor([[0.5, 0.25]]), grid, softness=0.01)
        tensor([[[1., 1., 0., 0.],
                 [1., 0., 0., 0.]]])

    The threshold is a differentiable function of the scores. Adding a constant to all scores does not change the masks.

    Args:
        scores: ``(B, n)``, one score per cell or region of the grid.
        areas: ``(1 or B, A)``, fractions of the clip's volume, in (0, 1).
        grid: gives the share of the volume that each score covers.
        softness: width of the sigmoid, in units of the scores. At 1/100 of the spread of the scores, the sigmoid is
            almost a step function.
        per_frame: if True, each time slice has the area. If False, the whole volume has it.

    Returns:
        Masks ``(B, A, n)`` in [0, 1].
    """
    slices = grid.slices if per_frame else 1
    values = scores.unflatten(1, (slices, -1))[:, None]  # (B, 1, slices, n / slices)
    shares = _shares(grid, slices)[:, None]
    wanted = areas[..., None, None]  # (1 or B, A, 1, 1)
    with torch.no_grad():
        low, high = (
            end.expand(-1, areas.shape[1], -1, -1)
            for end in (values.amin(3, keepdim=True) - 20 * softness, values.amax(3, keepdim=True) + 20 * softness)
        )
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            large = (((values - middle) / softness).sigmoid() * shares).sum(3, keepdim=True) > wanted
            low, high = middle.where(large, low), high.where(large, middle)
        threshold = (low + high) / 2
        # The derivative of the threshold follows from the constant area: sum of shares * slope * (dv - dt) = 0.
        mask = ((values - threshold) / softness).sigmoid()
        slope = mask * (1 - mask) * shares
        slope = slope / slope.sum(3, keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
    moving = threshold + (slope * (values - values.detach())).sum(3, keepdim=True)
    return ((values - moving) / softness).sigmoid().flatten(2)


def rank_penalty(values: Tensor, areas: Tensor, grid: MaskGrid, *, per_frame: bool = False) -> Tensor:
    """Return the squared distance of sorted masks from a step function of this area; 0 for a binary mask of the area.

    Example:
        >>> from captum_staa.perturbation.mask_grid import RegionGrid
        >>> grid = RegionGrid(torch.arange(4).view(1, 1, 2, 2))
        >>> masks = torch.tensor([[[0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]])
        >>> rank_penalty(masks, torch.tensor([0.25, 0.25]), grid)  # exact; three of four cells are 1 too high
        tensor([[0.0000, 0.7500]])

    ``R = sum over cells of share * (m - r)^2``. Here ``m`` are the mask values in ascending order, and ``r`` is 0 for
    the first ``1 - a`` of the volume and 1 for the rest. For cells of equal size, this is the mean in the papers.

    Args:
        values: masks ``(B, A, n)`` in [0, 1].
        areas: ``(A,)``, fractions of the clip's volume, in (0, 1).
        grid: gives the share of the volume that each value covers.
        per_frame: if True, sort within each time slice. If False, sort over the whole volume.

    Returns:
        Penalties ``(B, A)``, at least 0.

    Reference:
        Fong, Patrick and Vedaldi, "Understanding Deep Networks via Extremal Perturbations and Smooth Masks", ICCV 2019,
        equation 3.
    """
    slices = grid.slices if per_frame else 1
    parts = values.unflatten(2, (slices, -1))  # (B, A, slices, n / slices)
    shares = _shares(grid, slices)[:, None].expand_as(parts)
    ordered, order = parts.sort(dim=3)
    widths = shares.gather(3, order)
    filled = widths.cumsum(3) - (1 - areas[:, None, None])  # volume of the slice above 1 - a
    # The target of a cell that straddles the step is the fraction of the cell above the step.
    template = (filled / widths.clamp_min(torch.finfo(widths.dtype).tiny)).clamp(0, 1)
    shared = shared_among_equals(ordered.detach(), template, widths)
    return (widths * (ordered.square() - 2 * ordered * shared + template.square())).sum(3).mean(2)


def shared_among_equals(ordered: Tensor, template: Tensor, widths: Tensor) -> Tensor:
    """Return the template with the targets of equal values replaced by their mean.

    The order of equal values after a sort is arbitrary. Without the mean, this order alone would pull some of them to 0
    and others to 1. Masks that start at 1 everywhere would then depend on the sort and not on the model.

    Args:
        ordered: ``(..., n)``, values in ascending order.
        template: ``(..., n)``, the target of each value.
        widths: ``(..., n)``, the weight of each value.

    Returns:
        Targets ``(..., n)``.
    """
    nearly = 1e-6 * ordered.abs().amax(-1, keepdim=True)  # interpolation separates equal values by rounding errors
    ends = [
        torch.searchsorted(ordered.contiguous(), (ordered + shift).contiguous(), right=right)
        for shift, right in ((-nearly, False), (nearly, True))
    ]

    def between(values: Tensor) -> Tensor:
        sums = F.pad(values.cumsum(-1), (1, 0))
        first, last = (sums.gather(-1, end) for end in ends)
        return last - first

    return between(widths * template) / between(widths).clamp_min(torch.finfo(widths.dtype).tiny)


def _shares(grid: MaskGrid, slices: int) -> Tensor:
    """Return shares ``(1 or B, slices, n / slices)``, normalized so that each slice sums to 1."""
    shares = grid.shares.unflatten(1, (slices, -1))
    return shares / shares.sum(2, keepdim=True)
