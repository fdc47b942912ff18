"""A capture leaves nothing behind, however it ends."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from capture_readings import READINGS, Boom, boom, layers_of, read
from covering import over_values
from tiny_models import (
    classifier,
    clip_for,
    own,
    snapshot,
    tiny,
)
from torch import Tensor, nn

from captum_staa import STAA, VideoClassifier
from captum_staa.attention.capture import capture
from captum_staa.models import AttentionLayer


@over_values
@pytest.mark.parametrize("end", ["success", "stop", "model raises", "reader raises", "layer missing", "never run"])
@pytest.mark.parametrize("name", ["videomae", "timesformer", "vivit", "vjepa2", "videoprism", "sdpa", "mha"])
def test_model_is_restored_after_a_capture(name, end):
    clf = classifier(name)
    clip, layers = clip_for(clf), layers_of(clf)
    parameters = list(clf.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    clf.module.get_submodule(layers[0].module).training = True
    if name in ("videomae", "vivit"):
        clf.module.config.output_hidden_states = True  # transformers' own collector runs, too
        clf(clip)
    before, global_stance = snapshot(clf), torch._dynamo.eval_frame._stance
    plain = clf(clip)
    bad = [*layers, AttentionLayer("head.nowhere", 99)] if end == "layer missing" else layers
    reader = boom if end == "reader raises" else READINGS["head_mean"]
    handle = clf.module.get_submodule(layers[-1].module).register_forward_pre_hook(boom)
    if end != "model raises":
        handle.remove()
    errors = {"model raises": Boom, "reader raises": Boom, "layer missing": ValueError, "never run": ValueError}
    reached = False
    try:
        with capture(clf.module, bad, reader, stop=end == "stop") as readings:
            if end != "never run":
                clf(clip)
                reached = True
    except (Boom, ValueError) as error:
        raised: type | None = type(error)
    else:
        raised = None
        assert list(readings) == layers
    assert raised is errors.get(end)
    assert reached == (end == "success")
    handle.remove()
    assert snapshot(clf) == before
    assert torch._dynamo.eval_frame._stance is global_stance
    torch.testing.assert_close(clf(clip), plain, rtol=0, atol=0)
    again, _ = read(clf, clip)  # and a next capture works
    torch.testing.assert_close(again, plain, rtol=0, atol=1e-5)


def test_stop_ends_the_forward_after_the_last_layer():
    clf = tiny("videomae")
    ran: list[str] = []
    for i, layer in enumerate(clf.module.videomae.encoder.layer):
        layer.output.register_forward_hook(lambda *_, i=i: ran.append(f"mlp {i}"))
    clf.module.classifier.register_forward_hook(lambda *_: ran.append("head"))
    with torch.no_grad(), capture(clf.module, layers_of(clf)[:1], READINGS["row"], stop=True) as readings:
        clf(clip_for(clf))
    assert ran == [] and len(readings) == 1
    with torch.no_grad(), capture(clf.module, layers_of(clf)[1:], READINGS["row"], stop=True):
        clf(clip_for(clf))
    assert ran == ["mlp 0"]


def test_model_that_catches_exceptions_does_not_catch_the_stop():
    class Careful(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, clip: Tensor) -> Tensor:
            try:
                return self.inner(clip)
            except Exception:
                return torch.zeros(1, 3)

    clf = own("sdpa")
    layer = AttentionLayer("inner.blocks.1.attn", 1)
    with torch.no_grad(), capture(Careful(clf.module), [layer], READINGS["row"], stop=True) as readings:
        Careful(clf.module)(clip_for(clf))
    # another module than the captured one wraps it: the layer is found all the same, and has been read
    assert list(readings) == [layer]


def test_stopped_forward_keeps_no_activation_alive():
    """The exception that ends it knows the frames, and the frames the activations: nothing may hold on to it."""
    clf = VideoClassifier.from_pretrained("tiny-vivit-pattern")
    seen = []
    handle = clf.module.vivit.embeddings.register_forward_hook(lambda m, a, out: seen.append(weakref.ref(out)))
    gc.collect()
    gc.disable()
    try:
        STAA(clf, mode="attention", layers=[-1]).attribute(torch.zeros(1, 16, 3, 48, 48))
        assert seen[0]() is None
    finally:
        gc.enable()
        handle.remove()
