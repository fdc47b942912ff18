"""What is asked of a branch while one forward runs: gates of a user's, gradients at the gates, or nothing at all."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from captum_staa.models.st_abn.branch import Gates


@dataclass(frozen=True)
class Call:
    """What is asked of a branch while one forward runs, and the gates that it saw.

    Attributes:
        spatial, temporal: gates to take instead of the branch's own, as :meth:`STABN.override` has them.
        leaves: the gates become leaves of the graph, every cell of the temporal ones its own.
        off: the features pass by.
        seen: the gates that were taken, one for each run of the layer; None where nobody asked.
    """

    spatial: Tensor | None = None
    temporal: Tensor | None = None
    leaves: bool = False
    off: bool = False
    seen: list[Gates] | None = None

    def take(self, gates: Gates) -> Gates:
        """The gates that act: the branch's own, or those of an override; as leaves where that is asked."""
        batch, _, *cells = gates.spatial.shape
        taken = {"spatial": gates.spatial, "temporal": gates.temporal}
        if self.spatial is not None:
            taken["spatial"] = _averaged(self.spatial, batch, cells, "spatial")[:, None].to(gates.spatial)
        if self.temporal is not None:
            weights = _averaged(self.temporal, batch, cells[:1], "temporal")
            taken["temporal"] = weights[:, None, :, None, None].to(gates.temporal)
        if self.leaves:
            shape = gates.spatial.shape
            taken = {name: gate.detach().expand(shape).clone().requires_grad_() for name, gate in taken.items()}
        return replace(gates, **taken)


def check_gates(name: str, value: Tensor | None) -> None:
    """Raise unless it is None, or a tensor of gates in [0, 1]: ``(B, t, h, w)`` for "spatial", else ``(B, t)``."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of gates or None, got {type(value).__name__}")
    axes = "(B, t, h, w)" if name == "spatial" else "(B, t)"
    inside = value.numel() > 0 and bool(((value >= 0) & (value <= 1)).all())
    if value.ndim != axes.count(",") + 1 or not inside:
        reach = f"values from {value.min():.3g} to {value.max():.3g}" if value.numel() else "no value"
        raise ValueError(f"{name} must hold gates {axes} in [0, 1], got shape {tuple(value.shape)} with {reach}")


def _averaged(value: Tensor, batch: int, cells: list[int], name: str) -> Tensor:
    """Gates of the layer's cells, of a user's for cells or for whole numbers of frames and pixels per cell."""
    sizes = list(value.shape[1:])
    if value.shape[0] not in (1, batch) or any(size % count for size, count in zip(sizes, cells, strict=True)):
        raise ValueError(
            f"{name} gates of shape {tuple(value.shape)} came, but the layer has {(batch, *cells)}; give those, or the "
            f"same in frames and pixels, multiples of them"
        )
    wide = value.float()[:, None]
    if len(cells) == 1:
        return F.adaptive_avg_pool1d(wide, cells[0])[:, 0].expand(batch, *cells)
    t, h, w = cells
    pooled = F.adaptive_avg_pool3d(wide, (t, h, w))
    return pooled[:, 0].expand(batch, *cells)
