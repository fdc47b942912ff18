"""The repr of results: shapes instead of thousands of numbers."""

import numpy as np
import torch

from captum_staa import VideoAttribution
from captum_staa.attr.answer import AnswerMaps
from captum_staa.attr.perturbation import History, MaskAttribution
from captum_staa.attr.st_abn import BranchAttribution
from captum_staa.benchmark import Comparison, Row
from captum_staa.io import Video
from captum_staa.visualization import Frames

JOINT = torch.rand(2, 4, 6, 6)


def test_results_are_shown_by_their_shapes() -> None:
    maps = VideoAttribution.from_joint(JOINT)
    sizes = "joint=(2, 4, 6, 6), spatial=(2, 6, 6), temporal=(2, 4), logits="
    assert repr(maps) == f"VideoAttribution({sizes}None)"
    logits = torch.rand(2, 3)
    branch = BranchAttribution(maps.joint, maps.spatial, maps.temporal, logits, resolution="each bar covers 1 frame")
    expected = f"{sizes}(2, 3), attention_logits=None, weighting='gate', resolution='each bar covers 1 frame')"
    assert repr(branch) == f"BranchAttribution({expected}"
    answer = AnswerMaps(maps.joint, maps.spatial, maps.temporal, tokens=("a", "b"))
    assert repr(answer).startswith(f"AnswerMaps({sizes}None, tokens=('a', 'b'), ids=None")


def test_a_result_within_a_result_is_named_only() -> None:
    value = torch.rand(2)
    history = History(*[value] * len(History._fields))
    names = ("masks", "areas", "visible", "whole", "kept", "removed")
    maps = MaskAttribution(
        joint=JOINT,
        spatial=JOINT.sum(1),
        temporal=JOINT.sum((2, 3)),
        history=history,
        interrupted=False,
        **dict.fromkeys(names, value),
    )
    assert repr(maps).endswith("removed=(2,), history=History(...), interrupted=False)")


def test_frames_are_shown_by_their_shapes() -> None:
    pixels = np.zeros((4, 6, 8, 3), np.uint8)
    assert repr(Video(pixels, 25.0, np.arange(4))) == "Video(frames=(4, 6, 8, 3), fps=25.0, indices=(4,))"
    assert repr(Frames(pixels, fps=25.0)).startswith("Frames(pixels=(4, 6, 8, 3), crop=None, indices=None, fps=25.0")


def test_a_comparison_is_shown_by_its_names() -> None:
    comparison = Comparison([Row("clip 0", "RISE", "rivals", 1.0)], ["RISE"], ["rivals"], {"rivals": 1}, {})
    assert repr(comparison) == "Comparison(methods=['RISE'], metrics=['rivals'], clips=1)"
