"""Timelines: the attribution of each frame as a curve, with key frames above it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.offsetbox import AnnotationBbox, OffsetImage, TextArea, VPacker
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray
from torch import Tensor

from captum_staa._utils.notebook import AGAINST, FOR
from captum_staa.layout import VideoLayout

from .figure import LABEL_SIZE, frame_labels, new_figure
from .saliency import SIGNS, Attributions, Clip, Sign, as_pictures, evidence_windows, key_frames, when

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRUTH = "0.87"  # gray level of the shaded frames that contain the evidence
THUMBNAIL = 1.1  # maximum height of a key frame in inches
GAP = 16  # points between the axes and the key frames, for the factor of the y axis (such as 1e-3)


def show_timeline(
    attributions: Attributions | Sequence[float],
    layout: VideoLayout | str | None = None,
    *,
    sign: Sign = "all",
    clip: Clip | None = None,
    num_key_frames: int = 6,
    fps: float | None = None,
    indices: Sequence[int] | None = None,
    truth: Tensor | NDArray[np.bool_] | Sequence[tuple[int, int]] | None = None,
    index: int | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    title: str | None = None,
    fig_size: tuple[float, float] = (9, 4.4),
    plt_fig_axis: tuple[Figure, Axes] | None = None,
    use_pyplot: bool = True,
) -> tuple[Figure, Axes]:
    """Draw the attribution of each frame as a curve over time.

    Example:
        >>> import torch
        >>> figure, axes = show_timeline(torch.tensor([0.0, 0.5, 2.0, -0.5]), fps=2, use_pyplot=False)
        >>> axes.lines[0].get_xdata().tolist(), axes.get_xlabel()
        ([0.0, 0.5, 1.0, 1.5], 'time in s')

    Args:
        attributions: one number per frame ``(T,)``; or :class:`~captum_staa.VideoAttribution`, whose temporal part is
            drawn; or maps in one of the other forms of :func:`~captum_staa.visualization.show_frames`, which are summed
            over pixels.
        layout: order of the axes of 5-D tensors, such as ``"BTCHW"``.
        sign: attributions to sum: ``"all"`` (negative values reduce the sum), ``"absolute_value"``, ``"positive"`` or
            ``"negative"``.
        clip: the original frames ``(T, H, W, 3)`` uint8, or a clip in ``layout``, to draw key frames above the curve;
            None draws the curve only.
        num_key_frames: number of equal parts of the clip; the strongest frame of each part is a key frame. If there is
            no space for a dot per frame, only key frames have a dot.
        fps: frame rate of ``indices`` (of the clip if ``indices`` is None); the time axis is then in seconds.
        indices: ``(T,)``, frame numbers in the video file.
        truth: frames that contain the evidence, which are shaded: ``(T,)`` bool, or pairs (first, last) of positions in
            the clip, both inclusive.
        index: index of the clip in a batch; required if the batch has more than one clip.
        mean: mean of the clip's normalization, one number or one per channel; requires ``std``.
        std: standard deviation of the clip's normalization; requires ``mean``.
        title: title of the figure.
        fig_size: width and height of the figure in inches.
        plt_fig_axis: figure and axes to draw on; None creates new ones. Key frames are drawn above the axes.
        use_pyplot: whether to create the figure with pyplot. The figure is not shown.

    Returns:
        The figure and the axes of the curve.

    Raises:
        TypeError, ValueError: an argument is invalid, or the clip and the attributions differ in the number of frames.
    """
    values = when(attributions, layout, sign, index)
    total = len(values)
    names = frame_labels(total, indices, fps)
    times = np.arange(total, dtype=float) if indices is None else np.asarray(indices, dtype=float)
    times = times if fps is None else times / fps
    steps = np.diff(times)
    if (steps <= 0).any():
        raise ValueError(f"indices must be strictly increasing, got {np.asarray(indices).tolist()}")
    half = (float(np.median(steps)) if total > 1 else 1.0) / 2

    figure, axes = new_figure(plt_fig_axis, use_pyplot, fig_size)
    axes.plot(times, values, color="0.25", linewidth=1.4, zorder=3)
    for first, last in evidence_windows(truth, total):
        axes.axvspan(
            times[first] - half,
            times[last] + half,
            color=TRUTH,
            zorder=0.5,
            linewidth=0,
            label=None if axes.patches else "frames with evidence",
        )
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=1.5)
    for part, color in ((values >= 0, FOR), (values <= 0, AGAINST)):
        axes.fill_between(times, values, where=part.tolist(), interpolate=True, color=color, alpha=0.25, linewidth=0)
    chosen = [] if clip is None else key_frames(values, num_key_frames)
    points = 72 * axes.bbox.width / figure.dpi
    crowded = total > 1 and points * steps.min() < 6 * (times[-1] - times[0])  # whether dots would overlap
    marked = chosen if crowded else list(range(total))
    colors = [FOR if value >= 0 else AGAINST for value in values[marked]]
    axes.scatter(times[marked], values[marked], c=colors, s=16, zorder=4)
    axes.set_xlim(times[0] - half, times[-1] + half)
    axes.margins(y=0.12)
    if not values.any():
        axes.set_ylim(-1, 1)  # otherwise matplotlib selects a scale of 1e-17
    axes.set_xlabel("frame" if fps is None else "time in s")
    axes.set_ylabel(f"{SIGNS[sign]}\nper frame")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=fps is None, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    axes.spines[["top", "right"]].set_visible(False)
    if axes.patches:
        axes.legend(
            loc="upper right", bbox_to_anchor=(1, -0.1), fontsize=LABEL_SIZE, frameon=False
        )  # below the axes, so that it does not cover the curve
    above = 6.0
    if clip is not None:
        frames = as_pictures(clip, layout, index, mean, std)
        if len(frames) != total:
            raise ValueError(f"attributions must have as many frames as the clip, {len(frames)}, got {total}")
        above = _tie_key_frames(figure, axes, frames, names, times, values, chosen)
    if title:
        axes.set_title(title, pad=above)
    return figure, axes


def _tie_key_frames(
    figure: Figure,
    axes: Axes,
    frames: NDArray[np.uint8],
    names: Sequence[str],
    times: NDArray[np.float64],
    values: NDArray[np.float64],
    chosen: Sequence[int],
) -> float:
    """Draw thumbnails in a row above the curve, each connected to its point. Return their height in points."""
    width = axes.bbox.width / figure.dpi / len(chosen) * 0.93  # maximum width of a thumbnail in inches
    scale = min(width / frames.shape[2], THUMBNAIL / frames.shape[1])  # inches per pixel
    # Sizes are in inches and not in fractions of the axes, so that the layout engine can reserve the space.
    above_axes = axes.transAxes + ScaledTranslation(0, GAP / 72, figure.dpi_scale_trans)
    for position, frame in enumerate(chosen):
        # With zoom=1, one pixel of an OffsetImage is one point, 1/72 inch.
        picture = OffsetImage(frames[frame], zoom=scale * 72, interpolation="hanning" if scale < 1 / 72 else "nearest")
        label = TextArea(names[frame], textprops={"fontsize": LABEL_SIZE})
        tie = AnnotationBbox(
            VPacker(children=[label, picture], align="center", pad=0, sep=3),
            (times[frame], values[frame]),
            xybox=((position + 0.5) / len(chosen), 1),
            xycoords="data",
            boxcoords=above_axes,
            box_alignment=(0.5, 0),
            frameon=False,
            pad=0,
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.8, "shrinkB": 3},
            annotation_clip=False,
            zorder=2,
        )
        axes.add_artist(tie)
    return GAP + 72 * scale * frames.shape[1] + LABEL_SIZE + 14
