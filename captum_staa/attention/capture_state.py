"""State of a running capture, and the object that is passed to its reader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_staa.attention import tiles
from captum_staa.models.families import AttentionLayer


class AttentionCall:
    """One attention computation of a forward. Each method computes one quantity of the attention matrix.

    Attributes:
        layer: the attention layer.
        output: ``(B, heads, Q, dv)``, the output of the attention, if the method has computed it as well. Otherwise
            None.
        final: whether the forward ends after this reading.
    """

    def __init__(
        self,
        layer: AttentionLayer,
        operands: tiles.Operands | None,
        ready: Tensor | None = None,
        dropout: float = 0.0,
    ) -> None:
        self.layer = layer
        self.output: Tensor | None = None
        self._operands = operands
        self._ready = ready
        self._dropout = dropout
        self.final = False  # if the forward ends here, the output is not needed

    def row(self, index: int = 0) -> Tensor:
        """Return the attention of one query, averaged over heads, ``(B, N)``, detached."""
        if self._ready is not None:
            return self._ready.detach()[:, :, index].float().mean(1)
        with torch.no_grad():
            return self._checked_operands.row(index)

    def rows(self, rows: slice) -> Tensor:
        """Return the attention of some queries, averaged over heads, ``(B, R, N)``, detached."""
        if self._ready is not None:
            return self._ready.detach()[:, :, rows].float().mean(1)
        with torch.no_grad():
            return self._checked_operands.probabilities(rows).float().mean(1)

    def column_means(self) -> Tensor:
        """Return the mean attention that each token receives from all queries and heads, ``(B, N)``, detached."""
        if self._ready is not None:
            return self._ready.detach().float().mean((1, 2))
        return self._weighted_rows(None)

    def pulled(self, weights: Tensor) -> Tensor:
        """Return ``weights`` ``(B, Q)`` times the head-mean matrix, ``(B, N)``, detached.

        If few queries have a weight, only their rows are computed.
        """
        used = weights.any(0).nonzero()[:, 0]
        few = 4 * len(used) <= weights.shape[1]
        if not few and self._ready is None:
            return self._weighted_rows(weights)
        with torch.no_grad():
            if self._ready is not None:
                rows = self._ready.detach()[:, :, used] if few else self._ready.detach()
            else:
                rows = self._checked_operands.probabilities(used)
            weights = (weights[:, used] if few else weights)[:, None, None].float()  # (B, 1, 1, used)
            return (weights @ rows.float())[:, :, 0].mean(1)

    def _weighted_rows(self, weights: Tensor | None) -> Tensor:
        if self._separate:
            return tiles.average_rows(self._checked_operands, weights)
        self.output, columns = tiles.attend_and_average_rows(self._checked_operands, weights)
        return columns

    def head_mean(self) -> Tensor:
        """Return the attention matrix averaged over heads, ``(B, Q, N)``, detached."""
        if self._ready is not None:
            return self._ready.detach().float().mean(1)
        if self._separate:
            return tiles.average_heads(self._checked_operands)
        self.output, matrix = tiles.attend_and_average_heads(self._checked_operands)
        return matrix

    def carry(self, columns: Tensor) -> Tensor:
        """Return the head-mean matrix times ``columns`` ``(B, N, c)``, without forming it: ``(B, Q, c)``, detached."""
        if self._ready is not None:
            return self._ready.detach().float().mean(1) @ columns
        with torch.no_grad():
            output, carried = tiles.attend_and_carry(self._checked_operands, columns)
        if not self._separate:
            self.output = output
        return carried

    def probabilities(self) -> Tensor:
        """Return the attention probabilities ``(B, heads, Q, N)``, as a part of the model's autograd graph."""
        if self._ready is None:
            self._ready = self._checked_operands.probabilities()
            self.output = F.dropout(self._ready, self._dropout) @ self._checked_operands.value
        return self._ready

    @property
    def _separate(self) -> bool:
        """Whether the model must compute its output itself: tiles do not keep a graph and do not apply dropout."""
        return self.final or torch.is_grad_enabled() or self._dropout > 0

    @property
    def _checked_operands(self) -> tiles.Operands:
        assert self._operands is not None
        return self._operands


class StopForward(BaseException):
    """Raised to end a forward after the last reading. A BaseException, so that ``except Exception`` cannot catch it."""

    def __init__(self, state: CaptureState) -> None:
        super().__init__("all layers of the capture have been read")
        self.state = state


class CaptureState:
    """The layers, the reader and the readings of one ``capture``."""

    def __init__(self, read: Callable[[AttentionCall], Any], last: AttentionLayer | None) -> None:
        self.readings: dict[AttentionLayer, Any] = {}
        self.layers: dict[nn.Module, list[AttentionLayer]] = {}
        self.seen: dict[nn.Module, set[str]] = {}  # backends of the attention that a captured module computed
        self.read, self.last = read, last
        self._calls: Counter[AttentionLayer] = Counter()

    @property
    def active(self) -> bool:
        """Whether this capture is the innermost one of this thread."""
        return ACTIVE.get() is self

    def layer_of(self, modules: Iterable[nn.Module], backend: str) -> AttentionLayer | None:
        """Return the layer that an attention computation inside some modules belongs to, or None, and count it."""
        found = None
        for module in modules:
            self.seen.setdefault(module, set()).add(backend)
            for layer in self.layers.get(module, ()):
                if layer.backend == backend:
                    if layer.call in (None, self._calls[layer]):
                        found = layer
                    self._calls[layer] += 1
        return found

    def take(self, call: AttentionCall) -> None:
        """Pass the call to the reader, and end the forward after the last layer if ``stop`` was set."""
        if call.layer in self.readings:
            raise ValueError(
                f"an AttentionLayer must compute attention once per forward, got a second call of "
                f"{call.layer.module!r}. Declare the module inside it that computes attention once, or state which "
                f"call is meant with AttentionLayer(..., call=0)."
            )
        call.final = call.layer == self.last
        self.readings[call.layer] = self.read(call)
        if call.final:
            raise StopForward(self)


ACTIVE: ContextVar[CaptureState | None] = ContextVar("captum_staa_capture", default=None)
