"""What an ST-ABN says of a clip: its answer, its branch's own answer, and where and when the gates were open."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from captum_staa._utils import notebook
from captum_staa.models.st_abn.branch import Gates
from captum_staa.result import VideoAttribution


@dataclass(frozen=True)
class BranchExplanation:
    """Gates in the clip's own frames and pixels, beside those of the layer.

    Attributes:
        logits: ``(B, K)``, the model's.
        attention_logits: ``(B, K)``, the branch's own.
        spatial: ``(B, T, H, W)`` in (0, 1), where in each frame; between the layer's cells it is interpolated.
        temporal: ``(B, T)`` in (0, 1), when; frames of one step have one value.
        grid: ``(t, h, w)`` of the layer.
        gates: those of the layer, with the branch's evidence.
    """

    logits: Tensor
    attention_logits: Tensor
    spatial: Tensor
    temporal: Tensor
    grid: tuple[int, int, int]
    gates: Gates

    @property
    def resolution(self) -> str:
        """How coarse the gates are, in words."""
        return resolution(self.grid, tuple(self.spatial.shape[1:]))

    def _repr_html_(self) -> str:
        """What a notebook shows: where and when the gates were open, and what model and branch answer."""
        gates = VideoAttribution(self.spatial, self.spatial.mean(1), self.temporal)
        answers = [logits.argmax(1).tolist() for logits in (self.logits, self.attention_logits)]
        rows = [[at, *pair] for at, pair in enumerate(zip(*answers, strict=True))]
        said = notebook.block(self.resolution, notebook.table(["clip", "class", "class by the branch"], rows))
        return f"<div>{gates._repr_html_()}{said}</div>"


def resolution(grid: tuple[int, ...], size: tuple[int, ...]) -> str:
    """How coarse a layer's grid ``(t, h, w)`` is over a clip of ``size`` ``(T, H, W)``.

    Example:
        >>> resolution((8, 6, 6), (16, 48, 48))
        'each bar covers 2 frames, each cell 8 x 8 pixels'
    """
    t, h, w = (f"{pixels / cells:.3g}" for cells, pixels in zip(grid, size, strict=True))
    return f"each bar covers {t} frame{'' if t == '1' else 's'}, each cell {h} x {w} pixels"
