"""Compiled and traced classifiers: equal numbers, and methods still recognize them as classifiers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from branched_models import taught
from tiny_models import SIZE, clip_for, own, randomize, tiny
from torch import Tensor, nn
from undeclared_models import PlainViT, clip_of

from captum_staa import STAA, GradCAM, VideoClassifier
from captum_staa.models import STABN
from captum_staa.models.classifier import classifier_of
from captum_staa.models.layers import find_layer
from captum_staa.models.resnet3d import ResNet3D

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def _compiling() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def resnet() -> tuple[VideoClassifier, Tensor]:
    clip = torch.randn(2, 3, 4, 12, 12, generator=torch.Generator().manual_seed(1))
    return VideoClassifier(randomize(ResNet3D(3, width=4, num_frames=4), 0), "BCTHW", num_frames=4), clip


def test_classifier_of_unwraps_compiled_classifiers():
    clf = resnet()[0]
    assert classifier_of(clf) is clf and classifier_of(compiled(clf)) is clf
    for other in (clf.module, compiled(clf.module), lambda clip: clip, None):
        assert classifier_of(other) is None


def test_find_layer_uses_names_of_the_network():
    clf = resnet()[0]
    for model in (clf, compiled(clf), compiled(clf.module), VideoClassifier(compiled(clf.module), "BCTHW")):
        assert find_layer(model, "stem") == (clf.module.stem, "stem")
        assert find_layer(model, clf.module.stages[1]) == (clf.module.stages[1], "stages.1")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("videomae", "trace"),
        ("resnet3d", "trace"),
        ("videomae", "compile"),
        pytest.param("resnet3d", "compile", marks=pytest.mark.slow),
    ],
)
def test_compiled_and_traced_logits_and_gradients(name, how, request):
    """VideoMAE takes frames first. Its clips, and their gradients, have channels first here."""
    if (name, how) == ("videomae", "compile") and torch.__version__.startswith("2.6."):
        request.applymarker(pytest.mark.xfail(reason="torch 2.6 cannot compile VideoMAE of transformers"))
    clf, clip = resnet()
    if name == "videomae":
        clf = VideoClassifier(tiny("videomae").module, "BCTHW", image_size=SIZE)
        clip = clip_for(clf)
    fast = torch.jit.trace(clf, clip, check_trace=False) if how == "trace" else torch.compile(clf, backend="aot_eager")
    torch.testing.assert_close(fast(clip), clf(clip), atol=1e-5, rtol=1e-5)
    leaf = clip.clone().requires_grad_()
    gradient, expected = (torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)[0] for model in (fast, clf))
    assert gradient.is_contiguous() and gradient.abs().max() > 0
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["videomae", "sdpa"])
def test_staa_of_a_compiled_classifier(name):
    clf = tiny(name) if name == "videomae" else own(name)
    clip = clip_for(clf)
    assert torch.equal(STAA(compiled(clf)).attribute(clip, 1), STAA(clf).attribute(clip, 1))


def test_grad_cam_finds_layers_of_a_compiled_classifier():
    clf, clip = resnet()
    attributions = GradCAM(compiled(clf), "stem").attribute(clip, [0, 2])
    torch.testing.assert_close(attributions, GradCAM(clf, "stem").attribute(clip, [0, 2]))


def test_grad_cam_finds_the_grid_of_a_compiled_classifier():
    clf = tiny("videomae")
    clip, layer = clip_for(clf), "videomae.encoder.layer.0.layernorm_before"
    method = GradCAM(compiled(clf), layer)
    assert method.grid == clf.grid
    torch.testing.assert_close(method.attribute(clip, 1), GradCAM(clf, layer).attribute(clip, 1))


def test_inject_changes_the_classifier_inside_the_compiled_model():
    clf, clip = resnet()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = taught(STABN.inject(clf, "stages.0"))
    answer = expected(clip)
    expected.remove()
    whole = compiled(clf)
    st_abn = STABN.inject(whole, "stages.0")
    st_abn.load_state_dict(expected.state_dict())
    assert st_abn.model is clf and torch.equal(st_abn(clip), answer) and st_abn.remove() is whole


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["trace", "export"])
def test_a_module_that_was_made_for_one_number_of_clips_is_named(how):
    with torch.random.fork_rng():
        model, clip = PlainViT().eval(), clip_of("BCTHW")
    made = torch.jit.trace(model, clip) if how == "trace" else torch.export.export(model, (clip,)).module()
    clf = VideoClassifier(made, "BCTHW")
    torch.testing.assert_close(clf(clip), model(clip))
    with pytest.raises(ValueError, match=r"(?s)traced or exported.*shape \(1, 3, 8, 24, 16\).*Pass the module itself"):
        STAA(clf, mode="attention").attribute(clip)
