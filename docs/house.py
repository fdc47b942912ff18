"""Draws docs/images/architecture.svg from the imports of the package: `python docs/house.py`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "captum_staa"
DOOR = "captum_staa"  # what a user imports
WIDTH, HEIGHT, STEP = 1.55, 0.5, 1.15  # of a box and of a floor, in inches
PAGE = 11.0


def rooms() -> dict[str, set[str]]:
    """Every room of the package, and the rooms that it imports."""
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    names -= {"__init__"}
    found: dict[str, set[str]] = {name: set() for name in names} | {DOOR: set()}
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).with_suffix("").parts[0]
        here = DOOR if here == "__init__" else here
        for name in imported(path):
            there = name if name in names else DOOR
            if there != here and not (there == DOOR and here != "cli" and here != "__main__"):
                found[here].add(there)
    return found


def imported(path: Path) -> Iterator[str]:
    """The first name below the package of everything that a file imports from it."""
    folder = path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = list(folder[: len(folder) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                full = [*base, alias.name]
                if full[0] == PACKAGE.name:
                    yield full[1]


def floors(uses: dict[str, set[str]]) -> dict[str, int]:
    """How long the longest way down from each room is."""
    found: dict[str, int] = {}

    def floor(room: str) -> int:
        if room not in found:
            found[room] = 1 + max((floor(other) for other in uses[room]), default=-1)
        return found[room]

    for room in uses:
        floor(room)
    return found


def needed(uses: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without the arrows that a longer way makes as well."""

    def below(room: str) -> set[str]:
        return uses[room].union(*map(below, uses[room]))

    return {room: direct - set().union(*map(below, direct)) for room, direct in uses.items()}


def lines(room: str) -> int:
    """Of code, in a file or a folder."""
    path = PACKAGE / ("__init__.py" if room == DOOR else f"{room}.py")
    files = [path] if path.exists() else (PACKAGE / room).rglob("*.py")
    return sum(len(file.read_text("utf-8").splitlines()) for file in files)


def draw() -> Figure:
    """Rooms as boxes, the lowest at the bottom, and arrows to what each stands on."""
    uses = rooms()
    level, arrows = floors(uses), needed(uses)
    top = max(level.values())
    place: dict[str, tuple[float, float]] = {}
    for floor in range(top + 1):
        row = [room for room in uses if level[room] == floor]
        row.sort(key=lambda room: sum(place[other][0] for other in arrows[room]) / max(len(arrows[room]), 1))
        if floor == 0:
            row.sort()
        for at, room in enumerate(row):
            place[room] = PAGE * (at + 0.5) / len(row), STEP * floor + HEIGHT
    figure = Figure(figsize=(PAGE, STEP * top + 2 * HEIGHT))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, PAGE), ylim=(0, STEP * top + 2 * HEIGHT))
    axes.set_axis_off()
    for room, others in arrows.items():
        for other in others:
            (x, y), (to_x, to_y) = place[room], place[other]
            axes.annotate(
                "",
                (to_x, to_y + HEIGHT / 2),
                (x, y - HEIGHT / 2),
                arrowprops={"arrowstyle": "-|>", "color": "0.6", "lw": 0.8, "shrinkA": 0, "shrinkB": 0},
            )
    for room, (x, y) in place.items():
        axes.text(
            x,
            y,
            f"{room}\n{lines(room)} lines",
            ha="center",
            va="center",
            fontsize=9,
            linespacing=1.3,
            bbox={"boxstyle": "round,pad=0.35", "facecolor": "#f3f1ec", "edgecolor": "0.45"},
        )
    return figure


def main() -> None:
    with matplotlib.rc_context({"svg.hashsalt": "captum_staa", "svg.fonttype": "none"}):
        draw().savefig(HERE / "images" / "architecture.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
