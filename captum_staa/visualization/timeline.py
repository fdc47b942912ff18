"""Timelines: how much each frame contributes, with the frames themselves above the curve."""

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

TRUTH = "0.87"  # the gray of where the evidence is
THUMBNAIL = 1.1  # inches, at most, from bottom to top of a key frame
GAP = 16  # points between the curve's axes and the key frames, where the factor of the scale (1e-3) may stand


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
    """Draw how much each frame contributes.

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
        The figure, and the axes of the curve.

    Raises:
        TypeError, ValueError: an argument is not as said above; the numbers of frames differ.
    """
    values = when(attributions, layout, sign, index)
    total = len(values)
    names = frame_labels(total, indices, fps)
    times = np.arange(total, dtype=float) if indices is None else np.asarray(indices, dtype=float)
    times = times if fps is None else times / fps
    steps = np.diff(times)
    if (steps <= 0).any():
        raise ValueError(f"indices must rise from frame to frame, got {np.asarray(indices).tolist()}")
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
            label=None if axes.patches else "evidence is there",
        )
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=1.5)
    for part, color in ((values >= 0, FOR), (values <= 0, AGAINST)):
        axes.fill_between(times, values, where=part.tolist(), interpolate=True, color=color, alpha=0.25, linewidth=0)
    chosen = [] if clip is None else key_frames(values, num_key_frames)
    points = 72 * axes.bbox.width / figure.dpi
    crowded = total > 1 and points * steps.min() < 6 * (times[-1] - times[0])  # dots would merge into a thick curve
    marked = chosen if crowded else list(range(total))
    colors = [FOR if value >= 0 else AGAINST for value in values[marked]]
    axes.scatter(times[marked], values[marked], c=colors, s=16, zorder=4)
    axes.set_xlim(times[0] - half, times[-1] + half)
    axes.margins(y=0.12)
    if not values.any():
        axes.set_ylim(-1, 1)  # matplotlib would show a scale of 1e-17
    axes.set_xlabel("frame" if fps is None else "time in s")
    axes.set_ylabel(f"{SIGNS[sign]}\nper frame")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=fps is None, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    axes.spines[["top", "right"]].set_visible(False)
    if axes.patches:
        axes.legend(
            loc="upper right", bbox_to_anchor=(1, -0.1), fontsize=LABEL_SIZE, frameon=False
        )  # clear of the curve
    above = 6.0
    if clip is not None:
        frames = as_pictures(clip, layout, index, mean, std)
        if len(frames) != total:
            raise ValueError(f"the clip has {len(frames)} frames, but the attributions have {total}")
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
    """Thumbnails in a row above the curve, each tied to its point; returns the height they take, in points."""
    room = axes.bbox.width / figure.dpi / len(chosen) * 0.93  # inches for each
    scale = min(room / frames.shape[2], THUMBNAIL / frames.shape[1])  # inches per pixel
    # Sizes in inches rather than in parts of the axes, so that the layout engine can make room for them.
    above_axes = axes.transAxes + ScaledTranslation(0, GAP / 72, figure.dpi_scale_trans)
    for position, frame in enumerate(chosen):
        # One pixel of an OffsetImage is a point, 1/72 inch.
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
