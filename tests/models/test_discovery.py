"""Undeclared transformers: what is found in them, maps against a slow formula, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import slow_undeclared
import torch
from covering import in_one_case
from tiny_models import NAMES, SIZE, clip_for, snapshot, tiny, tiny_module
from torch import Tensor, nn
from undeclared_models import MODELS, clip_of, undeclared

from captum_staa import STAA, VideoClassifier, models
from captum_staa.models import FAMILIES
from captum_staa.models.findings import differences
from captum_staa.models.probing import BUDGET


@cache
def inspected(name: str) -> VideoClassifier:
    """Return a classifier that knows its tokens."""
    clf = VideoClassifier(undeclared(name), layout=MODELS[name].layout)
    models.inspect(clf, clip_of(clf.layout.axes))
    return clf


@in_one_case()
@pytest.mark.parametrize("name", MODELS)
def test_what_is_found_in_an_undeclared_transformer(name: str) -> None:
    expected, clf = MODELS[name], inspected(name)
    report = models.inspect(clf, clip_of(expected.layout))
    assert (report.grid, report.problems, report.patch_embedding) == (expected.grid, (), "embed"), str(report)
    reads = "weights" if isinstance(report.reads, Tensor) else report.reads
    assert (reads, {found.layer.backend for found in report.attention}) == (expected.reads, {expected.backend})
    assert report.forwards <= BUDGET and report.own > 0.999


@pytest.mark.parametrize("name", ["softmax module, mean", "divided"])
def test_an_inspection_changes_nothing_and_is_cached(name: str) -> None:
    clf, clip = VideoClassifier(undeclared(name), layout="BCTHW"), clip_of("BCTHW")
    clf(clip)  # finds the kind of its outputs
    clf.module.blocks[0].train()
    before = snapshot(clf)
    report = models.inspect(clf, clip)
    assert snapshot(clf) == before
    assert models.inspect(clf, clip) is report and models.inspect(clf.versus("rest"), clip + 1) is report
    assert repr(report).count("\n") == 0 and len(repr(report)) < 300 < len(str(report))


@in_one_case("name")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layers", ["all", "mean", [0], "chefer"], ids=str)
def test_attention_of_an_undeclared_transformer_equals_the_slow_formula(name: str, layers: Any) -> None:
    clf, clip = inspected(name), clip_of(MODELS[name].layout)
    model = clf.module
    options: dict[str, Any] = {"mode": "attention", "layers": layers}
    if layers == "chefer":
        options = {"rule": "chefer"}
    slow = slow_undeclared.attention_map(
        model, clip, "all" if layers == "chefer" else layers, 1 if layers == "chefer" else None
    )
    found = STAA(clf, upsampling="nearest", **options).attribute_maps(clip, 1)
    torch.testing.assert_close(found.joint, slow, rtol=1e-4, atol=1e-5 * float(slow.max()))
    torch.testing.assert_close(found.logits, clf(clip).detach())
    assert slow.std() > 0.01 * slow.max(), "a flat map would agree with anything"


def test_relevance_through_flex_attention_is_that_of_explicit_matrices() -> None:
    clf, clip = inspected("flexible"), clip_of("BCTHW")
    found = STAA(clf).attribute(clip, 1)
    with slow_undeclared.explicit_attention(clf.module):
        torch.testing.assert_close(found, STAA(VideoClassifier(clf.module, layout="BCTHW")).attribute(clip, 1))


@in_one_case()
@pytest.mark.parametrize("name", MODELS)
def test_relevance_of_an_undeclared_transformer_is_that_of_the_declared_one(name: str) -> None:
    layout, clip, clf = MODELS[name].layout, clip_of(MODELS[name].layout), inspected(name)
    family = replace(models.inspect(clf, clip).family, grid=lambda model: MODELS[name].grid, patch_embedding="embed")
    declared = VideoClassifier(clf.module, layout=layout, family=family)
    torch.testing.assert_close(STAA(clf).attribute(clip, 1), STAA(declared).attribute(clip, 1))


@in_one_case()
@pytest.mark.parametrize("name", NAMES)
def test_a_known_family_that_is_hidden_has_the_same_map(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clf = tiny(name)
    clip = clip_for(clf)
    with monkeypatch.context() as patch:
        patch.setattr("captum_staa.models.families.FAMILIES", {})
        hidden = VideoClassifier(clf.module, layout="BTCHW")
    assert hidden.family is None
    for options in ({"mode": "attention"}, {"mode": "attention", "layers": [-1]}, {}):
        expected = STAA(clf, **options).attribute(clip, 1)
        torch.testing.assert_close(STAA(hidden, **options).attribute(clip, 1), expected)


SIZES = [
    *((name, None, SIZE) for name in NAMES),
    ("timesformer", 8, (24, 16)),  # more frames than the config
    ("timesformer", 12, (24, 16)),
    ("timesformer", 4, (32, 16)),
    ("timesformer", 8, (20, 18)),  # pixels that no token covers
    ("timesformer-joint", 10, (24, 16)),
    ("vjepa2", 16, (24, 16)),
    ("vjepa2", 10, (32, 24)),
]


@in_one_case()
@pytest.mark.parametrize(("name", "frames", "size"), SIZES)
def test_declared_families_agree_with_what_is_found(name: str, frames: int | None, size: tuple[int, int]) -> None:
    clf = VideoClassifier(tiny_module(name), num_frames=frames, image_size=size)
    assert clf.num_frames is not None
    report = models.inspect(clf, torch.randn(1, clf.num_frames, 3, *size))
    assert (report.problems, report.differences) == ((), ()), str(report)
    assert report.declared is not None and "agrees" in str(report)


def test_differences_from_a_wrong_declaration_are_reported() -> None:
    module, right = tiny_module("timesformer"), FAMILIES["timesformer"]
    report = models.inspect(VideoClassifier(module, image_size=SIZE), torch.randn(1, 4, 3, *SIZE))
    for wrong, words in (
        (replace(right, grid=lambda model: replace(right.grid(model), order="thw")), "its grid is"),
        (replace(right, pooling=lambda model: "mean"), "its head reads 'mean'"),
        (replace(right, attention=lambda model: right.attention(model)[::-1]), "its attention layers are"),
        (replace(right, attention=lambda model: [replace(x, role="joint") for x in right.attention(model)]), "rows"),
        (replace(right, patch_embedding="timesformer.embeddings.patch_embeddings"), "its patch embedding is"),
    ):
        found = list(differences(report, VideoClassifier(module, image_size=SIZE, family=wrong)))
        assert any(words in difference for difference in found), (words, found)


def test_blocks_without_pixels_have_no_map_of_their_own() -> None:
    clf, clip = inspected("frames, transformer"), clip_of("BTCHW")
    with pytest.raises(ValueError, match=r"attend to tokens of pixels, got layers=\[-1\].*Use layers='all'"):
        STAA(clf, mode="attention", layers=[-1]).attribute(clip)
    spatial = STAA(clf, mode="attention", layers=[0, 1]).attribute(clip)
    torch.testing.assert_close(STAA(clf, mode="attention", layers="mean").attribute(clip), spatial)


def test_timesformer_of_another_length_equals_the_slow_formula() -> None:
    """Its layers reshape tokens with the number of frames of the config, also for clips of other lengths."""
    clf = VideoClassifier(tiny_module("timesformer"), num_frames=8, image_size=SIZE)  # config: 4 frames
    clip, maps = torch.randn(2, 8, 3, *SIZE, generator=torch.Generator().manual_seed(2)), []

    def keep(module: Any, args: Any) -> None:
        q, k, _ = module.qkv(args[0]).unflatten(-1, (3, module.num_heads, -1)).movedim(-3, 0).transpose(-2, -3)
        maps.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1))

    layers = [module for module in clf.modules() if type(module).__name__ == "TimesformerSelfAttention"]
    handles = [module.register_forward_pre_hook(keep) for module in layers]
    with torch.no_grad():
        clf(clip)
    for handle in handles:
        handle.remove()
    weights = torch.zeros(2, 1, 49)
    weights[:, :, 0] = 1
    for space, time in ((3, 2), (1, 0)):
        in_time, in_space = torch.eye(49).repeat(2, 1, 1), torch.eye(49).repeat(2, 1, 1)
        in_space[:, 0] = 0
        for group in range(12):  # four tokens in a row
            there = slice(1 + 4 * group, 5 + 4 * group)
            in_time[:, there, there] = maps[time].unflatten(0, (2, 12))[:, group]
        for frame in range(4):  # every fourth token, and the class token
            there = torch.tensor([0, *range(1 + frame, 49, 4)])
            matrix = maps[space].unflatten(0, (2, 4))[:, frame]
            in_space[:, 0, there] += matrix[:, 0] / 4
            in_space[:, there[1:, None], there] = matrix[:, 1:]
        weights = (weights + weights @ in_space @ in_time) / 2
    slow = torch.kron(weights[:, 0, 1:].view(2, 3, 2, 8).movedim(-1, 1).contiguous(), torch.ones(1, 1, 8, 8)) / 64
    joint = STAA(clf, mode="attention", upsampling="nearest").attribute_maps(clip).joint
    torch.testing.assert_close(joint, slow, rtol=1e-4, atol=1e-7)


def test_a_second_map_costs_one_forward() -> None:
    clf = VideoClassifier(undeclared("fused"), layout="BCTHW")
    clip, calls = clip_of("BCTHW"), []
    STAA(clf, mode="attention").attribute(clip)
    clf.module.register_forward_pre_hook(lambda *args: calls.append(1))
    STAA(clf.versus("rest"), mode="attention").attribute(clip)
    assert len(calls) == 1


def test_a_report_describes_the_model_for_other_uses() -> None:
    clip = clip_of("BCTHW")
    report = models.inspect(undeclared("divided"), clip)  # the axis with three channels tells the layout
    assert report.layout == "BCTHW"
    for words in ("blocks.0.attn_t", "temporal, block 0", "softmax", "100.0%", "patch embedding: embed", "first token"):
        assert words in str(report)
    clf = VideoClassifier(undeclared("divided"), family=report.family)
    assert (clf.grid, clf.num_frames, clf.image_size) == (MODELS["divided"].grid, 8, SIZE)
    with pytest.raises(ValueError, match=r"layout is required unless exactly one.*Pass layout="):
        models.inspect(undeclared("divided"), torch.randn(1, 3, 3, 8, 8))
    with pytest.raises(TypeError, match=r"must be an nn\.Module or a VideoClassifier, got int"):
        models.inspect(3, clip)  # type: ignore[arg-type]


def test_an_inspection_of_half_precision_finds_the_same() -> None:
    for name in ("divided", "encoder"):
        clf = VideoClassifier(undeclared(name).bfloat16(), layout=MODELS[name].layout)
        report = models.inspect(clf, clip_of(MODELS[name].layout))
        assert (report.grid, report.problems) == (MODELS[name].grid, ()) and report.forwards <= BUDGET


def test_layers_are_checked_when_the_blocks_are_known() -> None:
    clf = VideoClassifier(undeclared("fused"), layout="BCTHW")
    with pytest.raises(ValueError, match=r"layers=\[3\].*3 blocks"):
        STAA(clf, mode="attention", layers=[3]).attribute(clip_of("BCTHW"))


def test_modules_that_compute_attention_several_times_are_read_call_by_call() -> None:
    """One block used three times has the map of three blocks with the same weights."""
    model = undeclared("fused")
    for block in model.blocks[1:]:
        block.load_state_dict(model.blocks[0].state_dict())
    shared = undeclared("fused")
    shared.load_state_dict(model.state_dict())
    shared.blocks = nn.ModuleList([shared.blocks[0]] * 3)
    clip = clip_of("BCTHW")
    for options in ({"mode": "attention"}, {"rule": "chefer"}, {}):
        expected = STAA(VideoClassifier(model, layout="BCTHW"), **options).attribute(clip, 1)
        found = STAA(VideoClassifier(shared, layout="BCTHW"), **options).attribute(clip, 1)
        torch.testing.assert_close(found, expected)
