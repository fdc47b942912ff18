"""Render formulas as SVG inside the page, so that they need no network and no LaTeX.

Sphinx leaves formulas to MathJax, a script that the reader's browser fetches. Here matplotlib, which is installed
anyway, draws them while the pages are built. It knows the part of TeX that its manual calls mathtext; a formula beyond
that is a warning, and so an error of `make docs`.
"""

from __future__ import annotations

import html
import re
from typing import Any

from docutils import nodes
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import text_to_path
from sphinx.application import Sphinx
from sphinx.util import logging

SIZE = 100  # of a letter in the drawing's own units; on the page it follows the text around it
EM = 0.0115  # width of such a unit on the page, where a formula's letters look as large as the text's
PAD = 6  # units around the ink, for strokes that lean over their box
PEN = {
    Path.MOVETO: "M",
    Path.LINETO: "L",
    Path.CURVE3: "Q",
    Path.CURVE4: "C",
    Path.CLOSEPOLY: "Z",
}

# LaTeX commands that mathtext does not have, and similar replacements.
REWRITES = [
    (r"\\[td]?frac(\d)(\d)", r"\\frac{\1}{\2}"),
    (r"\\tfrac", r"\\frac"),
    (r"\\[bB]igg?[lr]?(?![a-z])", ""),
    (r"\s*\n\s*", " "),
]

logger = logging.getLogger(__name__)


def drawing(tex: str, *, display: bool = False) -> str:
    """One line of TeX as an SVG element in the color of the text; fractions of full size where it stands alone.

    Raises:
        ValueError: mathtext cannot read it.
    """
    source = tex.strip()
    for pattern, with_ in REWRITES:
        source = re.sub(pattern, with_, source)
    if display:
        source = re.sub(r"\\frac(?![a-z])", r"\\dfrac", source)
    font = FontProperties(size=SIZE, math_fontfamily="cm")
    points, codes = text_to_path.get_text_path(font, f"${source}$", ismath=True)
    scale = SIZE / text_to_path.FONT_SCALE
    width, height, depth = text_to_path.get_text_width_height_descent(
        f"${source}$", font, ismath=True
    )
    width, above, below = width + 2 * PAD, height - depth + PAD, depth + PAD
    named = html.escape(tex.strip(), quote=True)
    return (
        f'<svg class="formula" role="img" aria-label="{named}" xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="{-PAD} {-above:.0f} {width:.0f} {above + below:.0f}" '
        f'style="width:{width * EM:.3f}em;height:{(above + below) * EM:.3f}em;vertical-align:{-below * EM:.3f}em">'
        f'<title>{named}</title><path d="{_outline(points, codes, scale)}"/></svg>'
    )


def _outline(points: Any, codes: Any, scale: float) -> str:
    """Convert vertices and codes of matplotlib to SVG path data, y downwards."""
    parts, last = [], None
    for (x, y), code in zip(points, codes, strict=True):
        letter = PEN[code]
        if letter == "Z":
            parts.append("Z")
        else:
            # The control points of a curve follow one letter; matplotlib repeats the code on each of them.
            new = letter in "ML" or letter != last or _full(parts, letter)
            parts.append(f"{letter if new else ' '}{x * scale:.0f} {-y * scale:.0f}")
        last = letter
    return "".join(parts)


def _full(parts: list[str], letter: str) -> bool:
    """Return whether the last curve has all of its points."""
    wanted, have = (2 if letter == "Q" else 3), 0
    for part in reversed(parts):
        have += 1
        if part[0] == letter:
            break
    return have >= wanted


def _drawn(node: nodes.Element, *, display: bool) -> str:
    try:
        return drawing(node.astext(), display=display)
    except ValueError as error:
        problem = str(error).strip().splitlines()[-1]
        logger.warning(
            "mathtext cannot draw %r: %s", node.astext(), problem, location=node
        )
        return f"<code>{html.escape(node.astext())}</code>"


def _inline(self: Any, node: nodes.Element) -> None:
    self.body.append(
        _drawn(node, display=False) + "&#8288;"
    )  # no line ends between a formula and its full stop
    raise nodes.SkipNode


def _block(self: Any, node: nodes.Element) -> None:
    self.body.append(f'<div class="formula-block">{_drawn(node, display=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx, which then knows `html_math_renderer = "drawings"`."""
    app.add_html_math_renderer(
        "drawings", inline_renderers=(_inline, None), block_renderers=(_block, None)
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
