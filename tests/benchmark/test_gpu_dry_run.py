"""benchmarks/gpu.py on the CPU: its tables are measured by the code that runs on a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    import gpu


def rows(text: str, name: str) -> list[list[str]]:
    """Return the cells of the rows of a table that begin with a name."""
    return [cells.split(" | ") for cells in re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", text, re.MULTILINE)]


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(gpu, "ROUNDS", 1)


def test_dry_run_compares_precisions_with_float32(capsys):
    gpu.main(["--dry-run", "--tables", "batch", "agreement"])
    text = capsys.readouterr().out
    assert "Stopped" not in text and float(rows(text, "1")[0][0]) > 0
    by_method = {row[0]: [float(cell.split()[0]) for cell in row[1:]] for row in rows(text, "videomae")}
    assert by_method.keys() >= {"STAA (attention)", "Saliency"}
    assert all(
        same == 1 and 0.8 < bfloat16 <= 1 and 0.9 < float16 <= 1 for same, bfloat16, float16 in by_method.values()
    )
    assert by_method["Saliency"][1] < 1  # it did run in this precision


@pytest.mark.slow
def test_dry_run_fills_all_tables(capsys):
    gpu.main(["--dry-run"])
    text = capsys.readouterr().out
    assert "Error" not in text and "Stopped" not in text
    for name in ("forward, ms", "STAA (relevance)", "STEP (nested)", "VideoOcclusion"):
        cells = rows(text, name)[0]
        assert len(cells) == 2 and all(re.match(r"\d", cell) for cell in cells), name
    assert len(rows(text, "tiny-videomae-pattern")) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_without_a_gpu_the_command_says_so():
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        gpu.main([])
