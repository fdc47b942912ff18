"""The bundled bottlenecks: their gates are where the evidence is, are used, and can be edited."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_staa import AttentionBranch, VideoClassifier, io, metrics
from captum_staa.benchmark import PlantedClips, SceneOptions
from captum_staa.benchmark.clip_runner import RandomWeights
from captum_staa.benchmark.scenes import LABELS
from captum_staa.models import STABN
from captum_staa.models.loading import bundled_folder
from captum_staa.models.st_abn import Gates

ROOT = Path(__file__).parents[2]
TASKS = list(LABELS)
SOME = ["pattern", *(pytest.param(task, marks=pytest.mark.slow) for task in TASKS if task != "pattern")]
CLIPS = 12


def planted(task: str, **options: Any) -> tuple[PlantedClips, Tensor, Tensor, Tensor]:
    found = PlantedClips(4321, CLIPS, task, **options)
    clips, labels, truth = found[:]
    return found, clips.transpose(1, 2).contiguous(), labels, truth


def bundled(task: str) -> STABN:
    return STABN.from_pretrained(f"tiny-st-abn-{task}")


def cells_of(truth: Tensor, st_abn: STABN, clips: Tensor) -> Tensor:
    """Return 1 for every cell of the gates with evidence in it."""
    return F.adaptive_max_pool3d(truth.float()[:, None], st_abn.explain(clips[:1]).grid)[:, 0]


@pytest.mark.parametrize("task", SOME)
def test_gates_are_open_on_evidence_and_not_on_rivals(task):
    """Read by one forward; with random weights they know nothing."""
    clips, inputs, labels, truth = planted(task)
    st_abn = bundled(task)
    method = AttentionBranch(st_abn)
    calls: list[int] = []
    method.attribute(inputs[:1])  # the use of the gates is tested once
    handle = st_abn.model.module.head.register_forward_hook(lambda *_: calls.append(1))
    maps = method.attribute_maps(inputs, labels).joint
    handle.remove()
    rivals = clips.rivals(slice(None))
    assert len(calls) == 1
    assert metrics.evidence_against_rivals(maps, truth, rivals).mean() > 0.92
    assert metrics.evidence_against_rivals(maps, truth, rivals, axis="time").mean() > 0.92
    assert metrics.evidence_against_rivals(maps, truth, rivals, axis="space").mean() > 0.88
    with RandomWeights(VideoClassifier(st_abn, "BCTHW"), seed=0).in_place():
        unknown = AttentionBranch(st_abn).attribute_maps(inputs).joint
    assert 0.4 < metrics.evidence_against_rivals(unknown, truth, rivals).mean() < 0.6


@pytest.mark.parametrize("task", SOME)
def test_edited_gates_change_the_answer(task):
    """Right with the evidence alone; at chance without it, and with the gates of other clips."""
    _, inputs, labels, truth = planted(task)
    st_abn = bundled(task)
    own = st_abn.explain(inputs)
    evidence = cells_of(truth, st_abn, inputs)
    spatial, temporal = own.gates.spatial[:, 0], own.gates.temporal[:, 0, :, 0, 0]
    closed, opened, chance = spatial * (1 - evidence), torch.ones(1, 16), 1 / len(LABELS[task])

    def answer(**gates: Tensor) -> tuple[float, float]:
        with st_abn.override(**gates), torch.no_grad():
            logits = st_abn(inputs)
        right = (logits.argmax(1) == labels).float().mean()
        return float(right), float(logits.softmax(1).gather(1, labels[:, None]).mean())

    assert (own.logits.argmax(1) == labels).float().mean() > 0.9
    assert answer(spatial=evidence, temporal=opened)[0] > 0.9
    assert answer(spatial=closed)[1] < chance + 0.15
    assert answer(spatial=spatial.roll(-1, 0), temporal=temporal.roll(-1, 0))[1] < chance + 0.3


def probability(st_abn: STABN, inputs: Tensor, labels: Tensor, gates: Gates) -> float:
    with torch.no_grad():
        logits, _ = st_abn.forward_with_gates(inputs, given=gates)
    return float(logits.softmax(1).gather(1, labels[:, None]).mean())


@pytest.mark.parametrize("task", SOME)
def test_closing_the_highest_gates_leaves_no_answer(task):
    """Of 5 % of the cells. Closing as many cells at random does not change the answer."""
    _, inputs, labels, _ = planted(task)
    st_abn = bundled(task)
    gates = st_abn.explain(inputs).gates
    joint = (gates.spatial * gates.temporal).flatten(1)
    count = joint.shape[1] // 20
    at_random = torch.rand(joint.shape, generator=torch.Generator().manual_seed(0)).topk(count, 1).indices

    def after(cells: Tensor) -> float:
        closed = gates.spatial.flatten(1).scatter(1, cells, 0.0).view_as(gates.spatial)
        return probability(st_abn, inputs, labels, replace(gates, spatial=closed))

    assert after(joint.topk(count, 1).indices) < 1 / len(LABELS[task]) + 0.1
    assert after(at_random) > probability(st_abn, inputs, labels, gates) - 0.02


@pytest.mark.parametrize("task", SOME)
def test_gates_alone_do_not_say_the_class(task):
    """The branch knows the class, so its gates could be a code for it. Then the clip itself would not be needed."""
    clips, inputs, labels, _ = planted(task)
    st_abn = bundled(task)
    without = clips.without_evidence(slice(None)).transpose(1, 2).contiguous()
    assert probability(st_abn, without, labels, st_abn.explain(inputs).gates) < 1 / len(LABELS[task]) + 0.1


def test_closing_the_evidence_of_one_class_gives_the_other_class():
    """On clips with evidence of two classes. The bundled network of motion becomes undecided instead."""
    _, inputs, labels, truths = planted("pattern", scene=SceneOptions(two_classes=True))
    st_abn = bundled("pattern")
    own = st_abn.explain(inputs)
    switched = []
    for side in (0, 1):
        cells = cells_of(truths[:, side], st_abn, inputs)
        with st_abn.override(spatial=own.gates.spatial[:, 0] * (1 - cells)), torch.no_grad():
            switched.append(st_abn(inputs).argmax(1) == labels[:, 1 - side])
    assert torch.stack(switched).float().mean() > 0.7


@pytest.mark.parametrize("task", SOME)
def test_ends_of_a_still_clip_are_like_its_middle(task):
    _, inputs, _, _ = planted(task)
    still = inputs[:2, :, 5:6].expand(-1, -1, 16, -1, -1).contiguous()
    alpha = bundled(task).explain(still).temporal_gates
    torch.testing.assert_close(alpha, alpha[:, :1].expand_as(alpha), rtol=0, atol=1e-4)


def test_bundled_networks_are_small():
    for name in (*(f"tiny-st-abn-{task}" for task in TASKS), "tiny-st-abn-pattern-mix"):
        folder = bundled_folder(name)
        assert folder is not None and sum(file.stat().st_size for file in folder.iterdir()) < 1_000_000
    assert STABN.from_pretrained("tiny-st-abn-pattern-mix").config.mechanism == "mix"
    assert {bundled(task).config.mechanism for task in TASKS} == {"bottleneck"}


def test_folder_of_videos_trains_a_bottleneck(tmp_path):
    """The code of docs/st_abn.md, with two classes of two videos."""
    page = (ROOT / "docs" / "st_abn.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Videos" in block)
    block = ModuleType("block")
    exec(compile(code, "st_abn.md", "exec"), block.__dict__)
    clips = PlantedClips(0, 4, "motion")
    for i in range(4):
        folder = tmp_path / ("left", "right")[int(clips[i][1])]
        folder.mkdir(exist_ok=True)
        io.write_video(folder / f"{i}.mp4", clips.frames(i), fps=8)
    clf = VideoClassifier.from_pretrained("tiny-videomae-motion")
    assert block.Videos(tmp_path, clf).classes == list(clf.labels or [])
    st_abn = block.train(tmp_path, clf, "videomae.embeddings", epochs=1)
    found = st_abn.explain(clf.preprocess(clips.frames(0)))
    assert st_abn.config == replace(st_abn.config, mechanism="bottleneck") and found.spatial_gates.shape[1] == 16
