"""How maps are drawn: the method, the sign, the scale and the colors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap
from numpy.typing import NDArray

from captum_staa._utils.checks import check_choice, is_number

# Colors of the curves of classes beside each other; not orange and blue, which are evidence for and against a class.
CLASS_COLORS = ("#9a5bc4", "#6f9a00", "#c2457f", "#8a7340")
Method = Literal["blended_heat_map", "heat_map", "original_image", "masked_image", "alpha_scaling"]
Sign = Literal["absolute_value", "positive", "negative", "all"]

METHODS = ("blended_heat_map", "heat_map", "original_image", "masked_image", "alpha_scaling")
SIGNS: dict[Sign, str] = {
    "absolute_value": "|attribution|",
    "positive": "positive attribution",
    "negative": "negative attribution, magnitude",
    "all": "attribution",
}

# Lightness falls from 76 to 10 and rises again in equal steps, so that equal differences look equal for both signs, and
# zero is neutral. The maps of matplotlib with a dark center (berlin, managua, since 3.10) lack one of these properties.
DIVERGING = LinearSegmentedColormap.from_list(
    "blue_black_orange",
    ["#74c3ff", "#0298db", "#016c9d", "#014364", "#1b1b1b", "#603400", "#985501", "#d47801", "#ffa854"],
)


@dataclass(frozen=True)
class Style:
    """How maps are drawn. The fields have the meaning of the same parameters of Captum's ``visualize_image_attr``.

    There are two differences. All frames of a clip share one scale. The opacity of the heat map grows with the
    attribution, so that the gray frame stays visible where the attribution is small.

    Example:
        >>> Style(sign="positive", outlier_perc=0).colors.name
        'inferno'

    Attributes:
        method: ``"blended_heat_map"``, ``"heat_map"``, ``"masked_image"`` (the frame times the map: black where the map
            is zero), ``"alpha_scaling"`` (the same, but white where the map is zero) or ``"original_image"``, which
            draws no attributions.
        sign: attributions to draw: ``"absolute_value"``, ``"positive"``, ``"negative"`` (as magnitudes) or ``"all"``.
            The methods ``"masked_image"`` and ``"alpha_scaling"`` do not support ``"all"``.
        outlier_perc: percentage in [0, 100]: the largest values that together make up this share of the clip's total
            are clipped to 1.
        alpha_overlay: maximum opacity of the heat map, in [0, 1].
        cmap: color map, or its name; None uses inferno, viridis for ``sign="negative"``, and blue to orange for
            ``sign="all"``.
        show_colorbar: whether to draw a color bar.
        fig_size: width and height of a new figure in inches; None fits the frames.

    Raises:
        ValueError: a field has another value.
    """

    method: Method = "blended_heat_map"
    sign: Sign = "absolute_value"
    outlier_perc: float = 2
    alpha_overlay: float = 0.7
    cmap: str | Colormap | None = None
    show_colorbar: bool = True
    fig_size: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("sign", self.sign, SIGNS)
        if not (is_number(self.outlier_perc) and 0 <= self.outlier_perc <= 100):
            raise ValueError(f"outlier_perc must be a percentage in [0, 100], got {self.outlier_perc!r}")
        if not (is_number(self.alpha_overlay) and 0 <= self.alpha_overlay <= 1):
            raise ValueError(f"alpha_overlay must be an opacity in [0, 1], got {self.alpha_overlay!r}")
        if self.method in ("masked_image", "alpha_scaling") and self.sign == "all":
            raise ValueError(
                f"sign must be 'positive', 'negative' or 'absolute_value' with method={self.method!r}, got 'all'. "
                f"Choose one of them, or use method='heat_map', which can draw both signs."
            )
        _ = self.colors  # raises ValueError if matplotlib does not know the color map

    @property
    def colors(self) -> Colormap:
        """The color map of the values."""
        return self.colors_of(self.sign)

    def colors_of(self, sign: Sign) -> Colormap:
        """Return ``cmap``, or the default of a sign: perceptually uniform, and safe for color-blind readers."""
        if self.cmap is not None:
            return matplotlib.colormaps.get_cmap(self.cmap)
        return DIVERGING if sign == "all" else matplotlib.colormaps["viridis" if sign == "negative" else "inferno"]

    @property
    def limits(self) -> tuple[float, float]:
        """The values at the two ends of the color map."""
        return (-1.0 if self.sign == "all" else 0.0), 1.0

    @property
    def bar_colors(self) -> Colormap | None:
        """The colors of the color bar, as they appear over a mid-gray frame; None without a color bar."""
        if not self.show_colorbar or self.method not in ("heat_map", "blended_heat_map"):
            return None
        if self.method == "heat_map":
            return self.colors
        opacity = self.opacity_of(np.linspace(self.limits[0], 1, 256))[:, None]
        return ListedColormap((1 - opacity) * 0.5 + opacity * self.colors(np.linspace(0, 1, 256))[:, :3])

    def opacity_of(self, values: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return the opacity: 0 at value 0, rising linearly to ``alpha_overlay`` at half of the scale and above."""
        return self.alpha_overlay * np.minimum(1, 2 * np.abs(values))


DEFAULT_STYLE = Style()
