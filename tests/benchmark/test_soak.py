"""Many calls on one model leave no objects behind: benchmarks/soak.py with few calls and exact counts."""

from __future__ import annotations

import gc
import weakref
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import in_one_case

from captum_staa import VideoClassifier, io

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    import soak

CALLS = 10
LEARNS = "SpatioTemporalPerturbation"  # more than a second a call
METHODS = [pytest.param(name, marks=pytest.mark.slow if name == LEARNS else ()) for name in soak.METHODS]
EXACT = ("hooks", "functions", "routes", "handles")


def counts(held: soak.Held) -> dict[str, int]:
    return {what: count for what, count in asdict(held).items() if what in EXACT}


@pytest.mark.parametrize("name", METHODS)
def test_calls_leave_no_objects(name):
    """A leak would add one object or thread per call; a few late ones, such as that of a progress bar, are allowed."""
    found = soak.soak(name, CALLS, warm_up=3, samples=2)
    assert counts(found.before) == counts(found.after)
    assert found.after.routes == 0
    assert found.after.objects - found.before.objects < CALLS
    assert found.after.threads - found.before.threads < CALLS


@in_one_case()
@pytest.mark.parametrize("name", soak.METHODS)
def test_failed_calls_leave_no_objects(name):
    model, call = soak.METHODS[name]
    clf = VideoClassifier.from_pretrained(model)
    (clip,), _ = soak.planted(clf, 1)
    with pytest.raises((ValueError, IndexError, AssertionError)):
        call(clf, clip[:, :, :1], 0)  # too few frames or channels: the warm-up
    before = soak.held(clf)
    for _ in range(CALLS):
        with pytest.raises((ValueError, IndexError, AssertionError)):
            call(clf, clip[:, :, :1], 0)
    after = soak.held(clf)
    assert counts(before) == counts(after) and after.objects - before.objects < CALLS
    assert after.threads - before.threads < CALLS


@pytest.mark.parametrize("name", ["STAA, relevance", "GradCAM", "AttentionBranch, grad_gate"])
def test_models_are_garbage_collected(name):
    """Models that were explained one after the other are not kept."""
    model, call = soak.METHODS[name]
    clf = VideoClassifier.from_pretrained(model)
    (clip,), (target,) = soak.planted(clf, 1)
    call(clf, clip, target)
    gone = weakref.ref(clf), weakref.ref(clip)
    del clf, clip
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


@pytest.mark.parametrize("planted", ["hook", "function", "tensor"])
def test_the_soak_test_detects_a_leak(planted, monkeypatch):
    kept: list[Any] = []

    def leaks(clf: VideoClassifier, clip: torch.Tensor, target: int) -> torch.Tensor:
        if planted == "hook":
            clf.module.register_forward_hook(lambda *_: None)
        elif planted == "function":
            kept.append(open(__file__))  # noqa: SIM115
        else:
            kept.append([torch.zeros(1)])
        return clip

    monkeypatch.setitem(soak.METHODS, "leaks", (soak.PLAIN, leaks))
    found = soak.soak("leaks", CALLS, warm_up=1, samples=2)
    grown = {what: getattr(found.after, what) - getattr(found.before, what) for what in (*EXACT, "objects")}
    for file in kept if planted == "function" else ():
        file.close()
    assert grown["objects"] >= CALLS
    assert grown["hooks"] == (CALLS if planted == "hook" else 0)
    assert grown["handles"] == (CALLS if planted == "function" else 0)


def test_files_are_closed(tmp_path):
    """Files are closed after partial, abandoned and failed reads as well."""
    path = io.write_video(tmp_path / "clip.mp4", torch.zeros(20, 48, 48, 3, dtype=torch.uint8), fps=10)
    (tmp_path / "text.mp4").write_text("no video" * 100)

    def some() -> None:
        io.read_video(path, 4)
        io.probe(path)
        next(io.iter_windows(path, 4))
        with pytest.raises(ValueError, match="no video"):
            io.read_video(tmp_path / "text.mp4")
        with pytest.raises(ValueError, match="has 20"):
            io.read_video(path, 21)

    some()
    before = soak.held(torch.nn.Identity())
    for _ in range(CALLS):
        some()
    assert counts(soak.held(torch.nn.Identity())) == counts(before)
