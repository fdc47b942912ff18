"""Contact sheets: the frames of a clip with attributions on top, in reading order or one row per method."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from captum_staa._utils.checks import check_count
from captum_staa.visualization.figure import (
    DEFAULT_STYLE,
    LABEL_SIZE,
    LINE,
    Style,
    draw_frame,
    evenly,
    finish_sheet,
    new_figure,
    page_size,
    text_width,
    title_and_bar,
    wrapped,
)
from captum_staa.visualization.frames import Frames, Pixels
from captum_staa.visualization.overlay import described, overlay
from captum_staa.visualization.saliency import Attributions

LABEL_SPACE = 0.19  # inches for the label above a frame
GAP = 0.05  # inches between frames
NAMES = (1.3, 2.0, 2.7)  # candidate widths of the row names in inches; the first that fits is used

Value = TypeVar("Value")
Result = TypeVar("Result")
Row = tuple[str, list[NDArray[np.uint8]]]  # name and frames (H, W, 3)


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
        frames: the clip, in one of the forms of :class:`~captum_staa.visualization.Frames`.
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
    figure, axes = new_figure(plt_fig_axis, use_pyplot, style.fig_size or page_size(sheet, title, style, drawn.caption))
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


def compare_methods(
    attributions: Mapping[str, Attributions],
    frames: Frames | Pixels,
    *,
    style: Style = DEFAULT_STYLE,
    num_frames: int | None = 8,
    title: str | None = None,
    plt_fig_axis: tuple[Figure, Axes] | None = None,
    use_pyplot: bool = True,
) -> tuple[Figure, Axes]:
    """Draw several explanations of one clip, one row per explanation below the original frames.

    Example:
        >>> import numpy as np, torch
        >>> frames = Frames(np.full((8, 48, 64, 3), 128, dtype=np.uint8), fps=25)
        >>> maps = {"STAA": torch.rand(1, 8, 48, 64), "Occlusion": 1000 * torch.rand(1, 8, 48, 64)}
        >>> figure, axes = compare_methods(maps, frames, num_frames=4, use_pyplot=False)
        >>> len(axes.images), axes.texts[0].get_text()  # three rows of four frames
        (12, 'frame 1\\n0.04 s')

    Each method has its own scale, because the units of two methods are not comparable. All frames of a method share
    this scale, which is shown below the name of the method.

    Args:
        attributions: dict from names to attributions, each in one of the forms of
            :func:`~captum_staa.visualization.show_frames`. Ground-truth evidence can be one of them.
        frames: the clip, in one of the forms of :class:`~captum_staa.visualization.Frames`.
        style: how to draw the attributions. Each method has a separate scale.
        num_frames: maximum number of frames, which are sampled evenly; None draws all.
        title: title of the figure.
        plt_fig_axis: figure and axes to draw on; None creates new ones.
        use_pyplot: whether to create the figure with pyplot. The figure is not shown.

    Returns:
        The figure and its axes: ``axes.images`` are the frames row by row, the original frames first; ``axes.texts``
        are the labels of the columns, followed by the names of the rows.

    Raises:
        TypeError, ValueError: an argument is invalid, or the attributions of a method do not have the number of frames
            of the clip; the message begins with the name of the method.
    """
    clip = Frames.of(frames)
    drawn = by_name(attributions, lambda values: overlay(values, clip, style=style))
    (height, width), names = clip.size, clip.captions(join="\n")
    chosen = evenly(len(names), num_frames)
    wide = max(min(8.5 / len(chosen), 1.6, 6 / (len(drawn) + 1) * width / height), 0.6)  # inches
    frame = wide * height / width, wide
    row_labels = row_names({name: one.scale for name, one in drawn.items()}, frame[0])
    rows: list[Row] = [("clip", [clip.pixels[at] for at in chosen])]
    rows += [(label, [one.picture(at) for at in chosen]) for label, one in zip(row_labels, drawn.values(), strict=True)]

    sheet = rows_size(rows, frame)
    label = described(style.sign, "", "one scale per row", clip.cropped)
    figure, axes = new_figure(plt_fig_axis, use_pyplot, style.fig_size or page_size(sheet, title, style, label))
    draw_rows(axes, rows, [names[at] for at in chosen], frame)
    title_and_bar(figure, axes, title, style, label)
    return figure, axes


def by_name(attributions: Mapping[str, Value], convert: Callable[[Value], Result]) -> dict[str, Result]:
    """Convert the attributions of each method. An error message begins with the name of its method."""
    if not hasattr(attributions, "items") or not attributions:
        got = "an empty dict" if hasattr(attributions, "items") else type(attributions).__name__
        raise TypeError(
            f"attributions must be a dict from at least one name to its attributions, got {got}. To draw a single "
            f"explanation, use show_frames."
        )
    converted = {}
    for name, values in attributions.items():
        try:
            converted[name] = convert(values)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
    return converted


def row_names(scales: Mapping[str, str], height: float) -> list[str]:
    """Return a label per row: the name above the scale. Names wrap to fit a row of ``height`` inches, if possible."""
    lines = max(int(height / LINE), 2)
    for width in NAMES:
        labels = [f"{wrapped(name, width)}\n{scale}".rstrip() for name, scale in scales.items()]
        if all(label.count("\n") < lines for label in labels):
            return labels
    return [f"{name}\n{scale}".rstrip() for name, scale in scales.items()]


def rows_size(rows: Sequence[Row], frame: tuple[float, float]) -> tuple[float, float]:
    """Return the width and height in inches of the sheet that :func:`draw_rows` draws."""
    return _gutter(rows) + len(rows[0][1]) * (frame[1] + GAP), 2 * LINE + len(rows) * (frame[0] + GAP)


def draw_rows(axes: Axes, rows: Sequence[Row], labels: Sequence[str], frame: tuple[float, float]) -> None:
    """Draw rows of frames, with names on the left and a label above each column; ``frame`` is (height, width)."""
    tall, wide = frame
    begin = _gutter(rows)
    for column, label in enumerate(labels):
        middle = begin + column * (wide + GAP) + wide / 2
        axes.text(middle, 2 * LINE - 0.03, label, fontsize=LABEL_SIZE, ha="center", va="bottom")
    for at, (name, frames) in enumerate(rows):
        top = 2 * LINE + at * (tall + GAP)
        axes.text(begin - 0.08, top + tall / 2, name, fontsize=LABEL_SIZE, ha="right", va="center")
        for column, picture in enumerate(frames):
            draw_frame(axes, picture, begin + column * (wide + GAP), top, frame)
    finish_sheet(axes, rows_size(rows, frame))


def _gutter(rows: Sequence[Row]) -> float:
    """Return the width in inches of the row names, to the left of the frames."""
    widest = max(text_width(line) for name, _ in rows for line in name.splitlines() or [""])
    return 0.15 + 1.1 * widest  # the layout engine may reduce the sheet, while text keeps its size
