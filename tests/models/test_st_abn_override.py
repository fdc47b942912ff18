"""Gates of a user's in place of the branch's, explanations, and that neither leaves anything behind."""

from __future__ import annotations

import gc
import weakref
from threading import Barrier, Thread
from typing import Any

import pytest
import slow_st_abn
import torch
from branched_models import answer_of, injected
from covering import in_one_case
from tiny_models import snapshot
from torch import Tensor, nn

from captum_staa.models import STABN

CELLS, PIXELS = (4, 6, 5), (4, 12, 10)  # of the net in "tensor", whose clips are (2, 3, 4, 12, 10)


def gates(*shape: int, seed: int = 3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(st_abn: STABN, clip: Tensor, spatial: Tensor | None, temporal: Tensor | None) -> Tensor:
    """The net's answer with these gates of its cells, one part after the other."""
    net = st_abn.model.module
    with torch.no_grad():
        g = net.first(clip).relu()
        own = slow_st_abn.gates(st_abn.branch, g)
        spatial = own.spatial if spatial is None else spatial.expand_as(own.spatial)
        temporal = own.temporal if temporal is None else temporal.expand_as(own.temporal)
        onward = slow_st_abn.mechanism(st_abn.mechanism, "residual", g, spatial, temporal)
        return net.head(net.last(onward).tanh().mean((2, 3, 4)))


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@in_one_case()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("which", ["spatial", "temporal", "both"])
def test_gates_of_cells_replace_those_of_the_branch(which, batch):
    st_abn, _, clip = injected("tensor")
    given: dict[str, Any] = {"spatial": gates(batch, *CELLS), "temporal": gates(batch, 4)}
    given = given if which == "both" else {which: given[which]}
    expected = by_hand(st_abn, clip, given.get("spatial"), given.get("temporal"))
    with st_abn.override(**given):
        found, of_model, explained = st_abn(clip), answer_of(st_abn.model, clip), st_abn.explain(clip)
    assert (expected - by_hand(st_abn, clip, None, None)).abs().max() > 1e-3
    for answer in (found, of_model, explained.logits):
        assert_near(answer, expected)
    for name, gate in given.items():  # what acted is what is explained
        shown = {"spatial": explained.gates.spatial[:, 0], "temporal": explained.temporal_gates}[name]
        assert torch.equal(shown, gate.expand(2, *gate.shape[1:]))
    assert_near(st_abn(clip), by_hand(st_abn, clip, None, None))


def test_closed_gates_equal_the_slow_formula():
    st_abn, _, clip = injected("tensor")
    with st_abn.override(temporal=torch.zeros(1, 4)):
        assert_near(st_abn(clip), by_hand(st_abn, clip, None, torch.zeros(1, 4)))
        with st_abn.override(spatial=torch.zeros(1, *CELLS)):  # nothing passes but the features themselves
            assert torch.equal(st_abn(clip), answer_of(injected("tensor")[0].remove(), clip))


def test_gates_of_pixels_are_averaged_over_cells():
    st_abn, _, clip = injected("tensor")
    pixels, expected = gates(1, *PIXELS), torch.zeros(1, *CELLS)
    for t, y, x in torch.ones(CELLS).nonzero().tolist():
        expected[0, t, y, x] = pixels[0, t, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean()
    with st_abn.override(spatial=pixels):
        assert_near(st_abn(clip), by_hand(st_abn, clip, expected, None))


def test_gates_of_frames_are_averaged_over_steps():
    st_abn, _, clip = injected("videomae")  # 8 frames in 4 steps
    frames = gates(2, 8)
    steps = torch.stack([frames[:, 2 * step : 2 * step + 2].mean(1) for step in range(4)], 1)
    with st_abn.override(temporal=frames):
        found = st_abn.explain(clip)
    with st_abn.override(temporal=steps):
        expected = st_abn(clip)
    assert_near(found.logits, expected)
    torch.testing.assert_close(found.temporal_gates, steps.repeat_interleave(2, 1))
    assert (expected - st_abn(clip)).abs().max() > 1e-4


def test_override_with_the_branchs_own_gates_changes_nothing():
    st_abn, _, clip = injected("tensor")
    explained = st_abn.explain(clip)
    with st_abn.override(temporal=explained.temporal_gates, spatial=explained.gates.spatial[:, 0]):
        torch.testing.assert_close(st_abn(clip), explained.logits, rtol=0, atol=1e-6)


def test_inner_override_adds_to_the_outer_one_and_has_priority():
    st_abn, _, clip = injected("tensor")
    first, second, spatial = gates(1, 4), gates(1, 4, seed=4), gates(1, *CELLS)
    with st_abn.override(temporal=first):
        with st_abn.override(spatial=spatial):
            assert_near(st_abn(clip), by_hand(st_abn, clip, spatial, first))
            with st_abn.override(temporal=second):
                assert_near(st_abn.explain(clip).logits, by_hand(st_abn, clip, spatial, second))
            with st_abn.branch_disabled():
                assert torch.equal(answer_of(st_abn.model, clip), answer_of(injected("tensor")[0].remove(), clip))
        assert_near(st_abn(clip), by_hand(st_abn, clip, None, first))
    assert_near(st_abn(clip), by_hand(st_abn, clip, None, None))


def test_gradients_reach_overriding_gates():
    st_abn, _, clip = injected("tensor")
    temporal = gates(1, 4).requires_grad_()
    with st_abn.override(temporal=temporal):
        (slope,) = torch.autograd.grad(st_abn(clip)[:, 1].sum(), temporal)
    step = torch.zeros(1, 4)
    step[0, 2] = 0.01
    with torch.no_grad():
        ends = [by_hand(st_abn, clip, None, temporal + sign * step)[:, 1].sum() for sign in (1, -1)]
    torch.testing.assert_close(slope[0, 2], (ends[0] - ends[1]) / 0.02, rtol=0.02, atol=1e-4)


def test_overrides_of_two_threads_are_independent():
    st_abn, _, clip = injected("tensor")
    given = [gates(1, 4, seed=seed) for seed in range(2)]
    expected = []
    for gate in given:
        with st_abn.override(temporal=gate):
            expected.append(st_abn(clip))
    barrier, found = Barrier(3), [[], [], []]

    def work(index: int) -> None:
        barrier.wait()
        for _ in range(20):
            if index == 2:  # without an override
                found[index].append(st_abn.explain(clip).logits)
                continue
            with st_abn.override(temporal=given[index]):
                found[index].append(st_abn(clip))

    threads = [Thread(target=work, args=(i,)) for i in range(3)]
    with st_abn.override(temporal=torch.zeros(1, 4)):  # of this thread alone
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for answers, wanted in zip(found, [*expected, st_abn(clip)], strict=True):
        assert len(answers) == 20 and all(torch.equal(answer, wanted) for answer in answers)


# ---------------------------------------------------------------- nothing is left


def test_override_is_not_stored_on_the_module():
    st_abn, _, clip = injected("tensor")
    st_abn.train()
    st_abn.branch.eval()
    next(st_abn.parameters()).requires_grad_(False)
    before = snapshot(st_abn)
    with st_abn.override(temporal=gates(1, 4), spatial=gates(1, *PIXELS)):
        st_abn(clip)
        st_abn.model(clip)
        st_abn.explain(clip)
        st_abn.forward_with_gates(clip, leaves=True)
    assert snapshot(st_abn) == before


@pytest.mark.parametrize("where", ["last", "first", "branch"])
def test_override_ends_when_the_model_raises(where):
    st_abn, _, clip = injected("tensor")
    expected = st_abn(clip)
    st_abn.model.train()
    before = snapshot(st_abn)
    part = {"branch": st_abn.branch.to_maps}.get(where) or getattr(st_abn.model.module, where)

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    handle = part.register_forward_pre_hook(fail)
    shut = torch.zeros(1, 4)
    for call in (st_abn, st_abn.explain, st_abn.model):
        with pytest.raises(ZeroDivisionError), st_abn.override(temporal=shut):
            call(clip)
        with pytest.raises(ZeroDivisionError), st_abn.override(temporal=shut), st_abn.branch_disabled():
            call(clip) if where != "branch" else fail()
    handle.remove()
    assert snapshot(st_abn) == before
    assert torch.equal(st_abn.eval()(clip), expected)


def test_override_does_not_keep_gates_alive():
    """A whole data set may pass through the model in one block."""
    st_abn, _, clip = injected("tensor")
    made: list[Any] = []
    st_abn.branch.register_forward_hook(lambda module, args, output: made.append(weakref.ref(output.evidence)))
    with st_abn.override(temporal=gates(1, 4)):
        for _ in range(3):
            st_abn.model(clip)
            st_abn(clip)
        gc.collect()
        assert len(made) == 6 and not any(ref() is not None for ref in made)


def test_explanations_are_in_eval_mode_and_without_a_graph():
    st_abn, _, clip = injected("tensor", dropout=0.9)
    expected = st_abn.explain(clip)
    st_abn.train()
    found = st_abn.explain(clip.requires_grad_())
    assert torch.equal(found.attention_logits, expected.attention_logits)
    for value in (
        found.logits,
        found.attention_logits,
        found.spatial_gates,
        found.temporal_gates,
        found.gates.evidence,
    ):
        assert not value.requires_grad
    with torch.random.fork_rng():
        assert not torch.equal(st_abn.forward_with_gates(clip)[1].logits, expected.attention_logits), (
            "dropout is at work"
        )
    torch.testing.assert_close(found.logits, st_abn(clip))


def test_leaves_have_a_gradient_for_every_cell_of_both_gates():
    st_abn, _, clip = injected("tensor")
    logits, found = st_abn.forward_with_gates(clip, leaves=True)
    assert found.spatial.shape == found.temporal.shape == (2, 1, *CELLS) and found.temporal.is_leaf
    assert found.spatial.requires_grad and found.spatial.is_leaf and found.spatial is not found.temporal
    torch.testing.assert_close(logits, st_abn(clip))


def test_additional_arguments_reach_the_model():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(3, 4, 1)

        def forward(self, clip: Tensor, factor: float = 1.0) -> Tensor:
            return self.conv(clip).mean((2, 3, 4)) * factor

    st_abn, clip = STABN.inject(Scaled(), "conv", "BCTHW"), gates(1, 3, 4, 8, 8)
    for call in (st_abn, lambda *args: st_abn.explain(*args).logits, lambda *args: st_abn.forward_with_gates(*args)[0]):
        torch.testing.assert_close(call(clip, 3.0), 3 * call(clip))
    st_abn.remove()
    torch.testing.assert_close(st_abn(clip, 3.0), 3 * st_abn(clip))


# ---------------------------------------------------------------- bad input


@in_one_case()
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"temporal": gates(1, 4) + 1},
            ValueError,
            r"temporal must hold gates \(B, t\) in \[0, 1\].*from 1 to 1\.\d",
        ),
        ({"spatial": gates(1, *CELLS) - 1}, ValueError, r"spatial must hold gates \(B, t, h, w\).*\(1, 4, 6, 5\) with"),
        ({"temporal": torch.full((1, 4), float("nan"))}, ValueError, "from nan to nan"),
        ({"temporal": torch.zeros(4)}, ValueError, r"\(B, t\).*shape \(4,\)"),
        ({"spatial": torch.zeros(1, 4)}, ValueError, r"\(B, t, h, w\).*shape \(1, 4\)"),
        ({"temporal": torch.zeros(1, 0)}, ValueError, r"shape \(1, 0\) with no values"),
        ({"temporal": [[0.0] * 4]}, TypeError, "temporal must be a tensor of gates or None, got list"),
        ({"spatial": 0.5}, TypeError, "spatial must be a tensor.*got float"),
    ],
)
def test_invalid_gates_raise(given, error, message):
    st_abn, _, _ = injected("tensor")
    with pytest.raises(error, match=message), st_abn.override(**given):
        raise AssertionError("the block was entered")


@in_one_case()
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temporal": gates(1, 5)}, r"temporal gates must have .*\(2, 4\).*got shape \(1, 5\)"),
        ({"temporal": gates(1, 2)}, r"got shape \(1, 2\)"),
        ({"temporal": gates(3, 4)}, r"got shape \(3, 4\)"),
        ({"spatial": gates(1, 4, 5, 6)}, r"\(2, 4, 6, 5\), or integer multiples.*got shape \(1, 4, 5, 6\)"),
        ({"spatial": gates(1, 4, 9, 10)}, r"shape \(1, 4, 9, 10\)"),
    ],
)
def test_gates_of_a_wrong_shape_raise(given, message):
    st_abn, _, clip = injected("tensor")
    expected = st_abn(clip)
    for call in (st_abn, st_abn.explain, st_abn.model):
        with pytest.raises(ValueError, match=message), st_abn.override(**given):
            call(clip)
    assert torch.equal(st_abn(clip), expected)
    with (
        pytest.raises(ValueError, match=r"\(3, 4\).*got shape \(2, 4\)"),
        st_abn.override(temporal=gates(2, 4)),
    ):
        st_abn(torch.cat([clip, clip[:1]]))
