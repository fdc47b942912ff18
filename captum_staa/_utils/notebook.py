"""What a notebook shows of results: small HTML with nothing to fetch, legible on a light page and on a dark one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

FOR, AGAINST = "#d47801", "#0298db"  # told apart by color-blind readers, and visible on light and on dark
LINE = "#888"  # likewise
ROWS = 20  # of a table
POINTS = 400  # of a curve, which is narrower than that

Cell = str | float | int


def block(title: str, *parts: str) -> str:
    """A title, and tables and pictures below it.

    Example:
        >>> block("Smoothness < 1", table(["clip", "space"], [[0, 0.5]]))[:40]
        '<div><div>Smoothness &lt; 1</div><table>'

    Args:
        title: plain text.
        parts: HTML, as the functions below return it.
    """
    return f"<div><div>{escape(title)}</div>{''.join(parts)}</div>"


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]], *, most: int = ROWS) -> str:
    """A table of plain text and numbers.

    Example:
        >>> short = table(["clip", "score"], [[0, 0.123456], [1, float("nan")], [2, 1.0]], most=2)
        >>> short.count("<tr>"), "0.123<" in short, "nan" in short, "… 1 more" in short
        (4, True, True, True)

    Args:
        head: a name for each column.
        rows: cells; text to the left, numbers to the right.
        most: rows that are shown; the others are counted.
    """
    lines = ["".join(f"<th>{escape(name)}</th>" for name in head)]
    lines += ["".join(map(_cell, row)) for row in rows[:most]]
    if len(rows) > most:
        lines.append(f"<td colspan='{len(head)}'>… {len(rows) - most} more</td>")
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def by_clip(columns: Mapping[str, Sequence[float]]) -> str:
    """A table with a row for each clip, and the means above them where there are several; these pass over nan.

    Example:
        >>> by_clip({"score": [0.25, float("nan"), 0.75]}).count("<tr>"), "0.5<" in by_clip({"score": [0.25, 0.75]})
        (5, True)

    Args:
        columns: by name, a value per clip.
    """
    rows: list[list[Cell]] = [[at, *values] for at, values in enumerate(zip(*columns.values(), strict=True))]
    if len(rows) > 1:
        told = [[value for value in column if not math.isnan(value)] for column in columns.values()]
        rows.insert(0, ["mean", *(sum(values) / len(values) if values else math.nan for values in told)])
    return table(["clip", *columns], rows)


def number(value: float) -> str:
    """Three significant digits; whole numbers as they are.

    Example:
        >>> number(12345), number(0.123456), number(1234.5), number(float("nan"))
        ('12345', '0.123', '1.23e+03', 'nan')
    """
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> str:
    """Up to two lines in one picture, with the ends of both axes; what is not finite is left out.

    Example:
        >>> drawn = curves({"insertion": [(0.0, 0.1), (0.5, 0.8), (1.0, 0.9)]}, "part inserted", "probability")
        >>> drawn.count("<polyline"), "0.1 to 0.9" in drawn
        (1, True)

    Args:
        lines: by name, points (x, y) from left to right.
        x: what runs to the right.
        y: what runs up.
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
    """Rows of values in -1 .. 1 as tiles, colored by sign, the stronger the more opaque."""
    tiles = [
        (x, y, 1, 1, value, abs(value))
        for y, row in enumerate(cells)
        for x, value in enumerate(row)
        if abs(value) > 0.02  # fainter ones cannot be seen, and noise would fill the notebook with them
    ]
    return (
        f"<svg viewBox='0 0 {len(cells[0])} {len(cells)}' width='{width:.0f}' height='{height:.0f}' "
        f"preserveAspectRatio='none' role='img' aria-label='{escape(label)}' style='outline: 1px solid {LINE}'>"
        f"{_rectangles(tiles)}</svg>"
    )


def signed_bars(values: Sequence[float], width: float, height: float, label: str) -> str:
    """A bar for each value in -1 .. 1, up or down."""
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


def _rectangles(several: Sequence[tuple[float, ...]]) -> str:
    """SVG of (x, y, width, height, value, opacity), colored by the value's sign."""
    return "".join(
        f"<rect x='{x:.4g}' y='{y:.4g}' width='{width:.4g}' height='{height:.4g}' "
        f"fill='{FOR if value > 0 else AGAINST}' fill-opacity='{opacity:.2g}'/>"
        for x, y, width, height, value, opacity in several
    )
