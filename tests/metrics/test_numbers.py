"""Limits on how much precision, repetition, batches and the device may change results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conformance.models import ConvNet
from tiny_models import SIZE, clip_for, randomize, tiny
from torch import Tensor

from captum_staa import (
    RISE,
    STAA,
    GradCAM,
    SpatioTemporalPerturbation,
    VideoAttribution,
    VideoClassifier,
    VideoFeatureAblation,
    VideoOcclusion,
    benchmark,
    feature_masks,
)

TRANSFORMERS = ("videomae", "timesformer", "vivit", "vjepa2")
Call = Callable[..., Tensor]

ATTENTION: dict[str, Call] = {
    "attention": lambda clf, x: STAA(clf, mode="attention").attribute(x),
    "attention, last layer": lambda clf, x: STAA(clf, mode="attention", layers=[-1]).attribute(x),
    "relevance": lambda clf, x, target=1: STAA(clf).attribute(x, target),
    "chefer": lambda clf, x: STAA(clf, rule="chefer").attribute(x, 1),
}
ANY: dict[str, Call] = {
    "occlusion": lambda clf, x: VideoOcclusion(clf).attribute(x, (2, 8, 8), (2, 4, 4), target=1),
    "ablation": lambda clf, x: VideoFeatureAblation(clf).attribute(
        x, target=1, feature_mask=feature_masks.grid(x, clf.layout, (2, 8, 8))
    ),
    "rise": lambda clf, x: RISE(clf).attribute(x, target=1, n_samples=12, n_cells=(2, 3, 2)),
    "perturbation": lambda clf, x: SpatioTemporalPerturbation(clf).attribute(x, target=1, iterations=2),
    "grad-cam": lambda clf, x: GradCAM(clf, LAYER[clf.layout.axes], weighting="hirescam").attribute(x, 1),
}
LAYER = {"BTCHW": "videomae.encoder.layer.0.layernorm_before", "BCTHW": "features"}
EVERY = {**ATTENTION, **ANY}


def conv() -> VideoClassifier:
    return VideoClassifier(randomize(ConvNet("BCTHW"), seed=0), layout="BCTHW")


def case(name: str) -> tuple[VideoClassifier, Tensor]:
    """A model that the method supports, and two clips."""
    clf = tiny("videomae") if name in (*ATTENTION, "grad-cam") else conv()
    if clf.family is not None:
        return clf, clip_for(clf)
    return clf, torch.randn(2, 3, 4, *SIZE, generator=torch.Generator().manual_seed(1))


def spearman(found: Tensor, wanted: Tensor) -> float:
    """Spearman's correlation by its definition; ties are rare."""
    places = [each.double().flatten().argsort().argsort().double() for each in (found, wanted)]
    return float(torch.corrcoef(torch.stack(places))[0, 1])


# Lower than in docs/results_models.md for the bundled VideoMAE and 3D CNN, with a margin for other CPUs.
FLOORS = {
    "attention": 0.99,
    "attention, last layer": 0.99,
    "relevance": 0.99,
    "occlusion": 0.75,
    "grad-cam": 0.98,
}


@pytest.mark.parametrize("name", FLOORS)
def test_half_precision_keeps_the_order_on_trained_models(name: str) -> None:
    """bfloat16 has three digits: shares of attention keep their order, differences of outputs lose part of it."""
    model = "tiny-resnet3d-pattern" if name == "occlusion" else "tiny-videomae-pattern"
    full, half = (VideoClassifier.from_pretrained(model, dtype=d) for d in (torch.float32, torch.bfloat16))
    clips, _, _ = benchmark.PlantedClips(seed=12, n=20)[16:17]
    clips = full.layout.from_working(clips)
    call = EVERY[name]
    if name == "occlusion":
        call = lambda clf, x: VideoOcclusion(clf).attribute(x, (4, 24, 24), (4, 12, 12), target=1)  # noqa: E731
    found, wanted = call(half, clips.bfloat16()), call(full, clips)
    assert found.dtype == torch.float32
    maps = [VideoAttribution.from_attributions(each, full.layout).joint for each in (found, wanted)]
    assert spearman(*maps) > FLOORS[name]
    assert not torch.equal(*maps), "the model was not cast"


@pytest.mark.parametrize("name", EVERY)
def test_repeated_calls_give_identical_results(name: str) -> None:
    """Two calls with different global random states, which are not changed."""
    clf, clip = case(name)
    found = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            found.append(EVERY[name](clf, clip))
            assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*found)


@pytest.mark.parametrize("name", EVERY)
def test_batch_size_changes_only_rounding(name: str) -> None:
    clf, clip = case(name)
    whole = EVERY[name](clf, clip)
    alone = torch.cat([EVERY[name](clf, one[None]) for one in clip])
    assert (whole - alone).abs().max() <= 1e-4 * whole.abs().max()
