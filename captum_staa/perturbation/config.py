"""What is learned and how: the objective, the regularizers, and presets that choose among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_staa._utils.checks import check_choice, check_count
from captum_staa.perturbation.blends import BLENDS, BlendName
from captum_staa.perturbation.masks import Nested, Parametrization, Separate, shared_among_equals

EVALUATE_EVERY = 10  # steps; an evaluation costs less than these steps

# --- objective ----------------------------------------------------------------------------------------------------

Objective = Literal["preserve", "delete", "dual"]
OBJECTIVES: dict[Objective, tuple[bool, ...]] = {"preserve": (False,), "delete": (True,), "dual": (False, True)}
"""The kinds of perturbed clips of each objective: whether the mask's selection is removed (True) or kept (False)."""

Scale = Literal["odds", "log_probability", "margin", "logit"]
SCALES: tuple[Scale, ...] = get_args(Scale)


def losses(scale: Scale, scores: Tensor, removed: Tensor, baseline_scores: Tensor) -> Tensor:
    """Return the loss of each perturbed clip, computed from the target's score for it.

    Example:
        >>> scores = torch.tensor([[0.9], [0.2]]).logit()  # the mask's selection is kept, then removed
        >>> baseline_scores = torch.tensor([0.2]).logit()  # everything is removed
        >>> losses("odds", scores, torch.tensor([False, True]), baseline_scores).exp().flatten()  # 1 / .9, and 1 + 1
        tensor([1.1111, 2.0000])

    Args:
        scale: as for :class:`PerturbationConfig`.
        scores: ``(P, B)``, the target's log odds, or its output for ``"logit"``.
        removed: ``(P,)`` bool, whether the mask's selection is removed (True) or kept (False).
        baseline_scores: ``(B,)``, the scores of the clips from which everything is removed.

    Returns:
        Losses ``(P, B)``.
    """
    removed = removed[:, None]
    if scale in ("logit", "margin"):
        return torch.where(removed, scores, -scores)
    reference = baseline_scores if scale == "odds" else 0
    return torch.where(removed, F.softplus(scores - reference), F.softplus(-scores))


# --- regularizers -------------------------------------------------------------------------------------------------

Regularizer = Callable[[Tensor, Tensor], Tensor]
"""Function from masks ``(B, A, T, H, W)`` and their areas ``(A,)`` to penalties ``(B, A)``."""


@dataclass(frozen=True)
class TotalVariation:
    """Total variation along lines through the clip, as a mean over lines: for a binary mask, its surface.

    Example:
        >>> masks = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(1, 1, 4, 1, 1)  # rises once in four frames
        >>> TotalVariation(space=1.0, time=3.0)(masks, torch.tensor([0.5]))
        tensor([[3.]])

    ``sum over axes of weight * mean over lines of sum |m_(i+1) - m_i|``. It does not depend on the resolution.

    Args:
        space: weight of lines along height and width.
        time: weight of lines along time.
    """

    space: float = 0.2
    time: float = 0.5

    def __call__(self, masks: Tensor, areas: Tensor) -> Tensor:
        """Return penalties ``(B, A)``."""
        return _along_lines(masks, self.space, self.time, lambda steps, size: steps.abs())


@dataclass(frozen=True)
class SquaredDifferences:
    """Squared slope along lines through the clip, as a mean over lines. Softer edges cost less.

    Example:
        >>> steps = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.25, 0.75, 1.0]]).view(1, 2, 1, 1, 4)
        >>> SquaredDifferences(space=1.0)(steps, torch.tensor([0.5, 0.5]))
        tensor([[4.0000, 1.5000]])

    ``sum over axes of weight * mean over lines of n sum (m_(i+1) - m_i)^2``. For a line of ``n`` voxels and length 1,
    this is the integral of the squared slope.

    Args:
        space: weight of lines along height and width.
        time: weight of lines along time.
    """

    space: float = 0.02
    time: float = 0.05

    def __call__(self, masks: Tensor, areas: Tensor) -> Tensor:
        """Return penalties ``(B, A)``."""
        return _along_lines(masks, self.space, self.time, lambda steps, size: size * steps.square())


@dataclass(frozen=True)
class Ellipsoid:
    """Regularizer of the STEP paper: ellipsoidal windows should be full or empty, as many full as the area allows.

    ``L = weight (1/S sum_(i <= S) (c_i - 1)^2 + 1/(W - S) sum_(i > S) c_i^2)``. Here ``c`` are the means of the mask
    over W windows in descending order. The windows are ellipsoids of ``frames`` by ``pixels``.

    Example:
        >>> masks = torch.zeros(1, 2, 8, 16, 16)
        >>> masks[:, :, :, :, :8] = 1  # the left half
        >>> masks[:, 1] = masks[:, 1, :, :, torch.randperm(16, generator=torch.Generator().manual_seed(0))]
        >>> Ellipsoid(frames=4, side=0.25)(masks, torch.tensor([0.5, 0.5]))  # one connected half, and stripes
        tensor([[0.056, 0.097]])

    Args:
        frames: length of a window along time, in frames.
        side: height and width of a window, as a fraction of the frame's shorter side. The paper uses 11 of 112 pixels.
        weight: weight of the term.
        start: number of steps without the term. The paper uses a weight of 300 after 100 steps.

    Note:
        This differs from the paper's code, which is not consistent. Here a window's mean is over the voxels inside the
        clip, also at the border. Windows overlap, at a distance of half a window, so ``S = a W`` of W windows can be
        full for a mask of area ``a``. The paper's code counts windows as if they did not overlap, so its two terms
        require different areas.

    Reference:
        Li et al., "Spatio-Temporal Perturbations for Video Attribution", IEEE TCSVT (2021), equation 7.
    """

    frames: int = 8
    side: float = 11 / 112
    weight: float = 1.0
    start: int = 0

    def __call__(self, masks: Tensor, areas: Tensor) -> Tensor:
        """Return penalties ``(B, A)``."""
        means = self.windows(masks)  # (B, A, W)
        ordered = means.sort(dim=2).values
        count = ordered.shape[2]
        if count == 1:
            return torch.zeros_like(means[:, :, 0])
        full_count = (areas * count).round().clamp(1, count - 1)[:, None]  # at least one full and one empty window
        full = (torch.arange(count, device=masks.device) >= count - full_count).to(masks).expand_as(ordered)
        targets = shared_among_equals(ordered.detach(), full, torch.ones_like(full))
        high = (ordered - 1).square() * targets / full_count
        return self.weight * (high + ordered.square() * (1 - targets) / (count - full_count)).sum(2)

    def windows(self, masks: Tensor) -> Tensor:
        """Return the mean of the mask over each window, ``(B, A, W)``."""
        size = masks.shape[2:]
        pixels = max(1, round(self.side * min(size[1:])))
        sides = [min(length, limit) for length, limit in zip((self.frames, pixels, pixels), size, strict=True)]
        axes = [(2 * torch.arange(side) + 1) / side - 1 for side in sides]  # voxel centers, in -1 .. 1
        inside = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0) <= 1
        kernel = inside.to(masks)[None, None]
        stride, padding = [max(1, side // 2) for side in sides], [side // 2 for side in sides]
        sums = F.conv3d(masks.flatten(0, 1)[:, None], kernel, stride=stride, padding=padding)
        voxels = F.conv3d(torch.ones_like(masks[:1, :1]), kernel, stride=stride, padding=padding)
        return (sums / voxels.clamp_min(1)).flatten(1).unflatten(0, masks.shape[:2])


REGULARIZERS: dict[str, Regularizer | None] = {
    "none": None,
    "tv": TotalVariation(),
    "squared": SquaredDifferences(),
    "ellipsoid": Ellipsoid(),
}


def _along_lines(masks: Tensor, space: float, time: float, cost: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return the weighted sum over axes of the mean over lines of the summed costs of steps between neighbors."""
    total = masks.new_zeros(masks.shape[:2])
    for axis, weight in ((2, time), (3, space), (4, space)):
        size = masks.shape[axis]
        if weight and size > 1:
            total = total + weight * (size - 1) * cost(masks.diff(dim=axis), size).mean((2, 3, 4))
    return total


# --- presets ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerturbationConfig:
    """Options of :class:`captum_staa.SpatioTemporalPerturbation` that do not depend on the clip.

    Example:
        >>> PRESETS["nested"].changed(scale="logit", regularizer="tv").regularizer
        TotalVariation(space=0.2, time=0.5)

    Args:
        parametrization: :class:`Nested` masks of one score, or :class:`Separate` masks.
        areas: fractions of the clip's volume that the masks keep, in (0, 1).
        objective: ``"preserve"``: what a mask selects is sufficient for the prediction. ``"delete"``: it is necessary.
            ``"dual"``: both.
        scale: how the loss depends on the target's probability ``p``.

            - ``"odds"``: ``-log p`` if the selection is kept. If it is removed, ``log(1 + odds / odds_0)``, where
              ``odds = p / (1 - p)`` and ``odds_0`` are the odds of a clip from which everything is removed. This loss
              is almost flat for odds far below ``odds_0``. Such odds need evidence for another class, not only missing
              evidence for the target.
            - ``"log_probability"``: ``-log p`` and ``-log(1 - p)``, as in the papers.
            - ``"margin"``: the log odds, without bounds: minus the log odds if the selection is kept, plus if removed.
            - ``"logit"``: the target's output, in the same way. For outputs that are not the logits of classes. A model
              with one output always uses this scale.

        regularizer: function from masks ``(B, A, T, H, W)`` and their areas ``(A,)`` to penalties ``(B, A)``, which are
            added to the loss, such as :class:`Ellipsoid`; or None. If it has an attribute ``start``, steps before this
            one do not use it.
        blends: names of the blends, which define what replaces removed voxels: ``"fade"`` (zero), ``"blur"``,
            ``"blur_time"``, ``"blur_both"``, ``"pyramid"`` (eight levels of blur), ``"mean_frame"``, ``"shuffle"``,
            ``"freeze"`` or ``"noise"``. Steps cycle through them.
        cells: frames per cell of the mask, and number of cells along the shorter side of a frame. Cells are squares.
            Clips have at least 8 cells along time, and no cell is smaller than one frame or one pixel.
        iterations: number of steps. 0 returns the initial masks.

    Raises:
        ValueError: A value is out of range or unknown.
        TypeError: A value has the wrong type.
    """

    parametrization: Parametrization
    areas: Sequence[float] = (0.05, 0.1, 0.15, 0.5)
    objective: Objective = "dual"
    scale: Scale = "odds"
    regularizer: Regularizer | None = None
    blends: tuple[BlendName, ...] = ("fade", "noise")
    cells: tuple[int, int] = (2, 16)
    iterations: int = 14

    def __post_init__(self) -> None:
        areas: Any = (self.areas,) if isinstance(self.areas, float) else self.areas
        if not isinstance(areas, Sequence) or not areas or any(not _is_fraction(area) for area in areas):
            raise ValueError(
                f"areas must be fractions of the clip's volume in (0, 1), at least one, got {self.areas!r}. Pass "
                f"floats such as areas=(0.05, 0.1)."
            )
        object.__setattr__(self, "areas", tuple(areas))
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("scale", self.scale, SCALES)
        term: Any = self.regularizer
        if isinstance(term, type) or not (term is None or callable(term)):
            names = ", ".join(map(repr, REGULARIZERS))
            raise TypeError(
                f"regularizer must be None or a function of masks, got {term!r} of type {type(term).__name__}. Pass an "
                f"instance, such as TotalVariation(). PerturbationConfig.changed also accepts the names {names}."
            )
        frames, across = self.cells
        for name, value, least in (("cells", frames, 1), ("cells", across, 1), ("iterations", self.iterations, 0)):
            check_count(name, value, least)
        if not self.blends:
            raise ValueError(f"blends must name at least one of {', '.join(BLENDS)}, got {self.blends!r}")
        for blend in self.blends:
            check_choice("blends", blend, BLENDS)

    def changed(self, **fields: Any) -> PerturbationConfig:
        """Return a copy with the fields replaced that are not None.

        Args:
            **fields: as for the class. ``regularizer`` can also be a name: ``"tv"``, ``"squared"``, ``"ellipsoid"`` or
                ``"none"``.
        """
        changes = {name: value for name, value in fields.items() if value is not None}
        if isinstance(term := changes.get("regularizer"), str):
            check_choice("regularizer", term, REGULARIZERS)
            changes["regularizer"] = REGULARIZERS[term]
        return replace(self, **changes)

    def forwards(self, blends: int | None = None, init: bool = False) -> int:
        """Return the cost of one clip in forward passes. A backward pass counts as two.

        Example:
            >>> PRESETS["nested"].forwards(), PRESETS["nested"].changed(iterations=0).forwards()
            (249, 133)

        Args:
            blends: number of blends. None means those of the options.
            init: whether an initial map is passed.
        """
        blends, areas = len(self.blends) if blends is None else blends, len(self.areas)
        gradients = 0 if init else self.parametrization.gradients
        windows = 0 if init else 2 * self.parametrization.windows**3  # fewer for clips of fewer frames or pixels
        gradients += self.iterations * len(OBJECTIVES[self.objective]) * self.parametrization.masks_per_step(areas)
        # the clip itself, the baselines, and two scores per area and blend at each evaluation
        return 1 + blends + windows + 3 * gradients + evaluations(self.iterations) * blends * 2 * areas

    @property
    def name(self) -> str:
        """The name of the method with these options: ``"STEP"`` only for the paper's."""
        return next((_NAMES[key] for key, preset in PRESETS.items() if preset == self), "STEP (custom)")


def evaluations(iterations: int) -> int:
    """Return the number of evaluations: before the first step, every ten steps, and after the last step."""
    return 1 + -(-iterations // EVALUATE_EVERY)


def _is_fraction(area: object) -> bool:
    return isinstance(area, float) and 0 < area < 1


_PAPER = PerturbationConfig(
    Separate(),
    objective="preserve",
    scale="log_probability",
    blends=("pyramid",),
    cells=(1, 16),
    iterations=1200,
)

PRESETS: dict[str, PerturbationConfig] = {
    "nested": PerturbationConfig(Nested()),
    "step": replace(_PAPER, regularizer=Ellipsoid(weight=300.0, start=100)),
    "3d-ep": _PAPER,
    "2d-ep": replace(_PAPER, parametrization=Separate(per_frame=True)),
}
"""The presets by name: this library's own, the STEP paper's, and its two predecessors."""

_NAMES = {
    "nested": "STEP (nested)",
    "step": "STEP",
    "3d-ep": "Extremal perturbation (3D)",
    "2d-ep": "Extremal perturbation (2D)",
}
