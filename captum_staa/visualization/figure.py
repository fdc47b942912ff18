"""Shared parts of all figures: creation of the figure, frame labels, sheets of frames and color bars."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from numpy.typing import NDArray

from captum_staa._utils.checks import check_choice, check_count, is_number

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


LABEL_SIZE = 9  # points
LINE = 0.16  # height of a line of a label in inches


def new_figure(
    plt_fig_axis: tuple[Figure, Axes] | None, use_pyplot: bool, fig_size: tuple[float, float]
) -> tuple[Figure, Axes]:
    """Return the figure and axes of the caller, or new ones, with or without pyplot."""
    if plt_fig_axis is not None:
        return plt_fig_axis
    if use_pyplot:
        from matplotlib import pyplot  # not at module level: the import selects a backend for the process

        return pyplot.subplots(figsize=fig_size, layout="constrained")
    figure = Figure(figsize=fig_size, layout="constrained")
    return figure, figure.subplots()


def evenly(total: int, num_frames: int | None) -> list[int]:
    """Return the middle frame of each of ``num_frames`` equal parts of a clip; all frames if None.

    Example:
        >>> evenly(8, 4), evenly(2, 4), evenly(3, None)
        ([1, 3, 5, 7], [0, 1], [0, 1, 2])
    """
    if num_frames is not None:
        check_count("num_frames", num_frames)
    shown = min(num_frames or total, total)
    return [(2 * i + 1) * total // (2 * shown) for i in range(shown)]


def explained_bars(predictions: Sequence[tuple[str, float]], targets: Sequence[str | None]) -> dict[int, int]:
    """Return the position in ``targets`` of each prediction that is one of them, by its position in ``predictions``.

    A target of None is the first prediction.
    """
    for label, probability in predictions:
        if not 0 <= probability <= 1:
            raise ValueError(
                f"predictions must be pairs (label, probability in [0, 1]), got ({label!r}, {probability!r})"
            )
    labels = [label for label, _ in predictions]
    names = [labels[0] if name is None and labels else name for name in targets]
    return {labels.index(name): i for i, name in enumerate(names) if name in labels}


def text_width(text: str) -> float:
    """Return the width in inches of a line of text at the size of labels."""
    return float(TextPath((0, 0), text, size=LABEL_SIZE).get_extents().width) / 72 if text.strip() else 0.0


def wrapped(name: str, width: float) -> str:
    """Break a name into lines of at most ``width`` inches. Lines break only between words, also those of CamelCase.

    Example:
        >>> wrapped("IntegratedGradients of the last layer", 1.0).split("\\n")
        ['Integrated', 'Gradients of', 'the last layer']
    """
    parts = re.split(r"(?<=\s)(?=\S)|(?<=[-_/,.:])(?=[^\W\d])|(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", name)
    lines = [""]
    for part in parts:
        if lines[-1] and text_width((lines[-1] + part).rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.strip() for line in lines)


def draw_frame(axes: Axes, frame: NDArray[np.uint8], left: float, top: float, size: tuple[float, float]) -> None:
    """Draw a frame on a sheet in inches, whose y axis points down; ``size`` is (height, width)."""
    axes.imshow(frame, extent=(left, left + size[1], top + size[0], top), aspect="equal")


def finish_sheet(axes: Axes, size: tuple[float, float]) -> None:
    """Set the limits of the axes to a sheet of this width and height in inches."""
    axes.set_xlim(0, size[0])
    axes.set_ylim(size[1], 0)
    axes.set_axis_off()


def page_size(sheet: tuple[float, float], title: str | None, style: Style, label: str) -> tuple[float, float]:
    """Return the width and height in inches of a figure: a sheet with space for its title and its color bar."""
    bar = 0.6 + LINE * label.count("\n") if style.bar_colors is not None else 0
    # The figure is only slightly wider than the sheet. Otherwise the sheet would grow into the title.
    return sheet[0] + 0.09, sheet[1] + 0.2 + title_height(title) + bar


def title_height(title: str | None) -> float:
    """Return the height in inches of a title of one or more lines."""
    return 0.35 + 0.22 * title.count("\n") if title else 0


def title_and_bar(figure: Figure, axes: Axes, title: str | None, style: Style, label: str) -> None:
    """Draw the title, if any, and the color bar, if the style has one."""
    if title:
        axes.set_title(title)
    color_bar(figure, axes, style, label)


def inset(axes: Axes, page: tuple[float, float], left: float, top: float, across: float, down: float) -> Axes:
    """Return a panel inside of axes that represent a page. All sizes are in inches from its upper left corner."""
    return axes.inset_axes((left / page[0], 1 - (top + down) / page[1], across / page[0], down / page[1]))


def color_bar(figure: Figure, axes: Axes, style: Style, label: str, *, inside: bool = False) -> None:
    """Draw the color bar of the style, if it has one, below the axes or inside of them."""
    colors = style.bar_colors
    if colors is None:
        if inside:
            axes.set_axis_off()
        return
    # The gap is 0.16 inches, as in page_size. A fixed share of the height would be too large on a high page.
    gap = 0.16 / figure.get_size_inches()[1]
    place: dict[str, Any] = {"cax": axes} if inside else {"ax": axes, "shrink": 0.6, "aspect": 45, "pad": gap}
    bar = figure.colorbar(ScalarMappable(Normalize(*style.limits), colors), orientation="horizontal", **place)
    bar.set_label(label, fontsize=LABEL_SIZE)
    ends = {-1.0: "−full", 0.0: "0", 1.0: "full"}
    bar.set_ticks(list(ends)[style.limits[0] == 0 :], labels=list(ends.values())[style.limits[0] == 0 :])
    bar.ax.tick_params(labelsize=LABEL_SIZE)
    bar.outline.set_visible(False)
