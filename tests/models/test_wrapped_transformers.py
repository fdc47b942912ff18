"""A known transformer inside another module: found, explained through the wrapper, with the wrapper's outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from covering import in_one_case
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VivitConfig, VivitModel

from captum_staa import STAA, VideoClassifier, attr
from captum_staa.models import FAMILIES

SIZES: dict[str, Any] = {
    "image_size": 16, "num_frames": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip
CLIP = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def whole() -> VideoMAEForVideoClassification:
    torch.manual_seed(0)
    config = VideoMAEConfig(**SIZES, patch_size=4, num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    model = VideoMAEForVideoClassification(config).eval()
    with torch.no_grad():  # attention of a fresh model is almost uniform
        for name, parameter in model.named_parameters():
            if "query" in name or "key" in name or "q_proj" in name or "k_proj" in name:
                parameter.mul_(10)
    return model


class Lightning(nn.Module):
    """A training module that holds the model, as a LightningModule does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, nn.CrossEntropyLoss()

    def forward(self, clip: Tensor) -> Any:
        return self.model(clip).logits


class Permuting(nn.Module):
    """A wrapper that takes channels first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, clip: Tensor) -> Tensor:
        return self.model(pixel_values=clip.transpose(1, 2)).logits * 2


WRAPPERS: dict[str, Any] = {
    "lightning": Lightning,
    "parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled inside": lambda model: Lightning(torch.compile(model, backend="eager")),  # type: ignore[arg-type]
    "twice": lambda model: nn.Sequential(Lightning(model)),
}
OPTIONS: dict[str, dict[str, Any]] = {"attention": {"mode": "attention"}, "relevance": {}, "Chefer": {"rule": "chefer"}}


@in_one_case("options")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_wrapped_transformer_has_the_map_and_the_logits_of_the_transformer(wrapper: str, options: str) -> None:
    model = whole()
    clf = VideoClassifier(WRAPPERS[wrapper](model))
    assert clf.transformer is model
    assert clf.labels == ["a", "b", "c"]
    expected = STAA(model, **OPTIONS[options]).attribute_maps(CLIP, target=1)
    found = STAA(clf, **OPTIONS[options]).attribute_maps(CLIP, target=1)
    torch.testing.assert_close(found.joint, expected.joint)
    torch.testing.assert_close(found.logits, expected.logits)


def test_the_layout_of_a_wrapper_is_verified_and_maps_are_permuted() -> None:
    model = whole()
    with pytest.raises(ValueError, match=r"layout must be the order.*'model'.*Pass another layout"):
        STAA(VideoClassifier(Permuting(model), layout="BTCHW")).attribute(CLIP, target=1)
    clf = VideoClassifier(Permuting(model), layout="BCTHW")
    found = STAA(clf).attribute(CLIP.transpose(1, 2), target=1)
    # twice the logits have twice the relevance
    torch.testing.assert_close(found, 2 * STAA(model).attribute(CLIP, target=1).transpose(1, 2))


class OwnHead(nn.Module):
    def __init__(self, backbone: nn.Module, read: str) -> None:
        super().__init__()
        self.backbone, self.head, self.read = backbone, nn.Linear(16, 3), read

    def forward(self, clip: Tensor) -> Tensor:
        tokens = self.backbone(clip).last_hidden_state
        weights = torch.linspace(0, 1, tokens.shape[1])[:, None]
        pooled = {"mean": tokens.mean(1), "cls": tokens[:, 0], "weighted": (weights * tokens).mean(1)}[self.read]
        return self.head(pooled)


def test_a_backbone_with_an_own_mean_head_has_the_map_of_the_same_model_with_its_own_head() -> None:
    model = whole()
    own = OwnHead(model.videomae, "mean").eval()

    class Same(nn.Module):  # fc_norm and classifier in front of the same backbone
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.norm, self.head = model.videomae, model.fc_norm, model.classifier

        def forward(self, clip: Tensor) -> Tensor:
            return self.head(self.norm(self.backbone(clip).last_hidden_state.mean(1)))

    for options in OPTIONS.values():
        expected = STAA(model, **options).attribute_maps(CLIP, target=1)
        found = STAA(VideoClassifier(Same().eval()), **options).attribute_maps(CLIP, target=1)
        torch.testing.assert_close(found.joint, expected.joint)
        torch.testing.assert_close(found.logits, expected.logits)
    named = STAA(VideoClassifier(own, family=FAMILIES["videomae"]), mode="attention").attribute(CLIP)
    torch.testing.assert_close(named, STAA(VideoClassifier(own), mode="attention").attribute(CLIP))
    frames = STAA(VideoClassifier(own), mode="attention").attribute_temporal(CLIP)
    torch.testing.assert_close(frames, STAA(model, mode="attention").attribute_temporal(CLIP))


def test_what_the_head_reads_is_measured_and_an_unusual_head_is_discovered() -> None:
    torch.manual_seed(0)
    config = VivitConfig(**SIZES, tubelet_size=[2, 4, 4])
    backbone = VivitModel(config, add_pooling_layer=False).eval()
    by_class_token = VideoClassifier(OwnHead(backbone, "cls").eval())
    rows = STAA(by_class_token, mode="attention", layers=[-1]).attribute_maps(CLIP).joint
    assert bool((rows.flatten(1).sum(1) < 1).all())  # the class token's attention on itself is not on a pixel
    weighted = VideoClassifier(OwnHead(backbone, "weighted").eval())
    found = STAA(weighted, mode="attention").attribute(CLIP)
    weights = torch.linspace(0, 1, 33) / torch.linspace(0, 1, 33).sum()
    assert weighted.family is not None
    stated = VideoClassifier(weighted.module, family=replace(weighted.family, pooling=lambda model: weights))
    torch.testing.assert_close(found, STAA(stated, mode="attention").attribute(CLIP))
    relevance = STAA(weighted).attribute(CLIP, target=1)
    torch.testing.assert_close(relevance, STAA(stated).attribute(CLIP, target=1))


@pytest.mark.filterwarnings("ignore")  # torch deprecates quantize_dynamic, and warns about missing backward passes
def test_what_a_quantized_head_reads_is_asked_for() -> None:
    model = OwnHead(whole().videomae, "mean").eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, {"head"}, dtype=torch.qint8)
    with pytest.raises(ValueError, match=r"head without a gradient.*pooling=lambda model: 'mean'"):
        STAA(VideoClassifier(quantized), mode="attention").attribute(CLIP)
    expected = VideoClassifier(model)
    families = [FAMILIES["videomae"], expected.family]
    stated = [replace(family, pooling=lambda model: "mean") for family in families if family]
    backbone = torch.ao.quantization.quantize_dynamic(
        model, {"backbone.encoder.layer.1.intermediate.dense"}, dtype=torch.qint8
    )
    ways = [*(VideoClassifier(quantized, family=family) for family in stated), VideoClassifier(backbone)]
    maps = STAA(expected, mode="attention").attribute(CLIP)
    assert len(ways) == 3
    for clf in ways:  # the quantized layers are after the attention of all blocks
        torch.testing.assert_close(STAA(clf, mode="attention").attribute(CLIP), maps)


def test_two_transformers_in_one_module_are_not_guessed() -> None:
    class TwoStreams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rgb, self.flow = whole(), whole()

        def forward(self, clip: Tensor) -> Tensor:
            return self.rgb(clip).logits + self.flow(clip).logits

    clf = VideoClassifier(TwoStreams().eval(), layout="BTCHW")
    assert clf.family is None
    with pytest.raises(ValueError, match="run side by side"):
        STAA(clf, mode="attention").attribute(CLIP)
    # both streams read the clip, so relevance is that of the pixels, and not of one of the two patch embeddings
    pixels = replace(FAMILIES["videomae"], patch_embedding=None)
    one, other = (
        STAA(VideoClassifier(stream, family=pixels), pattern_weight=0).attribute(CLIP, target=1)
        for stream in (clf.module.rgb, clf.module.flow)
    )
    torch.testing.assert_close(STAA(clf, pattern_weight=0).attribute(CLIP, target=1), one + other)


def test_a_family_of_ours_on_a_module_without_such_a_model_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"VideoMAEForVideoClassification.*no \.config.*models\.Family"):
        VideoClassifier(nn.Linear(2, 2), layout="BTCHW", family=FAMILIES["videomae"])


def test_an_adapted_model_is_explained_with_its_adapters() -> None:
    class Lora(nn.Module):  # as peft replaces a linear layer
        def __init__(self, base_layer: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base_layer
            self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.up(self.down(x))

    class Peft(nn.Module):  # PeftModel.forward takes and passes on any argument
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.base_model = nn.Module()
            self.base_model.model = model

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.base_model.model(*args, **kwargs)

    model = whole()
    plain = STAA(model).attribute_maps(CLIP, target=1)
    for layer in model.videomae.encoder.layer:
        layer.attention.attention.value = Lora(layer.attention.attention.value)
    adapted = VideoClassifier(Peft(model).eval())
    found = STAA(adapted).attribute_maps(CLIP, target=1)
    assert not torch.allclose(found.logits, plain.logits)
    torch.testing.assert_close(found.logits, model(CLIP).logits.detach())
    torch.testing.assert_close(found.joint, STAA(model).attribute_maps(CLIP, target=1).joint)
    assert (
        attr.GradCAM(adapted, "base_model.model.videomae.encoder.layer.1.layernorm_before")
        .attribute(CLIP, target=1)
        .shape
        == CLIP.shape
    )
