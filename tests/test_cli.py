"""The command line: real runs over video files, and what they leave behind checked as numbers."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io as io_module
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from captum_staa import STAA, VideoClassifier, io
from captum_staa.__main__ import main
from captum_staa.benchmark import PlantedClips
from captum_staa.cli import comparison, demo, output, windows
from captum_staa.cli import explain as explaining
from captum_staa.cli.explanation import Options, report, strongest
from captum_staa.cli.methods import OfAttention

av = pytest.importorskip("av")

MODEL = "tiny-videomae-pattern"
FPS = 8.0
FACTOR = 6
MARGIN = 54  # columns left and right of the planted clip, which the model's centre crop cuts off
PLANTED = PlantedClips(seed=demo.SEED, n=4)


def write_planted(path: Path, clips: PlantedClips, index: int = 0) -> Path:
    """The clip in the middle of wider frames whose margins hold stripes that the model must not see."""
    frames = demo.enlarged(clips.frames(index), FACTOR)
    stripes = (np.arange(MARGIN) // 9 % 2 * 200).astype(np.uint8)
    side = np.broadcast_to(stripes[:, None], (*frames.shape[:2], MARGIN, 3))
    return io.write_video(path, np.concatenate([side, frames, side], axis=2), FPS, crf=6)


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return write_planted(tmp_path_factory.mktemp("videos") / "planted.mp4", PLANTED)


@pytest.fixture(scope="module")
def long_video(tmp_path_factory) -> Path:
    return write_planted(tmp_path_factory.mktemp("videos") / "long.mp4", PlantedClips(seed=1, n=1, num_frames=44))


@pytest.fixture(scope="module")
def explained(video, tmp_path_factory) -> tuple[Path, str]:
    """The folder of one plain run, and what it printed."""
    folder = tmp_path_factory.mktemp("explained") / "new" / "folder"
    with contextlib.redirect_stdout(io_module.StringIO()) as said:
        assert main(["explain", str(video), "--model", MODEL, "--out", str(folder)]) == 0
    return folder, said.getvalue()


@pytest.fixture
def without_pictures(monkeypatch):
    """Numbers alone, where pictures are not what is tested; they take most of the time."""
    monkeypatch.setattr(output, "draw", lambda *args, **options: None)


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str], dict]:
    with safe_open(folder / "attributions.safetensors", "pt") as file:
        tensors, described = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    return tensors, described, json.loads((folder / "result.json").read_text(encoding="utf-8"))


def check_numbers(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str], dict]:
    """What holds of every result: sums, shapes, and two files that say the same."""
    tensors, described, result = read(folder)
    maps = tensors["attributions"]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert [len(maps), *maps.shape[1:]] == [len(result["frame_indices"]), *result["model"]["input_size"]]
    assert maps.isfinite().all() and maps.max() > 0
    torch.testing.assert_close(tensors["spatial"], maps.sum(0))
    if "released" not in result["method"]:
        torch.testing.assert_close(tensors["temporal"], maps.sum((1, 2)))
    assert result["temporal"] == tensors["temporal"].tolist()
    assert json.loads(described["frame_indices"]) == result["frame_indices"]
    assert json.loads(described["crop_box"]) == list(result["crop_box"].values())
    assert (described["model"], described["method"]) == (result["model"]["name"], result["method"])
    assert (described["target"], int(described["target_index"])) == (
        result["target"]["label"],
        result["target"]["index"],
    )
    assert result["frame_times"] == pytest.approx([index / result["fps"] for index in result["frame_indices"]])
    best = max(result["temporal"])
    assert result["key_frames"][0]["temporal"] == best
    assert result["temporal"][result["frame_indices"].index(result["key_frames"][0]["frame"])] == best
    return tensors, described, result


def check_pictures(folder: Path) -> None:
    from PIL import Image

    assert sorted(os.listdir(folder)) == sorted(output.FILES)  # and nothing half-written
    for name in ("sheet.png", "timeline.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300
            assert np.asarray(picture.convert("L")).std() > 10


def test_explain_writes_what_the_library_says(video, explained):
    folder, said = explained
    tensors, described, result = check_numbers(folder)
    check_pictures(folder)

    _, label, truth = PLANTED[0]
    name, when = PLANTED.labels[int(label)], truth.flatten(1).any(1)
    assert result["predictions"][0]["label"] == result["target"]["label"] == name
    assert result["predictions"][0]["probability"] > 0.9
    assert sum(row["probability"] for row in result["predictions"]) == pytest.approx(1)
    assert result["key_frames"] and all(when[frame["frame"]] for frame in result["key_frames"])
    assert list(result["crop_box"].values()) == [0, MARGIN, 288, 288]
    assert result["frame_indices"] == list(range(16)) and result["fps"] == FPS
    assert result["versions"]["torch"] == torch.__version__ and described["layout"] == "BTCHW"

    clf = VideoClassifier.from_pretrained(MODEL)
    clip = clf.preprocess(io.read_video(video, 16).frames)
    expected = STAA(clf).attribute_parts(clip, target=int(label))
    torch.testing.assert_close(tensors["attributions"], expected.joint[0])

    assert f"  {name}" in said and "the likeliest class" in said
    assert f"{result['key_frames'][0]['time']:.2f} s (" in said


def test_the_overlay_lies_where_the_evidence_is(video, explained):
    """Through the model's crop and back: colour appears on the planted patch, and never on what was cut off."""
    folder, _ = explained
    overlay = io.read_video(folder / "overlay.mp4")
    wide = 288 + 2 * MARGIN
    assert overlay.frames.shape == (16, 288, 2 * wide + 8, 3)
    assert overlay.fps == FPS
    result = read(folder)[2]
    best = result["key_frames"][0]["frame"]
    right = overlay.frames[best, :, -wide:].astype(int)
    coloured = right.max(-1) - right.min(-1) > 60
    assert not coloured[:, : MARGIN - 4].any() and not coloured[:, -MARGIN + 4 :].any()
    patch = torch.nn.functional.interpolate(PLANTED[0][2][best][None, None].float(), scale_factor=FACTOR)[0, 0].bool()
    rows, columns = np.nonzero(coloured)
    truth_rows, truth_columns = (where.float().mean().item() for where in patch.nonzero(as_tuple=True))
    assert abs(rows.mean() - truth_rows) < 8 * FACTOR / 2  # half a tubelet
    assert abs(columns.mean() - MARGIN - truth_columns) < 8 * FACTOR / 2
    assert patch.numpy()[rows, np.clip(columns - MARGIN, 0, 287)].mean() > 0.6
    left = overlay.frames[:, :, :wide]
    original = io.read_video(video).frames
    assert np.abs(left.astype(int) - original).mean() < 4


@pytest.mark.parametrize(
    ("options", "method"),
    [
        (["--mode", "attention", "--layers", "-1"], {"mode": "attention", "layers": [-1]}),
        (["--mode", "attention", "--layers", "mean", "--focus"], {"mode": "attention", "layers": "mean"}),
        (["--rule", "chefer", "--layers", "-2,-1"], {"rule": "chefer", "layers": [-2, -1]}),
        (["--rule", "gradient", "--target", "VERTICAL"], {"rule": "gradient"}),
        (["--mode", "released"], {"mode": "released"}),
    ],
)
@pytest.mark.usefixtures("without_pictures")
def test_options_reach_the_method(video, tmp_path, capsys, options, method):
    assert main(["explain", str(video), "--model", MODEL, "--out", str(tmp_path), *options]) == 0
    tensors, _, result = check_numbers(tmp_path)
    if "--focus" in options:
        from captum_staa import Focus

        method = {**method, "focus": Focus()}
    clf = VideoClassifier.from_pretrained(MODEL)
    clip = clf.preprocess(io.read_video(video, 16).frames)
    target = clf.target("vertical") if "--target" in options else int(clf(clip).argmax())
    expected = STAA(clf, **method).attribute_parts(clip, target=target)
    torch.testing.assert_close(tensors["attributions"], expected.joint[0])
    torch.testing.assert_close(tensors["temporal"], expected.temporal[0])
    assert result["target"]["index"] == target
    assert result["target"]["given"] == ("--target" in options)
    said = capsys.readouterr().out
    assert ("no class in particular" in said) == (result["target"]["class_specific"] is False)


@pytest.mark.parametrize(
    ("options", "indices"),
    [
        (["--sampling", "dense"], list(range(14, 30))),
        (["--sampling", "stride", "--stride", "2"], list(range(0, 32, 2))),
        ([], [(2 * i + 1) * 44 // 32 for i in range(16)]),
    ],
)
@pytest.mark.usefixtures("without_pictures")
def test_sampling_chooses_the_frames(long_video, tmp_path, options, indices):
    assert main(["explain", str(long_video), "--model", MODEL, "--out", str(tmp_path), *options]) == 0
    assert check_numbers(tmp_path)[2]["frame_indices"] == indices


@pytest.mark.parametrize(
    ("options", "stride", "frame_stride"),
    [([], None, 1), (["--stride", "8"], 8, 1), (["--stride", "5", "--frame-stride", "2"], 5, 2)],
)
@pytest.mark.usefixtures("without_pictures")
def test_windows_are_merged_by_their_mean(long_video, tmp_path, options, stride, frame_stride):
    assert main(["explain", str(long_video), "--model", MODEL, "--out", str(tmp_path), "--windows", *options]) == 0
    tensors, _, result = check_numbers(tmp_path)

    clf = VideoClassifier.from_pretrained(MODEL)
    pieces = list(io.iter_windows(long_video, 16, stride=stride, frame_stride=frame_stride))
    clips = torch.cat([clf.preprocess(frames) for _, frames in pieces])
    probabilities = clf(clips).softmax(1)
    target = int(probabilities.mean(0).argmax())
    joint = STAA(clf).attribute_parts(clips, target=[target] * len(clips)).joint
    total, count = torch.zeros(44, 48, 48), torch.zeros(44)
    for (start, _), maps in zip(pieces, joint, strict=True):
        total[start : start + 16 * frame_stride : frame_stride] += maps
        count[start : start + 16 * frame_stride : frame_stride] += 1
    seen = count.nonzero()[:, 0]
    assert result["frame_indices"] == seen.tolist()
    torch.testing.assert_close(tensors["attributions"], total[seen] / count[seen, None, None], rtol=1e-4, atol=1e-6)
    assert [row["start"] for row in result["windows"]] == [start for start, _ in pieces]
    assert [row["target_probability"] for row in result["windows"]] == pytest.approx(
        probabilities[:, target].tolist(), rel=1e-3, abs=1e-6
    )
    assert result["target"]["probability"] == pytest.approx(probabilities.mean(0)[target].item(), rel=1e-3)
    assert windows.count_windows(44, 15 * frame_stride + 1, stride or 15 * frame_stride + 1) == len(pieces)


@pytest.fixture(autouse=True)
def ctrl_c_reaches_python():
    """A shell starts its background jobs with Ctrl-C ignored, and programs they start inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_at(monkeypatch, function: str, call: int) -> None:
    """A real Ctrl-C just before this call of what the windows' loop asks of a method."""
    original, calls = getattr(OfAttention, function), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(OfAttention, function, interrupted)


@pytest.mark.parametrize("mode", ["relevance", "released"])
def test_ctrl_c_keeps_what_is_done(long_video, tmp_path, capsys, monkeypatch, mode):
    interrupt_at(monkeypatch, "explain", 3)
    arguments = ["explain", str(long_video), "--model", MODEL, "--windows", "--stride", "8", "--mode", mode]
    assert main([*arguments, "--out", str(tmp_path)]) == 130
    _, _, result = check_numbers(tmp_path)
    check_pictures(tmp_path)
    assert [row["start"] for row in result["windows"]] == [0, 8]
    assert result["frame_indices"] == list(range(24))
    assert result["interrupted"] == "2 of 5 windows are done and kept, the others are missing"
    assert "2 of 5 windows are done" in capsys.readouterr().err
    assert len(io.read_video(tmp_path / "overlay.mp4").frames) == 24


@pytest.mark.parametrize("function", ["answer", "explain"])
def test_ctrl_c_before_anything_is_done_leaves_nothing(long_video, tmp_path, capsys, monkeypatch, function):
    interrupt_at(monkeypatch, function, 1)
    arguments = ["explain", str(long_video), "--model", MODEL, "--windows", "--out", str(tmp_path / "out")]
    assert main(arguments) == 130
    assert not (tmp_path / "out").exists()
    assert "interrupted" in capsys.readouterr().err


def test_earlier_results_are_never_overwritten_in_silence(video, tmp_path, capsys, monkeypatch):
    (tmp_path / "timeline.png").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine too")
    arguments = ["explain", str(video), "--model", MODEL, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(explaining, "load", lambda *args: pytest.fail("refuse before loading a model"))
        assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "timeline.png" in said and "--overwrite" in said and "--out" in said
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "timeline.png"]
    assert (tmp_path / "timeline.png").read_text() == "mine"
    assert main([*arguments, "--overwrite"]) == 0
    assert sorted(os.listdir(tmp_path)) == sorted([*output.FILES, "notes.txt"])
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
    with monkeypatch.context() as patch:
        patch.setattr(demo, "explain", lambda *args: pytest.fail("refuse before explaining"))
        assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere.mp4"], "nowhere.mp4 does not exist"),
        (["text.mp4"], "text.mp4 holds 4 bytes but no video"),
        (["short.mp4"], "16"),
        (["short.mp4", "--windows"], "holds 5 frames, but a window of this model spans 16"),
        (["--model", "tiny-videomae-patern"], "Did you mean 'tiny-videomae-pattern'?"),
        (["--model", "tiny-resnet3d-pattern"], "no attention to read"),
        (["--model", "empty"], "no config.json"),
        (["--target", "diagnal"], "there is no label 'diagnal'; close are ['diagonal'"),
        (["--target", "4"], "classes are 0..3"),
        (["--layers", "7"], "indices from"),
        (["--mode", "attention", "--rule", "chefer"], "--rule chefer belongs to --mode relevance"),
        (["--stride", "2"], "needs --windows, or --sampling stride"),
        (["--frame-stride", "2"], "needs --windows"),
        (["--windows", "--sampling", "dense"], "drop --sampling dense"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["--device", "abacus"], "--device abacus cannot be used here"),
        (["--out", "text.mp4"], "--out names a folder"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(video, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("text.mp4").write_text("text")
    Path("empty").mkdir()
    io.write_video("short.mp4", np.zeros((5, 48, 48, 3), np.uint8), 8)
    before = sorted(os.listdir("."))
    path = [] if options[0].endswith(".mp4") else [str(video)]
    model = [] if "--model" in options else ["--model", MODEL]
    assert main(["explain", *path, *options, *model]) == 2
    said = capsys.readouterr()
    assert message in said.err
    (line,) = [line for line in said.err.splitlines() if "captum_staa" in line]  # beside a progress bar, perhaps
    assert line.startswith("captum_staa: ")
    assert "Traceback" not in said.err and said.out == ""
    assert sorted(os.listdir(".")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "explain | compare | demo"),
        (["explain", "a.mp4"], "--model"),
        (["explain", "a.mp4", "--model", "m", "--layers", "some"], "takes all, mean, or block numbers"),
        (["explain", "a.mp4", "--model", "m", "--stride", "0"], "at least 1, but '0' came"),
        (["explain", "a.mp4", "--model", "m", "--top", "-3"], "at least 1, but '-3' came"),
        (["explain", "a.mp4", "--model", "m", "--mode", "magic"], "invalid choice"),
    ],
)
def test_arguments_that_cannot_be_read(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_lists_the_shipped_models(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["explain", "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert MODEL in said and "tiny-vivit-pattern" in said


def test_debug_shows_where_an_error_came_from(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["explain", str(tmp_path / "no.mp4"), "--model", MODEL, "--debug"])


def save_model(folder: Path, model: torch.nn.Module, size: int, resize: int) -> Path:
    model.save_pretrained(folder)
    processor = {"size": {"shortest_edge": resize}, "crop_size": {"height": size, "width": size}}
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, **statistics}))
    return folder


def test_a_model_from_a_folder(video, tmp_path, capsys):
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
    check_pictures(tmp_path / "out")
    assert tensors["attributions"].shape == (8, 32, 32)
    assert result["target"]["label"] == "knitting" and result["target"]["given"]
    box = VideoClassifier.from_pretrained(folder).crop_box(288, 288 + 2 * MARGIN)
    assert list(result["crop_box"].values()) == list(box)
    assert box[2] == pytest.approx(256)
    said = capsys.readouterr().out
    assert sum(f"  {label}" in said for label in labels.values()) == 2

    (folder / "preprocessor_config.json").unlink()
    assert main([*arguments, "--out", str(tmp_path / "other")]) == 2
    assert "put the preprocessor_config.json" in capsys.readouterr().err


REAL = {
    "v_ApplyEyeMakeup_g01_c01.avi": "tiny-videomae-pattern",
    "mmaction2_demo_arm_wrestling.mp4": "tiny-timesformer-pattern",
    "nasa_13013.mp4": "tiny-vivit-pattern",
    "flipping_a_pancake.mkv": "tiny-vjepa2-pattern",
}


@pytest.mark.parametrize("name", REAL)
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
    shown = io.read_video(tmp_path / "overlay.mp4").frames
    assert len(shown) == 16
    original = io.read_video(path, 16).frames.mean((1, 2))  # (T, 3)
    np.testing.assert_allclose(shown[:, :, : shown.shape[2] // 2 - 8].mean((1, 2)), original, atol=6)


def test_a_real_clip_over_windows(shared_videos, tmp_path):
    path = shared_videos / "v_ApplyEyeMakeup_g01_c01.avi"
    arguments = ["explain", str(path), "--model", "tiny-timesformer-pattern", "--windows", "--mode", "attention"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    _, _, result = check_numbers(tmp_path)
    check_pictures(tmp_path)
    assert result["frame_indices"] == list(range(164))
    overlay = io.read_video(tmp_path / "overlay.mp4")
    assert (len(overlay.frames), overlay.fps) == (164, 25)
    first = io.read_video(path).frames
    shown = overlay.frames[:, :, : overlay.frames.shape[2] // 2 - 8]
    np.testing.assert_allclose(shown.mean((1, 2)), first.mean((1, 2)), atol=6)  # each frame under its own map


@pytest.mark.filterwarnings("always::UserWarning")
@pytest.mark.usefixtures("without_pictures")
def test_a_damaged_file_is_explained_with_a_warning_in_one_line(video, tmp_path, capsys):
    frames = np.repeat(io.read_video(video).frames, 4, axis=0)
    whole = io.write_video(tmp_path / "whole.mkv", frames, FPS).read_bytes()
    damaged = tmp_path / "damaged.mkv"
    damaged.write_bytes(whole[: len(whole) * 3 // 4])
    assert main(["explain", str(damaged), "--model", MODEL, "--out", str(tmp_path / "out")]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert said and all(line.startswith("captum_staa: warning: only ") for line in said)


def test_a_file_that_does_not_say_how_fast_it_plays(video, tmp_path):
    explanation = explaining.explain(Options(video=video, model=MODEL, out=tmp_path / "out"))
    explanation = dataclasses.replace(explanation, info=explanation.info._replace(fps=math.nan))
    output.write(explanation, tmp_path / "out")
    result = read(tmp_path / "out")[2]
    assert result["fps"] is None and result["frame_times"] == [None] * 16
    key = result["key_frames"][0]
    assert key["time"] is None
    assert f"when: frame {key['frame']} (" in report(explanation, 3)
    assert "####" in report(explanation, 3, encoding="ascii") and report(explanation, 3, "ascii").isascii()


def test_key_frames_are_strong_and_apart():
    assert strongest([1.0, 9.0, 8.0, 1.0, 5.0, 4.0], count=5, apart=1) == [1, 2, 4]
    assert strongest([1.0, 9.0, 8.0, 1.0, 5.0, 4.0], count=5, apart=2) == [1, 4]
    assert strongest([1.0, 9.0, 8.0, 1.0, 5.0, 4.0], count=1, apart=1) == [1]
    assert strongest([-1.0, -2.0], count=2, apart=1) == []


def check_demo(folder: Path, clips: int) -> dict[str, dict[str, float]]:
    check_numbers(folder)
    assert sorted(os.listdir(folder)) == sorted(("planted.mp4", *output.FILES, *demo.TABLES, demo.METHODS))
    with (folder / "table.csv").open(newline="", encoding="utf-8") as file:
        rows = {row.pop("method"): {k: float(v) for k, v in row.items()} for row in csv.DictReader(file)}
    assert len(rows) == 11  # seven methods, four controls
    assert len((folder / "table.md").read_text(encoding="utf-8").splitlines()) == 13
    assert rows["STAA relevance"]["auroc_joint"] > 0.95
    assert rows["STAA relevance"]["auroc_temporal"] > 0.9
    assert rows["STAA relevance"]["pointing"] == 1
    assert abs(rows["random"]["auroc_joint"] - 0.5) < 0.03
    assert rows["uniform"]["auroc_joint"] == rows["uniform"]["auroc_temporal"] == 0.5
    assert rows["inverted"]["auroc_joint"] == pytest.approx(1 - rows["STAA relevance"]["auroc_joint"])
    assert rows["centre"]["auroc_joint"] < rows["STAA relevance"]["auroc_joint"]
    assert rows["STAA relevance"]["forwards"] < 20 < rows["Captum IntegratedGradients, 50 steps"]["forwards"]
    assert rows["Captum Occlusion, 2 x 8 x 8"]["forwards"] > 100  # 288 boxes
    return rows


def test_the_demo_in_small(tmp_path, capsys):
    threads = torch.get_num_threads()
    assert main(["demo", "--out", str(tmp_path / "demo"), "--clips", "2"]) == 0
    assert torch.get_num_threads() == threads
    rows = check_demo(tmp_path / "demo", clips=2)
    said = capsys.readouterr().out
    assert "as planted: the class, and every key frame" in said and "| STAA relevance" in said

    metrics = pytest.importorskip("sklearn.metrics")  # the table again, another way
    from captum.attr import Saliency

    clf = VideoClassifier.from_pretrained(demo.MODEL)
    scores = []
    for clip, label, truth in (PLANTED[i] for i in range(2)):
        clip = clip[None].requires_grad_()
        magnitude = Saliency(clf).attribute(clip, target=int(label))[0].sum(1).abs()
        scores.append(metrics.roc_auc_score(truth.flatten().numpy(), magnitude.flatten().numpy()))
    assert rows["Captum Saliency"]["auroc_joint"] == pytest.approx(np.mean(scores), rel=1e-4)


def test_the_demo_says_where_it_differs_from_what_was_planted(video, tmp_path):
    explanation = explaining.explain(Options(video=video, model=MODEL, out=tmp_path))
    when = PLANTED[0][2].flatten(1).any(1)
    label = PLANTED.labels[int(PLANTED[0][1])]
    assert demo.verdict(explanation, label, when) == ""
    assert "'stripes' was planted" in demo.verdict(explanation, "stripes", when)
    assert "outside of the evidence" in demo.verdict(explanation, label, ~when)


def test_every_method_of_the_table_is_there():
    assert len(comparison.methods_of(VideoClassifier.from_pretrained("tiny-timesformer-motion"))) == 7


@pytest.mark.slow
def test_the_demo_in_full(tmp_path):
    """As a user starts it, and with enough clips to tell methods apart."""
    command = [sys.executable, "-m", "captum_staa", "demo", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = check_demo(tmp_path / "demo", clips=demo.CLIPS)
    assert rows["STAA relevance"]["auroc_joint"] > rows["Captum IntegratedGradients, 50 steps"]["auroc_joint"]
    assert rows["random"]["pointing"] < 0.6


@pytest.mark.slow
def test_ctrl_c_from_outside(shared_videos, tmp_path):
    """A signal to the whole program, somewhere in the middle of its windows."""
    path = shared_videos / "nasa_13013.mp4"
    command = [sys.executable, "-m", "captum_staa", "explain", str(path), "--model", MODEL, "--windows"]
    command += ["--stride", "1", "--target", "0", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        said = ""
        while "explaining" not in said or "| 0/" in said[-80:]:  # the bar has moved
            said += running.stderr.read(1)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=120)
    assert running.returncode == 130, err
    assert "windows are done and kept" in err and "Traceback" not in err
    result = check_numbers(tmp_path)[2]
    check_pictures(tmp_path)
    assert 0 < len(result["windows"]) < 310


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
    """Random weights in the published shapes: memory, time and pictures, not meaning."""
    folder = save_model(tmp_path / "model", base_model(name), size=224, resize=256 if name == "vivit" else 224)
    out = Path(os.environ.get("CAPTUM_STAA_KEEP", tmp_path)) / f"{name}-base"
    arguments = ["explain", str(shared_videos / clip), "--model", str(folder), "--out", str(out), "--overwrite"]
    assert main(arguments) == 0
    tensors, _, result = check_numbers(out)
    check_pictures(out)
    assert tensors["attributions"].shape == (frames, 224, 224)
    assert len(result["predictions"]) == 20
