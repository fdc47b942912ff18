"""Explanation of a long video window by window, and Ctrl-C, which keeps the finished windows."""

from __future__ import annotations

import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from command_line import (
    MODEL,
    check_numbers,
    check_pictures,
    without_text,
)

from captum_staa import STAA, VideoClassifier, io
from captum_staa.__main__ import main
from captum_staa.cli import explain as explaining
from captum_staa.cli.methods import ClipMethod

pytest.importorskip("av")
pytestmark = pytest.mark.usefixtures("ctrl_c_reaches_python")


@pytest.mark.parametrize(
    ("options", "indices"),
    [
        (["--sampling", "dense"], list(range(14, 30))),
        (["--sampling", "stride", "--stride", "2"], list(range(0, 32, 2))),
        ([], [(2 * i + 1) * 44 // 32 for i in range(16)]),
    ],
)
@pytest.mark.usefixtures("without_pictures")
def test_sampling_selects_the_frames(long_video, tmp_path, options, indices):
    assert main(["explain", str(long_video), "--model", MODEL, "--out", str(tmp_path), *options]) == 0
    assert check_numbers(tmp_path)[2]["frame_indices"] == indices


@pytest.mark.usefixtures("without_pictures")
def test_the_maps_of_the_class_of_versus_are_merged_too(long_video, tmp_path):
    options = ["--windows", "--stride", "14", "--target", "bright-right", "--versus", "bright-bottom"]
    assert main(["explain", str(long_video), "--model", MODEL, "--out", str(tmp_path), *options]) == 0
    tensors = check_numbers(tmp_path)[0]
    clf = VideoClassifier.from_pretrained(MODEL)
    this, other = clf.class_index("bright-right"), clf.class_index("bright-bottom")
    pieces = list(io.iter_windows(long_video, 16, stride=14))
    for name, one, against in (("", this, other), ("versus_", other, this)):
        total, count = torch.zeros(44, 48, 48), torch.zeros(44)
        for start, frames in pieces:
            maps = STAA(clf.versus(against)).attribute_maps(clf.preprocess(frames), target=one)
            total[start : start + 16] += maps.joint[0]
            count[start : start + 16] += 1
        expected = total / count[:, None, None]
        torch.testing.assert_close(tensors[f"{name}attributions"], expected)
        torch.testing.assert_close(tensors[f"{name}spatial"], expected.sum(0), atol=1e-4, rtol=1e-4)


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
    joint = STAA(clf).attribute_maps(clips, target=[target] * len(clips)).joint
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
    assert explaining.count_windows(44, 15 * frame_stride + 1, stride or 15 * frame_stride + 1) == len(pieces)


def interrupt_at(monkeypatch, function: str, call: int) -> None:
    """Send a real Ctrl-C just before this call of a function of the method."""
    original, calls = getattr(ClipMethod, function), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(ClipMethod, function, interrupted)


def test_ctrl_c_keeps_the_finished_windows(long_video, tmp_path, capsys, monkeypatch):
    interrupt_at(monkeypatch, "explain", 3)
    arguments = ["explain", str(long_video), "--model", MODEL, "--windows", "--stride", "8"]
    assert main([*arguments, "--out", str(tmp_path)]) == 130
    _, _, result = check_numbers(tmp_path)
    check_pictures(tmp_path)
    assert [row["start"] for row in result["windows"]] == [0, 8]
    assert result["frame_indices"] == list(range(24))
    assert result["interrupted"] == "2 of 5 windows are done and kept, the others are missing"
    assert "2 of 5 windows are done" in capsys.readouterr().err
    assert len(io.read_video(tmp_path / "overlay.mp4").frames) == 24


@pytest.mark.parametrize("function", ["answer", "explain"])
def test_ctrl_c_before_the_first_window_writes_no_files(long_video, tmp_path, capsys, monkeypatch, function):
    interrupt_at(monkeypatch, function, 1)
    arguments = ["explain", str(long_video), "--model", MODEL, "--windows", "--out", str(tmp_path / "out")]
    assert main(arguments) == 130
    assert not (tmp_path / "out").exists()
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.slow  # the other tests use planted clips
def test_windows_of_a_real_clip(shared_videos, tmp_path):
    path = shared_videos / "v_ApplyEyeMakeup_g01_c01.avi"
    arguments = ["explain", str(path), "--model", "tiny-timesformer-pattern", "--windows", "--method", "staa"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    _, _, result = check_numbers(tmp_path)
    check_pictures(tmp_path)
    assert result["frame_indices"] == list(range(164))
    overlay = io.read_video(tmp_path / "overlay.mp4")
    assert (len(overlay.frames), overlay.fps) == (164, 25)
    first = io.read_video(path).frames
    shown = without_text(overlay.frames)[:, :, : overlay.frames.shape[2] // 2 - 8]
    np.testing.assert_allclose(shown.mean((1, 2)), first.mean((1, 2)), atol=6)  # each frame has the map of its index


@pytest.mark.slow
def test_sigint_to_a_subprocess_keeps_the_finished_windows(shared_videos, tmp_path):
    """The signal arrives in one of the windows in the middle."""
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
