"""The second half of the gotchas: perturbation, metrics and pictures."""

from __future__ import annotations

import itertools

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from captum.attr import FeaturePermutation, Saliency
from captum.metrics import infidelity, sensitivity_max
from gotcha_page import (
    FIXED,
    apart,
    close,
    entry,
    falls,
    page,
    seeded,
)
from torch import Tensor

pytestmark = pytest.mark.filterwarnings(
    "ignore:Input Tensor 0 did not already require gradients:UserWarning",
    "ignore:Setting backward hooks on ReLU activations:UserWarning",
    "ignore:Setting forward, backward hooks and attributes on non-linear:UserWarning",
)


@entry("A misspelled mask is ignored")
def test_misspelled_mask(gotcha):
    names = page()
    calls = []

    def counted(clip: Tensor) -> Tensor:
        calls.append(clip)
        return names.cnn.module(clip)

    small = names.volume[..., :2, :2]
    gotcha.wrong(cnn=counted, volume=small)
    assert len(calls) == 1 + small.numel(), FIXED  # a feature per number
    calls.clear()
    FeaturePermutation(counted).attribute(small.repeat(2, 1, 1, 1, 1), target=0, feature_masks=names.mask)
    assert len(calls) == 1 + small.numel(), FIXED
    close(gotcha.right().attributions, falls(names.cnn, names.label, (names.volume, names.mask))[0])
    with pytest.raises(TypeError, match="feature_masks"):
        gotcha.right("feature_mask=", "feature_masks=")


@entry("One id in two inputs is one feature")
def test_joint_ablation(gotcha):
    names = page()
    wrong, right = gotcha.wrong(), gotcha.right()
    rgb, flow = right.inputs
    joint = falls(names.two_stream, names.label, (rgb, names.mask), (flow, names.mask))
    alone = falls(names.two_stream, names.label, (rgb, names.mask), (flow, names.mask + 4))
    for found, together, apiece in zip(wrong.wrong, joint, alone, strict=True):
        assert apart(found, apiece), FIXED
        close(found, together)
    for found, apiece in zip(right.attributions, alone, strict=True):
        close(found, apiece)


@entry("One mask for two inputs leaves the second out")
def test_one_mask_for_two(gotcha):
    names = page()
    assert not gotcha.wrong().wrong[1].any(), FIXED
    right = gotcha.right()
    rgb, flow = right.inputs
    alone = falls(names.two_stream, names.label, (rgb, names.mask), (flow, names.mask + 4))
    for found, apiece in zip(right.attributions, alone, strict=True):
        close(found, apiece)
        assert found.any()
    with pytest.raises(ValueError, match="feature_mask must be one per input"):
        gotcha.right("(mask, mask + 4)", "mask")


@entry("A used FeatureAblation checks no more")
def test_used_instance(gotcha):
    names = page()
    expected = falls(names.cnn, names.label, (names.volume, names.mask))[0]
    wrong = gotcha.wrong()
    close(wrong.first, expected)
    assert apart(wrong.wrong, expected), FIXED
    with gotcha.still_fails():
        type(wrong.ablation)(wrong.ablation.forward_func).attribute(
            names.volume, feature_mask=names.mask, perturbations_per_eval=4
        )
    close(gotcha.right().attributions, expected)
    with pytest.raises(ValueError, match="one output per example"):
        gotcha.right("[:, label]", "[:, label].sum()")


@entry("Lime and KernelShap without a mask explain voxels")
def test_surrogates_without_a_mask(gotcha):
    names = page()
    pytest.importorskip("sklearn")
    with gotcha.still_fails():  # a warning, which is an error here
        gotcha.wrong()
    worth = {}
    with torch.no_grad():
        for kept in itertools.product((False, True), repeat=4):
            worth[kept] = names.cnn(names.volume * torch.tensor(kept)[names.mask])[0, names.label].item()
    shapley = [0.0] * 4
    for order in itertools.permutations(range(4)):
        kept = [False] * 4
        for part in order:
            before, kept[part] = worth[tuple(kept)], True
            shapley[part] += (worth[tuple(kept)] - before) / 24
    expected = torch.tensor(shapley)[names.mask].expand_as(names.volume)
    close(gotcha.right().attributions, expected, rtol=0, atol=0.2 * max(shapley))  # from samples, of a shrinking fit


# --- metrics and pictures -----------------------------------------------------------------------------------------


@entry("infidelity wants the clip's own shape")
def test_infidelity(gotcha):
    names = page()
    with gotcha.still_fails():
        gotcha.wrong()
    right = gotcha.right()
    explained = (0.1 * names.volume * right.maps[:, None] / 3).sum()
    change = (names.cnn(names.volume) - names.cnn(0.9 * names.volume))[0, names.label]
    assert right.score.item() == pytest.approx((explained - change).item() ** 2, rel=1e-3)
    thrice = right.maps[:, None].expand(-1, 3, -1, -1, -1)
    score = infidelity(names.cnn, lambda clip: (0.1 * clip, 0.9 * clip), names.volume, thrice, target=names.label)
    assert score.item() == pytest.approx((3 * explained - change).item() ** 2, rel=1e-3), FIXED


@entry("sensitivity_max reads rows of a tensor as inputs")
def test_sensitivity_of_a_function(gotcha):
    wrong, right = gotcha.wrong(), gotcha.right()
    with seeded():
        expected = sensitivity_max(
            Saliency(right.clf).attribute, right.clip, target=right.label, max_examples_per_batch=1
        )
    torch.testing.assert_close(right.score, expected)
    assert 10 * expected < wrong.wrong < 50 * expected, FIXED


def heat(maps: np.ndarray) -> list[np.ndarray]:
    """Frames in inferno, on one scale: the value below which 98 % of the total lie."""
    ascending = np.sort(maps.ravel())
    scale = ascending[np.cumsum(ascending) >= 0.98 * ascending.sum()][0]
    return list((matplotlib.colormaps["inferno"](np.minimum(maps / scale, 1))[..., :3] * 255).round())


@entry("visualize_image_attr scales every frame by itself")
def test_scale_of_pictures(gotcha):
    wrong, right = gotcha.wrong(), gotcha.right()
    assert [axes.images[0].get_array().max() for _, axes in wrong.pictures] == [1.0] * 16, FIXED
    maps = wrong.maps[..., 0].astype(float)
    assert maps.max((1, 2)).min() < 0.2 * maps.max()
    for picture, expected in zip(right.axes.images, heat(maps), strict=True):
        np.testing.assert_allclose(picture.get_array(), expected, atol=1)
    plt.close("all")
