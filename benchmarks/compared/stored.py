"""Comparisons in small files, and several of them put together as one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from captum_staa._utils.files import atomic
from captum_staa.benchmark import Comparison, Row
from captum_staa.benchmark.records import ALL, GRID

KINDS = ("insertion", "deletion")


def keep(found: Comparison, path: Path) -> None:
    """Numbers by metric, a row for each clip; those of the table, to four figures."""
    run = {
        "clips": found.clips,
        "methods": found.methods,
        "better": found.better,
        "answers": {clip: list(answer) for clip, answer in found.answers.items()},
        "reasons": [row._asdict() | {"value": None} for row in found.rows if row.reason],
        "values": {
            metric: [[_short(v) for v in row] for row in found.values(metric).tolist()] for metric in found.metrics
        },
        "curves": {
            method: {kind: [round(float(value), 3) for value in curves[kind]] for kind in KINDS}
            for method, curves in found.curves.items()
        },
        "settings": found.settings,
    }
    with atomic(path, overwrite=True) as partial:
        partial.write_text(json.dumps(run, separators=(",", ":"), allow_nan=False) + "\n", encoding="utf-8")


def kept(path: Path) -> dict[str, Any]:
    """What :func:`keep` has written."""
    run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return run


def together(runs: dict[str, dict[str, Any]]) -> Comparison:
    """One comparison over the clips of several models, each of which is named before its clips.

    A method that does not apply to any of the models says why; one that applies to some has the clips of these.
    """
    first = next(iter(runs.values()))
    rows: list[Row] = []
    for model, run in runs.items():
        for metric, table in run["values"].items():
            rows += [
                Row(f"{model}/{clip}", method, metric, math.nan if value is None else value)
                for clip, values in zip(run["clips"], table, strict=True)
                for method, value in zip(run["methods"], values, strict=True)
            ]
        for given in run["reasons"]:
            clip = given["clip"] if given["clip"] == ALL else f"{model}/{given['clip']}"
            rows.append(Row(clip, given["method"], given["metric"], math.nan, given["reason"]))
    methods = [
        method for method in first["methods"] if any(row.method == method and not math.isnan(row.value) for row in rows)
    ]
    return Comparison(
        rows=[row for row in rows if row.method in (*methods, ALL)],
        methods=methods,
        metrics=list(first["values"]),
        better=first["better"],
        settings={
            name: first["settings"][name] for name in ("inverted", "model_controls") if name in first["settings"]
        },
        answers={f"{m}/{clip}": tuple(own) for m, run in runs.items() for clip, own in run["answers"].items()},
        curves=_mean_curves(list(runs.values())),
    )


def _mean_curves(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for method in {name: None for run in runs for name in run["curves"]}:
        held = [run["curves"][method] for run in runs if method in run["curves"]]
        found[method] = {kind: np.mean([curves[kind] for curves in held], axis=0).reshape(GRID.shape) for kind in KINDS}
    return found


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
