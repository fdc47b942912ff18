"""Run the command line with the methods of learned masks, and check the files that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import read

from captum_staa import SpatioTemporalPerturbation, VideoClassifier, io
from captum_staa.__main__ import main
from captum_staa.benchmark import PlantedClips
from captum_staa.cli import demo

CNN, TRANSFORMER = "tiny-resnet3d-pattern", "tiny-videomae-pattern"
PARTS = ("kept", "removed", "visible")


def write_video(path: Path, clips: PlantedClips) -> Path:
    return io.write_video(path, demo.enlarged(clips.frames(0), 3), 8.0, crf=6)


def run(path: Path, out: Path, *options: str, model: str = CNN, method: str = "STEP (nested)") -> int:
    return main(["explain", str(path), "--model", model, "--method", method, "--out", str(out), *options])


def by_hand(path: Path, model: str, preset: str = "nested", target: int | None = None, **options):
    """The result of the Python API for the same video, and the target."""
    clf = VideoClassifier.from_pretrained(model)
    clip = clf.preprocess(io.read_video(path, 16).frames)
    target = int(clf(clip).argmax()) if target is None else target
    method = SpatioTemporalPerturbation(clf, preset=preset)
    return method.attribute_maps(clip, target=target, perturbations_per_eval=8, **options), target


def check_same(folder: Path, parts, areas: list[float]) -> dict:
    """Check that all numbers in all files equal those of the result of one clip."""
    tensors, described, result = read(folder)
    for name, part in (("attributions", "joint"), ("temporal", "temporal"), ("spatial", "spatial"), ("masks", "masks")):
        torch.testing.assert_close(tensors[name], getattr(parts, part)[0])
    assert "masks ATHW" in described["axes"] and json.loads(described["areas"]) == areas
    learned = result["perturbation"]
    assert [row["area"] for row in learned["areas"]] == areas
    for name in PARTS:
        got = [row[name] for row in learned["areas"]]
        assert got == pytest.approx(getattr(parts, name)[0].tolist(), rel=1e-3, abs=1e-5), name
    assert learned["whole"] == pytest.approx(parts.whole.item(), rel=1e-4)
    assert learned["steps"] == int(parts.history.steps[-1])
    return result
