"""``explain --prompt``: the files and the report of the answer of a video language model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from captum_staa import AnswerAttribution, VideoLanguageModel, io
from captum_staa.__main__ import main
from captum_staa.benchmark import PlantedClips

pytest.importorskip("av")
MODEL = "tiny-qwen2_5_vl"


@pytest.fixture(scope="module")
def planted_video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "order.mp4"
    frames = PlantedClips(3, 1, "order").frames(0)
    io.write_video(path, np.repeat(np.repeat(frames, 4, 1), 4, 2), fps=4)
    return path


def test_every_word_of_the_answer_has_its_map_and_its_reliance(planted_video, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        main(["explain", str(planted_video), "--model", MODEL, "--prompt", "which came first ?", "--out", str(out)])
        == 0
    )
    said = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"attributions.safetensors", "result.json", "player.html"}
    result = json.loads((out / "result.json").read_text("utf-8"))
    maps = load_file(out / "attributions.safetensors")["attributions"]
    assert [word["token"] for word in result["words"]] == ["it", "is", "bottom", "."]
    vlm = VideoLanguageModel.from_pretrained(MODEL, fps=result["model"]["fps"])
    clip = vlm.preprocess(io.read_video(planted_video, 16).frames)
    expected = AnswerAttribution(vlm).attribute_answer(clip, "which came first ?", "it is bottom .")
    assert result["model"]["fps"] == 4
    assert torch.allclose(maps, expected.joint, atol=1e-6)
    assert result["words"][2]["reliance"] == pytest.approx(float(expected.reliance[2]), abs=1e-5)
    assert "bottom" in said and "reliance" in said
    assert '"text":"bottom"' in (out / "player.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "which?", "--windows"], "--windows cannot be combined with --prompt"),
        (["--prompt", "which?", "--method", "RISE"], "--method cannot be combined with --prompt"),
        (["--answer", "it"], "--answer can only be used with --prompt"),
    ],
)
def test_options_that_contradict_each_other_are_refused(planted_video, options, message, capsys):
    assert main(["explain", str(planted_video), "--model", MODEL, *options]) == 2
    assert message in capsys.readouterr().err
