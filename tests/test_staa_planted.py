"""STAA finds what was planted, and another model's map is another one."""

from __future__ import annotations

import copy

import pytest
import torch
from staa_modes import MODES, ranks, spearman
from torch import Tensor

from captum_staa import STAA, Focus, VideoClassifier
from captum_staa.benchmark import PlantedClips


def auroc(maps: Tensor, truth: Tensor) -> float:
    """Share of (inside, outside) pairs in the right order, by ranks, averaged over clips."""
    values = []
    for one, inside in zip(maps.flatten(1), truth.flatten(1), strict=True):
        n = int(inside.sum())
        values.append((ranks(one)[inside].sum() - n * (n - 1) / 2) / (n * (len(one) - n)))
    return torch.stack(values).mean().item()


@pytest.fixture(scope="module")
def shipped() -> VideoClassifier:
    return VideoClassifier.from_pretrained("tiny-videomae-pattern")


@pytest.fixture(scope="module")
def planted() -> tuple[Tensor, Tensor, Tensor]:
    return PlantedClips(seed=4321, n=8)[:8]


def test_relevance_finds_what_was_planted(shipped, planted):
    clips, labels, truth = planted
    joint = STAA(shipped).attribute_parts(clips, labels).joint
    assert auroc(joint, truth) > 0.95
    random = torch.rand(joint.shape, generator=torch.Generator().manual_seed(0))
    assert abs(auroc(random, truth) - 0.5) < 0.05
    assert auroc(-joint, truth) < 0.05


@pytest.mark.parametrize("kind", ["attention", "decomposition", "chefer"])
def test_new_weights_give_another_map(shipped, planted, kind):
    clips = planted[0][:2]
    fresh = copy.deepcopy(shipped)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.std(correction=0))
    maps = [STAA(clf, **MODES[kind]).attribute(clips, 1) for clf in (shipped, fresh)]
    assert spearman(maps[0], maps[1]) < 0.9


@pytest.mark.parametrize("kind", ["decomposition", "chefer"])
def test_targets_differ(shipped, planted, kind):
    clips = planted[0][:2]
    maps = [STAA(shipped, **MODES[kind]).attribute(clips, target) for target in range(3)]
    for i in range(3):
        for j in range(i):
            assert spearman(maps[i], maps[j]) < 0.995, f"the maps of targets {j} and {i} are the same"


def test_options_that_would_be_ignored_are_refused(shipped):
    with pytest.raises(ValueError, match="rule='chefer' is a rule of mode='relevance'"):
        STAA(shipped, mode="attention", rule="chefer")
    with pytest.raises(ValueError, match="takes no focus"):
        STAA(shipped, mode="released", focus=Focus())


def test_half_precision_clips_get_float32_attributions(shipped, planted):
    """A share of attention per pixel, about 1e-5 here, has two digits in float16."""
    clip = planted[0][:1]
    exact = STAA(shipped, mode="attention").attribute(clip)
    halved = STAA(shipped, mode="attention").attribute(clip.half())
    assert exact.dtype == halved.dtype == torch.float32
    torch.testing.assert_close(halved, exact, rtol=0.02, atol=0)
