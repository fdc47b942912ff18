"""Tokens to a (t, h, w) grid and back, and from the grid to pixels."""

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
    """Where each token of a video transformer stands in space and time.

    Example:
        >>> import torch
        >>> grid = TokenGrid(t=8, h=14, w=14, prefix=1, order="hwt", tubelet=(1, 16, 16))  # TimeSformer-base
        >>> attention = torch.zeros(1, grid.num_tokens)
        >>> attention[0, 1 + (3 * 14 + 2) * 8 + 5] = 1.0  # row 3, column 2, frame 5: time runs fastest
        >>> pixels = grid.to_pixels(grid.to_grid(attention))
        >>> pixels.shape, int(pixels.sum())  # exactly one 16 x 16 block of frame 5 is lit
        (torch.Size([1, 8, 224, 224]), 256)
        >>> pixels[0, 5, 48:64, 32:48].min().item()
        1.0

    Args:
        t: grid steps in time.
        h: grid rows.
        w: grid columns.
        prefix: tokens before the grid (1 with a CLS token).
        order: ``"thw"``, frame after frame, or ``"hwt"``, patch after patch with time fastest (TimeSformer).
        tubelet: ``(frames, height, width)`` in pixels of the block behind one token.

    Raises:
        TypeError: a size is no whole number.
        ValueError: a size is not positive, the tubelet has not three, or ``order`` is unknown.
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
            object.__setattr__(self, name, int(getattr(self, name)))  # numpy's small ones overflow in products
        check_sides("tubelet", self.tubelet)
        object.__setattr__(self, "tubelet", tuple(map(int, self.tubelet)))
        check_choice("order", self.order, ("thw", "hwt"))

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(t, h, w)``."""
        return self.t, self.h, self.w

    @property
    def num_patches(self) -> int:
        """Tokens that stand for pixels."""
        return self.t * self.h * self.w

    @property
    def num_tokens(self) -> int:
        """All tokens, the prefix included."""
        return self.prefix + self.num_patches

    @property
    def pixels(self) -> tuple[int, int, int]:
        """``(T, H, W)`` of the clip that the tokens cover."""
        return self.t * self.tubelet[0], self.h * self.tubelet[1], self.w * self.tubelet[2]

    def to_grid(self, tokens: Tensor) -> Tensor:
        """``(..., N)`` values per token, the prefix dropped where it is there, to ``(..., t, h, w)``.

        Raises:
            ValueError: N is neither the number of tokens nor that of patches.
        """
        count = tokens.shape[-1]
        if count == self.num_tokens:
            tokens = tokens[..., self.prefix :]
        elif count != self.num_patches:
            raise ValueError(
                f"the last axis must hold {self.num_tokens} tokens (or {self.num_patches} without the prefix) for "
                f"{self}, but the shape is {tuple(tokens.shape)}; was the model given another clip size?"
            )
        if self.order == "thw":
            return tokens.unflatten(-1, (self.t, self.h, self.w))
        return tokens.unflatten(-1, (self.h, self.w, self.t)).movedim(-1, -3)

    def to_tokens(self, grid: Tensor) -> Tensor:
        """``(..., t, h, w)`` to ``(..., t*h*w)`` in the model's order, without the prefix."""
        if tuple(grid.shape[-3:]) != self.shape:
            raise ValueError(f"the last axes must be (t, h, w) = {self.shape}, but the shape is {tuple(grid.shape)}")
        return (grid if self.order == "thw" else grid.movedim(-3, -1)).flatten(-3)

    def to_pixels(
        self,
        grid: Tensor,
        mode: Literal["nearest", "trilinear"] = "nearest",
        size: tuple[int, int, int] | None = None,
    ) -> Tensor:
        """``(B, t, h, w)`` values per token to ``(B, T, H, W)`` values per pixel.

        Args:
            grid: one value per token.
            mode: ``"nearest"`` lights exactly the token's own block; ``"trilinear"`` interpolates between the
                blocks' centers.
            size: ``(T, H, W)`` of the clip, where it is larger than what the tokens cover (the model never reads
                the rest: it gets zero).

        Raises:
            TypeError: a side of ``size`` is no whole number.
            ValueError: ``grid`` does not fit, ``mode`` is unknown, or ``size`` is smaller than the tokens' pixels.
        """
        if grid.ndim != 4 or tuple(grid.shape[1:]) != self.shape:
            raise ValueError(f"grid values must be (B, t, h, w) = (B, *{self.shape}), but came as {tuple(grid.shape)}")
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
        missing = [want - have for want, have in zip(size, self.pixels, strict=True)]
        if min(missing) < 0:
            raise ValueError(f"size {tuple(size)} is smaller than the {self.pixels} pixels behind the tokens of {self}")
        return F.pad(pixels, (0, missing[2], 0, missing[1], 0, missing[0]))

    def to_frames(self, steps: Tensor, num_frames: int) -> Tensor:
        """``(B, t, ...)`` values per grid step to ``(B, T, ...)`` values per frame; frames past the last step get zero.

        Raises:
            ValueError: ``num_frames`` is smaller than the frames behind the tokens.
        """
        missing = num_frames - self.pixels[0]
        if missing < 0:
            raise ValueError(
                f"num_frames {num_frames} is smaller than the {self.pixels[0]} behind the tokens of {self}"
            )
        frames = steps.repeat_interleave(self.tubelet[0], dim=1)
        return F.pad(frames, (0, 0) * (steps.ndim - 2) + (0, missing))
