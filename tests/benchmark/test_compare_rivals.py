"""Rivals in a comparison: their sources, and the metrics that need them."""

from __future__ import annotations

import pytest
import torch
from comparison_cases import PLANTED, absolute, classifier, scene, silent, table
from torch import Tensor

from captum_staa import VideoClassifier, metrics
from captum_staa.benchmark import JoinedClips, PlantedClips, SceneOptions
from captum_staa.benchmark.clips import checked, each, source_of
from captum_staa.benchmark.methods import made


def test_rival_metrics_equal_direct_calls():
    wanted = ["rivals", "rivals_time", "rivals_space", "object_pointing"]
    clf = VideoClassifier.from_pretrained("tiny-resnet3d-pattern")
    values = table(silent(clf, PlantedClips(seed=12, n=2), ["Saliency"], wanted))
    for at in range(2):
        clip, label, truth = PLANTED[at : at + 1]
        maps = made(["Saliency"], clf, perturbations_per_eval=1)[0]
        given = clf.layout.from_working(clip).contiguous()
        maps = maps.map_of(maps.call(given, int(label)), given, clf)
        rivals = PLANTED.rivals(at)[None]
        by_hand = {
            "rivals": metrics.evidence_against_rivals(maps, truth, rivals),
            "rivals_time": metrics.evidence_against_rivals(maps, truth, rivals, "time"),
            "rivals_space": metrics.evidence_against_rivals(maps, truth, rivals, "space"),
            "object_pointing": metrics.object_pointing(maps, PLANTED.objects(at)[None]),
        }
        for metric, value in by_hand.items():
            assert values[f"pattern-0000{at}", "Saliency", metric] == pytest.approx(value.item(), rel=1e-6)
        assert values[f"pattern-0000{at}", "uniform", "rivals"] == 0.5


def test_rival_metrics_are_left_out_for_clips_without_rivals():
    clip, target, truth, rivals, objects = scene(0)
    items = [(clip, target), (clip, target, truth), (clip, target, truth, rivals), (clip, target, None, None, objects)]
    items.append((clip, target, truth, rivals, objects))
    found = silent(classifier(), items, [absolute], ["auroc", "rivals", "object_pointing", "sparsity"])
    values = {(name[-1], metric) for name, method, metric in table(found) if method == "absolute"}
    assert {at for at, metric in values if metric == "auroc"} == {"1", "2", "4"}
    assert {at for at, metric in values if metric == "rivals"} == {"2", "4"}
    assert {at for at, metric in values if metric == "object_pointing"} == {"3", "4"}
    assert {at for at, metric in values if metric == "sparsity"} == set("01234")
    reasons = {row.clip[-1]: row.reason for row in found.rows if row.metric == "left out"}
    assert reasons == {
        "0": "no truth (needed by auroc, rivals); no objects (needed by object_pointing)",
        "1": "no rivals (needed by rivals); no objects (needed by object_pointing)",
        "2": "no objects (needed by object_pointing)",
        "3": "no truth (needed by auroc, rivals)",
    }
    assert "1 of 5 clips have no objects (needed by object_pointing)" in found.to_markdown()


def test_metrics_may_be_named_like_fields_of_a_clip():
    wanted = {name: lambda case: 7.0 for name in ("truth", "target", "other")}
    assert set(table(silent(classifier(), [scene(0)], [absolute], wanted)).values()) == {7.0}


def loaded(clips, model: VideoClassifier) -> list:
    return [load() for _, _, load in each(source_of(clips, model), model, 0, 1)]


def test_rivals_and_objects_are_read_from_sequences():
    cnn = VideoClassifier.from_pretrained("tiny-resnet3d-pattern")
    planted = PlantedClips(seed=12, n=2)
    for at, sample in enumerate(loaded(planted, cnn)):
        assert torch.equal(sample.rivals, planted.rivals(at)[None])
        assert torch.equal(sample.objects, planted.objects(at)[None])
        assert torch.equal(sample.objects[:, 0], sample.truth)
    joined = JoinedClips(PLANTED, cnn, n=2)
    for sample in loaded(joined, cnn):
        assert torch.equal(sample.rivals, ~sample.truth) and sample.objects is None

    class Mine(list):
        def rivals(self, index: int) -> Tensor | None:
            return None if index else torch.zeros(4, 8, 8, dtype=torch.bool)

    clip, target, truth, rivals, _ = scene(0)
    none, own, nothing = loaded(Mine([(clip, target), (clip, target, truth, rivals), (clip, target)]), classifier())
    assert none.truth is None and not none.rivals.any() and torch.equal(own.rivals, rivals) and nothing.rivals is None


def test_in_clips_of_two_classes_the_first_is_the_target_and_the_second_a_rival():
    clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    planted = PlantedClips(seed=12, n=3, scene=SceneOptions(two_classes=True))
    for at, sample in enumerate(loaded(planted, clf)):
        _, labels, truth = planted[at]
        assert sample.target == labels[0] and torch.equal(sample.truth[0], truth[0])
        assert torch.equal(sample.rivals[0], (planted.rivals(at) | truth[1]) & ~truth[0])
        assert torch.equal(sample.objects[0, :2], truth) and sample.objects.shape[1] == 5


def test_masks_may_have_a_batch_axis():
    clip, target, truth, rivals, objects = scene(0)
    whole = checked((clip, target, truth, rivals, objects), classifier())
    bare = checked((clip[0], target, truth[0], rivals[0], objects[0]), classifier())
    assert all(torch.equal(one, other) for one, other in zip(whole[2:], bare[2:], strict=True))
    assert [tuple(mask.shape) for mask in bare[2:]] == [(1, 4, 8, 8), (1, 4, 8, 8), (1, 2, 4, 8, 8)]
