"""Timelines: the attribution of each frame as a curve, with key frames above it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage, TextArea, VPacker
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from captum_staa._utils.checks import check_count
from captum_staa._utils.notebook import AGAINST, FOR
from captum_staa.result import VideoAttribution
from captum_staa.visualization.figure import LABEL_SIZE, SIGNS, Sign, new_figure
from captum_staa.visualization.frames import Frames, Pixels, tensor_of
from captum_staa.visualization.saliency import Attributions, Maps, Truth, evidence_windows, key_frames

TRUTH = "0.87"  # gray level of the shaded frames that contain the evidence
THUMBNAIL = 1.1  # maximum height of a key frame in inches
GAP = 16  # points between the axes and the key frames, for the factor of the y axis (such as 1e-3)


def show_timeline(
    attributions: Attributions | Sequence[float],
    frames: Frames | Pixels | None = None,
    *,
    sign: Sign = "all",
    num_key_frames: int = 6,
    truth: Truth | None = None,
    title: str | None = None,
    fig_size: tuple[float, float] = (9, 4.4),
    plt_fig_axis: tuple[Figure, Axes] | None = None,
    use_pyplot: bool = True,
) -> tuple[Figure, Axes]:
    """Draw the attribution of each frame as a curve over time, with key frames above it.

    Example:
        >>> frames = Frames(np.zeros((4, 48, 64, 3), dtype=np.uint8), fps=2)
        >>> figure, axes = show_timeline([0.0, 0.5, 2.0, -0.5], frames, use_pyplot=False)
        >>> axes.lines[0].get_xdata().tolist(), axes.get_xlabel()
        ([0.0, 0.5, 1.0, 1.5], 'time in s')

    Args:
        attributions: one number per frame, ``(T,)`` or ``(B, T)``; or :class:`~captum_staa.VideoAttribution`, whose
            temporal part is drawn; or maps in one of the other forms of
            :func:`~captum_staa.visualization.show_frames`, which are summed over pixels.
        frames: the clip, in one of the forms of :class:`~captum_staa.visualization.Frames`, for the key frames
            and the time axis; None draws the curve over the positions of the frames.
        sign: attributions to sum: ``"all"`` (negative values reduce the sum), ``"absolute_value"``, ``"positive"`` or
            ``"negative"``.
        num_key_frames: number of equal parts of the clip; the strongest frame of each part is a key frame. 0 draws the
            curve only. If there is no space for a dot per frame, only key frames have a dot.
        truth: frames that contain the evidence, which are shaded: ``(T,)`` bool, or pairs (first, last) of positions in
            the clip, both inclusive.
        title: title of the figure.
        fig_size: width and height of the figure in inches.
        plt_fig_axis: figure and axes to draw on; None creates new ones. Key frames are drawn above the axes.
        use_pyplot: whether to create the figure with pyplot. The figure is not shown.

    Returns:
        The figure and the axes of the curve.

    Raises:
        TypeError, ValueError: an argument is invalid, or the clip and the attributions differ in the number of frames.
    """
    check_count("num_key_frames", num_key_frames, least=0)
    clip = None if frames is None else Frames.of(frames)
    if not isinstance(attributions, VideoAttribution):
        numbers = tensor_of(attributions, "attributions")
        attributions = numbers[..., None, None] if numbers.ndim in (1, 2) else numbers
    curve = Curve.of(Maps.of(attributions, clip), clip, sign, truth)
    chosen = key_frames(curve.values, num_key_frames) if clip is not None and num_key_frames else []

    figure, axes = new_figure(plt_fig_axis, use_pyplot, fig_size)
    curve.draw(figure, axes, chosen)
    above = _tie_key_frames(figure, axes, clip, curve, chosen) if clip is not None and chosen else 6.0
    if title:
        axes.set_title(title, pad=above)
    return figure, axes


@dataclass(frozen=True, eq=False)
class Curve:
    """The attribution of each frame over time.

    Attributes:
        values: ``(T,)``, the attribution of each frame.
        times: ``(T,)``, strictly increasing: times of the frames in seconds, or frame numbers.
        seconds: whether ``times`` are seconds.
        sign: the attributions that are summed.
        windows: pairs (first, last) of the frames that contain the evidence.
    """

    values: NDArray[np.float64]
    times: NDArray[np.float64]
    seconds: bool
    sign: Sign
    windows: list[tuple[int, int]]

    @classmethod
    def of(cls, maps: Maps, frames: Frames | None, sign: Sign, truth: Truth | None) -> Curve:
        """Return the curve of a clip. Raises ValueError if the frame numbers do not increase, or ``truth`` is invalid.

        Without ``frames``, the curve is drawn over positions in the clip.
        """
        values = maps.per_frame(sign)
        times = np.arange(len(values), dtype=float) if frames is None else np.array(frames.numbers, dtype=float)
        if (np.diff(times) <= 0).any():
            raise ValueError(f"indices must be strictly increasing, got {times.astype(int).tolist()}")
        seconds = frames is not None and frames.fps is not None
        if frames is not None and frames.fps is not None:
            times = times / frames.fps
        return cls(values, times, seconds, sign, evidence_windows(truth, len(values)))

    def draw(
        self, figure: Figure, axes: Axes, chosen: Sequence[int] = (), name: str | None = None, color: str = "0.25"
    ) -> None:
        """Draw the curve. If there is no space for a dot per frame, only the ``chosen`` frames have a dot.

        Several curves with a name, such as those of two classes, can be drawn on the same axes, each in its color.
        """
        values, times = self.values, self.times
        steps = np.diff(times)
        half = (float(np.median(steps)) if len(steps) else 1.0) / 2
        axes.plot(times, values, color=color, linewidth=1.4, zorder=3, label=name)
        for first, last in self.windows if name is None or not axes.patches else ():
            axes.axvspan(
                times[first] - half,
                times[last] + half,
                color=TRUTH,
                zorder=0.5,
                linewidth=0,
                label=None if axes.patches else "frames with evidence",
            )
        axes.axhline(0, color="0.6", linewidth=0.8, zorder=1.5)
        shades = ((values >= 0, FOR), (values <= 0, AGAINST)) if name is None else ((values == values, color),)
        for part, shade in shades:
            axes.fill_between(
                times, values, where=part.tolist(), interpolate=True, color=shade, alpha=0.25, linewidth=0
            )
        points = 72 * axes.bbox.width / figure.dpi
        crowded = len(steps) and points * steps.min() < 6 * (times[-1] - times[0])  # whether dots would overlap
        marked = list(chosen) if crowded else list(range(len(values)))
        colors = [color if name is not None else FOR if value >= 0 else AGAINST for value in values[marked]]
        axes.scatter(times[marked], values[marked], c=colors, s=16, zorder=4)
        axes.set_xlim(times[0] - half, times[-1] + half)
        axes.margins(y=0.12)
        if not any(np.any(line.get_ydata()) for line in axes.lines):
            axes.set_ylim(-1, 1)  # otherwise matplotlib selects a scale of 1e-17
        axes.set_xlabel("time in s" if self.seconds else "frame")
        axes.set_ylabel(f"{SIGNS[self.sign]}\nper frame")
        axes.xaxis.set_major_locator(
            MaxNLocator(nbins=10, integer=not self.seconds, steps=[1, 2, 5, 10], min_n_ticks=1)
        )
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.spines[["top", "right"]].set_visible(False)
        if axes.patches or name is not None:
            # below the axes, so that it does not cover the curve; several entries go below the label of the axis
            handles, labels = axes.get_legend_handles_labels()
            order = sorted(range(len(labels)), key=lambda i: isinstance(handles[i], Patch))
            below = -0.1 if name is None else -33 / (72 * axes.bbox.height / figure.dpi)
            axes.legend(
                [handles[i] for i in order],
                [labels[i] for i in order],
                loc="upper right",
                bbox_to_anchor=(1, below),
                fontsize=LABEL_SIZE,
                frameon=False,
                ncols=len(labels),
            )


def _tie_key_frames(figure: Figure, axes: Axes, frames: Frames, curve: Curve, chosen: Sequence[int]) -> float:
    """Draw thumbnails in a row above the curve, each connected to its point. Return their height in points."""
    (height, breadth), names = frames.size, frames.captions()
    width = axes.bbox.width / figure.dpi / len(chosen) * 0.93  # maximum width of a thumbnail in inches
    scale = min(width / breadth, THUMBNAIL / height)  # inches per pixel
    # Sizes are in inches and not in fractions of the axes, so that the layout engine can reserve the space.
    above_axes = axes.transAxes + ScaledTranslation(0, GAP / 72, figure.dpi_scale_trans)
    for position, at in enumerate(chosen):
        # With zoom=1, one pixel of an OffsetImage is one point, 1/72 inch.
        picture = OffsetImage(
            frames.pixels[at], zoom=scale * 72, interpolation="hanning" if scale < 1 / 72 else "nearest"
        )
        label = TextArea(names[at], textprops={"fontsize": LABEL_SIZE})
        tie = AnnotationBbox(
            VPacker(children=[label, picture], align="center", pad=0, sep=3),
            (curve.times[at], curve.values[at]),
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
    return GAP + 72 * scale * height + LABEL_SIZE + 14
