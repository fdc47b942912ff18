"""``python -m captum_staa stream``: video files explained frame by frame, and the overlay that is written."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from covering import in_one_case

from captum_staa import STAA, STAAStream, VideoClassifier, io
from captum_staa.__main__ import main
from captum_staa.benchmark import PlantedClips, SceneOptions
from captum_staa.cli import stream as streaming
from captum_staa.cli.stream import LEAST, STRIP, Painter
from captum_staa.io import video_writer
from captum_staa.stream import FrameResult, sources
from captum_staa.stream.run import WindowExplainer

pytest.importorskip("av")

MODEL = "tiny-videomae-pattern"
FPS, FACTOR, MARGIN, TOTAL = 12.0, 4, 40, 26
PLANTED = PlantedClips(seed=99, n=1, scene=SceneOptions(num_frames=TOTAL, rivals=0))


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """A planted patch in frames of 192 x 272 pixels; preprocessing crops the margins."""
    small = PLANTED.frames(0)
    large = small.repeat(FACTOR, axis=1).repeat(FACTOR, axis=2)
    return np.pad(large, ((0, 0), (0, 0), (MARGIN, MARGIN), (0, 0)), constant_values=90)


@pytest.fixture(scope="module")
def clip(frames, tmp_path_factory):
    return io.write_video(tmp_path_factory.mktemp("videos") / "planted.mp4", frames, FPS, crf=6)


@pytest.fixture
def interruptible():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def colorful(pictures: np.ndarray) -> np.ndarray:
    """Return the distance of pixels from gray."""
    return np.ptp(pictures.astype(int), axis=-1)


def test_the_overlay_has_every_frame(clip, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["stream", str(clip), "--model", MODEL, "--stride", "4"]) == 0
    said = capsys.readouterr().out
    assert os.listdir(tmp_path) == ["planted_stream.mp4"]
    written = io.read_video("planted_stream.mp4")
    assert written.fps == FPS and written.frames.shape == (TOTAL, 192 + STRIP, 272, 3)
    assert f"planted.mp4: {TOTAL} frames in" in said and "4 explained, 0 skipped; policy wait" in said
    assert "each frame waits for 12 to 15 later frames" in said and "written to planted_stream.mp4" in said
    above = colorful(written.frames[:, :192])
    truth = PLANTED[0][2] | PLANTED.rivals(0)  # the object, with or without evidence
    truth = np.pad(truth.numpy().repeat(FACTOR, 1).repeat(FACTOR, 2), ((0, 0), (0, 0), (MARGIN, MARGIN)))
    on, off = (np.mean([above[t][where[t]].mean() for t in range(TOTAL)]) for where in (truth, ~truth))
    assert on > 2 * off
    assert above[:, :, : MARGIN - 4].max() < 25  # what the crop cut off is gray
    assert written.frames[:, 192:, 6:120].max() > 150  # the answer stands below

    assert main(["stream", str(clip), "--model", MODEL]) == 2
    assert "planted_stream.mp4 already exists. Pass --overwrite" in capsys.readouterr().err
    assert (
        main(["stream", str(clip), "--model", MODEL, "--overwrite", "--loop", "--limit", "40", "--mode", "attention"])
        == 0
    )
    assert len(io.read_video("planted_stream.mp4").frames) == 40


@pytest.mark.parametrize("layers", ["-1", "mean", None])
def test_layers_reach_the_method(clip, tmp_path, monkeypatch, layers):
    shown, original = [], Painter.__call__
    monkeypatch.setattr(Painter, "__call__", lambda *given: shown.append(given[1].joint) or original(*given))
    asked = [] if layers is None else ["--layers", layers]
    assert main(["stream", str(clip), "--model", MODEL, "--limit", "16", "--out", str(tmp_path / "a.mp4"), *asked]) == 0
    classifier = VideoClassifier.from_pretrained(MODEL)
    chosen = {"-1": [-1], "mean": "mean"}.get(layers)
    explainer = STAA(classifier) if chosen is None else STAA(classifier, mode="attention", layers=chosen)
    wanted = [result.joint for result in STAAStream(explainer)(io.read_video(clip, 16, "dense", start=0).frames)]
    np.testing.assert_array_equal(np.stack(shown), np.stack(wanted))


def test_ctrl_c_keeps_finished_frames(clip, tmp_path, capsys, monkeypatch, interruptible):
    original, calls = WindowExplainer.__call__, []

    def interrupted(self, window):
        calls.append(window)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(self, window)

    monkeypatch.setattr(WindowExplainer, "__call__", interrupted)
    out = tmp_path / "out.mp4"
    command = ["stream", str(clip), "--model", MODEL, "--stride", "4", "--out", str(out)]
    assert main(command) == 130
    assert "interrupted: 24 finished frames are kept" in capsys.readouterr().err
    beside = io.read_video(out).frames[:, :192, : MARGIN - 4].mean((1, 2, 3))  # dark where nothing was explained
    assert len(beside) == 24 and beside[:20].min() > 120 > 60 > beside[20:].max()  # windows 0 and 4 saw frames 0 to 19

    calls[:] = [None, None]  # before anything is done
    assert main([*command[:-1], str(tmp_path / "none.mp4")]) == 130
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_frames_before_a_failure_of_the_source_are_written(frames, clip, tmp_path, capsys, monkeypatch):
    def failing(path, loop):
        yield from frames[:20]
        raise OSError("unplugged")

    monkeypatch.setattr(sources, "_file", failing)
    out = tmp_path / "out.mkv"
    assert main(["stream", str(clip), "--model", MODEL, "--out", str(out)]) == 2
    assert "unplugged" in capsys.readouterr().err
    assert len(io.read_video(out).frames) == 20


@in_one_case()
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/dev/video99"], "got /dev/video99, which does not exist"),
        (["97"], "got /dev/video97"),
        (["97", "--loop"], "got the camera 97"),
        (["missing.mp4"], "missing.mp4"),
        (["CLIP", "--out", "a.gif"], ".mp4, .mkv, .avi, .webm, got '.gif' in a.gif"),
        (["CLIP", "--out", "none/a.mp4"], "none"),
        (
            ["CLIP", "--mode", "attention", "--target", "bright-bottom"],
            "--target needs --mode relevance, got --target bright-bottom",
        ),
        (["CLIP", "--target", "waving"], "waving"),
        (["CLIP", "--stride", "20"], "stride must be at most window=16"),
        (["CLIP", "--limit", "10"], "at least window=16 frames, got 10"),
    ],
)
def test_invalid_commands_exit_with_status_2(clip, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main(["stream", *(str(clip) if word == "CLIP" else word for word in arguments), "--model", MODEL]) == 2
    assert said in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_camera_device_is_read_frame_by_frame(clip, frames, tmp_path):
    """A file with its format name replaces the camera, because test machines have no camera."""
    with sources._camera(str(clip), "mp4") as feed:
        assert (feed.fps, feed.total) == (FPS, None)
        read = list(feed.frames)
    assert len(read) == TOTAL and np.abs(np.stack(read).astype(int) - frames).mean() < 3
    (tmp_path / "note").write_text("no video")
    with (
        pytest.raises(ValueError, match="must be a camera that FFmpeg can read"),
        sources._camera(str(tmp_path / "note"), "mp4"),
    ):
        pass


def test_live_files_are_read_at_their_frame_rate(clip):
    with sources.opened(str(clip), live=True) as feed:
        assert feed.frames.gi_code.co_name == "paced" and feed.total == TOTAL


def test_late_frames_are_yielded_at_once():
    now, slept = [0.0], []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    for at, _ in enumerate(sources.paced(range(5), fps=10, clock=lambda: now[0], sleep=sleep)):
        now[0] += 0.25 if at == 1 else 0.01
    assert slept == pytest.approx([0.09, 0.03])  # of frames 1 and 4; 2 and 3 were due while 1 was looked at


def result(joint: torch.Tensor | None, temporal: float) -> FrameResult:
    frame = np.full((24, 24, 3), 100, np.uint8)
    windows = 0 if joint is None else 1
    probabilities = None if joint is None else torch.ones(1)
    return FrameResult(0, frame, windows, ["x"], probabilities, joint, temporal, (0, 0, 24, 24), 0.1, 3)


def test_the_color_scale_grows_and_never_falls():
    even = torch.full((24, 24), 1 / 576)
    peak = even.clone()
    peak[:12, :12] = 20 / 576
    painter, frame = Painter(), result(even, 1).frame
    first = painter(result(even, 1), frame)[:24]
    assert painter.scale == pytest.approx(LEAST / 576)
    painter(result(peak, 1), frame)
    assert painter.scale == pytest.approx(20 / 576)
    again = painter(result(even, 1), frame)[:24]
    assert painter.scale == pytest.approx(20 / 576)
    assert colorful(again).mean() < colorful(first).mean()
    nothing = painter(result(None, float("nan")), frame)
    assert (nothing[:24] == 50).all() and colorful(nothing[24:, 4:]).max() > 30  # the timeline goes on beside it


def test_the_writer_writes_a_complete_file_or_none(tmp_path):
    path = tmp_path / "a.mp4"

    def write_all(*sizes: tuple[int, int]) -> None:
        with video_writer(path, 5) as write:
            for size in sizes:
                write(np.zeros((*size, 3), np.uint8))

    with pytest.raises(ValueError, match=r"shape of the first frame, \(9, 9, 3\), got uint8 of shape \(8, 9, 3\)"):
        write_all((9, 9), (8, 9))
    with pytest.raises(ValueError, match="at least one frame must be written"):
        write_all()
    with pytest.raises(ValueError, match="fps must be positive and finite"), video_writer(path, 0):
        pass
    assert os.listdir(tmp_path) == []


def test_stream_on_a_real_clip(shared_videos, tmp_path):
    """100 frames with another aspect ratio than the model input."""
    out, path = tmp_path / "out.mp4", shared_videos / "v_ApplyEyeMakeup_g01_c01.avi"
    assert main(["stream", str(path), "--model", MODEL, "--stride", "16", "--limit", "40", "--out", str(out)]) == 0
    info, original = io.probe(out), io.probe(path)
    assert (info.num_frames, info.width) == (40, original.width)
    crop = VideoClassifier.from_pretrained(MODEL).crop_box(original.height, original.width)
    beside = colorful(io.read_video(out).frames[:, : original.height, : int(crop[1]) - 4])
    assert beside.max() < 25


def test_frames_without_an_explanation_are_dark_gray():
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:, :32], frame[:, 32:] = (200, 0, 0), (0, 0, 200)
    unexplained = FrameResult(0, frame, 0, ["a"], None, None, float("nan"), (0, 0, 48, 64), 0.0, 0)
    picture = Painter()(unexplained, frame)[:-STRIP]
    assert (picture[:, :32] == round(0.299 * 200 / 2)).all() and (picture[:, 32:] == round(0.114 * 200 / 2)).all()


def test_frames_of_a_camera_are_dropped_by_default(clip, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(streaming, "is_camera", lambda name: True)
    assert main(["stream", str(clip), "--model", MODEL, "--out", str(tmp_path / "out.mp4")]) == 0
    assert "policy drop" in capsys.readouterr().out
