"""Tests of the methods on Captum's own test configuration, like Captum's test_targets and test_jit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from captum.attr import Attribution, FeatureAblation, LayerAttribution, LayerGradCam, Occlusion, Saliency
from captum.testing.attr.helpers.test_config import config
from torch import Tensor

from captum_staa import RISE, STAA, TokenGrid, VideoClassifier
from captum_staa.attr import GradCAM, VideoFeatureAblation, VideoOcclusion
from captum_staa.models import AttentionLayer, Family

from .config import Donated, donated, lowered
from .trials import assert_close

TRACING = pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")


def test_all_cases_of_captum_are_used() -> None:
    """If a later version of Captum has more cases, check them, and update the counts."""
    counts = {algorithm: len(donated(algorithm)) for algorithm in (FeatureAblation, Occlusion, Saliency, LayerGradCam)}
    assert counts == {FeatureAblation: 17, Occlusion: 3, Saliency: 13, LayerGradCam: 7}
    assert len(config) == 77
    noisy = [case.name for case in donated(FeatureAblation) if case.noise]
    assert len(noisy) == 6 and [case.name for case in donated(Saliency) if case.noise] == noisy


def named(algorithm: type[Attribution]) -> Any:
    """Run a test over the cases of one of Captum's algorithms."""
    return pytest.mark.parametrize("given", [pytest.param(case, id=case.name) for case in donated(algorithm)])


def louder(given: Donated) -> dict[str, Any]:
    """Add noise to Captum's cases for NoiseTunnel. They have none, so they cannot show a difference."""
    return {"stdevs": 0.5} if given.noise else {}


def one_by_one(given: Donated, make: Callable[[Donated], Attribution], together: tuple[Tensor, ...]) -> None:
    """Check that every example alone, with its own target, equals its row of the batch, as in test_targets."""
    rows = [given.part(i) for i in range(len(given.inputs[0]))]
    alone = [row.attribute(make(row)) for row in rows]
    assert_close(together, tuple(torch.cat(parts) for parts in zip(*alone, strict=True)))


def back(given: Donated, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Convert maps of clips to maps of the original rows or images."""
    return tuple(lowered(part, x.ndim) for part, x in zip(found, given.inputs, strict=True))


def voxels(given: Donated) -> dict[str, Any]:
    """Return windows of one voxel, so that occlusion equals an ablation of every feature."""
    single = (1, 1, 1, 1)
    return {"sliding_window_shapes": single if len(given.inputs) == 1 else (single,) * len(given.inputs)}


def occlude(given: Donated) -> VideoOcclusion:
    return VideoOcclusion(given.net, "BCTHW")


@named(FeatureAblation)
def test_video_feature_ablation_equals_captum(given: Donated) -> None:
    expected = given.attribute(FeatureAblation(given.net), **louder(given))
    assert_close(given.attribute(VideoFeatureAblation(given.net), **louder(given)), expected)
    clips = given.lifted
    found = clips.attribute(VideoFeatureAblation(clips.net, "BCTHW"), **louder(given))
    assert_close(back(given, found), expected)


@TRACING
@pytest.mark.captum
@named(FeatureAblation)
def test_video_feature_ablation_one_by_one_and_of_a_trace(given: Donated) -> None:
    together = given.attribute(VideoFeatureAblation(given.net))
    one_by_one(given, lambda row: VideoFeatureAblation(row.net), together)
    assert_close(given.traced.attribute(VideoFeatureAblation(given.traced.net)), together)


@pytest.mark.captum
@named(FeatureAblation)
def test_video_occlusion_of_single_voxels_equals_feature_ablation(given: Donated) -> None:
    expected = given.attribute(FeatureAblation(given.net), **louder(given))
    found = given.lifted.attribute(occlude(given.lifted), **voxels(given), **louder(given))
    assert_close(back(given, found), expected)


def with_clip_windows(given: Donated) -> Donated:
    """Return the cases of Occlusion with windows of four sides. Captum's windows do not have the sides of 1."""

    def four(window: Any, rank: int) -> tuple[int, ...]:
        return (1, 1, 1, *window) if rank == 2 else (window[0], 1, *window[1:])

    windows, ranks = given.keywords["sliding_window_shapes"], [x.ndim for x in given.inputs]
    each = tuple(map(four, windows, ranks)) if len(ranks) > 1 else four(windows, ranks[0])
    keywords = {"strides": 1, **given.lifted.keywords, "sliding_window_shapes": each}  # 1 is Captum's default
    return replace(given.lifted, keywords=keywords)


@named(Occlusion)
def test_video_occlusion_equals_captum(given: Donated) -> None:
    expected = tuple(part.double() for part in given.attribute(Occlusion(given.net)))  # Captum returns float32
    found = with_clip_windows(given).attribute(occlude(given.lifted))
    assert_close(back(given, found), expected)


@TRACING
@pytest.mark.captum
@named(Occlusion)
def test_video_occlusion_one_by_one_and_of_a_trace(given: Donated) -> None:
    clips = with_clip_windows(given)
    together = clips.attribute(occlude(clips))
    one_by_one(clips, occlude, together)
    assert_close(clips.traced.attribute(occlude(clips.traced)), together)


@TRACING
@pytest.mark.captum
@named(FeatureAblation)
def test_video_occlusion_one_by_one_and_of_a_trace_on_more_cases(given: Donated) -> None:
    clips = replace(given.lifted, keywords={**given.lifted.keywords, **voxels(given)})
    together = clips.attribute(occlude(clips))
    one_by_one(clips, occlude, together)
    assert_close(clips.traced.attribute(occlude(clips.traced)), together)


def sample(given: Donated) -> RISE:
    return RISE(given.net, "BCTHW")


@TRACING
@pytest.mark.captum
@named(FeatureAblation)
def test_rise_one_by_one_and_of_a_trace(given: Donated) -> None:
    """Captum has no RISE, so there are no numbers to compare with."""
    clips = replace(given.lifted, keywords={**given.lifted.keywords, "n_samples": 5, "n_cells": (1, 2, 3)})
    together = clips.attribute(sample(clips))
    one_by_one(clips, sample, together)
    assert_close(clips.traced.attribute(sample(clips.traced)), together)


# --- STAA: a row is a grid of one token per number; without a patch embedding, pixels are decomposed -------------

ROW = Family(
    name="row",
    grid=lambda model: TokenGrid(t=1, h=1, w=3),
    attention=lambda model: [AttentionLayer("net.linear1", block=0)],  # the decomposition reads none
    pooling=lambda model: "mean",
    layout="BCTHW",
)


def explain(given: Donated) -> STAA:
    return STAA(VideoClassifier(given.net, family=ROW))


def contributions(given: Donated) -> Tensor:
    """Return ``(B, n)``, input times gradient of the target's output minus the mean of the others.

    These networks are linear except for ReLUs, so nothing has to be frozen.
    """
    leaf = given.inputs[0].clone().requires_grad_()
    outputs = given.net(leaf, *given.extra)
    outputs = outputs.reshape(len(leaf), -1)
    score, count = outputs.sum(1), outputs.shape[1]
    if count > 1:
        target = torch.as_tensor(given.keywords["target"]).expand(len(leaf))
        chosen = outputs.gather(1, target[:, None])[:, 0]
        score = chosen - (score - chosen) / (count - 1)
    (gradient,) = torch.autograd.grad(score.sum(), leaf)
    return (leaf * gradient).detach()


def spread(values: Tensor) -> Tensor:
    """Spread each number of rows ``(B, n)`` by a Gaussian of 3/4 of a token, normalized inside the row."""
    places = torch.arange(values.shape[1])
    far = (places[:, None] - places).to(values)
    weights = torch.exp(-0.5 * (far / 0.75) ** 2) * (far.abs() <= 2)  # three standard deviations, rounded
    return values @ (weights / weights.sum(1, keepdim=True))


@TRACING
@named(Saliency)
def test_staa_equals_smoothed_gradient_times_input(given: Donated) -> None:
    clips = given.lifted
    if len(given.inputs) > 1:
        with pytest.raises(ValueError, match="one clip tensor, got a tuple of 2 inputs"):
            clips.attribute(explain(clips))
    elif True in clips.extra:  # an output of four axes
        one_by_one(clips, explain, clips.attribute(explain(clips)))
    else:
        together = clips.attribute(explain(clips))
        assert_close(lowered(together[0], 2), spread(contributions(given)))
        one_by_one(clips, explain, together)
        assert_close(clips.traced.attribute(explain(clips.traced)), together)


# --- Grad-CAM: a layer of an image network is one of clips of one frame ------------------------------------------


@TRACING
@named(LayerGradCam)
def test_grad_cam_equals_captum_or_raises(given: Donated) -> None:
    clips = given.lifted

    def explain_layer(row: Donated) -> GradCAM:
        return GradCAM(row.net, row.layer_module, "BCTHW", weighting="gradcam")

    if given.layer != "conv2":  # rows have neither space nor time
        with pytest.raises(ValueError, match=r"must be \(B, C, t, h, w\)|a tuple of 2 inputs"):
            clips.attribute(explain_layer(clips))
        return
    (cam,) = given.attribute(LayerGradCam(given.net, given.layer_module))  # (B, 1, 2, 2)
    pixels = LayerAttribution.interpolate(cam, tuple(given.inputs[0].shape[2:]), "bilinear")
    together = clips.attribute(explain_layer(clips))
    assert_close(lowered(together[0], 4), pixels * cam[0].numel() / pixels[0].numel())
    one_by_one(clips, explain_layer, together)
