"""Options of a branch for one forward: gates of the user, gradients at the gates, or no gates."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from captum_staa.models.st_abn.branch import Gates


@dataclass(frozen=True)
class Call:
    """Class that holds the options of a branch for one forward, and collects the gates that were used.

    Attributes:
        spatial, temporal: gates that replace those of the branch, as in :meth:`STABN.override`.
        leaves: whether the gates become leaves of the graph, with a separate temporal gate for every cell.
        off: whether the features are passed on without gates.
        seen: list to which the gates are appended, once per call of the layer; None to collect nothing.
    """

    spatial: Tensor | None = None
    temporal: Tensor | None = None
    leaves: bool = False
    off: bool = False
    seen: list[Gates] | None = None

    def take(self, gates: Gates) -> Gates:
        """Return the gates to apply: those of the branch or of an override, as leaves if ``leaves`` is set."""
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
    """Raise an error unless ``value`` is None or gates in [0, 1]: ``(B, t, h, w)`` for "spatial", else ``(B, t)``."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a tensor of gates or None, got {type(value).__name__}. Convert it with torch.as_tensor."
        )
    axes = "(B, t, h, w)" if name == "spatial" else "(B, t)"
    inside = value.numel() > 0 and bool(((value >= 0) & (value <= 1)).all())
    if value.ndim != axes.count(",") + 1 or not inside:
        values = f"values from {value.min():.3g} to {value.max():.3g}" if value.numel() else "no values"
        raise ValueError(
            f"{name} must hold gates {axes} in [0, 1], got shape {tuple(value.shape)} with {values}. Reshape the "
            f"tensor, or limit its values with clamp(0, 1)."
        )


def _averaged(value: Tensor, batch: int, cells: list[int], name: str) -> Tensor:
    """Return gates of the layer's cells, averaged from gates of cells or of frames and pixels."""
    sizes = list(value.shape[1:])
    if value.shape[0] not in (1, batch) or any(size % count for size, count in zip(sizes, cells, strict=True)):
        raise ValueError(
            f"{name} gates must have the shape of the layer's gates, {(batch, *cells)}, or integer multiples of its "
            f"sizes (frames and pixels), got shape {tuple(value.shape)}. Resize the gates to one of these."
        )
    wide = value.float()[:, None]
    if len(cells) == 1:
        return F.adaptive_avg_pool1d(wide, cells[0])[:, 0].expand(batch, *cells)
    t, h, w = cells
    pooled = F.adaptive_avg_pool3d(wide, (t, h, w))
    return pooled[:, 0].expand(batch, *cells)
