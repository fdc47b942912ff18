"""Put together what the probes of a model show: attention layers, their rows, and the sequence of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import unwrap
from itertools import pairwise
from math import prod
from typing import Any, get_args

import torch
from torch import Tensor, nn

from captum_staa.grid import Order, TokenGrid, TokenRows
from captum_staa.models.attention_watch import SeenAttention, Watch
from captum_staa.models.classifier import VideoClassifier
from captum_staa.models.families import AttentionLayer, Backend, Pooling, Role
from captum_staa.models.head_reading import ForwardGraph, TokenGradients, named
from captum_staa.models.inspection import FoundAttention, Inspection
from captum_staa.models.probing import BUDGET, CHUNK, Field, Key, Probe
from captum_staa.models.token_positions import Cells


@dataclass
class _Table:
    """The tokens of one attention while they are being identified.

    Attributes:
        keys, queries: ``(R, N)`` and ``(R, Q)``, number of each token: first those of the cells, then others; -1 if
            unknown.
        group: ``(L1,)``, the row of each leading entry of one example, heads included.
        heads, outer, order: as in :class:`TokenRows`.
        copies: number of heads.
        certainty: of the positions.
        own: share of a change of pixels that is in their own token.
        problem: why the attention is not read.
    """

    keys: Tensor
    queries: Tensor
    group: Tensor
    heads: bool
    copies: int
    outer: int
    order: Tensor | None
    certainty: float = float("nan")
    own: float = float("nan")
    problem: str = ""

    @property
    def among_itself(self) -> bool:
        """Whether queries and keys are the same tokens."""
        return torch.equal(self.queries, self.keys)


def report_of(probe: Probe) -> Inspection:
    """Run the probes of a model and return what they show."""
    family, seen = probe.classifier.family, probe.attention()
    report = Inspection(
        type(probe.model).__name__,
        probe.classifier.layout.axes,
        probe.size,
        unread=tuple(probe.unread),
        declared=None if family is None else family.name,
    )
    cells = probe.cells() if seen else None
    if cells is not None:
        return _Findings(probe, seen, cells).report(report)
    return replace(
        report,
        attention=tuple(_unplaced(probe, each) for each in seen),
        problems=tuple(probe.problems) if seen else (probe.no_attention(),),
        forwards=probe.forwards,
    )


def _unplaced(probe: Probe, seen: SeenAttention, problem: str = "tokens not placed") -> FoundAttention:
    heads = seen.lead[-1] if len(seen.lead) > 1 else 1
    layer = AttentionLayer(probe.name_of(seen), 0, "window", _backend(seen))
    rows = prod(seen.lead) // heads
    return FoundAttention(layer, type(seen.module).__name__, rows, *seen.shape, heads, problem=problem)


MIXED = -2
FEW = 16  # tokens without pixels that are followed one by one at once; more are padding, perhaps, which one clip shows


class _Others:
    """Tokens without pixels, such as class tokens, that first occur in one attention, and their codes.

    Args:
        number: of the attention.
        base: number of the first token.
        rows: of the attention.
        columns: the places of these tokens in the rows.
    """

    def __init__(self, number: int, base: int, rows: int, columns: list[int]) -> None:
        self.number, self.base, self.rows, self.columns = number, base, rows, columns
        # No row has all bits. Only all rows together have them, if they share a token.
        length = (rows + 1).bit_length() if rows > 1 else 0
        self.every = (1 << length) - 1
        self._of_row = [1, self.every - 1, *range(2, self.every - 1)][:rows] if rows > 1 else [0]
        self.bits = range(length + len(columns).bit_length())
        self._shift, self._shared = length, set[int]()
        self._known = {0: -1} | {
            self._code(row, place): self.token(row, column)
            for row in range(rows)
            for place, column in enumerate(columns)
        }

    def token(self, row: int, column: int) -> int:
        """Return the number of the token at a place of a row."""
        return self.base + self.columns.index(column) * self.rows + row

    def _code(self, row: int, place: int) -> int:
        return self._of_row[row] | (place + 1) << self._shift

    def marks(self, table: _Table) -> Tensor:
        """Return for each bit which queries have it, ``(bits, L1, Q)``."""
        marks = torch.zeros(len(self.bits), len(table.group), table.queries.shape[1])
        for row in range(self.rows):
            for place, column in enumerate(self.columns):
                for bit in self.bits:
                    marks[bit, table.group == row, column] = float(self._code(row, place) >> bit & 1)
        return marks

    def tokens(self, codes: Tensor, may_share: bool = True) -> Tensor:
        """Return the tokens that have been seen with some codes, -1 for none of these, MIXED for several.

        Args:
            codes: that have been seen.
            may_share: whether a token with the codes of all rows is one that is in every row.
        """
        found = torch.full(codes.shape, -1)
        for code in codes.unique().tolist():
            token = self._known.get(code)
            place = (code >> self._shift) - 1
            every = may_share and self.rows > 1 and code & self.every == self.every
            if token is None and every and 0 <= place < len(self.columns):
                token = self.base + place * self.rows
                self._shared.add(token)
            found[codes == code] = MIXED if token is None else token
        return found

    def merge(self, tokens: Tensor) -> None:
        """Replace the numbers of a token that is in every row by one."""
        for first in self._shared:
            tokens[(tokens >= first) & (tokens < first + self.rows)] = first


class _Findings:
    """Puts together what the probes show."""

    def __init__(self, probe: Probe, seen: Sequence[SeenAttention], cells: Cells) -> None:
        self.probe, self.seen, self.cells = probe, seen, cells
        self.patches = self.total = prod(axis.count for axis in cells)  # of the tokens that have a number
        self.merged: dict[Cells, int] = {}  # the number of the first token of each coarser grid
        self.problems = list(probe.problems)
        self.of_rollout: list[str] = []  # those of the problems that concern the composition of layers alone
        self.graph = ForwardGraph.of(probe)
        self.used = self.graph.used
        if not self.graph.differentiable:
            self.problems.append("the outputs have no gradient, so what the head reads cannot be measured.")
        self.tables = [self._table(number) for number in range(len(seen))]
        axes = ("last", "second")
        self.tail_tokens = {(place, axis): self._tail(place, axis) for place in self.graph.tails for axis in axes}
        self.pixels = self.total  # tokens with a smaller number have pixels

    def report(self, report: Inspection) -> Inspection:
        for number, table in enumerate(self.tables):
            self._number_others(number, table)
        used = [number for number in self.used if not self.tables[number].problem]
        self._check(used)
        tail, reads = self._reads(used)
        grid, sequence = self._sequence(used, tail)
        layers = self._layers(used, grid, sequence)
        first = [each.found for each in self.probe.first() if each.found is not None]
        report = replace(
            report,
            attention=tuple(self._found(number, layers.get(number)) for number in range(len(self.seen))),
            grid=grid,
            reads=self._pooling(reads, sequence),
            coarser=tuple(
                self._token_grid(cells)
                for cells in self.merged
                if any(
                    self._grid_of(tokens) == cells
                    for n in used
                    for tokens in (self.tables[n].queries, self.tables[n].keys)
                )
            ),
            patch_embedding=self._patch_embedding(grid),
            certainty=min(each.certainty for each in first),
            own=min(each.own for each in first),
            problems=tuple(dict.fromkeys([*self.problems, *self.of_rollout])),
            of_rollout=tuple(dict.fromkeys(self.of_rollout)),
            forwards=self.probe.forwards,
        )
        if report.declared is None:
            return report
        return replace(report, differences=tuple(differences(report, self.probe.classifier)))

    # --- which token is where ---------------------------------------------------------------------------------------

    def _table(self, number: int) -> _Table:
        seen, fields = self.seen[number], self.probe.fields
        values, queries = fields.get(("values", number, "")), fields.get(("queries", number, ""))
        count = prod(seen.lead)
        if values is None:
            nothing = torch.zeros(0, 0, dtype=torch.long)
            return _Table(nothing, nothing, nothing, True, 1, 1, None, problem="tokens not placed")
        keys, problem = self._cells_of(values)
        asked = torch.full((count, seen.shape[0]), -1)
        if queries is not None:
            asked, of_queries = self._cells_of(queries)
            problem = problem or of_queries
        elif seen.shape[0] == seen.shape[1] and seen.queries is None:
            problem = problem or "the queries were not seen"
        fold, heads, order = values.fold, True, None
        both = torch.cat([keys, asked], 1)
        copies = seen.lead[-1] if len(seen.lead) > 1 else 1
        if (
            copies > 1
            and fold.inner % copies == 0
            and bool((both.view(-1, copies, both.shape[1]) == both[::copies, None]).all())
        ):
            group = torch.arange(count // copies).repeat_interleave(copies)
        else:
            heads, copies = len(seen.lead) == 1, 1
            group = torch.arange(count)
        rows: dict[bytes, list[int]] = {}
        standing = both[:: count // (int(group[-1]) + 1)]
        for place, row in enumerate(standing):
            rows.setdefault(row.numpy().tobytes() if bool((row >= 0).any()) else bytes(str(place), "ascii"), []).append(
                place
            )
        sizes = {len(places) for places in rows.values()}
        if sizes != {1} and len(sizes) == 1:  # heads that are folded into the batch
            copies *= sizes.pop()
            order = torch.tensor([place for places in rows.values() for place in places])
            row_of = torch.empty(len(standing), dtype=torch.long)
            for row, places in enumerate(rows.values()):
                row_of[places] = row
            group, standing = row_of[group], standing[[places[0] for places in rows.values()]]
        keys, asked = standing[:, : keys.shape[1]].clone(), standing[:, keys.shape[1] :].clone()
        found = [each.found for each in (values, queries) if each is not None and each.found is not None]
        certainty = min((each.certainty for each in found), default=float("nan"))
        own = min((each.own for each in found), default=float("nan"))
        if not problem and not all(each.certain for each in found):
            problem = f"blocks of pixels are mixed, or tokens are selected by their content (certainty {certainty:.1%})"
        return _Table(keys, asked, group, heads, copies, fold.outer, order, certainty, own, problem)

    def _cells_of(self, tokens: Field) -> tuple[Tensor, str]:
        """Return the number of the cell of each token, -1 for those without pixels, and why it is unknown."""
        nowhere = torch.full(tokens.change.alive.shape, -1)
        if not tokens.change.alive.any():
            return nowhere, ""
        if tokens.found is None:
            return nowhere, "tokens are not on a regular grid"
        if tokens.found.counts == tuple(axis.count for axis in self.cells):
            return tokens.found.cells, ""
        grid = tokens.found.whole(self.cells)
        if grid is None:
            return nowhere, f"tokens are on a grid that does not divide the first one, {tokens.found.counts}"
        if grid not in self.merged:
            self.merged[grid] = self.total
            self.total += prod(axis.count for axis in grid)
        return torch.where(tokens.found.cells >= 0, tokens.found.cells + self.merged[grid], -1), ""

    def _tail(self, place: int, axis: str) -> Tensor:
        """Return the cells of a tensor behind the last attention, ``(L1,)``, if its features are on ``axis``."""
        tokens = self.probe.fields.get(("after", place, axis))
        if tokens is None:
            return torch.zeros(0, dtype=torch.long)
        if tokens.found is not None and tokens.found.certain:
            return self._cells_of(tokens)[0]
        return torch.full((len(tokens.base),), -1)

    # --- tokens without pixels --------------------------------------------------------------------------------------

    def _number_others(self, number: int, table: _Table) -> None:
        """Number the queries that are no pixels, and find them again in later layers by changing them here."""
        if table.problem or number not in self.used:
            return
        if bool((table.keys < 0).all()):
            table.problem = "tokens are not pixels"
            return
        new = (table.queries < 0).nonzero()
        if not len(new) or self._pools(number, table):
            return
        same = table.queries.shape == table.keys.shape and bool(
            ((table.queries == table.keys) | (table.queries < 0)).all()
        )
        if len(new) > FEW and self._all_discarded:
            return
        others = _Others(number, self.total, len(table.queries), sorted({int(query) for _, query in new}))
        if self.probe.forwards + len(others.bits) > BUDGET:
            self.of_rollout.append("there are too many tokens without pixels, such as text, to follow each of them.")
            return
        for row, query in new.tolist():
            table.queries[row, query] = others.token(row, query)
            if same:
                table.keys[row, query] = table.queries[row, query]
        self.total += others.rows * len(others.columns)
        self._link(others, self._followed(others, table))

    @cached_property
    def _all_discarded(self) -> bool:
        """Whether the results of all queries without pixels are discarded, as those of padding are."""
        fields = self.probe.fields

        def bump(at: int, shape: tuple[int, int, int]) -> Tensor | None:
            table, values = self.tables[at], fields["values", at, ""]
            if table.problem:
                return None
            on = (table.queries < 0)[table.group].float()  # (L1, Q)
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            return noise * float(values.base.std()) * values.fold.join(on[None])[..., None]

        watch = Watch(replace=bump)
        moved = self.probe.forward(self.probe.clip, watch).detach().float() - self.graph.scores
        base = {
            number: each.fold.join(each.base[None]) for (kind, number, _), each in fields.items() if kind == "values"
        }
        changed = max(float((watch.attention[number].values.values - each).norm()) for number, each in base.items())
        return changed < 1e-3 and float(moved.norm()) <= self.probe.rounding * float(self.graph.scores.norm())

    def _pools(self, number: int, table: _Table) -> bool:
        """Whether an attention is the head's own: its queries are no tokens, and the outputs are of their mean alone.

        Pooled frames that the head reads in another way count as tokens.
        """
        last = self.graph.reached == {number} and bool((table.queries < 0).all())
        return last and self.graph.reads_evenly(number, table.group, self.probe.fields["values", number, ""].fold)

    def _followed(self, others: _Others, table: _Table) -> dict[Key, Tensor]:
        """Add noise to the results of queries without pixels, one bit of their code per clip; return the codes seen."""
        values = self.probe.fields["values", others.number, ""]
        scale = float(values.base.std())
        found: dict[Key, list[Tensor]] = {}
        for marks in others.marks(table).split(CHUNK):  # (clips, L1, Q)
            on = values.fold.join(marks)  # (L, Q)

            def bump(at: int, shape: tuple[int, int, int], on: Tensor = on) -> Tensor | None:
                if at != others.number:
                    return None
                return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale * on[..., None]

            unchanged = torch.zeros(len(marks), *self.probe.size)
            for key, size in self.probe.run(unchanged, self._distance, bump).items():
                floor = 2 * self.probe.rounding * float(size.max()) + 1e-5 * float(
                    self.probe.fields[key].base.norm(dim=-1).mean()
                )
                found.setdefault(key, []).append(size > floor)
        worth = torch.tensor([1 << clip for clip in range(len(others.bits))])
        return {key: torch.tensordot(worth, torch.cat(parts).long(), 1) for key, parts in found.items()}

    def _distance(self, key: Key, values: Tensor) -> Tensor:
        return (values - self.probe.fields[key].base).norm(dim=-1).cpu()

    def _link(self, others: _Others, seen: dict[Key, Tensor]) -> None:
        """Give the tokens of later layers, and behind them, their numbers by the codes that were seen."""
        for later in range(others.number + 1, len(self.seen)):
            table = self.tables[later]
            for tokens, kind in ((table.keys, "values"), (table.queries, "queries")):
                if (kind, later, "") in seen and not table.problem:
                    by_row = others.tokens(seen[kind, later, ""][_first_of(table.group)])
                    tokens.copy_(torch.where(tokens < 0, by_row, tokens))
                    if bool((tokens == MIXED).any()):
                        tokens[tokens == MIXED] = -1
                        table.problem = "tokens without pixels, such as class tokens, are mixed outside attention"
        for (place, axis), cells in self.tail_tokens.items():
            if ("after", place, axis) in seen:
                # with features on another axis, every place has all codes, and perhaps all pixels
                apart = len(cells[cells >= 0].unique()) > 1
                codes = others.tokens(seen["after", place, axis], may_share=apart)
                self.tail_tokens[place, axis] = torch.where(cells < 0, codes, cells)
        for tokens in (
            *(table.keys for table in self.tables),
            *(table.queries for table in self.tables),
            *self.tail_tokens.values(),
        ):
            others.merge(tokens)

    # --- checks -----------------------------------------------------------------------------------------------------

    def _check(self, used: list[int]) -> None:
        """Note what rollout assumes and what was not verified."""
        for name in self.probe.unread:
            self.problems.append(f"the attention of {name!r} cannot be read, because its softmax is written by hand.")
        for name in dict.fromkeys(self.probe.name_of(seen) for seen in self.seen if seen.changed):
            self.problems.append(
                f"the matrix that multiplies the values in {name!r} is not the result of a softmax over keys, but is "
                f"changed behind it, as by talking heads, a mask, removed keys or a second normalization."
            )
        for number in self.used:
            table = self.tables[number]
            if table.problem and table.problem != "tokens are not pixels":
                self.problems.append(
                    f"at {self.probe.name_of(self.seen[number])!r} {table.problem.rstrip('.')}, so a map cannot be "
                    f"carried through it."
                )
        for earlier, later in pairwise(used if self.graph.reached else ()):
            if earlier not in self.graph.ancestors[later]:
                one, other = (self.probe.name_of(self.seen[number]) for number in (earlier, later))
                both = f"{one!r} and {other!r} run" if one != other else f"parts of {one!r} (queries or heads) run"
                self.of_rollout.append(f"{both} side by side, and rollout knows sequences of layers only.")
        for number in used:
            table, name = self.tables[number], self.probe.name_of(self.seen[number])
            if self._pools(number, table):
                continue
            if any(len(row[row >= 0].unique()) < int((row >= 0).sum()) for row in table.queries):
                self.of_rollout.append(f"two queries of {name!r} come from one token, which rollout does not know.")
            known = table.queries[table.queries >= 0]
            if len(known) < table.queries.numel() and not self._all_discarded:
                self.of_rollout.append(f"some queries of {name!r} could not be identified.")
            elif (
                len(known)
                and len(known.bincount()[known].unique()) > 1
                and int(known.bincount()[: self.pixels].max()) > 1
            ):
                self.of_rollout.append(f"some tokens are a query of {name!r} more often than others.")

    # --- the head ---------------------------------------------------------------------------------------------------

    def _reads(self, used: list[int]) -> tuple[Tensor | None, Pooling | None]:
        """Return the tokens of the last tensor of tokens, and what the head reads of each of them."""
        if not used or (not self.graph.gradients and not self.graph.reached):
            return None, None
        last = self.tables[used[-1]]
        if self._pools(used[-1], last):
            return None, "pool"
        asked = last.queries[last.queries >= 0]
        with_pixels = asked[asked < self.pixels]
        wanted, around = set((with_pixels if len(with_pixels) else asked).tolist()), False
        for (place, axis), tokens in sorted(self.tail_tokens.items(), reverse=True):
            found = set(tokens.tolist())
            if wanted - found or len(found) != len(tokens) or bool((tokens < 0).any()):
                continue
            if self.graph.has_way_around(place):
                around = True
                continue
            weights = self.graph.head_weights(place, axis)
            if weights is None:
                fold = self.probe.fields["after", place, axis].fold
                return tokens, TokenGradients(self.probe.tail, place, axis, fold, tokens)
            return tokens, torch.zeros(self.total).index_add(0, tokens, weights)
        self.of_rollout.append(
            "the head also reads tokens of earlier layers."
            if around
            else "the last tokens, which the head reads, were not found."
        )
        return None, None

    # --- the sequence -----------------------------------------------------------------------------------------------

    def _sequence(self, used: list[int], tail: Tensor | None) -> tuple[TokenGrid, Tensor]:
        """Return the grid, and the token at each place of the sequence."""
        orders = [self.tables[n].keys[0] for n in used if len(self.tables[n].keys) == 1 and self.tables[n].among_itself]
        if tail is not None:
            orders.append(tail)
        every = torch.arange(self.patches)
        complete = [order for order in orders if bool(torch.isin(every, order).all()) and bool((order >= 0).all())]
        if complete:
            sequence = complete[0]
        else:
            others = [self.tables[n].queries.flatten() for n in used]
            known = torch.cat([*others, every[:0]]).unique()
            sequence = torch.cat([known[known >= self.pixels], every])
        known = torch.cat([*(self.tables[n].queries.flatten() for n in used), sequence]).unique()
        left = known[(known >= self.pixels) & ~torch.isin(known, sequence)]
        sequence = torch.cat([sequence, left])
        place = torch.empty(self.patches, dtype=torch.long)
        of_patch = sequence < self.patches
        place[sequence[of_patch]] = of_patch.nonzero()[:, 0]
        t, h, w = (axis.count for axis in self.cells)
        sides: Any = tuple(axis.side for axis in self.cells)
        first, others_count = int(place.min()), len(sequence) - self.patches
        if int(place.max()) - first + 1 == self.patches:
            for order in get_args(Order):
                grid = TokenGrid(t, h, w, first, order, sides, others_count - first)
                if torch.equal(grid.indices().flatten(), place):
                    return grid, sequence
        grid = TokenGrid(t, h, w, first, tubelet=sides, suffix=others_count - first, positions=tuple(place.tolist()))
        return grid, sequence

    def _layers(self, used: list[int], grid: TokenGrid, sequence: Tensor) -> dict[int, AttentionLayer]:
        layers: dict[int, AttentionLayer] = {}
        blocks = _blocks([self.probe.name_of(self.seen[n]) for n in used], [self._role(n) for n in used])
        for number, block in zip(used, blocks, strict=True):
            seen, table = self.seen[number], self.tables[number]
            queries, query_groups = self._in_sequence(table.queries, sequence)
            keys, key_groups = self._in_sequence(table.keys, sequence)
            if self._pools(number, table):
                queries = torch.full_like(queries, -1)
            rows = TokenRows(
                queries, keys, len(sequence), table.heads, table.outer, table.order, seen.axes, query_groups, key_groups
            )
            role = self._role(number)
            usual = role != "window" and _same_rows(rows, TokenRows.of(role, grid))
            layers[number] = AttentionLayer(
                self.probe.name_of(seen), block, role, _backend(seen), self._call(number), None if usual else rows
            )
        return layers

    def _pooling(self, reads: Pooling | None, sequence: Tensor) -> Pooling | None:
        if isinstance(reads, TokenGradients):
            shares = torch.eye(self.total)[reads.tokens]  # (n, total)
            return replace(reads, shares=torch.stack([self._of_sequence(row, sequence) for row in shares]))
        return named(self._of_sequence(reads, sequence)) if isinstance(reads, Tensor) else reads

    def _of_sequence(self, weights: Tensor, sequence: Tensor) -> Tensor:
        """Return the weight of each token of the sequence, from those of all numbered tokens."""
        result = weights[sequence]
        for grid, first in self.merged.items():
            tokens = torch.arange(first, first + prod(axis.count for axis in grid))
            groups = self._in_sequence(tokens, sequence)[1]
            if groups is not None:
                shares = weights[tokens] / groups.bincount(minlength=len(tokens))[: len(tokens)]
                merged = groups < len(tokens)
                result[merged] += shares[groups[merged]]
        return result

    def _token_grid(self, cells: Cells) -> TokenGrid:
        """Return a coarser grid, with its tubelets in pixels."""
        t, h, w = (axis.count for axis in cells)
        sides: Any = tuple(axis.side * fine.side for axis, fine in zip(cells, self.cells, strict=True))
        return TokenGrid(t, h, w, tubelet=sides)

    def _in_sequence(self, tokens: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the places of tokens in the sequence; or their groups, and the group of each token of the sequence."""
        where = torch.full((self.total + 1,), -1)
        grid = self._grid_of(tokens)
        if grid is None:
            where[sequence] = torch.arange(len(sequence))
            return where[tokens], None
        first, count = self.merged[grid], prod(axis.count for axis in grid)
        lines = [axis.lines(fine.count).clamp(min=0) for axis, fine in zip(grid, self.cells, strict=True)]
        _, h, w = (axis.count for axis in grid)
        of_cell = ((lines[0][:, None, None] * h + lines[1][:, None]) * w + lines[2]).flatten()
        of_patch = sequence < self.patches
        groups = torch.empty(len(sequence), dtype=torch.long)
        groups[of_patch] = of_cell[sequence[of_patch]]
        groups[~of_patch] = count + torch.arange(int((~of_patch).sum()))
        where[first : first + count] = torch.arange(count)
        where[sequence[~of_patch]] = groups[~of_patch]
        return where[tokens], groups

    def _grid_of(self, tokens: Tensor) -> Cells | None:
        """Return the coarser grid that some tokens belong to, or None for the first one."""
        for grid, first in self.merged.items():
            if bool(((tokens >= first) & (tokens < first + prod(axis.count for axis in grid))).any()):
                return grid
        return None

    def _role(self, number: int) -> Role:
        table = self.tables[number]
        if self._pools(number, table):
            return "pool"
        if len(table.keys) == 1:
            return "joint"
        grid = self._grid_of(table.keys)
        first = 0 if grid is None else self.merged[grid]
        t, h, w = (axis.count for axis in grid or self.cells)
        patches = (table.keys >= 0) & (table.keys < self.pixels)
        role: Role
        for role in ("spatial", "temporal"):
            of_row = (table.keys - first) // (h * w) if role == "spatial" else (table.keys - first) % (h * w)
            alike = all(len(row[mask].unique()) <= 1 for row, mask in zip(of_row, patches, strict=True))
            if alike and len(table.keys) == (t if role == "spatial" else h * w) and bool(patches.any(1).all()):
                return role
        return "window"

    def _call(self, number: int) -> int | None:
        """Return which computation of its module an attention is, or None if there is one."""
        seen = self.seen[number]
        if _backend(seen) == "hf":
            same = [n for n, other in enumerate(self.seen) if other.module is seen.module]
            return same.index(number) if len(same) > 1 else None
        return seen.call if self.probe.watch.count(seen) > 1 else None

    def _found(self, number: int, layer: AttentionLayer | None) -> FoundAttention:
        seen, table = self.seen[number], self.tables[number]
        if layer is None:
            problem = table.problem or ("" if number in self.used else "the output does not depend on it")
            return _unplaced(self.probe, seen, problem)
        return FoundAttention(
            layer, type(seen.module).__name__, len(table.keys), *seen.shape, table.copies, table.certainty, table.own
        )

    def _patch_embedding(self, grid: TokenGrid) -> str | None:
        """Return the first convolution or linear layer whose output is the tokens of the grid, or else any module."""
        modules, names = dict(self.probe.model.named_modules()), []
        for number, tokens in enumerate(self.probe.before):
            shape, count = tokens.shape, self.patches
            t, h, w = grid.shape
            in_grid = ((1, t, h * w, None), (t, h, w, None), (1, t, h, w, None))
            for axis, forms in (
                ("second", ((1, None, t, h, w), (t, None, h, w))),
                ("last", ((1, count, None), (1, grid.num_tokens, None), (t, h * w, None), *in_grid)),
            ):
                field_ = self.probe.fields.get(("before", number, axis))
                fits = any(
                    len(shape) == len(form)
                    and all(side in (None, size) for side, size in zip(form, shape, strict=True))
                    for form in forms
                )
                if (
                    not fits
                    or field_ is None
                    or field_.found is None
                    or not (field_.found.certainty >= 1 or field_.found.ordered)
                    or field_.fold.outer > 1
                ):
                    continue
                cells = field_.found.cells
                order = cells[cells >= 0]
                expected = torch.arange(count)
                if axis == "last" and shape[0] == 1 and len(shape) == 3:
                    expected = grid.to_tokens(expected.view(grid.shape))
                others = len(cells) - len(order)
                if (
                    torch.equal(order, expected)
                    and others in (0, grid.num_tokens - count)
                    and self.graph.is_gate(number)
                ):
                    names.append(tokens.name)
        kinds = [name for name in names if isinstance(modules[name], (nn.Conv2d, nn.Conv3d, nn.Linear))]
        return next(iter((*kinds, *names)), None)


def _first_of(group: Tensor) -> Tensor:
    """Return the first place of each number 0, 1, ..."""
    return torch.stack([(group == number).nonzero()[0, 0] for number in range(int(group.max()) + 1)])


def _blocks(names: Sequence[str], roles: Sequence[Role]) -> list[int]:
    """Return the residual block of each layer. Two attentions over rows that are parts of one module are one block."""
    blocks: list[int] = []
    for place, name in enumerate(names):
        before = names[place - 1].split(".") if place else []
        parts = name.split(".")
        common = next((n for n, (a, b) in enumerate(zip(before, parts, strict=False)) if a != b), len(before))
        of_one_module = 0 < common < min(len(before), len(parts)) and not (
            before[common].isdecimal() or parts[common].isdecimal()  # of a list of modules
        )
        numbered = any(part.isdecimal() for part in parts[:common])
        divided = place > 0 and _are_divided(roles[place - 1], roles[place]) and of_one_module and numbered
        second = divided and (place < 2 or blocks[-1] != blocks[-2])
        blocks.append(blocks[-1] if second else len(set(blocks)))
    return blocks


def _are_divided(one: Role, other: Role) -> bool:
    return {one, other} == {"spatial", "temporal"} or one == other == "window"


def _same_rows(one: TokenRows, other: TokenRows) -> bool:
    return (
        one.queries.shape == other.queries.shape
        and torch.equal(one.queries, other.queries)
        and torch.equal(one.keys, other.keys)
        and one.count == other.count
        and one.query_groups is one.key_groups is None
        and (one.heads, one.outer, one.order is None, one.axes)
        == (other.heads, other.outer, other.order is None, other.axes)
    )


def differences(report: Inspection, classifier: VideoClassifier) -> Iterator[str]:
    """Yield what the declared family of a classifier states differently."""
    family, model, grid = classifier.family, classifier.transformer, classifier.grid
    assert family is not None and grid is not None and report.grid is not None
    prefix = f"{classifier._transformer_name}." if classifier._transformer_name else ""
    if grid != report.grid:
        yield f"its grid is {grid}"
        return
    declared, found = family.attention(model), report.layers
    if [prefix + layer.module for layer in declared] != [layer.module for layer in found]:
        yield f"its attention layers are {[prefix + layer.module for layer in declared]}"
        return
    for one, other in zip(declared, found, strict=True):
        rows = family.rows(model, one, grid) or one.rows_on(grid)
        if not _same_rows(rows, other.rows_on(grid)):
            yield f"{one.module} has other rows"
        for name in ("backend", "block", "call"):
            if getattr(one, name) != getattr(other, name):
                yield f"{one.module} has {name} {getattr(one, name)!r}"
    reads = family.pooling(model)
    if reads is not None and not isinstance(reads, Tensor) and reads != report.reads:
        yield f"its head reads {reads!r}"
    if family.patch_embedding is not None and prefix + family.patch_embedding != report.patch_embedding:
        yield f"its patch embedding is {family.patch_embedding!r}"


def _backend(seen: SeenAttention) -> Backend:
    """Return how an attention is read. Modules of transformers compute it in several ways."""
    forward = unwrap(type(seen.module).forward)
    config = getattr(seen.module, "config", None)
    if hasattr(config, "_attn_implementation") and "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names:
        return "hf"
    return seen.kind  # type: ignore[return-value]
