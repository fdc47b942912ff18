"""Models that do not take one 5-D clip: ``pack`` turns the plain clip into what they take.

The classifier with ``pack`` is compared with a module that a user would write by hand around the same network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import IntegratedGradients
from covering import in_one_case, over_values
from torch import Tensor, nn

from captum_staa import RISE, SpatioTemporalPerturbation, VideoClassifier, VideoFeatureAblation, VideoOcclusion, metrics

CLIP = torch.rand(2, 3, 8, 12, 12, generator=torch.Generator().manual_seed(1))  # BCTHW


class SlowFast(nn.Module):
    """Two pathways in a list: every fourth frame, and all frames."""

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.fast = nn.Conv3d(3, 4, 3, padding=1), nn.Conv3d(3, 2, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, pathways: list[Tensor]) -> Tensor:
        pooled = [net(x).relu().mean((2, 3, 4)) for net, x in zip((self.slow, self.fast), pathways, strict=True)]
        return self.head(torch.cat(pooled, 1))


class Masked(nn.Module):
    """A keyword for frames and one for a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.Conv3d(3, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, *, pixel_values: Tensor, padding_mask: Tensor) -> dict[str, Tensor]:
        features = self.net(pixel_values.transpose(1, 2)).relu().mean((3, 4))  # (B, C, T)
        return {"logits": self.head((features * padding_mask[:, None]).sum(2))}


class Folded(nn.Module):
    """TSN: frames in the batch axis, averaged at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, frames: Tensor) -> Tensor:
        return self.head(self.net(frames).relu().mean((2, 3))).unflatten(0, (-1, 8)).mean(1)


class Views(nn.Module):
    """mmaction2: (B, views, C, T, H, W), averaged over views."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.Conv3d(3, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, clips: Tensor) -> Tensor:
        scores = self.head(self.net(clips.flatten(0, 1)).relu().mean((2, 3, 4)))
        return scores.unflatten(0, clips.shape[:2]).mean(1)


class Two(nn.Module):
    """Two positional inputs: the clip and the differences of its frames."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.Conv3d(3, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, clips: Tensor, motion: Tensor) -> Tensor:
        return self.head((self.net(clips).relu().mean((2, 3, 4))) + self.net(motion).relu().mean((2, 3, 4)))


PACKS: dict[str, tuple[type[nn.Module], Callable[[Tensor], Any]]] = {
    "list of two pathways": (SlowFast, lambda clip: [clip[:, :, ::4], clip]),
    "keywords": (
        Masked,
        lambda clip: {"pixel_values": clip.transpose(1, 2), "padding_mask": torch.ones(len(clip), clip.shape[2])},
    ),
    "folded frames": (Folded, lambda clip: clip.transpose(1, 2).flatten(0, 1)),
    "views": (Views, lambda clip: torch.stack([clip, clip.flip(4)], 1)),
    "two arguments": (Two, lambda clip: (clip, clip.diff(dim=2, append=clip[:, :, -1:]))),
}


class ByHand(nn.Module):
    def __init__(self, net: nn.Module, pack: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.pack = net, pack

    def forward(self, clip: Tensor) -> Tensor:
        packed = self.pack(clip)
        if isinstance(packed, dict):
            return self.net(**packed)["logits"]
        return self.net(*packed) if isinstance(packed, tuple) else self.net(packed)


def both(name: str) -> tuple[VideoClassifier, nn.Module]:
    torch.manual_seed(0)
    kind, pack = PACKS[name]
    net = kind().eval()
    return VideoClassifier(net, layout="BCTHW", pack=pack), ByHand(net, pack)


METHODS: dict[str, Callable[[Any], Tensor]] = {
    "integrated gradients": lambda f: IntegratedGradients(f).attribute(CLIP, target=1, n_steps=4),
    "occlusion": lambda f: VideoOcclusion(f, "BCTHW").attribute(CLIP, (2, 6, 6), (2, 6, 6), target=1),
    "ablation": lambda f: VideoFeatureAblation(f, "BCTHW").attribute(
        CLIP, target=1, feature_mask=torch.arange(8).view(1, 1, 8, 1, 1)
    ),
    "RISE": lambda f: RISE(f, "BCTHW").attribute(CLIP, target=1, n_samples=6),
    "perturbation": lambda f: SpatioTemporalPerturbation(f, "BCTHW").attribute(CLIP, target=1, iterations=3),
    "insertion": lambda f: metrics.insertion(f, CLIP, CLIP, target=1, layout="BCTHW", cells=(2, 6, 6), steps=4).curve,
}


@over_values
@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("method", METHODS)
def test_a_packed_model_is_explained_as_the_wrapper_written_by_hand(name: str, method: str) -> None:
    clf, by_hand = both(name)
    assert torch.equal(clf(CLIP), by_hand(CLIP))
    found = METHODS[method](clf)
    assert bool(found.std() > 0)
    torch.testing.assert_close(found, METHODS[method](by_hand))


def test_grad_cam_reads_a_layer_of_a_packed_model() -> None:
    from captum_staa import GradCAM

    clf, by_hand = both("list of two pathways")
    found = GradCAM(clf, "fast").attribute(CLIP, target=1)
    torch.testing.assert_close(found, GradCAM(by_hand, "net.fast", layout="BCTHW").attribute(CLIP, target=1))


class Unpacks(SlowFast):
    def forward(self, pathways: list[Tensor]) -> Tensor:
        slow, fast = pathways
        return super().forward([slow, fast])


@pytest.mark.parametrize("make", [Unpacks, Masked])
def test_a_forgotten_pack_is_named(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"clip as one tensor, got .*shape \(1, 3, 8, .*pass pack="):
        VideoClassifier(make().eval(), layout="BCTHW")(CLIP[:1])


def test_a_pack_that_cuts_the_gradient_is_an_error() -> None:
    clf = VideoClassifier(
        SlowFast().eval(), layout="BCTHW", pack=lambda clip: [clip[:, :, ::4].detach(), clip.detach()]
    )
    assert clf(CLIP).shape == (2, 3)
    with pytest.raises(ValueError, match=r"pack must return.*differentiably.*detach"):
        IntegratedGradients(clf).attribute(CLIP, target=1, n_steps=2)
    with pytest.raises(TypeError, match="pack must be a function"):
        VideoClassifier(SlowFast(), layout="BCTHW", pack=[1])  # type: ignore[arg-type]


@in_one_case()
@pytest.mark.parametrize(
    ("shape", "layout", "advice", "wrong"),
    [
        ((3, 8, 32, 32), "BCTHW", r"inputs\.unsqueeze\(0\)\.$", "pack"),
        ((8, 3, 32, 32), "BTCHW", r"inputs\.unsqueeze\(0\)\.$", "pack"),
        ((1, 24, 32, 32), "BTCHW", r"folded.*pack=", "unsqueeze"),
        ((2, 24, 32, 32), "BCTHW", r"folded.*pack=", "unsqueeze"),
        ((1, 24, 32, 32), "BCTHW", r"unsqueeze\(0\) if it is one clip with 1 channel.*folded.*pack=", "views"),
        (
            (1, 6, 3, 8, 32, 32),
            "BCTHW",
            r"views or crops.*inputs\[:, 0\].*pack=lambda clip: clip\[:, None\]",
            "unsqueeze",
        ),
    ],
)
def test_inputs_of_another_rank_get_advice_for_their_rank(
    shape: tuple[int, ...], layout: str, advice: str, wrong: str
) -> None:
    with pytest.raises(ValueError, match=advice) as caught:
        VideoOcclusion(lambda x: x.flatten(1).sum(1, keepdim=True), layout).attribute(torch.rand(shape), (1, 8, 8))
    assert wrong not in str(caught.value)
