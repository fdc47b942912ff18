"""Masks of an asked area: exactly, by a threshold, or nearly, by a penalty that grows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_staa.perturbation.mask_grid import Field

_HALVINGS = 30


def masks_with_area(scores: Tensor, areas: Tensor, field: Field, softness: float, *, per_frame: bool = False) -> Tensor:
    """Nested masks of exactly these areas: a sigmoid of the scores over the threshold that leaves the area.

    Example:
        >>> from captum_staa.perturbation.mask_grid import RegionField
        >>> field = RegionField(torch.arange(4).view(1, 1, 2, 2))
        >>> scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
        >>> masks_with_area(scores, torch.tensor([[0.5, 0.25]]), field, softness=0.01)
        tensor([[[1., 1., 0., 0.],
                 [1., 0., 0., 0.]]])

    The threshold moves with the scores, and gradients pass through it: raising all scores changes nothing.

    Args:
        scores: ``(B, n)``, one number per cell or region of the field.
        areas: ``(1 or B, A)``, parts of the volume in (0, 1).
        field: says how much of the volume each number stands for.
        softness: width of the sigmoid, in units of the scores; a hundredth of their spread is nearly a step.
        per_frame: the same area in every slice of time, instead of over all of them.

    Returns:
        ``(B, A, n)`` in [0, 1].
    """
    slices = field.slices if per_frame else 1
    values = scores.unflatten(1, (slices, -1))[:, None]  # (B, 1, slices, n / slices)
    shares = _shares(field, slices)[:, None]
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
        # How the threshold follows the scores, from the area's being constant: sum of shares * slope * (dv - dt) = 0.
        mask = ((values - threshold) / softness).sigmoid()
        slope = mask * (1 - mask) * shares
        slope = slope / slope.sum(3, keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
    moving = threshold + (slope * (values - values.detach())).sum(3, keepdim=True)
    return ((values - moving) / softness).sigmoid().flatten(2)


def rank_penalty(values: Tensor, areas: Tensor, field: Field, *, per_frame: bool = False) -> Tensor:
    """How far sorted masks are from a step that leaves the area: 0 where this much is at 1, and all else at 0.

    Example:
        >>> from captum_staa.perturbation.mask_grid import RegionField
        >>> field = RegionField(torch.arange(4).view(1, 1, 2, 2))
        >>> masks = torch.tensor([[[0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]])
        >>> rank_penalty(masks, torch.tensor([0.25, 0.25]), field)  # fits; three cells of four are 1 too high
        tensor([[0.0000, 0.7500]])

    ``R = sum over cells of share * (m - r)^2``, where ``m`` are the numbers in ascending order, and ``r`` is 0 up to
    the share ``1 - a`` of the volume, and 1 beyond it. For cells of one size that is the mean of the papers.

    Args:
        values: ``(B, A, n)`` in [0, 1].
        areas: ``(A,)``.
        field: says how much of the volume each number stands for.
        per_frame: sort within every slice of time.

    Returns:
        ``(B, A)``.

    Reference:
        Fong, Patrick and Vedaldi, "Understanding Deep Networks via Extremal Perturbations and Smooth Masks", ICCV 2019,
        equation 3.
    """
    slices = field.slices if per_frame else 1
    parts = values.unflatten(2, (slices, -1))  # (B, A, slices, n / slices)
    shares = _shares(field, slices)[:, None].expand_as(parts)
    ordered, order = parts.sort(dim=3)
    widths = shares.gather(3, order)
    filled = widths.cumsum(3) - (1 - areas[:, None, None])  # of a slice, what lies above 1 - a
    # A cell that straddles the step is asked for the part of it that lies beyond.
    template = (filled / widths.clamp_min(torch.finfo(widths.dtype).tiny)).clamp(0, 1)
    shared = shared_among_equals(ordered.detach(), template, widths)
    return (widths * (ordered.square() - 2 * ordered * shared + template.square())).sum(3).mean(2)


def shared_among_equals(ordered: Tensor, template: Tensor, widths: Tensor) -> Tensor:
    """What equal numbers are asked for, as a mean over them.

    A sort puts them in an order of its own, and would pull some to 0 and others to 1 for no reason: of masks that begin
    at 1 everywhere, that alone would decide what stays.

    Args:
        ordered: ``(..., n)``, ascending.
        template: of its shape.
        widths: of its shape, the weight of each.

    Returns:
        Like ``template``.
    """
    nearly = 1e-6 * ordered.abs().amax(-1, keepdim=True)  # interpolation leaves equal numbers apart by their rounding
    ends = [
        torch.searchsorted(ordered.contiguous(), (ordered + shift).contiguous(), right=right)
        for shift, right in ((-nearly, False), (nearly, True))
    ]

    def between(values: Tensor) -> Tensor:
        sums = F.pad(values.cumsum(-1), (1, 0))
        first, last = (sums.gather(-1, end) for end in ends)
        return last - first

    return between(widths * template) / between(widths).clamp_min(torch.finfo(widths.dtype).tiny)


def _shares(field: Field, slices: int) -> Tensor:
    """``(1 or B, slices, n / slices)``, of each slice: its own sum is 1, also where it is shorter than others."""
    shares = field.shares.unflatten(1, (slices, -1))
    return shares / shares.sum(2, keepdim=True)
