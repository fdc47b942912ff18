"""STAA finds what was planted, and another model's map is another one."""

from __future__ import annotations

import copy

import pytest
import torch
from staa_modes import MODES, spearman
from torch import Tensor

from captum_staa import STAA, VideoClassifier, VideoOcclusion, metrics
from captum_staa.attention.decomposition import class_contrast, decompose_classifier
from captum_staa.benchmark import PlantedClips, SceneOptions
from captum_staa.metrics.sanity import redrawn

PLANTED = PlantedClips(seed=4321, n=12)


@pytest.fixture(scope="module")
def shipped() -> VideoClassifier:
    return VideoClassifier.from_pretrained("tiny-videomae-pattern")


@pytest.fixture(scope="module")
def planted() -> tuple[Tensor, Tensor, Tensor]:
    return PLANTED[:]


def test_relevance_prefers_evidence_to_rivals_and_attention_less_so(shipped, planted):
    clips, labels, truth = planted
    rivals, objects = PLANTED.rivals(slice(None)), PLANTED.objects(slice(None))
    joint = STAA(shipped).attribute_maps(clips, labels).joint
    assert metrics.evidence_against_rivals(joint, truth, rivals).mean() > 0.88
    assert metrics.evidence_against_rivals(joint, truth, rivals, axis="time").mean() > 0.85
    assert metrics.object_pointing(joint, objects).mean() > 0.85  # chance is .25
    free = metrics.model_free_controls(clips, "BTCHW").values()
    assert all(metrics.evidence_against_rivals(maps, truth, rivals).mean() < 0.65 for maps in free)
    attended = STAA(shipped, mode="attention").attribute_maps(clips).joint
    assert metrics.evidence_against_rivals(attended, truth, rivals).mean() < 0.85


def test_relevance_is_at_chance_with_random_weights_and_below_it_for_another_class(shipped, planted):
    clips, labels, truth = planted
    rivals = PLANTED.rivals(slice(None))
    fresh = redrawn(shipped, torch.Generator().manual_seed(0))
    joint = STAA(fresh).attribute_maps(clips, labels).joint
    assert abs(metrics.evidence_against_rivals(joint, truth, rivals).mean() - 0.5) < 0.12
    joint = STAA(shipped).attribute_maps(clips, (labels + 1) % 3).joint
    assert metrics.evidence_against_rivals(joint, truth, rivals).mean() < 0.4


def test_relevance_for_a_class_is_at_the_evidence_of_that_class(shipped):
    clips, labels, truth = PlantedClips(seed=4322, n=12, scene=SceneOptions(two_classes=True))[:]
    for_a, for_b = (STAA(shipped).attribute_maps(clips, labels[:, k]).joint for k in (0, 1))
    assert metrics.class_discrimination(for_a, for_b, truth[:, 0], truth[:, 1]).mean() > 0.8
    attended = STAA(shipped, mode="attention").attribute_maps(clips).joint
    assert metrics.class_discrimination(attended, attended, truth[:, 0], truth[:, 1]).mean() == 0.5


@pytest.mark.parametrize(
    "name", ["tiny-videomae-motion", pytest.param("tiny-timesformer-order", marks=pytest.mark.slow)]
)
def test_relevance_plus_constants_equals_the_contrast(name):
    clf = VideoClassifier.from_pretrained(name)
    clips, labels, _ = PlantedClips(seed=5, n=3, task=name.rsplit("-")[-1])[:]
    logits = clf(clips).detach()
    contrast = logits[range(3), labels] - logits[range(3), 1 - labels]
    result = decompose_classifier(clf, clips, lambda outputs: class_contrast(outputs, outputs[range(3), labels]))
    total = STAA(clf, pattern_weight=0).attribute(clips, labels).sum((1, 2, 3, 4))
    torch.testing.assert_close(total + result.constants, contrast, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["attention", "decomposition", "chefer"])
def test_map_changes_with_the_weights(shipped, planted, kind):
    clips = planted[0][:2]
    fresh = copy.deepcopy(shipped)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.std(correction=0))
    maps = [STAA(clf, **MODES[kind]).attribute(clips, 1) for clf in (shipped, fresh)]
    assert spearman(maps[0], maps[1]) < 0.9


@pytest.mark.parametrize("kind", ["decomposition", "chefer"])
def test_map_changes_with_the_target(shipped, planted, kind):
    clips = planted[0][:2]
    maps = [STAA(shipped, **MODES[kind]).attribute(clips, target) for target in range(3)]
    for i in range(3):
        for j in range(i):
            assert spearman(maps[i], maps[j]) < 0.995, f"the maps of targets {j} and {i} are the same"


def test_options_that_would_be_ignored_raise(shipped):
    with pytest.raises(ValueError, match="rule = 'chefer' with mode = 'attention'"):
        STAA(shipped, mode="attention", rule="chefer")


def test_half_precision_clips_get_float32_attributions(shipped, planted):
    """A share of attention per pixel, about 1e-5 here, has two digits in float16."""
    clip = planted[0][:1]
    exact = STAA(shipped, mode="attention").attribute(clip)
    halved = STAA(shipped, mode="attention").attribute(clip.half())
    assert exact.dtype == halved.dtype == torch.float32
    torch.testing.assert_close(halved, exact, rtol=0.02, atol=0)


@pytest.mark.parametrize("name", ["relevance", "occlusion"])
def test_versus_finds_the_class_that_decides_between_two_that_are_present(shipped, name):
    """Each clip has evidence of two classes. The map of A against B has higher values at A's place than at B's."""
    clips, labels, truth = PlantedClips(31, 8, "pattern", scene=SceneOptions(two_classes=True))[:4]
    apart = []
    for clip, (this, other), (here, there) in zip(clips.split(1), labels.tolist(), truth, strict=True):
        contrasted = shipped.versus(other)
        if name == "relevance":
            values = STAA(contrasted).attribute_maps(clip, target=this).joint[0]
        else:
            windows = {"sliding_window_shapes": (4, 12, 12), "strides": (4, 12, 12), "perturbations_per_eval": 16}
            values = shipped.layout.reduce(VideoOcclusion(contrasted).attribute(clip, target=this, **windows))[0]
        apart.append(bool(values[here].mean() > values[there].mean()))
    assert sum(apart) >= 3
