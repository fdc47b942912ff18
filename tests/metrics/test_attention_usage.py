"""attention_usage: changes of the outputs when gates are flattened or shuffled, and the warning if nothing changes."""

from __future__ import annotations

import importlib
import math
import warnings
from typing import Any

import pytest
import torch
from branched_models import add, case, injected, net, taught
from covering import in_one_case, over_values
from tiny_models import snapshot
from torch import Tensor

from captum_staa import VideoClassifier
from captum_staa.metrics import attention_usage
from captum_staa.metrics.attention_usage import AttentionUsage
from captum_staa.models import STABN

NAMES = ("temporal_flat", "temporal_shuffled", "spatial_flat", "spatial_shuffled")


def network() -> tuple[STABN, Tensor]:
    """A branch with a strong effect, and five clips on which classes have similar outputs."""
    st_abn, model, _ = injected("tensor")
    clips = torch.randn(5, 3, 4, 12, 10, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        st_abn.mechanism.mix.weight.mul_(4)
        model.head.weight.mul_(8)
        model.head.bias.sub_(st_abn(clips).mean(0))
    return st_abn, clips


def by_loops(st_abn: STABN, clips: Tensor, targets: list[int] | None) -> dict[str, tuple[list[float], float]]:
    """The expected values, clip by clip, with gates set through the public API."""
    gates = st_abn.explain(clips).gates
    when, where = gates.temporal[:, 0, :, 0, 0], gates.spatial[:, 0]
    found: dict[str, Any] = {name: ([], []) for name in NAMES}
    for i in range(len(clips)):
        after = (i + 1) % len(clips)
        given = {
            "temporal_flat": {"temporal": torch.full((1, 4), float(when[i].mean()))},
            "temporal_shuffled": {"temporal": when[after : after + 1]},
            "spatial_flat": {"spatial": torch.full((1, 4, 6, 5), float(where[i].mean()))},
            "spatial_shuffled": {"spatial": where[after : after + 1]},
        }
        with torch.no_grad():
            whole = st_abn(clips[i : i + 1])[0].softmax(0)
            target = int(whole.argmax()) if targets is None else targets[i]
            for name, gate in given.items():
                with st_abn.override(**gate):
                    other = st_abn(clips[i : i + 1])[0].softmax(0)
                found[name][0].append(abs(float(other[target] - whole[target])))
                found[name][1].append(int(other.argmax()) != int(whole.argmax()))
    return {name: (moves, sum(turned) / len(turned)) for name, (moves, turned) in found.items()}


@pytest.mark.parametrize("targets", [None, [0, 1, 2, 0, 1]])
def test_usage_equals_the_change_of_the_target_probability(targets):
    st_abn, clips = network()
    expected = by_loops(st_abn, clips, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        usage = attention_usage(st_abn, clips, targets)
    for name, (moves, decided) in expected.items():
        torch.testing.assert_close(getattr(usage, name), torch.tensor(moves), rtol=1e-3, atol=1e-6)
        assert usage.decisions[name] == pytest.approx(decided)
    assert (
        usage.used and max(usage.decisions.values()) > 0 and len({tuple(moves) for moves, _ in expected.values()}) == 4
    )


def test_targets_as_int_list_or_tensor():
    st_abn, clips = network()
    one = attention_usage(st_abn, clips, 1)
    for targets in ([1] * 5, torch.ones(5).long(), torch.tensor(1)):
        assert torch.equal(attention_usage(st_abn, clips, targets).spatial_flat, one.spatial_flat)
    assert one.decisions == attention_usage(st_abn, clips, 2).decisions, "decisions do not depend on the target"
    for targets in (3, [0, 1], -4):
        with pytest.raises(ValueError, match="target"):
            attention_usage(st_abn, clips, targets)


@pytest.mark.parametrize("kind", ["new", "observe"])
def test_a_network_that_ignores_its_gates_causes_a_warning(kind):
    model, layer, clip, options = case("tensor")
    st_abn = injected("tensor", mechanism="observe")[0] if kind == "observe" else add(model, layer, clip, **options)
    with pytest.warns(UserWarning, match=r"at most 0\.00% on average.*ignores its attention"):
        usage = attention_usage(st_abn, torch.cat([clip, 2 * clip]))
    assert not usage.used and set(usage.decisions) == set(NAMES)
    assert all(not getattr(usage, name).any() and usage.decisions[name] == 0 for name in NAMES)


@in_one_case()
@over_values
@pytest.mark.parametrize(("largest", "used"), [(0.0099, False), (0.0101, True)])
@pytest.mark.parametrize("name", NAMES)
def test_a_change_of_one_percent_counts_as_use(name, largest, used):
    moves = {key: torch.tensor([0.0, 2 * largest if key == name else 0.0]) for key in NAMES}
    assert AttentionUsage(**moves, decisions=dict.fromkeys(NAMES, 0.0)).used is used


def test_the_threshold_is_the_constant_unused(monkeypatch):
    usage = AttentionUsage(**dict.fromkeys(NAMES, torch.tensor([0.3])), decisions=dict.fromkeys(NAMES, 0.0))
    assert usage.used and "are used" in usage._repr_html_()
    module = importlib.import_module("captum_staa.metrics.attention_usage")  # the function has the same name
    monkeypatch.setattr(module, "UNUSED", 0.5)
    assert not usage.used and "all mean changes are below 50 %" in usage._repr_html_()


def test_shuffled_values_of_a_single_clip_are_nan():
    st_abn, clips = network()
    together, alone = by_loops(st_abn, clips, None), attention_usage(st_abn, clips[:1])
    for name in NAMES:
        moves = getattr(alone, name)
        if name.endswith("shuffled"):
            assert moves.shape == (1,) and moves.isnan().all() and math.isnan(alone.decisions[name])
        else:
            assert float(moves) == pytest.approx(together[name][0][0], rel=1e-3)
    model, layer, clip, options = case("tensor")
    with pytest.warns(UserWarning, match=r"at most 0\.00%"):
        assert not attention_usage(add(model, layer, clip, **options), clip[:1]).used


def test_shuffling_is_between_clips_and_flattening_within_a_clip():
    """Equal clips have equal gates: a shuffle between them changes nothing, but flattening does."""
    st_abn, clips = network()
    usage = attention_usage(st_abn, clips[:1].expand(3, -1, -1, -1, -1).contiguous())
    assert usage.temporal_shuffled.max() < 1e-6 and usage.spatial_shuffled.max() < 1e-6
    assert usage.temporal_flat.min() > 1e-4 and usage.spatial_flat.min() > 1e-4


def test_the_model_is_unchanged_and_runs_in_eval_mode():
    st_abn, clips = network()
    expected = attention_usage(st_abn, clips)
    with_dropout, _, _ = injected("tensor", dropout=0.9)
    with_dropout.load_state_dict(st_abn.state_dict())
    with_dropout.train()
    before = snapshot(with_dropout)
    found = attention_usage(VideoClassifier(with_dropout, "BCTHW"), clips)
    assert snapshot(with_dropout) == before
    assert torch.equal(found.temporal_flat, expected.temporal_flat) and not found.temporal_flat.requires_grad


def test_two_layouts_give_the_same_values():
    (one, _, _), (other, _, _) = injected("tensor"), injected("btchw")
    clips = network()[1]
    taught(one), taught(other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = attention_usage(one, clips), attention_usage(other, clips.transpose(1, 2))
    torch.testing.assert_close(first.spatial_shuffled, second.spatial_shuffled, rtol=1e-3, atol=1e-6)


def test_invalid_arguments_raise():
    st_abn, clips = network()
    with pytest.raises(TypeError, match=r"must be a models\.STABN, got Net"):
        attention_usage(net(), clips)
    with pytest.raises(ValueError, match=r"\(3, 4, 12, 10\)"):
        attention_usage(st_abn, clips[0])
    with pytest.raises(ValueError, match="nan"):
        attention_usage(st_abn, clips / 0)
    st_abn.remove()
    with pytest.raises(ValueError, match="branch was removed"):
        attention_usage(st_abn, clips)
