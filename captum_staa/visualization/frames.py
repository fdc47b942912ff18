"""Contact sheets: the frames of a clip in reading order, with the attributions on top."""

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

LABEL_SPACE = 0.19  # inches for the label above a frame
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
    """Draw the frames of a clip in reading order, with the attributions on top.

    Example:
        >>> import numpy as np, torch
        >>> frames = np.full((8, 48, 64, 3), 128, dtype=np.uint8)
        >>> attributions = torch.zeros(1, 8, 3, 48, 64)
        >>> attributions[:, 5, :, 10:20, 10:20] = 1.0
        >>> figure, axes = show_frames(frames, attributions, layout="BTCHW", use_pyplot=False)
        >>> len(axes.images), [text.get_text() for text in axes.texts][5]
        (8, 'frame 5')

    Parameters of Captum's ``visualize_image_attr`` have the same meaning here, with two differences. All frames of the
    clip share one scale. The opacity of the heat map grows with the attribution, so that the gray frame stays visible
    where the attribution is small.

    Args:
        clip: the original frames ``(T, H, W, 3)`` uint8, or a clip in ``layout``.
        attributions: attributions of the same shape as the clip (with ``layout``), or ``(T, h, w)``, ``(B, T, h, w)``,
            or :class:`~captum_staa.VideoAttribution`. Maps of another size than the frames are interpolated. None with
            ``method="original_image"``.
        layout: order of the axes of 5-D tensors, such as ``"BTCHW"``.
        method: ``"blended_heat_map"``, ``"heat_map"``, ``"masked_image"`` (the frame times the map: black where the map
            is zero), ``"alpha_scaling"`` (the same, but white where the map is zero) or ``"original_image"``, which
            draws no attributions.
        sign: attributions to draw: ``"absolute_value"``, ``"positive"``, ``"negative"`` or ``"all"``. The methods
            ``"masked_image"`` and ``"alpha_scaling"`` do not support ``"all"``.
        outlier_perc: percentage in [0, 100]: the largest values that together make up this share of the total are
            clipped to 1.
        alpha_overlay: maximum opacity of the heat map, in [0, 1].
        cmap: color map, or its name; None uses inferno, viridis for ``sign="negative"``, and blue to orange for
            ``sign="all"``.
        show_colorbar: whether to draw a color bar.
        crop: ``(top, left, height, width)`` in pixels of the frames: the region that the model saw after its resizing
            and cropping. The map is drawn there, and the rest of the frame is gray.
        index: index of the clip in a batch; required if the batch has more than one clip.
        mean: mean of the clip's normalization, one number or one per channel; requires ``std``. Without both, the
            minimum and the maximum of a float clip become black and white.
        std: standard deviation of the clip's normalization; requires ``mean``.
        num_frames: maximum number of frames, which are sampled evenly; None draws all.
        columns: number of frames per row; None selects a number that fits a page.
        indices: ``(T,)``, frame numbers in the video file, for the labels.
        fps: frame rate of ``indices`` (of the clip if ``indices`` is None); the labels are then in seconds.
        labels: ``(T,)`` strings that replace the labels of the frames.
        title: title of the figure.
        fig_size: width and height of the figure in inches; None fits the frames.
        plt_fig_axis: figure and axes to draw on; None creates new ones.
        use_pyplot: whether to create the figure with pyplot. The figure is not shown.

    Returns:
        The figure and its axes: ``axes.images`` are the frames and ``axes.texts`` their labels, in order.

    Raises:
        TypeError, ValueError: an argument is invalid, or the clip and the attributions differ in the number of frames.
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
    """Return the number of frames per row, for a sheet of about the aspect ratio of a slide without empty places."""

    def cost(columns: int) -> float:
        rows = math.ceil(shown / columns)
        empty = (rows * columns - shown) / shown
        return abs(math.log(columns * aspect / (rows * 1.9))) + 8 * empty

    return min(range(1, shown + 1), key=cost)


def _frame_width(columns: int, rows: int, aspect: float) -> float:
    """Return the width of a frame in inches: the sheet fits 11 x 7.5 inches if each label still fits its frame."""
    return max(min(11 / columns, 7.5 / rows * aspect, 2.6 * max(aspect, 1) ** 0.5), 0.75)
