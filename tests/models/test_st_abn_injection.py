"""A branch in any model: nothing changes before it learns, tokens keep their places, and no trace is left of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import slow_st_abn
import torch
from branched_models import CASES, TOKENS, Pair, add, answer_of, case, hooks_of, injected, net, taught
from covering import in_one_case, over_values
from tiny_models import clip_for, randomize, snapshot, tiny
from torch import Tensor, nn

from captum_staa import TokenGrid
from captum_staa.models import STABN, BranchConfig


@over_values
@pytest.mark.parametrize("mechanism", ["residual", "observe"])
@pytest.mark.parametrize("name", [*CASES, *TOKENS])
def test_new_branch_does_not_change_the_output_and_can_be_removed(name, mechanism):
    model, layer, clip, options = case(name)
    before, expected = snapshot(model), answer_of(model, clip)
    st_abn = add(model, layer, clip, mechanism=mechanism, **options)
    assert len(hooks_of(model, layer)) == 1
    assert torch.equal(answer_of(st_abn, clip), expected)
    assert torch.equal(answer_of(model, clip), expected), "the model itself has the branch in it, too"
    assert torch.equal(st_abn.explain(clip).logits, expected)
    assert st_abn.remove() is model
    assert torch.equal(answer_of(model, clip), expected)
    assert snapshot(model) == before and not hooks_of(model, layer)


@pytest.mark.parametrize("name", [*CASES, *TOKENS])
def test_trained_branch_equals_the_slow_formula(name):
    """Against a hook of one's own, with loops over cells and channels; what is no cell passes bit for bit."""
    st_abn, model, clip = injected(name)
    plain, layer = copy.deepcopy(st_abn).remove(), st_abn.layer
    module, seen = getattr(plain, "module", plain).get_submodule(layer), []

    def by_hand(_: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        g = slow_st_abn.to_cells(first, st_abn.grid)
        gates = slow_st_abn.gates(st_abn.branch, g)
        onward = slow_st_abn.mechanism(st_abn.mechanism, "residual", g, gates.spatial, gates.temporal)
        seen.append((gates, slow_st_abn.from_cells(onward, first, st_abn.grid), first))
        return (seen[0][1], *output[1:]) if isinstance(output, tuple) else seen[0][1]

    ungated = answer_of(plain, clip)
    module.register_forward_hook(by_hand)
    passed: list[Tensor] = []
    hooked = getattr(model, "module", model).get_submodule(layer)
    hooked.register_forward_hook(
        lambda m, args, output: passed.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        logits, found = st_abn.forward_with_gates(clip)
    torch.testing.assert_close(logits, answer_of(plain, clip), rtol=0, atol=2e-5)
    assert (logits - ungated).abs().max() > 1e-3, "the branch does nothing here"
    (gates, after, output) = seen[0]
    torch.testing.assert_close(found.spatial[:, 0], gates.spatial, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.temporal[:, 0, :, 0, 0], gates.temporal, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.logits, gates.logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(passed[0], after, rtol=0, atol=2e-5)
    if st_abn.grid is not None and output.ndim == 3 and st_abn.grid.prefix:
        assert torch.equal(passed[0][:, 0], output[:, 0]) and not torch.equal(passed[0][:, 1], output[:, 1])


def test_tokens_of_timesformer_are_placed_as_in_the_model():
    """Its order is place after place: only the token behind the changed cell tells."""
    st_abn, _, clip = injected("timesformer")
    assert st_abn.grid.order == "hwt" and st_abn.grid.shape == (4, 3, 2)
    taken: list[Tensor] = []
    layer = st_abn.model.module.get_submodule(st_abn.layer)
    layer.register_forward_hook(
        lambda m, args, output: taken.append(output[0] if isinstance(output, tuple) else output)
    )
    gate = torch.full((1, 4, 3, 2), 0.5)
    for t, y, x in ((0, 0, 0), (1, 2, 1), (3, 0, 1)):
        other = gate.clone()
        other[0, t, y, x] = 1
        taken.clear()
        for spatial in (gate, other):
            with torch.no_grad(), st_abn.override(spatial=spatial):
                st_abn(clip)
        moved = (taken[0] != taken[1]).any(2).any(0).nonzero()[:, 0].tolist()
        assert moved == [1 + (y * 2 + x) * 4 + t]


def test_tuple_outputs_keep_their_type_and_other_items():
    st_abn, model, clip = injected("named tuple")
    given = []
    model.middle.register_forward_hook(lambda m, args, output: given.append(output))
    st_abn(clip)
    assert type(given[0]) is Pair and given[0].weights is None


def test_result_does_not_depend_on_the_layout():
    (one, _, clip), (other, _, turned) = injected("tensor"), injected("btchw")
    assert torch.equal(clip.transpose(1, 2), turned)
    torch.testing.assert_close(one(clip), other(turned), rtol=0, atol=1e-6)
    first, second = one.explain(clip), other.explain(turned)
    torch.testing.assert_close(first.spatial_gates, second.spatial_gates, rtol=0, atol=1e-6)
    torch.testing.assert_close(first.temporal_gates, second.temporal_gates, rtol=0, atol=1e-6)


def test_two_branches_on_one_model_are_independent():
    clf = tiny("videomae")
    clip = clip_for(clf)
    expected = clf(clip)
    first, second = (taught(STABN.inject(clf, f"videomae.encoder.layer.{i}"), seed) for i, seed in ((0, 5), (1, 7)))
    both = clf(clip)
    assert torch.equal(first(clip), both) and torch.equal(second(clip), both)
    with first.branch_disabled():
        of_second = clf(clip)
    with first.override(temporal=torch.zeros(1, 4)), second.branch_disabled():
        counterfactual = clf(clip)
    assert not torch.equal(of_second, both) and not torch.equal(of_second, expected)
    first.remove()
    assert torch.equal(second(clip), of_second) and torch.equal(first(clip), of_second)
    assert not torch.equal(counterfactual, expected)
    assert second.remove() is clf and torch.equal(clf(clip), expected)


def test_two_branches_on_one_layer_are_applied_in_order():
    model, layer, clip, options = case("tensor")
    first = taught(STABN.inject(model, layer, example=clip, **options))
    alone = first(clip)
    second = taught(STABN.inject(model, layer, example=clip, **options), seed=7)
    assert not torch.allclose(second(clip), alone)
    second.remove()
    assert torch.equal(first(clip), alone)


def test_copy_has_its_own_branch():
    st_abn, model, clip = injected("tensor")
    expected = st_abn(clip)
    twin = copy.deepcopy(st_abn)
    with twin.override(temporal=torch.zeros(1, 4)):
        assert torch.equal(st_abn(clip), expected), "what is asked of the copy is asked of the copy"
        assert not torch.equal(twin(clip), expected)
    randomize(twin.branch, seed=9)
    assert torch.equal(st_abn(clip), expected) and not torch.equal(twin(clip), expected)
    removed = twin.remove()
    assert removed is not model and torch.equal(removed(clip), net()(clip))
    assert torch.equal(st_abn(clip), expected)
    st_abn.remove()
    assert torch.equal(model(clip), net()(clip))


def test_modes_and_precision_follow_the_model():
    model, layer, clip, options = case("tensor")
    st_abn = STABN.inject(model.double().train(), layer, example=clip, **options)
    assert {p.dtype for p in st_abn.parameters()} == {torch.float64}
    assert all(module.training for module in st_abn.modules())
    still = STABN.inject(net(), layer, example=clip, **options)
    assert not any(module.training for module in still.modules())
    assert st_abn.float()(clip).dtype == torch.float32


def test_custom_body():
    model, layer, clip, options = case("tensor")
    body = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm3d(6), nn.Conv3d(6, 8, 1)).train()
    before, random = copy.deepcopy(body.state_dict()), torch.get_rng_state()
    st_abn = STABN.inject(model, layer, config=BranchConfig(body=body, maps=2), example=clip, **options)
    assert st_abn.branch.body is body and st_abn.branch.body_norm.weight.shape == (8,)
    assert all(torch.equal(value, before[name]) for name, value in body.state_dict().items())
    assert st_abn.explain(clip).gates.evidence.shape[1] == 2 and not torch.equal(random, torch.get_rng_state())


# ---------------------------------------------------------------- bad input


class Odd(nn.Module):
    """Layers that carry no branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.head = nn.Conv3d(3, 3, 3, 2, 1), nn.AdaptiveAvgPool3d(1), nn.Linear(3, 3)
        self.twice, self.never, self.mask = nn.ReLU(), nn.Conv3d(3, 3, 1), nn.Identity()

    def forward(self, clip: Tensor) -> Tensor:
        maps = self.twice(self.twice(self.conv(clip)))
        self.mask(maps > 0)
        return self.head(self.pool(maps).flatten(1))


@in_one_case()
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("stage.1", r"'stage\.1'"),
        ("con", "'con'.*'conv'"),
        ("head", r"layer 'head' must be .*got shape \(1, 3\).*Pass grid=.*TokenGrid"),
        ("mask", r"layer 'mask' must return a tensor of floats.*got torch\.bool"),
        ("twice", "call layer 'twice' once, got 2 calls"),
        ("never", "call layer 'never' once, got 0 calls"),
    ],
)
def test_unsuitable_layers_raise(layer, message):
    model = Odd()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        STABN.inject(model, layer, "BCTHW", example=torch.zeros(2, 3, 4, 8, 8))
    assert snapshot(model) == before


@in_one_case()
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layout": None}, ValueError, "layout"),
        ({"mechanism": "gate"}, ValueError, "mechanism .*'mix', 'residual', 'observe', 'bottleneck', got 'gate'"),
        ({"temporal": 4}, ValueError, "temporal .*got 4"),
        ({"body": "stage"}, ValueError, r"body='stage' needs .*\.stages.*got Net\. Use body='light'"),
        ({"body": "deep"}, ValueError, "body .*'stage', 'light', 'stages', 'pyramid', got 'deep'"),
        ({"width": 0}, ValueError, "width .*at least 1, got 0"),
        ({"maps": 2.5}, TypeError, "maps .*got 2.5"),
        ({"dropout": -0.1}, ValueError, r"dropout must be .*got -0\.1"),
        ({"drop": 1.0}, ValueError, r"drop must be .*less than 1, got 1\.0"),
        ({"noise": float("inf")}, ValueError, "noise must be a finite number.*got inf"),
        ({"body": "stages"}, ValueError, r"body='stages' needs .*\.stages.*got Net"),
        ({"layer": 3}, TypeError, "layer .*got int"),
        ({"layer": nn.Conv3d(3, 3, 1)}, ValueError, "Net"),
        (
            {"body": nn.Conv3d(6, 8, 3, 2)},
            ValueError,
            r"keep t, h and w .*features of shape \(1, 6, 4, 6, 5\).*strides",
        ),
        ({"clip": torch.zeros(1, 5, 4, 12, 10)}, RuntimeError, "channels"),
    ],
)
def test_invalid_options_raise(options, error, message):
    model, layer, clip, more = case("tensor")
    arguments = {"layer": layer, "clip": clip, **more, **options}
    before = snapshot(model)
    with pytest.raises(error, match=message):
        add(model, **arguments)
    assert snapshot(model) == before


def test_function_instead_of_a_model_raises():
    with pytest.raises(TypeError, match=r"module must be an nn\.Module, got function"):
        STABN.inject(lambda clip: clip, "layer", "BCTHW")


def test_model_that_fails_on_zeros_needs_an_example():
    model, layer, _, options = case("resnet3d")  # of 4 frames, where 16 are tried
    with pytest.raises(
        ValueError, match=r"clip of zeros, got an error for shape \(1, 3, 16, 64, 64\).*Pass example=clip"
    ):
        STABN.inject(model, layer, **options)
    assert not hooks_of(model, layer)


def test_removed_branch_raises():
    st_abn, model, clip = injected("tensor")
    st_abn.remove()
    assert st_abn.remove() is model, "remove may be called twice"
    for call in (st_abn.explain, st_abn.forward_with_gates):
        with pytest.raises(ValueError, match=r"branch was removed.*STABN\.inject"):
            call(clip)
    assert torch.equal(st_abn(clip), net()(clip))


def test_tokens_of_another_clip_size_raise():
    class Any_(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.tokens = nn.Conv3d(3, 6, (1, 4, 4), (1, 4, 4)), nn.Identity()

        def forward(self, clip: Tensor) -> Tensor:
            return self.tokens(self.embed(clip).flatten(2).transpose(1, 2)).mean(1)

    grid = TokenGrid(4, 3, 2, tubelet=(1, 4, 4))
    st_abn = STABN.inject(Any_(), "tokens", "BCTHW", grid, example=torch.zeros(1, 3, 4, 12, 8))
    assert st_abn.explain(torch.rand(2, 3, 4, 12, 8)).grid == (4, 3, 2)
    with pytest.raises(ValueError, match=r"layer 'tokens' must fit .*got shape \(1, 48, 6\)\. Pass clips of the size"):
        st_abn(torch.rand(1, 3, 4, 24, 8))
