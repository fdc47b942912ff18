"""Draws the pictures of docs/gallery.md from the maps that the page's own blocks compute."""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from captum_staa.benchmark import PlantedClips

HERE = Path(__file__).parent
TASKS = ("pattern", "motion", "order")
NAMES = {"videomae": "VideoMAE", "timesformer": "TimeSformer", "resnet3d": "3D CNN", "st-abn": "ST-ABN, a 3D CNN"}
CNNS = ("resnet3d", "st-abn")  # the right half of the grid
OUTLINE = "#7dff7a"

Maps = dict[tuple[str, str], Tensor]  # of a model's short name and a task, (1, T, H, W)


def sections() -> dict[str, str]:
    """The blocks of the page by their headings."""
    page = (HERE / "gallery.md").read_text("utf-8")
    return {
        heading: re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
        for heading, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    }


def file_of(heading: str) -> Path:
    """Return the path of the picture of a section."""
    return HERE / "images" / f"gallery_{re.sub(r'[^a-z0-9]+', '_', heading.lower()).strip('_')}.webp"


def main() -> None:
    """Draw one picture per section, and the overview."""
    found: dict[str, Maps] = {}
    for heading, code in sections().items():
        names: dict[str, object] = {"__name__": "gallery"}
        exec(compile(code, f"gallery.md, {heading}", "exec"), names)
        found[heading] = names["maps"]  # type: ignore[assignment]
        save(strips(found[heading]), file_of(heading))
        print(file_of(heading).name, flush=True)
    save(grid(found), HERE / "images" / "gallery.webp")


def strips(maps: Maps) -> Figure:
    """Draw the models side by side, with a row per task and five frames each."""
    models = list(dict.fromkeys(model for model, _ in maps))
    figure = Figure(figsize=(7.6, 2.55))
    for column, model in enumerate(models):
        left = 0.055 + column * 0.475
        figure.text(left + 0.23, 0.955, NAMES[model], ha="center", va="center", fontsize=8)
        for row, task in enumerate(TASKS):
            if column == 0:
                figure.text(0.027, 0.765 - row * 0.305, task, ha="center", va="center", fontsize=8, rotation=90)
            frames, truth = planted(task)
            values = strength(maps[model, task])
            for place, t in enumerate(shown(truth)):
                ax = figure.add_axes((left + place * 0.093, 0.62 - row * 0.305, 0.0885, 0.2637))
                draw(ax, frames[t], values[t], truth[t])
    return figure


def grid(found: dict[str, Maps]) -> Figure:
    """Draw the overview with a row per method and a column per model and task: the middle frame of the first event."""
    rows = len(found) + 1
    figure = Figure(figsize=(7.6, 0.4 + 0.86 * rows))
    high = 0.86 / (0.4 + 0.86 * rows)
    for half, kind in enumerate(("VideoMAE", "3D CNNs")):
        for column, task in enumerate(TASKS):
            left = 0.235 + half * 0.385 + column * 0.122
            figure.text(left + 0.056, 1 - 0.28 * high, f"{kind}\n{task}", ha="center", va="center", fontsize=7)
            frames, truth = planted(task)
            times = np.flatnonzero(truth.any((1, 2)))
            event = times[times - np.arange(len(times)) == times[0]]  # without a gap
            t = int(event[len(event) // 2])
            for row, (heading, maps) in enumerate([("the clip", {}), *found.items()]):
                bottom = 1 - (row + 1.45) * high
                if half == column == 0:
                    figure.text(0.225, bottom + 0.47 * high, heading.replace(", ", ",\n"), **RIGHT)
                ax = figure.add_axes((left, bottom, 0.113, 0.97 * high))
                matching = [m for (name, other), m in maps.items() if other == task and (name in CNNS) == bool(half)]
                if row and not (matching := [m for m in matching if m is not maps.get(("timesformer", task))]):
                    ax.text(0.5, 0.5, "no attention\nto read", ha="center", va="center", fontsize=6, color="#777777")
                    ax.set_axis_off()
                    continue
                draw(ax, frames[t], strength(matching[0])[t] if row else None, truth[t])
    return figure


RIGHT = {"ha": "right", "va": "center", "fontsize": 7}


def planted(task: str) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return the frames ``(T, H, W, 3)`` and the truth ``(T, H, W)`` of the clip of all code blocks."""
    clips = PlantedClips(seed=12, n=20, task=task)
    return clips.frames(16), clips[16:17][2][0].numpy()


def shown(truth: NDArray[np.bool_]) -> list[int]:
    """Return five frames: two before the evidence, its first, middle and last frame, and two after it."""
    times = np.flatnonzero(truth.any((1, 2)))
    first, last = int(times[0]), int(times[-1])
    middle = int(times[len(times) // 2])
    return [max(0, first - 2), first, middle, last, min(len(truth) - 1, last + 2)]


def strength(maps: Tensor) -> NDArray[np.float64]:
    """Return positive values ``(T, H, W)`` in [0, 1], on one scale per clip; the top 2 % of the sum count as 1."""
    values = maps[0].clamp(min=0).double().numpy()
    ordered = np.sort(values, None)
    top = ordered[np.searchsorted(ordered.cumsum(), 0.98 * ordered.sum())]
    return np.clip(values / top, 0, 1) if top > 0 else values


def draw(
    ax: matplotlib.axes.Axes,
    frame: NDArray[np.uint8],
    values: NDArray[np.float64] | None,
    truth: NDArray[np.bool_],
) -> None:
    """Draw a frame, in color or in gray under its map, with the outline of the planted evidence."""
    if values is None:
        ax.imshow(frame)
    else:
        gray = frame.mean(-1)[..., None] / 255
        heat = matplotlib.colormaps["inferno"](values)[..., :3]
        opacity = 0.75 * values[..., None] ** 0.5
        ax.imshow((1 - opacity) * gray + opacity * heat)
    if truth.any():
        ax.contour(truth, levels=[0.5], colors=OUTLINE, linewidths=0.8)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Save a picture with twice its display resolution."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=180)
    Image.open(drawn).convert("RGB").save(path, quality=70, method=6)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
