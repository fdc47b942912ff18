"""Tests of the number of clips per call of the model. Chunk sizes change time and memory, but not the results."""

from __future__ import annotations

import inspect

import pytest
import torch

from .models import watched
from .subjects import over
from .trials import Trial, as_tuple, assert_close

CHUNKS = "perturbations_per_eval"


@over("conv", "two-stream", "timesformer", takes=CHUNKS, every_model=True)
def test_chunk_size_does_not_change_results(trial: Trial) -> None:
    expected = trial.expected()
    for perturbations_per_eval in (1, 3, 1000):
        found = trial.attribute(perturbations_per_eval=perturbations_per_eval)
        assert_close(found, expected)
        assert all(part.is_contiguous() for part in as_tuple(found))


@over("conv", "two-stream", takes=CHUNKS, every_model=True)
def test_chunk_size_limits_clips_per_call(trial: Trial) -> None:
    batch = len(trial.case.target)
    altered = None
    for perturbations_per_eval in (1, 3, 1000):
        with watched(trial.case.model) as calls:
            trial.attribute(perturbations_per_eval=perturbations_per_eval)
        sizes = [len(inputs[0]) for inputs in calls]
        assert max(sizes) <= perturbations_per_eval * batch
        altered = altered or sum(sizes) - batch
        assert sum(sizes) - batch == altered, "each region is changed once, and the whole clip is run once"
        if trial.subject.kind == "perturbation":  # learning runs step by step
            assert len(sizes) == 1 + -(-altered // batch // perturbations_per_eval), (
                "all chunks except for the last one are full"
            )
    assert altered is not None and altered > 3 * batch


@over("conv", "vivit", kinds=("gradient", "attention"), ours=True, per="kind", together=True)
def test_one_forward_is_enough(trial: Trial) -> None:
    trial.attribute()  # AttentionBranch tests once per network whether its gates are used, by one more forward
    with watched(trial.case.model) as calls:
        trial.attribute()
    assert [len(inputs[0]) for inputs in calls] == [len(trial.case.target)]


@over("conv", "vivit", takes="show_progress", per="kind")
def test_progress_bar_counts_the_calls(trial: Trial, capsys: pytest.CaptureFixture[str]) -> None:
    chunks = {CHUNKS: 3} if CHUNKS in inspect.signature(trial.subject.method.attribute).parameters else {}
    with watched(trial.case.model) as calls:
        expected = trial.attribute(show_progress=False, **chunks)
    assert capsys.readouterr() == ("", "")
    assert torch.equal(trial.attribute(show_progress=True, **chunks), expected)
    out, err = capsys.readouterr()
    assert out == ""
    states = [state for state in err.replace("\n", "\r").split("\r") if state.strip()]
    assert all(state.startswith(f"{trial.method.get_name()} attribution:") for state in states)
    assert f" 0/{len(calls)} " in states[0] and f" {len(calls)}/{len(calls)} " in states[-1]
    assert err.count("\n") == 1, "more than one bar"


@over("conv", takes=CHUNKS, ours=True, together=True)
def test_invalid_chunk_size_raises(trial: Trial) -> None:
    for value in (0, -1, 1.5, "2", None):
        error = ValueError if isinstance(value, int) else TypeError
        with watched(trial.case.model) as calls, pytest.raises(error, match="perturbations_per_eval"):
            trial.attribute(perturbations_per_eval=value)
        assert not calls
