"""STAA against a slow formula of its own (slow_staa.py), against Captum's contract, and against planted truth."""

from __future__ import annotations

import copy

import pytest
import slow_staa
import torch
from captum.attr import NoiseTunnel
from captum.metrics import infidelity, sensitivity_max
from tiny_models import CLASSES, NAMES, SIZE, clip_for, own, snapshot, tiny
from torch import Tensor, nn
from transformers import TimesformerConfig, TimesformerForVideoClassification

from captum_staa import STAA, Focus, VideoClassifier
from captum_staa.attention.capture import capture
from captum_staa.benchmark import PlantedClips
from captum_staa.models.preprocessing import Preprocessing

LAYERS = ([-1], [0], [0, -1], "mean", "all")
TARGET = torch.tensor([2, 0])
MODES: dict[str, dict[str, str]] = {
    "attention": {"mode": "attention"},
    "product": {"mode": "relevance", "rule": "product"},
    "gradient": {"mode": "relevance", "rule": "gradient"},
    "chefer": {"mode": "relevance", "rule": "chefer"},
    "released": {"mode": "released"},
}


def ranks(x: Tensor) -> Tensor:
    return x.flatten().argsort().argsort().double()


def spearman(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([ranks(a.float()), ranks(b.float())]))[0, 1].item()


def auroc(maps: Tensor, truth: Tensor) -> float:
    """Share of (inside, outside) pairs in the right order, by ranks, averaged over clips."""
    values = []
    for one, inside in zip(maps.flatten(1), truth.flatten(1), strict=True):
        n = int(inside.sum())
        values.append((ranks(one)[inside].sum() - n * (n - 1) / 2) / (n * (len(one) - n)))
    return torch.stack(values).mean().item()


# --- the numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.parametrize("kind", ["attention", "product", "gradient", "chefer"])
@pytest.mark.parametrize("name", [*NAMES, "sdpa", "mha, time first"])
def test_equals_the_slow_formula(name, kind, layers):
    clf = tiny(name) if name in NAMES else own(name)
    clip, options = clip_for(clf), {"rule": "product", **MODES[kind]}
    slow = slow_staa.staa(
        name if name in NAMES else "own", copy.deepcopy(clf.module), clip, TARGET, layers=layers, **options
    )
    parts = STAA(clf, layers=layers, **options).attribute_parts(clip, TARGET)
    top = slow.abs().max().item()
    torch.testing.assert_close(parts.joint, slow, rtol=0, atol=1e-5 * top)
    assert slow.std() > 0.01 * top, "a flat map would agree with anything"
    torch.testing.assert_close(parts.spatial, slow.sum(1), rtol=1e-4, atol=1e-5 * top)
    torch.testing.assert_close(parts.temporal, slow.sum((2, 3)), rtol=1e-4, atol=1e-4 * top)
    torch.testing.assert_close(parts.logits, clf(clip).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["videomae", "videomae-first", "timesformer-joint", "vivit", "vjepa2", "sdpa", "mha, time first"]
)
def test_time_alone_equals_the_slow_formula(name):
    clf, slow_name = (tiny(name), name) if name in NAMES else (own(name), "own")
    clip = clip_for(clf)
    with torch.no_grad():
        _, found = slow_staa.attentions(slow_name, copy.deepcopy(clf.module), clip)
    dense = slow_staa.blocks(slow_name, [attention.mean(1) for attention in found], 2)
    tokens = slow_staa.over_layers(slow_name, dense, "all", chefer=False)
    assert clf.grid is not None
    steps = clf.grid.to_grid(tokens).sum((2, 3))
    tubelet = clf.grid.tubelet[0]
    before = snapshot(clf)
    temporal = STAA(clf, "attention").attribute_temporal(clip)
    assert snapshot(clf) == before
    torch.testing.assert_close(temporal, (steps / tubelet).repeat_interleave(tubelet, 1), rtol=0, atol=1e-6)
    nearest = STAA(clf, "attention", upsampling="nearest").attribute_parts(clip).temporal
    torch.testing.assert_close(temporal, nearest, rtol=0, atol=1e-5)
    assert steps.std() > 1e-3
    with pytest.raises(ValueError, match=r"layers=\[-1\].*attribute_parts"):
        STAA(clf, "attention", [-1]).attribute_temporal(clip)


@pytest.mark.parametrize("name", ["timesformer", "videoprism"])
def test_time_alone_needs_joint_attention(name):
    clf = tiny(name)
    with pytest.raises(ValueError, match=r"joint attention.*attribute_parts"):
        STAA(clf, "attention").attribute_temporal(clip_for(clf))


@pytest.mark.parametrize("name", NAMES)
def test_attention_sums_to_what_special_tokens_leave(name):
    clf = tiny(name)
    for layers in LAYERS:
        total = STAA(clf, "attention", layers).attribute(clip_for(clf)).sum((1, 2, 3, 4))
        if clf.grid is not None and clf.grid.prefix:
            assert (total < 1).all() and (total > 0.05).all()
        else:
            torch.testing.assert_close(total, torch.ones(2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("name", ["videomae", "timesformer", "vjepa2", "mha"])
def test_parts_batches_and_tuples(name, kind):
    clf = tiny(name) if name in NAMES else own(name)
    clip, method = clip_for(clf, batch=3), STAA(clf, **MODES[kind])
    target = torch.tensor([2, 0, 1])
    attributions = method.attribute(clip, target)
    assert attributions.shape == clip.shape and attributions.is_contiguous() and not attributions.requires_grad
    assert torch.isfinite(attributions).all() and (attributions >= 0).all()
    joint = clf.layout.reduce(attributions)
    torch.testing.assert_close(joint, method.attribute_parts(clip, target).joint, rtol=1e-4, atol=1e-6)
    if kind != "released":  # whose "temporal attention" is a signal of its own
        torch.testing.assert_close(joint.sum((2, 3)), method.attribute_parts(clip, target).temporal)
    single = torch.cat([method.attribute(clip[i : i + 1], int(target[i])) for i in range(3)])
    if kind != "released":  # one threshold is drawn per clip, so that clips of a batch have their own
        torch.testing.assert_close(attributions, single, rtol=1e-3, atol=1e-5 * attributions.max().item())
    (in_tuple,) = method.attribute((clip,), target)
    assert torch.equal(in_tuple, attributions)
    with pytest.raises(ValueError, match="tuple of 2 inputs"):
        method.attribute((clip, clip), target)


@pytest.mark.parametrize("kind", ["product", "gradient", "chefer"])
def test_every_form_of_target(kind):
    clf = tiny("vivit")
    clip, method = clip_for(clf), STAA(clf, **MODES[kind])
    one = [
        method.attribute(clip, form) for form in (2, torch.tensor(2), torch.tensor([2]), torch.tensor([2, 2]), [2, 2])
    ]
    assert all(torch.equal(other, one[0]) for other in one)
    mixed = method.attribute(clip, [2, 0])
    torch.testing.assert_close(mixed[0], one[0][0])
    torch.testing.assert_close(mixed[1], method.attribute(clip, 0)[1])
    assert spearman(mixed[1], one[0][1]) < 0.999  # and the target matters
    with pytest.raises(ValueError, match=r"3 classes.*needs a target.*target=class index"):
        method.attribute(clip)


def test_attention_ignores_the_target_and_one_output_needs_none():
    clf = tiny("videomae")
    clip = clip_for(clf)
    for mode in ("attention", "released"):
        method = STAA(clf, mode)
        assert torch.equal(method.attribute(clip), method.attribute(clip, 2))
    clf.module.classifier = nn.Linear(24, 1)
    assert STAA(clf).attribute(clip).abs().sum() > 0


# --- Captum's contract --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["videomae", "timesformer", "vjepa2", "videoprism"])
def test_precisions(name, dtype, kind):
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
        elif kind != "released":  # a threshold turns a last digit into all or nothing
            assert spearman(attributions, expected) > 0.9


@pytest.mark.parametrize("kind", MODES)
def test_memory_order_does_not_matter(kind):
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
def test_another_layout_than_the_models(name):
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
def test_captum_wraps_and_scores_it(kind):
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


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["videomae", "timesformer", "vjepa2", "mha"])
def test_nothing_is_left(name, fails, kind):
    clf = tiny(name) if name in NAMES else own(name)
    clip, method = clip_for(clf), STAA(clf, **MODES[kind])
    parameters = list(clf.parameters())
    parameters[0].requires_grad_(False)
    parameters[2].grad = torch.ones_like(parameters[2])
    clf.module.train()
    next(clf.module.children()).eval()
    handle = None
    if fails:
        site = clf.family.attention(clf.module)[-1]  # type: ignore[union-attr]
        handle = clf.module.get_submodule(site.module).register_forward_pre_hook(lambda *_: 1 / 0)
    before = snapshot(clf)
    if fails:
        with pytest.raises(ZeroDivisionError):
            method.attribute(clip, 1)
    else:
        method.attribute(clip, 1)
        method.attribute_parts((clip,), 1)
    assert snapshot(clf) == before
    assert handle is None or handle.remove() is None


def test_a_bad_target_leaves_nothing_either():
    clf = tiny("videomae")
    before = snapshot(clf)
    with pytest.raises(ValueError, match=r"target = 17 fits no outputs of shape \(2, \d\)"):
        STAA(clf).attribute(clip_for(clf), 17)
    assert snapshot(clf) == before


def test_names_and_errors():
    clf = tiny("videomae")
    clip, method = clip_for(clf), STAA(clf)
    assert STAA.get_name() == "STAA" and not method.has_convergence_delta()
    with pytest.raises(NotImplementedError, match="STAA"):
        method.attribute_future()
    with pytest.raises(TypeError, match="n_steps"):
        method.attribute(clip, 1, n_steps=3)
    with pytest.raises(TypeError):
        method.attribute(clip, 1, None, False)  # ours are keyword-only
    for options, error, words in (
        ({"mode": "attenton"}, ValueError, "'attention', 'relevance', 'released', but 'attenton'"),
        ({"rule": "lrp"}, ValueError, "'product', 'gradient', 'chefer', but 'lrp'"),
        ({"upsampling": "cubic"}, ValueError, "'trilinear', 'nearest', but 'cubic'"),
        ({"layers": "last"}, ValueError, "'mean', 'all', but 'last'"),
        ({"layers": [2]}, ValueError, r"from -2 to 1 of this model's 2 attention blocks, but \[2\]"),
        ({"layers": []}, ValueError, "list of indices"),
        ({"layers": -1}, ValueError, "list of indices.*but -1"),
        ({"layers": [0.0]}, ValueError, "list of indices"),
        ({"focus": True}, TypeError, "Focus.*True"),
    ):
        with pytest.raises(error, match=words):
            STAA(clf, **options)
    with pytest.raises(TypeError, match="function"):
        STAA(lambda clip: clip)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Sequential.*no known family.*Family"):
        STAA(VideoClassifier(nn.Sequential(nn.Flatten(), nn.Linear(8, 2)), layout="BTCHW"))
    with pytest.raises(TypeError, match=r"floats.*uint8.*preprocess"):
        method.attribute(torch.zeros(clip.shape, dtype=torch.uint8), 1)
    with pytest.raises(ValueError, match=r"\(8, 3, 24, 16\).*clip\[None\]"):
        method.attribute(clip[0], 1)


def test_a_bare_model_is_wrapped():
    clf = tiny("vivit")
    clip = clip_for(clf)
    assert torch.equal(STAA(clf.module).attribute(clip, 1), STAA(clf).attribute(clip, 1))


def test_a_copy_is_independent():
    clf = tiny("vjepa2")
    clip = clip_for(clf)
    method = STAA(clf)
    expected = method.attribute(clip, 1)
    twin = copy.deepcopy(method)
    with torch.no_grad():
        for parameter in clf.parameters():
            parameter.zero_()
    assert torch.equal(twin.attribute(clip, 1), expected)


# torch's compiler looks at .grad of whatever it is handed
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
            self.blocks, self.inner = inner.blocks, inner

        def forward(self, clip: Tensor, scale: Tensor | float = 1.0) -> Tensor:
            return self.inner(clip) * scale

    clf = own("sdpa")
    scaled = VideoClassifier(Scaled(clf.module), family=clf.family)
    clip = clip_for(clf)
    one, three = (STAA(scaled).attribute(clip, 1, additional_forward_args=(scale,)) for scale in (1.0, 3.0))
    torch.testing.assert_close(three, 3 * one)
    torch.testing.assert_close(one, STAA(clf).attribute(clip, 1))


@pytest.mark.parametrize("kind", ["attention", "product", "chefer"])
def test_upsampling_and_focus(kind):
    clf = tiny("vivit")
    clip, options = clip_for(clf), MODES[kind]
    nearest = clf.layout.reduce(STAA(clf, **options, upsampling="nearest").attribute(clip, 1))
    smooth = STAA(clf, **options).attribute_parts(clip, 1).joint
    if kind != "product":
        blocks = nearest.unflatten(1, (4, 2)).unflatten(3, (3, 8)).unflatten(5, (2, 8))  # (B, 4, 2, 3, 8, 2, 8)
        assert torch.equal(blocks, blocks[:, :, :1, :, :1, :, :1].expand_as(blocks))
        torch.testing.assert_close(nearest.sum((1, 2, 3)), smooth.sum((1, 2, 3)))
    focused = STAA(clf, **options, focus=Focus()).attribute_parts(clip, 1)
    torch.testing.assert_close(focused.joint, Focus()(smooth, (3, 9, 9)))
    torch.testing.assert_close(focused.temporal, focused.joint.sum((2, 3)))


# --- what the public code computes: its four defects -----------------------------------------------------------


def divided(frames: int, seed: int = 0, layers: int = 1) -> VideoClassifier:
    """A TimeSformer whose frames do not mix before its last spatial attention: only temporal attention joins them."""
    torch.manual_seed(seed)
    config = TimesformerConfig(
        image_size=24,
        patch_size=8,
        num_frames=frames,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=layers,
        intermediate_size=16,
        num_labels=CLASSES,
    )
    model = TimesformerForVideoClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.4)
        for layer in model.timesformer.encoder.layer:
            layer.temporal_dense.weight.zero_()
    return VideoClassifier(model)


def spatial_attention(clf: VideoClassifier, clip: Tensor) -> Tensor:
    """Explicit head-mean ``S (B, T, 1 + P, 1 + P)`` of the last layer, from the model's own output."""
    with torch.no_grad():
        probabilities = clf.module(clip, output_attentions=True).attentions[-1]
    return probabilities.mean(1).unflatten(0, (len(clip), -1))


@pytest.mark.parametrize("frames", [4, 8, 16])
def test_released_1_reads_frame_0_from_one_of_its_own_patches(frames):
    clf = divided(frames)
    clip = torch.randn(2, frames, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    other = clip.clone()
    other[:, 1:] = torch.randn(other[:, 1:].shape, generator=torch.Generator().manual_seed(1))
    before, after = spatial_attention(clf, clip), spatial_attention(clf, other)
    torch.testing.assert_close(before[:, 0], after[:, 0])  # only the attention of later frames changes
    assert (before[:, 1:] - after[:, 1:]).abs().mean() > 0.01
    released = [STAA(clf, "released").attribute(c) for c in (clip, other)]
    torch.testing.assert_close(released[0], released[1])  # and none of the released maps notices, of no frame
    ours = [STAA(clf, "attention", [-1]).attribute(c) for c in (clip, other)]
    assert (ours[0] - ours[1])[:, 1:].abs().max() > 0.1 * ours[0].max()
    first = clip.clone()
    first[:, 0] = other[:, 1]
    assert (STAA(clf, "released").attribute(first) - released[0])[:, 1:].abs().max() > 0.1  # they all show frame 0


@pytest.mark.parametrize("frames", [4, 8, 16])
def test_released_2_its_temporal_attention_is_stretched_noise(frames):
    clf = divided(frames)
    clip = torch.randn(2, frames, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    rows = [min(i + 1, 9) for i in range(frames)]
    first = spatial_attention(clf, clip)[:, 0]  # S[0], (B, 1 + P, 1 + P)
    weights = torch.stack([(1 - first[:, row, 0]) / 9 for row in rows], 1)  # (1 - attention to the class token) / P
    torch.testing.assert_close(weights, torch.stack([first[:, row, 1:].mean(1) for row in rows], 1))
    moving = [weights[:, 0]]
    for i in range(1, frames):
        moving.append(0.3 * weights[:, i] + 0.7 * moving[-1])
    slow = torch.stack(moving, 1)
    low, high = slow.amin(1, keepdim=True), slow.amax(1, keepdim=True)
    temporal = STAA(clf, "released").attribute_parts(clip).temporal
    torch.testing.assert_close(temporal, (slow - low) / (high - low), rtol=1e-3, atol=1e-4)
    assert temporal.amin(1).eq(0).all() and temporal.amax(1).eq(1).all()  # stretched to all of [0, 1] ...
    # ... however little there is to stretch: of a model that looks everywhere alike, the fourth digit
    with torch.no_grad():
        clf.module.timesformer.encoder.layer[0].attention.attention.qkv.weight.mul_(0.03)
    first = spatial_attention(clf, clip)[:, 0]
    weights = torch.stack([first[:, row, 1:].mean(1) for row in rows], 1)
    assert ((weights.amax(1) - weights.amin(1)) / weights.mean(1)).max() < 1e-3
    assert STAA(clf, "released").attribute_parts(clip).temporal.amax(1).eq(1).all()


@pytest.mark.parametrize("frames", [4, 8, 16])
def test_released_3_its_threshold_is_random(frames):
    clf = divided(frames)
    clip = torch.randn(1, frames, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()

    def kept(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return STAA(clf, "released", generator=generator).attribute_parts(clip).joint.gt(0).float().mean((2, 3))

    assert torch.equal(kept(7), kept(7)) and torch.equal(kept(None), kept(None))
    assert not torch.equal(kept(7), kept(8))
    assert kept(7).amin() > 0.09 and kept(7).amax() < 0.31  # between the 70th and the 90th percentile of each frame
    assert torch.equal(torch.get_rng_state(), state)
    generator = torch.Generator().manual_seed(7)
    method = STAA(clf, "released", generator=generator)
    assert not torch.equal(method.attribute(clip), method.attribute(clip))  # a generator of one's own goes on


def test_released_4_its_map_knows_nothing_of_the_crop():
    """What the processor cut away cannot matter; the public code stretches the map over it all the same."""
    clf = divided(4)
    crop = Preprocessing(resize=(24, 48), crop=(24, 24), mean=(0.5,) * 3, std=(0.5,) * 3)
    clf = VideoClassifier(clf.module, preprocessing=crop)
    assert clf.crop_box(24, 48) == (0, 12, 24, 24)  # the middle half
    frames = torch.randint(0, 255, (4, 24, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    other = frames.clone()
    other[:, :, :10], other[:, :, 38:] = 0, 255
    maps = [STAA(clf, "released").attribute_parts(clf.preprocess(x)).joint for x in (frames, other)]
    assert torch.equal(*maps)
    assert maps[0].shape == (1, 4, 24, 24)  # of the clip, not of the frame: pictures put it back where it belongs
    assert "cropped" in (STAA.__doc__ or "") and "random" in (STAA.__doc__ or "")


@pytest.mark.parametrize("name", NAMES)
def test_released_follows_the_same_expression_everywhere(name):
    """Row i + 1 of the first frame's matrix; of the joint matrix where there is no other."""
    clf = tiny(name)
    clip = clip_for(clf)
    parts = STAA(clf, "released").attribute_parts(clip)
    assert parts.joint.min() >= 0 and parts.joint.max() == 1 and parts.joint.amax((2, 3)).eq(1).all()
    sites = [s for s in clf.family.attention(clf.module) if s.role != "temporal"]  # type: ignore[union-attr]
    with torch.no_grad(), capture(clf.module, sites[-1:], lambda call: call.head_mean()) as read:
        clf(clip)
    assert clf.grid is not None
    weights = []
    for i in range(4):
        matrix = read[sites[-1]]
        if sites[-1].role == "spatial":
            weights.append(matrix.unflatten(0, (2, 4))[:, 0, i + 1, clf.grid.prefix :].mean(1))
        else:
            row = matrix[:, min(i + 1, matrix.shape[1] - 1)]
            weights.append(clf.grid.to_grid(row)[:, i].mean((1, 2)))
    mean = [weights[0]]
    for i in range(1, 4):
        mean.append(0.3 * weights[i] + 0.7 * mean[-1])
    slow = torch.stack(mean, 1)
    low, high = slow.amin(1, keepdim=True), slow.amax(1, keepdim=True)
    expected = ((slow - low) / (high - low)).repeat_interleave(clf.grid.tubelet[0], 1)
    torch.testing.assert_close(parts.temporal, expected, rtol=1e-3, atol=1e-3)


# --- sanity, and planted truth -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> VideoClassifier:
    return VideoClassifier.from_pretrained("tiny-videomae-pattern")


@pytest.fixture(scope="module")
def planted() -> tuple[Tensor, Tensor, Tensor]:
    return PlantedClips(seed=4321, n=8)[:8]


def test_relevance_finds_what_was_planted(shipped, planted):
    clips, labels, truth = planted
    joint = STAA(shipped).attribute_parts(clips, labels).joint
    assert auroc(joint, truth) > 0.95
    random = torch.rand(joint.shape, generator=torch.Generator().manual_seed(0))
    assert abs(auroc(random, truth) - 0.5) < 0.05
    assert auroc(-joint, truth) < 0.05


@pytest.mark.parametrize("kind", ["attention", "product", "gradient", "chefer"])
def test_new_weights_give_another_map(shipped, planted, kind):
    clips = planted[0][:2]
    fresh = copy.deepcopy(shipped)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.std(correction=0))
    maps = [STAA(clf, **MODES[kind]).attribute(clips, 1) for clf in (shipped, fresh)]
    assert spearman(maps[0], maps[1]) < 0.9


@pytest.mark.parametrize("kind", ["product", "gradient", "chefer"])
def test_targets_differ(shipped, planted, kind):
    clips = planted[0][:2]
    maps = [STAA(shipped, **MODES[kind]).attribute(clips, target) for target in range(4)]
    for i in range(4):
        for j in range(i):
            assert spearman(maps[i], maps[j]) < 0.995, f"the maps of targets {j} and {i} are the same"


def test_options_that_would_be_ignored_are_refused(shipped):
    with pytest.raises(ValueError, match="rule='chefer' is a rule of mode='relevance'"):
        STAA(shipped, mode="attention", rule="chefer")
    with pytest.raises(ValueError, match="takes no focus"):
        STAA(shipped, mode="released", focus=Focus())


def test_half_precision_clips_get_float32_attributions(shipped, planted):
    """A share of attention per pixel, about 1e-5 here, has two digits in float16."""
    clip = planted[0][:1]
    exact = STAA(shipped, mode="attention").attribute(clip)
    halved = STAA(shipped, mode="attention").attribute(clip.half())
    assert exact.dtype == halved.dtype == torch.float32
    torch.testing.assert_close(halved, exact, rtol=0.02, atol=0)
