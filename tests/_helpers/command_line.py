"""Videos for tests of the command line, and checks of the output files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from captum_staa import io
from captum_staa.benchmark import PlantedClips
from captum_staa.cli import demo, output
from captum_staa.visualization import animation

MODEL = "tiny-videomae-pattern"


FPS = 8.0


FACTOR = 6


MARGIN = 54  # columns on the left and right of the planted clip, outside of the center crop of the model


PLANTED = PlantedClips(seed=demo.SEED, n=4)


def write_planted(path: Path, clips: PlantedClips, index: int = 0) -> Path:
    """Write the clip in the center of wider frames, whose margins contain stripes that the model must not see."""
    frames = demo.enlarged(clips.frames(index), FACTOR)
    stripes = (np.arange(MARGIN) // 9 % 2 * 200).astype(np.uint8)
    side = np.broadcast_to(stripes[:, None], (*frames.shape[:2], MARGIN, 3))
    return io.write_video(path, np.concatenate([side, frames, side], axis=2), FPS, crf=6)


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str], dict]:
    with safe_open(folder / "attributions.safetensors", "pt") as file:
        tensors, described = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    return tensors, described, json.loads((folder / "result.json").read_text(encoding="utf-8"))


def check_numbers(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str], dict]:
    """Check the numbers of any result: sums, shapes, and equal values in both files."""
    tensors, described, result = read(folder)
    maps = tensors["attributions"]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert [len(maps), *maps.shape[1:]] == [len(result["frame_indices"]), *result["model"]["input_size"]]
    assert maps.isfinite().all() and maps.max() > 0
    torch.testing.assert_close(tensors["spatial"], maps.sum(0))
    torch.testing.assert_close(tensors["temporal"], maps.sum((1, 2)))
    assert result["temporal"] == tensors["temporal"].tolist()
    assert json.loads(described["frame_indices"]) == result["frame_indices"]
    assert json.loads(described["crop_box"]) == list(result["crop_box"].values())
    assert (described["model"], described["method"]) == (result["model"]["name"], result["method"])
    assert (described["target"], int(described["target_index"])) == (
        result["target"]["label"],
        result["target"]["index"],
    )
    evenly = [index / result["fps"] for index in result["frame_indices"]]
    assert result["frame_times"] == pytest.approx(evenly, abs=6e-4)  # Matroska counts milliseconds
    best = max(result["temporal"])
    assert bool(result["key_frames"]) == (best > 0)  # signed maps can be negative in every frame
    for first in result["key_frames"][:1]:
        assert first["temporal"] == best
        assert result["temporal"][result["frame_indices"].index(first["frame"])] == best
    return tensors, described, result


def check_pictures(folder: Path) -> None:
    from PIL import Image

    assert sorted(os.listdir(folder)) == sorted(output.FILES)  # and no partial files
    for name in ("sheet.png", "timeline.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300
            assert np.asarray(picture.convert("L")).std() > 10


def without_text(frames: np.ndarray) -> np.ndarray:
    """Return the frames of an overlay video without the two lines above and the four lines below."""
    line = animation.TEXT + animation.LEADING
    top, whole = 2 * line + animation.LEADING, frames.shape[1] - frames.shape[1] % 2
    return frames[:, top : whole - 4 * line - animation.LEADING]


def save_model(folder: Path, model: torch.nn.Module, size: int, resize: int) -> Path:
    model.save_pretrained(folder)
    processor = {"size": {"shortest_edge": resize}, "crop_size": {"height": size, "width": size}}
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, **statistics}))
    return folder
