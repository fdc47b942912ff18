"""Space-time slices: one row and one column of the frames over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import Colormap
from numpy.typing import NDArray

from captum_staa.layout import VideoLayout

from .figure import LABEL_SIZE, frame_labels, head_and_key, inset, new_figure, page_size
from .overlay import Method, overlay
from .placement import Crop, place
from .saliency import Attributions, Clip, Sign

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FRAME = 2.3  # longer side of the frame in inches
TIME = 1.5  # length of the time axis in inches
GAP, TITLE, LABELS = 0.12, 0.3, 0.55  # inches between the panels, above them, and for the labels of an axis
LINE_COLOR = "#00c8a0"  # of the cut; a color that is in none of the default color maps, and light enough for any frame


def show_slices(
    clip: Clip,
    attributions: Attributions,
    *,
    layout: VideoLayout | str | None = None,
    at: tuple[int, int, int] | None = None,
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
    indices: Sequence[int] | None = None,
    fps: float | None = None,
    title: str | None = None,
    fig_size: tuple[float, float] | None = None,
    plt_fig_axis: tuple[Figure, Axes] | None = None,
    use_pyplot: bool = True,
) -> tuple[Figure, Axes]:
    """Draw a frame, with one row over time (x-t) below it and one column over time (y-t) on its right.

    A moving object is a slanted line in such a slice, and so is a map that follows the object. The clip is on the left,
    and its explanation is on the right.

    Example:
        >>> import numpy as np, torch
        >>> frames = np.full((8, 48, 64, 3), 128, dtype=np.uint8)
        >>> maps = torch.zeros(1, 8, 48, 64)
        >>> maps[0, 5, 20, 30] = 1.0
        >>> figure, axes = show_slices(frames, maps, use_pyplot=False)
        >>> [panel.get_title() for panel in axes.child_axes if panel.get_title()]
        ['clip, frame 5', 'attributions, frame 5']

    Args:
        clip: the original frames ``(T, H, W, 3)`` uint8, or a clip in ``layout``.
        attributions: attributions of the clip, in one of the forms of :func:`~captum_staa.visualization.show_frames`.
        layout: order of the axes of 5-D tensors, such as ``"BTCHW"``.
        at: position of the cuts: (frame, row, column) of the clip, in pixels of the frames; None uses the pixel with
            the strongest attribution of the selected sign.
        method: how to draw the attributions: ``"blended_heat_map"``, ``"heat_map"``, ``"masked_image"``,
            ``"alpha_scaling"`` or ``"original_image"``; see :func:`~captum_staa.visualization.show_frames`.
        sign: attributions to draw: ``"absolute_value"``, ``"positive"``, ``"negative"`` or ``"all"``.
        outlier_perc: percentage in [0, 100]: the largest values that together make up this share of the total are
            clipped to 1.
        alpha_overlay: maximum opacity of the heat map, in [0, 1].
        cmap: color map, or its name; None uses the default of ``sign``.
        show_colorbar: whether to draw a color bar.
        crop: ``(top, left, height, width)`` in pixels of the frames: the region that the model saw.
        index: index of the clip in a batch; required if the batch has more than one clip.
        mean: mean of the clip's normalization, one number or one per channel; requires ``std``.
        std: standard deviation of the clip's normalization; requires ``mean``.
        indices: ``(T,)``, frame numbers in the video file, for the labels. The frames are still drawn at equal
            distances.
        fps: frame rate of ``indices`` (of the clip if ``indices`` is None); the time axis is then in seconds.
        title: title of the figure.
        fig_size: width and height of the figure in inches; None fits the frames.
        plt_fig_axis: figure and axes to draw the panels in; None creates new ones.
        use_pyplot: whether to create the figure with pyplot. The figure is not shown.

    Returns:
        The figure and its outer axes. Their ``child_axes`` are the panels: frame, x-t slice and y-t slice of the clip,
        then those of the explanation.

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
    shape = drawn.original.shape[:3]
    total, height, width = shape
    names = frame_labels(total, indices, fps)
    if drawn.saliency is not None and at is None:
        at = strongest(drawn.saliency.values, shape, crop)
    t, y, x = at or (total // 2, height // 2, width // 2)
    if not (0 <= t < total and 0 <= y < height and 0 <= x < width):
        raise ValueError(f"at must be (frame, row, column) within {shape}, got {at!r}")

    pixel = FRAME / max(height, width)  # inches
    tall, wide = height * pixel, width * pixel
    group = LABELS + wide + GAP + TIME
    page = 2 * group + 0.1, TITLE + tall + GAP + TIME + LABELS
    key = drawn.cmap if show_colorbar else None
    figure, axes = new_figure(plt_fig_axis, use_pyplot, fig_size or page_size(page, title, key))
    axes.set_axis_off()

    marked = sorted({0, total // 2, total - 1})
    ticks, tick_names = [n + 0.5 for n in marked], [names[n].removeprefix("frame ").removesuffix(" s") for n in marked]
    unit = "frame" if fps is None else "time in s"
    sources: list[tuple[str, Callable[[int], NDArray[np.uint8]]]] = [
        ("clip", lambda frame: drawn.original[frame]),
        ("attributions", drawn.frame),
    ]
    for place_at, (name, frame_at) in enumerate(sources):
        along_x, along_y = cut(frame_at, total, y, x)
        left = LABELS + place_at * group
        frame, x_t, y_t = (
            inset(axes, page, left, TITLE, wide, tall),
            inset(axes, page, left, TITLE + tall + GAP, wide, TIME),
            inset(axes, page, left + wide + GAP, TITLE, TIME, tall),
        )
        frame.imshow(frame_at(t), extent=(0, width, height, 0), aspect="auto")
        frame.set_title(f"{name}, {names[t]}", fontsize=LABEL_SIZE)
        x_t.imshow(along_x, extent=(0, width, total, 0), aspect="auto", interpolation="nearest")
        y_t.imshow(along_y, extent=(0, total, height, 0), aspect="auto", interpolation="nearest")
        for here, (vertical, horizontal) in ((frame, (x, y)), (x_t, (x, t)), (y_t, (t, y))):
            here.axvline(vertical + 0.5, color=LINE_COLOR, linewidth=0.9)
            here.axhline(horizontal + 0.5, color=LINE_COLOR, linewidth=0.9)
            here.tick_params(labelsize=LABEL_SIZE - 1)
        frame.set_xticks([])
        frame.set_ylabel("y in pixels", fontsize=LABEL_SIZE)
        x_t.set_xlabel("x in pixels", fontsize=LABEL_SIZE)
        x_t.set_yticks(ticks, tick_names)
        x_t.set_ylabel(unit, fontsize=LABEL_SIZE)
        y_t.set_yticks([])
        y_t.set_xticks(ticks, tick_names)
        y_t.set_xlabel(unit, fontsize=LABEL_SIZE)
    head_and_key(figure, axes, title, key, drawn.limits, drawn.caption)
    return figure, axes


def cut(
    frame_at: Callable[[int], NDArray[np.uint8]], total: int, y: int, x: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return row y ``(T, W, 3)`` and column x ``(H, T, 3)`` of all frames. Only one frame is in memory at a time."""
    rows, columns = zip(*((frame[y].copy(), frame[:, x].copy()) for frame in map(frame_at, range(total))), strict=True)
    return np.stack(rows), np.stack(columns, axis=1)


def strongest(values: NDArray[np.float32], size: tuple[int, int, int], crop: Crop | None) -> tuple[int, int, int]:
    """Return the pixel (t, y, x) of the frames where the map ``(T, h, w)`` has the largest magnitude."""
    t = int(np.abs(values).max((1, 2)).argmax())
    (laid,), _ = place(values[t : t + 1], size[1:], crop)
    y, x = np.unravel_index(int(np.abs(laid).argmax()), laid.shape)
    return t, int(y), int(x)
