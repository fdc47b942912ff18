"""Draws docs/images/architecture.svg from the imports of the package: `python docs/package_graph.py`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "captum_staa"
PUBLIC = "captum_staa"  # what a user imports
WIDTH, HEIGHT, STEP = 1.55, 0.5, 1.15  # of a box and of a row, in inches
PAGE = 11.0


def packages() -> dict[str, set[str]]:
    """Return every package and top-level module, and its imports."""
    names = {
        path.stem
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    names -= {"__init__"}
    found: dict[str, set[str]] = {name: set() for name in names} | {PUBLIC: set()}
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).with_suffix("").parts[0]
        here = PUBLIC if here == "__init__" else here
        for name in imported(path):
            there = name if name in names else PUBLIC
            if there != here and not (
                there == PUBLIC and here != "cli" and here != "__main__"
            ):
                found[here].add(there)
    return found


def imported(path: Path) -> Iterator[str]:
    """Yield the first name below the package for every import of a file."""
    folder = path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = list(folder[: len(folder) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                full = [*base, alias.name]
                if full[0] == PACKAGE.name:
                    yield full[1]


def rows(uses: dict[str, set[str]]) -> dict[str, int]:
    """Return the length of the longest chain of imports below each package."""
    found: dict[str, int] = {}

    def row_of(package: str) -> int:
        if package not in found:
            found[package] = 1 + max(
                (row_of(other) for other in uses[package]), default=-1
            )
        return found[package]

    for package in uses:
        row_of(package)
    return found


def needed(uses: dict[str, set[str]]) -> dict[str, set[str]]:
    """Remove imports that follow from a longer chain."""

    def below(package: str) -> set[str]:
        return uses[package].union(*map(below, uses[package]))

    return {
        package: direct - set().union(*map(below, direct))
        for package, direct in uses.items()
    }


def lines(package: str) -> int:
    """Count the lines of code in a file or a folder."""
    path = PACKAGE / ("__init__.py" if package == PUBLIC else f"{package}.py")
    files = [path] if path.exists() else (PACKAGE / package).rglob("*.py")
    return sum(len(file.read_text("utf-8").splitlines()) for file in files)


def draw() -> Figure:
    """Draw packages as boxes, the lowest at the bottom, with arrows to their imports."""
    uses = packages()
    level, arrows = rows(uses), needed(uses)
    top = max(level.values())
    place: dict[str, tuple[float, float]] = {}
    for number in range(top + 1):
        row = [package for package in uses if level[package] == number]
        row.sort(
            key=lambda package: (
                sum(place[other][0] for other in arrows[package])
                / max(len(arrows[package]), 1)
            )
        )
        if number == 0:
            row.sort()
        for at, package in enumerate(row):
            place[package] = PAGE * (at + 0.5) / len(row), STEP * number + HEIGHT
    figure = Figure(figsize=(PAGE, STEP * top + 2 * HEIGHT))
    axes = figure.add_axes(
        (0, 0, 1, 1), xlim=(0, PAGE), ylim=(0, STEP * top + 2 * HEIGHT)
    )
    axes.set_axis_off()
    for package, others in arrows.items():
        for other in others:
            (x, y), (to_x, to_y) = place[package], place[other]
            axes.annotate(
                "",
                (to_x, to_y + HEIGHT / 2),
                (x, y - HEIGHT / 2),
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": "0.6",
                    "lw": 0.8,
                    "shrinkA": 0,
                    "shrinkB": 0,
                },
            )
    for package, (x, y) in place.items():
        axes.text(
            x,
            y,
            f"{package}\n{lines(package)} lines",
            ha="center",
            va="center",
            fontsize=9,
            linespacing=1.3,
            bbox={
                "boxstyle": "round,pad=0.35",
                "facecolor": "#f3f1ec",
                "edgecolor": "0.45",
            },
        )
    return figure


def main() -> None:
    with matplotlib.rc_context({"svg.hashsalt": "captum_staa", "svg.fonttype": "none"}):
        draw().savefig(HERE / "images" / "architecture.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
