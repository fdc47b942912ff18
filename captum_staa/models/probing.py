"""Forward passes with changed pixels, in which attention is replaced, and the cells of pixels that tokens stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from captum_staa._utils.model_state import (
    eval_mode,
    frozen_parameters,
    uncompiled,
    without_checkpointing,
    without_compiling,
)
from captum_staa.models.attention_watch import SeenAttention, Watch
from captum_staa.models.classifier import VideoClassifier
from captum_staa.models.token_positions import (
    Axis,
    Cells,
    Change,
    Positions,
    cells_in_pixels,
    codes,
    digits,
    every_second,
    in_order,
    lattice,
    ordered_positions,
    positions,
    ramps,
    read_digits,
    same_positions,
)

BUDGET = 40  # clips that pass through the model
_LEFT = 6  # of them, for what follows once tokens with pixels have been placed
CHUNK = 2  # clips per forward
_SETS = (0.5, 0.5, 0.1, 0.0, 0.0)  # densities of the random sets of cells; 0 is a single one
_AGAIN = [0, 2, 3]  # of the sets that are also changed in a second clip

Replace = Callable[[int, tuple[int, int, int]], Tensor | None]


def nothing(number: int, shape: tuple[int, int, int]) -> None:
    """Replace the results of attention by zeros."""


Measure = Callable[[Any, Tensor], Tensor]
Key = tuple[str, int, str]  # ("queries" | "values" | "before" | "after", number, axis of features)


@dataclass
class Fold:
    """Where the examples are among the ``outer * B * inner`` leading entries of a tensor."""

    outer: int
    inner: int

    def split(self, values: Tensor) -> Tensor:
        """Return ``(B, outer * inner, ...)``."""
        return values.unflatten(0, (self.outer, -1, self.inner)).transpose(0, 1).flatten(1, 2)

    def join(self, values: Tensor) -> Tensor:
        """Return ``(B, outer * inner, ...)`` as it was before :meth:`split`."""
        return values.unflatten(1, (self.outer, self.inner)).transpose(0, 1).flatten(0, 2)


@dataclass
class Field:
    """A tensor of tokens in all forwards: its value for the clip, and its change if all pixels change."""

    base: Tensor
    change: Change
    fold: Fold
    found: Positions | None = None


class Probe:
    """The forward passes of one inspection."""

    def __init__(self, classifier: VideoClassifier, inputs: Tensor, extra: tuple[Any, ...], show: bool) -> None:
        self.classifier, self.model = classifier, uncompiled(classifier.module)
        self.own_clip = classifier.layout.to_working(inputs[:1].detach())
        self.size = classifier.layout.extent(inputs)
        self.extra = tuple(
            value[:1] if isinstance(value, Tensor) and value.ndim and len(value) == len(inputs) else value
            for value in extra
        )
        self.batched = tuple(
            isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(inputs) for value in extra
        )
        self.forwards = 0
        self.fields: dict[Key, Field] = {}
        self.problems: list[str] = []
        self.bar = tqdm(
            total=BUDGET, desc=f"inspecting {type(self.model).__name__}", delay=0 if show else 2, leave=False
        )
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        self.exact = dtype in (torch.float32, torch.float64)
        self.rounding = 1e-3 if self.exact else 5e-2  # results may depend on the size of the batch
        generator, scale = torch.Generator().manual_seed(0), float(self.own_clip.float().std() or 1.0)
        base, noise = torch.randn(2, *self.own_clip.shape, generator=generator).to(self.own_clip) * scale
        self.clip, self.unit = base + self.own_clip.mean(), noise  # no two frames or patches are alike

    @contextmanager
    def running(self) -> Iterator[Probe]:
        """Run the model in eval mode, uncompiled, and restore the random state afterwards."""
        devices = [self.clip.device] if self.clip.is_cuda else []
        with (
            torch.random.fork_rng(devices),
            eval_mode(self.classifier),
            frozen_parameters(self.classifier),
            without_compiling(),
            without_checkpointing(),
            torch.no_grad(),
            self.bar,
        ):
            yield self

    def forward(self, clips: Tensor, watch: Watch | None = None) -> Tensor:
        self.forwards += len(clips)
        self.bar.update(len(clips))
        inputs = self.classifier.layout.from_working(clips).contiguous()
        extra = (
            value.expand(len(clips), *value.shape[1:]) if batched else value
            for value, batched in zip(self.extra, self.batched, strict=True)
        )
        if watch is None:
            return self.classifier(inputs, *extra)
        with watch.watching(self.model):
            return self.classifier(inputs, *extra)

    # --- which attention --------------------------------------------------------------------------------------------

    def attention(self) -> list[SeenAttention]:
        """Return the attention computations of a forward."""
        self.watch = Watch()
        self.outputs = self.forward(self.own_clip, self.watch)
        self.unread = list(dict.fromkeys(self.watch.unread))
        self.tail = len(self.watch.attention)
        return self.watch.attention

    def _refuse_other_outputs(self) -> None:
        """Run the clip of :meth:`attention` again, after another one. Its outputs must be the same."""
        outputs, again = self.outputs, self.forward(self.own_clip, Watch())  # the same kernels run
        close = self.rounding * float(outputs.detach().float().abs().max())
        same = outputs.shape == again.shape and torch.allclose(outputs.float(), again.float(), 0, close, equal_nan=True)
        if not same:
            raise ValueError(self._by_chance())

    def _by_chance(self) -> str:
        """Return the message for a model that draws random numbers, with the first module that does."""
        where = _first_different(self.model, lambda: self.forward(self.own_clip))
        return (
            f"the forward of {type(self.model).__name__} must give the same outputs for the same clip, got different "
            f"ones in two calls in eval mode{where}. It draws random numbers, as F.dropout without "
            f"training=self.training, random masks or random routing do, or keeps a state between calls, as a memory "
            f"or a cache does. Switch this off, or seed or reset it in the forward."
        )

    def no_attention(self) -> str:
        if self.unread:
            return (
                f"no attention of {type(self.model).__name__} can be read, because the softmax of "
                f"{', '.join(map(repr, self.unread))} is written by hand."
            )
        return (
            f"no attention was found in {type(self.model).__name__}: it calls no scaled_dot_product_attention, "
            f"flex_attention, nn.MultiheadAttention or softmax of queries times keys. Attention in scripted code or in "
            f"kernels of other libraries (flash_attn, xformers) is not seen; switch them off."
        )

    # --- which cells ------------------------------------------------------------------------------------------------

    def run(
        self, masks: Tensor, measure: Measure, replace: Replace = nothing, clip: Tensor | None = None
    ) -> dict[Key, Tensor]:
        """Return a measure of the tokens ``(m, L1, ..., P)`` of a clip changed where masks ``(m, T, H, W)`` say."""
        rows: dict[Key, list[Tensor]] = {}
        for part in masks.to(self.clip).split(CHUNK):
            watch = Watch(replace=replace, tail=self.tail)
            self.forward((self.clip if clip is None else clip) + self.noise * part[:, :, None], watch)
            raw = _tensors_of(watch)
            for key, each in self.fields.items():
                values = raw.get(key)
                if values is not None and len(values) == len(part) * len(each.base):
                    rows.setdefault(key, []).append(measure(key, each.fold.split(values)))
        return {key: torch.cat(parts) for key, parts in rows.items() if sum(map(len, parts)) == len(masks)}

    def cells(self) -> Cells | None:
        """Find the cells of pixels that tokens stand for, and the position of each token."""
        single = Watch(replace=nothing, tail=self.tail)
        self.forward(self.clip, single)
        self._refuse_other_outputs()
        self.before = single.before
        if len(single.attention) != self.tail:
            self.problems = ["the number of attention computations depends on their results: tokens are routed."]
            return None
        # Small changes keep the model linear. Larger ones are not lost where a model rounds pixels.
        for strength, base in ((0.005, 8), (0.25, 2)) if self.exact else ((0.25, 2),):
            self.noise, self.problems = self.unit * strength, []
            cells = self._cells(_tensors_of(single), base)
            if cells is not None:
                return cells
            if self.forwards > BUDGET // 2:  # changes were seen, but tokens not placed
                break
        return None

    def _cells(self, single: dict[Key, Tensor], base: int) -> Cells | None:
        both = Watch(replace=nothing, tail=self.tail)
        self.forward(torch.cat([self.clip, self.clip + self.noise]), both)
        if len(both.attention) != self.tail:
            self.problems.append(
                "the number of attention computations changes with the number of clips, as in a loop over clips, so "
                "nothing is known of their rows. Let the model take all clips as one batch."
            )
            return None
        self._make_fields(single, _tensors_of(both))
        if not any(each.change.alive.any() for key, each in self.fields.items() if key[0] in ("queries", "values")):
            self.problems.append(
                "no query, key or value depends on the pixels before attention, so tokens are text or learned ones."
            )
            return None
        along = self.run(ramps(self.size), self._along)
        cells, even = self._lattice(along)
        if cells is None:
            return None
        # Digits are exact for tokens of even cells. Others are placed by their order on the ramps, without more clips.
        masks, meaning = digits(cells, self.size, base) if even else (torch.zeros(0, *self.size), [])
        shares = self.run(masks, self._along) if meaning else {}
        masks, chosen = codes(cells, self.size, _SETS)
        sizes = self.run(masks, self._size)
        counts = torch.tensor([axis.count for axis in cells])
        for key, each in self.fields.items():
            each.found = None
            if key not in sizes or key not in along or (meaning and key not in shares):
                continue
            on_ramps = along[key].cpu().movedim(0, -1)
            centers = on_ramps * counts
            if even:
                centers = read_digits(shares.get(key, torch.zeros(0, *each.change.alive.shape)), meaning)
            each.found = positions(each.change, centers, on_ramps, cells, sizes[key], chosen)
        self._fill(sizes)
        if self._certain():
            if even:
                self._check(masks)
            self._follow(sizes, chosen)
            return cells if self._certain() else None
        return None

    def _fill(self, sizes: dict[Key, Tensor]) -> None:
        """Place tokens whose centers are too uncertain as the tokens of another layer of the same shape."""
        placed = [each.found for each in self.fields.values() if each.found is not None and each.found.certain]
        for key, size in sizes.items():
            each = self.fields[key]
            if bool(each.change.alive.any()) and not (each.found is not None and each.found.certain):
                same = (same_positions(other, each.change, size) for other in placed)
                each.found = next(filter(None, same), each.found)

    def _follow(self, sizes: dict[Key, Tensor], chosen: Tensor) -> None:
        """Place tokens that see too many cells, as behind many overlapping poolings, by the layers before them.

        What the attention of placed queries adds is changed instead of pixels. From one layer to the next, tokens see
        few other ones.
        """
        sources: set[int] = set()
        while self.forwards + 4 <= BUDGET - _LEFT:
            missing = [key for key in sizes if key[0] != "before" and self._is_missing(key)]
            first = min((self.tail if key[0] == "after" else key[1] for key in missing), default=0)
            placed = [n for n in range(first) if _is_placed(self.fields.get(("queries", n, "")))]
            if not placed or placed[-1] in sources:
                return
            sources.add(placed[-1])
            self._place_behind(placed[-1], missing, sizes, chosen)

    def _is_missing(self, key: Key) -> bool:
        """Whether tokens depend on pixels, but have no place yet, or share it with other tokens."""
        each, last = self.fields[key], self.fields.get(("queries", self.tail - 1, ""))
        if not bool(each.change.alive.any()) or not _is_placed(each):
            return bool(each.change.alive.any())
        assert each.found is not None
        cells = each.found.cells[each.found.cells >= 0]
        # Behind overlapping blocks, the centers of all tokens may be those of the clip.
        overlap = last is not None and last.found is not None and last.found.ordered
        return key[0] == "after" and overlap and not each.found.ordered and len(cells.unique()) < len(cells)

    def _place_behind(self, source: int, missing: Sequence[Key], sizes: dict[Key, Tensor], chosen: Tensor) -> None:
        """Place tokens by changes of the results of one attention that rise along the cells of its queries."""
        queries, values = self.fields["queries", source, ""].found, self.fields["values", source, ""]
        assert queries is not None
        counts = queries.counts
        steps = torch.unravel_index(queries.cells.clamp(min=0), counts)
        along = [(step + 0.5) / count for step, count in zip(steps, counts, strict=True)]
        marks = torch.stack([torch.ones(queries.cells.shape), *along]) * (queries.cells >= 0)  # (4, L1, Q)
        scale, raw = 0.02 * float(values.base.std()), dict[Key, list[Tensor]]()
        for part in marks.split(CHUNK):

            def bump(at: int, shape: tuple[int, int, int], part: Tensor = part) -> Tensor | None:
                if at != source:
                    return None
                noise = torch.randn(*part.shape[1:], shape[-1], generator=torch.Generator().manual_seed(1))
                return values.fold.join(noise * part[..., None]) * scale

            unchanged = torch.zeros(len(part), *self.size)
            for key, change in self.run(unchanged, lambda key, seen: seen - self.fields[key].base, bump).items():
                raw.setdefault(key, []).append(change.cpu())
        for key in missing:
            each = self.fields[key]
            whole, *ramped = torch.cat(raw[key]).unbind(0)
            moved = Change.of(torch.zeros_like(whole), whole, self.rounding)
            if torch.equal(moved.alive, each.change.alive.cpu()):
                shares = moved.along(torch.stack(ramped)).movedim(0, -1)
                found = ordered_positions(shares, moved.alive, queries.grid, sizes[key], chosen)
                each.found = each.found if found is None else found

    def _certain(self) -> bool:
        """Whether the tokens of the first attention have been placed; otherwise note why not."""
        placed = [each.found for each in self.first() if each.found is not None]
        best = max(placed, key=lambda found: found.certainty, default=None)
        if best is not None and best.certain:
            self.problems = []
            return True
        self._unplaced("on no even grid" if best is None else f"with {best.own:.1%} of a change in the expected token")
        return False

    def _unplaced(self, how: str) -> None:
        self.problems = [
            f"changed blocks of pixels do not change one token each ({how}). The model mixes pixels before its first "
            f"attention, as deep convolutions do, crops its clips, or places tokens by their content."
        ]

    def _check(self, masks: Tensor) -> None:
        """Compare with another clip, the user's: tokens that are placed by their content are then elsewhere."""
        both = torch.stack([torch.zeros_like(masks[0]), torch.ones_like(masks[0])])
        seen = self.run(both, lambda key, values: values, clip=self.own_clip)
        changes = {key: Change.of(values[0], values[1], self.rounding) for key, values in seen.items()}
        bases = {key: values[0] for key, values in seen.items()}
        sizes = self.run(masks[_AGAIN], lambda key, values: changes[key].size(values - bases[key]), clip=self.own_clip)
        for key, size in sizes.items():
            found = self.fields[key].found
            if found is not None:
                found.check(changes[key], size, _AGAIN)

    def _along(self, key: Key, values: Tensor) -> Tensor:
        return self.fields[key].change.along(values - self.fields[key].base)

    def _size(self, key: Key, values: Tensor) -> Tensor:
        return self.fields[key].change.size(values - self.fields[key].base)

    def _make_fields(self, single: dict[Key, Tensor], both: dict[Key, Tensor]) -> None:
        for key, base in single.items():
            if key not in both or both[key].shape[1:] != base.shape[1:] or len(both[key]) != 2 * len(base):
                continue
            fold = _fold_of(base, both[key], self.rounding)
            if fold is None:
                if key[0] in ("queries", "values"):
                    self.problems = [
                        "the examples of a batch are not independent: a clip changes with the other clips."
                    ]
                continue
            own = Fold(1, len(base)).split(base)[0]
            before, after = fold.split(both[key])
            change = Change.of(before, after, self.rounding)
            self.fields[key] = Field(own, change, fold)

    def first(self) -> list[Field]:
        """Return the queries and values of the first attention that depends on pixels."""
        return [each for _, each in self._first_fields()]

    def _first_fields(self) -> list[tuple[Key, Field]]:
        alive = [
            (key, each)
            for key, each in self.fields.items()
            if key[0] in ("queries", "values") and bool(each.change.alive.any())
        ]
        first = min(number for (_, number, _), _ in alive)
        return [(key, each) for key, each in alive if key[1] == first]

    def _lattice(self, along: dict[Key, Tensor]) -> tuple[Cells | None, bool]:
        """Return the finest cells that ramps show, and whether centers are even. If not, tokens follow in order."""
        even: list[Cells] = []
        ordered: list[Cells] = []
        for key, each in self._first_fields():
            if key not in along:
                continue
            shares = along[key][:, each.change.alive].cpu()  # (3, M)
            t, h, w = (lattice(share * length, length) for share, length in zip(shares, self.size, strict=True))
            if t is not None and h is not None and w is not None:
                even.append((t, h, w))
            elif (found := in_order(along[key].cpu().movedim(0, -1), each.change.alive.cpu(), self.size)) is not None:
                ordered.append(found[1])
        # Tokens may begin before the frame, as behind a padded convolution, but not behind its first pixels.
        from_first = [axes for axes in even if all(axis.start < 0.3 * axis.side for axis in axes)]
        if not from_first and not ordered:
            self._unplaced("not from the first pixel on" if even else "on no even grid")
            return None, False
        best = max(from_first + ordered, key=lambda axes: prod(axis.count for axis in axes))
        if best not in from_first:
            return best, False
        t, h, w = (self._sharpest(place, cells_in_pixels(axis, self.size[place])) for place, axis in enumerate(best))
        return (t, h, w), True

    def _sharpest(self, place: int, axes: list[Axis]) -> Axis:
        """Return the cells along an axis that change tokens either as a whole or not at all."""
        if len(axes) == 1:
            return axes[0]
        masks = torch.stack([every_second(axis, place, self.size) for axis in axes])
        sizes = self.run(masks, self._size)
        seen = torch.cat([sizes[key][:, each.change.alive] for key, each in self._first_fields() if key in sizes], 1)
        return axes[int((seen - seen.round()).abs().mean(1).argmin())]

    def name_of(self, seen: SeenAttention) -> str:
        return next(name for name, each in self.model.named_modules() if each is seen.module)


def _is_placed(tokens: Field | None) -> bool:
    return tokens is not None and tokens.found is not None and tokens.found.certain


def _tensors_of(watch: Watch) -> dict[Key, Tensor]:
    found: dict[Key, Tensor] = {}
    for number, seen in enumerate(watch.attention):
        found["values", number, ""] = seen.values.values
        if seen.queries is not None:
            found["queries", number, ""] = seen.queries.values
    for place, tensors in (("before", watch.before), ("after", watch.after)):
        for number, tokens in enumerate(tensors):
            found[place, number, "last"] = tokens.last
            found[place, number, "second"] = tokens.second
    return found


def _fold_of(base: Tensor, both: Tensor, close: float) -> Fold | None:
    """Return where the first of two examples is, from its value alone."""
    length = len(base)
    scale = float(base.abs().max()) or 1.0
    for inner in (size for size in range(length, 0, -1) if length % size == 0):
        fold = Fold(length // inner, inner)
        if float((fold.split(both)[0] - base).abs().max()) <= close * scale:
            return fold
    return None


def _first_different(model: nn.Module, run: Callable[[], Any]) -> str:
    """Return `` (first in module ...)`` for the first module whose output differs in two runs."""
    outputs: list[list[tuple[str, Tensor]]] = []
    for _ in range(2):
        outputs.append([])
        handles = [
            module.register_forward_hook(
                lambda m, args, output, name=name: (
                    outputs[-1].append((name, output.detach().float().mean()))
                    if isinstance(output, Tensor) and output.is_floating_point()
                    else None
                )
            )
            for name, module in model.named_modules()
        ]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
    for (name, first), (_, second) in zip(*outputs, strict=False):
        if not torch.allclose(first, second, 1e-4, 1e-6, equal_nan=True):
            return f" (first in module {name!r})" if name else ""
    return ""
