"""A comparison as text: CSV, JSON, Markdown, LaTeX, an HTML table, and one HTML page with figures and settings."""

from __future__ import annotations

import base64
import csv
import html
import io as io_module
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from captum_staa._utils.files import atomic
from captum_staa.benchmark.records import (
    ALL,
    LEFT_OUT,
    MODEL_FREE,
    OTHER_CLASS,
    RANDOM_WEIGHTS,
    Mean,
    Row,
    control_of,
)
from captum_staa.benchmark.results import Results
from captum_staa.benchmark.scoring import COSTS

NOTHING = "–"
NEAR = 0.8  # share of a method's advantage above which its control counts as equally good
MARKS = {
    RANDOM_WEIGHTS: ("†", "as good on random weights: this map shows the clip, not the model"),
    OTHER_CLASS: ("‡", "as good for another class: this map does not explain this class"),
}
LATEX = str.maketrans(
    {
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
    }
)
CAPTIONS = {
    "curves": "Insertion and deletion: probability of the target as cells are added or removed in the order of a map.",
    "cost": "Localization of the evidence against the cost of each method.",
    "ranks": "Mean ranks. If a control ranks high on a metric, the metric says little about the methods above it.",
    "sheet": "Maps of all methods for one clip.",
}
STYLE = """
:root { color-scheme: light dark;
  --paper: #fff; --ink: #1c1c1c; --text: #444; --faint: #666; --line: #e4e4e4; --box: #f6f6f6 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #141414; --ink: #ededed; --text: #c8c8c8; --faint: #a8a8a8; --line: #383838; --box: #222 }
}
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
  background: var(--paper); color: var(--ink) }
h1, h2 { font-weight: 600 } h2 { margin-top: 2.5rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 12px; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left }
td:last-child { white-space: normal; min-width: 16rem; color: var(--faint) }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper) }
figure { margin: 1.5rem 0 } figcaption, p, pre { color: var(--text) }
figure img { max-width: 100%; background: #fff; border-radius: 4px }
pre { font-size: 12px; overflow-x: auto; background: var(--box); padding: 1rem }
"""


def written(text: str, path: str | Path | None, overwrite: bool) -> str:
    """Return the text; if a path is given, also write it to that file atomically."""
    if path is not None:
        with atomic(path, overwrite) as partial:
            partial.write_text(text, encoding="utf-8")
    return text


def streamed(lines: Iterator[str], path: str | Path | None, overwrite: bool) -> str | None:
    """Return the text of all lines; if a path is given, write them to that file instead, atomically."""
    if path is None:
        return "".join(lines)
    with atomic(path, overwrite) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        file.writelines(lines)
    return None


def csv_of(results: Results) -> Iterator[str]:
    """Yield the lines of CSV with the columns clip, method, metric and value."""
    file = io_module.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    for row in chain([("clip", "method", "metric", "value")], results.rows):
        writer.writerow((*row[:3], row.reason or repr(row.value)) if isinstance(row, Row) else row)
        yield file.getvalue()
        file.seek(0)
        file.truncate()


def json_of(results: Results) -> Iterator[str]:
    """Yield the lines of JSON, with one line per entry of long lists, so that two files can be compared with diff."""
    ranks = results.ranks()
    means = (
        {"method": method, "metric": metric, **_finite(mean._asdict()), "rank": _number(ranks[method].get(metric))}
        for method, means in results.means().items()
        for metric, mean in means.items()
    )
    document = {
        "settings": results.settings,
        "interrupted": results.interrupted,
        "better": results.better,
        "reasons": results.reasons(),
        "retained": results.retained(),
        "means": means,
        "rows": (_finite(row._asdict()) for row in results.rows),
    }
    yield "{"
    for at, (key, value) in enumerate(document.items()):
        yield f"{',' * (at > 0)}\n {json.dumps(key)}: "
        if isinstance(value, Iterator):
            yield "["
            for line, entry in enumerate(value):
                yield f"{',' * (line > 0)}\n  {json.dumps(entry, ensure_ascii=False, allow_nan=False)}"
            yield "\n ]"
        else:
            yield json.dumps(value, ensure_ascii=False, allow_nan=False)
    yield "\n}\n"


def markdown_of(results: Results, intervals: bool) -> str:
    """Return a Markdown table with aligned columns, followed by remarks."""
    head, body = _grid(results, intervals, lambda text: f"**{text}**", lambda text: text.replace("|", "\\|"))
    wide = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    right = [0 < at < len(head) - 1 for at in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(n) if r else cell.ljust(n) for cell, n, r in zip(cells, wide, right, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (n + 1) + ":" if r else ":" + "-" * (n + 1) for n, r in zip(wide, right, strict=True))
    return "\n".join([line(head), f"|{rule}|", *map(line, body), "", *remarks(results)]) + "\n"


def latex_of(results: Results, intervals: bool) -> str:
    """Return a LaTeX ``tabular`` with the same cells."""
    head, body = _grid(results, intervals, lambda text: rf"\textbf{{{text}}}", _latex)
    rows = [" & ".join(cells) + r" \\" for cells in (head, *body)]
    columns = "l" + "r" * (len(head) - 2) + "l"
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", rows[0], r"\hline", *rows[1:], r"\hline", r"\end{tabular}"]
    text = "\n".join(lines + [f"% {remark}" for remark in remarks(results)]) + "\n"
    signs = {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "–": "--", "†": r"$\dagger$", "‡": r"$\ddagger$"}
    for sign, command in signs.items():
        text = text.replace(sign, command)
    return text


def html_of(results: Results, intervals: bool = True) -> str:
    """Return an HTML ``<table>`` with the same cells."""
    head, body = _grid(results, intervals, lambda text: f"<b>{text}</b>", html.escape)
    rows = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" for cells in body]
    top = "<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"
    paragraphs = "".join(f"<p>{html.escape(remark)}</p>" for remark in remarks(results))
    return f"<table>\n<thead>{top}</thead>\n<tbody>\n" + "\n".join(rows) + f"\n</tbody>\n</table>\n{paragraphs}\n"


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
        f'<div class="wide">{html_of(results)}</div>',
    ]
    parts += [pictures._repr_html_(), _trust(results), _failures(results)]
    settings = json.dumps(results.settings, indent=1, ensure_ascii=False)
    parts.append(f"<h2>Settings</h2><pre>{html.escape(settings)}</pre>")
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Comparison of methods</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def remarks(results: Results) -> list[str]:
    """Return remarks that explain the numbers."""
    count = len(results.clips)
    lines = [
        f"Means over {count} clip{'s' * (count != 1)} with 95 % bootstrap intervals. "
        f"Bold: the best method, controls excluded. ↑ higher is better, ↓ lower is better."
    ]
    if costs := [metric for metric in results.metrics if metric in COSTS]:
        lines.append(f"{', '.join(costs)}: medians, as multiples of one forward pass except for seconds.")
    if answers := results.answers.values():
        right = sum(explained == answered for explained, answered in answers)
        lines.append(f"The explained class is the predicted class on {right} of {len(answers)} clips.")
    if notice := results.settings.get("notice"):
        lines.append(f"Model: {notice}.")
    lines += _control_remarks(results)
    used = {kind for kinds in marked(results).values() for kind in kinds}
    lines += [f"{sign} {meaning}" for kind, (sign, meaning) in MARKS.items() if kind in used]
    missing = Counter(row.reason for row in results.reason_rows if row.metric == LEFT_OUT and row.method == ALL)
    lines += [f"{clips} of {count} clips have {reason}" for reason, clips in missing.items()]
    if lost := [row for row in results.failures if row.method == ALL]:
        lines.append(f"{len(lost)} of {count} clips could not be read, the first: {lost[0].clip}: {lost[0].reason}")
    if results.interrupted:
        lines.append("Interrupted: some clips and methods are missing.")
    return lines


def marked(results: Results) -> dict[str, list[str]]:
    """Return by method its controls that are as good: ``"random weights"`` and ``"other class"``."""
    return {
        method: kinds
        for method, shares in results.retained().items()
        if (kinds := [kind for kind in MARKS if shares.get(kind, 0) > NEAR])
    }


def _control_remarks(results: Results) -> Iterator[str]:
    """Yield remarks that explain the controls."""
    if MODEL_FREE in results.methods:
        yield f"The control {MODEL_FREE} is the difference from the mean frame, which does not use the model."
    if inverted := results.settings.get("inverted"):
        yield f"The control inverted is minus the map of {inverted}."
    again = results.settings.get("model_controls", {})
    if RANDOM_WEIGHTS in again:
        yield f"The controls random weights and other class are maps of {again[RANDOM_WEIGHTS]}."
    if again:
        yield (
            "For random weights, all parameters of the model are drawn at random. The other class is the one with the "
            "highest logit except the explained class."
        )


def _grid(
    results: Results, intervals: bool, bold: Callable[[str], str], escape: Callable[[str], str]
) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of a table as text."""
    means, reasons, marks = results.means(), results.reasons(), marked(results)
    shown = [metric for metric in results.metrics if any(own[metric].clips for own in means.values())]
    arrows = {1: " ↑", -1: " ↓", 0: ""}
    head = ["method", *(f"{escape(metric)}{arrows[results.better[metric]]}" for metric in shown), "note"]
    best = {metric: _best(results, metric, means) for metric in shown}
    body = []
    for method in results.methods:
        cells = []
        for metric in shown:
            text = _cell(means[method][metric], metric, intervals)
            cells.append(bold(text) if method in best[metric] else text)
        signs = "".join(MARKS[kind][0] for kind in marks.get(method, ()))
        body.append([f"{escape(method)} {signs}".strip(), *cells, escape(reasons.get(method, ""))])
    return head, body


def _best(results: Results, metric: str, means: dict[str, dict[str, Mean]]) -> list[str]:
    """Return the names of the best methods, controls excluded; numbers that print alike are ties."""
    sign = results.better[metric]
    scores = {
        method: sign * float(_figure(own[metric].value, metric))
        for method, own in means.items()
        if control_of(method) is None and own[metric].clips and not math.isnan(own[metric].value)
    }
    return [method for method, value in scores.items() if sign and value == max(scores.values())]


def _cell(mean: Mean, metric: str, intervals: bool) -> str:
    if not mean.clips or math.isnan(mean.value):
        return NOTHING
    text = _figure(mean.value, metric)
    if not intervals or math.isnan(mean.low) or mean.clips < 2:
        return text
    return f"{text} ({_figure(mean.low, metric)} to {_figure(mean.high, metric)})"


def _figure(value: float, metric: str) -> str:
    return f"{value:.3g}" if metric in COSTS else f"{value:.3f}"


def _latex(text: str) -> str:
    return text.translate(LATEX)


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with None in place of numbers that are not finite."""
    return {key: _number(value) if isinstance(value, float) else value for key, value in record.items()}


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


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
        "<h2>Does a metric rank methods in the same order on every clip?</h2>"
        "<div class='wide'><table><tr><th>metric</th>"
        f"<th>Spearman</th><th>95 %</th><th>Krippendorff</th><th></th></tr>{''.join(rows)}</table></div>"
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
