"""HTML that a notebook shows for results: small, without external files, readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

# Color-blind readers can distinguish these two, and both are visible on light and dark pages.
FOR, AGAINST = "#d47801", "#0298db"
LINE = "#888"  # also visible on light and dark pages
ROWS = 20  # maximum number of rows of a table
POINTS = 400  # about the maximum number of points of a curve, which is 360 pixels wide

Cell = str | float | int


def block(title: str, *parts: str) -> str:
    """Return HTML of a title with tables and pictures below it.

    Example:
        >>> block("Smoothness < 1", table(["clip", "space"], [[0, 0.5]]))[:40]
        '<div><div>Smoothness &lt; 1</div><table>'

    Args:
        title: plain text.
        parts: HTML, as the functions below return it.
    """
    return f"<div><div>{escape(title)}</div>{''.join(parts)}</div>"


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]], *, most: int = ROWS) -> str:
    """Return an HTML table of plain text and numbers.

    Example:
        >>> short = table(["clip", "score"], [[0, 0.123456], [1, float("nan")], [2, 1.0]], most=2)
        >>> short.count("<tr>"), "0.123<" in short, "nan" in short, "… 1 more" in short
        (4, True, True, True)

    Args:
        head: a name for each column.
        rows: cells of each row. Text is aligned to the left, numbers to the right.
        most: how many rows are shown. The last line gives the number of the other rows.
    """
    lines = ["".join(f"<th>{escape(name)}</th>" for name in head)]
    lines += ["".join(map(_cell, row)) for row in rows[:most]]
    if len(rows) > most:
        lines.append(f"<td colspan='{len(head)}'>… {len(rows) - most} more</td>")
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def by_clip(columns: Mapping[str, Sequence[float]]) -> str:
    """Return a table with one row per clip. With several clips, the first row holds their means, which ignore nan.

    Example:
        >>> by_clip({"score": [0.25, float("nan"), 0.75]}).count("<tr>"), "0.5<" in by_clip({"score": [0.25, 0.75]})
        (5, True)

    Args:
        columns: one value per clip for each column name.
    """
    rows: list[list[Cell]] = [[at, *values] for at, values in enumerate(zip(*columns.values(), strict=True))]
    if len(rows) > 1:
        known = [[value for value in column if not math.isnan(value)] for column in columns.values()]
        rows.insert(0, ["mean", *(sum(values) / len(values) if values else math.nan for values in known)])
    return table(["clip", *columns], rows)


def number(value: float) -> str:
    """Return a float with three significant digits, and an int unchanged.

    Example:
        >>> number(12345), number(0.123456), number(1234.5), number(float("nan"))
        ('12345', '0.123', '1.23e+03', 'nan')
    """
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> str:
    """Return an SVG picture of up to two lines, with the range of both axes. Values that are not finite are left out.

    Example:
        >>> drawn = curves({"insertion": [(0.0, 0.1), (0.5, 0.8), (1.0, 0.9)]}, "part inserted", "probability")
        >>> drawn.count("<polyline"), "0.1 to 0.9" in drawn
        (1, True)

    Args:
        lines: the points (x, y) of each line by its name, from left to right.
        x: label of the horizontal axis.
        y: label of the vertical axis.
    """
    kept = {name: [point for point in points if all(map(math.isfinite, point))] for name, points in lines.items()}
    points = [point for line in kept.values() for point in line]
    if not points:
        return ""
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*points, strict=True))
    drawn, names = "", []
    for color, (name, line) in zip((FOR, AGAINST), kept.items(), strict=False):
        thinned = line[:: max(len(line) // POINTS, 1)]
        spots = " ".join(
            f"{360 * (at - left) / (right - left or 1):.5g},{116 - 112 * (value - low) / (high - low or 1):.5g}"
            for at, value in thinned
        )
        drawn += f"<polyline points='{spots}' fill='none' stroke='{color}' stroke-width='2'/>"
        names.append(f"<span style='color: {color}'>{escape(name)}</span>")
    return (
        f"<div style='margin: 0.4em 0'><svg viewBox='0 0 360 120' width='360' height='120' role='img' "
        f"aria-label='{escape(y)} by {escape(x)}'><path d='M0 120H360' stroke='{LINE}'/>{drawn}</svg>"
        f"<div>{', '.join(names)}: {escape(y)}, {number(low)} to {number(high)}, "
        f"by {escape(x)}, {number(left)} to {number(right)}</div></div>"
    )


def signed_map(cells: Sequence[Sequence[float]], width: float, height: float, label: str) -> str:
    """Return an SVG picture of values in -1 .. 1 as tiles. The sign sets the color, the magnitude the opacity."""
    tiles = [
        (x, y, 1, 1, value, abs(value))
        for y, row in enumerate(cells)
        for x, value in enumerate(row)
        if abs(value) > 0.02  # weaker tiles cannot be seen, and would make the notebook large
    ]
    return (
        f"<svg viewBox='0 0 {len(cells[0])} {len(cells)}' width='{width:.0f}' height='{height:.0f}' "
        f"preserveAspectRatio='none' role='img' aria-label='{escape(label)}' style='outline: 1px solid {LINE}'>"
        f"{_rectangles(tiles)}</svg>"
    )


def signed_bars(values: Sequence[float], width: float, height: float, label: str) -> str:
    """Return an SVG picture with a bar, up or down, for each value in -1 .. 1."""
    bars = [(at + 0.1, 1 - max(value, 0), 0.8, abs(value), value, 1) for at, value in enumerate(values)]
    lowest = max(0.0, -min(values))
    return (
        f"<svg viewBox='0 0 {len(bars)} {1 + lowest:.4g}' width='{width:.0f}' height='{height:.0f}' "
        f"preserveAspectRatio='none' role='img' aria-label='{escape(label)}'>{_rectangles(bars)}"
        f"<path d='M0 1H{len(bars)}' stroke='{LINE}' vector-effect='non-scaling-stroke'/></svg>"
    )


def _cell(value: Cell) -> str:
    if isinstance(value, str):
        return f"<td style='text-align: left'>{escape(value)}</td>"
    return f"<td style='text-align: right'>{number(value)}</td>"


def _rectangles(rectangles: Sequence[tuple[float, ...]]) -> str:
    """Return SVG rectangles of (x, y, width, height, value, opacity), colored by the sign of the value."""
    return "".join(
        f"<rect x='{x:.4g}' y='{y:.4g}' width='{width:.4g}' height='{height:.4g}' "
        f"fill='{FOR if value > 0 else AGAINST}' fill-opacity='{opacity:.2g}'/>"
        for x, y, width, height, value, opacity in rectangles
    )
