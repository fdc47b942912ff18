"""STAA equals a slow reference implementation (slow_staa.py)."""

from __future__ import annotations

import copy

import pytest
import slow_staa
import torch
from covering import in_one_case, over_pairs
from staa_modes import LAYERS, MODES, TARGET, spearman
from tiny_models import NAMES, clip_for, own, snapshot, tiny
from torch import nn

from captum_staa import STAA, Focus
from captum_staa.attention.rollout import gradient_weighted

OF_LAYERS = [(kind, layers) for kind in ("attention", "chefer") for layers in LAYERS]


@in_one_case("kind")
@pytest.mark.parametrize(("kind", "layers"), [*OF_LAYERS, ("decomposition", "all")], ids=str)
@pytest.mark.parametrize("name", [*NAMES, "sdpa", "mha, time first"])
def test_staa_equals_the_slow_formula(name, kind, layers):
    clf = tiny(name) if name in NAMES else own(name)
    clip, options = clip_for(clf), {"rule": "decomposition", **MODES[kind]}
    slow = slow_staa.staa(
        name if name in NAMES else "own", copy.deepcopy(clf.module), clip, TARGET, layers=layers, **options
    )
    exact = {"pattern_weight": 0} if kind == "decomposition" else {}  # with a weight: test_decomposition.py
    parts = STAA(clf, layers=layers, **options, **exact).attribute_maps(clip, TARGET)
    top = slow.abs().max().item()
    torch.testing.assert_close(parts.joint, slow, rtol=0, atol=1e-5 * top)
    assert slow.std() > 0.01 * top, "a flat map would agree with anything"
    torch.testing.assert_close(parts.spatial, slow.sum(1), rtol=1e-4, atol=1e-5 * top)
    when = slow.sum((2, 3))
    torch.testing.assert_close(parts.temporal, when, rtol=1e-4, atol=1e-5 * when.abs().max().item())
    torch.testing.assert_close(parts.logits, clf(clip).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["videomae", "videomae-first", "timesformer-joint", "vivit", "vjepa2", "sdpa", "mha, time first"]
)
def test_attribute_temporal_equals_the_slow_formula(name):
    clf, slow_name = (tiny(name), name) if name in NAMES else (own(name), "own")
    clip = clip_for(clf)
    with torch.no_grad():
        _, found = slow_staa.attentions(slow_name, copy.deepcopy(clf.module), clip)
    dense = slow_staa.blocks(slow_name, [attention.mean(1) for attention in found], 2)
    tokens = slow_staa.over_layers(slow_name, dense, "all", chefer=False)
    assert clf.grid is not None
    steps = clf.grid.to_grid(tokens).sum((2, 3))
    tubelet = clf.grid.tubelet[0]
    before = snapshot(clf)
    temporal = STAA(clf, "attention").attribute_temporal(clip)
    assert snapshot(clf) == before
    torch.testing.assert_close(temporal, (steps / tubelet).repeat_interleave(tubelet, 1), rtol=0, atol=1e-6)
    nearest = STAA(clf, "attention", upsampling="nearest").attribute_maps(clip).temporal
    torch.testing.assert_close(temporal, nearest, rtol=0, atol=1e-5)
    assert steps.std() > 1e-3
    with pytest.raises(ValueError, match=r"layers=\[-1\].*attribute_maps"):
        STAA(clf, "attention", [-1]).attribute_temporal(clip)


@pytest.mark.parametrize("name", ["timesformer", "videoprism"])
def test_attribute_temporal_needs_joint_attention(name):
    clf = tiny(name)
    with pytest.raises(ValueError, match=r"joint attention.*attribute_maps"):
        STAA(clf, "attention").attribute_temporal(clip_for(clf))


@pytest.mark.parametrize("name", NAMES)
def test_attention_sums_to_one_minus_the_share_of_special_tokens(name):
    clf = tiny(name)
    for layers in LAYERS:
        total = STAA(clf, "attention", layers).attribute(clip_for(clf)).sum((1, 2, 3, 4))
        if clf.grid is not None and clf.grid.prefix:
            assert (total < 1).all() and (total > 0.05).all()
        else:
            torch.testing.assert_close(total, torch.ones(2), rtol=1e-5, atol=0)


@in_one_case()
@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("name", ["videomae", "timesformer", "vjepa2", "mha"])
def test_attribute_equals_attribute_maps_for_batches_and_tuples(name, kind):
    clf = tiny(name) if name in NAMES else own(name)
    clip, method = clip_for(clf, batch=3), STAA(clf, **MODES[kind])
    target = torch.tensor([2, 0, 1])
    attributions = method.attribute(clip, target)
    assert attributions.shape == clip.shape and attributions.is_contiguous() and not attributions.requires_grad
    assert torch.isfinite(attributions).all() and bool((attributions < 0).any()) == (kind == "decomposition")
    joint = clf.layout.reduce(attributions)
    torch.testing.assert_close(joint, method.attribute_maps(clip, target).joint, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(joint.sum((2, 3)), method.attribute_maps(clip, target).temporal)
    single = torch.cat([method.attribute(clip[i : i + 1], int(target[i])) for i in range(3)])
    torch.testing.assert_close(attributions, single, rtol=1e-3, atol=1e-5 * attributions.max().item())
    (in_tuple,) = method.attribute((clip,), target)
    assert torch.equal(in_tuple, attributions)
    with pytest.raises(ValueError, match="tuple of 2 inputs"):
        method.attribute((clip, clip), target)


@pytest.mark.parametrize("kind", ["decomposition", "chefer"])
def test_targets_of_every_form(kind):
    clf = tiny("vivit")
    clip, method = clip_for(clf), STAA(clf, **MODES[kind])
    one = [
        method.attribute(clip, form) for form in (2, torch.tensor(2), torch.tensor([2]), torch.tensor([2, 2]), [2, 2])
    ]
    assert all(torch.equal(other, one[0]) for other in one)
    mixed = method.attribute(clip, [2, 0])
    torch.testing.assert_close(mixed[0], one[0][0])
    torch.testing.assert_close(mixed[1], method.attribute(clip, 0)[1])
    assert spearman(mixed[1], one[0][1]) < 0.999  # and the target matters
    with pytest.raises(ValueError, match=r"3 classes, got None.*Pass target=class index"):
        method.attribute(clip)


def test_attention_ignores_the_target_and_a_single_output_needs_no_target():
    clf = tiny("videomae")
    clip = clip_for(clf)
    method = STAA(clf, "attention")
    assert torch.equal(method.attribute(clip), method.attribute(clip, 2))
    clf.module.classifier = nn.Linear(24, 1)
    assert STAA(clf).attribute(clip).abs().sum() > 0


def test_attribute_temporal_rejects_a_focus():
    clf = tiny("videomae")
    with pytest.raises(ValueError, match="focus=Focus"):
        STAA(clf, mode="attention", focus=Focus()).attribute_temporal(clip_for(clf))


def test_half_precision_gradients_are_multiplied_in_float32():
    attention, gradient = torch.full((1, 2, 3, 3), 6e-4).half(), torch.full((1, 2, 3, 3), 1e-5).half()
    found = gradient_weighted(attention, gradient)
    torch.testing.assert_close(found, torch.full((1, 3, 3), 6e-9), rtol=0.05, atol=0)


@over_pairs
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(("kind", "layers"), [*OF_LAYERS, ("decomposition", "all"), ("attention", "temporal")], ids=str)
@pytest.mark.parametrize("name", [*NAMES, "sdpa", "mha, time first"])
def test_a_map_under_autocast_is_that_of_float32_up_to_rounding(name, kind, layers, inside):
    clf = tiny(name) if name in NAMES else own(name)
    clip, temporal = clip_for(clf), layers == "temporal"
    if temporal and any(layer.role not in ("joint", "pool") for layer in clf.family.attention(clf.transformer)):
        return
    options = MODES[kind] if temporal else {"layers": layers, **MODES[kind]}

    def explained():
        method = STAA(clf, **options)
        return method.attribute_temporal(clip) if temporal else method.attribute_maps(clip, TARGET).joint

    expected, forward = explained(), clf.module.forward
    if inside:
        clf.module.forward = torch.autocast("cpu", dtype=torch.bfloat16)(forward)
        found = explained()
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = explained()
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.1 * (expected - expected.mean()).norm()
