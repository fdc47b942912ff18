"""The report of :func:`captum_staa.models.inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from captum_staa.grid import TokenGrid
from captum_staa.models.families import AttentionLayer, Family, Pooling
from captum_staa.models.token_positions import OWN

MIXED = 0.95  # the share of the first layer's own change below which tokens of a later one count as mixed


@dataclass(frozen=True)
class FoundAttention:
    """One attention computation of a forward, in the order of execution.

    Attributes:
        layer: how STAA reads it: module, backend, role, call and rows.
        kind: class of the module.
        rows, queries, keys, heads: numbers of rows per clip (such as one per frame), of queries and keys per row, and
            of heads.
        certainty: how often a changed block of pixels changes its own token most, .5 to 1; nan without pixels.
        own: share of the change that is in the token of the changed block, without attention before it; nan without
            pixels. Less than 1 behind operations other than attention that mix tokens.
        problem: what could not be verified, or an empty string.
    """

    layer: AttentionLayer
    kind: str
    rows: int
    queries: int
    keys: int
    heads: int
    certainty: float = float("nan")
    own: float = float("nan")
    problem: str = ""


@dataclass(frozen=True, repr=False)
class Inspection:
    """What :func:`inspect` found in a model. ``print(report)`` shows it as a table.

    Attributes:
        model: class of the model.
        layout: order of the axes of the clips.
        size: ``(T, H, W)`` of the clip that was used.
        attention: the attention computations in the order of execution.
        grid: the tokens that stand for pixels, or None if none was found.
        coarser: the grids of merged tokens in later layers, if there are several.
        reads: what the head reads of the last tokens: ``"cls"``, ``"mean"``, ``"pool"``, a tensor with a weight per
            token, or None if unknown.
        patch_embedding: name of the module whose output is the patch tokens, or None.
        certainty: how often a changed block of pixels changes its own token more than other tokens, .5 to 1.
        own: share of the change that is in the token of the changed block. Less than 1 if blocks overlap, as behind
            overlapping convolutions.
        problems: what could not be verified. STAA reads the attention only if there is none.
        of_rollout: those of the problems that are about the way from layer to layer and to the head alone.
        unread: modules with a softmax written by hand, so that their attention cannot be read.
        declared: name of the declared family of the model, or None.
        differences: what the declared family states differently.
        forwards: number of clips that passed through the model.
    """

    model: str
    layout: str
    size: tuple[int, int, int]
    attention: tuple[FoundAttention, ...] = ()
    grid: TokenGrid | None = None
    coarser: tuple[TokenGrid, ...] = ()
    reads: Pooling | None = None
    patch_embedding: str | None = None
    certainty: float = float("nan")
    own: float = float("nan")
    problems: tuple[str, ...] = ()
    of_rollout: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    declared: str | None = None
    differences: tuple[str, ...] = ()
    forwards: int = 0

    @property
    def ok(self) -> bool:
        """Whether everything that STAA needs was found and verified."""
        return not self.problems

    @property
    def placed(self) -> bool:
        """Whether the tokens of all attention layers were found and verified: enough for ``rule="layer_gradients"``."""
        return self.grid is not None and len(self.problems) == len(self.of_rollout)

    @property
    def layers(self) -> list[AttentionLayer]:
        """The attention layers through which the output depends on pixels."""
        return [found.layer for found in self.attention if not found.problem]

    @property
    def family(self) -> Family:
        """The findings as a :class:`Family`, for ``VideoClassifier(model, family=report.family)``.

        Raises:
            ValueError: not everything was verified.
        """
        if not self.ok:
            raise ValueError(self.refusal())
        return self.unverified_family()

    def unverified_family(self) -> Family:
        """Return the same, also if the attention was not verified or no token grid was found."""
        grid: Any = self.grid
        layers, reads, (frames, *edges) = self.layers, self.reads, self.size
        return Family(
            name=self.model,
            grid=lambda model: grid,
            attention=lambda model: layers,
            pooling=lambda model: reads,
            layout=self.layout,
            num_frames=lambda model: frames,
            image_size=lambda model: (edges[0], edges[1]),
            patch_embedding=self.patch_embedding,
        )

    def refusal(self) -> str:
        """Return the message for a model that STAA cannot explain."""
        way = (
            f"STAA(mode='relevance') needs no {'rollout' if self.placed else 'attention layers'}. "
            if self.attention or self.unread
            else ""
        ) + "GradCAM, RISE, VideoOcclusion and SpatioTemporalPerturbation work with any network."
        return (
            f"STAA needs a video transformer whose attention and tokens can be verified, got {self.model}: "
            f"{self.problems[0]} {way} print(captum_staa.models.inspect(model, inputs)) shows what was found; what you "
            f"know better can be stated with a captum_staa.models.Family."
        )

    def __repr__(self) -> str:
        """Return one line. ``print(report)`` shows the table."""
        seen = f"{len(self.layers)} of {len(self.attention)} attention layers verified, grid={self.grid}"
        return f"{type(self).__name__}({self.model}, {seen}, ok={self.ok}; print it for the table)"

    def __str__(self) -> str:
        """Return the table of everything that was found."""
        lines = [f"{self.model}, clips of (T, H, W) = {self.size} in layout {self.layout}; {self.forwards} clips run"]
        head = ("", "module", "backend", "attention", "rows", "queries x keys", "heads", "certainty")
        rows = [
            (
                str(place),
                _name(found.layer),
                found.layer.backend,
                found.problem or f"{found.layer.role}, block {found.layer.block}",
                str(found.rows),
                f"{found.queries} x {found.keys}",
                str(found.heads),
                "" if found.certainty != found.certainty else f"{found.certainty:.1%}",
            )
            for place, found in enumerate(self.attention)
        ]
        if rows:
            wide = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
            lines += [
                "  ".join(f"{cell:<{w}}" for cell, w in zip(row, wide, strict=True)).rstrip() for row in (head, *rows)
            ]
        if self.grid is not None:
            at = "" if self.grid.positions is None else f", at places {_shown(self.grid.positions)} of the sequence"
            lines.append(f"tokens: {self.grid}{at}")
            lines += [f"merged later into: {merged}" for merged in self.coarser]
            overlap = "" if self.own >= OWN else "; blocks overlap, and tokens are placed by the order of their centers"
            lines.append(f"blocks of pixels: {self.own:.1%} of a change is in the block's own token{overlap}")
            mixed = min((found for found in self.attention if found.own < MIXED * self.own), key=_own, default=None)
            if mixed is not None:
                lines.append(
                    f"tokens are mixed outside attention, too, which rollout does not follow: {mixed.own:.1%} of a "
                    f"change is in the block's own token in {_name(mixed.layer)!r}"
                )
            lines.append(f"patch embedding: {self.patch_embedding or 'not found, relevance is computed for pixels'}")
        if self.reads is not None:
            lines.append(f"the head reads: {_words(self.reads)}")
        if self.declared is not None:
            agrees = "agrees" if not self.differences else "differs: " + "; ".join(self.differences)
            lines.append(f"declared family {self.declared!r}: {agrees}")
        lines += [f"not verified: {problem}" for problem in self.problems]
        relevance = "see above; other methods work"
        if self.attention or self.unread:
            relevance = f"relevance{' and layer gradients' * self.placed}, but not attention; see above"
        lines.append("STAA: " + ("attention and relevance" if self.ok else relevance))
        return "\n".join(lines)


def _own(found: FoundAttention) -> float:
    return found.own


def _words(reads: Pooling) -> str:
    if isinstance(reads, Tensor):
        used = reads.nonzero()[:, 0].tolist()
        return f"a weighted mean of {len(used)} of {reads.numel()} tokens ({_shown(used)})"
    if callable(reads):
        return "not by a fixed weighted mean; its gradient with respect to each token is measured for each clip"
    return {"cls": "the first token", "mean": "the mean of all tokens", "pool": "a separate query"}[reads]


def _shown(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


def _name(layer: AttentionLayer) -> str:
    return (layer.module or "(the model)") + ("" if layer.call is None else f" (call {layer.call})")
