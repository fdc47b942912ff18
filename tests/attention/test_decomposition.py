"""The class score as an exact sum over tokens and constants, against parameters and slow formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from covering import in_one_case, over_values
from frozen_models import HEADS, SPELLINGS, WIDTH, clips, contrast, mixed_heads, share_of_parameters, vit
from tiny_models import NAMES, CallsSdpa, clip_for, own, own_family, randomize, tiny
from torch import Tensor, nn

from captum_staa import STAA, TokenGrid, VideoClassifier
from captum_staa._utils.tensors import gaussian
from captum_staa.attention.decomposition import class_contrast, decompose, decompose_classifier
from captum_staa.masking.arguments import selected

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@over_values
@pytest.mark.parametrize("implementation", ["default", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_contributions_plus_constants_equal_the_score(name, dtype, implementation):
    """Parameters that are added, times their gradients, are what the tokens leave of the score."""
    clf = tiny(name).to(dtype)
    if implementation == "eager":
        clf.module.set_attn_implementation("eager")
    inputs = clip_for(clf, dtype=dtype)
    result = decompose_classifier(clf, inputs, contrast)
    assert result.contributions.shape == (2, 4, 3, 2) and result.nonlinear == ()
    assert result.contributions.dtype == result.score.dtype == dtype
    with torch.no_grad():
        plain = clf(inputs)
    torch.testing.assert_close(result.outputs, plain)
    torch.testing.assert_close(result.score, plain[:, 1] - (plain[:, 0] + plain[:, 2]) / 2)
    embedding = clf.module.get_submodule(clf.family.patch_embedding)
    table = None
    if name.startswith("videomae"):  # a constant table, no parameter
        table = clf.module.videomae.embeddings.position_embeddings.to(dtype).mT.unflatten(-1, (4, 3, 2))
    clf.requires_grad_(False)
    for i in range(2):
        tokens, constants = share_of_parameters(clf, embedding, inputs[i : i + 1], contrast, table)
        scale = TOLERANCE[dtype] * max(1, abs(tokens), abs(constants))
        assert abs(tokens - float(result.contributions[i].sum())) < scale
        assert abs(constants - float(result.constants[i])) < scale
        assert abs(tokens + constants - float(result.score[i])) < scale
        assert abs(constants) > 1e-3  # a check of nothing otherwise


@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_tokens_minus_the_bias_of_the_embedding(name):
    clf = tiny(name).double()
    inputs = clip_for(clf, dtype=torch.float64)
    embedding = clf.module.get_submodule(clf.family.patch_embedding)
    tokens = decompose_classifier(clf, inputs, contrast)
    pixels = decompose_classifier(clf, inputs, contrast, where="pixels")
    assert pixels.contributions.shape == (2, clf.num_frames, 24, 16) and pixels.nonlinear == ()
    torch.testing.assert_close(pixels.contributions.sum((1, 2, 3)) + pixels.constants, pixels.score)
    with torch.no_grad():
        embedding.bias.zero_()
    tokens, pixels = (decompose_classifier(clf, inputs, contrast, where=where) for where in ("tokens", "pixels"))
    blocks = pixels.contributions.unflatten(1, (4, -1)).unflatten(3, (3, 8)).unflatten(5, (2, 8)).sum((2, 4, 6))
    torch.testing.assert_close(tokens.contributions, blocks)
    torch.testing.assert_close(tokens.constants, pixels.constants)


def test_one_block_equals_explicit_matrix_products():
    """Each token goes through the block alone, with the patterns, scales and ratios of the whole clip; no autograd."""
    model = vit("F.softmax", layers=1)
    inputs = clips(1)
    block = model.blocks[0]
    weight = dict(block.named_parameters())
    tokens = model.embed(inputs).flatten(2).mT[0]  # (24, D)
    zero_cls = torch.zeros(1, WIDTH, dtype=tokens.dtype)

    def scale(x: Tensor) -> Tensor:
        return 1 / (((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True) + 1e-5) ** 0.5

    def layer(x: Tensor, module: Any, fixed: Tensor, constants: bool) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) * fixed * module.weight + constants * module.bias

    def affine(x: Tensor, matrix: Tensor, bias: Tensor, constants: bool) -> Tensor:
        return x @ matrix.T + constants * bias

    def run(x: Tensor, constants: bool, fixed: dict[str, Any] | None) -> tuple[float, dict[str, Any]]:
        known = fixed or {"scale1": scale(x)}
        y = layer(x, block["norm1"], known["scale1"], constants)
        qkv = affine(y, weight["attn.inner.in_proj_weight"], weight["attn.inner.in_proj_bias"], constants)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(0, 1) for part in qkv.chunk(3, -1))
        if fixed is None:
            scores = q @ k.mT / q.shape[-1] ** 0.5
            known["pattern"] = scores.exp() / scores.exp().sum(-1, keepdim=True)
        mixed = (known["pattern"] @ v).transpose(0, 1).flatten(1)
        x = x + affine(mixed, weight["attn.inner.out_proj.weight"], weight["attn.inner.out_proj.bias"], constants)
        if fixed is None:
            known["scale2"] = scale(x)
        hidden = affine(
            layer(x, block["norm2"], known["scale2"], constants),
            weight["mlp.up.weight"],
            weight["mlp.up.bias"],
            constants,
        )
        if fixed is None:
            known["ratio"] = 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + affine(hidden * known["ratio"], weight["mlp.down.weight"], weight["mlp.down.bias"], constants)
        if fixed is None:
            known["scale3"] = scale(x)
        logits = affine(
            layer(x, model.norm, known["scale3"], constants)[0], model.head.weight, model.head.bias, constants
        )
        return float(logits[1] - (logits[0] + logits[2]) / 2), known

    added = torch.cat([model.cls[0], zero_cls.expand(24, -1)]) + model.positions[0]
    score, known = run(torch.cat([zero_cls, tokens]) + added, True, None)
    result = decompose(model, inputs, contrast, tokens=model.embed)
    assert float(result.score) == pytest.approx(score, abs=1e-10)
    constants, _ = run(added, True, known)
    assert float(result.constants) == pytest.approx(constants, abs=1e-10)
    contributions = result.contributions.sum(1).flatten()
    for n in range(24):
        alone = torch.zeros(25, WIDTH, dtype=tokens.dtype)
        alone[1 + n] = tokens[n]
        share, _ = run(alone, False, known)
        assert float(contributions[n]) == pytest.approx(share, abs=1e-10)


@pytest.mark.parametrize("spelling", ["mixed heads", *(s for s in SPELLINGS if s != "by hand")])
def test_pattern_weight_adds_what_tokens_do_to_attention_as_queries_and_keys(spelling):
    """Finite differences of one block, whose queries, keys and values are of three different inputs; no autograd."""
    model = vit(spelling, layers=1)
    inputs, weight, step = clips(1), 0.3, 1e-5
    block = model.blocks[0]
    named = dict(block.named_parameters())
    tokens = model.embed(inputs).flatten(2).mT[0].detach()

    def stream(tokens: Tensor) -> Tensor:
        return torch.cat([model.cls[0], tokens]) + model.positions[0]

    def scale(x: Tensor) -> Tensor:
        return (((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True) + 1e-5) ** -0.5

    def norm(x: Tensor, layer: Any, at: Tensor) -> Tensor:  # its scale is that of another input
        return (x - x.mean(-1, keepdim=True)) * scale(at) * layer.weight + layer.bias

    def score(queries: Tensor, keys: Tensor, values: Tensor) -> float:
        def run(q_of: Tensor, k_of: Tensor, v_of: Tensor, base: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
            at = [stream(tokens)] if base is None else base
            y = [norm(x, block["norm1"], at[0]) for x in (q_of, k_of, v_of)]
            weights, biases = (named[f"attn.inner.in_proj_{kind}"].chunk(3) for kind in ("weight", "bias"))
            projected = [x @ w.T + b for x, w, b in zip(y, weights, biases, strict=True)]
            q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(0, 1) for x in projected)
            pattern = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
            if spelling == "mixed heads":
                pattern = mixed_heads(pattern[None])[0]
            mixed = (pattern @ v).transpose(0, 1).flatten(1)
            x = v_of + mixed @ named["attn.inner.out_proj.weight"].T + named["attn.inner.out_proj.bias"]
            at = [at[0], x, *at[2:]] if base is None else at
            up = norm(x, block["norm2"], at[1]) @ named["mlp.up.weight"].T + named["mlp.up.bias"]
            at = [*at, up] if base is None else at
            x = x + (up * 0.5 * (1 + torch.erf(at[2] / 2**0.5))) @ named["mlp.down.weight"].T + named["mlp.down.bias"]
            at = [*at, x] if base is None else at
            logits = norm(x, model.norm, at[3])[0] @ model.head.weight.T + model.head.bias
            return logits[1] - (logits[0] + logits[2]) / 2, at

        same = stream(tokens)
        _, base = run(same, same, same, None)
        return float(run(stream(queries), stream(keys), stream(values), base)[0])

    shares = decompose(model, inputs, contrast, tokens=model.embed, pattern_weight=weight)
    assert shares.nonlinear == ()
    exact = decompose(model, inputs, contrast, tokens=model.embed)
    assert (shares.contributions - exact.contributions).abs().max() > 1e-3  # a check of nothing otherwise
    for n in range(24):
        slopes = []
        for part in range(3):
            sides = []
            for sign in (1, -1):
                moved = [tokens.clone() for _ in range(3)]
                moved[part][n] *= 1 + sign * step
                sides.append(score(*moved))
            slopes.append((sides[0] - sides[1]) / (2 * step))
        expected = weight * (slopes[0] + slopes[1]) + slopes[2]
        assert float(shares.contributions.sum(1).flatten()[n]) == pytest.approx(expected, abs=1e-7)


def test_clips_of_a_batch_are_independent():
    clf = tiny("timesformer").double()
    inputs = clip_for(clf, batch=3, dtype=torch.float64)
    together = decompose_classifier(clf, inputs, lambda logits: class_contrast(logits, selected(logits, [0, 2, 1])))
    for i, target in enumerate([0, 2, 1]):
        alone = decompose_classifier(
            clf, inputs[i : i + 1], lambda logits, k=target: class_contrast(logits, logits[:, k])
        )
        torch.testing.assert_close(together.contributions[i], alone.contributions[0])
        torch.testing.assert_close(together.constants[i], alone.constants[0])


@over_values
@pytest.mark.parametrize("where", ["tokens", "pixels"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name, dtype, where):
    exact = decompose_classifier(tiny(name).double(), clip_for(tiny(name), dtype=torch.float64), contrast, where=where)
    clf = tiny(name).to(dtype)
    result = decompose_classifier(clf, clip_for(clf), contrast, where=where)
    assert result.contributions.dtype == result.constants.dtype == torch.float32 and result.outputs.dtype == dtype
    for part, of in ((result.contributions, exact.contributions), (result.score, exact.score)):
        assert (part - of).abs().max() < TOLERANCE[dtype] * max(1, float(of.abs().max()))


def test_class_contrast_accepts_targets_as_in_captum():
    logits = torch.tensor([[1.0, 2.0, 6.0], [0.0, 3.0, 9.0]])
    mean = torch.tensor([[-3.0, -1.5, 4.5], [-6.0, -1.5, 7.5]])  # each output minus the mean of the other two
    for target in (2, torch.tensor(2), [2, 2], torch.tensor([2, 2]), (2,)):
        torch.testing.assert_close(class_contrast(logits, selected(logits, target)), mean[:, 2])
    torch.testing.assert_close(class_contrast(logits, selected(logits, [0, 1])), torch.tensor([-3.0, -1.5]))
    frames = logits[:, None].expand(2, 2, 3)  # (B, frames, K): the other five outputs
    expected = torch.tensor([6 - 12 / 5, 9 - 15 / 5])
    torch.testing.assert_close(class_contrast(frames, selected(frames, (1, 2))), expected)
    torch.testing.assert_close(class_contrast(frames, selected(frames, [(1, 2), (0, 2)])), expected)
    for single in (logits[:, :1], logits[:, 0]):
        torch.testing.assert_close(class_contrast(single, selected(single, None)), logits[:, 0])
    assert class_contrast(logits.bfloat16(), logits[:, 2].bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"target must select one output per example, got 6 values for 2 examples"):
        class_contrast(logits, selected(logits, None))


SHAPES: dict[str, tuple[nn.Module, str]] = {
    "(B, D, t, h, w)": (nn.Identity(), "thw"),
    "(B, N, D)": (nn.Flatten(2), "thw"),
    "(B * t, D, h, w)": (nn.Identity(), "thw"),
    "(B * t, h * w, D)": (nn.Flatten(2), "thw"),
    "(B, N, D), time fastest": (nn.Identity(), "hwt"),
    "(B, 1 + N, D)": (nn.Identity(), "thw"),
    "one run per frame": (nn.Identity(), "thw"),
    "one run per frame, as rows": (nn.Flatten(2), "thw"),
    "a tuple": (nn.Identity(), "thw"),
}


@in_one_case()
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_of_every_shape_are_placed_on_the_grid(shape):
    """The score reads each token with its own weight, so that its contribution says which one it was."""
    order = SHAPES[shape][1]
    place = torch.arange(24.0).view(4, 3, 2)  # (t, h, w)

    class Embedding(nn.Module):
        def forward(self, clip: Tensor) -> Any:
            if shape.startswith("one run"):
                frame = clip[:, :1, ::8, ::8].expand(-1, 5, -1, -1)  # (B, 5, h, w)
                return frame if "rows" not in shape else frame.flatten(2).mT
            x = clip[:, :1, ::2, ::8, ::8].expand(-1, 5, -1, -1, -1)  # (B, 5, t, h, w)
            if shape == "a tuple":
                return torch.tensor(3), x, 2
            if shape == "(B, D, t, h, w)":
                return x
            if shape == "(B, N, D)":
                return x.flatten(2).mT
            if shape == "(B * t, D, h, w)":
                return x.transpose(1, 2).flatten(0, 1)
            if shape == "(B * t, h * w, D)":
                return x.transpose(1, 2).flatten(0, 1).flatten(2).mT
            if shape == "(B, 1 + N, D)":
                return torch.cat([torch.full((len(x), 5, 1), 7.0), x.flatten(2)], 2).mT
            return x.permute(0, 3, 4, 2, 1).flatten(1, 3)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = Embedding()

        def forward(self, clip: Tensor) -> Tensor:
            if shape.startswith("one run"):
                x = sum(self.embed(frame) for frame in clip[:, :, ::2].unbind(2))
            else:
                x = self.embed(clip)
            x = x[1] if shape == "a tuple" else x
            return x.reshape(len(clip), -1).sum(1, keepdim=True)

    family = replace(
        own_family(),
        grid=lambda model: TokenGrid(4, 3, 2, prefix=int("1 +" in shape), order=order, tubelet=(2, 8, 8)),
        patch_embedding="embed",
    )
    clip = torch.zeros(2, 3, 8, 24, 16)
    clip[:, 0, ::2, ::8, ::8] = torch.stack([place, 100 + place])
    clf = VideoClassifier(Model(), family=family)
    result = decompose_classifier(clf, clip.transpose(1, 2), lambda logits: logits[:, 0])
    torch.testing.assert_close(result.contributions, 5 * torch.stack([place, 100 + place]))


def test_unknown_patch_embeddings_raise():
    clf = own("sdpa")
    clf.family = replace(clf.family, patch_embedding=None)
    inputs = clip_for(clf).transpose(1, 2)
    with pytest.raises(
        ValueError, match=r"got OwnViT of family 'own' without a patch embedding\. Pass .*patch_embedding="
    ):
        decompose_classifier(clf, inputs, contrast)
    assert decompose_classifier(clf, inputs, contrast, where="pixels").contributions.shape == (2, 8, 24, 16)
    clf.family = replace(clf.family, patch_embedding="stem")
    with pytest.raises(ValueError, match="must name a module of OwnViT, got 'stem'"):
        decompose_classifier(clf, inputs, contrast)
    clf.family = replace(clf.family, patch_embedding="head")
    with pytest.raises(ValueError, match=r"the patch embedding must return .*got shape \(2, 3\) for 2 clips"):
        decompose_classifier(clf, inputs, contrast)
    clf.family = replace(clf.family, patch_embedding="embed")
    assert decompose_classifier(clf, inputs, contrast).contributions.shape == (2, 4, 3, 2)
    cnn = VideoClassifier(nn.Sequential(nn.Conv3d(3, 3, 8), nn.Flatten(), nn.LazyLinear(3)), layout="BCTHW")
    with pytest.raises(ValueError, match="got Sequential of no family"):
        decompose_classifier(cnn, inputs, contrast)
    with pytest.raises(ValueError, match="where"):
        decompose_classifier(clf, inputs, contrast, where="patches")


class Mixed(nn.Module):
    """A transformer whose tokens all see the whole clip, so that there is no token grid."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.layer, self.head = nn.Linear(3 * 4 * 8 * 8, 64), CallsSdpa(16, 2), nn.Linear(16, 3)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.mix(clip.flatten(1)).unflatten(1, (4, 16))
        return self.head((x + self.layer(x)).mean(1))


def test_pixels_are_decomposed_and_smoothed_if_there_is_no_token_grid():
    with torch.random.fork_rng():
        clf = VideoClassifier(randomize(Mixed(), 2), layout="BCTHW")
    clip = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    maps = STAA(clf, pattern_weight=0).attribute_maps(clip, 1)
    pixels = decompose_classifier(clf, clip.transpose(1, 2), contrast, where="pixels")
    sides = (0.75 * 4 / 8, 0.75 * 8 / 14, 0.75 * 8 / 14)  # of about 8 x 14 x 14 tokens
    torch.testing.assert_close(maps.joint, gaussian(pixels.contributions, sides, keep_sums=True))
    torch.testing.assert_close(maps.joint.sum((1, 2, 3)) + pixels.constants, pixels.score)
    with pytest.raises(ValueError, match=r"attention and tokens can be verified, got Mixed.*one token each"):
        STAA(clf, mode="attention").attribute(clip)
    cnn = VideoClassifier(nn.Sequential(nn.Conv3d(3, 3, (4, 8, 8)), nn.Flatten()), layout="BCTHW")
    with pytest.raises(ValueError, match="no attention"):
        STAA(cnn).attribute(clip, 1)
