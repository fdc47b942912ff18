"""The (t, h, w) grid of a transformer's tokens, and its conversion to tokens and to pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F

from captum_staa._utils.checks import check_choice, check_count, check_sides

if TYPE_CHECKING:
    from torch import Tensor

Order = Literal["thw", "hwt"]


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

    Args:
        t: number of time steps of the grid.
        h: number of rows of the grid.
        w: number of columns of the grid.
        prefix: number of tokens before the grid (1 with a CLS token).
        order: order of the tokens. ``"thw"`` is frame by frame. ``"hwt"`` is patch by patch, with time as the fastest
            axis (TimeSformer).
        tubelet: ``(frames, height, width)`` of the block of pixels that one token represents.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is not positive, ``tubelet`` does not have three sides, or ``order`` is unknown.
    """

    t: int
    h: int
    w: int
    prefix: int = 0
    order: Order = "thw"
    tubelet: tuple[int, int, int] = (1, 1, 1)

    def __post_init__(self) -> None:
        for name, least in (("t", 1), ("h", 1), ("w", 1), ("prefix", 0)):
            check_count(f"{name} of a token grid", getattr(self, name), least)
            object.__setattr__(self, name, int(getattr(self, name)))  # small NumPy integers overflow in products
        check_sides("tubelet", self.tubelet)
        object.__setattr__(self, "tubelet", tuple(map(int, self.tubelet)))
        check_choice("order", self.order, ("thw", "hwt"))

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
        """Number of all tokens, including the prefix."""
        return self.prefix + self.num_patches

    @property
    def pixels(self) -> tuple[int, int, int]:
        """``(T, H, W)`` of the part of the clip that the tokens cover."""
        return self.t * self.tubelet[0], self.h * self.tubelet[1], self.w * self.tubelet[2]

    def to_grid(self, tokens: Tensor) -> Tensor:
        """Reshape values per token ``(..., N)`` to ``(..., t, h, w)``.

        Args:
            tokens: one value per token. The values of the prefix, if present, are dropped.

        Returns:
            ``(..., t, h, w)``.

        Raises:
            ValueError: N is neither :attr:`num_tokens` nor :attr:`num_patches`.
        """
        count = tokens.shape[-1]
        if count == self.num_tokens:
            tokens = tokens[..., self.prefix :]
        elif count != self.num_patches:
            raise ValueError(
                f"the last axis of tokens must have {self.num_tokens} values ({self.num_patches} without the prefix) "
                f"for {self}, got shape {tuple(tokens.shape)}. Check that the clips have the size (T, H, W) = "
                f"{self.pixels} of the grid."
            )
        if self.order == "thw":
            return tokens.unflatten(-1, (self.t, self.h, self.w))
        return tokens.unflatten(-1, (self.h, self.w, self.t)).movedim(-1, -3)

    def to_tokens(self, grid: Tensor) -> Tensor:
        """Reshape values ``(..., t, h, w)`` to ``(..., t*h*w)`` in the model's order, without the prefix.

        Raises:
            ValueError: the last axes of ``grid`` are not ``(t, h, w)``.
        """
        if tuple(grid.shape[-3:]) != self.shape:
            raise ValueError(f"the last axes of grid must be (t, h, w) = {self.shape}, got shape {tuple(grid.shape)}")
        return (grid if self.order == "thw" else grid.movedim(-3, -1)).flatten(-3)

    def to_pixels(
        self,
        grid: Tensor,
        mode: Literal["nearest", "trilinear"] = "nearest",
        size: tuple[int, int, int] | None = None,
    ) -> Tensor:
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
            for axis, repeats in enumerate(self.tubelet, start=1):
                pixels = pixels.repeat_interleave(repeats, dim=axis)
        if size is None:
            return pixels
        check_sides("size", size)
        missing = [side - covered for side, covered in zip(size, self.pixels, strict=True)]
        if min(missing) < 0:
            raise ValueError(
                f"size must be at least {self.pixels}, the pixels that the tokens of {self} cover, got {tuple(size)}"
            )
        return F.pad(pixels, (0, missing[2], 0, missing[1], 0, missing[0]))

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
        frames = steps.repeat_interleave(self.tubelet[0], dim=1)
        return F.pad(frames, (0, 0) * (steps.ndim - 2) + (0, missing))
