"""HTML of results in notebooks: correct numbers, escaped, short, and readable on light and dark pages."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from captum_staa._utils import notebook
from captum_staa.attr.perturbation import History, MaskAttribution
from captum_staa.attr.st_abn import BranchAttribution
from captum_staa.metrics.attention_usage import AttentionUsage
from captum_staa.metrics.insertion_deletion import Curve, InsertionDeletionResult
from captum_staa.metrics.map_properties import Smoothness
from captum_staa.metrics.reliability import Reliability
from captum_staa.metrics.sanity import Randomization, Similarity
from captum_staa.models.st_abn import BranchExplanation, FitHistory, Gates
from captum_staa.result import VideoAttribution


def tree(result) -> ElementTree.Element:
    """Parse the HTML. It must be well-formed, load no external files, and use only the colors of lines."""
    text = result if isinstance(result, str) else result._repr_html_()
    assert "http" not in text and "<script" not in text
    colors = set(re.findall(r"(?:color|fill|stroke|background)[:=] ?'?([^;'>]+)", text))
    assert colors <= {notebook.FOR, notebook.AGAINST, notebook.LINE, "none"}, colors
    assert len(text) < 40_000
    return ElementTree.fromstring(text)


def cells(result) -> list[list[str]]:
    """Return the table, with its header."""
    return [["".join(cell.itertext()) for cell in row] for row in tree(result).iter("tr")]


def points(result) -> list[np.ndarray]:
    """Return the points (N, 2) of each line."""
    return [
        np.array([[float(number) for number in spot.split(",")] for spot in line.get("points").split()])
        for line in tree(result).iter("polyline")
    ]


def luminance(color: str) -> float:
    """Return the relative luminance by WCAG of ``#rgb`` or ``#rrggbb``."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def curve(*clips: list[float]) -> Curve:
    answers = torch.tensor(clips, dtype=torch.float64)
    fractions = torch.linspace(0, 1, answers.shape[1], dtype=torch.float64).expand_as(answers)
    return Curve(torch.trapezoid(answers, fractions), answers, fractions)


@pytest.mark.parametrize("color", [notebook.FOR, notebook.AGAINST, notebook.LINE])
def test_colors_have_enough_contrast_on_white_and_black(color):
    """WCAG requires a contrast of 3:1 for graphics."""
    assert 1.05 / (luminance(color) + 0.05) >= 3
    assert (luminance(color) + 0.05) / (luminance("#111111") + 0.05) >= 3


def test_curves_are_drawn_at_the_right_position():
    result = curve([0.0, 0.5, 1.0], [0.0, 1.0, 1.0])  # the mean is 0, 0.75, 1
    (line,) = points(result)
    np.testing.assert_allclose(line, [[0, 116], [180, 116 - 112 * 0.75], [360, 4]])
    assert cells(result) == [["clip", "score"], ["mean", "0.625"], ["0", "0.5"], ["1", "0.75"]]
    text = "".join(tree(result).itertext())
    assert "mean of 2 clips: output, 0 to 1, by part of the cells, 0 to 1" in text
    assert "mean" not in [row[0] for row in cells(curve([0.0, 1.0]))]  # for one clip


def test_insertion_and_deletion_have_different_colors():
    rising, falling = curve([0.2, 0.9]), curve([0.9, 0.1])
    result = InsertionDeletionResult(rising, falling, rising, falling)
    lines = points(result)
    assert [line[0, 1] > line[1, 1] for line in lines] == [True, False]  # rising, falling
    colors = [line.get("stroke") for line in tree(result).iter("polyline")]
    assert colors == [notebook.FOR, notebook.AGAINST]
    assert cells(result) == [["clip", *InsertionDeletionResult._fields], ["0", "0.55", "0.5", "0.55", "0.5"]]


def test_nan_is_shown_in_the_table_and_not_drawn():
    result = curve([0.0, float("nan"), 1.0])
    assert len(points(result)[0]) == 2
    assert cells(result)[1] == ["0", "nan"]
    assert points(curve([float("nan")] * 3)) == []
    shown = cells(Smoothness(torch.tensor([float("nan"), 0.25, 0.75]), torch.tensor([float("nan")] * 3)))
    assert shown[1] == ["mean", "0.5", "nan"]  # the mean ignores nan


def test_long_tables_and_curves_are_shortened():
    shown = cells(Smoothness(torch.rand(500), torch.rand(500)))
    assert len(shown) == 1 + 20 + 1 and shown[-1] == ["… 481 more"]  # 500 clips and their mean, without 20
    result = curve(*torch.rand(500, 1001).tolist())
    assert len(points(result)[0]) <= 2 * notebook.POINTS


def test_reliability_similarity_and_randomization():
    found = Reliability(0.5, (0.25, 0.75), 0.4, (0.1, 0.6), float("nan"), (float("nan"), float("nan")))
    assert cells(found)[1:] == [
        ["weighted", "0.5", "0.25", "0.75"],
        ["spearman", "0.4", "0.1", "0.6"],
        ["krippendorff", "nan", "nan", "nan"],
    ]
    alone = Similarity(torch.tensor([0.5]), torch.tensor([-0.25]))
    assert cells(alone) == [["clip", "signed", "magnitude"], ["0", "0.5", "-0.25"]]
    others = Similarity(torch.tensor([[0.5, 0.7], [1.0, 1.0]]), torch.tensor([[0.0, 0.5], [1.0, 1.0]]))
    assert cells(others) == [["map", "signed", "magnitude"], ["0", "0.6", "0.25"], ["1", "1", "1"]]
    layers = Randomization(others.signed, others.magnitude, ("<b>head</b>", ""))
    assert cells(layers) == [
        ["randomized layer", "signed", "magnitude"],
        ["<b>head</b>", "0.6", "0.25"],
        ["the model", "1", "1"],
    ]
    assert not list(tree(layers).iter("b"))  # escaped


@pytest.mark.parametrize(("change", "word"), [(0.5, "the gates are used"), (0.001, "the gates are not used")])
def test_attention_usage_states_whether_gates_are_used(change, word):
    values = torch.full((3,), change)
    names = ("temporal_flat", "temporal_shuffled", "spatial_flat", "spatial_shuffled")
    usage = AttentionUsage(*[values] * 4, decisions=dict.fromkeys(names, 0.25))
    assert word in "".join(tree(usage).itertext())
    assert cells(usage)[1] == ["temporal_flat", f"{change:.3g}", "0.25"]


def test_mask_attribution_shows_scores_and_history():
    parts = VideoAttribution.from_joint(torch.rand(2, 4, 6, 6))
    history = History(
        torch.tensor([0, 10, 20]), torch.tensor([[4.0, 2.0], [2.0, 2.0], [1.0, 1.0]]), *[torch.rand(3)] * 2
    )
    result = MaskAttribution(
        joint=parts.joint,
        spatial=parts.spatial,
        temporal=parts.temporal,
        masks=torch.rand(2, 2, 4, 6, 6),
        areas=torch.tensor([0.05, 0.5]),
        visible=torch.tensor([[0.05, 0.5], [0.07, 0.5]]),
        whole=torch.tensor([0.9, 0.8]),
        kept=torch.tensor([[0.25, 1.0], [0.75, 1.0]]),
        removed=torch.zeros(2, 2),
        history=history,
        interrupted=True,
    )
    assert cells(result)[1:] == [["0.05", "0.06", "0.5", "0"], ["0.5", "0.5", "1", "0"]]
    (line,) = points(result)
    np.testing.assert_allclose(line, [[0, 4], [180, 60], [360, 116]])  # 3, 2, 1
    text = "".join(tree(result).itertext())
    assert text.startswith("MaskAttribution: 2 clips") and "clip is 0.85" in text and "interrupted" in text
    assert len(list(tree(result).iter("svg"))) == 2 * 2 + 1


def test_branch_attribution_shows_both_predictions():
    parts = VideoAttribution.from_joint(torch.rand(1, 4, 6, 6))
    answer, own = torch.tensor([[0.0, 3.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    result = BranchAttribution(
        parts.joint,
        parts.spatial,
        parts.temporal,
        answer,
        own,
        "gate",
        "each bar covers 2 frames, each cell 8 x 8 pixels",
    )
    assert cells(result)[1] == ["0", "1", f"{answer.softmax(1).max():.3g}", "0", f"{own.softmax(1).max():.3g}"]
    assert "weighting: gate; each bar covers 2 frames" in "".join(tree(result).itertext())
    bare = BranchAttribution(parts.joint, parts.spatial, parts.temporal)
    assert cells(bare) == []


def test_fit_history_shows_losses_and_the_best_epoch():
    losses, own = [3.0, 2.0, 1.0, 1.5], [4.0, 2.0, 3.0, 5.0]
    history = FitHistory(
        [{"class": loss / 2, "loss": loss} for loss in losses], [{"class": 9.0, "loss": loss} for loss in own], 1
    )
    assert cells(history) == [
        ["epoch", "data", "class", "loss"],
        *(
            [str(at), name, f"{'9' if name == 'validation' else f'{of[at] / 2:.3g}'}", f"{of[at]:.3g}"]
            for at in (0, 1, 3)
            for name, of in (("train", losses), ("validation", own))
        ),
    ]
    assert [len(line) for line in points(history)] == [4, 4]
    assert "epoch 1" in history._repr_html_() and "interrupted" not in history._repr_html_()
    assert "interrupted" in FitHistory([{"loss": 1.0}], best=0, interrupted=True)._repr_html_()
    assert cells(FitHistory()) == [["epoch", "data"]]


def test_tiles_are_drawn_for_positive_and_negative_values():
    picture = ElementTree.fromstring(notebook.signed_map([[0.5, -0.25], [0.01, 1.0]], 10, 10, "map"))
    tiles = [tuple(tile.get(name) for name in ("x", "y", "fill", "fill-opacity")) for tile in picture.iter("rect")]
    assert tiles == [
        ("0", "0", notebook.FOR, "0.5"),
        ("1", "0", notebook.AGAINST, "0.25"),
        ("1", "1", notebook.FOR, "1"),
    ]


def test_branch_explanation_shows_gates_and_both_predictions():
    spatial, temporal = torch.full((2, 4, 8, 8), 0.1), torch.full((2, 4), 0.25)
    spatial[:, :, 2, 5], temporal[:, 3] = 0.9, 0.5
    explanation = BranchExplanation(
        logits=torch.tensor([[0.0, 3.0], [1.0, 0.0]]),
        spatial_gates=spatial,
        temporal_gates=temporal,
        gates=Gates(spatial[:, None], temporal, spatial, torch.tensor([[2.0, 0.0], [3.0, 0.0]])),
    )
    assert cells(explanation) == [["clip", "class", "class by the branch"], ["0", "1", "0"], ["1", "0", "0"]]
    assert explanation.resolution in explanation._repr_html_()
    bars = [float(r.get("height")) for r in tree(explanation).iter("rect")][-4:]
    assert bars == [0.5, 0.5, 0.5, 1]  # relative to the largest
