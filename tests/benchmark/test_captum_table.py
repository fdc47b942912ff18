"""Tests of the table of Captum's methods on video models: cells equal the results, the page the output."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation, Saliency, ShapleyValueSampling

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def table() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("captum_table")


@pytest.fixture(scope="module")
def committed(table) -> dict[tuple[str, str], tuple[str, str | None]]:
    """Return the cells of the page: the label, and the note without its link."""
    text = table.PAGE.read_text("utf-8")
    notes = dict(re.findall(r"^\[\^(\d+)\]: (.*?)(?: \(\[more\]\(.*\)\))?\.$", text, re.MULTILINE))
    found = {}
    for line in text.splitlines():
        method, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        for column, cell in zip(table.MAKERS, cells, strict=False):
            if method in {row.method for row in (*table.CAPTUM, *table.OURS)}:
                label, number = re.fullmatch(r"(.*?)(?: \[\^(\d+)\])?", cell).groups()
                found[method, column] = (label, notes.get(number))
    return found


# Contains all labels, all kinds of models, and all kinds of checks.
SAMPLE = [
    ("Saliency", "VideoMAE"),
    ("Saliency", "3D CNN"),
    ("InputXGradient", "VideoPrism"),
    ("IntegratedGradients", "CNN + LSTM"),
    ("GradientShap", "RGB + flow"),
    ("DeepLift", "TimeSformer"),
    ("DeepLift", "3D CNN"),
    ("DeepLiftShap", "3D CNN"),
    ("GuidedBackprop", "ViViT"),
    ("Deconvolution", "CNN + LSTM"),
    ("LRP", "3D CNN"),
    ("LRP", "VideoPrism"),
    ("FeatureAblation", "RGB + flow"),
    ("FeaturePermutation", "CNN + LSTM"),
    ("Occlusion", "3D CNN"),
    ("ShapleyValueSampling", "RGB + flow"),
    ("LayerGradCam, interpolated", "V-JEPA 2"),
    ("GuidedGradCam", "CNN + LSTM"),
    ("GuidedGradCam", "3D CNN"),
    ("NoiseTunnel(Saliency), bfloat16", "ViViT"),
    ("NoiseTunnel(Saliency), bfloat16", "RGB + flow"),
    ("infidelity", "RGB + flow"),
    ("sensitivity_max(Saliency)", "VideoMAE"),
    ("visualize_image_attr, per frame", "CNN + LSTM"),
    ("robust.FGSM", "VideoPrism"),
    ("robust.PGD", "3D CNN"),
    ("STAA", "VideoMAE"),
    ("STAA", "3D CNN"),
    ("GradCAM", "RGB + flow"),
    ("VideoOcclusion", "CNN + LSTM"),
    ("VideoFeatureAblation", "RGB + flow"),
    ("RISE", "3D CNN"),
]


def stated(cell: tuple[str, str | None]) -> tuple[str, str | None]:
    """Return a cell without the size of an error, which depends on the machine, and with a capitalized note."""
    label, note = cell
    return re.sub(r"\d+%", "%", label), note and note[0].upper() + note[1:]


@pytest.mark.captum
@pytest.mark.parametrize(("method", "column"), SAMPLE)
def test_cell_equals_the_result(table, committed, method, column):
    row = next(row for row in (*table.CAPTUM, *table.OURS) if row.method == method)
    assert stated(table.cell(row, column)) == stated(committed[method, column])


@pytest.mark.slow
def test_every_cell_equals_the_result(table, committed):
    pytest.importorskip("sklearn")
    found = table.cells([*table.CAPTUM, *table.OURS], list(table.MAKERS))
    assert {at: stated(cell) for at, cell in found.items()} == {at: stated(cell) for at, cell in committed.items()}


def test_page_equals_the_output_of_the_script(table, committed):
    """Only the versions may differ."""
    versions = r"captum [\d.]+, torch [\d.]+ and\ntransformers [\d.]+"
    written, read = (re.sub(versions, "", text) for text in (table.page(committed), table.PAGE.read_text("utf-8")))
    assert written == read


def test_links_of_the_page_are_gotchas(table):
    gotchas = (ROOT / "docs" / "gotchas.md").read_text("utf-8")
    headings = re.findall(r"^### (.*)$", gotchas, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    linked = re.findall(r"gotchas\.md#([\w-]+)", table.PAGE.read_text("utf-8"))
    assert len(set(linked)) > 8
    assert set(linked) | set(table.GOTCHAS.values()) <= anchors


@pytest.mark.captum
@pytest.mark.parametrize(
    ("method", "broken", "label"),
    [
        (Saliency, lambda good: good * 1.001, "runs, the numbers are not those of the definition"),
        (Saliency, lambda good: good[:, :1], "runs, the result is of shape (2, 1, 8, 24, 24)"),
        (Saliency, lambda good: good.mT.contiguous().mT, "runs, strided"),
        (Saliency, lambda good: good / 0, "runs, the result is not finite"),
        (FeatureAblation, lambda good: good.flip(0), "runs, the numbers are not those of the definition"),
        (ShapleyValueSampling, lambda good: good * 1.01, "runs, the features do not share the whole change"),
        (ShapleyValueSampling, lambda good: good.roll(1, 2), "runs, a feature has several values"),
        (ShapleyValueSampling, lambda good: good.flip(2), "runs, a feature's value lies outside of what it adds"),
    ],
)
def test_wrong_result_is_detected(table, monkeypatch, method, broken, label):
    original = method.attribute
    monkeypatch.setattr(method, "attribute", lambda *args, **options: broken(original(*args, **options)))
    row = next(row for row in table.CAPTUM if row.method == method.__name__)
    assert table.cell(row, "3D CNN")[0] == label


def test_run_has_no_side_effects(table):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    columns = ["VideoPrism", "CNN + LSTM"]
    table.cells([row for row in table.CAPTUM if row.method in ("InputXGradient", "GradientShap", "LRP")], columns)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    for s in (table.subject(column, torch.float64) for column in columns):
        assert not any(clip.requires_grad for clip in s.inputs)
        assert not any(hasattr(module, "rule") for module in s.net.modules())


def test_check_compares_and_writing_is_atomic(table, committed, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(table, "cells", lambda rows, columns: dict(committed))
    monkeypatch.setattr(table, "PAGE", tmp_path / "page.md")
    table.main([])
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
    with pytest.raises(SystemExit) as same:
        table.main(["--check"])
    assert same.value.code is None
    table.PAGE.write_text(table.PAGE.read_text("utf-8").replace("| works | works |", "| error | works |", 1), "utf-8")
    with pytest.raises(SystemExit) as other:
        table.main(["--check"])
    assert "-| Saliency | with VideoClassifier [^1] | error" not in other.value.code
    assert other.value.code.count("| error | works |") == 1
    monkeypatch.undo()
    table.main(["--only", "Deconvolution"])
    assert "Deconvolution | 3D CNN | works" in capsys.readouterr().out
