"""STAA finds planted evidence on trained transformers that no family declares (benchmarks/train_discovered.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from covering import in_one_case

from captum_staa import STAA, VideoClassifier, metrics
from captum_staa.benchmark import PlantedClips

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    from train_discovered import build, trained

CLIPS = 4


def against_rivals(clf: VideoClassifier, task: str) -> float:
    planted, scores = PlantedClips(77, CLIPS, task), []
    for index in range(CLIPS):
        clips, labels, truth = planted[index : index + 1]
        joint = STAA(clf).attribute_maps(clips.transpose(1, 2), target=labels).joint
        scores.append(metrics.evidence_against_rivals(joint, truth, planted.rivals(slice(index, index + 1))))
    return float(torch.cat(scores).mean())


@in_one_case()
@pytest.mark.parametrize(
    ("kind", "task", "least"),
    [("plain", "pattern", 0.9), ("frames", "pattern", 0.9), ("mvit", "pattern", 0.9), ("swin", "motion", 0.9)],
)
def test_relevance_finds_the_evidence_in_trained_transformers_of_no_family(kind: str, task: str, least: float) -> None:
    clf, _ = trained(kind, task)
    assert clf.family is None and against_rivals(clf, task) > least


def test_relevance_is_at_chance_with_random_weights() -> None:
    clf = VideoClassifier(build("swin", "pattern", 5).eval(), layout="BCTHW")
    assert 0.3 < against_rivals(clf, "pattern") < 0.7
