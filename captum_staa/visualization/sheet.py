"""Contact sheets: the frames of a clip in reading order, with the attributions on top."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from captum_staa._utils.checks import check_count

from .figure import LABEL_SIZE, draw_frame, evenly, finish_sheet, new_figure, page_size, title_and_bar
from .frames import Frames, Pixels
from .overlay import overlay
from .saliency import Attributions
from .style import DEFAULT_STYLE, Style

LABEL_SPACE = 0.19  # inches for the label above a frame
GAP = 0.06  # inches between frames


def show_frames(
    attributions: Attributions | None,
    frames: Frames | Pixels,
    *,
    style: Style = DEFAULT_STYLE,
    num_frames: int | None = None,
    columns: int | None = None,
    title: str | None = None,
    plt_fig_axis: tuple[Figure, Axes] | None = None,
    use_pyplot: bool = True,
) -> tuple[Figure, Axes]:
    """Draw the frames of a clip in reading order, with the attributions on top.

    Example:
        >>> import numpy as np, torch
        >>> pixels = np.full((8, 48, 64, 3), 128, dtype=np.uint8)
        >>> attributions = torch.zeros(1, 8, 3, 48, 64)
        >>> attributions[:, 5, :, 10:20, 10:20] = 1.0
        >>> figure, axes = show_frames(attributions, Frames(pixels, layout="BTCHW"), use_pyplot=False)
        >>> len(axes.images), [text.get_text() for text in axes.texts][5]
        (8, 'frame 5')

    Args:
        attributions: of the shape of the model's inputs (with the layout of ``frames``), ``(T, h, w)``, ``(B, T, h,
            w)``, or :class:`~captum_staa.VideoAttribution`. Maps of another size than the frames are interpolated. None
            with ``Style(method="original_image")``.
        frames: the clip, as :class:`~captum_staa.visualization.Frames` or uint8 ``(T, H, W, 3)``.
        style: how to draw the attributions.
        num_frames: maximum number of frames, which are sampled evenly; None draws all.
        columns: number of frames per row; None selects a number that fits a page.
        title: title of the figure.
        plt_fig_axis: figure and axes to draw on; None creates new ones.
        use_pyplot: whether to create the figure with pyplot. The figure is not shown.

    Returns:
        The figure and its axes: ``axes.images`` are the frames and ``axes.texts`` their labels, in order.

    Raises:
        TypeError, ValueError: an argument is invalid, or the clip and the attributions differ in the number of frames.
    """
    drawn = overlay(attributions, frames, style=style)
    (height, width), names = drawn.frames.size, drawn.frames.captions()
    if columns is not None:
        check_count("columns", columns)
    chosen = evenly(len(names), num_frames)
    columns = min(columns or _columns(len(chosen), width / height), len(chosen))
    rows = math.ceil(len(chosen) / columns)

    wide = _frame_width(columns, rows, width / height)  # inches
    tall = wide * height / width
    sheet = columns * (wide + GAP) - GAP, rows * (tall + LABEL_SPACE + GAP) - GAP
    figure, axes = new_figure(plt_fig_axis, use_pyplot, style.fig_size or page_size(sheet, title, style))
    for cell, at in enumerate(chosen):
        left = cell % columns * (wide + GAP)
        top = cell // columns * (tall + LABEL_SPACE + GAP) + LABEL_SPACE
        draw_frame(axes, drawn.picture(at), left, top, (tall, wide))
        axes.text(left, top - 0.03, names[at], fontsize=LABEL_SIZE, ha="left", va="bottom")
    finish_sheet(axes, sheet)
    title_and_bar(figure, axes, title, style, drawn.caption)
    return figure, axes


def _columns(shown: int, aspect: float) -> int:
    """Return the number of frames per row, for a sheet of about the aspect ratio of a slide without empty places."""

    def cost(columns: int) -> float:
        rows = math.ceil(shown / columns)
        empty = (rows * columns - shown) / shown
        return abs(math.log(columns * aspect / (rows * 1.9))) + 8 * empty

    return min(range(1, shown + 1), key=cost)


def _frame_width(columns: int, rows: int, aspect: float) -> float:
    """Return the width of a frame in inches: the sheet fits 11 x 7.5 inches if each label still fits its frame."""
    return max(min(11 / columns, 7.5 / rows * aspect, 2.6 * max(aspect, 1) ** 0.5), 0.75)
