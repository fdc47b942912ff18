"""The command line with models from a folder, models of full size, real videos and damaged videos."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import (
    FPS,
    MARGIN,
    MODEL,
    check_numbers,
    check_pictures,
    read,
    save_model,
    without_text,
)

from captum_staa import VideoClassifier, io
from captum_staa.__main__ import main
from captum_staa.cli import explain as explaining
from captum_staa.cli import output
from captum_staa.cli.explanation import Options, report

pytest.importorskip("av")


@pytest.mark.usefixtures("without_pictures")
def test_model_from_a_folder(video, tmp_path, capsys):
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    labels = {0: "juggling", 1: "a label that is quite a bit longer than the others are", 2: "knitting"}
    config = VideoMAEConfig(
        image_size=32,
        patch_size=8,
        num_frames=8,
        hidden_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=32,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )
    torch.manual_seed(0)
    folder = save_model(tmp_path / "model", VideoMAEForVideoClassification(config), size=32, resize=36)
    arguments = ["explain", str(video), "--model", str(folder), "--target", "knitting", "--top", "2"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    tensors, _, result = check_numbers(tmp_path / "out")
    assert tensors["attributions"].shape == (8, 32, 32)
    assert result["target"]["label"] == "knitting" and result["target"]["given"]
    box = VideoClassifier.from_pretrained(folder).crop_box(288, 288 + 2 * MARGIN)
    assert list(result["crop_box"].values()) == list(box)
    assert box[2] == pytest.approx(256)
    said = capsys.readouterr().out
    assert sum(f"  {label}" in said for label in labels.values()) == 2

    (folder / "preprocessor_config.json").unlink()
    assert main([*arguments, "--out", str(tmp_path / "other")]) == 2
    assert "Copy the preprocessor_config.json" in capsys.readouterr().err


REAL = {
    "v_ApplyEyeMakeup_g01_c01.avi": "tiny-videomae-pattern",
    "mmaction2_demo_arm_wrestling.mp4": "tiny-timesformer-pattern",
    "nasa_13013.mp4": "tiny-vivit-pattern",
    "flipping_a_pancake.mkv": "tiny-vjepa2-pattern",
}


@pytest.mark.parametrize(
    "name", [*list(REAL)[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in list(REAL)[1:])]
)
def test_real_clips(shared_videos, tmp_path, name):
    path = shared_videos / name
    assert main(["explain", str(path), "--model", REAL[name], "--out", str(tmp_path)]) == 0
    _, _, result = check_numbers(tmp_path)
    check_pictures(tmp_path)
    info = io.probe(path)
    assert (result["fps"], result["video"]["num_frames"]) == (info.fps, info.num_frames)
    edge = min(info.height, info.width)  # a square in the middle
    assert result["crop_box"]["height"] == pytest.approx(edge, rel=0.03)
    assert result["crop_box"]["left"] == pytest.approx((info.width - edge) / 2, abs=edge / 48)
    shown = without_text(io.read_video(tmp_path / "overlay.mp4").frames)
    assert len(shown) == 16
    original = io.read_video(path, 16).frames.mean((1, 2))  # (T, 3)
    np.testing.assert_allclose(shown[:, :, : shown.shape[2] // 2 - 8].mean((1, 2)), original, atol=6)


@pytest.mark.filterwarnings("always::UserWarning")
@pytest.mark.usefixtures("without_pictures")
def test_damaged_file_is_explained_with_a_one_line_warning(video, tmp_path, capsys):
    frames = np.repeat(io.read_video(video).frames, 4, axis=0)
    whole = io.write_video(tmp_path / "whole.mkv", frames, FPS).read_bytes()
    damaged = tmp_path / "damaged.mkv"
    damaged.write_bytes(whole[: len(whole) * 3 // 4])
    assert main(["explain", str(damaged), "--model", MODEL, "--out", str(tmp_path / "out")]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert said and all(line.startswith("captum_staa: warning: only ") for line in said)


def test_file_without_frame_rate_and_timestamps(video, tmp_path):
    explanation = explaining.explain(Options(video=video, model=MODEL, out=tmp_path / "out"))
    video = explanation.video
    video = dataclasses.replace(video, info=video.info._replace(fps=math.nan), times=None)
    explanation = dataclasses.replace(explanation, video=video)
    output.write(explanation, tmp_path / "out")
    result = read(tmp_path / "out")[2]
    assert result["fps"] is None and result["frame_times"] == [None] * 16
    key = result["key_frames"][0]
    assert key["time"] is None
    assert f"strongest: frame {key['frame']} (" in report(explanation, 3)
    assert "####" in report(explanation, 3, encoding="ascii") and report(explanation, 3, "ascii").isascii()


def base_model(name: str) -> torch.nn.Module:
    import transformers as t

    torch.manual_seed(0)
    labels = {"num_labels": 400}
    if name == "videomae":
        return t.VideoMAEForVideoClassification(t.VideoMAEConfig(use_mean_pooling=True, **labels))
    if name == "timesformer":
        return t.TimesformerForVideoClassification(t.TimesformerConfig(**labels))
    return t.VivitForVideoClassification(t.VivitConfig(**labels))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "clip", "frames"),
    [
        ("videomae", "flipping_a_pancake.mkv", 16),
        ("timesformer", "mmaction2_demo_arm_wrestling.mp4", 8),
        ("vivit", "nasa_13013.mp4", 32),
    ],
)
def test_models_of_full_size(shared_videos, tmp_path, name, clip, frames):
    """Random weights with the published shapes: checks memory, time and files, not the content of the maps."""
    folder = save_model(tmp_path / "model", base_model(name), size=224, resize=256 if name == "vivit" else 224)
    out = Path(os.environ.get("CAPTUM_STAA_KEEP", tmp_path)) / f"{name}-base"
    arguments = ["explain", str(shared_videos / clip), "--model", str(folder), "--out", str(out), "--overwrite"]
    assert main(arguments) == 0
    tensors, _, result = check_numbers(out)
    check_pictures(out)
    assert tensors["attributions"].shape == (frames, 224, 224)
    assert len(result["predictions"]) == 20
