"""Overlay of a saliency map on the frames of a clip, in colors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap
from numpy.typing import NDArray

from captum_staa._utils.checks import check_choice
from captum_staa.layout import VideoLayout

from .placement import Crop, place
from .saliency import SIGNS, Attributions, Clip, Saliency, Sign, as_pictures, saliency

Method = Literal["blended_heat_map", "heat_map", "original_image", "masked_image", "alpha_scaling"]
METHODS = ("blended_heat_map", "heat_map", "original_image", "masked_image", "alpha_scaling")
UNSEEN = np.array([0.82, 0.82, 0.82])  # outside of the crop; a gray that is in none of the default color maps

# Lightness falls from 76 to 10 and rises again in equal steps, so that equal differences look equal for both signs, and
# zero is neutral. The maps of matplotlib with a dark center (berlin, managua, since 3.10) lack one of these properties.
DIVERGING = LinearSegmentedColormap.from_list(
    "blue_black_orange",
    ["#74c3ff", "#0298db", "#016c9d", "#014364", "#1b1b1b", "#603400", "#985501", "#d47801", "#ffa854"],
)


@dataclass(frozen=True)
class Overlay:
    """A clip with its saliency map. It draws frame by frame, because all frames may not fit into memory."""

    original: NDArray[np.uint8]  # (T, H, W, 3)
    saliency: Saliency | None  # (T, h, w); None for method="original_image"
    method: Method
    sign: Sign
    alpha_overlay: float
    colors: Colormap
    crop: Crop | None

    def frame(self, at: int) -> NDArray[np.uint8]:
        """Return one frame ``(H, W, 3)`` uint8, drawn with ``method``."""
        frame = self.original[at]
        if self.saliency is None:
            return frame
        (values,), seen = place(self.saliency.values[at : at + 1], frame.shape[:2], self.crop)
        picture = frame / 255.0
        unseen = UNSEEN
        if self.method == "masked_image":
            mixed = picture * values[..., None]
        elif self.method == "alpha_scaling":
            mixed = 1 - (1 - picture) * values[..., None]
        else:
            low = self.limits[0]
            mixed = self.colors((values - low) / (1 - low))[..., :3]  # (H, W, 3)
            if self.method == "blended_heat_map":
                gray = (picture @ [0.299, 0.587, 0.114])[..., None]
                opacity = opacity_of(values, self.alpha_overlay)[..., None]
                mixed = (1 - opacity) * gray + opacity * mixed
                unseen = 0.35 * gray + 0.65 * UNSEEN
        return (np.where(seen[..., None], mixed, unseen) * 255).round().astype(np.uint8)

    @property
    def frames(self) -> NDArray[np.uint8]:
        """``(T, H, W, 3)``: all frames."""
        return np.stack([self.frame(at) for at in range(len(self.original))])

    @property
    def limits(self) -> tuple[float, float]:
        """The values at the two ends of the color map."""
        return (-1.0 if self.sign == "all" else 0.0), 1.0

    @property
    def cmap(self) -> Colormap | None:
        """The color map as it appears in the frames; None if ``method`` draws no heat map."""
        if self.method == "heat_map":
            return self.colors
        return blended(self.colors, self.limits[0], self.alpha_overlay) if self.method == "blended_heat_map" else None

    @property
    def scale(self) -> str:
        """Text with the attribution of the strongest color."""
        if self.saliency is None:
            return ""
        return f"1 = {self.saliency.scale:.3g}" if self.saliency.scale else "zero everywhere"

    @property
    def caption(self) -> str:
        """Text with the quantity that the colors show, and its scale."""
        return f"{SIGNS[self.sign]}, {self.scale} (one scale for all frames)"


def default_cmap(sign: Sign) -> Colormap:
    """Return the color map of a sign: perceptually uniform, dark at zero, and suitable for color-blind readers."""
    return DIVERGING if sign == "all" else matplotlib.colormaps["viridis" if sign == "negative" else "inferno"]


def overlay(
    clip: Clip,
    attributions: Attributions | None,
    *,
    layout: VideoLayout | str | None = None,
    method: Method = "blended_heat_map",
    sign: Sign = "absolute_value",
    outlier_perc: float = 2,
    alpha_overlay: float = 0.7,
    cmap: str | Colormap | None = None,
    crop: Crop | None = None,
    index: int | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> Overlay:
    """Check the arguments, which are those of :func:`captum_staa.visualization.show_frames`, and return the overlay."""
    check_choice("method", method, METHODS)
    check_choice("sign", sign, SIGNS)
    if not 0 <= alpha_overlay <= 1:
        raise ValueError(f"alpha_overlay must be an opacity in [0, 1], got {alpha_overlay!r}")
    if method in ("masked_image", "alpha_scaling") and sign == "all":
        raise ValueError(
            f"sign must be 'positive', 'negative' or 'absolute_value' with {method = }, got 'all'. Choose one of them, "
            f"or use method='heat_map', which can draw both signs."
        )
    original = as_pictures(clip, layout, index, mean, std)
    colors = default_cmap(sign) if cmap is None else matplotlib.colormaps.get_cmap(cmap)
    if method == "original_image":
        return Overlay(original, None, method, sign, alpha_overlay, colors, crop)
    if attributions is None:
        raise ValueError(
            f"attributions must be given with {method = }, got None. Pass attributions, or use method='original_image'."
        )
    maps = saliency(attributions, layout, sign, outlier_perc, index)
    if len(maps.values) != len(original):
        raise ValueError(
            f"attributions must have as many frames as the clip, {len(original)}, got {len(maps.values)} (shape "
            f"{maps.values.shape}). Pass the frames that the model saw, or resize maps on a token grid with "
            f"TokenGrid.to_pixels."
        )
    place(maps.values[:1], original.shape[1:3], crop)  # to raise errors here, and not when the first frame is drawn
    return Overlay(original, maps, method, sign, alpha_overlay, colors, crop)


def opacity_of(values: NDArray[np.floating], alpha_overlay: float) -> NDArray[np.floating]:
    """Return the opacity: 0 at value 0, rising linearly to ``alpha_overlay`` at half of the scale and above."""
    return alpha_overlay * np.minimum(1, 2 * np.abs(values))


def blended(colors: Colormap, low: float, alpha_overlay: float) -> ListedColormap:
    """Return the colors as they appear over a mid-gray frame, for a color bar that matches the picture."""
    values = np.linspace(low, 1, 256)
    opacity = opacity_of(values, alpha_overlay)[:, None]
    return ListedColormap((1 - opacity) * 0.5 + opacity * colors(np.linspace(0, 1, 256))[:, :3])
