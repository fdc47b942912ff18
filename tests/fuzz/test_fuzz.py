"""The short form of ``python -m tests.fuzz``: a few drawn calls of every entry point; and the judge is judged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from covering import in_one_case
from torch import nn

from captum_staa import VideoOcclusion, smooth
from fuzz.calls import CLEAR, RIGHT, WRONG, Call, judge
from fuzz.models import anything
from fuzz.run import ENTRIES, SHARES, drawn
from fuzz.twins import form, valid_call


@in_one_case()
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_drawn_call_ends_well(entry: str) -> None:
    ended = []
    drawn(entry, 2 * SHARES[entry], 1, lambda call: ended.append(judge(call)))
    assert ended
    assert not [why for verdict, why in ended if verdict == WRONG]


def call(run: Any, **more: Any) -> Call:
    return Call("f()", run, lambda found: None, **more)


def test_a_right_result_and_a_clear_error() -> None:
    clip = torch.rand(1, 2, 1, 3, 3)
    assert judge(call(lambda: smooth(clip, "BTCHW")))[0] == RIGHT
    bad = call(lambda: smooth(clip, "BTC"), changed=("layout", "BTC"), must_fail=True)
    assert judge(bad)[0] == CLEAR


def _leave_a_hook(model: nn.Module) -> None:
    model.register_forward_hook(lambda *_: None)


def _raise(error: Exception) -> None:
    raise error


@in_one_case()
@pytest.mark.parametrize(
    ("run", "more", "why"),
    [
        (lambda: torch.rand(1), {}, "random state"),
        (lambda: "a map", {"must_fail": True, "changed": ("clip", 3)}, "accepted"),
        (lambda: _raise(KeyError("clip")), {"changed": ("clip", 3)}, "KeyError"),
        (lambda: _raise(ValueError("clip")), {"changed": ("clip", 3)}, "by accident"),
        (lambda: smooth(torch.ones(1, 2, 1, 3, 3), "B"), {}, "a valid call raised ValueError"),
        (lambda: torch.set_grad_enabled(False), {}, "grad mode"),
    ],
)
def test_what_is_wrong_is_seen(run: Any, more: dict[str, Any], why: str) -> None:
    with torch.random.fork_rng(), torch.enable_grad():
        verdict, said = judge(call(run, **more))
    assert verdict == WRONG and why in said


def test_a_hook_that_stays_is_seen() -> None:
    model = nn.Flatten()
    verdict, said = judge(call(lambda: _leave_a_hook(model), models=(model,)))
    assert verdict == WRONG and "left behind: model 0" in said


@in_one_case()
@pytest.mark.parametrize("relation", ["memory", "layout", "alone", "order of the batch", "chunks", "tuple"])
def test_a_wrong_map_is_seen(relation: str) -> None:
    """Maps that depend on what they must not depend on, one for each kind of twin."""

    def explain(clip: Any, axes: str, perturbations_per_eval: int = 1) -> Any:
        whole = clip[0] if isinstance(clip, tuple) else clip
        strange = {
            "memory": not whole.is_contiguous(),
            "layout": axes != "BTCHW",
            "alone": len(whole) == 1,
            "order of the batch": bool(whole[0].sum() < whole[-1].sum()),
            "chunks": perturbations_per_eval == 3,
            "tuple": isinstance(clip, tuple),
        }[relation]
        found = (whole + float(strange)).contiguous()
        return (found,) if isinstance(clip, tuple) else found

    clip = torch.arange(2 * 3 * 2 * 4 * 5.0).reshape(5, 4, 2, 3, 2).permute(4, 3, 2, 1, 0)
    answers = [relation, "BCTHW", 1, [1, 0]]  # what would be drawn: the relation, a layout, a clip, an order
    draw = lambda strategy: answers.pop(0)  # noqa: E731
    made = valid_call(draw, "f", explain, clip, "BTCHW", {"perturbations_per_eval": 1}, relations=(relation,))
    verdict, said = judge(made)
    assert verdict == WRONG and relation in said


def test_a_map_with_swapped_axes_differs_from_the_slow_formula() -> None:
    """The models weigh every voxel differently, so that no permutation of a map passes for it."""
    clip = torch.randn(1, 3, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    found = VideoOcclusion(anything("BTCHW")).attribute(clip, (1, 1, 1), target=1)
    form(found, clip)
    for turned in (found.transpose(1, 3), found.transpose(3, 4), found.flip(1), found.flip(4)):
        assert (turned - found).abs().max() > 0.01 * found.abs().max()
