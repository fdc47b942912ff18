"""The bottleneck: what the gates close cannot reach the rest of the network, and the gates learn to close the rest."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import slow_st_abn
import torch
from branched_models import CASES, TOKENS, answer_of, case, injected, net, taught
from covering import over_values
from st_abn_networks import clips_of, seeded, settled, slow_resnet
from tiny_models import clip_for, randomize, snapshot, tiny
from torch import Tensor, nn

from captum_staa import VideoClassifier
from captum_staa.models import STABN, BranchConfig, FitConfig, STABNLoss, fit_st_abn
from captum_staa.models.resnet3d import ResNet3D
from captum_staa.models.st_abn.loss import trained_modules

TARGETS = torch.tensor([2, 0])


def bottleneck(name: str = "tensor", **options: Any) -> tuple[STABN, nn.Module, Tensor]:
    st_abn, model, clip = injected(name, mechanism="bottleneck", width=4, **options)
    st_abn.mechanism.mean.normal_(generator=torch.Generator().manual_seed(3))
    return st_abn, model, clip


def own(**options: Any) -> STABN:
    """A small 3D CNN with gates behind its stem, with random weights."""
    trunk = seeded(ResNet3D, 3, width=4, num_frames=8, image_size=24)
    return randomize(seeded(STABN, 3, trunk, mechanism="bottleneck", dropout=0.0, **options), 0)


# ---------------------------------------------------------------- what passes


@over_values
@pytest.mark.parametrize("body", ["pyramid", "light"])
@pytest.mark.parametrize("name", [*CASES, *TOKENS])
def test_features_are_replaced_by_the_mean_where_gates_are_closed(name, body):
    """mu + M alpha (g - mu), against a hook with loops over channels, whose gates are those of the branch."""
    st_abn, _, clip = bottleneck(name, body=body)
    plain = copy.deepcopy(st_abn).remove()
    with torch.no_grad():
        logits, gates = st_abn.forward_with_gates(clip)

    def by_hand(_: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        g = slow_st_abn.to_cells(first, st_abn.grid)
        gated = slow_st_abn.mechanism(
            st_abn.mechanism, "bottleneck", g, gates.spatial[:, 0], gates.temporal[:, 0, :, 0, 0]
        )
        gated = slow_st_abn.from_cells(gated, first, st_abn.grid)
        return (gated, *output[1:]) if isinstance(output, tuple) else gated

    without = answer_of(plain, clip)
    getattr(plain, "module", plain).get_submodule(st_abn.layer).register_forward_hook(by_hand)
    torch.testing.assert_close(logits, answer_of(plain, clip), rtol=0, atol=2e-5)
    assert (logits - without).abs().max() > 1e-3, "the branch does nothing here"


def test_gates_equal_the_slow_formula():
    """A bias in place of M's norm; the branch's cells are as large as the features' with a light body."""
    st_abn, _, clip = bottleneck(body="light")
    with st_abn.branch_disabled(), torch.no_grad():
        g = st_abn.model.module.middle(st_abn.model.module.first(clip).relu())
    expected, found = slow_st_abn.gates(st_abn.branch, g), st_abn.explain(clip).gates
    torch.testing.assert_close(found.spatial[:, 0], expected.spatial, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.temporal[:, 0, :, 0, 0], expected.temporal, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["tensor", "videomae"])
def test_nothing_of_the_clip_passes_closed_gates(name):
    """Two clips have the same logits, bit for bit, and an open cell alone tells them apart."""
    st_abn, _, clip = bottleneck(name)
    shape = st_abn.explain(clip).gates.spatial.shape[2:]
    closed = torch.zeros(1, *shape)
    opened = closed.clone()
    opened[0, 1, 1, 0] = 1
    with st_abn.override(spatial=closed), torch.no_grad():
        first, second = st_abn(clip)
    assert torch.equal(first, second)
    with st_abn.override(spatial=opened, temporal=torch.ones(1, shape[0])), torch.no_grad():
        first, second = st_abn(clip)
    assert not torch.equal(first, second)
    with st_abn.override(spatial=opened, temporal=torch.zeros(1, shape[0])), torch.no_grad():
        first, second = st_abn(clip)
    assert torch.equal(first, second)


def test_new_gates_are_open_and_the_mean_is_that_of_the_example():
    model, layer, clip, options = case("tensor")
    g = model.middle(model.first(clip[:1]).relu())
    st_abn = seeded(STABN.inject, model, layer, mechanism="bottleneck", example=clip, **options)
    gates = st_abn.explain(clip).gates
    assert gates.temporal.min() > 0.7 and gates.spatial.mean() > 0.6
    torch.testing.assert_close(st_abn.mechanism.mean, g.mean((0, 2, 3, 4)))
    assert st_abn.config.body == "pyramid" and st_abn.branch.classify.in_features == 32 * 4


def test_gates_of_an_own_network_are_behind_its_stem():
    """The encoder of its branch is a copy of all stages but the last, with their weights."""
    trunk = seeded(ResNet3D, 3, width=4, num_frames=8, image_size=24)
    st_abn = STABN(3, trunk, mechanism="bottleneck")
    assert st_abn.layer == "stem" and st_abn.explain(clips_of(8, 24)).grid == (8, 12, 12)
    levels = st_abn.branch.body.levels
    assert len(levels) == 2
    for level, stage in zip(levels, trunk.stages, strict=False):
        for (name, mine), theirs in zip(level.state_dict().items(), stage.state_dict().values(), strict=True):
            assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr(), name
    deep = settled(STABN(5, slow_resnet(), mechanism="bottleneck"))
    assert deep.explain(clips_of(5, 32)).grid == (5, 8, 8), "any number of frames"


# ---------------------------------------------------------------- in train mode


def test_mean_follows_the_features_of_training_batches_only():
    st_abn, _, clip = bottleneck()
    layer = st_abn.model.module.middle
    seen: list[Tensor] = []
    handle = st_abn.model.module.first.register_forward_hook(lambda m, args, out: seen.append(out.relu()))
    before = st_abn.mechanism.mean.clone()
    st_abn(clip)
    assert torch.equal(st_abn.mechanism.mean, before) and layer is not None
    st_abn.train()
    for scale in (1, 3):
        st_abn(scale * clip)
    handle.remove()
    means = [features.mean((0, 2, 3, 4)) for features in seen[1:]]
    torch.testing.assert_close(st_abn.mechanism.mean, (means[0] + means[1]) / 2, rtol=1e-5, atol=1e-6)


def test_gates_are_noisy_and_steps_are_dropped_in_train_mode_only():
    st_abn, _, clip = bottleneck(drop=0.5, noise=0.5)
    assert torch.equal(st_abn(clip), st_abn(clip))
    taken: list[Tensor] = []
    st_abn.train()
    first = st_abn.forward_with_gates(clip)[1]
    handle = st_abn.model.module.middle.register_forward_hook(lambda m, args, out: taken.append(out))
    for _ in range(20):
        st_abn(clip)
    handle.remove()
    second = st_abn.forward_with_gates(clip)[1]
    assert not torch.equal(first.spatial, second.spatial) and not torch.equal(first.temporal, second.temporal)
    steps = torch.cat(taken).transpose(1, 2).flatten(0, 1)  # (B t, C, h, w)
    constant = (steps == steps[..., :1, :1]).flatten(1).all(1)
    assert 0.35 < float(constant.float().mean()) < 0.65, "half of the steps are closed"
    still, _, clip = bottleneck(drop=0.0, noise=0.0)
    assert torch.equal(still.train().forward_with_gates(clip)[1].spatial, still.eval().explain(clip).gates.spatial)


# ---------------------------------------------------------------- the loss


def test_faithful_terms_equal_a_slow_loop():
    st_abn, _, clip = bottleneck()
    with torch.no_grad():
        logits, gates = st_abn.forward_with_gates(clip)
        terms = STABNLoss("faithful", area=0.7, removed=0.5).terms(st_abn, clip, TARGETS)
        joint = (gates.spatial * gates.temporal)[:, 0]
        known = 0.0
        for i in range(2):
            with st_abn.override(spatial=1 - joint[i : i + 1], temporal=torch.ones(1, 4)):
                row = st_abn(clip[i : i + 1])[0].double().tolist()
            total = sum(map(math.exp, row))
            known += sum(math.log((1 / 3) / (math.exp(value) / total)) / 3 for value in row) / 2
    expected = {
        "perception": float(nn.functional.cross_entropy(logits, TARGETS)),
        "attention": float(nn.functional.cross_entropy(gates.logits, TARGETS)),
        "removed": 0.5 * known,
        "area": 0.7 * float(joint.mean() + 0.2 * gates.temporal.mean()),
    }
    assert list(terms) == list(expected) and known > 1e-4
    for term, value in expected.items():
        assert float(terms[term]) == pytest.approx(value, rel=1e-3), term


def test_only_the_branch_learns_from_what_is_removed():
    st_abn = own().train()
    before = snapshot(st_abn)
    clip = clips_of(8, 24)
    terms = STABNLoss("faithful").terms(st_abn, clip, TARGETS)
    model, gates = list(st_abn.model.parameters()), list(st_abn.branch.to_spatial.parameters())
    removed = torch.autograd.grad(terms["removed"], model, retain_graph=True, allow_unused=True)
    behind = {
        name for (name, _), slope in zip(st_abn.model.named_parameters(), removed, strict=True) if slope is not None
    }
    assert behind and all(".stem." in name for name in behind), "through the branch's features, not through the head"
    for term in ("perception", "removed", "area"):
        slopes = torch.autograd.grad(terms[term], gates, retain_graph=True)
        assert all(slope.abs().max() > 0 for slope in slopes), term
    changed = {name for name, value in snapshot(st_abn).items() if value != before[name]}
    assert all(name == "random state of torch" or "mechanism" in name for name in changed), changed


def test_layers_in_front_of_an_injected_bottleneck_are_not_trained():
    st_abn, model, clip = bottleneck()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit_st_abn(st_abn, [(clip, TARGETS)], preset="faithful", epochs=2)
    still = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert still == ["first.weight", "first.bias"]
    assert trained_modules(st_abn, "faithful") == [st_abn]
    owned = own()
    stem = owned.model.module.stem[0].weight.clone()
    fit_st_abn(owned, [(clips_of(8, 24), TARGETS)], epochs=1)  # "faithful" is the default of a bottleneck
    assert not torch.equal(stem, owned.model.module.stem[0].weight)


def test_terms_that_close_the_gates_count_later_in_the_training():
    loss = STABNLoss("faithful")
    when = [loss.weights_at(progress) for progress in (0, 0.05, 0.175, 0.3, 0.4, 0.475, 0.55, 0.65, 0.75, 1)]
    assert [factors["area"] for factors in when] == pytest.approx([0, 0, 2, 4, 4, 3, 2, 1.5, 1, 1])
    assert [factors["removed"] for factors in when] == pytest.approx([0, 0, 1 / 6, 1 / 3, 1 / 3, 2 / 3, 1, 1, 1, 1])
    assert STABNLoss("paper").weights_at(0) == STABNLoss("edit").weights_at(0) == {}
    st_abn, _, clip = bottleneck(noise=0.0, drop=0.0)
    with torch.no_grad():
        area = float(loss.terms(st_abn, clip, TARGETS)["area"])
    (terms,) = fit_st_abn(st_abn, [(clip, TARGETS)], loss, epochs=1).train
    assert terms["area"] == pytest.approx(area, rel=1e-4), "epochs are compared at full weights"
    assert terms.pop("loss") == pytest.approx(sum(terms.values()), rel=1e-5) and terms["removed"] > 0


def test_edited_gates_that_are_nan_are_not_learned():
    st_abn, _, clip = bottleneck()
    gates = st_abn.explain(clip).gates
    edited = torch.rand(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    edited[1] = torch.nan
    with torch.no_grad():
        terms = STABNLoss("edit").terms(st_abn, clip, TARGETS, spatial=edited)
        none = STABNLoss("edit").terms(st_abn, clip, TARGETS, spatial=torch.full_like(edited, torch.nan))
    assert list(terms) == ["perception", "attention", "area", "edit"]
    expected = 10 * float((gates.spatial[0, 0] - edited[0]).square().mean())
    assert float(terms["edit"]) == pytest.approx(expected, rel=1e-4) and float(none["edit"]) == 0


def test_gates_close_all_but_the_evidence():
    """A bright or dark square is the class; brightness elsewhere, as strong, is not."""
    generator = torch.Generator().manual_seed(0)

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        clips = 0.1 * torch.randn(8, 3, 4, 12, 12, generator=generator)
        labels = torch.arange(8) % 2
        truth = torch.zeros(8, 4, 12, 12, dtype=torch.bool)
        for i in range(8):
            t, y, x = (int(torch.randint(0, n, (), generator=generator)) for n in (3, 2, 2))
            truth[i, t : t + 2, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = True
            clips[i, 0, truth[i]] += 1 if labels[i] else -1  # in the first channel
            clips[i, 2, :, 8:, 8:] += 1 if torch.rand((), generator=generator) < 0.5 else -1  # in another one
        return clips, labels, truth

    class Brightest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.head = nn.Conv3d(3, 8, 1), nn.Conv3d(8, 8, 3, padding=1), nn.Linear(8, 2)

        def forward(self, clip: Tensor) -> Tensor:
            return self.head(self.conv(self.stem(clip)).relu().amax((2, 3, 4)))

    config = BranchConfig("bottleneck", body="light", width=8)
    st_abn = seeded(STABN.inject, seeded(Brightest), "stem", "BCTHW", config=config, example=batch()[0])
    maker: Any = lambda parameters: torch.optim.AdamW(parameters, lr=0.02)  # noqa: E731
    batches = [batch()[:2] for _ in range(6)]
    fit_st_abn(st_abn, batches, STABNLoss("faithful", area=2.0), FitConfig(maker), epochs=20)
    clips, labels, truth = batch()
    found = st_abn.explain(clips)
    joint = found.spatial_gates * found.temporal_gates[:, :, None, None]
    assert (found.logits.argmax(1) == labels).all()
    assert joint[truth].mean() > 10 * joint[~truth].mean()
    with st_abn.override(spatial=(found.spatial_gates * ~truth).clamp(0, 1)), torch.no_grad():
        assert (st_abn(clips).softmax(1).amax(1) < 0.8).all(), "nothing else says the class"


# ---------------------------------------------------------------- files and errors


def test_injected_bottleneck_is_saved_with_the_model_behind_it(tmp_path):
    clf = tiny("videomae")
    clip = clip_for(clf)
    st_abn = seeded(STABN.inject, clf, "videomae.encoder.layer.0", mechanism="bottleneck")
    with torch.no_grad():
        st_abn.model.module.classifier.weight.add_(1)  # as if it were trained
    taught(st_abn)
    expected = st_abn.explain(clip)
    st_abn.save_pretrained(tmp_path)
    other = STABN.from_pretrained(tmp_path, model=tiny("videomae"))
    found = other.explain(clip)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.spatial_gates, expected.spatial_gates)


def test_own_bottleneck_is_saved_with_its_trunk(tmp_path):
    st_abn, clip = own(labels=["a", "b", "c"]), clips_of(8, 24)
    expected = st_abn.explain(clip)
    st_abn.save_pretrained(tmp_path)
    other = STABN.from_pretrained(tmp_path)
    assert other.config == st_abn.config and torch.equal(other.explain(clip).logits, expected.logits)
    assert torch.equal(other.explain(clip).temporal_gates, expected.temporal_gates)


def test_arguments_that_contradict_each_other_raise():
    st_abn, _, clip = injected("tensor")
    with pytest.raises(ValueError, match=r"'faithful' needs mechanism='bottleneck', got mechanism='residual'"):
        STABNLoss("faithful")(st_abn, clip, TARGETS)
    with pytest.raises(ValueError, match=r"mechanism must be None if config is given, got 'bottleneck'"):
        STABN.inject(net(), "middle", "BCTHW", mechanism="bottleneck", config=BranchConfig(), example=clip)
    with pytest.raises(ValueError, match=r"preset must be None if loss is given, got 'paper'"):
        fit_st_abn(st_abn, [(clip, TARGETS)], STABNLoss("paper"), preset="paper")
    small, config = ResNet3D(3, width=4, num_frames=8), BranchConfig("bottleneck", "stages")
    with pytest.raises(ValueError, match=r"body='stages' needs a layer in front of the model's \.stages"):
        STABN.inject(small, "stages.1", "BCTHW", config=config, example=clips_of(8, 24))

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = ResNet3D(3, width=4).stages

    with pytest.raises(ValueError, match=r"trunk must have a module \.stem .*got Bare.*STABN\.inject"):
        STABN(3, Bare(), mechanism="bottleneck")
    one = seeded(STABN.inject, VideoClassifier(net(), "BCTHW"), "middle", mechanism="bottleneck", example=clip)
    one.model.module.head = nn.Linear(5, 1)
    with pytest.raises(ValueError, match="at least two classes"):
        STABNLoss("faithful")(one, clip, torch.zeros(2, 1))
