"""Put together what the probes of a model show: layers, rows, the sequence of tokens, and what the head reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from inspect import unwrap
from itertools import pairwise
from math import prod
from typing import Any, get_args

import torch
from torch import Tensor, nn

from captum_staa.grid import Order, TokenGrid, TokenRows
from captum_staa.models.attention_watch import SeenAttention, Tokens, Watch
from captum_staa.models.classifier import VideoClassifier
from captum_staa.models.families import AttentionLayer, Backend, Pooling, Role
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
    problem: str = ""

    @property
    def own(self) -> bool:
        """Whether queries and keys are the same tokens."""
        return torch.equal(self.queries, self.keys)


def report_of(probe: Probe) -> Inspection:
    """Run the probes of a model and return what they show."""
    family, seen = probe.classifier.family, probe.attention()
    report = Inspection(
        type(probe.model).__name__,
        probe.classifier.layout.axes,
        probe.size,
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


class _Findings:
    """Puts together what the probes show."""

    def __init__(self, probe: Probe, seen: Sequence[SeenAttention], cells: Cells) -> None:
        self.probe, self.seen, self.cells = probe, seen, cells
        self.patches = self.total = prod(axis.count for axis in cells)  # of the tokens that have a number
        self.problems = list(probe.problems)
        self.reached, self.ancestors, self.used, self.tails, self.gradients = self._trace()
        self.tables = [self._table(number) for number in range(len(seen))]
        self.tail_tokens = {place: self._tail(place) for place in self.tails}

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
            reads=_pooling(reads[sequence]) if isinstance(reads, Tensor) else reads,
            patch_embedding=self._patch_embedding(grid),
            certainty=min(each.certainty for each in first),
            own=min(each.own for each in first),
            problems=tuple(dict.fromkeys(self.problems)),
            forwards=self.probe.forwards,
        )
        if report.declared is None:
            return report
        return replace(report, differences=tuple(_differences(report, self.probe.classifier)))

    # --- how the computations depend on each other ------------------------------------------------------------------

    def _trace(self) -> tuple[set[int], list[set[int]], list[int], dict[int, Tokens], dict[int, Tensor]]:
        """Follow the autograd graph of a forward in which the results of attention are leaves.

        Returns:
            The attention results that the outputs depend on directly; those that each attention depends on directly;
            all
            that the outputs depend on; tensors of tokens behind the last attention, and the gradients of the outputs.
        """
        watch = Watch(replace=lambda number, shape: None, tail=self.probe.tail)
        with torch.enable_grad():
            outputs = self.probe.forward(self.probe.clip.clone().requires_grad_(), watch)
            place = {id(each.result): number for number, each in enumerate(watch.attention)}
            ancestors = [
                _leaves([each.values.made_by, each.queries.made_by if each.queries else None], place)
                for each in watch.attention
            ]
            tails = {n: tokens for n, tokens in enumerate(watch.after) if tokens.tensor is not None}
            if not outputs.requires_grad:
                self.problems.append("the outputs have no gradient, so what the head reads cannot be measured.")
                return set(), ancestors, list(range(len(self.seen))), {}, {}
            generator = torch.Generator().manual_seed(0)
            weights = torch.randn(outputs.shape, generator=generator).to(outputs.device)
            tensors: Any = [tokens.tensor for tokens in tails.values()]
            found: Any = torch.autograd.grad((outputs.float() * weights).sum(), tensors, allow_unused=True)
        gradients = {n: gradient for n, gradient in zip(tails, found, strict=True) if gradient is not None}
        self._outputs, self._place = outputs.grad_fn, place
        sources = [each.values.made_by for each in watch.attention]
        sources += [each.queries.made_by for each in watch.attention if each.queries is not None]
        self._sources = [outputs.grad_fn, *sources]
        self._embeddings = [None if tokens.tensor is None else tokens.tensor.grad_fn for tokens in watch.before]
        reached = _leaves([outputs.grad_fn], place)
        used, new = set(), set(reached)
        while new:
            used |= new
            new = set().union(*(ancestors[number] for number in new)) - used
        return reached, ancestors, sorted(used), {n: tails[n] for n in gradients}, gradients

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
        if not problem and not all(each.certain for each in found):
            problem = f"blocks of pixels are mixed (certainty {certainty:.1%})"
        return _Table(keys, asked, group, heads, copies, fold.outer, order, certainty, problem)

    def _cells_of(self, tokens: Field) -> tuple[Tensor, str]:
        """Return the finest cell of each token, -1 for those without pixels, and why it is unknown."""
        nowhere = torch.full(tokens.change.alive.shape, -1)
        if not tokens.change.alive.any():
            return nowhere, ""
        if tokens.found is None:
            return nowhere, "tokens are not on a regular grid"
        if tokens.found.counts != tuple(axis.count for axis in self.cells):
            return nowhere, f"tokens are on another grid, {tokens.found.counts}"
        return tokens.found.cells, ""

    def _tail(self, place: int) -> Tensor:
        """Return the cells of a tensor behind the last attention, ``(L1,)``, with features on the axis that fits."""
        options = [self.probe.fields.get(("after", place, axis)) for axis in ("last", "second")]
        for tokens in options:
            if tokens is not None and tokens.found is not None and tokens.found.certain:
                cells, problem = self._cells_of(tokens)
                if not problem:
                    return cells
        return torch.full((len(options[0].base),), -1) if options[0] is not None else torch.zeros(0, dtype=torch.long)

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
        names = sorted({int(query) for _, query in new})
        rows, columns = _codes(len(table.queries)), _codes(len(names), used=True)
        bits = [(0, bit) for bit in range(int(rows.max()).bit_length())] if len(table.queries) > 1 else []
        bits += [(1, bit) for bit in range(int(columns.max()).bit_length())]
        if self.probe.forwards + len(bits) > BUDGET:
            self.problems.append("there are too many tokens without pixels, such as text, to follow each of them.")
            return
        for row, query in new.tolist():
            table.queries[row, query] = self.total + names.index(query) * len(table.queries) + row
            if same:
                table.keys[row, query] = table.queries[row, query]
        base, count = self.total, len(table.queries)
        self.total += count * len(names)
        seen_codes = self._followed(number, table, names, rows, columns, bits)
        shared = self._link(seen_codes, number, base, count, len(names), rows, columns, len(bits))
        for name in shared:  # one token that is in every row
            for tokens in (table.queries, table.keys):
                of_name = (tokens >= base + name * count) & (tokens < base + (name + 1) * count)
                tokens[of_name] = base + name * count

    def _pools(self, number: int, table: _Table) -> bool:
        """Whether an attention is the head's own: its queries are no tokens, and the outputs depend on it alone."""
        return self.reached == {number} and bool((table.queries < 0).all())

    def _followed(
        self, number: int, table: _Table, names: list[int], rows: Tensor, columns: Tensor, bits: list[tuple[int, int]]
    ) -> dict[Key, Tensor]:
        """Add noise to the results of queries without pixels, one bit of their code per clip; return the codes seen."""
        fold = self.probe.fields["values", number, ""].fold
        marked = torch.zeros(len(bits), len(table.group), table.queries.shape[1])
        for clip, (which, bit) in enumerate(bits):
            for place, query in enumerate(names):
                on = (rows >> bit & 1) if which == 0 else (columns[place] >> bit & 1).expand(len(rows))
                marked[clip, :, query] = on[table.group].float()
        scale = float(self.probe.fields["values", number, ""].base.std())
        found: dict[Key, list[Tensor]] = {}
        for part in marked.split(CHUNK):
            on = part.unflatten(1, (fold.outer, fold.inner)).transpose(0, 1).flatten(0, 2)  # (L, Q)

            def bump(at: int, shape: tuple[int, int, int], on: Tensor = on) -> Tensor | None:
                if at != number:
                    return None
                noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
                return noise * scale * on[..., None]

            for key, values in self.probe.run(torch.zeros(len(part), *self.probe.size), bump).items():
                size = (values - self.probe.fields[key].base).norm(dim=-1).cpu()
                floor = 1e-2 * float(size.max()) + 1e-5 * float(self.probe.fields[key].base.norm(dim=-1).mean())
                found.setdefault(key, []).append(size > floor)
        worth = torch.tensor([1 << clip for clip in range(len(bits))])
        return {key: torch.tensordot(worth, torch.cat(parts).long(), 1) for key, parts in found.items()}

    def _link(
        self,
        seen: dict[Key, Tensor],
        number: int,
        base: int,
        count: int,
        names: int,
        rows: Tensor,
        columns: Tensor,
        length: int,
    ) -> set[int]:
        """Give the tokens of later layers their numbers by the codes that were seen; return the tokens in every row."""
        shift = int(rows.max()).bit_length() if count > 1 else 0
        every, number_of, shared = (1 << shift) - 1, {0: -1}, set()
        for name in range(names):
            for row in range(count):
                own = int(rows[row]) if count > 1 else 0
                number_of[own | int(columns[name]) << shift] = base + name * count + row
        mixed = False

        def numbers(codes: Tensor) -> Tensor:
            nonlocal mixed
            result = torch.full(codes.shape, -1)
            for code in codes.unique().tolist():
                token = number_of.get(code)
                if token is None and count > 1 and code & every == every:
                    token = number_of.get(int(rows[0]) | (code >> shift) << shift)
                    if token is not None:
                        shared.add((token - base) // count)
                if token is None:
                    mixed = True
                else:
                    result[codes == code] = token
            return result

        for later in range(number + 1, len(self.seen)):
            table = self.tables[later]
            for tokens, kind in ((table.keys, "values"), (table.queries, "queries")):
                if (kind, later, "") in seen and not table.problem:
                    by_row = seen[kind, later, ""][_first_of(table.group)]
                    tokens.copy_(torch.where(tokens < 0, numbers(by_row), tokens))
        for place, cells in self.tail_tokens.items():
            if len(cells) and ("after", place, "last") in seen:
                codes = seen["after", place, "last"]
                self.tail_tokens[place] = torch.where(cells < 0, numbers(codes), cells)
        if mixed:
            self.problems.append("tokens without pixels, such as class tokens, are mixed outside attention.")
        for name in shared:
            first = base + name * count
            for tokens in (*(table.keys for table in self.tables), *(table.queries for table in self.tables)):
                tokens[(tokens >= first) & (tokens < first + count)] = first
        return shared

    # --- checks -----------------------------------------------------------------------------------------------------

    def _check(self, used: list[int]) -> None:
        """Note what rollout assumes and what was not verified."""
        for number in self.used:
            table = self.tables[number]
            if table.problem and table.problem != "tokens are not pixels":
                self.problems.append(
                    f"at {self.probe.name_of(self.seen[number])!r} {table.problem.rstrip('.')}, so a map cannot be "
                    f"carried through it."
                )
        for name in self.probe.unread:
            self.problems.append(f"the softmax of {name!r} is written by hand, and is not seen when attention is read.")
        for earlier, later in pairwise(used):
            if earlier not in self.ancestors[later]:
                self.problems.append(
                    f"{self.probe.name_of(self.seen[earlier])!r} and {self.probe.name_of(self.seen[later])!r} run side "
                    f"by side, and rollout knows sequences of layers only."
                )
        for number in used:
            table, name = self.tables[number], self.probe.name_of(self.seen[number])
            if self._pools(number, table):
                continue
            known = table.queries[table.queries >= 0]
            if len(known) < table.queries.numel():
                self.problems.append(f"some queries of {name!r} could not be identified.")
            elif (
                len(known)
                and len(known.bincount()[known].unique()) > 1
                and int(known.bincount()[: self.patches].max()) > 1
            ):
                self.problems.append(f"some tokens are a query of {name!r} more often than others.")

    # --- the head ---------------------------------------------------------------------------------------------------

    def _reads(self, used: list[int]) -> tuple[Tensor | None, Pooling | None]:
        """Return the tokens of the last tensor of tokens, and the weight of each token in the head."""
        if not used or not self.gradients:
            return None, None
        last = self.tables[used[-1]]
        if self._pools(used[-1], last):
            return None, "pool"
        wanted = set(last.queries.flatten().tolist())
        for place in sorted(self.gradients, reverse=True):
            tokens = self.tail_tokens[place]
            if wanted - set(tokens.tolist()) or len(set(tokens.tolist())) != len(tokens) or bool((tokens < 0).any()):
                continue
            behind = _leaves([self._outputs], self._place, self.tails[place].tensor.grad_fn)  # type: ignore[union-attr]
            if behind:
                self.problems.append("the head also reads tokens of earlier layers.")
                return tokens, None
            gradient = self.gradients[place].float()
            axis = self._features(place)
            matrix = gradient.movedim(axis, -1).flatten(0, -2).cpu()  # (n, D)
            left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
            if float(values[1:].norm()) > 1e-2 * float(values[0]):
                break
            weights = left[:, 0] * values[0]
            weights = weights / weights.sum()
            if not bool(weights.isfinite().all()) or float(weights.min()) < -1e-3:
                break
            result = torch.zeros(self.total)
            return tokens, result.index_add(
                0, tokens, weights.clamp(min=0).where(weights > 1e-4 * weights.max(), weights * 0)
            )
        else:
            self.problems.append("the last tokens, which the head reads, were not found.")
            return None, None
        self.problems.append(
            "the head reads the last tokens in another way than by a fixed weighted mean, so rollout does not know "
            "where to begin. Use STAA(mode='relevance')."
        )
        return tokens, None

    def _features(self, place: int) -> int:
        tokens = self.probe.fields.get(("after", place, "last"))
        fits = tokens is not None and tokens.found is not None and tokens.found.certain
        return -1 if fits or ("after", place, "second") not in self.probe.fields else 1

    # --- the sequence -----------------------------------------------------------------------------------------------

    def _sequence(self, used: list[int], tail: Tensor | None) -> tuple[TokenGrid, Tensor]:
        """Return the grid, and the token at each place of the sequence."""
        orders = [self.tables[n].keys[0] for n in used if len(self.tables[n].keys) == 1 and self.tables[n].own]
        if tail is not None:
            orders.append(tail)
        every = torch.arange(self.patches)
        complete = [order for order in orders if bool(torch.isin(every, order).all()) and bool((order >= 0).all())]
        if complete:
            sequence = complete[0]
        else:
            others = [self.tables[n].queries.flatten() for n in used]
            known = torch.cat([*others, every]).unique()
            sequence = torch.cat([known[known >= self.patches], every])
        known = torch.cat([*(self.tables[n].queries.flatten() for n in used), sequence]).unique()
        left = known[(known >= 0) & ~torch.isin(known, sequence)]
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
        where = torch.full((self.total + 1,), -1)
        where[sequence] = torch.arange(len(sequence))
        layers: dict[int, AttentionLayer] = {}
        blocks = _blocks([self.probe.name_of(self.seen[n]) for n in used], [self._role(n, grid) for n in used])
        for number, block in zip(used, blocks, strict=True):
            seen, table = self.seen[number], self.tables[number]
            queries = (
                torch.full((1, 1), -1) if self._pools(number, table) and seen.shape[0] == 1 else where[table.queries]
            )
            rows = TokenRows(
                queries, where[table.keys], len(sequence), table.heads, table.outer, table.order, seen.axes
            )
            role = self._role(number, grid)
            usual = role != "window" and _same_rows(rows, TokenRows.of(role, grid))
            layers[number] = AttentionLayer(
                self.probe.name_of(seen), block, role, _backend(seen), self._call(number), None if usual else rows
            )
        return layers

    def _role(self, number: int, grid: TokenGrid) -> Role:
        table = self.tables[number]
        if self._pools(number, table):
            return "pool"
        if len(table.keys) == 1:
            return "joint"
        _, h, w = grid.shape
        role: Role
        for role in ("spatial", "temporal"):
            of_row = table.keys // (h * w) if role == "spatial" else table.keys % (h * w)
            patches = (table.keys >= 0) & (table.keys < self.patches)
            alike = all(len(row[mask].unique()) <= 1 for row, mask in zip(of_row, patches, strict=True))
            if alike and len(table.keys) == (grid.t if role == "spatial" else h * w) and bool(patches.any(1).all()):
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
            layer, type(seen.module).__name__, len(table.keys), *seen.shape, table.copies, table.certainty
        )

    def _is_gate(self, number: int) -> bool:
        """Whether the outputs depend on the pixels through a tensor before the first attention alone."""
        gate = self._embeddings[number] if number < len(self._embeddings) else None
        return gate is not None and not _leaves(self._sources, self._place, gate, other=True)

    def _patch_embedding(self, grid: TokenGrid) -> str | None:
        """Return the first convolution or linear layer whose output is the tokens of the grid, or else any module."""
        modules, names = dict(self.probe.model.named_modules()), []
        for number, tokens in enumerate(self.probe.before):
            shape, count = tokens.shape, self.patches
            t, h, w = grid.shape
            for axis, forms in (
                ("second", ((1, None, t, h, w), (t, None, h, w))),
                ("last", ((1, count, None), (1, grid.num_tokens, None), (t, h * w, None))),
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
                    or field_.found.certainty < 1
                    or field_.fold.outer > 1
                ):
                    continue
                cells = field_.found.cells
                order = cells[cells >= 0]
                expected = torch.arange(count)
                if axis == "last" and shape[0] == 1:
                    expected = grid.to_tokens(expected.view(grid.shape))
                others = len(cells) - len(order)
                if torch.equal(order, expected) and others in (0, grid.num_tokens - count) and self._is_gate(number):
                    names.append(tokens.name)
        kinds = [name for name in names if isinstance(modules[name], (nn.Conv2d, nn.Conv3d, nn.Linear))]
        return next(iter((*kinds, *names)), None)


def _leaves(nodes: Sequence[Any], place: dict[int, int], stop: Any = None, other: bool = False) -> set[int]:
    """Return the numbers of the leaves below nodes of the autograd graph, on paths that do not pass ``stop``.

    Args:
        nodes: where to begin.
        place: number of each leaf by its id.
        stop: a node that ends a path.
        other: whether to return -1 for other leaves, such as the clip, instead.
    """
    found, seen, stack = set(), set(), [node for node in nodes if node is not None]
    while stack:
        node = stack.pop()
        if node in seen or node == stop:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            number = place.get(id(node.variable), -1)
            if (number < 0) == other:
                found.add(number)
        stack += [following for following, _ in node.next_functions if following is not None]
    return found


def _codes(count: int, used: bool = False) -> Tensor:
    """Return different codes, all positive. Those of rows never have all bits, which only all of them have together."""
    if used:
        return torch.arange(1, count + 1)
    length = max(2, (count + 1).bit_length())
    every = (1 << length) - 1
    return torch.tensor([1, every - 1, *(code for code in range(2, every - 1))][:count])


def _first_of(group: Tensor) -> Tensor:
    """Return the first place of each number 0, 1, ..."""
    return torch.stack([(group == number).nonzero()[0, 0] for number in range(int(group.max()) + 1)])


def _blocks(names: Sequence[str], roles: Sequence[Role]) -> list[int]:
    """Return the residual block of each layer. Attention in time and in space inside one module is one block."""
    blocks: list[int] = []
    for place, (name, role) in enumerate(zip(names, roles, strict=True)):
        if not place:
            blocks.append(0)
            continue
        before, parts = names[place - 1].split("."), name.split(".")
        common = next(
            (n for n, (a, b) in enumerate(zip(before, parts, strict=False)) if a != b), min(len(before), len(parts))
        )
        divided = {role, roles[place - 1]} == {"spatial", "temporal"} and any(
            part.isdecimal() for part in parts[:common]
        )
        first_of_block = place < 2 or blocks[-1] != blocks[-2]
        blocks.append(blocks[-1] if divided and first_of_block else blocks[-1] + 1)
    return blocks


def _same_rows(one: TokenRows, other: TokenRows) -> bool:
    return (
        one.queries.shape == other.queries.shape
        and torch.equal(one.queries, other.queries)
        and torch.equal(one.keys, other.keys)
        and one.count == other.count
        and (one.heads, one.outer, one.order is None, one.axes)
        == (other.heads, other.outer, other.order is None, other.axes)
    )


def _pooling(weights: Tensor) -> Pooling:
    """Return weights of tokens by their name, if they have one."""
    if float((weights - weights.mean()).abs().max()) < 1e-3 * float(weights.mean()):
        return "mean"
    return "cls" if weights[0] > 0.999 else weights


def _differences(report: Inspection, classifier: VideoClassifier) -> Iterator[str]:
    """Yield what the declared family of a classifier states differently."""
    family, model, grid = classifier.family, classifier.transformer, classifier.grid
    assert family is not None and grid is not None and report.grid is not None
    prefix = f"{classifier._transformer_name}." if classifier._transformer_name else ""
    if grid != report.grid:
        yield f"its grid is {grid}"
        return
    declared, found = family.attention(model), report.layers
    if [prefix + layer.module for layer in declared] != [layer.module for layer in found]:
        yield f"its attention layers are {[layer.module for layer in declared]}"
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
