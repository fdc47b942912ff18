"""A comparison as one self-contained HTML page: tables, figures, reasons and settings."""

from __future__ import annotations

import base64
import html
import io as io_module
import json
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from captum_staa.benchmark import tables

if TYPE_CHECKING:
    from captum_staa.benchmark.results import Results

CAPTIONS = {
    "curves": "Insertion and deletion: probability of the target as cells are added or removed in the order of a map.",
    "cost": "Localization of the evidence against the cost of each method.",
    "ranks": "Mean ranks. If a control ranks high on a metric, the metric says little about the methods above it.",
    "sheet": "Maps of all methods for one clip.",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1c1c1c }
h1, h2 { font-weight: 600 } h2 { margin-top: 2.5rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 12px; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e4 }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left }
td:last-child { white-space: normal; min-width: 16rem; color: #666 }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff }
figure { margin: 1.5rem 0 } figcaption, p, pre { color: #444 }
pre { font-size: 12px; overflow-x: auto; background: #f6f6f6; padding: 1rem }
"""


class Pictures(dict[str, Figure]):
    """Figures by name; a notebook displays them one below the other."""

    def _repr_html_(self) -> str:
        return "\n".join(
            f'<figure><img alt="{name}" src="data:image/png;base64,{_png(figure)}" style="max-width: 100%">'
            f"<figcaption>{CAPTIONS[name]}</figcaption></figure>"
            for name, figure in self.items()
        )


def page(results: Results, pictures: Pictures) -> str:
    """Return the whole page."""
    parts = [
        f"<h1>{len(results.methods)} methods on {len(results.clips)} clips</h1>",
        f'<div class="wide">{tables.html_of(results)}</div>',
    ]
    parts += [pictures._repr_html_(), _trust(results), _failures(results)]
    settings = json.dumps(results.settings, indent=1, ensure_ascii=False)
    parts.append(f"<h2>Settings</h2><pre>{html.escape(settings)}</pre>")
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Comparison of methods</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _png(figure: Figure) -> str:
    file = io_module.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _trust(results: Results) -> str:
    reliabilities = results.trust()
    if not reliabilities:
        return ""
    rows = [
        f"<tr><td>{html.escape(name)}</td><td>{trust.spearman:.3f}</td>"
        f"<td>{trust.spearman_interval[0]:.3f} to {trust.spearman_interval[1]:.3f}</td>"
        f"<td>{trust.krippendorff:.3f}</td><td></td></tr>"
        for name, trust in reliabilities.items()
    ]
    return (
        "<h2>Does a metric rank methods in the same order on every clip?</h2><table><tr><th>metric</th>"
        f"<th>Spearman</th><th>95 %</th><th>Krippendorff</th><th></th></tr>{''.join(rows)}</table>"
        "<p>Mean rank correlation between pairs of clips: 1 is the same order on all clips, 0 is unrelated orders. The "
        "methods include the controls.</p>"
    )


def _failures(results: Results) -> str:
    if not results.failures:
        return ""
    rows = [f"<li>{html.escape(f'{row.clip}, {row.method}: {row.reason}')}</li>" for row in results.failures[:200]]
    more = len(results.failures) - len(rows)
    rest = f"<p>and {more} more in rows.csv</p>" if more else ""
    return f"<h2>Failures</h2><ul>{''.join(rows)}</ul>{rest}"
