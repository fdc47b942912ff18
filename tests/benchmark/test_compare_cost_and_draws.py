"""Time and memory in a comparison, and random draws that depend on clip and method only."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comparison_cases import PLANTED, remove_entries, silent, table
from torch import Tensor, nn

from captum_staa import VideoClassifier
from captum_staa.benchmark import MetricOptions, PlantedClips
from captum_staa.benchmark.clip_runner import PeakMemory, Plan, with_cost
from captum_staa.benchmark.methods import made, seeded
from captum_staa.benchmark.records import Storage
from captum_staa.benchmark.runner import _gathered, _run, _settings
from captum_staa.benchmark.scoring import chosen


def test_random_draws_depend_on_clip_and_method_only(clf):
    """They do not depend on other clips, methods or earlier draws, and global generators stay unchanged."""
    names = ["auroc", "sparsity"]
    torch.manual_seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    more = silent(clf, PlantedClips(seed=12, n=2), ["Saliency", "SmoothGrad", "GradientShap"], names)
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()
    torch.manual_seed(2)
    np.random.seed(2)
    fewer = silent(clf, PlantedClips(seed=12, n=1), ["Saliency", "GradientShap", "SmoothGrad"], names)
    other = silent(clf, PlantedClips(seed=12, n=1), ["SmoothGrad"], names, seed=1)
    first, again, seeded_else = table(more), table(fewer), table(other)
    assert {key: first[key] for key in again} == again
    key = ("pattern-00000", "SmoothGrad", "auroc")
    assert seeded_else[key] != again[key]
    assert first["pattern-00000", "random", "sparsity"] != first["pattern-00001", "random", "sparsity"]


def test_a_random_function_gets_different_draws_per_clip_and_the_same_draws_per_run(clf):
    def dice(clip: Tensor, target: int) -> Tensor:
        return torch.rand(1, 16, 48, 48)

    wanted = {"first": lambda case: case.maps[0, 0, 0, 0]}
    values = [table(silent(clf, [PLANTED[i] for i in (0, 1)], {"dice": dice}, wanted)) for _ in range(2)]
    drawn = [values[0][f"clip-0000{i}", "dice", "first"] for i in (0, 1)]
    assert drawn[0] != drawn[1] and values[0] == values[1]


def test_seeded_draws_differ_by_clip_method_and_seed():
    def draws(*key) -> tuple[float, float]:
        with seeded(*key, torch.device("cpu")):
            return torch.rand(()).item(), np.random.rand()

    keys = [(0, 0, "a"), (0, 1, "a"), (0, 0, "b"), (1, 0, "a")]
    assert len({draws(*key) for key in keys}) == 4 and draws(*keys[0]) == draws(*keys[0])


def test_cost_is_measured_in_forward_passes(clf):
    clip = PLANTED[16:17][0]
    held = []

    def forwards(count: int) -> None:
        with torch.no_grad():
            for _ in range(count):
                clf(clip)

    ratios = [with_cost(lambda: forwards(12), clf, clip, memory=False)[1] for _ in range(7)]
    assert all(math.isnan(cost.memory) for cost in ratios)
    assert 6 < sorted(cost.forwards for cost in ratios)[3] < 24
    _, plain = with_cost(lambda: forwards(3), clf, clip, memory=True)
    assert plain.memory == pytest.approx(1, abs=0.2)  # one after the other
    with PeakMemory() as memory:
        forwards(1)
    large = torch.Size([memory.peak])  # bytes

    def hold() -> None:
        held.append(torch.ones(large, dtype=torch.uint8))
        forwards(1)
        held.clear()

    _, twice = with_cost(hold, clf, clip, memory=True)
    assert twice.memory == pytest.approx(2, rel=0.02)


class Growing:
    """Clips of growing size; the first cannot be read."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int):
        if index == 0:
            raise OSError("no such clip")
        return torch.linspace(0, 1, 3 * 4 * 64 * index).view(3, 4, 8, 8 * index), 0


def test_memory_is_reported_for_the_first_readable_clip(tmp_path):
    class Means(nn.Module):
        def forward(self, clip: Tensor) -> Tensor:
            return clip.mean((3, 4)).flatten(1)

    def large(clip: Tensor, target: int) -> Tensor:  # its memory, in plain forwards, grows with the clip
        pairs = clip.flatten() @ torch.zeros(clip.numel(), clip.numel())
        return clip.sum(1) + pairs.sum()

    def touchy(clip: Tensor, target: int) -> Tensor:
        if clip.shape[-1] < 20:
            raise RuntimeError("too small")
        return large(clip, target)

    classifier = VideoClassifier(Means(), "BCTHW")
    given = {"large": large, "touchy": touchy, "Saliency": "Saliency"}

    def run(**options):
        return silent(classifier, Growing(), given, ["memory"], out=tmp_path / "run", **options)

    def numbers(found) -> dict[tuple[str, str, str], float]:
        return {key: value for key, value in table(found).items() if key[2] == "memory"}

    alone = numbers(run())
    assert {key[:2] for key in alone} == {("clip-00001", "large"), ("clip-00001", "Saliency"), ("clip-00003", "touchy")}
    for done in (1, 2, 3):  # a second start measures again, on the first clip that is left to it
        assert remove_entries(tmp_path / "run", lambda entry, done=done: entry["index"] == done)
        assert numbers(run(resume=True)) == alone

    plan = Plan(classifier, made(given, classifier, 8), chosen(["memory"]), MetricOptions(steps=4), 8, 0)
    settings = _settings(plan, Growing())
    with Storage(tmp_path / "ranks") as storage:
        storage.open(settings, resume=False)
        for rank in (1, 0):
            with Storage(tmp_path / "ranks", rank) as own:
                _run(plan, own, Growing(), SimpleNamespace(rank=rank, world=2), False)
        assert numbers(_gathered(plan, storage, Growing(), settings, False)) == alone


def test_peak_memory_counts_simultaneous_allocations_only():
    given = torch.ones(1000)
    with PeakMemory() as memory:
        view = given.view(10, 100)  # no new bytes
        view += 1
        for _ in range(4):
            (given * 2).sum()
    assert 4000 <= memory.peak < 4100
    with PeakMemory() as memory:
        kept = [given * i for i in range(5)]
        del kept
        given * 2
    assert 20000 <= memory.peak < 20100
    leaf = given.clone().requires_grad_()
    with PeakMemory() as memory:  # a product's factors are kept for the way back
        first = leaf * 2
        second = first * first
        second.sum().backward()
    assert memory.peak >= 3 * 4000
