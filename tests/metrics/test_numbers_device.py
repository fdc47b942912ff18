"""Results on another device equal those on the CPU, are computed there, and maps are not copied to the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from covering import in_one_case
from elsewhere import DEVICE, There, elsewhere, send
from test_numbers import ATTENTION, EVERY, case
from torch import Tensor

from captum_staa import VideoAttribution, VideoClassifier, VideoOcclusion, baselines, feature_masks, metrics, smooth

Call = Callable[[VideoClassifier, Tensor], Tensor]

TENSORS: dict[str, Call] = {
    "zero": lambda clf, x: baselines.zero(x, clf.layout),
    "mean_frame": lambda clf, x: baselines.mean_frame(x, clf.layout),
    "blur": lambda clf, x: baselines.blur(x, clf.layout, time=1.0),
    "freeze": lambda clf, x: baselines.freeze(x, clf.layout),
    "shuffle": lambda clf, x: baselines.shuffle(x, clf.layout),
    "reverse": lambda clf, x: baselines.reverse(x, clf.layout),
    "noise": lambda clf, x: baselines.noise(x, clf.layout),
    "smooth": lambda clf, x: smooth(x, clf.layout),
    "VideoAttribution": lambda clf, x: VideoAttribution.from_attributions(x, clf.layout).joint,
    "mask of frames": lambda clf, x: feature_masks.frames(x, clf.layout),
    "mask of cells": lambda clf, x: feature_masks.grid(x, clf.layout, (2, 5, 3)),
    "smoothness": lambda clf, x: metrics.smoothness(x, clf.layout).space,
    "sparsity": lambda clf, x: metrics.sparsity(x, clf.layout),
    "complexity": lambda clf, x: metrics.complexity(x, clf.layout),
}
# Metrics that rank do so on the CPU, where the order of sums is fixed. Only their results are on the device.
SCORES: dict[str, Call] = {
    "auroc": lambda clf, x: metrics.auroc(x.sum(1), x.sum(1) > 0.5),
    "pointing_game": lambda clf, x: metrics.pointing_game(x.sum(1), x.sum(1) > 0.5),
    "iou": lambda clf, x: metrics.iou(x.sum(1), x.sum(1) > 0.5),
    "signal_to_noise": lambda clf, x: metrics.signal_to_noise(x.sum(1), x.sum(1) > 0.5),
    "controls": lambda clf, x: metrics.controls(x, clf.layout)["random"],
    "insertion": lambda clf, x: metrics.insertion(clf, x, x, target=1, steps=3, cells=(2, 8, 8)).score,
    "aopc": lambda clf, x: metrics.aopc(clf, x, x, target=1, steps=3, cells=(2, 8, 8)),
    "faithfulness": lambda clf, x: metrics.faithfulness(clf, x, x, cells=(2, 8, 8)),
}


@in_one_case()
@pytest.mark.parametrize("name", [*EVERY, *TENSORS, *SCORES])
def test_another_device_gives_the_same_results(name: str) -> None:
    call = {**EVERY, **TENSORS, **SCORES}[name]
    clf, clip = case(name)
    wanted = call(clf, clip)
    with elsewhere(clf) as mode:
        found = call(clf, send(clip))
    assert isinstance(found, There) and found.device == DEVICE
    torch.testing.assert_close(found.here, wanted, rtol=0, atol=1e-6 * float(wanted.double().abs().max()))
    if name not in SCORES:
        map_of_a_clip = clip[0].numel() // 3
        assert all(size < map_of_a_clip for size in mode.moved), f"brought to the CPU: {mode.moved} numbers"


@pytest.mark.parametrize("name", ["occlusion", "relevance"])
def test_targets_can_be_on_the_cpu(name: str) -> None:
    """Labels of a data set are on the CPU, also if the model is on another device."""
    clf, clip = case(name)
    targets = torch.tensor([1, 0])
    explain = (
        (lambda x, y: VideoOcclusion(clf).attribute(x, (2, 8, 8), (2, 8, 8), target=y))
        if name == "occlusion"
        else (lambda x, y: ATTENTION["relevance"](clf, x, y))
    )
    wanted = explain(clip, targets)
    with elsewhere(clf):
        found = explain(send(clip), targets)
    torch.testing.assert_close(found.here, wanted)


def test_tensors_on_two_devices_raise() -> None:
    """The simulated device raises for the same operations as a GPU."""
    with elsewhere() as mode:
        there, here = send(torch.ones(3)), torch.ones(3)
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            there + here
        assert (there + torch.tensor(1.0)).tolist() == [2.0, 2.0, 2.0]  # scalar tensors may be on the CPU
        assert torch.zeros(2, device=there.device).device == DEVICE
        assert there.cpu().device.type == "cpu" and mode.moved == [3]
