"""The command line: runs on video files; the numbers in the output files are checked."""

from __future__ import annotations

import contextlib
import io as io_module
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import (
    FACTOR,
    FPS,
    MARGIN,
    MODEL,
    PLANTED,
    check_numbers,
    check_pictures,
    read,
    without_text,
)
from covering import in_one_case
from PIL import Image

from captum_staa import STAA, VideoClassifier, io
from captum_staa.__main__ import main
from captum_staa.benchmark import METHODS
from captum_staa.benchmark.methods import made, seeded
from captum_staa.cli import demo, output
from captum_staa.cli import explain as explaining
from captum_staa.cli.explanation import SampledVideo, strongest
from captum_staa.cli.methods import default_method

pytest.importorskip("av")

TUBELET = 2  # frames of a token; they share one value of the map


@pytest.fixture(scope="module")
def explained(video, tmp_path_factory) -> tuple[Path, str]:
    """The output folder of a run with default options, and its printed report."""
    folder = tmp_path_factory.mktemp("explained") / "new" / "folder"
    with contextlib.redirect_stdout(io_module.StringIO()) as said:
        assert main(["explain", str(video), "--model", MODEL, "--out", str(folder)]) == 0
    return folder, said.getvalue()


def test_explain_writes_the_results_of_staa(video, explained):
    folder, said = explained
    tensors, described, result = check_numbers(folder)
    check_pictures(folder)

    _, label, truth = PLANTED[0]
    name, when = PLANTED.labels[int(label)], truth.flatten(1).any(1)
    assert result["predictions"][0]["label"] == result["target"]["label"] == name
    assert result["predictions"][0]["probability"] > 0.9
    assert sum(row["probability"] for row in result["predictions"]) == pytest.approx(1)
    key_frames = [frame["frame"] for frame in result["key_frames"]]
    assert when[key_frames[0]]
    assert all(when[max(frame - TUBELET, 0) : frame + TUBELET + 1].any() for frame in key_frames)
    assert list(result["crop_box"].values()) == [0, MARGIN, 288, 288]
    assert result["frame_indices"] == list(range(16)) and result["fps"] == FPS
    assert torch.__version__.startswith(result["versions"]["torch"]) and described["layout"] == "BTCHW"

    clf = VideoClassifier.from_pretrained(MODEL)
    clip = clf.preprocess(io.read_video(video, 16).frames)
    expected = STAA(clf).attribute_maps(clip, target=int(label))
    torch.testing.assert_close(tensors["attributions"], expected.joint[0])

    assert f"  {name}" in said and "the predicted class" in said
    assert f"{result['key_frames'][0]['time']:.2f} s (" in said


def test_overlay_is_drawn_on_the_evidence(video, explained):
    """The center crop is undone: color appears on the planted patch, and never outside of the crop."""
    folder, _ = explained
    overlay = io.read_video(folder / "overlay.mp4")
    wide = 288 + 2 * MARGIN
    assert overlay.frames.shape[:1] + overlay.frames.shape[2:] == (16, 2 * wide + 8, 3)
    assert overlay.fps == FPS
    frames = without_text(overlay.frames)[:, :288]
    result = read(folder)[2]
    best = result["key_frames"][0]["frame"]
    right = frames[best, :, -wide:].astype(int)
    colored = right.max(-1) - right.min(-1) > 60
    assert not colored[:, : MARGIN - 4].any() and not colored[:, -MARGIN + 4 :].any()
    truth = PLANTED[0][2][best][None, None].float()
    around = torch.nn.functional.max_pool2d(truth, 9, 1, 4)  # half a tubelet more on each side
    patch, around = (
        torch.nn.functional.interpolate(part, scale_factor=FACTOR)[0, 0].bool() for part in (truth, around)
    )
    rows, columns = np.nonzero(colored)
    truth_rows, truth_columns = (where.float().mean().item() for where in patch.nonzero(as_tuple=True))
    assert abs(rows.mean() - truth_rows) < 8 * FACTOR / 2  # half a tubelet
    assert abs(columns.mean() - MARGIN - truth_columns) < 8 * FACTOR / 2
    assert around.numpy()[rows, np.clip(columns - MARGIN, 0, 287)].mean() > 0.8
    left = frames[:, :, :wide]
    original = io.read_video(video).frames
    assert np.abs(left.astype(int) - original).mean() < 4


def test_a_toy_model_says_so_wherever_its_answers_are_shown(explained, capsys):
    folder, said = explained
    notice = "toy model, knows 3 synthetic patterns; its labels mean nothing on real video"
    assert f"  {notice}\n" in said
    assert read(folder)[2]["model"]["notice"] == notice
    assert f'<p id="remark">{notice}</p>' in (folder / "player.html").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["stream", "--help"])
    assert re.search(rf"{notice}:\n[^:]*{MODEL},", capsys.readouterr().out)


def test_the_list_of_methods_says_which_name_is_the_default_of_the_class(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    listed = capsys.readouterr().out
    assert re.search(r"\n  STAA \(relevance\) +the default of STAA\(clf\): relevance, signed, for one class\n", listed)
    assert re.search(
        r"\n  STAA +the attention of the STAA paper, the same map for every class; not the default", listed
    )


@pytest.mark.parametrize(
    ("total", "indices", "fps", "said"),
    [
        (310, range(9, 310, 20), 30.0, "16 of 310 frames, evenly: one frame per 0.67 s"),
        (16800, range(500, 16800, 1100), 29.7, "15 of 16 800 frames, evenly: one frame per 37 s; use --windows"),
        (900, range(0, 900, 40), math.nan, "23 of 900 frames, evenly: one frame per 40 frames; use --windows"),
        (300, range(100, 116), 30.0, "16 of 300 frames, evenly"),
        (1, [0], 30.0, "1 of 1 frames, evenly"),
    ],
)
def test_report_says_how_much_of_the_video_was_seen(total, indices, fps, said):
    info = io.VideoInfo(total, fps, 48, 48)
    times = None if math.isnan(fps) else [index / fps for index in indices]
    video = SampledVideo(Path("a.mp4"), info, list(indices), times, "evenly", (0, 0, 48, 48))
    assert video.coverage() == said + " to explain the whole video" * ("--windows" in said)


@pytest.mark.parametrize(
    ("options", "method"),
    [
        (["--method", "staa", "--layers", "-1"], {"mode": "attention", "layers": [-1]}),
        (["--method", "STAA", "--layers", "mean", "--focus"], {"mode": "attention", "layers": "mean"}),
        (["--method", "staa-chefer", "--layers", "-2,-1"], {"rule": "chefer", "layers": [-2, -1]}),
        (["--method", "STAA (relevance)", "--target", "BRIGHT-BOTTOM"], {"rule": "decomposition"}),
    ],
)
@pytest.mark.usefixtures("without_pictures")
def test_methods_and_options_reach_staa(video, tmp_path, capsys, options, method):
    assert main(["explain", str(video), "--model", MODEL, "--out", str(tmp_path), *options]) == 0
    tensors, _, result = check_numbers(tmp_path)
    if "--focus" in options:
        from captum_staa import Focus

        method = {**method, "focus": Focus()}
    clf = VideoClassifier.from_pretrained(MODEL)
    clip = clf.preprocess(io.read_video(video, 16).frames)
    target = clf.class_index("bright-bottom") if "--target" in options else int(clf(clip).argmax())
    expected = STAA(clf, **method).attribute_maps(clip, target=target)
    torch.testing.assert_close(tensors["attributions"], expected.joint[0])
    torch.testing.assert_close(tensors["temporal"], expected.temporal[0])
    assert result["target"]["index"] == target
    assert result["target"]["given"] == ("--target" in options)
    said = capsys.readouterr().out
    assert ("no class in particular" in said) == (result["target"]["class_specific"] is False)


@pytest.mark.usefixtures("without_pictures")
def test_versus_explains_one_class_against_another(video, tmp_path, capsys):
    arguments = ["explain", str(video), "--model", MODEL, "--versus", "bright-diagonal", "--out", str(tmp_path)]
    assert main(arguments) == 0
    tensors, _, result = check_numbers(tmp_path)
    clf = VideoClassifier.from_pretrained(MODEL)
    clip = clf.preprocess(io.read_video(video, 16).frames)
    expected = STAA(clf.versus("bright-diagonal")).attribute_maps(clip, target=result["target"]["index"])
    torch.testing.assert_close(tensors["attributions"], expected.joint[0])
    other = clf.class_index("bright-diagonal")
    opposite = STAA(clf.versus(result["target"]["index"])).attribute_maps(clip, target=other)
    torch.testing.assert_close(tensors["versus_attributions"], opposite.joint[0])
    torch.testing.assert_close(torch.tensor(result["versus"]["temporal"]), opposite.temporal[0])
    assert (result["versus"]["index"], result["versus"]["label"]) == (other, "bright-diagonal")
    assert result["method"] == "STAA (relevance), versus='bright-diagonal'"
    assert result["target"]["index"] == int(clf(clip).argmax())  # the prediction is that of the model itself
    assert main([*arguments, "--overwrite", "--method", "staa"]) == 2
    assert "--versus needs a method whose maps explain a class" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--target", "bright-diagonal"]) == 2
    assert "--versus must be a class other than the explained one, got 'bright-diagonal'" in capsys.readouterr().err
    assert main([*arguments[:5], "rest", "--out", str(tmp_path), "--overwrite", "--method", "GradCAM"]) == 0
    assert "versus_attributions" not in check_numbers(tmp_path)[0]


def test_versus_draws_both_classes_beside_each_other(video, tmp_path):
    method = ["--method", "GradCAM (layercam)", "--versus", "bright-bottom", "--target", "bright-right"]
    assert main(["explain", str(video), "--model", MODEL, "--out", str(tmp_path), *method]) == 0
    page = (tmp_path / "player.html").read_text()
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])
    assert [panel["name"] for panel in data["explanations"][0]["panels"]] == ["bright-right", "bright-bottom"]
    with Image.open(tmp_path / "sheet.png") as summary:
        assert summary.height > summary.width  # frames above maps above the timeline, not a sheet of frames


@pytest.mark.parametrize("method", ["InputXGradient", "GradCAM (last)", "SmoothGrad", "VideoFeatureAblation (frames)"])
@pytest.mark.usefixtures("without_pictures")
def test_explain_takes_the_methods_of_compare(video, tmp_path, method):
    assert main(["explain", str(video), "--model", MODEL, "--method", method, "--out", str(tmp_path)]) == 0
    tensors, _, result = check_numbers(tmp_path)
    assert result["method"] == method
    clf = VideoClassifier.from_pretrained(MODEL)
    clip = clf.preprocess(io.read_video(video, 16).frames)
    (known,) = made([method], clf, perturbations_per_eval=8)
    with seeded(0, 0, method, clip.device):
        expected = known.map_of(known.call(clip, result["target"]["index"]), clip, clf)
    torch.testing.assert_close(tensors["attributions"], expected[0].float())


def test_earlier_results_are_replaced_only_with_overwrite(video, tmp_path, capsys, monkeypatch):
    (tmp_path / "timeline.png").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine too")
    arguments = ["explain", str(video), "--model", MODEL, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(explaining, "load", lambda *args: pytest.fail("must fail before loading a model"))
        assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "timeline.png" in said and "--overwrite" in said and "--out" in said
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "timeline.png"]
    assert (tmp_path / "timeline.png").read_text() == "mine"
    assert main([*arguments, "--overwrite"]) == 0
    assert sorted(os.listdir(tmp_path)) == sorted([*output.FILES, "notes.txt"])
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
    with monkeypatch.context() as patch:
        patch.setattr(demo, "explain", lambda *args: pytest.fail("must fail before explaining"))
        assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "--overwrite" in capsys.readouterr().err


@in_one_case()
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere.mp4"], "nowhere.mp4 does not exist"),
        (["text.mp4"], "text.mp4, which contains 4 bytes but no video"),
        (["short.mp4"], "16"),
        (
            ["short.mp4", "--windows"],
            "at least 16 frames for a window of this model (16 frames with --frame-stride 1), got 5",
        ),
        (["--model", "tiny-videomae-patern"], "Did you mean 'tiny-videomae-pattern'?"),
        (
            ["--model", "tiny-resnet3d-pattern", "--method", "staa"],
            "--method STAA does not apply to this model: STAA by name needs a transformer",
        ),
        (["--model", "empty"], "must contain config.json"),
        (["--target", "bright-diagnal"], "there is no label 'bright-diagnal'. Similar labels: ['bright-diagonal'"),
        (["--target", "3"], "from 0 to 2, got 3"),
        (["--method", "staa-chefer", "--layers", "7"], "integer from -4 to 3 (of this model's 4 blocks)"),
        (["--layers", "-1"], "--layers can only be used with --method 'STAA (Chefer)' or 'STAA', got no --method"),
        (["--focus"], "--focus can only be used with --method 'STAA (Chefer)' or 'STAA', got no --method"),
        (["--method", "STEP", "--focus"], "or 'STAA', got --method 'STEP'. Drop it"),
        (["--model", "text.pth"], "got the file 'text.pth': weights alone do not say which network"),
        (["--method", "occlusoin"], "got 'occlusoin'. Did you mean Occlusion, VideoOcclusion?"),
        (["--stride", "2"], "got --stride 2"),
        (["--frame-stride", "2"], "--frame-stride needs --windows"),
        (["--windows", "--sampling", "dense"], "Drop --sampling dense"),
        (["--device", "cuda:99"], "got 'cuda:99', which cannot be used here"),
        (["--device", "abacus"], "got 'abacus', which cannot be used here"),
        (["--out", "text.mp4"], "--out must be a folder, got the file text.mp4"),
        (["--out", "text.mp4/new"], "--out must be a folder, or one that can be created, got text.mp4/new, where"),
        (["--model", "tiny-qwen2_5_vl"], "got the video language model 'tiny-qwen2_5_vl', whose answers"),
        (["--model", MODEL, "--prompt", "what?"], "got the bundled video classifier 'tiny-videomae-pattern'"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(video, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("text.mp4").write_text("text")
    Path("empty").mkdir(exist_ok=True)
    io.write_video("short.mp4", np.zeros((5, 48, 48, 3), np.uint8), 8, overwrite=True)
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


@in_one_case()
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "explain | stream | compare | inspect | demo"),
        (["inspect"], "MODEL"),
        (["explain", "a.mp4"], "--model"),
        (["explain", "a.mp4", "--model", "m", "--layers", "some"], "must be all, mean, or block indices"),
        (["explain", "a.mp4", "--model", "m", "--stride", "0"], "at least 1, got '0'"),
        (["explain", "a.mp4", "--model", "m", "--top", "-3"], "at least 1, got '-3'"),
        (["explain", "a.mp4", "--model", "m", "--sampling", "magic"], "invalid choice"),
    ],
)
def test_invalid_arguments_exit_with_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_inspect_prints_what_is_found(capsys):
    assert main(["inspect", "tiny-vivit-pattern"]) == 0
    said = capsys.readouterr().out
    for words in ("ViViT", "layers.3.attention", "joint, block 3", "prefix=1", "family 'vivit': agrees", "first token"):
        assert words.lower() in said.lower(), said
    assert main(["inspect", "tiny-resnet3d-pattern"]) == 1
    said = capsys.readouterr().out
    assert "(16, 48, 48)" in said and "no attention was found" in said


def test_help_lists_methods_and_bundled_models(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["explain", "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert MODEL in said and "tiny-vivit-pattern" in said
    assert all(f"  {name}" in said and spec.description in said for name, spec in METHODS.items())


def test_the_default_method_fits_the_model():
    assert default_method(VideoClassifier.from_pretrained(MODEL)) == "STAA (relevance)"
    assert default_method(VideoClassifier.from_pretrained("tiny-resnet3d-pattern")) == "GradCAM"
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(2))
    assert default_method(VideoClassifier(net, layout="BCTHW")) == "VideoOcclusion"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("missing"), "unexpected KeyError: 'missing'. Pass --debug to see where it happened."),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "the memory is not enough (CUDA out of memory."),
        (MemoryError(), "the memory is not enough (MemoryError)"),
        (PermissionError(13, "Permission denied", "out"), "[Errno 13] Permission denied: 'out'"),
    ],
)
def test_no_error_prints_a_traceback(error, said, monkeypatch, capsys):
    def fail(*args):
        raise error

    monkeypatch.setattr(explaining, "run", fail)
    assert main(["explain", "a.mp4", "--model", MODEL]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"captum_staa: {said}") and printed.err.count("\n") == 1
    with pytest.raises(type(error)):
        main(["explain", "a.mp4", "--model", MODEL, "--debug"])


def test_a_folder_without_write_permission_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=rf"got {tmp_path}/new, where {tmp_path} is not writable"):
        output.refuse_to_overwrite(tmp_path / "new", overwrite=False)


def test_debug_raises_the_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["explain", str(tmp_path / "no.mp4"), "--model", MODEL, "--debug"])


def test_strongest_positions_are_large_and_apart():
    assert strongest([1.0, 9.0, 8.0, 1.0, 5.0, 4.0], count=5, apart=1) == [1, 2, 4]
    assert strongest([1.0, 9.0, 8.0, 1.0, 5.0, 4.0], count=5, apart=2) == [1, 4]
    assert strongest([1.0, 9.0, 8.0, 1.0, 5.0, 4.0], count=1, apart=1) == [1]
    assert strongest([-1.0, -2.0], count=2, apart=1) == []
