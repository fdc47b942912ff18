"""Summary of one explanation on one page: frames, joint, spatial and temporal attributions, and predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from captum_staa._utils.checks import check_count
from captum_staa._utils.notebook import FOR
from captum_staa.visualization.figure import (
    CLASS_COLORS,
    DEFAULT_STYLE,
    LABEL_SIZE,
    LINE,
    Style,
    color_bar,
    explained_bars,
    inset,
    new_figure,
    title_height,
    wrapped,
)
from captum_staa.visualization.frames import Frames, Pixels
from captum_staa.visualization.overlay import Overlay, on_one_scale
from captum_staa.visualization.saliency import Attributions, Classes, Maps, Truth, key_frames
from captum_staa.visualization.sheet import NAMES, by_name, draw_rows, rows_size
from captum_staa.visualization.timeline import Curve

WIDTH = 10.0  # inches
KEY = 1.0  # height in inches of the color bar, with its label and the titles below it
LOWER = 2.1  # height in inches of the lower row of panels
BELOW = 2.7  # height in inches of the timeline of several classes, with its labels, below that row
BARS = 5  # maximum number of classes
LETTERS = 24  # maximum number of characters of a label
OTHER = "0.65"  # color of classes that are not explained


def show_summary(
    attributions: Attributions | Classes,
    frames: Frames | Pixels,
    *,
    style: Style = DEFAULT_STYLE,
    predictions: Sequence[tuple[str, float]] = (),
    target: str | None = None,
    truth: Truth | None = None,
    num_frames: int = 6,
    title: str | None = None,
    plt_fig_axis: tuple[Figure, Axes] | None = None,
    use_pyplot: bool = True,
) -> tuple[Figure, Axes]:
    """Draw the key frames with their joint map, the spatial map, the timeline, and the predictions of the model.

    Example:
        >>> import torch
        >>> pixels = np.full((8, 48, 64, 3), 128, dtype=np.uint8)
        >>> predictions = [("waving", 0.7), ("clapping", 0.2)]  # as returned by VideoClassifier.predict
        >>> figure, axes = show_summary(torch.rand(1, 8, 48, 64), pixels, predictions=predictions, use_pyplot=False)
        >>> [panel.get_title() for panel in axes.child_axes]
        ['', '', 'where: the whole clip', 'when', 'predictions']

        Why one class and not another, with one scale for both:

        >>> maps = {"waving": torch.rand(1, 8, 48, 64), "clapping": torch.rand(1, 8, 48, 64)}
        >>> figure, axes = show_summary(maps, pixels, predictions=predictions, use_pyplot=False)
        >>> [panel.get_title() for panel in axes.child_axes]
        ['', '', 'where: waving', 'where: clapping', 'predictions', 'when']

    Args:
        attributions: attributions of the clip, in one of the forms of :func:`~captum_staa.visualization.show_frames`.
            All parts of a :class:`~captum_staa.VideoAttribution` are drawn; other attributions are summed over frames
            and over pixels. A dict from class labels to what one method returned for these classes draws them beside
            each other, with one scale.
        frames: the clip, in one of the forms of :class:`~captum_staa.visualization.Frames`.
        style: how to draw the attributions. With ``sign="absolute_value"``, the timeline shows both signs, to
            distinguish evidence for and against the class.
        predictions: pairs (label, probability), most probable first; the first five are drawn. If empty, the panel is
            omitted.
        target: label of the explained class, whose bar is colored; None uses the first prediction. For a dict, the bars
            of its labels have the colors of their curves.
        truth: frames that contain the evidence, as in :func:`~captum_staa.visualization.show_timeline`.
        num_frames: number of equal parts of the clip; the strongest frame of each part is drawn.
        title: title of the figure.
        plt_fig_axis: figure and axes to draw the panels in; None creates new ones.
        use_pyplot: whether to create the figure with pyplot. The figure is not shown.

    Returns:
        The figure and its outer axes. Their ``child_axes`` are the panels: frames, color bar, spatial map, timeline,
        predictions. For a dict, a spatial map per class, and the timeline comes last.

    Raises:
        TypeError, ValueError: an argument is invalid, or the clip and the attributions differ in the number of frames.
    """
    check_count("num_frames", num_frames)
    clip, several = Frames.of(frames), isinstance(attributions, Mapping)
    parts = (
        by_name(attributions, lambda values: Maps.of(values, clip))
        if isinstance(attributions, Mapping)
        else {"": Maps.of(attributions, clip)}
    )
    joint = on_one_scale([maps.joint for maps in parts.values()], clip, style)
    average = Frames(clip.pixels.mean(0).round().astype(np.uint8)[None], crop=clip.crop)
    spatial = on_one_scale([maps.spatial[None] for maps in parts.values()], average, style)
    sign = "all" if style.sign == "absolute_value" else style.sign
    curves = {name: Curve.of(maps, clip, sign, truth) for name, maps in parts.items()}
    chosen = key_frames(np.max([np.abs(curve.values) for curve in curves.values()], axis=0), num_frames)
    captions = clip.captions(join="\n")

    rows = [("clip", [clip.pixels[at] for at in chosen])]
    for name, drawn in zip(parts, joint, strict=True):
        rows.append((wrapped(name, NAMES[0]) if several else "joint map", [drawn.picture(at) for at in chosen]))
    height, width = clip.size
    wide = min((8.2 if several else 9.0) / len(chosen), 2.2 * width / height)  # inches
    frame = wide * height / width, wide
    sheet = rows_size(rows, frame)
    scale = joint[0].caption.replace("all frames", "all frames and classes") if several else joint[0].caption
    key = KEY + LINE * scale.count("\n")
    page = WIDTH, sheet[1] + key + LOWER + (BELOW if several else 0) + 0.6
    fig_size = style.fig_size or (page[0] + 0.2, page[1] + 0.2 + title_height(title))
    figure, axes = new_figure(plt_fig_axis, use_pyplot, fig_size)
    axes.set_axis_off()
    if title:
        axes.set_title(title)

    draw_rows(inset(axes, page, (WIDTH - sheet[0]) / 2, 0, *sheet), rows, [captions[at] for at in chosen], frame)
    color_bar(figure, inset(axes, page, 2, sheet[1] + 0.07, WIDTH - 3, 0.1), style, scale, inside=True)
    top = sheet[1] + key
    ends = WIDTH - 2.7 if predictions else WIDTH - 0.1
    colors = list(islice(cycle(CLASS_COLORS), len(parts))) if several else [FOR]
    bars = {at: colors[i] for at, i in explained_bars(predictions, list(parts) if several else [target]).items()}
    if not several:
        draw_where(inset(axes, page, 0, top, 2.1, LOWER), spatial[0], "the whole clip")
        line = inset(axes, page, 3.05, top, ends - 3.05, LOWER)
        curves[""].draw(figure, line)
    else:
        across = (ends + 0.1) / len(parts)
        for at, (name, drawn) in enumerate(zip(parts, spatial, strict=True)):
            draw_where(inset(axes, page, at * across, top, across - 0.2, LOWER), drawn, shortened(name))
    if predictions:
        panel = inset(axes, page, ends + 0.4, top, 2.2, LOWER)
        draw_predictions(panel, predictions[:BARS], bars)
    if several:
        line = inset(axes, page, 0.95, top + LOWER + 0.75, WIDTH - 1.05, BELOW - 1.05)
        for (name, curve), color in zip(curves.items(), colors, strict=True):
            curve.draw(figure, line, name=name, color=color)
    line.set_title("when", fontsize=LABEL_SIZE + 1)
    return figure, axes


def shortened(label: str) -> str:
    """Return a label of at most ``LETTERS`` characters."""
    return label if len(label) <= LETTERS else label[: LETTERS - 1].rstrip() + "…"


def draw_where(axes: Axes, spatial: Overlay, name: str) -> None:
    """Draw the spatial map over the mean of all frames."""
    axes.imshow(spatial.picture(0))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_anchor("N")
    axes.set_title(f"where: {name}", fontsize=LABEL_SIZE + 1)
    axes.set_xlabel(f"sum over frames\n{spatial.scale}".rstrip(), fontsize=LABEL_SIZE)


def draw_predictions(axes: Axes, predictions: Sequence[tuple[str, float]], colors: Mapping[int, str]) -> None:
    """Draw horizontal bars, each below its label, so that labels can be long. ``colors`` are those of some bars."""
    for at, (label, probability) in enumerate(predictions):
        axes.barh(at, probability, height=0.35, color=colors.get(at, OTHER))
        axes.text(0, at - 0.26, shortened(label), fontsize=LABEL_SIZE, va="bottom", ha="left")
        axes.text(1, at - 0.26, f"{probability:.1%}", fontsize=LABEL_SIZE, va="bottom", ha="right")
    axes.set_xlim(0, 1)
    axes.set_ylim(BARS - 0.5, -0.75)
    axes.set_axis_off()
    axes.set_title("predictions", fontsize=LABEL_SIZE + 1)
