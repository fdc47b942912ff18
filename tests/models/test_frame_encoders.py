"""2D encoders on frames folded into the batch: attention within frames times what time takes of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import transformers
from tiny_models import randomize
from torch import Tensor, nn
from undeclared_models import clip_of

from captum_staa import STAA, VideoClassifier, models
from captum_staa.attention.decomposition import decompose

WIDTH, FRAMES = 32, 8
SMALL: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 24, "patch_size": 8,
    "attn_implementation": "eager",
}  # fmt: skip
CLIP = clip_of("BTCHW", size=(FRAMES, 24, 24))


class Case(NamedTuple):
    """An image encoder, how it is read in each frame, how frames are pooled, and its tokens without pixels."""

    name: str
    read: str
    over_time: str
    prefix: int


CASES = [
    Case("CLIP", "cls", "transformer", 1),
    Case("DINOv2 with registers", "mean", "mean", 3),
    Case("ViT", "cls", "lstm", 1),
    Case("ViT", "mean", "lstm", 1),
    Case("SigLIP", "query", "mean", 0),
    Case("SigLIP", "query", "lstm", 0),
    Case("SigLIP", "query", "transformer", 0),
]


def encoder(name: str) -> nn.Module:
    t, mlp = transformers, {"intermediate_size": 48}
    if name == "CLIP":
        return t.CLIPVisionModel(t.CLIPVisionConfig(**SMALL, **mlp))
    if name == "SigLIP":
        return t.SiglipVisionModel(t.SiglipVisionConfig(**SMALL, **mlp))
    if name == "ViT":
        return t.ViTModel(t.ViTConfig(**SMALL, **mlp), add_pooling_layer=False)
    return t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**SMALL, num_register_tokens=2))


class Frames(nn.Module):
    """(B, T, C, H, W): an image encoder on each frame, and a mean, an LSTM or a transformer over time."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.encoder, self.read, self.over_time = encoder(case.name), case.read, case.over_time
        self.head, self.positions = nn.Linear(WIDTH, 3), nn.Parameter(torch.zeros(1, FRAMES, WIDTH))
        if case.over_time == "lstm":
            self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        if case.over_time == "transformer":
            self.layers = nn.ModuleList(
                nn.TransformerEncoderLayer(WIDTH, 2, 48, batch_first=True, norm_first=True) for _ in range(2)
            )

    def forward(self, clip: Tensor) -> Tensor:
        returned = self.encoder(clip.flatten(0, 1))
        tokens = returned.last_hidden_state
        frames = {"cls": lambda: tokens[:, 0], "mean": lambda: tokens.mean(1), "query": lambda: returned.pooler_output}
        return self.of_frames(frames[self.read]().unflatten(0, (len(clip), -1)))

    def of_frames(self, frames: Tensor) -> Tensor:
        if self.over_time == "lstm":
            return self.head(self.lstm(frames)[0][:, -1])
        if self.over_time == "transformer":
            frames = frames + self.positions
            for layer in self.layers:
                frames = layer(frames)
        return self.head(frames.mean(1))


def of_time(model: Frames, frames: Tensor) -> Tensor:
    """Return what the temporal part takes from each frame, ``(B, T)``."""
    if model.over_time == "lstm":
        found = [torch.autograd.functional.jacobian(model.of_frames, frames[n : n + 1])[0, :, 0] for n in range(2)]
        sizes = torch.stack([each.norm(dim=(0, 2)) for each in found])
        return sizes / sizes.sum(1, keepdim=True)
    weights = torch.full((len(frames), FRAMES), 1 / FRAMES)
    if model.over_time == "transformer":
        matrices, frames = [], frames + model.positions
        for layer in model.layers:
            normed = layer.norm1(frames)  # type: ignore[operator]
            matrices.append(layer.self_attn(normed, normed, normed)[1])  # type: ignore[operator]
            frames = layer(frames)
        for matrix in reversed(matrices):
            weights = (weights + (weights[:, None] @ matrix)[:, 0]) / 2
    return weights


def slow(model: Frames, case: Case) -> Tensor:
    """Return the weight of each patch, ``(B, T, 3, 3)``."""
    returned = model.encoder(CLIP.flatten(0, 1), output_attentions=True)
    tokens = returned.last_hidden_state
    frames = {"cls": tokens[:, 0], "mean": tokens.mean(1), "query": returned.pooler_output}[case.read]
    of_frames = of_time(model, frames.unflatten(0, (2, -1))).flatten()  # (B * T,)
    within = torch.zeros(len(tokens), tokens.shape[1])
    within[:, 0] = 1
    if case.read == "mean":
        within[:] = 1 / tokens.shape[1]
    if case.read == "query":
        head = model.encoder.head  # type: ignore[union-attr]
        within = head.attention(head.probe.expand(len(tokens), -1, -1), tokens, tokens)[1][:, 0]  # type: ignore
        if case.over_time != "mean":
            within = within / 2  # the other half stays with the query, which is the token of a frame
    weights = within * of_frames[:, None]
    for matrix in reversed(returned.attentions):
        weights = (weights + (weights[:, None] @ matrix.mean(1))[:, 0]) / 2
    return weights[:, case.prefix :].detach().view(2, FRAMES, 3, 3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}, {case.read}, {case.over_time}")
def test_attention_within_a_frame_is_multiplied_by_what_time_takes_from_it(case: Case) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomize(Frames(case), 0, 0.2)
    clf = VideoClassifier(model, layout="BTCHW")
    report = models.inspect(clf, CLIP)
    assert report.ok and report.forwards <= 40 and report.patch_embedding is not None
    found = STAA(clf, mode="attention", upsampling="nearest").attribute_maps(CLIP).joint
    expected = slow(clf.module, case)
    torch.testing.assert_close(found, torch.kron(expected, torch.ones(1, 1, 8, 8)) / 64, rtol=1e-3, atol=1e-7)
    assert expected.std() > 0.1 * expected.mean()


def test_relevance_of_a_frame_encoder_sums_to_the_score_and_has_the_sums_of_its_tokens() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomize(Frames(CASES[0]), 0, 0.2).double()
    clf, clip = VideoClassifier(model, layout="BTCHW"), CLIP.double()
    embedding = model.encoder.get_submodule(models.inspect(clf, clip).patch_embedding.removeprefix("encoder."))  # type: ignore
    exact = decompose(clf, clip, lambda outputs: outputs[:, 1] - outputs[:, [0, 2]].mean(1), tokens=embedding)
    assert exact.nonlinear == () and float(exact.remainder.abs().max()) < 1e-10
    joint = STAA(clf, pattern_weight=0).attribute_maps(clip, 1).joint
    torch.testing.assert_close(
        joint.sum((1, 2, 3)).double(), exact.contributions.reshape(2, -1).sum(1), rtol=1e-4, atol=1e-6
    )
