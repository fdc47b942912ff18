"""Figure that compares methods: one row per method, the same frame in every column."""

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
NAMES = (1.3, 2.0, 2.7)  # candidate widths of the row names in inches; the first that fits is used

Row = tuple[str, list[NDArray[np.uint8]]]  # name and frames (H, W, 3)


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
    """Draw several explanations of one clip, one row per explanation below the original frames.

    Example:
        >>> import numpy as np, torch
        >>> frames = np.full((8, 48, 64, 3), 128, dtype=np.uint8)
        >>> maps = {"STAA": torch.rand(1, 8, 48, 64), "Occlusion": 1000 * torch.rand(1, 8, 48, 64)}
        >>> figure, axes = compare_methods(frames, maps, num_frames=4, fps=25, use_pyplot=False)
        >>> len(axes.images), axes.texts[0].get_text()  # three rows of four frames
        (12, 'frame 1\\n0.04 s')

    Each method has its own scale, because the units of two methods are not comparable. All frames of a method share
    this scale, which is shown below the name of the method.

    Args:
        clip: the original frames ``(T, H, W, 3)`` uint8, or a clip in ``layout``.
        attributions: dict from names to attributions, each in one of the forms of
            :func:`~captum_staa.visualization.show_frames`. Ground-truth evidence can be one of them.
        layout: order of the axes of 5-D tensors, such as ``"BTCHW"``.
        method: how to draw the attributions: ``"blended_heat_map"``, ``"heat_map"``, ``"masked_image"``,
            ``"alpha_scaling"`` or ``"original_image"``; see :func:`~captum_staa.visualization.show_frames`.
        sign: attributions to draw: ``"absolute_value"``, ``"positive"``, ``"negative"`` or ``"all"``.
        outlier_perc: percentage in [0, 100]: the largest values that together make up this share of the total of a
            method are clipped to 1.
        alpha_overlay: maximum opacity of the heat map, in [0, 1].
        cmap: color map, or its name; None uses the default of ``sign``.
        show_colorbar: whether to draw a color bar.
        crop: ``(top, left, height, width)`` in pixels of the frames: the region that the model saw, for all methods.
        index: index of the clip in a batch; required if the batch has more than one clip.
        mean: mean of the clip's normalization, one number or one per channel; requires ``std``.
        std: standard deviation of the clip's normalization; requires ``mean``.
        num_frames: maximum number of frames, which are sampled evenly; None draws all.
        indices: ``(T,)``, frame numbers in the video file, for the labels.
        fps: frame rate of ``indices`` (of the clip if ``indices`` is None); adds times in seconds to the labels.
        labels: ``(T,)`` strings that replace the labels of the frames.
        title: title of the figure.
        fig_size: width and height of the figure in inches; None fits the frames.
        plt_fig_axis: figure and axes to draw on; None creates new ones.
        use_pyplot: whether to create the figure with pyplot. The figure is not shown.

    Returns:
        The figure and its axes: ``axes.images`` are the frames row by row, the original frames first; ``axes.texts``
        are the labels of the columns, followed by the names of the rows.

    Raises:
        TypeError, ValueError: an argument is invalid, or the attributions of a method do not have the number of frames
            of the clip; the message begins with the name of the method.
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
    first = next(iter(drawn.values()))
    total, height, width = first.original.shape[:3]
    names = frame_labels(total, indices, fps, labels, join="\n")
    chosen = evenly(total, num_frames)
    wide = max(min(8.5 / len(chosen), 1.6, 6 / (len(drawn) + 1) * width / height), 0.6)  # inches
    frame = wide * height / width, wide
    row_labels = row_names({name: one.scale for name, one in drawn.items()}, frame[0])
    rows: list[Row] = [("clip", [first.original[at] for at in chosen])]
    rows += [(label, [one.frame(at) for at in chosen]) for label, one in zip(row_labels, drawn.values(), strict=True)]
    key = first.cmap if show_colorbar else None

    sheet = rows_size(rows, frame)
    figure, axes = new_figure(plt_fig_axis, use_pyplot, fig_size or page_size(sheet, title, key))
    draw_rows(axes, rows, [names[at] for at in chosen], frame)
    head_and_key(figure, axes, title, key, first.limits, f"{SIGNS[sign]} (one scale for all frames of a row)")
    return figure, axes


def by_name(attributions: Mapping[str, Attributions], drawn: Callable[[Attributions], Overlay]) -> dict[str, Overlay]:
    """Return the overlay of each method. An error message begins with the name of its method."""
    if not hasattr(attributions, "items") or not attributions:
        got = "an empty dict" if hasattr(attributions, "items") else type(attributions).__name__
        raise TypeError(
            f"attributions must be a dict from at least one name to its attributions, got {got}. To draw a single "
            f"explanation, use show_frames."
        )
    overlays = {}
    for name, values in attributions.items():
        try:
            overlays[name] = drawn(values)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
    return overlays


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
