"""STAA against Captum's contract: precisions, layouts, modes, wrappers, and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from captum.attr import NoiseTunnel
from captum.metrics import infidelity, sensitivity_max
from covering import over_values
from staa_modes import MODES, TARGET, spearman
from tiny_models import NAMES, SIZE, clip_for, own, snapshot, tiny
from torch import Tensor, nn

from captum_staa import STAA, Focus, VideoClassifier


@over_values
@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["videomae", "timesformer", "vjepa2", "videoprism"])
def test_half_and_double_precision(name, dtype, kind):
    """bfloat16 keeps three digits: a random model's map keeps its order, with a rank correlation above 0.9."""
    clf = tiny(name)
    clip = clip_for(clf)
    expected = STAA(clf, **MODES[kind]).attribute(clip, 1)
    other = tiny(name).to(dtype)
    for inputs in (clip, clip.to(dtype)):
        attributions = STAA(other, **MODES[kind]).attribute(inputs, 1)
        assert (
            attributions.dtype == torch.promote_types(inputs.dtype, torch.float32)
            and torch.isfinite(attributions).all()
        )
        if dtype == torch.float64:
            torch.testing.assert_close(attributions.float(), expected, rtol=1e-3, atol=1e-4 * expected.max().item())
        else:
            assert spearman(attributions, expected) > 0.9


@pytest.mark.parametrize("kind", MODES)
def test_result_does_not_depend_on_memory_format(kind):
    clf = tiny("vivit")
    clip = clip_for(clf)
    method = STAA(clf, **MODES[kind])
    expected = method.attribute(clip, 1)
    strided = clip.permute(0, 2, 1, 4, 3).contiguous().permute(0, 2, 1, 4, 3)
    last = clip.to(memory_format=torch.channels_last_3d)
    sliced = torch.cat([clip, clip], 4)[..., : SIZE[1]]
    for inputs in (strided, last, sliced):
        assert not inputs.is_contiguous()
        attributions = method.attribute(inputs, 1)
        assert attributions.is_contiguous()
        torch.testing.assert_close(attributions, expected, rtol=1e-4, atol=1e-6 * expected.max().item())


@pytest.mark.parametrize("name", ["videomae", "timesformer", "sdpa"])
def test_layout_of_the_classifier_differs_from_the_model(name):
    clf = tiny(name) if name in NAMES else own(name)
    word = "BCTHW" if clf.layout.axes == "BTCHW" else "BTCHW"
    swapped = VideoClassifier(clf.module, layout=word, family=clf.family, image_size=SIZE)
    clip = clip_for(clf)
    for kind in MODES:
        expected = STAA(clf, **MODES[kind]).attribute(clip, 1)
        attributions = STAA(swapped, **MODES[kind]).attribute(clip.transpose(1, 2), 1)
        torch.testing.assert_close(attributions.transpose(1, 2), expected)


def test_grad_modes():
    clf = tiny("videomae")
    clip = clip_for(clf)
    for kind, options in MODES.items():
        method = STAA(clf, **options)
        expected = method.attribute(clip, 1)
        with torch.no_grad():
            assert torch.equal(method.attribute(clip, 1), expected)
            assert not torch.is_grad_enabled()
        leaf = clip.clone().requires_grad_()
        assert torch.equal(method.attribute(leaf, 1), expected) and leaf.grad is None
        with torch.inference_mode():
            if options["mode"] == "relevance":
                with pytest.raises(ValueError, match=r"inference_mode\(\) forbids.*no_grad"):
                    method.attribute(clip, 1)
            else:
                torch.testing.assert_close(method.attribute(clip.clone(), 1), expected)
            born_there = clip.clone()
        torch.testing.assert_close(method.attribute(born_there, 1), expected, msg=kind)


@pytest.mark.parametrize("kind", MODES)
def test_captum_noise_tunnel_and_metrics_work(kind):
    clf = tiny("videomae")
    clip, method = clip_for(clf), STAA(clf, **MODES[kind])
    for noise in ("smoothgrad", "smoothgrad_sq", "vargrad"):
        smooth = NoiseTunnel(method).attribute(clip, nt_type=noise, nt_samples=3, stdevs=0.1, target=TARGET)
        assert smooth.shape == clip.shape and torch.isfinite(smooth).all() and smooth.abs().sum() > 0

    def perturb(inputs: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(inputs) * 0.05
        return noise, inputs - noise

    score = infidelity(clf, perturb, clip, method.attribute(clip, TARGET), target=TARGET, n_perturb_samples=4)
    assert score.shape == (2,) and torch.isfinite(score).all() and (score >= 0).all()
    moved = sensitivity_max(method.attribute, clip, perturb_radius=0.05, n_perturb_samples=2, target=TARGET)
    assert moved.shape == (2,) and torch.isfinite(moved).all() and (moved > 0).all()


@over_values
@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["videomae", "timesformer", "vjepa2", "mha"])
def test_model_and_inputs_are_unchanged(name, fails, kind):
    clf = tiny(name) if name in NAMES else own(name)
    clip, method = clip_for(clf), STAA(clf, **MODES[kind])
    parameters = list(clf.parameters())
    parameters[0].requires_grad_(False)
    parameters[2].grad = torch.ones_like(parameters[2])
    clf.module.train()
    next(clf.module.children()).eval()
    handle = None
    if fails:
        layer = clf.family.attention(clf.module)[-1]  # type: ignore[union-attr]
        handle = clf.module.get_submodule(layer.module).register_forward_pre_hook(lambda *_: 1 / 0)
    before = snapshot(clf)
    if fails:
        with pytest.raises(ZeroDivisionError):
            method.attribute(clip, 1)
    else:
        method.attribute(clip, 1)
        method.attribute_maps((clip,), 1)
    assert snapshot(clf) == before
    assert handle is None or handle.remove() is None


def test_model_is_unchanged_after_a_wrong_target():
    clf = tiny("videomae")
    before = snapshot(clf)
    with pytest.raises(ValueError, match=r"target must be a valid index for outputs of shape \(2, \d\), got 17"):
        STAA(clf).attribute(clip_for(clf), 17)
    assert snapshot(clf) == before


def test_names_and_error_messages():
    clf = tiny("videomae")
    clip, method = clip_for(clf), STAA(clf)
    names = {kind: STAA(clf, **options).get_name() for kind, options in MODES.items()}
    assert names == {"attention": "STAA", "decomposition": "STAA (relevance)", "chefer": "STAA (Chefer)"}
    assert not method.has_convergence_delta()
    with pytest.raises(NotImplementedError, match="STAA"):
        method.attribute_future()
    with pytest.raises(TypeError, match="n_steps"):
        method.attribute(clip, 1, n_steps=3)
    with pytest.raises(TypeError):
        STAA(clf, "attention", "all", Focus())  # options after the layers are keyword-only
    for options, error, words in (
        ({"mode": "attenton"}, ValueError, "'attention', 'relevance', got 'attenton'"),
        ({"rule": "lrp"}, ValueError, "'decomposition', 'chefer', 'layer_gradients', got 'lrp'"),
        ({"mode": "attention", "upsampling": "cubic"}, ValueError, "'trilinear', 'nearest', got 'cubic'"),
        ({"mode": "attention", "layers": "last"}, ValueError, "'mean', 'all', got 'last'"),
        (
            {"mode": "attention", "layers": [2]},
            ValueError,
            r"layers=\[2\] .* -2 to 1 .*2 blocks.*, got 2",
        ),
        ({"mode": "attention", "layers": []}, ValueError, r"list of block indices, got \[\]"),
        ({"mode": "attention", "layers": -1}, ValueError, "list of block indices, got -1"),
        ({"mode": "attention", "layers": [0.0]}, TypeError, "got 0.0"),
        ({"mode": "attention", "layers": [True]}, TypeError, "got True"),
        ({"focus": True}, TypeError, "Focus.*True"),
        ({"layers": "mean"}, ValueError, "layers='mean'.*rule='decomposition'.*Leave them out"),
        ({"upsampling": "nearest"}, ValueError, "'nearest'.*rule='decomposition'"),
        ({"pattern_weight": -1}, ValueError, "pattern_weight must be a finite number of at least 0, got -1"),
        ({"pattern_weight": 0.5, "rule": "chefer"}, ValueError, "rule='decomposition', got 0.5.*Leave it out"),
        ({"focus": Focus()}, ValueError, "signed.*mode='attention'"),
    ):
        with pytest.raises(error, match=words):
            STAA(clf, **options)
    with pytest.raises(TypeError, match="function"):
        STAA(lambda clip: clip)  # type: ignore[arg-type]
    linear = VideoClassifier(nn.Sequential(nn.Flatten(), nn.Linear(clip[0].numel(), 2)), layout="BTCHW")
    with pytest.raises(ValueError, match=r"no attention was found in Sequential.*GradCAM.*any network"):
        STAA(linear, mode="attention").attribute(clip)
    with pytest.raises(TypeError, match=r"floating-point.*uint8.*preprocess"):
        method.attribute(torch.zeros(clip.shape, dtype=torch.uint8), 1)
    with pytest.raises(ValueError, match=r"\(8, 3, 24, 16\).*unsqueeze\(0\)"):
        method.attribute(clip[0], 1)


def test_plain_model_is_wrapped():
    clf = tiny("vivit")
    clip = clip_for(clf)
    assert torch.equal(STAA(clf.module).attribute(clip, 1), STAA(clf).attribute(clip, 1))


def test_copy_is_independent():
    clf = tiny("vjepa2")
    clip = clip_for(clf)
    method = STAA(clf)
    expected = method.attribute(clip, 1)
    twin = copy.deepcopy(method)
    with torch.no_grad():
        for parameter in clf.parameters():
            parameter.zero_()
    assert torch.equal(twin.attribute(clip, 1), expected)


# torch's compiler reads .grad of all its inputs
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.slow  # the first use of torch.compile takes many seconds
@pytest.mark.parametrize("name", ["videomae", "timesformer", "sdpa"])
def test_compiled_models(name):
    clf = tiny(name) if name in NAMES else own(name)
    clip = clip_for(clf)
    compiled = VideoClassifier(torch.compile(clf.module, backend="eager"), family=clf.family, image_size=SIZE)
    torch.testing.assert_close(compiled(clip), clf(clip))
    for kind in MODES:
        expected = STAA(clf, **MODES[kind]).attribute(clip, 1)
        torch.testing.assert_close(STAA(compiled, **MODES[kind]).attribute(clip, 1), expected, msg=kind)
    whole = torch.compile(clf, backend="eager")  # the classifier itself
    assert torch.isfinite(whole(clip)).all()


def test_additional_forward_args_reach_the_model():
    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.embed, self.blocks, self.inner = inner.embed, inner.blocks, inner  # where a family looks

        def forward(self, clip: Tensor, scale: Tensor | float = 1.0) -> Tensor:
            return self.inner(clip) * scale

    clf = own("sdpa")
    scaled = VideoClassifier(Scaled(clf.module), family=clf.family)
    clip = clip_for(clf)
    one, three = (STAA(scaled).attribute(clip, 1, additional_forward_args=(scale,)) for scale in (1.0, 3.0))
    torch.testing.assert_close(three, 3 * one)
    torch.testing.assert_close(one, STAA(clf).attribute(clip, 1))


@pytest.mark.parametrize("kind", ["attention", "chefer"])
def test_upsampling_and_focus(kind):
    clf = tiny("vivit")
    clip, options = clip_for(clf), MODES[kind]
    nearest = clf.layout.reduce(STAA(clf, **options, upsampling="nearest").attribute(clip, 1))
    smooth = STAA(clf, **options).attribute_maps(clip, 1).joint
    blocks = nearest.unflatten(1, (4, 2)).unflatten(3, (3, 8)).unflatten(5, (2, 8))  # (B, 4, 2, 3, 8, 2, 8)
    assert torch.equal(blocks, blocks[:, :, :1, :, :1, :, :1].expand_as(blocks))
    torch.testing.assert_close(nearest.sum((1, 2, 3)), smooth.sum((1, 2, 3)))
    focused = STAA(clf, **options, focus=Focus()).attribute_maps(clip, 1)
    torch.testing.assert_close(focused.joint, Focus()(smooth, (3, 9, 9)))
    torch.testing.assert_close(focused.temporal, focused.joint.sum((2, 3)))
