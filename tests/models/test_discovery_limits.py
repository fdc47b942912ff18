"""What an inspection cannot verify is refused with the way out; unusual transformers that it can verify."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from covering import in_one_case
from tiny_models import randomize
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from undeclared_models import WIDTH, Block, Explicit, FrameEncoder, Fused, PlainViT, clip_of

from captum_staa import STAA, TokenGrid, VideoClassifier, models
from captum_staa.attention.decomposition import class_contrast, decompose

GRID = TokenGrid(4, 3, 2, 1, tubelet=(2, 8, 8))
WAY_OUT = "GradCAM, RISE, VideoOcclusion and SpatioTemporalPerturbation work with any network"


def classifier(model: nn.Module, layout: str = "BCTHW") -> VideoClassifier:
    return VideoClassifier(randomize(model, 0, 0.2), layout=layout)


class Cnn(nn.Module):
    """Convolutions, and a softmax over channels that is not attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv3d(3, 8, 3), nn.Linear(8, 3)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.conv(clip).relu()
        return self.head((x * x.mean((2, 3, 4), keepdim=True).softmax(1)).mean((2, 3, 4)))


class DeepStem(PlainViT):
    """Convolutions that mix many blocks before the first attention."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(*(nn.Conv3d(3, 3, 5, padding=2) for _ in range(6)))

    def stem(self, clip: Tensor) -> Tensor:
        return super().stem(self.convs(clip))


class Crops(PlainViT):
    def stem(self, clip: Tensor) -> Tensor:
        return super().stem(clip[..., 8:-8, 8:-8])


class Text(nn.Module):
    """Attention among words, beside a convolution of the clip."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.block = nn.Parameter(torch.zeros(1, 6, WIDTH)), Block("fused")
        self.conv, self.head = nn.Conv3d(3, WIDTH, 3), nn.Linear(WIDTH, 3)

    def forward(self, clip: Tensor) -> Tensor:
        return self.head(self.conv(clip).mean((2, 3, 4)) + self.block(self.words).mean(1))


class SortsTokens(PlainViT):
    """The place of a token depends on its content."""

    def stem(self, clip: Tensor) -> Tensor:
        x = super().stem(clip)
        return x.gather(1, x.norm(dim=-1).argsort(1)[..., None].expand_as(x))


class DropsTokens(PlainViT):
    """Tokens are pruned by their content between the blocks."""

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            best = x[:, 1:].norm(dim=-1).topk(x.shape[1] - 3, 1).indices
            x = torch.cat([x[:, :1], x[:, 1:].gather(1, best[..., None].expand(-1, -1, WIDTH))], 1)
        return x


class MaxPools(PlainViT):
    def pool(self, x: Tensor) -> Tensor:
        return x.amax(1)


class ReadsTwoLayers(PlainViT):
    def run(self, x: Tensor) -> Tensor:
        states = []
        for block in self.blocks:
            x = block(x)
            states.append(x)
        return x + states[-2].flip(1)


class Parallel(PlainViT):
    """Two attentions side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.other = Fused()

    def run(self, x: Tensor) -> Tensor:
        return self.blocks[2](x + self.blocks[0].attn(x) + self.other(x))


class WithoutGradient(PlainViT):
    def forward(self, clip: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(clip)


class ByHand(PlainViT):
    class Attention(Explicit):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.parts(x)
            scores = (q @ k.mT / 4).exp()
            return self.proj(((scores / scores.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2))

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].attn = self.Attention()


class MixesHeads(PlainViT):
    """CaiT and DeepViT: constants mix the heads of attention behind its softmax."""

    class Attention(Explicit):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.parts(x)
            pattern = torch.einsum("bhqk,hg->bgqk", (q @ k.mT / 4).softmax(-1), torch.tensor([[1, 0.5], [0, 1]]).to(q))
            return self.proj((pattern @ v).transpose(1, 2).flatten(2))

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.attn = self.Attention()


class LoopsOverClips(PlainViT):
    def forward(self, clip: Tensor) -> Tensor:
        return torch.cat([super(LoopsOverClips, self).forward(one[None]) for one in clip])


class MixesExamples(PlainViT):
    def stem(self, clip: Tensor) -> Tensor:
        x = super().stem(clip)
        return x - x.mean(0, keepdim=True) / 2


def with_attention(kind: type[Explicit]) -> Callable[[], PlainViT]:
    class Model(PlainViT):
        def __init__(self) -> None:
            super().__init__()
            for block in self.blocks:
                block.attn = kind()

    return Model


class TalkingHeads(Explicit):
    """DeepViT: heads are mixed behind the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        attn = torch.einsum("bhij,hg->bgij", (q @ k.mT / 4).softmax(-1), self.mix)
        return self.proj((attn @ v).transpose(1, 2).flatten(2))


class Strongest(Explicit):
    """Keeps the five strongest keys of each query, with a sum of 1."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        attn = (q @ k.mT / 4).softmax(-1)
        attn = attn * (attn >= attn.topk(5).values[..., -1:])
        return self.proj((attn / attn.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))


class OverQueries(Explicit):
    """Slot attention: the softmax is over queries."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        return self.proj(((q @ k.mT / 4).softmax(-2) @ v).transpose(1, 2).flatten(2))


class Sink(Explicit):
    """A key without a value takes a part of the softmax."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        scores = q @ k.mT / 4
        attn = torch.cat([scores, torch.zeros_like(scores[..., :1])], -1).softmax(-1)[..., :-1]
        return self.proj((attn @ v).transpose(1, 2).flatten(2))


class InChunks(Explicit):
    """Queries in chunks of nine, to save memory."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        parts = [(part @ k.mT / 4).softmax(-1) @ v for part in q.split(9, -2)]
        return self.proj(torch.cat(parts, 2).transpose(1, 2).flatten(2))


class MixesQueries(Explicit):
    """Queries are made of several tokens, so no layer at all can be read."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        attn = ((q + q.roll(5, 2) - q.roll(11, 2)) @ k.mT / 4).softmax(-1)
        return self.proj((attn @ v).transpose(1, 2).flatten(2))


CHANGED = r"multiplies the values in 'blocks\.0\.attn' is not the result of a softmax over keys"


@in_one_case()
@pytest.mark.parametrize(
    ("kind", "size", "words"),
    [
        (Cnn, (8, 24, 16), "no attention was found in Cnn"),
        (DeepStem, (8, 24, 16), "mixes pixels before its first attention"),
        (Crops, (8, 40, 32), r"not from the first pixel on\).*crops its clips"),
        (Text, (8, 24, 16), "no query, key or value depends on the pixels.*text"),
        (SortsTokens, (8, 24, 16), "places tokens by their content"),
        (DropsTokens, (8, 24, 16), r"at 'blocks\.1\.attn' (tokens are not on a regular|.*selected by their content)"),
        (with_attention(TalkingHeads), (8, 24, 16), CHANGED),
        (with_attention(Strongest), (8, 24, 16), CHANGED),
        (with_attention(OverQueries), (8, 24, 16), CHANGED),
        (with_attention(Sink), (8, 24, 16), CHANGED),
        (with_attention(MixesQueries), (8, 24, 16), r"at 'blocks\.0\.attn' tokens are not on a regular grid"),
        (with_attention(InChunks), (8, 24, 16), r"parts of 'blocks\.0\.attn' \(queries or heads\) run side by side"),
        (ReadsTwoLayers, (8, 24, 16), "also reads tokens of earlier layers"),
        (Parallel, (8, 24, 16), r"'blocks\.0\.attn' and 'other' run side by side"),
        (WithoutGradient, (8, 24, 16), "outputs have no gradient"),
        (ByHand, (8, 24, 16), r"attention of 'blocks\.1\.attn' cannot be read, because its softmax is written by hand"),
        (with_attention(ByHand.Attention), (8, 24, 16), r"'blocks\.0\.attn', 'blocks\.1\.attn', .* is written by hand"),
        (MixesHeads, (8, 24, 16), CHANGED),
        (MixesExamples, (8, 24, 16), "examples of a batch are not independent"),
        (LoopsOverClips, (8, 24, 16), "attention computations changes with the number of clips"),
    ],
)
def test_what_is_not_verified_is_refused_with_the_way_out(
    kind: Callable[[], nn.Module], size: tuple[int, int, int], words: str
) -> None:
    clf, clip = classifier(kind()), clip_of("BCTHW", size=size)
    name = type(clf.module).__name__
    report = models.inspect(clf, clip)
    assert not report.ok and "not verified" in str(report) and report.forwards <= 40
    with pytest.raises(ValueError, match=f"(?s)got {name}: .*{words}.*{WAY_OUT}"):
        STAA(clf, mode="attention").attribute(clip)
    with pytest.raises(ValueError, match=name):
        _ = report.family


@in_one_case()
@pytest.mark.parametrize(
    ("how", "where"), [("dropout", r" \(first in module 'blocks\.0\.norm1'\)"), ("routing", ""), ("memory", "")]
)
def test_a_forward_that_depends_on_chance_or_on_the_last_clip_is_an_error(how: str, where: str) -> None:
    class Chance(PlainViT):
        def stem(self, clip: Tensor) -> Tensor:
            x = super().stem(clip)
            if how == "memory":  # of the last clip
                self.last, last = x.detach().mean(0), getattr(self, "last", 0)
                return x + last
            return F.dropout(x, 0.1) if how == "dropout" else x[:, torch.randperm(24)]

    clf, clip = classifier(Chance()), clip_of("BCTHW")
    clf(clip[:1])  # a memory of this clip
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"same outputs for the same clip.*eval mode{where}.*Switch this off"):
        STAA(clf, mode="attention").attribute(clip)
    assert torch.equal(torch.get_rng_state(), state)


def test_relevance_needs_no_verified_attention() -> None:
    """The shares of tokens, or of pixels where no grid is found, are those of the decomposition."""
    kinds: list[tuple[Callable[[], nn.Module], str]] = [(ReadsTwoLayers, "tokens"), (Parallel, "tokens")]
    kinds += [
        (DeepStem, "pixels"),
        (with_attention(ByHand.Attention), "pixels"),
        (MixesHeads, "tokens"),
        (with_attention(Sink), "tokens"),
    ]
    kinds += [(with_attention(TalkingHeads), "tokens"), (with_attention(MixesQueries), "tokens")]
    for kind, where in kinds:
        clf, clip = classifier(kind().double()), clip_of("BCTHW").double()
        report = models.inspect(clf, clip)
        assert not report.ok and report.patch_embedding == ("embed" if where == "tokens" else None)
        joint = STAA(clf, pattern_weight=0).attribute_maps(clip, 1).joint
        embedding = clf.module.embed if where == "tokens" else None
        exact = decompose(clf, clip, lambda logits: class_contrast(logits, logits[:, 1]), tokens=embedding)
        torch.testing.assert_close(joint.sum((1, 2, 3)), exact.contributions.flatten(1).sum(1), rtol=1e-4, atol=1e-6)
        assert joint.std() > 0.01 * joint.abs().max()


# --- models that are verified -----------------------------------------------------------------------------------------


class Overlaps(PlainViT):
    """Overlapping blocks of 3 x 12 x 12 at steps of 2 x 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(3, WIDTH, (3, 12, 12), (2, 8, 8), (1, 5, 5))
        self.positions = nn.Parameter(torch.zeros(1, 1 + 4 * 8 * 8, WIDTH))


class Resizes(PlainViT):
    def stem(self, clip: Tensor) -> Tensor:
        return super().stem(F.interpolate(clip, size=(8, 24, 16), mode="nearest-exact"))


class ChannelsLast(PlainViT):
    """vit-pytorch: a linear layer of flattened patches, on axes (B, t, h, w, D)."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.embed = nn.Linear(conv.weight[0].numel(), WIDTH)  # type: ignore[assignment]
        self.embed.load_state_dict({"weight": conv.weight.detach().flatten(1), "bias": conv.bias.detach()})

    def stem(self, clip: Tensor) -> Tensor:
        cut = clip.unflatten(2, (4, 2)).unflatten(4, (3, 8)).unflatten(6, (2, 8))  # (B, C, t, 2, h, 8, w, 8)
        return self.embed(cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)).flatten(1, 3)


class Permutes(PlainViT):
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))

    def stem(self, clip: Tensor) -> Tensor:
        return super().stem(clip)[:, self.order]


class Rounds(PlainViT):
    def stem(self, clip: Tensor) -> Tensor:
        return super().stem((clip * 16).round() / 16)


class Windows(PlainViT):
    """Two windows of two time steps; every second block shifts them by one step."""

    def __init__(self) -> None:
        super().__init__(prefix=0, reads="mean")

    def run(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            y = x.unflatten(1, (4, 6)).roll(-(number % 2), 1).unflatten(1, (2, 2)).flatten(2, 3).flatten(0, 1)
            y = block(y).unflatten(0, (-1, 2)).unflatten(2, (2, 6)).flatten(1, 2)
            x = y.roll(number % 2, 1).flatten(1, 2)
        return x


class Hierarchy(PlainViT):
    """Swin: windows of 2 x 2 patches over all of time, shifted windows, then merged patches with joint attention."""

    def __init__(self) -> None:
        super().__init__(prefix=0, reads="mean")
        self.positions = nn.Parameter(torch.zeros(1, 64, WIDTH))
        self.merge = nn.Linear(4 * WIDTH, WIDTH)

    def run(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (4, 4, 4))  # (B, t, h, w, D)
        for shift, block in enumerate(self.blocks[:2]):
            y = x.roll((-shift, -shift), (2, 3)).unflatten(3, (2, 2)).unflatten(2, (2, 2))  # (B, t, H, 2, W, 2, D)
            y = block(y.permute(0, 2, 4, 1, 3, 5, 6).flatten(3, 5).flatten(0, 2))
            y = y.unflatten(0, (-1, 2, 2)).unflatten(3, (4, 2, 2)).permute(0, 3, 1, 4, 2, 5, 6)
            x = y.flatten(4, 5).flatten(2, 3).roll((shift, shift), (2, 3))
        x = x.unflatten(3, (2, 2)).unflatten(2, (2, 2)).permute(0, 1, 2, 4, 3, 5, 6).flatten(4)  # (B, t, 2, 2, 4 D)
        return self.blocks[2](self.merge(x).flatten(1, 3))


class Pads(PlainViT):
    """Windows of five patches over 24 padded to 25; what is padded is discarded."""

    def __init__(self) -> None:
        super().__init__(prefix=0, reads="mean")

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = F.pad(x, (0, 0, 0, 1)).unflatten(1, (5, 5)).flatten(0, 1)
            x = block(y).unflatten(0, (-1, 5)).flatten(1, 2)[:, :24]
        return x


class MeanOfFrames(FrameEncoder):
    """The mean of the patches of each frame, then a transformer over time."""

    def __init__(self) -> None:
        super().__init__("explicit", "transformer")

    def forward(self, clip: Tensor) -> Tensor:
        x = self.embed(clip.flatten(0, 1)).flatten(2).mT + self.positions[:, 1:]
        for block in self.blocks:
            x = block(x)
        x = x.mean(1).unflatten(0, (len(clip), -1)) + self.times
        for block in self.temporal:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class LateClass(PlainViT):
    """CaiT: the class token joins behind the first block, and alone is a query."""

    def __init__(self) -> None:
        super().__init__(prefix=0)
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))

    def run(self, x: Tensor) -> Tensor:
        x, cls = self.blocks[0](x), self.cls.expand(len(x), -1, -1)
        for block in self.blocks[1:]:
            q, k, v = block.attn.parts(block.norm1(torch.cat([cls, x], 1)))
            cls = cls + block.attn.proj(F.scaled_dot_product_attention(q[:, :, :1], k, v).transpose(1, 2).flatten(2))
        return cls


class Latents(PlainViT):
    """Perceiver: five latents read the patches, and then attend to each other."""

    def __init__(self) -> None:
        super().__init__(prefix=0, reads="mean")
        self.latents = nn.Parameter(torch.zeros(1, 5, WIDTH))

    def run(self, x: Tensor) -> Tensor:
        latents, attn = self.latents.expand(len(x), -1, -1), self.blocks[0].attn
        q, (_, k, v) = attn.parts(latents)[0], attn.parts(x)
        latents = latents + attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.blocks[2](self.blocks[1](latents))


class Strides(PlainViT):
    """The later blocks get every second patch."""

    def __init__(self) -> None:
        super().__init__(prefix=0, reads="mean")

    def run(self, x: Tensor) -> Tensor:
        return self.blocks[2](self.blocks[1](self.blocks[0](x)[:, 1::2]))


class MixesBetween(PlainViT):
    """A convolution over patches between the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            mixed = self.conv(x[:, 1:].mT.unflatten(2, (4, 3, 2))).flatten(2).mT
            x = torch.cat([x[:, :1], x[:, 1:] + mixed], 1)
        return x


class Checkpoints(PlainViT):
    """Recomputes its blocks in the backward, in eval mode, too."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def explicit(block: Any, x: Tensor) -> Tensor:
    return block.attn.explicit(block.norm1(x)).mean(1).detach()


def of_windows(model: Windows, x: Tensor) -> Tensor:
    weights, dense = torch.full((len(x), 24), 1 / 24), []
    for number, block in enumerate(model.blocks):
        order = torch.arange(24).view(4, 6).roll(-(number % 2), 0).view(2, 12)
        matrix, x = dense_of_groups(block, x, order)
        dense.append(matrix)
    for matrix in reversed(dense):
        weights = (weights + (weights[:, None] @ matrix)[:, 0]) / 2
    return weights


def dense_of_groups(block: Any, x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the dense matrix of attention within groups of tokens ``(R, n)``, and the tokens after the block."""
    matrix, after = torch.zeros(len(x), x.shape[1], x.shape[1]), x.clone()
    for group in groups:
        matrix[:, group[:, None], group] = explicit(block, x[:, group])
        after[:, group] = block(x[:, group])
    return matrix, after


def of_hierarchy(model: Hierarchy, x: Tensor) -> Tensor:
    places = torch.arange(64).view(4, 4, 4)
    windows = [
        torch.stack([rolled[:, i : i + 2, j : j + 2].flatten() for i in (0, 2) for j in (0, 2)])
        for rolled in (places, places.roll((-1, -1), (1, 2)))
    ]
    first, x = dense_of_groups(model.blocks[0], x, windows[0])
    second, x = dense_of_groups(model.blocks[1], x, windows[1])
    quads = torch.stack(
        [
            places[t, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten()
            for t in range(4)
            for i in range(2)
            for j in range(2)
        ]
    )
    third = explicit(model.blocks[2], model.merge(x[:, quads].flatten(2)))
    weights = torch.full((len(x), 16), 1 / 16)
    weights = (weights + (weights[:, None] @ third)[:, 0]) / 2
    fine = torch.zeros(len(x), 64)
    fine[:, quads.flatten()] = weights.repeat_interleave(4, 1) / 4
    for matrix in (second, first):
        fine = (fine + (fine[:, None] @ matrix)[:, 0]) / 2
    return fine


def of_pads(model: Pads, x: Tensor) -> Tensor:
    """What a token takes from padding goes to no pixel."""
    weights, dense = torch.full((len(x), 24), 1 / 24), []
    for block in model.blocks:
        matrix, after = dense_of_groups(block, F.pad(x, (0, 0, 0, 1)), torch.arange(25).view(5, 5))
        dense.append(matrix[:, :24, :24])
        x = after[:, :24]
    for matrix in reversed(dense):
        weights = (weights + (weights[:, None] @ matrix)[:, 0]) / 2
    return weights


def of_mean_of_frames(model: MeanOfFrames, clip: Tensor) -> Tensor:
    x = model.embed(clip.flatten(0, 1)).flatten(2).mT + model.positions[:, 1:]
    spatial = []
    for block in model.blocks:
        spatial.append(explicit(block, x).unflatten(0, (len(clip), 8)))
        x = block(x)
    x = x.mean(1).unflatten(0, (len(clip), -1)) + model.times
    weights, temporal = torch.full((len(clip), 8), 1 / 8), []
    for block in model.temporal:
        temporal.append(explicit(block, x))
        x = block(x)
    for matrix in reversed(temporal):
        weights = (weights + (weights[:, None] @ matrix)[:, 0]) / 2
    patches = (weights / 6)[:, :, None].expand(-1, -1, 6)
    for matrix in reversed(spatial):
        patches = (patches + (patches[:, :, None] @ matrix)[:, :, 0]) / 2
    return patches.flatten(1)


def of_late_class(model: LateClass, x: Tensor) -> Tensor:
    first = explicit(model.blocks[0], x)
    x, cls, matrices = model.blocks[0](x), model.cls.expand(len(x), -1, -1), []
    for block in model.blocks[1:]:
        tokens = block.norm1(torch.cat([cls, x], 1))
        matrix = block.attn.explicit(tokens)[:, :, :1]  # (B, h, 1, 25)
        matrices.append(matrix.mean(1)[:, 0].detach())
        cls = cls + block.attn.proj((matrix @ block.attn.parts(tokens)[2]).transpose(1, 2).flatten(2))
    weights = torch.zeros(len(x), 25)  # class token, patches
    weights[:, 0] = 1
    for matrix in reversed(matrices):  # only the class token is a query; patches keep what they have
        moved = weights.clone()
        moved[:, 0] = 0
        weights = (weights + moved + weights[:, :1] * matrix) / 2
    patches = weights[:, 1:]
    return (patches + (patches[:, None] @ first)[:, 0]) / 2


def of_latents(model: Latents, x: Tensor) -> Tensor:
    latents, attn = model.latents.expand(len(x), -1, -1), model.blocks[0].attn
    q, (_, k, v) = attn.parts(latents)[0], attn.parts(x)
    cross = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    latents = latents + attn.proj((cross @ v).transpose(1, 2).flatten(2))
    one = explicit(model.blocks[1], latents)
    two = explicit(model.blocks[2], model.blocks[1](latents))
    weights = torch.full((len(x), 1, 5), 0.2)
    for matrix in (two, one):
        weights = (weights + weights @ matrix) / 2
    return (weights @ cross.mean(1).detach())[:, 0] / 2  # half stays with the latents


def of_strides(model: Strides, x: Tensor) -> Tensor:
    first, x = explicit(model.blocks[0], x), model.blocks[0](x)[:, 1::2]
    weights, matrices = torch.full((len(x), 12), 1 / 12), []
    for block in model.blocks[1:]:
        matrices.append(explicit(block, x))
        x = block(x)
    for matrix in reversed(matrices):
        weights = (weights + (weights[:, None] @ matrix)[:, 0]) / 2
    every = torch.zeros(len(x), 24)
    every[:, 1::2] = weights
    return (every + (every[:, None] @ first)[:, 0]) / 2


@in_one_case()
@pytest.mark.parametrize(
    ("kind", "slow"),
    [
        (Windows, of_windows),
        (Hierarchy, of_hierarchy),
        (Pads, of_pads),
        (MeanOfFrames, of_mean_of_frames),
        (LateClass, of_late_class),
        (Latents, of_latents),
        (Strides, of_strides),
    ],
)
def test_unusual_sequences_of_tokens_equal_the_slow_formula(kind: type[nn.Module], slow: Any) -> None:
    size = (8, 32, 32) if kind is Hierarchy else (8, 24, 16)
    layout = "BTCHW" if kind is MeanOfFrames else "BCTHW"
    clf, clip = classifier(kind(), layout), clip_of(layout, size=size)
    found = STAA(clf, mode="attention", upsampling="nearest").attribute_maps(clip).joint
    model, steps = clf.module, 8 if kind is MeanOfFrames else 4
    with torch.no_grad():
        tokens = slow(model, clip if kind is MeanOfFrames else model.stem(clip) + model.positions)
    grid = tokens.view(-1, steps, size[1] // 8, size[2] // 8)
    expected = torch.kron(grid, torch.ones(1, 8 // steps, 8, 8)) / (8 // steps * 64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert expected.std() > 0.02 * expected.max()


def test_permuted_tokens_have_the_map_of_tokens_in_order() -> None:
    model, other = randomize(PlainViT(), 0, 0.2), Permutes().eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():  # the same position for the same patch
        other.positions[:, 1:] = model.positions[:, 1:][:, Permutes.order]
    clip = clip_of("BCTHW")
    report = models.inspect(VideoClassifier(other, layout="BCTHW"), clip)
    assert report.grid is not None and report.grid.positions == tuple(1 + Permutes.order.argsort()) and report.ok
    for options in ({"mode": "attention"}, {}):
        expected = STAA(VideoClassifier(model, layout="BCTHW"), **options).attribute(clip, 1)
        torch.testing.assert_close(STAA(VideoClassifier(other, layout="BCTHW"), **options).attribute(clip, 1), expected)


def test_a_linear_patch_embedding_has_the_relevance_of_a_convolution() -> None:
    plain, clip = classifier(PlainViT()), clip_of("BCTHW")
    other = ChannelsLast(plain.module.embed)
    rest = {name: value for name, value in plain.module.state_dict().items() if not name.startswith("embed.")}
    other.load_state_dict(rest, strict=False)
    clf = VideoClassifier(other.eval(), layout="BCTHW")
    assert models.inspect(clf, clip).patch_embedding == "embed"
    torch.testing.assert_close(STAA(clf).attribute(clip, 1), STAA(plain).attribute(clip, 1))


def test_tokens_that_are_mixed_between_layers_are_reported_with_how_much() -> None:
    report = models.inspect(classifier(MixesBetween()), clip_of("BCTHW"))
    first, second, third = (found.own for found in report.attention)
    assert first > 0.999 and 0.1 < third < second < 0.6
    assert f"mixed outside attention, too, which rollout does not follow: {third:.1%} of a change" in str(report)
    assert "mixed outside" not in str(models.inspect(classifier(PlainViT()), clip_of("BCTHW")))


@in_one_case()
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_with_checkpointing_in_eval_mode_has_the_maps_of_the_one_without(reentrant: bool) -> None:
    plain, clip = classifier(PlainViT()), clip_of("BCTHW")
    model, functions = Checkpoints(reentrant), dict(vars(torch.utils.checkpoint))
    model.load_state_dict(plain.module.state_dict())
    clf = VideoClassifier(model.eval(), layout="BCTHW")
    for options in ({"mode": "attention"}, {"rule": "chefer"}, {}):
        maps = [STAA(each, **options).attribute(clip, 1) for each in (plain, clf)]  # type: ignore[arg-type]
        torch.testing.assert_close(*maps)
    assert vars(torch.utils.checkpoint) == functions


def test_overlapping_blocks_are_placed_and_reported_with_how_sure() -> None:
    clf = classifier(Overlaps())
    report = models.inspect(clf, clip_of("BCTHW", size=(8, 64, 64)))
    assert report.ok and report.grid == TokenGrid(4, 8, 8, 1, tubelet=(2, 8, 8))
    assert report.certainty > 0.9 and 0.1 < report.own < 0.5
    assert f"{report.own:.1%} of a change is in the block's own token" in str(report)


def test_resized_and_rounded_clips_are_placed() -> None:
    report = models.inspect(classifier(Resizes()), clip_of("BCTHW", size=(8, 32, 22)))
    assert report.ok and report.grid == TokenGrid(4, 3, 2, 1, tubelet=(2, 32 / 3, 11))
    report = models.inspect(classifier(Rounds()), clip_of("BCTHW"))
    assert report.ok and report.grid == GRID and report.forwards <= 40


class Recurrent(FrameEncoder):
    """A recurrent layer over the class tokens of the frames."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.embed(clip.flatten(0, 1)).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.over_time(x[:, 0].unflatten(0, (len(clip), -1)))

    def over_time(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def test_a_head_that_is_not_linear_is_read_by_its_gradient_in_each_clip() -> None:
    """Attention within a frame, times what the recurrent layer takes from the frame."""
    clf, clip = classifier(Recurrent(), "BTCHW"), clip_of("BTCHW")
    with torch.inference_mode():  # no gradient is needed from the caller
        found = STAA(clf, mode="attention", upsampling="nearest").attribute_maps(clip).joint
    model = clf.module
    x = model.embed(clip.flatten(0, 1)).flatten(2).mT
    x, maps = torch.cat([model.cls.expand(len(x), -1, -1), x], 1) + model.positions, []
    for block in model.blocks:
        maps.append(explicit(block, x).unflatten(0, (2, 8)))
        x = block(x)
    frames = x[:, 0].detach().unflatten(0, (2, 8))
    sizes = torch.stack(
        [
            torch.autograd.functional.jacobian(model.over_time, frames[n : n + 1])[0, :, 0].norm(dim=(0, 2))
            for n in (0, 1)
        ]
    )
    weights = torch.zeros(2, 8, 7)
    weights[:, :, 0] = sizes / sizes.sum(1, keepdim=True)
    for matrix in reversed(maps):
        weights = (weights + (weights[:, :, None] @ matrix)[:, :, 0]) / 2
    expected = torch.kron(weights[:, :, 1:].unflatten(2, (3, 2)).contiguous(), torch.ones(1, 1, 8, 8)) / 64
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
    assert sizes.std() > 0.1 * sizes.mean()
    assert "measured for each clip" in str(models.inspect(clf, clip))


def test_a_maximum_takes_the_tokens_that_hold_it() -> None:
    clf, clip = classifier(MaxPools()), clip_of("BCTHW")
    weights = models.inspect(clf, clip).family.pooling(None)(clf, clip)
    model = clf.module
    x = torch.cat([model.prefix.expand(2, -1, -1), model.stem(clip)], 1) + model.positions
    winners = model.norm(model.run(x)).argmax(1)  # (B, D)
    sizes = torch.zeros(2, 25).scatter_add(1, winners, model.head.weight.square().sum(0).expand(2, -1)).sqrt()
    torch.testing.assert_close(weights, (sizes / sizes.sum(1, keepdim=True)).detach())


@pytest.mark.parametrize("kind", [Parallel, ReadsTwoLayers])
def test_layer_gradients_need_no_way_from_layer_to_layer(kind: type[PlainViT]) -> None:
    model = randomize(kind(), 0)
    clf, clip = VideoClassifier(model, layout="BCTHW"), clip_of("BCTHW")
    report = models.inspect(clf, clip)
    assert not report.ok and report.placed and "layer gradients, but not attention" in str(report)
    with pytest.raises(ValueError, match="needs no rollout"):
        STAA(clf, rule="chefer").attribute(clip, target=1)
    found = STAA(clf, rule="layer_gradients", upsampling="nearest").attribute_maps(clip, target=1).joint
    seen: list[Tensor] = []
    with mock.patch.object(F, "scaled_dot_product_attention", partial(_kept, seen)), torch.enable_grad():
        score = clf(clip.clone().requires_grad_())[:, 1].sum()
        gradients = torch.autograd.grad(score, seen)
    layers = [(a * g).clamp(min=0).mean((1, 2))[:, -24:] for a, g in zip(seen, gradients, strict=True)]
    tokens = torch.stack(layers).sum(0).detach()
    expected = torch.kron(report.grid.to_grid(tokens), torch.ones(1, 2, 8, 8)) / 128
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


def _kept(seen: list[Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    seen.append((query @ key.mT * query.shape[-1] ** -0.5).softmax(-1))
    return seen[-1] @ value
