"""Contact sheets: the frames of a clip in reading order, with what the model used in each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure

from captum_staa.layout import VideoLayout

from ._maps import Attributions, Clip, Crop, Sign
from ._overlay import Method, overlay

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL_SIZE = 9  # points
LABEL_SPACE = 0.19  # inches above a frame
GAP = 0.06  # inches between frames


def show_frames(
    clip: Clip,
    attributions: Attributions | None = None,
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
    num_frames: int | None = None,
    columns: int | None = None,
    indices: Sequence[int] | None = None,
    fps: float | None = None,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    fig_size: tuple[float, float] | None = None,
    plt_fig_axis: tuple[Figure, Axes] | None = None,
    use_pyplot: bool = True,
) -> tuple[Figure, Axes]:
    """Draw a clip's frames in reading order with the attributions on top.

    Example:
        >>> import numpy as np, torch
        >>> frames = np.full((8, 48, 64, 3), 128, dtype=np.uint8)
        >>> attributions = torch.zeros(1, 8, 3, 48, 64)
        >>> attributions[:, 5, :, 10:20, 10:20] = 1.0
        >>> figure, axes = show_frames(frames, attributions, layout="BTCHW", use_pyplot=False)
        >>> len(axes.images), [text.get_text() for text in axes.texts][5]
        (8, 'frame 5')

    The parameters that Captum's ``visualize_image_attr`` has mean here what they mean there, with two differences: the
    scale is one for the whole clip, and the heat map's opacity grows with the evidence, so that the (grey) picture
    stays visible where there is none.

    Args:
        clip: the original frames ``(T, H, W, 3)`` uint8, or a clip in ``layout``.
        attributions: of the clip's shape in ``layout``, or ``(T, h, w)``, ``(B, T, h, w)``, or
            :class:`~captum_staa.SpaceTime`; resized smoothly where h, w are not H, W.
        layout: order of the axes of five-dimensional tensors, such as ``"BTCHW"``.
        method: ``"blended_heat_map"``, ``"heat_map"``, ``"masked_image"`` (the picture times the map) or
            ``"original_image"``, which does without attributions.
        sign: ``"absolute_value"``, ``"positive"``, ``"negative"`` or ``"all"`` (not for masks).
        outlier_perc: percentage of the clip's total that the largest values may hold and still be cut off at 1.
        alpha_overlay: opacity in [0, 1] of the heat map where the evidence is strongest.
        cmap: a colour map or its name; None takes inferno, for ``"negative"`` viridis, for ``"all"`` blue to orange.
        show_colorbar: whether to draw the key to the colours, with the scale.
        crop: ``(top, left, height, width)`` in pixels of the frames that the model saw, after its resizing and
            cropping; the map goes there, and the rest is greyed out.
        index: which clip of a batch.
        mean: what was subtracted from pictures in [0, 1] to make a float clip; goes with ``std``.
        std: what they were then divided by. Without both, the clip's own range becomes black to white.
        num_frames: draw no more than this many, evenly chosen; None draws all.
        columns: frames per row; None chooses.
        indices: ``(T,)``, the frames' numbers in their file, for the labels.
        fps: frames per second that ``indices`` (or the frames) count; with it the labels are in seconds.
        labels: T strings instead.
        title: over all.
        fig_size: width and height in inches; None fits the frames.
        plt_fig_axis: figure and axes to draw on.
        use_pyplot: whether pyplot manages the figure, as notebooks like it. It is never shown from here.

    Returns:
        The figure, and its axes: ``axes.images`` are the frames and ``axes.texts`` their labels, in order.

    Raises:
        TypeError, ValueError: an argument is not as said above; the numbers of frames differ.
    """
    drawn = overlay(
        clip,
        attributions,
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
    )
    total, height, width = drawn.frames.shape[:3]
    names = frame_labels(total, indices, fps, labels)
    for name, value in (("num_frames", num_frames), ("columns", columns)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, but {value!r} came")
    shown = min(num_frames or total, total)
    chosen = [(2 * i + 1) * total // (2 * shown) for i in range(shown)]
    columns = min(columns or _columns(shown, width / height), shown)
    rows = math.ceil(shown / columns)

    key = drawn.cmap if show_colorbar else None

    side = _frame_width(columns, rows, width / height)  # inches
    pixel = side / width
    row_height, column_width = height * pixel + LABEL_SPACE + GAP, side + GAP  # inches
    sheet = columns * column_width - GAP, rows * row_height - GAP
    figure, axes = new_figure(plt_fig_axis, use_pyplot, fig_size or _fig_size(sheet, title, key is not None))
    for cell, frame in enumerate(chosen):
        left = cell % columns * column_width
        top = cell // columns * row_height + LABEL_SPACE
        axes.imshow(drawn.frames[frame], extent=(left, left + side, top + height * pixel, top), aspect="equal")
        axes.text(left, top - 0.03, names[frame], fontsize=LABEL_SIZE, ha="left", va="bottom")
    axes.set_xlim(0, sheet[0])
    axes.set_ylim(sheet[1], 0)
    axes.set_axis_off()
    if title:
        axes.set_title(title)
    if key is not None:
        colours = ScalarMappable(Normalize(*drawn.limits), key)
        bar = figure.colorbar(colours, ax=axes, orientation="horizontal", shrink=0.6, aspect=45, pad=0.02)
        bar.set_label(drawn.caption, fontsize=LABEL_SIZE)
        bar.set_ticks(np.linspace(*drawn.limits, 5).tolist())
        bar.ax.tick_params(labelsize=LABEL_SIZE)
        bar.outline.set_visible(False)
    return figure, axes


def frame_labels(
    total: int, indices: Sequence[int] | None, fps: float | None, labels: Sequence[str] | None = None
) -> list[str]:
    """``"frame 12"`` or ``"0.48 s"`` for each of ``total`` frames."""
    for name, value in (("indices", indices), ("labels", labels)):
        if value is not None and len(value) != total:
            raise ValueError(f"{name} must name each of the {total} frames, but {len(value)} came: {list(value)!r}")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps must be positive and finite, but {fps!r} came")
    if labels is not None:
        return [str(label) for label in labels]
    numbers = list(range(total)) if indices is None else [int(number) for number in indices]
    return [f"frame {number}" if fps is None else f"{number / fps:.2f} s" for number in numbers]


def _columns(shown: int, aspect: float) -> int:
    """Frames per row: about as wide as a page or a slide, and no nearly empty last row."""

    def badness(columns: int) -> float:
        rows = math.ceil(shown / columns)
        empty = (rows * columns - shown) / shown
        return abs(math.log(columns * aspect / (rows * 1.9))) + 8 * empty

    return min(range(1, shown + 1), key=badness)


def _frame_width(columns: int, rows: int, aspect: float) -> float:
    """Inches: a sheet of at most 11 x 7.5, but no stamps and no posters, and always room for the label."""
    return max(min(11 / columns, 7.5 / rows * aspect, 2.6 * max(aspect, 1) ** 0.5), 0.75)


def _fig_size(sheet: tuple[float, float], title: str | None, colorbar: bool) -> tuple[float, float]:
    return sheet[0] + 0.2, sheet[1] + 0.2 + 0.35 * bool(title) + 0.6 * colorbar


def new_figure(
    plt_fig_axis: tuple[Figure, Axes] | None, use_pyplot: bool, fig_size: tuple[float, float]
) -> tuple[Figure, Axes]:
    """The caller's figure and axes, or new ones, with or without pyplot."""
    if plt_fig_axis is not None:
        return plt_fig_axis
    if use_pyplot:
        from matplotlib import pyplot  # not above: it chooses a backend for the whole process

        return pyplot.subplots(figsize=fig_size, layout="constrained")
    figure = Figure(figsize=fig_size, layout="constrained")
    return figure, figure.subplots()
