"""Figures of a comparison: curves, cost against localization, ranks, and the maps of one clip."""

from __future__ import annotations

import math
from itertools import cycle

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from captum_staa.benchmark.records import CONTROLS, GRID, INVERTED, control_of
from captum_staa.benchmark.results import Results
from captum_staa.visualization import Style, compare_methods
from captum_staa.visualization.figure import evenly

FRAMES = 8  # frames of a contact sheet, at most
OUTLINE = "#35d0ff"  # visible on the dark and the light colors of a map
GRAYS = dict(zip(CONTROLS, ("0.25", "0.45", "0.6", "0.35", "0.75", "0.25", "0.5"), strict=True))
DASHES = dict(
    zip(CONTROLS, ("--", ":", "-.", (0, (8, 2)), (0, (1, 4)), (0, (5, 1, 1, 1, 1, 1)), (0, (3, 3))), strict=True)
)
# The cost figure shows the first of these that has numbers.
TRUTHS = ("rivals", "auroc", "auroc_time", "iou", "energy_pointing_game", "temporal_pointing")


def drawn(results: Results) -> dict[str, Figure]:
    """Return all figures that the results have data for, by name."""
    all_figures = {"curves": curves(results), "cost": cost(results), "ranks": ranks(results), "sheet": sheet(results)}
    return {name: figure for name, figure in all_figures.items() if figure is not None}


def curves(results: Results) -> Figure | None:
    """Return the mean insertion and deletion curves over clips, with a legend in the order of the areas under them."""
    names = [name for name in results.methods if name in results.curves]
    if not names:
        return None
    figure = Figure(figsize=(12, 0.22 * len(names) + 3.2 if len(names) > 12 else 5), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("insertion", "deletion"), strict=True):
        means = {name: results.curves[name][kind] for name in names}
        areas = {name: area_under(mean) for name, mean in means.items()}
        best_first = sorted(names, key=lambda name: areas[name], reverse=kind == "insertion")
        colors = _colors(methods := [name for name in names if control_of(name) is None])
        # methods beyond the number of colors repeat the colors, with dashed lines
        dashes = dict.fromkeys(methods[len(set(colors.values())) :], (0, (6, 1))) | DASHES
        for name in best_first:
            control = control_of(name)
            color = colors[name] if control is None else GRAYS[control]
            axes.plot(GRID, means[name], ls=dashes.get(control or name, "-"), color=color, lw=1.6, label=name)
        shown = "inserted" if kind == "insertion" else "deleted"
        axes.set(xlabel=f"fraction of the clip {shown}, the most relevant first", ylabel="probability of the target")
        axes.set_title(f"{kind}: {'higher' if kind == 'insertion' else 'lower'} is better", loc="left", fontsize=11)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        _light(axes)
        handles, _ = axes.get_legend_handles_labels()
        labels = [f"{areas[name]:.3f}  {name}" for name in best_first]
        axes.legend(handles, labels, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def cost(results: Results) -> Figure | None:
    """Return a plot of localization of the truth against median time; without truth, of insertion against time."""
    means = results.means()
    wanted = (*(name for name in TRUTHS if name in results.metrics), "insertion")
    metric = next((m for m in wanted if m in results.metrics and any(own[m].clips for own in means.values())), None)
    if metric is None or "forwards" not in results.metrics:
        return None
    placed = {
        name: (own["forwards"].value, own[metric])
        for name, own in means.items()
        if own["forwards"].clips and own[metric].clips
    }
    if not placed:
        return None
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    axes = figure.subplots()
    colors = _colors(list(placed))
    for name, (forwards, mean) in placed.items():
        if mean.clips > 1:
            axes.plot([forwards] * 2, [mean.low, mean.high], color=colors[name], lw=1.2, alpha=0.6)
        axes.plot(forwards, mean.value, "o", color=colors[name], ms=6)
    axes.set_xscale("log")
    low, high = (edge(forwards for forwards, _ in placed.values()) for edge in (min, max))
    axes.set_xlim(low / 1.6, high * 8)  # space for the names
    for name in CONTROLS:
        if name == INVERTED:  # its score is so low that it would squeeze the other points together
            continue
        if name in means and means[name][metric].clips:
            value = means[name][metric].value
            axes.axhline(value, color=GRAYS[name], ls=DASHES[name], lw=1, label=f"{name}, {value:.3f}")
    _name_points(axes, {name: (forwards, mean.value) for name, (forwards, mean) in placed.items()})
    axes.set(xlabel="median time, in forward passes of the model (log scale)", ylabel=f"{metric}, mean over clips")
    axes.set_title("score against time; bars are 95 % intervals, lines are controls", loc="left", fontsize=11)
    _light(axes)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def ranks(results: Results) -> Figure | None:
    """Return the mean ranks of all methods by all metrics that have a better direction; 1 is best."""
    found = results.ranks()
    metrics = [m for m in results.metrics if any(not math.isnan(own.get(m, math.nan)) for own in found.values())]
    names = [name for name, own in found.items() if any(not math.isnan(own[m]) for m in metrics)]
    if not metrics or not names:
        return None
    table = np.array([[found[name][metric] for metric in metrics] for name in names])
    figure = Figure(figsize=(0.62 * len(metrics) + 3.6, 0.3 * len(names) + 2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(table), cmap="viridis_r", vmin=1, vmax=len(names), aspect="auto")
    axes.set_xticks(range(len(metrics)), metrics, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    for row, column in np.argwhere(~np.isnan(table)):
        share = (table[row, column] - 1) / max(len(names) - 1, 1)
        ink = "white" if share > 0.5 else "black"  # viridis_r is light where ranks are good
        axes.text(column, row, f"{table[row, column]:.1f}", ha="center", va="center", fontsize=7, color=ink)
    axes.set_title("mean rank over clips; 1 is best", loc="left", fontsize=11)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="mean rank", shrink=0.7)
    return figure


def sheet(results: Results) -> Figure | None:
    """Return the frames of one clip and the map of every method, with an outline of the evidence if it is known."""
    shown = results.sheet
    maps = {} if shown is None else {name: shown.maps[name] for name in results.methods if name in shown.maps}
    if shown is None or not maps:
        return None
    figure, axes = compare_methods(
        maps,
        shown.frames,
        style=Style(sign="positive"),
        num_frames=FRAMES,
        title=shown.clip + (", the evidence outlined" if shown.truth is not None else ""),
        use_pyplot=False,
    )
    if shown.truth is not None:
        columns = len(axes.images) // (1 + len(maps))
        truth = shown.truth[evenly(len(shown.truth), FRAMES)]
        for at, image in enumerate(list(axes.images)):
            _outline(axes, truth[at % columns], image.get_extent())
    return figure


def area_under(curve: NDArray[np.float64]) -> float:
    """Return the area under a curve on ``GRID``, by the trapezoidal rule."""
    return float(((curve[1:] + curve[:-1]) / 2 * np.diff(GRID)).sum())


def _outline(axes: Axes, inside: NDArray[np.bool_], extent: tuple[float, float, float, float]) -> None:
    """Draw an outline around the True pixels of a mask ``(H, W)`` that is drawn within ``extent``."""
    if inside.any():
        left, right, bottom, top = extent
        down, across = (bottom - top) / inside.shape[0], (right - left) / inside.shape[1]
        # pad by one pixel without evidence, so that evidence at the border also gets an outline there
        wider = (left - across, right + across, bottom + down, top - down)
        rimmed = np.pad(inside, 1).astype(float)
        axes.contour(rimmed, [0.5], colors=OUTLINE, linewidths=0.9, origin="upper", extent=wider)


def _colors(names: list[str]) -> dict[str, tuple[float, ...]]:
    """Return a distinct color for each name. Grays are reserved for the controls."""
    pairs = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    strong, pale = ([pairs[at] for at in range(first, 20, 2) if at not in (14, 15)] for first in (0, 1))
    return dict(zip(names, cycle([*strong, *pale]), strict=False))


def _name_points(axes: Axes, placed: dict[str, tuple[float, float]]) -> None:
    """Write names to the right of their points, moved up where they would overlap."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.027
    taken: list[tuple[float, float]] = []  # positions of names: logarithm of x, y
    for name, (x, y) in sorted(placed.items(), key=lambda item: item[1][1]):
        at = y
        while any(abs(math.log10(x) - other) < 0.9 and abs(at - beside) < gap * 0.98 for other, beside in taken):
            at += gap / 4
        taken.append((math.log10(x), at))
        high = max(high, at + gap)
        axes.annotate(
            name,
            (x, y),
            (x * 1.12, at),
            fontsize=7,
            va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "0.6"} if at - y > gap / 2 else None,
        )
    axes.set_ylim(low, high)


def _light(axes: Axes) -> None:
    """Draw a light grid, and remove the top and right spines."""
    axes.grid(color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
