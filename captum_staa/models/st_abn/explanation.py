"""Explanation of a clip by an ST-ABN: the logits of model and branch, and the gates."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from captum_staa._utils import notebook
from captum_staa.models.st_abn.branch import Gates
from captum_staa.result import VideoAttribution


@dataclass(frozen=True)
class BranchExplanation:
    """Class that holds the gates in frames and pixels of the clip, the gates of the layer, and the logits.

    Attributes:
        logits: ``(B, K)``, the logits of the model.
        attention_logits: ``(B, K)``, the logits of the branch.
        spatial: ``(B, T, H, W)`` in (0, 1), the weight of each pixel, interpolated between the layer's cells.
        temporal: ``(B, T)`` in (0, 1), the weight of each frame. All frames of a step have the same value.
        grid: ``(t, h, w)`` of the layer.
        gates: the gates of the layer, with the evidence of the branch.
    """

    logits: Tensor
    attention_logits: Tensor
    spatial: Tensor
    temporal: Tensor
    grid: tuple[int, int, int]
    gates: Gates

    @property
    def resolution(self) -> str:
        """The resolution of the gates, as text."""
        return resolution(self.grid, tuple(self.spatial.shape[1:]))

    def _repr_html_(self) -> str:
        """Return HTML for notebooks: the gates, and the classes predicted by model and branch."""
        gates = VideoAttribution(self.spatial, self.spatial.mean(1), self.temporal)
        answers = [logits.argmax(1).tolist() for logits in (self.logits, self.attention_logits)]
        rows = [[at, *pair] for at, pair in enumerate(zip(*answers, strict=True))]
        classes = notebook.block(self.resolution, notebook.table(["clip", "class", "class by the branch"], rows))
        return f"<div>{gates._repr_html_()}{classes}</div>"


def resolution(grid: tuple[int, ...], size: tuple[int, ...]) -> str:
    """Return the resolution of a grid ``(t, h, w)`` over a clip of ``size`` ``(T, H, W)``, as text.

    Example:
        >>> resolution((8, 6, 6), (16, 48, 48))
        'each bar covers 2 frames, each cell 8 x 8 pixels'
    """
    t, h, w = (f"{pixels / cells:.3g}" for cells, pixels in zip(grid, size, strict=True))
    return f"each bar covers {t} frame{'' if t == '1' else 's'}, each cell {h} x {w} pixels"
