"""Shared parts of all figures: creation of the figure, frame labels, sheets of frames and color bars."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from numpy.typing import NDArray

from captum_staa._utils.checks import check_count

from .style import Style

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
