"""Colours: a saliency map laid over its frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap
from numpy.typing import NDArray

from captum_staa.checks import check_choice
from captum_staa.layout import VideoLayout

from ._maps import SIGNS, Attributions, Clip, Crop, Sign, as_frames, place, saliency

Method = Literal["blended_heat_map", "heat_map", "original_image", "masked_image"]
METHODS = ("blended_heat_map", "heat_map", "original_image", "masked_image")
UNSEEN = np.array([0.82, 0.82, 0.82])  # where a map says nothing; no default colour map holds this grey

# Lightness falls from 76 to 10 and rises again in equal steps, so that equal distances look equal on both sides, and
# zero is neutral. Matplotlib's dark-centred maps (berlin, managua, from 3.10 on) miss one or the other.
DIVERGING = LinearSegmentedColormap.from_list(
    "blue_black_orange",
    ["#74c3ff", "#0298db", "#016c9d", "#014364", "#1b1b1b", "#603400", "#985501", "#d47801", "#ffa854"],
)


class Overlay(NamedTuple):
    """Pictures to show, and the key to their colours."""

    frames: NDArray[np.uint8]  # (T, H, W, 3), as method wants them
    original: NDArray[np.uint8]  # (T, H, W, 3)
    cmap: Colormap | None  # as it appears in the pictures; None where they hold no heat map
    limits: tuple[float, float]  # (0, 1), or (-1, 1) for sign="all"
    caption: str  # what the colours show, and on which scale


def default_cmap(sign: Sign) -> Colormap:
    """Perceptually uniform, dark at zero, and safe for colour-blind readers."""
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
    """Draw every frame of a clip; the arguments are those of :func:`captum_staa.visualization.show_frames`."""
    check_choice("method", method, METHODS)
    if not 0 <= alpha_overlay <= 1:
        raise ValueError(f"alpha_overlay is an opacity in [0, 1], but {alpha_overlay!r} came")
    if method == "masked_image" and sign == "all":
        raise ValueError("a masked image cannot show two signs; choose sign='positive', 'negative' or 'absolute_value'")
    original = as_frames(clip, layout, index, mean, std)
    if method == "original_image":
        return Overlay(original, original, None, (0, 1), "")
    if attributions is None:
        raise ValueError(f"{method = } needs attributions, but None came; method='original_image' does without")
    maps, scale = saliency(attributions, layout, sign, outlier_perc, index)
    laid, seen = place(maps, original.shape[:3], crop)
    colours = default_cmap(sign) if cmap is None else matplotlib.colormaps.get_cmap(cmap)
    low = -1.0 if sign == "all" else 0.0
    drawn = np.empty_like(original)
    for at, (frame, values) in enumerate(zip(original, laid, strict=True)):  # as floats, a clip may not fit into memory
        heat = colours((values - low) / (1 - low))[..., :3]  # (H, W, 3)
        picture = frame / 255.0
        if method == "blended_heat_map":
            grey = (picture @ [0.299, 0.587, 0.114])[..., None]
            opacity = opacity_of(values, alpha_overlay)[..., None]
            mixed = (1 - opacity) * grey + opacity * heat
            mixed = np.where(seen[..., None], mixed, 0.35 * grey + 0.65 * UNSEEN)
        else:
            mixed = np.where(seen[..., None], heat if method == "heat_map" else picture * values[..., None], UNSEEN)
        drawn[at] = (mixed * 255).round()
    key = None
    if method == "heat_map":
        key = colours
    elif method == "blended_heat_map":
        key = blended(colours, low, alpha_overlay)
    caption = (
        f"{SIGNS[sign]}, 1 = {scale:.3g} (one scale for all frames)" if scale else f"{SIGNS[sign]}: zero everywhere"
    )
    return Overlay(drawn, original, key, (low, 1.0), caption)


def opacity_of(values: NDArray[np.floating], alpha_overlay: float) -> NDArray[np.floating]:
    """Nothing where there is no evidence, ``alpha_overlay`` from half of the scale on."""
    return alpha_overlay * np.minimum(1, 2 * np.abs(values))


def blended(colours: Colormap, low: float, alpha_overlay: float) -> ListedColormap:
    """The colours as they come out over a mid-grey picture, so that a colour bar shows what the eye meets."""
    values = np.linspace(low, 1, 256)
    opacity = opacity_of(values, alpha_overlay)[:, None]
    return ListedColormap((1 - opacity) * 0.5 + opacity * colours(np.linspace(0, 1, 256))[:, :3])
