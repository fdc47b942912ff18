"""Which pixels of a clip each video token of a language model represents."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class VideoTokens:
    """The grid of the video tokens of one clip, and the pixels of each token.

    A token represents ``step`` frames and a rectangle of the frame. The rectangles may have fractional sides: a
    LLaVA-OneVision of 384 pixels has 14 x 14 tokens of 27 pixels, and 6 pixels at the right and at the bottom that no
    token represents.

    Example:
        >>> tokens = VideoTokens(size=(5, 8, 8), step=2, h=2, w=2)
        >>> tokens.shape, tokens.count  # the last step has one frame
        ((3, 2, 2), 12)
        >>> values = torch.zeros(1, 3, 2, 2)
        >>> values[0, 1, 0, 1] = 32.0
        >>> pixels = tokens.to_pixels(values)
        >>> pixels[0, 2, 0, 4].item(), pixels[0, 4].sum().item(), pixels.sum().item()
        (1.0, 0.0, 32.0)
        >>> torch.equal(tokens.from_pixels(pixels), values)
        True

    Args:
        size: ``(T, H, W)`` of the clip.
        step: number of frames per token. The last token may have fewer.
        h: number of rows of the grid.
        w: number of columns of the grid.
        covered: ``(height, width)`` of the part of the frame that tokens represent, from the top left corner. None is
            the whole frame.
        tail: number of tokens after those of the grid, which represent no pixels (LLaVA-OneVision: one).
        merge: number of patches of the vision tower per side of a token, perhaps a fraction.
    """

    size: tuple[int, int, int]
    step: int
    h: int
    w: int
    covered: tuple[float, float] | None = None
    tail: int = 0
    merge: float = 1

    @property
    def t(self) -> int:
        """Number of steps in time."""
        return -(-self.size[0] // self.step)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(t, h, w)``."""
        return self.t, self.h, self.w

    @property
    def count(self) -> int:
        """Number of tokens that represent pixels."""
        return self.t * self.h * self.w

    @property
    def sides(self) -> tuple[float, float]:
        """``(height, width)`` of a token in pixels."""
        height, width = self.covered or self.size[1:]
        return height / self.h, width / self.w

    @property
    def patches(self) -> VideoTokens:
        """The grid of the patches that the vision tower reads, of which each token merges several."""
        h, w = round(self.h * self.merge), round(self.w * self.merge)
        return replace(self, h=h, w=w, tail=0, merge=1)

    @property
    def frames(self) -> Tensor:
        """Number of frames of each step, ``(t,)`` int64."""
        return torch.full((self.t,), self.step).cumsum(0).clamp(max=self.size[0]).diff(prepend=torch.zeros(1).long())

    def to_pixels(self, values: Tensor) -> Tensor:
        """Spread the value of each token evenly over its pixels, so that sums are kept.

        Args:
            values: ``(..., t, h, w)``.

        Returns:
            ``(..., T, H, W)``.
        """
        times, rows, columns = self._shares(values)
        values = values / (times.sum(0)[:, None, None] * rows.sum(0)[:, None] * columns.sum(0))
        return torch.einsum("...thw,Tt,Hh,Ww->...THW", values, times, rows, columns)

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """Return the sum of the pixels of each token, ``(..., t, h, w)``, from ``(..., T, H, W)``."""
        return torch.einsum("...THW,Tt,Hh,Ww->...thw", pixels, *self._shares(pixels))

    def _shares(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return for each axis which part of each pixel belongs to each token, such as ``(H, h)``."""
        frames, height, width = self.size
        covered = self.covered or (height, width)
        sides = ((frames, self.t, float(self.step)), (height, self.h, covered[0] / self.h))
        shares = [_overlaps(*side) for side in (*sides, (width, self.w, covered[1] / self.w))]
        time, row, column = (share.to(like) for share in shares)
        return time, row, column


def _overlaps(pixels: int, cells: int, side: float) -> Tensor:
    """Return the length of the overlap of each pixel with each cell of length ``side``, ``(pixels, cells)``."""
    low, start = torch.arange(pixels, dtype=torch.float64)[:, None], torch.arange(cells, dtype=torch.float64) * side
    return (torch.minimum(low + 1, start + side) - torch.maximum(low, start)).clamp(min=0)
