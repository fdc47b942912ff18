"""Methods beside each other: one row each, the same frames in every column."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import Colormap
from numpy.typing import NDArray

from captum_staa.layout import VideoLayout

from .figure import (
    LABEL_SIZE,
    LINE,
    draw_frame,
    evenly,
    finish_sheet,
    frame_labels,
    head_and_key,
    new_figure,
    page_size,
    text_width,
    wrapped,
)
from .overlay import Method, Overlay, overlay
from .placement import Crop
from .saliency import SIGNS, Attributions, Clip, Sign

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GAP = 0.05  # inches between frames
NAMES = (1.3, 2.0, 2.7)  # inches for the names of rows, the first into which they fit

Row = tuple[str, list[NDArray[np.uint8]]]  # its name, and its frames (H, W, 3)


def compare_methods(
    clip: Clip,
    attributions: Mapping[str, Attributions],
    *,
    layout: VideoLayout | str | None = None,
    method: Method = "blended_heat_map",
    sign: Sign = "absolute_value",
    outlier_perc: float = 2,
    alpha_overlay: float = 0.7,
    cmap: str | Colormap | None = None,
    show_colorbar: bool = True,
    crop: Crop | None = None,
    index: int | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    num_frames: int | None = 8,
    indices: Sequence[int] | None = None,
    fps: float | None = None,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    fig_size: tuple[float, float] | None = None,
    plt_fig_axis: tuple[Figure, Axes] | None = None,
    use_pyplot: bool = True,
) -> tuple[Figure, Axes]:
    """Draw several explanations of one clip, a row each under the clip's own frames.

    Example:
        >>> import numpy as np, torch
        >>> frames = np.full((8, 48, 64, 3), 128, dtype=np.uint8)
        >>> maps = {"STAA": torch.rand(1, 8, 48, 64), "Occlusion": 1000 * torch.rand(1, 8, 48, 64)}
        >>> figure, axes = compare_methods(frames, maps, num_frames=4, fps=25, use_pyplot=False)
        >>> len(axes.images), axes.texts[0].get_text()  # three rows of four frames
        (12, 'frame 1\\n0.04 s')

    Each method has one scale for all its frames, since the units of two methods have nothing in common; it stands
    under the method's name.

    Args:
        clip: as for :func:`~captum_staa.visualization.show_frames`.
        attributions: name to attributions, as there. A planted truth may be one of them.
        layout: as there.
        method: as there.
        sign: as there.
        outlier_perc: as there, per method.
        alpha_overlay: as there.
        cmap: as there.
        show_colorbar: whether to draw the key to the colors.
        crop: as there, the same for all methods.
        index: as there.
        mean: as there.
        std: as there.
        num_frames: draw no more than this many, evenly chosen; None draws all.
        indices: ``(T,)``, the frames' numbers in their file, for the labels.
        fps: frames per second that ``indices`` (or the frames) count; with it the labels have seconds, too.
        labels: T strings instead.
        title: over all.
        fig_size: width and height in inches; None fits the frames.
        plt_fig_axis: figure and axes to draw on.
        use_pyplot: whether pyplot manages the figure. It is never shown from here.

    Returns:
        The figure, and its axes: ``axes.images`` row by row, the clip's own first; ``axes.texts`` the labels of
        columns and then the names of rows.

    Raises:
        TypeError, ValueError: an argument is not as said above; the numbers of frames differ, by the method's name.
    """
    drawn = by_name(
        attributions,
        lambda values: overlay(
            clip,
            values,
            layout=layout,
            method=method,
            sign=sign,
            outlier_perc=outlier_perc,
            alpha_overlay=alpha_overlay,
            cmap=cmap,
            crop=crop,
            index=index,
            mean=mean,
            std=std,
        ),
    )
    any_one = next(iter(drawn.values()))
    total, height, width = any_one.original.shape[:3]
    names = frame_labels(total, indices, fps, labels, join="\n")
    chosen = evenly(total, num_frames)
    wide = max(min(8.5 / len(chosen), 1.6, 6 / (len(drawn) + 1) * width / height), 0.6)  # inches
    frame = wide * height / width, wide
    called = row_names({name: one.scale for name, one in drawn.items()}, frame[0])
    rows: list[Row] = [("clip", [any_one.original[at] for at in chosen])]
    rows += [(name, [one.frame(at) for at in chosen]) for name, one in zip(called, drawn.values(), strict=True)]
    key = any_one.cmap if show_colorbar else None

    sheet = rows_size(rows, frame)
    figure, axes = new_figure(plt_fig_axis, use_pyplot, fig_size or page_size(sheet, title, key))
    draw_rows(axes, rows, [names[at] for at in chosen], frame)
    head_and_key(figure, axes, title, key, any_one.limits, f"{SIGNS[sign]} (one scale for all frames of a row)")
    return figure, axes


def by_name(attributions: Mapping[str, Attributions], drawn: Callable[[Attributions], Overlay]) -> dict[str, Overlay]:
    """Each method's overlay; an error begins with the name of the method that it is about."""
    if not hasattr(attributions, "items") or not attributions:
        raise TypeError(
            f"attributions is a dict of at least one name and its attributions, but {type(attributions).__name__} "
            f"came; show_frames draws one alone"
        )
    found = {}
    for name, values in attributions.items():
        try:
            found[name] = drawn(values)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
    return found


def row_names(scales: Mapping[str, str], room: float) -> list[str]:
    """Names over their scales, wrapped so that none is higher than its row of ``room`` inches, or else in one line."""
    lines = max(int(room / LINE), 2)
    for width in NAMES:
        found = [f"{wrapped(name, width)}\n{scale}".rstrip() for name, scale in scales.items()]
        if all(name.count("\n") < lines for name in found):
            return found
    return [f"{name}\n{scale}".rstrip() for name, scale in scales.items()]


def rows_size(rows: Sequence[Row], frame: tuple[float, float]) -> tuple[float, float]:
    """Width and height in inches of what :func:`draw_rows` draws."""
    return _gutter(rows) + len(rows[0][1]) * (frame[1] + GAP), 2 * LINE + len(rows) * (frame[0] + GAP)


def draw_rows(axes: Axes, rows: Sequence[Row], labels: Sequence[str], frame: tuple[float, float]) -> None:
    """Rows of frames with their names to the left and a label over each column; ``frame`` is height and width."""
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
    """Inches to the left of the frames, for the names of rows."""
    widest = max(text_width(line) for name, _ in rows for line in name.splitlines() or [""])
    return 0.15 + 1.1 * widest  # the layout engine may draw the sheet somewhat smaller, but text keeps its size
