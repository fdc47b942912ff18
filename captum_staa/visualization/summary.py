"""Summary of one explanation on one page: frames, joint, spatial and temporal attributions, and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import Colormap
from numpy.typing import NDArray
from torch import Tensor

from captum_staa._utils.checks import check_count
from captum_staa._utils.notebook import FOR
from captum_staa.layout import VideoLayout

from .comparison import draw_rows, rows_size
from .figure import LABEL_SIZE, color_bar, explained_bar, frame_labels, inset, new_figure
from .overlay import Method, Overlay, overlay
from .placement import Crop
from .saliency import Attributions, Clip, Sign, key_frames, when, where
from .timeline import show_timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 10.0  # inches
KEY = 1.0  # height in inches of the color bar, with its label and the titles below it
LOWER = 2.1  # height in inches of the lower row of panels
BARS = 5  # maximum number of classes
LETTERS = 24  # maximum number of characters of a label
OTHER = "0.65"  # color of classes that are not explained


def show_summary(
    clip: Clip,
    attributions: Attributions,
    *,
    layout: VideoLayout | str | None = None,
    predictions: Sequence[tuple[str, float]] = (),
    target: str | None = None,
    method: Method = "blended_heat_map",
    sign: Sign = "absolute_value",
    outlier_perc: float = 2,
    alpha_overlay: float = 0.7,
    cmap: str | Colormap | None = None,
    crop: Crop | None = None,
    index: int | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    num_frames: int = 6,
    indices: Sequence[int] | None = None,
    fps: float | None = None,
    truth: Tensor | NDArray[np.bool_] | Sequence[tuple[int, int]] | None = None,
    title: str | None = None,
    fig_size: tuple[float, float] | None = None,
    plt_fig_axis: tuple[Figure, Axes] | None = None,
    use_pyplot: bool = True,
) -> tuple[Figure, Axes]:
    """Draw the key frames with their joint map, the spatial map, the timeline, and the predictions of the model.

    Example:
        >>> import numpy as np, torch
        >>> frames = np.full((8, 48, 64, 3), 128, dtype=np.uint8)
        >>> predictions = [("waving", 0.7), ("clapping", 0.2)]  # as returned by VideoClassifier.predict
        >>> figure, axes = show_summary(frames, torch.rand(1, 8, 48, 64), predictions=predictions, use_pyplot=False)
        >>> [panel.get_title() for panel in axes.child_axes]
        ['', '', 'where: the whole clip', 'when', 'predictions']

    Args:
        clip: the original frames ``(T, H, W, 3)`` uint8, or a clip in ``layout``.
        attributions: attributions of the clip, in one of the forms of :func:`~captum_staa.visualization.show_frames`.
            All parts of a :class:`~captum_staa.VideoAttribution` are drawn; other attributions are summed over frames
            and over pixels.
        layout: order of the axes of 5-D tensors, such as ``"BTCHW"``.
        predictions: pairs (label, probability), most probable first; the first five are drawn. If empty, the panel is
            omitted.
        target: label of the explained class, whose bar is colored; None uses the first prediction.
        method: how to draw the attributions: ``"blended_heat_map"``, ``"heat_map"``, ``"masked_image"``,
            ``"alpha_scaling"`` or ``"original_image"``; see :func:`~captum_staa.visualization.show_frames`.
        sign: attributions to draw: ``"absolute_value"``, ``"positive"``, ``"negative"`` or ``"all"``. With
            ``"absolute_value"``, the timeline shows both signs, to distinguish evidence for and against the class.
        outlier_perc: percentage in [0, 100]: the largest values that together make up this share of the total are
            clipped to 1.
        alpha_overlay: maximum opacity of the heat map, in [0, 1].
        cmap: color map, or its name; None uses the default of ``sign``.
        crop: ``(top, left, height, width)`` in pixels of the frames: the region that the model saw.
        index: index of the clip in a batch; required if the batch has more than one clip.
        mean: mean of the clip's normalization, one number or one per channel; requires ``std``.
        std: standard deviation of the clip's normalization; requires ``mean``.
        num_frames: number of equal parts of the clip; the strongest frame of each part is drawn.
        indices: ``(T,)``, frame numbers in the video file, for the labels.
        fps: frame rate of ``indices`` (of the clip if ``indices`` is None); adds times in seconds to the labels.
        truth: frames that contain the evidence, as in :func:`~captum_staa.visualization.show_timeline`.
        title: title of the figure.
        fig_size: width and height of the figure in inches; None fits the frames.
        plt_fig_axis: figure and axes to draw the panels in; None creates new ones.
        use_pyplot: whether to create the figure with pyplot. The figure is not shown.

    Returns:
        The figure and its outer axes. Their ``child_axes`` are the panels: frames, color bar, spatial map, timeline,
        predictions.

    Raises:
        TypeError, ValueError: an argument is invalid, or the clip and the attributions differ in the number of frames.
    """
    check_count("num_frames", num_frames)
    explained = explained_bar(predictions, target)

    def overlay_of(over: Clip, values: Attributions) -> Overlay:
        return overlay(
            over,
            values,
            layout=layout,
            method=method,
            sign=sign,
            outlier_perc=outlier_perc,
            alpha_overlay=alpha_overlay,
            cmap=cmap,
            crop=crop,
            index=index if over is clip else None,
            mean=mean if over is clip else None,
            std=std if over is clip else None,
        )

    joint = overlay_of(clip, attributions)
    total, height, width = joint.original.shape[:3]
    average = joint.original.mean(0).round().astype(np.uint8)
    spatial = overlay_of(average[None], where(attributions, layout, index)[None])
    timeline_sign: Sign = "all" if sign == "absolute_value" else sign
    chosen = key_frames(when(attributions, layout, timeline_sign, index), num_frames)
    names = frame_labels(total, indices, fps, join="\n")

    rows = [("clip", [joint.original[at] for at in chosen]), ("joint map", [joint.frame(at) for at in chosen])]
    wide = min(9.0 / len(chosen), 2.2 * width / height)  # inches
    frame = wide * height / width, wide
    sheet = rows_size(rows, frame)
    page = WIDTH, sheet[1] + KEY + LOWER + 0.6
    figure, axes = new_figure(plt_fig_axis, use_pyplot, fig_size or (page[0] + 0.2, page[1] + 0.2 + 0.3 * bool(title)))
    axes.set_axis_off()
    if title:
        axes.set_title(title)

    draw_rows(inset(axes, page, (WIDTH - sheet[0]) / 2, 0, *sheet), rows, [names[at] for at in chosen], frame)
    key = inset(axes, page, 2, sheet[1] + 0.07, WIDTH - 3, 0.1)
    if joint.cmap is None:
        key.set_axis_off()
    else:
        color_bar(figure, key, joint.cmap, joint.limits, joint.caption, inside=True)
    top = sheet[1] + KEY
    ends = WIDTH - 2.7 if predictions else WIDTH - 0.1
    draw_where(inset(axes, page, 0, top, 2.1, LOWER), spatial)
    line = inset(axes, page, 3.05, top, ends - 3.05, LOWER)
    show_timeline(
        attributions,
        layout,
        sign=timeline_sign,
        fps=fps,
        indices=indices,
        truth=truth,
        index=index,
        plt_fig_axis=(figure, line),
    )
    line.set_title("when", fontsize=LABEL_SIZE + 1)
    if predictions:
        draw_predictions(inset(axes, page, ends + 0.4, top, 2.2, LOWER), predictions[:BARS], explained)
    return figure, axes


def draw_where(axes: Axes, spatial: Overlay) -> None:
    """Draw the spatial map over the mean of all frames."""
    axes.imshow(spatial.frame(0))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_anchor("N")
    axes.set_title("where: the whole clip", fontsize=LABEL_SIZE + 1)
    axes.set_xlabel(f"sum over frames\n{spatial.scale}".rstrip(), fontsize=LABEL_SIZE)


def draw_predictions(axes: Axes, predictions: Sequence[tuple[str, float]], explained: int) -> None:
    """Draw horizontal bars, each below its label, so that labels can be long."""
    for at, (label, probability) in enumerate(predictions):
        axes.barh(at, probability, height=0.35, color=FOR if at == explained else OTHER)
        short = label if len(label) <= LETTERS else label[: LETTERS - 1].rstrip() + "…"
        axes.text(0, at - 0.26, short, fontsize=LABEL_SIZE, va="bottom", ha="left")
        axes.text(1, at - 0.26, f"{probability:.1%}", fontsize=LABEL_SIZE, va="bottom", ha="right")
    axes.set_xlim(0, 1)
    axes.set_ylim(BARS - 0.5, -0.75)
    axes.set_axis_off()
    axes.set_title("predictions", fontsize=LABEL_SIZE + 1)
