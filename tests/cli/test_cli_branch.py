"""``explain`` with the methods of an attention branch: the gates of an ST-ABN for a video file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import read

from captum_staa import AttentionBranch, VideoClassifier, io
from captum_staa.__main__ import main
from captum_staa.benchmark import PlantedClips, SceneOptions
from captum_staa.cli import demo, output

MODELS = {"tiny-st-abn-pattern": "grad_gate", "tiny-videomae-pattern-observer": "gate"}


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    clips = PlantedClips(seed=1, n=1, scene=SceneOptions(num_frames=32))
    path = tmp_path_factory.mktemp("videos") / "planted.mp4"
    return io.write_video(path, demo.enlarged(clips.frames(0), 3), 8.0, crf=6)


def explain(video: Path, out: Path, *options: str, model: str = "tiny-st-abn-pattern") -> int:
    return main(["explain", str(video), "--model", model, "--out", str(out), *options])


@pytest.mark.parametrize("model", MODELS)
def test_explain_writes_the_results_of_attention_branch(video, tmp_path, model, without_pictures):
    assert explain(video, tmp_path, "--method", f"attention-branch-{MODELS[model]}", model=model) == 0
    tensors, _, result = read(tmp_path)
    classifier = VideoClassifier.from_pretrained(model)
    clip = classifier.preprocess(io.read_video(video, 16).frames)
    target = int(classifier(clip).argmax())
    parts = AttentionBranch(classifier).attribute_maps(clip, target=target, weighting=MODELS[model])
    torch.testing.assert_close(tensors["attributions"], parts.joint[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(tensors["temporal"], parts.temporal[0], rtol=1e-4, atol=1e-7)
    assert result["method"] == f"AttentionBranch ({MODELS[model]})"
    assert result["target"]["class_specific"] is (MODELS[model] != "gate")


def test_class_map_and_pictures(video, tmp_path):
    assert explain(video, tmp_path, "--method", "attention-branch-class-map") == 0
    assert "class_map" in read(tmp_path)[2]["method"]
    assert {path.name for path in tmp_path.iterdir()} == set(output.FILES)


def test_windows_keep_the_temporal_gate(video, tmp_path, without_pictures):
    assert explain(video, tmp_path, "--windows", "--method", "attention-branch-gate") == 0
    tensors, _, _ = read(tmp_path)
    classifier = VideoClassifier.from_pretrained("tiny-st-abn-pattern")
    frames = io.read_video(video, 32).frames
    windows = [classifier.preprocess(frames[start : start + 16]) for start in (0, 16)]
    alpha = torch.cat([classifier.module.explain(window).temporal_gates[0] for window in windows])
    torch.testing.assert_close(tensors["temporal"], alpha, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--model", "tiny-resnet3d-pattern"), "which has no attention branch"),
        (("--model", "tiny-videomae-pattern-observer"), "grad_gate needs a branch whose gates change the output"),
        (("--layers", "all"), "--layers can only be used with --method 'STAA (Chefer)' or 'STAA'"),
    ],
)
def test_unsupported_model_or_option_is_an_error(video, tmp_path, capsys, options, said):
    assert explain(video, tmp_path / "out", "--method", "attention-branch-grad-gate", *options) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
