"""Means, intervals and ranks against slow formulas, and the tables and figures made from them."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from captum_staa.benchmark import Comparison, Row
from captum_staa.benchmark.records import Sheet
from captum_staa.benchmark.report import _latex
from captum_staa.metrics import reliability

nan = math.nan
METHODS = ["A", "B", "C", "random"]
CLIPS = ["a", "b", "c", "d", "e"]
SCORES = {  # by metric, clips by methods
    "auroc": [
        [0.9, 0.8, nan, 0.5],
        [0.8, 0.9, nan, 0.4],
        [1.0, 0.7, nan, 0.6],
        [0.9, 0.9, nan, 0.5],
        [nan, 0.6, nan, 0.5],
    ],
    "deletion": [
        [0.1, 0.2, nan, 0.9],
        [0.3, 0.2, nan, 0.9],
        [0.1, 0.4, nan, 0.8],
        [0.2, 0.2, nan, 0.7],
        [nan, 0.1, nan, 1],
    ],
    "sparsity": [[0.1, 0.2, nan, 0.3]] * 5,
    "forwards": [[3.0, 90.0, nan, nan], [2.0, 100.0, nan, nan], [4.0, 80, nan, nan], [50.0, 90.0, nan, nan], [nan] * 4],
}


def built(**options) -> Comparison:
    rows = [
        Row(clip, method, metric, value)
        for metric, table in SCORES.items()
        for clip, line in zip(CLIPS, table, strict=True)
        for method, value in zip(METHODS, line, strict=True)
        if not math.isnan(value)
    ]
    rows += [
        Row("e", "A", "error", nan, "RuntimeError: too | large & 100 %"),
        Row("*", "C", "does not apply", nan, "<no> attention"),
        Row("e", "*", "left out", nan, "no truth (needed by iou)"),
    ]
    better = {"auroc": 1, "deletion": -1, "sparsity": 0, "forwards": -1}
    return Comparison(rows, METHODS, list(SCORES), better, {"seed": 0, "inverted": "A"}, **options)


def test_means_and_their_bootstrap_intervals():
    means = built().means()
    column = np.array([0.9, 0.8, 1.0, 0.9, nan])
    assert means["A"]["auroc"].value == pytest.approx(0.9) and means["A"]["auroc"].clips == 4
    draws = torch.randint(5, (1000, 5), generator=torch.Generator().manual_seed(0)).numpy()
    drawn = [np.nanmean(column[draw]) for draw in draws if not np.isnan(column[draw]).all()]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (means["A"]["auroc"].low, means["A"]["auroc"].high) == (pytest.approx(low), pytest.approx(high))
    assert low < 0.9 < high
    nothing = means["C"]["auroc"]
    assert nothing.clips == 0 and math.isnan(nothing.value)


def test_costs_are_medians_with_intervals_of_order_statistics():
    many = np.random.default_rng(0).permutation(np.arange(1.0, 101.0))
    rows = [Row(f"{i}", "A", "seconds", value) for i, value in enumerate(many)]
    found = Comparison(rows, ["A"], ["seconds"], {"seconds": -1}, {}).means()["A"]["seconds"]
    low, high = stats.binom.interval(0.95, 100, 0.5)  # how many values lie below the true median
    assert found.value == 50.5
    assert (found.low, found.high) == (pytest.approx(low + 1, abs=1), pytest.approx(high, abs=1))
    assert built().means()["A"]["forwards"].value == 3.5  # of which one outlier moves little


def test_ranks_use_clips_without_missing_numbers():
    ranks = built().ranks()
    for metric, sign in (("auroc", -1), ("deletion", 1)):
        table = np.array(SCORES[metric])[:4][:, [0, 1, 3]]  # without the clip and the method that have gaps
        wanted = np.mean([stats.rankdata(sign * line) for line in table], axis=0)
        assert [ranks[name][metric] for name in ("A", "B", "random")] == pytest.approx(list(wanted))
    assert math.isnan(ranks["C"]["auroc"]) and "sparsity" not in ranks["A"]
    assert ranks["A"]["forwards"] == 1


def test_trust_is_reliability_of_the_table():
    trust = built().trust()
    assert set(trust) == {"auroc", "deletion"}
    assert trust["auroc"].spearman == pytest.approx(
        np.mean(
            [
                stats.spearmanr(first, second).statistic
                for i, first in enumerate(np.array(SCORES["auroc"])[:4][:, [0, 1, 3]])
                for second in np.array(SCORES["auroc"])[:i][:, [0, 1, 3]]
            ]
        )
    )


def test_a_random_map_is_the_worst_in_the_direction_of_the_metric():
    """Of deletion, lower scores are better, and clips on which the random map ranks low count more."""
    table = -torch.tensor(SCORES["deletion"])[:4][:, [0, 1, 3]]
    expected = reliability(table, random=2, n_bootstrap=1).weighted
    assert built().trust()["deletion"].weighted == pytest.approx(expected)
    assert expected != pytest.approx(reliability(-table, random=2, n_bootstrap=1).weighted)


def test_csv_has_a_row_for_every_number_and_every_reason():
    rows = list(csv.reader(io.StringIO(built().to_csv())))
    assert rows[0] == ["clip", "method", "metric", "value"]
    assert len(rows) == 1 + len(built().rows) and len({tuple(row[:3]) for row in rows}) == len(rows)
    numbers = {tuple(row[:3]): float(row[3]) for row in rows[1:] if row[2] in SCORES}
    assert numbers["b", "B", "auroc"] == 0.9
    assert ["e", "A", "error", "RuntimeError: too | large & 100 %"] in rows
    assert ["*", "C", "does not apply", "<no> attention"] in rows


def test_json_contains_all_results_and_no_nan():
    document = json.loads(built().to_json(), parse_constant=lambda word: pytest.fail(f"{word} is not valid JSON"))
    assert document["settings"] == {"seed": 0, "inverted": "A"}
    (entry,) = [each for each in document["means"] if (each["method"], each["metric"]) == ("A", "auroc")]
    assert entry["value"] == pytest.approx(0.9) and entry["clips"] == 4 and entry["rank"] == pytest.approx(1.375)
    assert {"clip": "e", "method": "A", "metric": "error", "value": None}.items() <= document["rows"][-3].items()
    assert document["reasons"]["C"] == "does not apply: <no> attention"


def test_markdown_marks_the_best_methods_and_lists_missing_numbers():
    lines = built().to_markdown(intervals=False).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[:6] if "---" not in line]
    assert cells[0] == ["method", "auroc ↑", "deletion ↓", "sparsity", "forwards ↓", "note"]
    assert cells[1][:5] == ["A", "**0.900**", "**0.175**", "0.100", "**3.5**"]
    assert cells[2][:5] == ["B", "0.780", "0.220", "0.200", "90"]
    assert cells[3] == ["C", "–", "–", "–", "–", "does not apply: <no> attention"]
    assert cells[4][:2] == ["random", "0.500"]  # never bold
    assert "too \\| large" in lines[2] and "failed on 1 of 5 clips" in lines[2]
    assert len({len(line) for line in lines[:6]}) == 1
    assert "minus the map of A" in "\n".join(lines) and "1 of 5 clips have no truth" in "\n".join(lines)
    assert "**0.900 (0.8" in built().to_markdown()


def test_a_control_is_never_marked_as_the_best():
    rows = [Row("a", name, "auroc", value) for name, value in (("A", 0.4), ("B", 0.3), ("center", 0.9))]
    found = Comparison(rows, ["A", "B", "center"], ["auroc"], {"auroc": 1}, {}).to_markdown()
    assert "**0.400**" in found and "**0.900**" not in found and "**0.300**" not in found


def test_latex_and_html_escape():
    latex = built().to_latex()
    assert latex.count(r"\\") == 5 and r"large \& 100 \%" in latex and r"\textbf{0.900}" in latex
    assert r"auroc $\uparrow$" in latex and "↑" not in latex and "–" not in latex
    assert not re.search(r"(?<!\\)[&%]\s*100", latex)
    assert _latex(r"C:\x^2 ~a_{1}$") == (
        r"C:\textbackslash{}x\textasciicircum{}2 \textasciitilde{}a\_\{1\}\$"  # each sign once, not those put in for it
    )
    html = built()._repr_html_()
    assert "&lt;no&gt; attention" in html and "<no>" not in html and html.count("<tr>") == 5


def test_files_are_complete_and_overwritten_only_on_request(tmp_path):
    path = tmp_path / "rows.csv"
    assert built().to_csv(path) is None
    assert path.read_text(encoding="utf-8") == built().to_csv()
    with pytest.raises(FileExistsError):
        built().to_csv(path)
    built().to_markdown(path, overwrite=True)
    assert path.read_text(encoding="utf-8").startswith("| method")
    assert [file.name for file in tmp_path.iterdir()] == ["rows.csv"]


def test_pandas_is_imported_only_when_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        built().to_pandas()
    fake = types.SimpleNamespace(DataFrame=lambda rows, columns: (len(rows), columns))
    monkeypatch.setitem(sys.modules, "pandas", fake)
    assert built().to_pandas() == (len(built().rows), ["clip", "method", "metric", "value", "reason"])


def test_an_unknown_metric_raises():
    with pytest.raises(ValueError, match=r"auroc, deletion.*got 'iou'"):
        built().values("iou")


def pictured() -> Comparison:
    rising = np.linspace(0, 1, 101)
    fast = np.minimum(1, 1.5 * rising)
    curves = {"A": {"insertion": fast, "deletion": 1 - fast}, "random": {"insertion": rising, "deletion": 1 - rising}}
    truth = np.zeros((4, 8, 8), dtype=bool)
    truth[1, 2:5, 2:5] = True
    sheet = Sheet(
        "a", np.full((4, 8, 8, 3), 99, np.uint8), truth, {"A": truth.astype(float), "random": np.ones((4, 8, 8))}
    )
    return built(curves=curves, sheet=sheet)


def test_figures_show_the_numbers():
    figures = pictured().plot()
    assert isinstance(shown := figures._repr_html_(), str) and shown.count("data:image/png") == len(figures)
    assert set(figures) == {"curves", "cost", "ranks", "sheet"}
    insertion, deletion = figures["curves"].axes
    names = [text.get_text() for text in insertion.get_legend().get_texts()]
    assert names == ["0.667  A", "0.500  random"]  # best first
    assert [text.get_text() for text in deletion.get_legend().get_texts()] == ["0.333  A", "0.500  random"]
    line = next(line for line in insertion.lines if line.get_label() == "A")
    assert np.interp(0.5, *line.get_data()) == pytest.approx(0.75)
    (axes,) = figures["cost"].axes
    assert axes.get_xscale() == "log"
    dots = sorted(tuple(np.ravel(line.get_data())) for line in axes.lines if line.get_marker() == "o")
    assert dots == [pytest.approx((3.5, 0.9)), pytest.approx((90.0, 0.78))]
    assert {text.get_text() for text in axes.texts} == {"A", "B"}
    heat = figures["ranks"].axes[0]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["A", "B", "random"]
    assert [label.get_text() for label in heat.get_xticklabels()] == ["auroc", "deletion", "forwards"]
    assert heat.texts[0].get_text() == "1.4"
    sheet = figures["sheet"].axes[0]
    texts = [text.get_text().splitlines()[0] for text in sheet.texts]
    assert texts == [*(f"frame {i}" for i in range(4)), "clip", "A", "random"]
    frames, of_a = ([image.get_array() for image in sheet.images[first : first + 4]] for first in (0, 4))
    assert len(sheet.images) == 12 and (frames[1] == 99).all()
    assert (of_a[0] == 99).all() and (of_a[1][3, 3] != 99).any() and (of_a[1][6, 6] == 99).all()  # the map, where it is
    extents = [sheet.images[at].get_extent() for at in (1, 5, 9)]  # of the frame with the evidence, in each row
    for outline, (left, right, bottom, top) in zip(sheet.collections, extents, strict=True):
        box = outline.get_paths()[0].get_extents()
        side = (right - left) / 8
        assert (box.x0 - left, box.x1 - left) == (pytest.approx(2 * side), pytest.approx(5 * side))
        assert (box.y0 - min(top, bottom), box.y1 - min(top, bottom)) == (
            pytest.approx(2 * side),
            pytest.approx(5 * side),
        )


def test_figures_without_data_are_left_out():
    assert set(built().plot()) == {"cost", "ranks"}
    assert Comparison([], ["A"], ["auroc"], {"auroc": 1}, {}).plot() == {}


def test_the_report_is_one_self_contained_page(tmp_path):
    path = tmp_path / "report.html"
    text = pictured().to_report(path)
    assert path.read_text(encoding="utf-8") == text
    assert text.count("data:image/png;base64,") == 4
    for word in ("http", "<script", "<link", "url("):
        assert word not in text
    assert "4 methods on 5 clips" in text and "&quot;seed&quot;: 0" in text and "&lt;no&gt;" in text
    assert "too | large &amp; 100 %" in text and "Krippendorff" in text
    assert '<meta name="viewport" content="width=device-width' in text  # otherwise 980 px wide on a phone
    assert text.count("<table>") == len(
        re.findall(r"""<div class=['"]wide['"]><table>""", text)
    )  # no table widens the page
    import base64

    first = re.search(r"base64,([^\"]+)", text)
    assert first is not None
    assert min(Image.open(io.BytesIO(base64.b64decode(first[1]))).size) > 300
