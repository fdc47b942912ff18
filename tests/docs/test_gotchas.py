"""Tests of every gotcha: the wrong code still fails with this Captum, and the right code is right."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from captum.attr import Deconvolution, DeepLift, GuidedGradCam, LayerGradCam, Saliency
from gotcha_page import (
    FIXED,
    SECTIONS,
    apart,
    close,
    entry,
    falls,
    gradient,
    page,
    seeded,
)
from tiny_models import clip_for, tiny, tiny_module
from torch import Tensor, nn

from captum_staa import VideoAttribution, VideoClassifier, VideoFeatureAblation
from captum_staa.metrics import auroc

pytestmark = pytest.mark.filterwarnings(
    "ignore:Input Tensor 0 did not already require gradients:UserWarning",
    "ignore:Setting backward hooks on ReLU activations:UserWarning",
    "ignore:Setting forward, backward hooks and attributes on non-linear:UserWarning",
)


def test_every_entry_has_two_code_blocks_and_a_test():
    assert len(SECTIONS) > 15
    source = "".join(path.read_text("utf-8") for path in Path(__file__).parent.glob("test_gotchas*.py"))
    for heading, text in SECTIONS.items():
        assert text.count("```py\n") == 2, heading
        order = r"\*\*Symptom\.\*\*.*\*\*Cause\.\*\*.*\nWrong:\n\n```py.*\nRight:.*```py"
        assert re.search(order, text, re.DOTALL), heading
        assert f'@entry("{heading}")' in source, f"no test for the entry {heading!r}"


# --- models -------------------------------------------------------------------------------------------------------


@entry("Hugging Face models return no tensor")
def test_hugging_face(gotcha):
    names = page()
    with gotcha.still_fails():
        gotcha.wrong()
    close(gotcha.right().attributions, gradient(names.model, names.clip, names.label).abs())
    prism = tiny_module("videoprism")
    clip = clip_for(tiny("videoprism"))
    with gotcha.still_fails(symptom=1):
        Saliency(lambda clip: prism(clip).logits).attribute(clip, target=1)
    right = Saliency(VideoClassifier(prism, image_size=clip.shape[3:])).attribute(clip, target=1)
    close(right, gradient(lambda clip: prism(clip).logits[:, 0], clip, 1).abs())


@entry("Attention weights are missing under sdpa")
@pytest.mark.parametrize("name", ["videomae", "vivit", "vjepa2"])
def test_attention_under_sdpa(gotcha, name):
    clf, eager = tiny(name), tiny_module(name)
    clip = clip_for(clf, batch=1)
    with gotcha.still_fails():
        gotcha.wrong(clf=clf, clip=clip)
    if name == "videomae":  # its head reads the mean of all tokens; the tests of STAA cover the other heads
        eager.set_attn_implementation("eager")
        attended = eager(clip, output_attentions=True).attentions[-1].mean((1, 2))  # (B, N)
        shares = clf.grid.to_grid(attended).detach() / math.prod(clf.grid.tubelet)
        close(gotcha.right(clf=clf, clip=clip).parts.joint, clf.grid.to_pixels(shares, mode="trilinear"))


@entry("A model in train mode is explained in train mode")
def test_train_mode(gotcha):
    names = page()
    wrong, again = gotcha.wrong(), gotcha.right()
    expected = gradient(again.net, names.volume, names.label).abs()
    close(again.attributions, expected)
    assert int(again.net[1].num_batches_tracked) == 0
    assert apart(wrong.attributions, expected), FIXED
    assert int(wrong.net[1].num_batches_tracked) > 0, FIXED
    with seeded():
        torch.rand(1)
        other = Saliency(wrong.net).attribute(names.volume, target=names.label)
    assert apart(other, wrong.attributions), FIXED
    before = {name: value.clone() for name, value in wrong.net.state_dict().items()}
    found = VideoFeatureAblation(wrong.net, "BCTHW").attribute(
        names.volume, target=names.label, feature_mask=names.mask
    )
    expected = gotcha.wrong().net.eval()
    expected.load_state_dict(before)
    (right,) = falls(expected, names.label, (names.volume, names.mask.expand_as(names.volume)))
    close(found, right, rtol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in wrong.net.state_dict().items())


# --- gradients ----------------------------------------------------------------------------------------------------


@entry("A strided gradient breaks sensitivity_max")
@pytest.mark.parametrize("name", ["videomae", "vivit", "vjepa2"])
def test_sensitivity(gotcha, name):
    clf = tiny(name)
    names = {"clf": clf, "clip": clip_for(clf), "label": 1, "model": lambda clip: clf.module(clip).logits}
    with gotcha.still_fails():
        gotcha.wrong(**names)
    clip = names["clip"].repeat_interleave(10, 0)
    with seeded():
        moved = clip + torch.empty(clip.shape).uniform_(-0.02, 0.02)
    before, after = (gradient(clf, inputs, 1).abs().reshape(2, 10, -1) for inputs in (clip, moved))
    close(gotcha.right(**names).score, ((after - before).norm(dim=2) / before.norm(dim=2)).amax(1))


@entry("InputXGradient and DeepLift keep the graph")
def test_kept_graph(gotcha):
    names = page()
    with gotcha.still_fails():
        gotcha.wrong()
    net = names.cnn.module
    assert DeepLift(net).attribute(names.volume, target=names.label).requires_grad, FIXED
    assert GuidedGradCam(net, net.stages[-1]).attribute(names.volume, target=names.label).requires_grad, FIXED
    close(gotcha.right().attributions, names.clip * gradient(names.model, names.clip, names.label))


@entry("NoiseTunnel breaks half precision")
@pytest.mark.parametrize("name", ["videomae", "timesformer", "vivit", "videoprism"])
def test_noise_tunnel_in_half_precision(gotcha, name):
    clf, half = tiny(name), tiny(name).bfloat16()
    names = {"clf": clf, "clip": clip_for(clf), "label": 1}
    with gotcha.still_fails():
        gotcha.wrong(**names)
    clip = names["clip"].repeat_interleave(5, 0)
    with seeded():
        noisy = clip + torch.normal(0, torch.ones_like(clip))
    in_half, in_full = (gradient(model, noisy, 1).abs().unflatten(0, (2, 5)).mean(1) for model in (half, clf))
    found = gotcha.right(**names, VideoClassifier=lambda module: half).attributions
    close(found, in_half)
    assert found.dtype == torch.float32
    assert torch.corrcoef(torch.stack([found.flatten(), in_full.flatten()]))[0, 1] > 0.99


@entry("GuidedBackprop of a transformer is its gradient")
def test_guided_backprop(gotcha):
    names = page()
    plain = gradient(names.model, names.clip, names.label)
    assert torch.equal(gotcha.wrong().guided, plain), FIXED
    assert torch.equal(Deconvolution(names.clf).attribute(names.clip, target=names.label), plain), FIXED
    maps = {"plain": plain, "right": gotcha.right().attributions}
    found = {
        name: auroc(VideoAttribution.from_attributions(attributions, "BTCHW").joint.abs(), names.truth).item()
        for name, attributions in maps.items()
    }
    assert found["plain"] < 0.9 < 0.94 < found["right"], found


@entry("DeepLift of a transformer is InputXGradient")
def test_deep_lift(gotcha):
    names = page()
    change = (names.model(names.clip) - names.model(0 * names.clip))[0, names.label].item()
    wrong, right = gotcha.wrong(), gotcha.right()
    product = names.clip * gradient(names.model, names.clip, names.label)
    assert torch.allclose(wrong.wrong, product, atol=1e-7), FIXED
    assert abs(wrong.delta.item()) > 0.1 * abs(change), FIXED
    assert right.attributions.sum().item() == pytest.approx(change, rel=0.01)
    assert abs(right.delta.item()) < 0.01 * abs(change)


@entry("Integrated Gradients from black miss their sum")
def test_integrated_gradients(gotcha):
    names = page()
    wrong, right = gotcha.wrong(), gotcha.right()
    for side, start, misses in ((wrong, 0 * names.volume, True), (right, right.start, False)):
        with torch.no_grad():
            change = (names.cnn(names.volume) - names.cnn(start))[0, names.label].item()
        total = (side.wrong if misses else side.attributions).sum().item()
        assert side.delta.item() == pytest.approx(total - change, abs=1e-3)
        assert (abs(total - change) > 0.3 * abs(change)) == misses, FIXED
        assert misses or abs(total - change) < 0.02 * abs(change)


@entry("DeepLift loses its sum where ReLU meets max pooling")
def test_deep_lift_through_max_pooling(gotcha):
    names = page()
    wrong, right = gotcha.wrong(), gotcha.right()
    with torch.no_grad():
        before, after = (side.net(names.volume)[0, names.label] for side in (wrong, right))
        change = (after - right.net(right.backwards)[0, names.label]).item()
    assert before == after  # the copy changes no output
    assert abs(wrong.wrong.sum().item() - change) > 0.5 * abs(change), FIXED
    assert right.attributions.sum().item() == pytest.approx(change, rel=1e-3)


class MeanInForward(nn.Module):
    """The network of the LRP entry without biases, whose mean is not a module."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.conv, self.relu, self.head = net[0], net[1], net[4]

    def forward(self, clip: Tensor) -> Tensor:
        return self.head(self.relu(self.conv(clip)).mean((2, 3, 4)))


@entry("LRP has no rule for Conv3d")
def test_lrp(gotcha):
    names = page()
    with gotcha.still_fails():
        gotcha.wrong()
    right = gotcha.right()
    close(right.attributions, names.volume * gradient(right.net, names.volume, names.label), rtol=1e-3, atol=1e-8)
    assert not any(hasattr(layer, "rule") for layer in right.net), FIXED  # the rules must be set before every call
    with torch.no_grad():
        right.net[0].bias.zero_()
        right.net[4].bias.zero_()
    score = right.net(names.volume)[0, names.label].item()
    expected = names.volume * gradient(right.net, names.volume, names.label)
    for net, places_are_right in ((right.net, True), (MeanInForward(right.net), False)):
        replaced = SimpleNamespace(**{**vars(nn), "Sequential": lambda *layers, net=net: net})
        code = () if places_are_right else ("net[0].rule, net[2].rule, net[3].rule =", "net.conv.rule, _, _ =")
        found = gotcha.right(*code, nn=replaced).attributions
        assert found.sum().item() == pytest.approx(score, rel=1e-3)
        assert apart(found, expected) != places_are_right, FIXED


# --- Grad-CAM -----------------------------------------------------------------------------------------------------


@entry("LayerGradCam takes tokens for channels")
def test_grad_cam_of_tokens(gotcha):
    names = page()
    vjepa = tiny_module("vjepa2")
    with gotcha.still_fails():
        LayerGradCam(lambda clip: vjepa(clip).logits, vjepa.vjepa2.encoder.layer[-1]).attribute(
            clip_for(tiny("vjepa2")), target=1
        )
    outputs = []
    layer, grid = names.clf.module.videomae.encoder.layer[-1], names.clf.grid
    with layer.register_forward_hook(lambda module, args, output: outputs.append(output)):
        score = names.model(names.clip)[0, names.label]
    tokens, slopes = outputs[0], torch.autograd.grad(score, outputs[0])[0]  # (B, N, D)
    wrong = gotcha.wrong().wrong.detach()
    assert wrong.shape == (1, 1, tokens.shape[2]) != (1, 1, grid.num_tokens), FIXED
    close(wrong[:, 0], (slopes.mean(2, keepdim=True) * tokens).sum(1).detach())  # summed over positions
    map_of_tokens = (slopes.mean(1, keepdim=True) * tokens).sum(2).detach()
    joint = grid.to_pixels(grid.to_grid(map_of_tokens), mode="trilinear") / math.prod(grid.tubelet)
    close(gotcha.right().attributions, (joint / 3).unsqueeze(2).expand_as(names.clip), rtol=1e-3, atol=1e-9)


@entry("GuidedGradCam lays time over color")
def test_guided_grad_cam(gotcha):
    names = page()
    net = names.cnn.module
    target = (names.label + 1) % 3  # a class with evidence against it
    twin = GuidedGradCam(net, net.stages[-1]).attribute(names.volume, target, interpolate_mode="trilinear")
    expected = twin.detach().transpose(1, 2)
    assert apart(gotcha.wrong(label=target).wrong, expected), FIXED
    cells = math.prod(net.stages(net.stem(names.volume)).shape[2:])
    pixels = names.volume[0].numel()
    close(gotcha.right(label=target).attributions * pixels / cells, expected.contiguous(), rtol=1e-3, atol=1e-8)
