"""Reading attention changes no logit, and reads what the formula says."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from capture_readings import OF_FULL, READINGS, Boom, boom, layers_of, probabilities_of, read
from covering import in_one_case, over_values
from tiny_models import (
    ALL,
    OWN,
    CallsSdpa,
    OwnViT,
    classifier,
    clip_for,
    own,
    own_family,
    randomize,
    snapshot,
    tiny,
)
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from captum_staa import VideoClassifier
from captum_staa.attention.capture import capture
from captum_staa.models import AttentionLayer


@in_one_case("reading")
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", ALL)
def test_readings_equal_explicit_attention_and_logits_do_not_change(name, reading):
    clf = classifier(name)
    clip = clip_for(clf)
    slow = copy.deepcopy(clf)
    with torch.no_grad(), probabilities_of(slow) as full:
        expected = slow(clip)
    with torch.no_grad():
        plain = clf(clip)
        logits, readings = read(clf, clip, reading)
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-6 * max(1, plain.abs().max().item()))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert list(readings) == layers_of(clf)  # all of them, in the order in which they ran
    for layer, value in readings.items():
        torch.testing.assert_close(value, OF_FULL[reading](full[layer.module]), rtol=0, atol=1e-5)
        far = full[layer.module].amax(-1) * full[layer.module].shape[-1]
        assert far.mean() > 1.2, f"attention at {layer.module} is nearly uniform: this test would see nothing"


@over_values
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", ["videomae", "timesformer", "vjepa2", "videoprism", *OWN])
def test_readings_do_not_change_gradients(name, reading):
    clf = classifier(name)
    clip = clip_for(clf).requires_grad_()
    plain = clf(clip)[:, 1].sum()
    (expected,) = torch.autograd.grad(plain, clip)
    logits, readings = read(clf, clip, reading)
    gradients = torch.autograd.grad(
        logits[:, 1].sum(), [clip, *(readings.values() if reading == "probabilities" else [])]
    )
    torch.testing.assert_close(gradients[0], expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())
    assert all(slope.abs().sum() > 0 for slope in gradients[1:])  # the probabilities are on the way to the logits
    if reading in ("column_means", "head_mean"):
        assert not any(value.requires_grad for value in readings.values())


def test_gradient_of_probabilities_equals_a_finite_difference():
    """For nn.MultiheadAttention, whose own weights have no gradient: d logit / d A by moving A."""
    clf = own("mha").double()
    clip = clip_for(clf, batch=1, dtype=torch.float64)
    layer = layers_of(clf)[-1]
    with capture(clf.module, [layer], READINGS["probabilities"]) as readings:
        logit = clf(clip)[0, 1]
    (slope,) = torch.autograd.grad(logit, readings[layer])
    module, step = clf.module.get_submodule(layer.module), 1e-4
    x = torch.empty(0)
    handle = module.register_forward_pre_hook(lambda module, args: globals().__setitem__("_x", args[0]))
    with torch.no_grad():
        clf(clip)
    handle.remove()
    x = globals().pop("_x")
    v = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)[2].unflatten(-1, (2, -1)).transpose(1, 2)
    for head, token in ((0, 3), (1, 0), (1, 17)):
        delta = torch.zeros_like(readings[layer])
        delta[0, head, 0, token] = step  # what the class token takes from one token in one head
        moved = F.linear((delta @ v).transpose(1, 2).flatten(2), module.out_proj.weight)
        expected = (moved[0, 0] @ clf.module.head.weight[1]) / step
        torch.testing.assert_close(slope[0, head, 0, token], expected, rtol=1e-6, atol=1e-9)


def test_vivit_keeps_its_attention_mask():
    clf = tiny("vivit")
    clip = clip_for(clf)
    mask = torch.ones(2, 25, dtype=torch.long)
    mask[0, 3:9] = 0
    for reading in READINGS:
        for implementation in ("sdpa", "eager"):
            clf.module.set_attn_implementation(implementation)
            with torch.no_grad():
                plain = clf.module(clip, attention_mask=mask).logits
                with capture(clf.module, layers_of(clf), READINGS[reading]) as readings:
                    logits = clf.module(clip, attention_mask=mask).logits
                assert (plain - clf(clip)).abs().max() > 1e-2  # the mask matters
            torch.testing.assert_close(logits, plain, rtol=0, atol=1e-5)
            for value in readings.values():
                assert value[0, ..., 3:9].abs().max() < 1e-6 < value[1, ..., 3:9].abs().max()
    # the module makes its mask from the temporary config: without a mask function of that name there is no mask
    assert ALL_MASK_ATTENTION_FUNCTIONS["captum_staa"] is ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


@in_one_case("reading")
@pytest.mark.parametrize("reading", READINGS)
def test_videoprism_keeps_its_softcap(reading):
    clf = tiny("videoprism")
    clip = clip_for(clf)
    with torch.no_grad():
        logits, capped = read(clf, clip, reading)
        for layer in (*clf.module.vision_model.spatial_layers, *clf.module.vision_model.temporal_layers):
            layer.attention.attn_logit_softcapping = None
        uncapped_logits, uncapped = read(clf, clip, reading)
        torch.testing.assert_close(uncapped_logits, clf(clip), rtol=0, atol=1e-5)
    assert (logits - uncapped_logits).abs().max() > 1e-3
    first = layers_of(clf)[0]
    assert (capped[first] - uncapped[first]).abs().max() > 1e-3


@over_values
@in_one_case("reading")
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", ["videomae", "timesformer", "vjepa2", "videoprism", "sdpa", "mha"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-5), (torch.bfloat16, 0.15)])
def test_half_and_double_precision(name, reading, dtype, close):
    clf = classifier(name).to(dtype)
    clip = clip_for(clf, dtype=dtype)
    with torch.no_grad():
        plain = clf(clip)
        logits, readings = read(clf, clip, reading)
        _, single = read(copy.deepcopy(clf).float(), clip.float(), reading)
    assert logits.dtype == plain.dtype == dtype
    # transformers' eager code takes the softmax in float32 for all inputs; ours keeps float64
    exact = 1e-10 if dtype == torch.float64 and name != "videoprism" else close
    torch.testing.assert_close(logits, plain, rtol=exact, atol=exact)
    for layer, value in readings.items():
        assert value.dtype == (dtype if reading == "probabilities" else torch.float32)
        torch.testing.assert_close(value.float(), single[layer], rtol=0, atol=close)


def test_wrong_layers_raise():
    clf = own("sdpa")
    clip = clip_for(clf)
    with pytest.raises(ValueError, match="Pass at least one AttentionLayer"), capture(clf.module, [], boom):
        pass
    with (
        pytest.raises(ValueError, match=r"module of OwnViT, got 'blocks\.9\.attn'.*named_modules"),
        capture(clf.module, [AttentionLayer("blocks.9.attn", 0)], READINGS["row"]),
    ):
        clf(clip)
    with (
        pytest.raises(ValueError, match=r"no attention at \['blocks\.0\.norm'\].*backend='sdpa' must"),
        capture(clf.module, [AttentionLayer("blocks.0.norm", 0)], READINGS["row"]),
    ):
        clf(clip)


def test_module_that_computes_attention_twice_raises():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = CallsSdpa(16, 2), CallsSdpa(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    clf = VideoClassifier(randomize(OwnViT(Twice), 0), family=own_family())
    clip, before = clip_for(clf), snapshot(clf)
    with pytest.raises(
        ValueError, match=r"once per forward, got a second call of 'blocks\.0\.attn'.*Declare the module"
    ):
        read(clf, clip)
    assert snapshot(clf) == before
    inside = [AttentionLayer("blocks.0.attn.b", 0)]
    with torch.no_grad(), capture(clf.module, inside, READINGS["head_mean"]) as readings:
        clf(clip)
    assert len(readings) == 1


def test_layer_is_not_assigned_to_later_attention_after_an_error():
    class Fallback(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.broken, self.sound = nn.Module(), CallsSdpa(16, 2)
            self.broken.forward = boom  # type: ignore[method-assign]

        def forward(self, x: Tensor) -> Tensor:
            try:
                self.broken(x)
            except Boom:
                return self.sound(x)
            raise AssertionError

    clf = VideoClassifier(randomize(OwnViT(Fallback), 0), family=own_family())
    layers = [AttentionLayer("blocks.0.attn.broken", 0)]
    with pytest.raises(ValueError, match="got no attention"), capture(clf.module, layers, READINGS["row"]):
        clf(clip_for(clf))
