"""The cells that a metric replaces, of a grid or of any shape that a feature mask gives them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from captum_staa import feature_masks
from captum_staa.checks import check_choice, is_triple
from captum_staa.layout import VideoLayout
from captum_staa.metrics._axis import SPANNED, Axis
from captum_staa.models.classifier import VideoClassifier
from captum_staa.perturbation.arguments import units_for

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
            f"a feature_mask says itself how far its cells reach, but {cells = }, {axis = } came with it; leave both "
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
        raise ValueError(f"cells is (t, h, w), the sides of one in frames and pixels, but {cells!r} came")
    return [sizes[letter] if letter in SPANNED[axis] else side for letter, side in zip("THW", cells, strict=True)]
