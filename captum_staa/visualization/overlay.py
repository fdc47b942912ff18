"""Overlay of a saliency map on the frames of a clip, in colors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from captum_staa.visualization.figure import DEFAULT_STYLE, SIGNS, Sign, Style
from captum_staa.visualization.frames import Frames, Pixels, check_aspect, place
from captum_staa.visualization.saliency import Attributions, Maps, Saliency, saliency

LUMINANCE = np.array([0.299, 0.587, 0.114])  # weights of red, green and blue in gray
CROPPED = "\npale border: outside of the crop that the model sees"
UNSEEN = np.array([0.82, 0.82, 0.82])  # outside of the crop; a gray that is in none of the default color maps


@dataclass(frozen=True, eq=False)
class Overlay:
    """A clip with its saliency map. It draws frame by frame, because all pictures may not fit into memory.

    Attributes:
        frames: the clip.
        saliency: the normalized map ``(T, h, w)`` and its scale; None for ``method="original_image"``.
        style: how to draw the map.
    """

    frames: Frames
    saliency: Saliency | None
    style: Style

    def picture(self, at: int) -> NDArray[np.uint8]:
        """Return the picture ``(H, W, 3)`` uint8 of one frame."""
        frame = self.frames.pixels[at]
        if self.saliency is None:
            return frame
        (values,), seen = place(self.saliency.values[at : at + 1], self.frames.size, self.frames.crop)
        picture, style = frame / 255.0, self.style
        unseen = UNSEEN
        if style.method == "masked_image":
            mixed = picture * values[..., None]
        elif style.method == "alpha_scaling":
            mixed = 1 - (1 - picture) * values[..., None]
        else:
            low = style.limits[0]
            mixed = style.colors((values - low) / (1 - low))[..., :3]  # (H, W, 3)
            if style.method == "blended_heat_map":
                gray = (picture @ LUMINANCE)[..., None]
                opacity = style.opacity_of(values)[..., None]
                mixed = (1 - opacity) * gray + opacity * mixed
                unseen = 0.35 * gray + 0.65 * UNSEEN
        return (np.where(seen[..., None], mixed, unseen) * 255).round().astype(np.uint8)

    @property
    def pictures(self) -> NDArray[np.uint8]:
        """``(T, H, W, 3)`` uint8: the pictures of all frames."""
        return np.stack([self.picture(at) for at in range(len(self.frames))])

    @property
    def scale(self) -> str:
        """Text with the attribution of the strongest color."""
        if self.saliency is None:
            return ""
        return full_color(self.saliency.scale, self.style.sign)

    @property
    def caption(self) -> str:
        """Text with the quantity that the colors show, its scale, and what the pale part of the frames is."""
        return described(self.style.sign, self.scale, "in all frames", self.frames.cropped)


def full_color(scale: float, sign: Sign) -> str:
    """Return a text with the attribution of the strongest color.

    Example:
        >>> full_color(0.02187, "positive"), full_color(3, "all"), full_color(0, "all")
        ('full color = 0.0219', 'full color = ±3', 'zero everywhere')
    """
    return f"full color = {'±' * (sign == 'all')}{scale:.3g}" if scale else "zero everywhere"


def described(sign: Sign, scale: str, where: str, cropped: bool) -> str:
    """Return the label of a color bar: the quantity, its scale and where it holds, and what pale parts are."""
    return f"{SIGNS[sign]}; {scale}{', ' * bool(scale)}{where}" + CROPPED * cropped


def overlay(attributions: Attributions | None, frames: Frames | Pixels, *, style: Style = DEFAULT_STYLE) -> Overlay:
    """Return a clip with its map as pictures, for figures of your own.

    Example:
        >>> frames = np.full((8, 48, 64, 3), 128, dtype=np.uint8)
        >>> drawn = overlay(np.ones((8, 6, 8)), frames, style=Style(method="heat_map"))
        >>> drawn.picture(3).shape, drawn.scale
        ((48, 64, 3), 'full color = 1')

    Args:
        attributions: attributions of the clip, in one of the forms of :func:`~captum_staa.visualization.show_frames`.
        frames: the clip, in one of the forms of :class:`~captum_staa.visualization.Frames`.
        style: how to draw the attributions.

    Raises:
        TypeError, ValueError: an argument is invalid, or the clip and the attributions differ in the number of frames.
    """
    frames = Frames.of(frames)
    if style.method == "original_image":
        return Overlay(frames, None, style)
    if attributions is None:
        raise ValueError(
            f"attributions must be given with method={style.method!r}, got None. Pass attributions, or use "
            f"Style(method='original_image')."
        )
    (drawn,) = on_one_scale([Maps.of(attributions, frames).joint], frames, style)
    return drawn


def on_one_scale(maps: Sequence[NDArray[np.float64]], frames: Frames, style: Style) -> list[Overlay]:
    """Return a clip with each of several maps ``(T, h, w)``. The strongest of all maps has the strongest color."""
    if style.method == "original_image":
        return [Overlay(frames, None, style) for _ in maps]
    for values in maps:
        check_aspect((values.shape[1], values.shape[2]), frames)
    scale = max(saliency(values, style.sign, style.outlier_perc).scale for values in maps)
    return [Overlay(frames, saliency(values, style.sign, style.outlier_perc, scale), style) for values in maps]
