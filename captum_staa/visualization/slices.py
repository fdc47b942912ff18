"""Space-time slices: one row and one column of the frames over time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from captum_staa.visualization.figure import (
    DEFAULT_STYLE,
    LABEL_SIZE,
    Style,
    inset,
    new_figure,
    page_size,
    title_and_bar,
)
from captum_staa.visualization.frames import Frames, Pixels, place
from captum_staa.visualization.overlay import overlay
from captum_staa.visualization.saliency import Attributions

FRAME = 2.3  # longer side of the frame in inches
TIME = 1.5  # length of the time axis in inches
GAP, TITLE, LABELS = 0.12, 0.3, 0.55  # inches between the panels, above them, and for the labels of an axis
LINE_COLOR = "#00c8a0"  # of the cut; a color that is in none of the default color maps, and light enough for any frame


def show_slices(
    attributions: Attributions,
    frames: Frames | Pixels,
    *,
    at: tuple[int, int, int] | None = None,
    style: Style = DEFAULT_STYLE,
    title: str | None = None,
    plt_fig_axis: tuple[Figure, Axes] | None = None,
    use_pyplot: bool = True,
) -> tuple[Figure, Axes]:
    """Draw a frame, with one row over time (x-t) below it and one column over time (y-t) on its right.

    A moving object is a slanted line in such a slice, and so is a map that follows the object. The clip is on the left,
    and its explanation is on the right.

    Example:
        >>> import numpy as np, torch
        >>> pixels = np.full((8, 48, 64, 3), 128, dtype=np.uint8)
        >>> maps = torch.zeros(1, 8, 48, 64)
        >>> maps[0, 5, 20, 30] = 1.0
        >>> figure, axes = show_slices(maps, pixels, use_pyplot=False)
        >>> [panel.get_title() for panel in axes.child_axes if panel.get_title()]
        ['clip, frame 5', 'attributions, frame 5']

    Args:
        attributions: attributions of the clip, in one of the forms of :func:`~captum_staa.visualization.show_frames`.
        frames: the clip, in one of the forms of :class:`~captum_staa.visualization.Frames`. They are drawn at
            equal distances also if their ``indices`` are not.
        at: position of the cuts: (frame, row, column) of the clip, in pixels of the frames; None uses the pixel with
            the strongest attribution of the selected sign.
        style: how to draw the attributions.
        title: title of the figure.
        plt_fig_axis: figure and axes to draw the panels in; None creates new ones.
        use_pyplot: whether to create the figure with pyplot. The figure is not shown.

    Returns:
        The figure and its outer axes. Their ``child_axes`` are the panels: frame, x-t slice and y-t slice of the clip,
        then those of the explanation.

    Raises:
        TypeError, ValueError: an argument is invalid, or the clip and the attributions differ in the number of frames.
    """
    drawn = overlay(attributions, frames, style=style)
    clip, names = drawn.frames, drawn.frames.captions()
    shape = total, height, width = len(clip), *clip.size
    if drawn.saliency is not None and at is None:
        at = strongest(drawn.saliency.values, clip)
    t, y, x = at or (total // 2, height // 2, width // 2)
    if not (0 <= t < total and 0 <= y < height and 0 <= x < width):
        raise ValueError(f"at must be (frame, row, column) within {shape}, got {at!r}")

    pixel = FRAME / max(height, width)  # inches
    tall, wide = height * pixel, width * pixel
    group = LABELS + wide + GAP + TIME
    page = 2 * group + 0.1, TITLE + tall + GAP + TIME + LABELS
    figure, axes = new_figure(plt_fig_axis, use_pyplot, style.fig_size or page_size(page, title, style, drawn.caption))
    axes.set_axis_off()

    marked = sorted({0, total // 2, total - 1})
    ticks, tick_names = [n + 0.5 for n in marked], [names[n].removeprefix("frame ").removesuffix(" s") for n in marked]
    unit = "frame" if clip.fps is None else "time in s"
    sources: list[tuple[str, Callable[[int], NDArray[np.uint8]]]] = [
        ("clip", lambda frame: clip.pixels[frame]),
        ("attributions", drawn.picture),
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
    title_and_bar(figure, axes, title, style, drawn.caption)
    return figure, axes


def cut(
    frame_at: Callable[[int], NDArray[np.uint8]], total: int, y: int, x: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return row y ``(T, W, 3)`` and column x ``(H, T, 3)`` of all frames. Only one frame is in memory at a time."""
    rows, columns = zip(*((frame[y].copy(), frame[:, x].copy()) for frame in map(frame_at, range(total))), strict=True)
    return np.stack(rows), np.stack(columns, axis=1)


def strongest(values: NDArray[np.float32], frames: Frames) -> tuple[int, int, int]:
    """Return the pixel (t, y, x) of the frames where the map ``(T, h, w)`` has the largest magnitude."""
    t = int(np.abs(values).max((1, 2)).argmax())
    (laid,), _ = place(values[t : t + 1], frames.size, frames.crop)
    y, x = np.unravel_index(int(np.abs(laid).argmax()), laid.shape)
    return t, int(y), int(x)
