"""What the public code of STAA computes: its four defects."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CLASSES, NAMES, clip_for, tiny
from torch import Tensor
from transformers import TimesformerConfig, TimesformerForVideoClassification

from captum_staa import STAA, VideoClassifier
from captum_staa.attention.capture import capture
from captum_staa.attr import ReleasedSTAA
from captum_staa.models.preprocessing import Preprocessing


def divided(frames: int, seed: int = 0, layers: int = 1) -> VideoClassifier:
    """A TimeSformer whose frames do not mix before its last spatial attention: only temporal attention joins them."""
    torch.manual_seed(seed)
    config = TimesformerConfig(
        image_size=24,
        patch_size=8,
        num_frames=frames,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=layers,
        intermediate_size=16,
        num_labels=CLASSES,
    )
    model = TimesformerForVideoClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.4)
        for layer in model.timesformer.encoder.layer:
            layer.temporal_dense.weight.zero_()
    return VideoClassifier(model)


def spatial_attention(clf: VideoClassifier, clip: Tensor) -> Tensor:
    """Explicit head-mean ``S (B, T, 1 + P, 1 + P)`` of the last layer, from the model's own output."""
    with torch.no_grad():
        probabilities = clf.module(clip, output_attentions=True).attentions[-1]
    return probabilities.mean(1).unflatten(0, (len(clip), -1))


@pytest.mark.parametrize("frames", [4, 8, 16])
def test_released_1_reads_frame_0_from_one_of_its_patches(frames):
    clf = divided(frames)
    clip = torch.randn(2, frames, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    other = clip.clone()
    other[:, 1:] = torch.randn(other[:, 1:].shape, generator=torch.Generator().manual_seed(1))
    before, after = spatial_attention(clf, clip), spatial_attention(clf, other)
    torch.testing.assert_close(before[:, 0], after[:, 0])  # only the attention of later frames changes
    assert (before[:, 1:] - after[:, 1:]).abs().mean() > 0.01
    released = [ReleasedSTAA(clf).attribute(c) for c in (clip, other)]
    torch.testing.assert_close(released[0], released[1])  # and none of the released maps notices, of no frame
    ours = [STAA(clf, "attention", [-1]).attribute(c) for c in (clip, other)]
    assert (ours[0] - ours[1])[:, 1:].abs().max() > 0.1 * ours[0].max()
    first = clip.clone()
    first[:, 0] = other[:, 1]
    assert (ReleasedSTAA(clf).attribute(first) - released[0])[:, 1:].abs().max() > 0.1  # they all show frame 0


@pytest.mark.parametrize("frames", [4, 8, 16])
def test_released_2_temporal_attention_is_amplified_noise(frames):
    clf = divided(frames)
    clip = torch.randn(2, frames, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    rows = [min(i + 1, 9) for i in range(frames)]
    first = spatial_attention(clf, clip)[:, 0]  # S[0], (B, 1 + P, 1 + P)
    weights = torch.stack([(1 - first[:, row, 0]) / 9 for row in rows], 1)  # (1 - attention to the class token) / P
    torch.testing.assert_close(weights, torch.stack([first[:, row, 1:].mean(1) for row in rows], 1))
    moving = [weights[:, 0]]
    for i in range(1, frames):
        moving.append(0.3 * weights[:, i] + 0.7 * moving[-1])
    slow = torch.stack(moving, 1)
    low, high = slow.amin(1, keepdim=True), slow.amax(1, keepdim=True)
    temporal = ReleasedSTAA(clf).attribute_maps(clip).temporal
    torch.testing.assert_close(temporal, (slow - low) / (high - low), rtol=1e-3, atol=1e-4)
    assert temporal.amin(1).eq(0).all() and temporal.amax(1).eq(1).all()  # stretched to all of [0, 1] ...
    # ... however little there is to stretch: of a model that looks everywhere alike, the fourth digit
    with torch.no_grad():
        clf.module.timesformer.encoder.layer[0].attention.attention.qkv.weight.mul_(0.03)
    first = spatial_attention(clf, clip)[:, 0]
    weights = torch.stack([first[:, row, 1:].mean(1) for row in rows], 1)
    assert ((weights.amax(1) - weights.amin(1)) / weights.mean(1)).max() < 1e-3
    assert ReleasedSTAA(clf).attribute_maps(clip).temporal.amax(1).eq(1).all()


@pytest.mark.parametrize("frames", [4, 8, 16])
def test_released_3_threshold_is_random(frames):
    clf = divided(frames)
    clip = torch.randn(1, frames, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()

    def kept(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return ReleasedSTAA(clf, generator).attribute_maps(clip).joint.gt(0).float().mean((2, 3))

    assert torch.equal(kept(7), kept(7)) and torch.equal(kept(None), kept(None))
    assert not torch.equal(kept(7), kept(8))
    assert kept(7).amin() > 0.09 and kept(7).amax() < 0.31  # between the 70th and the 90th percentile of each frame
    assert torch.equal(torch.get_rng_state(), state)
    generator = torch.Generator().manual_seed(7)
    method = ReleasedSTAA(clf, generator)
    assert not torch.equal(method.attribute(clip), method.attribute(clip))  # a generator of one's own goes on


def test_released_4_map_ignores_the_crop():
    """What the processor cut away cannot matter; the public code stretches the map over it all the same."""
    clf = divided(4)
    crop = Preprocessing(resize=(24, 48), crop=(24, 24), mean=(0.5,) * 3, std=(0.5,) * 3)
    clf = VideoClassifier(clf.module, preprocessing=crop)
    assert clf.crop_box(24, 48) == (0, 12, 24, 24)  # the middle half
    frames = torch.randint(0, 255, (4, 24, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    other = frames.clone()
    other[:, :, :10], other[:, :, 38:] = 0, 255
    maps = [ReleasedSTAA(clf).attribute_maps(clf.preprocess(x)).joint for x in (frames, other)]
    assert torch.equal(*maps)
    assert maps[0].shape == (1, 4, 24, 24)  # of the clip, not of the frame: pictures put it back where it belongs
    assert "cropped" in (ReleasedSTAA.__doc__ or "") and "random" in (ReleasedSTAA.__doc__ or "")


@pytest.mark.parametrize("name", NAMES)
def test_released_uses_the_same_indices_for_all_models(name):
    """Row i + 1 of the first frame's matrix; of the joint matrix if there are no frames."""
    clf = tiny(name)
    clip = clip_for(clf)
    parts = ReleasedSTAA(clf).attribute_maps(clip)
    assert parts.joint.min() >= 0 and parts.joint.max() == 1 and parts.joint.amax((2, 3)).eq(1).all()
    layers = [s for s in clf.family.attention(clf.module) if s.role != "temporal"]  # type: ignore[union-attr]
    with torch.no_grad(), capture(clf.module, layers[-1:], lambda call: call.head_mean()) as read:
        clf(clip)
    assert clf.grid is not None
    weights = []
    for i in range(4):
        matrix = read[layers[-1]]
        if layers[-1].role == "spatial":
            weights.append(matrix.unflatten(0, (2, 4))[:, 0, i + 1, clf.grid.prefix :].mean(1))
        else:
            row = matrix[:, min(i + 1, matrix.shape[1] - 1)]
            weights.append(clf.grid.to_grid(row)[:, i].mean((1, 2)))
    mean = [weights[0]]
    for i in range(1, 4):
        mean.append(0.3 * weights[i] + 0.7 * mean[-1])
    slow = torch.stack(mean, 1)
    low, high = slow.amin(1, keepdim=True), slow.amax(1, keepdim=True)
    expected = ((slow - low) / (high - low)).repeat_interleave(clf.grid.tubelet[0], 1)
    torch.testing.assert_close(parts.temporal, expected, rtol=1e-3, atol=1e-3)
