"""A model that cannot be differentiated is an error that names the module and the methods that need no gradient."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import Saliency
from covering import in_one_case
from torch import Tensor, nn

from captum_staa import STAA, GradCAM, SpatioTemporalPerturbation, VideoClassifier, VideoOcclusion
from captum_staa._utils.networks import lost_gradient
from captum_staa.benchmark import PlantedClips

CLIP = torch.rand(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class Adds(nn.Module):
    """A residual block, with or without an operation in place on a value that its ReLU needs."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.relu, self.second = nn.Conv3d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv3d(3, 3, 3, padding=1)
        self.head, self.in_place = nn.Linear(3, 3), in_place

    def forward(self, clip: Tensor) -> Tensor:
        shortcut = self.relu(self.first(clip))
        branch = self.second(shortcut).relu()
        if self.in_place:
            shortcut += branch
        else:
            shortcut = shortcut + branch
        return self.head(shortcut.mean((2, 3, 4)))


CALLS: dict[str, Callable[[Any], Any]] = {
    "GradCAM": lambda f: GradCAM(f, "first", layout="BCTHW").attribute(CLIP, target=1),
    "perturbation": lambda f: SpatioTemporalPerturbation(f, "BCTHW").attribute(CLIP, target=1, iterations=2),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_operation_in_place_is_explained_and_the_model_restored(name: str) -> None:
    model = Adds(in_place=True)
    with pytest.raises(ValueError, match=r"module 'relu' \(ReLU\) is changed.*x = x \+ y.*VideoOcclusion"):
        CALLS[name](model)
    assert model.training and not model.relu._forward_hooks
    torch.testing.assert_close(
        VideoOcclusion(model, "BCTHW").attribute(CLIP, (2, 4, 4), (2, 4, 4), target=1),
        VideoOcclusion(Adds(in_place=False), "BCTHW").attribute(CLIP, (2, 4, 4), (2, 4, 4), target=1),
    )


def test_other_runtime_errors_pass_unchanged() -> None:
    class Fails(Adds):
        def forward(self, clip: Tensor) -> Tensor:
            raise RuntimeError("out of paper")

    with pytest.raises(RuntimeError, match="out of paper"):
        CALLS["perturbation"](Fails(in_place=False))


class Rounds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.round()


class Detaches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


@pytest.mark.parametrize("broken", [Rounds, Detaches])
def test_the_module_in_which_the_gradient_is_lost_is_named(broken: type[nn.Module]) -> None:
    net = nn.Sequential(nn.Conv3d(3, 3, 1), nn.ReLU(), broken(), nn.Flatten(), nn.LazyLinear(3)).eval()
    net(CLIP)
    leaf = CLIP.clone().requires_grad_()
    assert lost_gradient(net, lambda: net(leaf)) == f"The gradient is lost in module '2' ({broken.__name__})."
    if broken is Detaches:
        with pytest.raises(ValueError, match=r"RISE\. The gradient is lost in module '2' \(Detaches\)"):
            SpatioTemporalPerturbation(net, "BCTHW").attribute(CLIP, target=1, iterations=2)
        with pytest.raises(ValueError, match=r"layer '0'.*lost in module '2' \(Detaches\)"):
            GradCAM(net, "0", layout="BCTHW").attribute(CLIP, target=1)


QUANTIZED = {  # layers whose gradient is zero, and the first module that is named
    "all": ({nn.Linear}, "videomae.encoder.layer.0.attention.attention.key"),
    # the head has a gradient, and residual connections pass the quantized layer by
    "one in a residual branch": (
        {"videomae.encoder.layer.0.intermediate.dense"},
        "videomae.encoder.layer.0.intermediate.dense",
    ),
}


@in_one_case()
@pytest.mark.filterwarnings("ignore")  # torch deprecates quantize_dynamic, and warns about missing backward passes
@pytest.mark.parametrize("layers", QUANTIZED)
def test_a_quantized_model_is_an_error_of_gradients_and_works_without_them(layers: str) -> None:
    plain = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    clip, label, _ = PlantedClips(seed=12, n=4)[:1]
    which, name = QUANTIZED[layers]
    quantized = torch.ao.quantization.quantize_dynamic(plain.module, which, dtype=torch.qint8)
    clf = VideoClassifier(quantized)
    gradient_methods: list[Callable[[], Any]] = [
        lambda: STAA(clf).attribute(clip, target=label),
        lambda: STAA(clf, rule="chefer").attribute(clip, target=label),
        lambda: SpatioTemporalPerturbation(clf).attribute(clip, target=label, iterations=2),
        lambda: GradCAM(clf, "videomae.embeddings.patch_embeddings").attribute(clip, target=label),
        lambda: Saliency(clf).attribute(clip, target=label),
    ]
    for call in gradient_methods:
        with pytest.raises(ValueError, match=rf"without a backward pass.*{re.escape(name)}' \(Linear\).*RISE"):
            call()
    ours, full = (STAA(each, mode="attention").attribute(clip).flatten() for each in (clf, plain))
    assert float(torch.corrcoef(torch.stack([ours, full]))[0, 1]) > 0.95


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_layer_before_the_layer_of_grad_cam_does_not_matter() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(8, 8), nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()
    )
    quantized = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    found = GradCAM(quantized, "1", "BCTHW", upsampling="nearest").attribute_maps(CLIP, target=1).joint
    with torch.no_grad():
        values = quantized[:3](CLIP)[:, 1]  # the gradient is the same everywhere
    torch.testing.assert_close(found.sum((1, 2, 3)), values.mean((1, 2, 3)))


def test_the_last_module_is_named_if_the_gradient_is_lost_between_modules():
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)).round()

    model = Rounded()
    found = lost_gradient(model, lambda: model(torch.rand(1, 2).requires_grad_()))
    assert found == "The last module with a gradient is 'second' (Linear)."
