"""``attribute_maps`` of methods that do not compute maps themselves: maps of their attributions, and the output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_staa import RISE, VideoAttribution, VideoFeatureAblation, VideoOcclusion, feature_masks
from captum_staa.attr._base import VideoMethod

CLIP = torch.randn(2, 4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
REGIONS = feature_masks.grid(CLIP, "BTCHW", (2, 3, 3))
OPTIONS: dict[type[VideoMethod], dict[str, Any]] = {
    VideoOcclusion: {"sliding_window_shapes": (2, 3, 3), "strides": (1, 3, 3)},
    VideoFeatureAblation: {"feature_mask": REGIONS},
    RISE: {"n_samples": 8, "n_cells": (2, 2, 2)},
}


class Weighted(nn.Module):
    """Two outputs per clip, which depend on a second argument. It writes into its clip, and is in train mode."""

    def forward(self, clip: Tensor, weight: Tensor) -> Tensor:
        outputs = torch.stack([(clip * weight.view(-1, 1, 1, 1, 1)).sum((1, 2, 3, 4)), clip[:, 1].sum((1, 2, 3))], 1)
        clip.zero_()
        return outputs + self.training


@pytest.mark.parametrize("kind", OPTIONS)
def test_maps_are_those_of_the_attributions_and_logits_those_of_the_whole_clip(kind: type[VideoMethod]) -> None:
    model, weight = Weighted(), torch.tensor([1.0, -2.0])
    method, given = kind(model, "BTCHW"), {"target": [0, 1], "additional_forward_args": weight, **OPTIONS[kind]}
    maps = method.attribute_maps(CLIP, **given)
    expected = VideoAttribution.from_attributions(method.attribute(CLIP, **given), "BTCHW")
    for name in ("joint", "spatial", "temporal"):
        torch.testing.assert_close(getattr(maps, name), getattr(expected, name), msg=name)
    torch.testing.assert_close(maps.joint, method.attribute(CLIP, **given).sum(2))
    torch.testing.assert_close(maps.logits, model.eval()(CLIP.clone(), weight))


def test_positional_arguments_are_those_of_attribute() -> None:
    method, weight = VideoOcclusion(Weighted(), "BTCHW"), torch.tensor([1.0, -2.0])
    maps = method.attribute_maps(CLIP, (2, 3, 3), (1, 3, 3), None, [0, 1], weight)
    named = method.attribute_maps(
        inputs=(CLIP,), target=[0, 1], additional_forward_args=weight, **OPTIONS[VideoOcclusion]
    )
    assert torch.equal(maps.joint, named.joint) and torch.equal(maps.logits, named.logits)


@pytest.mark.parametrize("kind", OPTIONS)
def test_maps_do_not_depend_on_the_layout(kind: type[VideoMethod]) -> None:
    def first(clip: Tensor) -> Tensor:  # (B, T, C, H, W)
        return (clip * torch.arange(clip[0].numel()).view(clip.shape[1:])).flatten(1)[:, :50].sum(1)

    options = dict(OPTIONS[kind])
    expected = kind(first, "BTCHW").attribute_maps(CLIP, **options)
    if "feature_mask" in options:
        options["feature_mask"] = REGIONS.transpose(1, 2)
    other = kind(lambda clip: first(clip.transpose(1, 2)), "BCTHW").attribute_maps(CLIP.transpose(1, 2), **options)
    for name in ("joint", "spatial", "temporal", "logits"):
        torch.testing.assert_close(getattr(other, name), getattr(expected, name), msg=name)


def test_a_missing_layout_names_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"layout.*got None.*layout='BCTHW'"):
        VideoFeatureAblation(lambda clip: clip.flatten(1).sum(1)).attribute_maps(CLIP, feature_mask=REGIONS)
