"""Comparisons in small files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_staa._utils.files import atomic
from captum_staa.benchmark import Comparison


def keep(found: Comparison, path: Path) -> None:
    """Write numbers by metric, a row for each clip, to four figures."""
    run = {
        "clips": found.clips,
        "methods": found.methods,
        "better": found.better,
        "answers": {clip: list(answer) for clip, answer in found.answers.items()},
        "reasons": found.reasons(),
        "values": {
            metric: [[_short(v) for v in row] for row in found.values(metric).tolist()] for metric in found.metrics
        },
        "settings": found.settings,
    }
    with atomic(path, overwrite=True) as partial:
        partial.write_text(json.dumps(run, separators=(",", ":"), allow_nan=False) + "\n", encoding="utf-8")


def kept(path: Path) -> dict[str, Any]:
    """Return what :func:`keep` has written."""
    run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return run


def numbers(run: dict[str, Any], metric: str, methods: list[str]) -> Tensor:
    """Return the numbers of one metric ``(N, M)`` for methods in this order; nan where there is none."""
    table = torch.full((len(run["clips"]), len(methods)), math.nan, dtype=torch.float64)
    for at, method in enumerate(methods):
        if metric in run["values"] and method in run["methods"]:
            column = run["methods"].index(method)
            cells = [math.nan if row[column] is None else row[column] for row in run["values"][metric]]
            table[:, at] = torch.tensor(cells, dtype=torch.float64)
    return table


def joined(run: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return a run with the methods of another run on its first clips, which have no numbers on the others."""
    if more["clips"] != run["clips"][: len(more["clips"])]:
        raise ValueError(f"the other run must have the first clips of {run['clips']}, got {more['clips']}")
    added = [name for name in more["methods"] if name not in run["methods"]]
    columns = [more["methods"].index(name) for name in added]
    values = {}
    for metric, table in run["values"].items():
        rows = [[row[column] for column in columns] for row in more["values"][metric]]
        rows += [[None] * len(added)] * (len(table) - len(rows))
        values[metric] = [[*own, *new] for own, new in zip(table, rows, strict=True)]
    return {**run, "methods": [*run["methods"], *added], "values": values}


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
