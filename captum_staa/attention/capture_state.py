"""One capture in progress: which thread reads, and what the reader gets."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_staa.attention import tiles
from captum_staa.models.families import AttentionLayer


class AttentionCall:
    """One attention on its way: ask for what you need of it, and the model's output comes with it.

    Attributes:
        site: where it happens.
        output: ``(B, heads, Q, dv)``, set where reading computed the attention's output too.
        final: whether the forward ends after this reading.
    """

    def __init__(
        self,
        site: AttentionLayer,
        operands: tiles.Operands | None,
        ready: Tensor | None = None,
        dropout: float = 0.0,
    ) -> None:
        self.site = site
        self.output: Tensor | None = None
        self._operands = operands
        self._ready = ready
        self._dropout = dropout
        self.final = False  # whether the forward ends here, so that nobody asks for the output

    def row(self, index: int = 0) -> Tensor:
        """``(B, N)``: what one query attends to, averaged over heads; no part of a graph."""
        if self._ready is not None:
            return self._ready.detach()[:, :, index].float().mean(1)
        with torch.no_grad():
            return self._known.row(index)

    def column_means(self) -> Tensor:
        """``(B, N)``: how much all queries together attend to each token; no part of a graph."""
        if self._ready is not None:
            return self._ready.detach().float().mean((1, 2))
        if self._beside:
            return tiles.average_rows(self._known)
        self.output, columns = tiles.attend_and_average_rows(self._known)
        return columns

    def head_mean(self) -> Tensor:
        """``(B, Q, N)``: the attention matrix averaged over heads; no part of a graph."""
        if self._ready is not None:
            return self._ready.detach().float().mean(1)
        if self._beside:
            return tiles.average_heads(self._known)
        self.output, matrix = tiles.attend_and_average_heads(self._known)
        return matrix

    def carry(self, columns: Tensor) -> Tensor:
        """``(B, Q, c)``: the head-mean matrix times columns ``(B, N, c)``, without the matrix; no part of a graph."""
        if self._ready is not None:
            return self._ready.detach().float().mean(1) @ columns
        with torch.no_grad():
            output, carried = tiles.attend_and_carry(self._known, columns)
        if not self._beside:
            self.output = output
        return carried

    def probabilities(self) -> Tensor:
        """``(B, heads, Q, N)``: the whole attention, part of the graph that leads to the model's output."""
        if self._ready is None:
            self._ready = self._known.probabilities()
            self.output = F.dropout(self._ready, self._dropout) @ self._known.value
        return self._ready

    @property
    def _beside(self) -> bool:
        """Whether to read without an output: tiles keep no graph and drop nothing out, the model's own code does."""
        return self.final or torch.is_grad_enabled() or self._dropout > 0

    @property
    def _known(self) -> tiles.Operands:
        assert self._operands is not None
        return self._operands


class StopForward(BaseException):
    """Ends a forward from which all has been read. No Exception: a model's own ``except`` must not catch it."""

    def __init__(self, session: CaptureState) -> None:
        super().__init__("all that a capture asked for has been read")
        self.session = session


class CaptureState:
    """What one ``capture`` reads, and where."""

    def __init__(self, read: Callable[[AttentionCall], Any], last: AttentionLayer | None) -> None:
        self.readings: dict[AttentionLayer, Any] = {}
        self.sites: dict[nn.Module, AttentionLayer] = {}
        self.read, self.last = read, last

    @property
    def active(self) -> bool:
        """Whether this thread is inside this capture, and not inside another one within it."""
        return ACTIVE.get() is self

    def take(self, call: AttentionCall) -> None:
        """Let the reader read; end the forward after the last site, where that is asked."""
        if call.site in self.readings:
            raise ValueError(
                f"{call.site.module!r} computes attention more than once in a forward; declare the module inside it "
                f"that computes it once as the AttentionLayer"
            )
        call.final = call.site == self.last
        self.readings[call.site] = self.read(call)
        if call.final:
            raise StopForward(self)


ACTIVE: ContextVar[CaptureState | None] = ContextVar("captum_staa_capture", default=None)
