"""`STAA.attribute_temporal`, computed by a fused attention, equals the temporal part of the full rollout."""

import pytest
import torch

from captum_staa import STAA, VideoClassifier


@pytest.mark.parametrize("family", ["videomae", "vivit", "vjepa2"])
def test_attribute_temporal_equals_the_rollout(family):
    clf = VideoClassifier.from_pretrained(f"tiny-{family}-pattern")
    clips = torch.randn(2, 16, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    whole = STAA(clf, mode="attention", upsampling="nearest").attribute_maps(clips).temporal
    carried = STAA(clf, mode="attention").attribute_temporal(clips)
    torch.testing.assert_close(carried, whole, atol=1e-6, rtol=1e-5)
    assert carried.std() > 1e-4  # not constant, so that the comparison is meaningful


def test_divided_attention_and_other_modes_raise():
    clip = torch.zeros(1, 16, 3, 48, 48)
    with pytest.raises(ValueError, match=r"timesformer.*attribute_maps"):
        STAA(VideoClassifier.from_pretrained("tiny-timesformer-pattern"), "attention").attribute_temporal(clip)
    with pytest.raises(ValueError, match="mode='relevance'"):
        STAA(VideoClassifier.from_pretrained("tiny-vivit-pattern")).attribute_temporal(clip)
