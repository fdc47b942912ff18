"""Contact sheets: the frames of a clip in reading order, with what the model used in each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.colors import Colormap

from captum_staa._utils.checks import check_count
from captum_staa.layout import VideoLayout

from .figure import LABEL_SIZE, draw_frame, evenly, finish_sheet, frame_labels, head_and_key, new_figure, page_size
from .overlay import Method, overlay
from .placement import Crop
from .saliency import Attributions, Clip, Sign

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    scale is one for the whole clip, and the heat map's opacity grows with the evidence, so that the (gray) picture
    stays visible where there is none.

    Args:
        clip: the original frames ``(T, H, W, 3)`` uint8, or a clip in ``layout``.
        attributions: of the clip's shape in ``layout``, or ``(T, h, w)``, ``(B, T, h, w)``, or
            :class:`~captum_staa.VideoAttribution`; resized smoothly where h, w are not H, W.
        layout: order of the axes of five-dimensional tensors, such as ``"BTCHW"``.
        method: ``"blended_heat_map"``, ``"heat_map"``, ``"masked_image"`` (the picture times the map: dark where
            there is no evidence), ``"alpha_scaling"`` (likewise, but white) or ``"original_image"``, which does
            without attributions.
        sign: ``"absolute_value"``, ``"positive"``, ``"negative"`` or ``"all"`` (not for the two maskings).
        outlier_perc: percentage of the clip's total that the largest values may hold and still be cut off at 1.
        alpha_overlay: opacity in [0, 1] of the heat map where the evidence is strongest.
        cmap: a color map or its name; None takes inferno, for ``"negative"`` viridis, for ``"all"`` blue to orange.
        show_colorbar: whether to draw the key to the colors, with the scale.
        crop: ``(top, left, height, width)`` in pixels of the frames that the model saw, after its resizing and
            cropping; the map goes there, and the rest is grayed out.
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
    total, height, width = drawn.original.shape[:3]
    names = frame_labels(total, indices, fps, labels)
    if columns is not None:
        check_count("columns", columns)
    chosen = evenly(total, num_frames)
    columns = min(columns or _columns(len(chosen), width / height), len(chosen))
    rows = math.ceil(len(chosen) / columns)
    key = drawn.cmap if show_colorbar else None

    wide = _frame_width(columns, rows, width / height)  # inches
    tall = wide * height / width
    sheet = columns * (wide + GAP) - GAP, rows * (tall + LABEL_SPACE + GAP) - GAP
    figure, axes = new_figure(plt_fig_axis, use_pyplot, fig_size or page_size(sheet, title, key))
    for cell, frame in enumerate(chosen):
        left = cell % columns * (wide + GAP)
        top = cell // columns * (tall + LABEL_SPACE + GAP) + LABEL_SPACE
        draw_frame(axes, drawn.frame(frame), left, top, (tall, wide))
        axes.text(left, top - 0.03, names[frame], fontsize=LABEL_SIZE, ha="left", va="bottom")
    finish_sheet(axes, sheet)
    head_and_key(figure, axes, title, key, drawn.limits, drawn.caption)
    return figure, axes


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
