"""The (t, h, w) grid of a transformer's tokens, and its conversion to tokens and to pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F

from captum_staa._utils.checks import check_choice, check_count, check_sides, is_number, is_triple
from captum_staa._utils.tensors import without_autocast

if TYPE_CHECKING:
    from torch import Tensor

Order = Literal["thw", "hwt"]
Mode = Literal["nearest", "trilinear"]


@dataclass(frozen=True)
class TokenGrid:
    """The position of each token of a video transformer in space and time.

    Example:
        >>> import torch
        >>> grid = TokenGrid(t=8, h=14, w=14, prefix=1, order="hwt", tubelet=(1, 16, 16))  # TimeSformer-base
        >>> attention = torch.zeros(1, grid.num_tokens)
        >>> attention[0, 1 + (3 * 14 + 2) * 8 + 5] = 1.0  # row 3, column 2, frame 5. Time is the fastest axis
        >>> pixels = grid.to_pixels(grid.to_grid(attention))
        >>> pixels.shape, int(pixels.sum())  # exactly one 16 x 16 block of frame 5 is 1
        (torch.Size([1, 8, 224, 224]), 256)
        >>> pixels[0, 5, 48:64, 32:48].min().item()
        1.0

        Frames of 2 x 2 patches, each behind a separate class token (an image transformer on folded frames):

        >>> grid = TokenGrid(t=2, h=2, w=2, prefix=2, positions=(1, 2, 3, 4, 6, 7, 8, 9), tubelet=(1, 16, 16))
        >>> grid.to_grid(torch.arange(10))
        tensor([[[1, 2],
                 [3, 4]],
        <BLANKLINE>
                [[6, 7],
                 [8, 9]]])

    Args:
        t: number of time steps of the grid.
        h: number of rows of the grid.
        w: number of columns of the grid.
        prefix: number of tokens before the grid (1 with a CLS token).
        order: order of the tokens. ``"thw"`` is frame by frame. ``"hwt"`` is patch by patch, with time as the fastest
            axis (TimeSformer).
        tubelet: ``(frames, height, width)`` of the block of pixels that one token represents. Sides may be fractions,
            such as 384 / 14 for a model that resizes its frames.
        suffix: number of tokens after the grid (such as register tokens).
        positions: the index in the sequence of each token of the grid, counted along t, then h, then w, for a sequence
            that is not prefix, grid, suffix. ``prefix`` and ``suffix`` then only count the other tokens, and ``order``
            must be ``"thw"``.

    Raises:
        TypeError: a size is not an integer, or a side of ``tubelet`` is not a number.
        ValueError: a size is not positive, ``tubelet`` does not have three sides of at least 1, ``order`` is unknown,
            or ``positions`` are not one different index below the number of tokens for each token of the grid.
    """

    t: int
    h: int
    w: int
    prefix: int = 0
    order: Order = "thw"
    tubelet: tuple[Any, Any, Any] = (1, 1, 1)
    suffix: int = 0
    positions: tuple[int, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("t", 1), ("h", 1), ("w", 1), ("prefix", 0), ("suffix", 0)):
            check_count(f"{name} of a token grid", getattr(self, name), least)
            object.__setattr__(self, name, int(getattr(self, name)))  # small NumPy integers overflow in products
        if not is_triple(self.tubelet):
            raise ValueError(f"tubelet must be (t, h, w), three sides of at least 1, got {self.tubelet!r}")
        for side in self.tubelet:
            if not is_number(side) or isinstance(side, bool):
                raise TypeError(f"a side of tubelet = {self.tubelet!r} must be a number, got {side!r}")
            if not 1 <= side < float("inf"):
                raise ValueError(f"a side of tubelet = {self.tubelet!r} must be at least 1 pixel or frame, got {side}")
        sides = tuple(int(side) if float(side).is_integer() else float(side) for side in self.tubelet)
        object.__setattr__(self, "tubelet", sides)
        check_choice("order", self.order, ("thw", "hwt"))
        if self.positions is not None:
            self._check_positions(tuple(map(int, self.positions)))

    def _check_positions(self, positions: tuple[int, ...]) -> None:
        different = set(positions)
        if len(positions) != self.num_patches or len(different) != len(positions):
            raise ValueError(
                f"positions must be {self.num_patches} different indices, one per token of the grid {self.shape}, got "
                f"{len(positions)} indices, {len(different)} of them different."
            )
        if not 0 <= min(positions) <= max(positions) < self.num_tokens:
            raise ValueError(
                f"positions must lie in 0..{self.num_tokens - 1}, because there are {self.num_patches} tokens of the "
                f"grid and {self.prefix + self.suffix} others, got {min(positions)} to {max(positions)}. Count the "
                f"other tokens in prefix or suffix."
            )
        if self.order != "thw":
            raise ValueError(
                f"order must be 'thw' with positions, which state the order themselves, got {self.order!r}. Leave "
                f"order out."
            )
        object.__setattr__(self, "positions", positions)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(t, h, w)``."""
        return self.t, self.h, self.w

    @property
    def num_patches(self) -> int:
        """Number of tokens that represent pixels."""
        return self.t * self.h * self.w

    @property
    def num_tokens(self) -> int:
        """Number of all tokens of the sequence."""
        return self.prefix + self.num_patches + self.suffix

    @property
    def cell(self) -> tuple[int, int, int]:
        """:attr:`tubelet` in whole frames and pixels."""
        t, h, w = (round(side) for side in self.tubelet)
        return t, h, w

    @property
    def pixels(self) -> tuple[int, int, int]:
        """``(T, H, W)`` of the part of the clip that the tokens cover."""
        t, h, w = (round(count * side) for count, side in zip(self.shape, self.tubelet, strict=True))
        return t, h, w

    def indices(self) -> Tensor:
        """Return the index in the sequence of each token of the grid, int64 ``(t, h, w)``."""
        if self.positions is not None:
            return torch.tensor(self.positions).view(self.shape)
        return self.to_grid(torch.arange(self.num_tokens))

    def to_grid(self, tokens: Tensor) -> Tensor:
        """Reshape values per token ``(..., N)`` to ``(..., t, h, w)``.

        Args:
            tokens: one value per token of the sequence, or one per token of the grid in the order of the sequence.

        Returns:
            ``(..., t, h, w)``.

        Raises:
            ValueError: N is neither :attr:`num_tokens` nor :attr:`num_patches`.
        """
        count = tokens.shape[-1]
        if count not in (self.num_tokens, self.num_patches):
            raise ValueError(
                f"the last axis of tokens must have {self.num_tokens} values ({self.num_patches} without the other "
                f"tokens) for {self}, got shape {tuple(tokens.shape)}. Check that the clips have the size (T, H, W) = "
                f"{self.pixels} of the grid."
            )
        if self.positions is not None:
            index = torch.tensor(self.positions, device=tokens.device)
            if count != self.num_tokens:
                index = index.argsort().argsort()
            return tokens[..., index].unflatten(-1, self.shape)
        if count == self.num_tokens:
            tokens = tokens[..., self.prefix : count - self.suffix]
        if self.order == "thw":
            return tokens.unflatten(-1, (self.t, self.h, self.w))
        return tokens.unflatten(-1, (self.h, self.w, self.t)).movedim(-1, -3)

    def to_tokens(self, grid: Tensor) -> Tensor:
        """Reshape values ``(..., t, h, w)`` to ``(..., t*h*w)`` in the model's order, without the other tokens.

        Raises:
            ValueError: the last axes of ``grid`` are not ``(t, h, w)``.
        """
        if tuple(grid.shape[-3:]) != self.shape:
            raise ValueError(f"the last axes of grid must be (t, h, w) = {self.shape}, got shape {tuple(grid.shape)}")
        if self.positions is not None:
            return grid.flatten(-3)[..., torch.tensor(self.positions, device=grid.device).argsort()]
        return (grid if self.order == "thw" else grid.movedim(-3, -1)).flatten(-3)

    def to_pixels(self, grid: Tensor, mode: Mode = "nearest", size: tuple[int, int, int] | None = None) -> Tensor:
        """Upsample values per token ``(B, t, h, w)`` to values per pixel ``(B, T, H, W)``.

        Args:
            grid: one value per token.
            mode: ``"nearest"`` assigns each value to exactly the pixels of its token. ``"trilinear"`` interpolates
                between the centers of the blocks.
            size: ``(T, H, W)`` of the clip, if it is larger than what the tokens cover. The model does not read the
                remaining pixels, so their value is 0. None is :attr:`pixels`.

        Returns:
            ``(B, T, H, W)``.

        Raises:
            TypeError: a side of ``size`` is not an integer.
            ValueError: ``grid`` has another shape, ``mode`` is unknown, or ``size`` is smaller than :attr:`pixels`.
        """
        if grid.ndim != 4 or tuple(grid.shape[1:]) != self.shape:
            raise ValueError(f"grid must be (B, t, h, w) = (B, *{self.shape}), got shape {tuple(grid.shape)}")
        check_choice("mode", mode, ("nearest", "trilinear"))
        if mode == "trilinear":
            pixels = F.interpolate(grid[:, None], size=self.pixels, mode="trilinear", align_corners=False)[:, 0]
        else:
            pixels = grid
            for axis in range(3):
                pixels = self._repeated(pixels, axis, dim=axis + 1)
        if size is None:
            return pixels
        check_sides("size", size)
        missing = [side - covered for side, covered in zip(size, self.pixels, strict=True)]
        if min(missing) < 0:
            raise ValueError(
                f"size must be at least {self.pixels}, the pixels that the tokens of {self} cover, got {tuple(size)}"
            )
        return F.pad(pixels, (0, missing[2], 0, missing[1], 0, missing[0]))

    def spread(self, grid: Tensor, mode: Mode = "nearest", size: tuple[int, int, int] | None = None) -> Tensor:
        """Distribute values per token ``(B, t, h, w)`` over pixels ``(B, T, H, W)``, so that each value keeps its sum.

        Example:
            >>> grid = TokenGrid(t=1, h=1, w=3, tubelet=(1, 2, 7 / 3))  # 7 pixels in 3 tokens
            >>> grid.spread(torch.tensor([[[[6.0, 4.0, 2.0]]]]))[0, 0, 0]
            tensor([1.5000, 1.5000, 0.6667, 0.6667, 0.6667, 0.5000, 0.5000])

        Args:
            grid, mode, size: as for :meth:`to_pixels`.

        Returns:
            ``(B, T, H, W)``, float.

        Raises:
            TypeError, ValueError: as for :meth:`to_pixels`.
        """
        for axis in range(3):
            per_token = self._received(axis, mode).to(grid.device)
            grid = grid / per_token.view([-1 if axis + 1 == place else 1 for place in range(4)])
        return self.to_pixels(grid, mode, size)

    def to_frames(self, steps: Tensor, num_frames: int) -> Tensor:
        """Repeat values per grid step ``(B, t, ...)`` to values per frame ``(B, T, ...)``.

        Args:
            steps: one value or map per time step of the grid.
            num_frames: T of the clip. Frames after the last grid step get the value 0.

        Returns:
            ``(B, T, ...)``.

        Raises:
            ValueError: ``num_frames`` is smaller than the number of frames that the tokens cover.
        """
        missing = num_frames - self.pixels[0]
        if missing < 0:
            raise ValueError(
                f"num_frames must be at least {self.pixels[0]}, the frames that the tokens of {self} cover, "
                f"got {num_frames}"
            )
        return F.pad(self._repeated(steps, 0, dim=1), (0, 0) * (steps.ndim - 2) + (0, missing))

    def spread_frames(self, steps: Tensor, num_frames: int) -> Tensor:
        """Distribute values per grid step ``(B, t)`` over frames ``(B, T)``, so that each value keeps its sum."""
        return self.to_frames(steps / self._received(0, "nearest").to(steps.device), num_frames)

    def _repeated(self, values: Tensor, axis: int, dim: int) -> Tensor:
        """Return one value per pixel along an axis, that of the token whose block contains the pixel's center."""
        count, side = self.shape[axis], self.tubelet[axis]
        if isinstance(side, int):
            return values.repeat_interleave(side, dim=dim)
        centers = torch.arange(self.pixels[axis], device=values.device) + 0.5
        return values.index_select(dim, (centers / side).long().clamp(max=count - 1))

    def _received(self, axis: int, mode: Mode) -> Tensor:
        """Return the sum over the pixels of an axis that each token's value gets in :meth:`to_pixels`, ``(n,)``."""
        count, side = self.shape[axis], self.tubelet[axis]
        if isinstance(side, int):  # interpolation by a whole factor keeps sums as well
            return torch.full((count,), float(side))
        one_each = torch.eye(count)
        if mode == "nearest":
            return self._repeated(one_each, axis, dim=1).sum(1)
        return F.interpolate(one_each[:, None], size=self.pixels[axis], mode="linear", align_corners=False).sum((1, 2))


@dataclass(frozen=True, eq=False)
class TokenRows:
    """The token of each query and key of an attention layer, which may run in several rows, such as one per frame.

    An attention matrix has the shape ``(..., Q, N)``. Its leading axes, flattened, count the examples of the batch, the
    rows and, if ``heads`` is False, the heads.

    Example:
        >>> import torch
        >>> grid = TokenGrid(t=2, h=1, w=2, prefix=1)  # class token, two tokens of frame 0, two of frame 1
        >>> rows = TokenRows.of("spatial", grid)
        >>> rows.keys
        tensor([[0, 1, 2],
                [0, 3, 4]])
        >>> weights = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0]])  # the output takes token 3 alone
        >>> matrix = torch.tensor([[[0.2, 0.3, 0.5]] * 3] * 2)  # (rows, Q, N)
        >>> rows.pull(weights, matrix)
        tensor([[0.2000, 0.0000, 0.0000, 0.3000, 0.5000]])

    Args:
        queries: ``(R, Q)`` int64, the index in the sequence of each row's queries; -1 for a query that is no token of
            the sequence, such as the learned query of a pooling head.
        keys: ``(R, N)`` int64, the same for keys.
        count: number of tokens of the sequence.
        heads: whether axis -3 of the matrix counts heads, which are then averaged before anything else.
        outer: product of the leading axes in front of the batch.
        order: ``(R * H,)``, the index among the leading entries of one example of row r and copy h, at ``r * H + h``.
            Copies are heads that are folded into the batch. None is their own order, without copies.
        axes: the axes of queries and of keys in the matrix.
        query_groups, key_groups: ``(count,)``, for a layer whose queries or keys stand for several tokens of the
            sequence, as after patch merging: the group of each token. ``queries`` and ``keys`` are then numbers of
            groups. The weight of a group is the sum of its tokens' weights, and is divided evenly among them.
    """

    queries: Tensor
    keys: Tensor
    count: int
    heads: bool = True
    outer: int = 1
    order: Tensor | None = None
    axes: tuple[int, int] = (-2, -1)
    query_groups: Tensor | None = None
    key_groups: Tensor | None = None

    @classmethod
    def of(cls, role: str, grid: TokenGrid) -> TokenRows:
        """Return the rows of a layer with a role, as in :class:`captum_staa.models.AttentionLayer`."""
        every, patches = torch.arange(grid.num_tokens)[None], grid.indices()
        if role == "joint":
            return cls(every, every, grid.num_tokens)
        if role == "pool":
            return cls(torch.full((1, 1), -1), every, grid.num_tokens)
        if role == "temporal":
            tracks = patches.flatten(1).T.contiguous()  # (h * w, t)
            return cls(tracks, tracks, grid.num_tokens)
        check_choice("role", role, ("joint", "spatial", "temporal", "pool"))
        frames = patches.flatten(1)  # (t, h * w)
        others = torch.ones(grid.num_tokens, dtype=torch.bool).index_fill(0, patches.flatten(), False).nonzero()[:, 0]
        before, after = others[others < patches.min()], others[others >= patches.min()]
        frames = torch.cat([before.expand(grid.t, -1), frames, after.expand(grid.t, -1)], 1)
        return cls(frames, frames, grid.num_tokens)

    @property
    def pools(self) -> bool:
        """Whether no query is a token of the sequence: the layer's results replace the tokens."""
        return bool((self.queries < 0).all())

    def gather(self, weights: Tensor) -> Tensor:
        """Return the weight of each query from those of the tokens, ``(B, N)`` to ``(B, R, Q)``.

        A token that is a query of several rows, such as a class token of every frame, has its weight divided among
        them, because models average the results.
        """
        queries = self.queries.to(weights.device)
        if self.pools:
            return weights.new_full((len(weights), *queries.shape), 1 / queries.numel())
        there = queries >= 0
        if self.query_groups is not None:
            groups = self.query_groups.to(weights.device)
            weights = weights.new_zeros(len(weights), int(groups.max()) + 1).index_add(1, groups, weights)
        times = torch.bincount(queries[there], minlength=weights.shape[1]).clamp(min=1)
        return (weights / times)[:, queries.clamp(min=0)] * there

    def pull(self, weights: Tensor, matrix: Tensor) -> Tensor:
        """Return the weights of the tokens before the layer's attention, from those after it.

        Args:
            weights: ``(B, count)``.
            matrix: ``(L, Q, N)``, attention averaged over the axis of heads, for L = B times rows and copies; or
                ``(L, N)``, already multiplied by the weights of :meth:`gather` and :meth:`fold`.

        Returns:
            ``(B, count)``. Tokens that are no queries keep their weight.

        Raises:
            ValueError: the matrix does not have the number of rows, queries and keys.
        """
        batch = len(weights)
        if matrix.ndim == 2:
            pulled = self.unfold(matrix, batch)
        else:
            with without_autocast(weights):
                pulled = (self.gather(weights)[:, :, None] @ self.unfold(matrix, batch))[:, :, 0]  # (B, R, N)
        keys = self.keys.to(weights.device)
        there = keys >= 0
        groups = torch.arange(self.count) if self.key_groups is None else self.key_groups
        groups, number = groups.to(weights.device), int(groups.max()) + 1
        moved = weights.new_zeros(len(weights), number).index_add(1, keys[there], pulled[:, there])
        if self.key_groups is not None:
            moved = (moved / groups.bincount(minlength=number).clamp(min=1))[:, groups]
        if self.pools:
            return moved
        return moved + weights * (1 - self._asked().to(weights))

    def of_keys(self, matrix: Tensor, batch: int) -> Tensor:
        """Return the mean over the queries of a matrix ``(L, Q, N)`` on the tokens of the sequence, ``(B, count)``.

        A token that is a key of several rows has their mean, one that is no key has 0, and the tokens of a group have
        the value of the group.
        """
        means = self.unfold(matrix, batch).mean(2)  # (B, R, N)
        keys = self.keys.to(matrix.device)
        there = keys >= 0
        groups = torch.arange(self.count) if self.key_groups is None else self.key_groups
        groups, number = groups.to(matrix.device), int(groups.max()) + 1
        summed = means.new_zeros(batch, number).index_add(1, keys[there], means[:, there])
        return (summed / keys[there].bincount(minlength=number).clamp(min=1))[:, groups]

    def _asked(self) -> Tensor:
        """Return for each token of the sequence whether it is a query, ``(count,)``."""
        groups = torch.arange(self.count) if self.query_groups is None else self.query_groups
        return torch.isin(groups, self.queries)

    def unfold(self, values: Tensor, batch: int) -> Tensor:
        """Return values ``(L, ...)`` per example and row ``(B, R, ...)``, averaged over copies."""
        rows, copies = len(self.keys), 1 if self.order is None else len(self.order) // len(self.keys)
        expected = (batch * rows * copies, *((self.queries.shape[1],) if values.ndim == 3 else ()), self.keys.shape[1])
        if tuple(values.shape) != expected:
            raise ValueError(
                f"attention must have {rows} rows of {self.queries.shape[1]} queries and {self.keys.shape[1]} keys for "
                f"each of {batch} clips, got a matrix of shape {tuple(values.shape)}, and not {expected}. Check the "
                f"role of the AttentionLayer and the grid, or leave out family=, so that they are found."
            )
        values = values.unflatten(0, (self.outer, batch, -1)).transpose(0, 1).flatten(1, 2)  # (B, R * copies, ...)
        if self.order is None:
            return values
        return values[:, self.order.to(values.device)].unflatten(1, (rows, copies)).mean(2)

    def fold(self, values: Tensor) -> Tensor:
        """Return values per example and row ``(B, R, ...)`` as ``(L, ...)``, repeated for copies."""
        if self.order is not None:
            values = values.repeat_interleave(len(self.order) // len(self.keys), 1)
            values = values[:, self.order.argsort().to(values.device)]
        return values.unflatten(1, (self.outer, -1)).transpose(0, 1).flatten(0, 2)
