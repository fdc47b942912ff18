"""VideoFeatureAblation gives Captum's FeatureAblation's numbers, for every mask, baseline and chunk."""

from __future__ import annotations

import pytest
import torch
from captum.attr import FeatureAblation
from covering import in_one_case, over_values
from test_occlusion import clip_of, net, two_streams
from torch import Tensor

from captum_staa import VideoFeatureAblation

CLIP = clip_of(2, 3, 4, 5, 6)


def random_ids(*shape: int, n: int, seed: int = 0) -> Tensor:
    """Every id occurs, scattered."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    return (torch.randperm(count, generator=generator) % n).view(shape)


MASKS = {
    "one for all": random_ids(1, 1, 4, 5, 6, n=7),
    "per clip": random_ids(2, 1, 4, 5, 6, n=7),
    "per channel": random_ids(1, 3, 4, 5, 6, n=11),
    "frames": torch.arange(4).view(1, 1, 4, 1, 1),
    "columns": torch.arange(6).view(1, 1, 1, 1, 6),
    "time and column": random_ids(1, 1, 4, 1, 6, n=5),
    "without batch": random_ids(4, 5, 6, n=6),
    "int32": random_ids(1, 1, 4, 5, 6, n=4).int(),
    "bool": random_ids(1, 1, 4, 5, 6, n=2).bool(),
    # ids 1 and 2 hold as many voxels as the box between their first and their last, but not those
    "as large as a box": torch.tensor([[1, 0, 1, 0, 0], [1, 1, 2, 0, 0], [2, 0, 0, 2, 0], [0, 0, 2, 2, 0]])[
        None, None, :, :, None
    ],
    "one feature": torch.zeros(1, 1, 1, 1, 1, dtype=torch.long),
}


@in_one_case()
@over_values
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_feature_ablation_equals_captum(name, chunk):
    model, baseline = net(), clip_of(1, 3, 4, 5, 6, seed=3)
    ours = VideoFeatureAblation(model, "BCTHW").attribute(
        CLIP, baseline, [3, 1], feature_mask=MASKS[name], perturbations_per_eval=chunk
    )
    theirs = FeatureAblation(model).attribute(CLIP, baseline, [3, 1], feature_mask=MASKS[name])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_feature_ablation_equals_the_definition():
    model, mask = net(), MASKS["per clip"]
    ours = VideoFeatureAblation(model).attribute(CLIP, 0.3, 2, feature_mask=mask, perturbations_per_eval=2)
    for i, clip in enumerate(CLIP):
        for feature in range(7):
            inside = (mask[i] == feature).expand_as(clip)
            fall = model(clip[None])[0, 2] - model(clip.masked_fill(inside, 0.3)[None])[0, 2]
            assert (ours[i][inside] - fall).abs().max() < 1e-12


def test_without_a_mask_every_element_is_a_feature():
    model, clip = net(), clip_of(1, 3, 2, 3, 3)
    ours = VideoFeatureAblation(model, "BCTHW").attribute(clip, target=0, perturbations_per_eval=10)
    torch.testing.assert_close(ours, FeatureAblation(model).attribute(clip, target=0), rtol=1e-12, atol=1e-12)


def test_a_feature_may_span_two_inputs():
    model, inputs = two_streams(), (clip_of(2, 3, 4, 5, 6), clip_of(2, 2, 4, 5, 6))
    scale = torch.tensor([1.0, 3.0], dtype=torch.float64)
    masks = (torch.arange(4).view(1, 1, 4, 1, 1), torch.tensor([3, 1, 4, 5]).view(1, 1, 4, 1, 1))
    for mask in (masks, None):
        small = inputs if mask is not None else tuple(one[:, :, :2, :3, :3] for one in inputs)
        ours = VideoFeatureAblation(model).attribute(small, (0.1, 0.2), 1, scale, mask, perturbations_per_eval=4)
        theirs = FeatureAblation(model).attribute(small, (0.1, 0.2), 1, scale, mask)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_without_a_layout_inputs_may_have_any_shape():
    table = torch.arange(12).reshape(3, 4)
    ours = VideoFeatureAblation(lambda x: (x * x).sum(1)).attribute(table, perturbations_per_eval=3)
    assert ours.flatten().tolist() == [float(i * i) for i in range(12)]
    with pytest.raises(ValueError, match="non-empty"):
        VideoFeatureAblation(lambda x: x.sum(1)).attribute(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="nan"):
        VideoFeatureAblation(lambda x: x.sum(1)).attribute(torch.full((1, 4), torch.nan))


@in_one_case()
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.zeros(1, 1, 4, 5, 5).long(), ValueError, r"\(2, 3, 4, 5, 6\).*\(1, 1, 4, 5, 5\)"),
        (torch.zeros(3, 1, 1, 1, 1).long(), ValueError, "broadcastable"),
        (torch.zeros(1, 1, 1, 4, 5, 6).long(), ValueError, "broadcastable"),
        (torch.tensor([0, 2, 3, 4]).view(1, 1, 4, 1, 1), ValueError, "without gaps.* 4 ids from 0 to 4"),
        (random_ids(1, 1, 4, 5, 6, n=3) * 2, ValueError, "3 ids from 0 to 4"),
        (torch.tensor([1, 2, 3, 4]).view(1, 1, 4, 1, 1), ValueError, "4 ids from 1 to 4"),
        (torch.tensor([-1, 0, 1, 2]).view(1, 1, 4, 1, 1), ValueError, "4 ids from -1 to 2"),
        (torch.zeros(1, 1, 4, 5, 6), TypeError, "torch.float32"),
        ("frames", TypeError, "got str"),
        ((torch.zeros(1).long(), torch.zeros(1).long()), ValueError, "one per input.* got 2"),
    ],
)
def test_invalid_masks_raise_before_the_model_is_called(mask, error, message):
    calls = []
    with pytest.raises(error, match=message):
        VideoFeatureAblation(calls.append, "BCTHW").attribute(CLIP, target=0, feature_mask=mask)
    assert not calls


def test_unknown_keyword_raises():
    with pytest.raises(TypeError, match="feature_masks"):
        VideoFeatureAblation(net()).attribute(CLIP, target=0, feature_masks=MASKS["frames"])  # type: ignore[call-arg]
