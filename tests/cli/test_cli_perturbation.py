"""Learned masks on the command line: files with the results of SpatioTemporalPerturbation, progress, and Ctrl-C."""

from __future__ import annotations

import dataclasses
import io as io_module
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import read
from covering import in_one_case
from perturbation_runs import CNN, PARTS, TRANSFORMER, by_hand, check_same, run, write_video

from captum_staa import SpatioTemporalPerturbation, VideoClassifier, io
from captum_staa.__main__ import main
from captum_staa.benchmark import PlantedClips, SceneOptions
from captum_staa.cli import demo, explain, output
from captum_staa.cli.explanation import Masks, Options, report
from captum_staa.cli.methods import copies_of
from captum_staa.perturbation import PRESETS, learning

METHOD = {
    "nested": "STEP (nested)",
    "step": "STEP",
    "3d-ep": "Extremal perturbation (3D)",
    "2d-ep": "Extremal perturbation (2D)",
}

pytest.importorskip("av")
pytestmark = pytest.mark.usefixtures("ctrl_c_reaches_python")


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "planted.mp4", PlantedClips(seed=demo.SEED, n=4))


@pytest.fixture(scope="module")
def long_video(tmp_path_factory) -> Path:
    clips = PlantedClips(seed=1, n=1, scene=SceneOptions(num_frames=44))
    return write_video(tmp_path_factory.mktemp("videos") / "long.mp4", clips)


def test_explain_writes_the_results_of_perturbation_for_a_3d_cnn(video, tmp_path, capsys):
    """The model lacks attention. The pictures are drawn as well."""
    assert run(video, tmp_path, "--iterations", "4") == 0
    parts, target = by_hand(video, CNN, iterations=4)
    result = check_same(tmp_path, parts, [0.05, 0.1, 0.15, 0.5])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(output.FILES)
    assert (result["target"]["index"], result["target"]["class_specific"]) == (target, True)
    assert result["method"] == "STEP (nested), iterations=4"
    settings = {name: result["perturbation"][name] for name in ("objective", "regularizer", "scale")}
    assert settings == {"objective": "dual", "regularizer": "none", "scale": "odds"}
    frames = [row["frame"] for row in result["key_frames"]]
    assert min(abs(a - b) for a in frames for b in frames if a != b) >= 2  # a cell of the mask

    said = capsys.readouterr().out
    assert result["method"] in said
    assert f"{parts.whole.item():.1%} for the whole clip" in said and "masks after 4 steps" in said
    rows = [line.split() for line in said.splitlines()]
    for at, area in enumerate(("0.05", "0.1", "0.15", "0.5")):
        (row,) = [row for row in rows if row[:1] == [area]]
        assert float(row[1]) == pytest.approx(parts.visible[0, at].item(), rel=1e-2)
        shown = [float(cell.removesuffix("%")) / 100 for cell in row[2:]]
        assert shown == pytest.approx([parts.kept[0, at].item(), parts.removed[0, at].item()], abs=2e-3)


@pytest.mark.parametrize(
    ("options", "preset", "given", "model"),
    [
        (["--areas", ".1,.4"], "step", {"areas": [0.1, 0.4]}, CNN),
        (["--regularizer", "tv"], "3d-ep", {"regularizer": "tv"}, CNN),
        (["--target", "BRIGHT-BOTTOM"], "2d-ep", {}, CNN),
        (["--objective", "delete", "--areas", ".2"], "nested", {"areas": [0.2], "objective": "delete"}, TRANSFORMER),
    ],
)
@pytest.mark.usefixtures("without_pictures")
def test_options_reach_the_method(video, tmp_path, options, preset, given, model):
    assert run(video, tmp_path, "--iterations", "3", *options, model=model, method=METHOD[preset]) == 0
    asked = VideoClassifier.from_pretrained(model).class_index("bright-bottom") if "--target" in options else None
    parts, target = by_hand(video, model, preset, asked, iterations=3, **given)
    own = PRESETS[preset]
    result = check_same(tmp_path, parts, given.get("areas", list(own.areas)))
    assert result["target"]["index"] == target and result["target"]["given"] == (asked is not None)
    settings = result["perturbation"]
    assert settings["iterations"] == 3
    assert settings["objective"] == given.get("objective", own.objective)
    assert settings["regularizer"] == given.get("regularizer", "ellipsoid" if preset == "step" else "none")
    assert settings["scale"] == own.scale
    passed = [f"{name}={given[name]!r}" for name in ("areas", "objective", "regularizer") if name in given]
    assert result["method"] == ", ".join([METHOD[preset], *passed, "iterations=3"])


@pytest.mark.usefixtures("without_pictures")
def test_preset_without_options_is_unchanged(video, tmp_path, monkeypatch):
    seen = []

    def attribute_maps(self, clip, **options):
        seen.append((self.preset, options))
        raise OSError("enough")

    monkeypatch.setattr(SpatioTemporalPerturbation, "attribute_maps", attribute_maps)
    assert run(video, tmp_path / "a") == 2
    assert run(video, tmp_path / "b", method="STEP") == 2
    assert [preset for preset, _ in seen] == [PRESETS["nested"], PRESETS["step"]]
    assert {options["perturbations_per_eval"] for _, options in seen} == {8}


def test_larger_clips_use_fewer_copies_per_forward_pass():
    assert [copies_of(16 * 3 * side**2) for side in (48, 64, 112, 224, 1024)] == [8, 8, 3, 1, 1]


def test_staa_writes_no_masks(video, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "draw", lambda *args, **options: None)
    assert main(["explain", str(video), "--model", TRANSFORMER, "--out", str(tmp_path)]) == 0
    tensors, described, result = read(tmp_path)
    assert "masks" not in tensors and "areas" not in described and result["perturbation"] is None


@in_one_case()
@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("STAA", ["--areas", ".1"], "--areas can only"),
        ("STAA", ["--objective", "dual"], "--objective can only"),
        ("STAA", ["--regularizer", "none"], "--regularizer can only"),
        ("STAA", ["--iterations", "1"], "--iterations can only"),
        ("RISE", ["--iterations", "1", "--areas", ".1"], "--areas, --iterations can only"),
        ("STEP", ["--layers", "-1"], "--layers can only"),
        ("STEP", ["--layers", "all"], "--layers can only"),
        ("STEP", ["--focus"], "--focus can only"),
    ],
)
def test_options_of_another_method_are_an_error(video, tmp_path, capsys, monkeypatch, method, options, message):
    monkeypatch.setattr(explain, "load", lambda *args: pytest.fail("must fail before loading a model"))
    arguments = ["explain", str(video), "--model", TRANSFORMER, "--method", method, "--out", str(tmp_path / "out")]
    assert main([*arguments, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and f"got --method {method!r}" in line
    assert f"be used with --method {chr(39)}{'STAA (Chefer)' if method == 'STEP' else 'STEP (nested)'}" in line
    assert not (tmp_path / "out").exists()


@in_one_case()
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--areas", "1"], "must be fractions of the clip volume in (0, 1), such as .1 or .05,.5, got '1'"),
        (["--areas", ".1,0"], "got '.1,0'"),
        (["--areas", ".1;.2"], "got '.1;.2'"),
        (["--areas", ""], "got ''"),
        (["--areas", "nan"], "got 'nan'"),
        (["--iterations", "0"], "at least 1, got '0'"),
        (["--objective", "keep"], "invalid choice"),
        (["--regularizer", "silk"], "invalid choice"),
    ],
)
def test_invalid_arguments_exit_with_code_2(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["explain", "a.mp4", "--model", CNN, "--method", "STEP", *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("without_pictures")
def test_windows_are_weighted_by_the_probability_of_the_class(long_video, tmp_path, capsys):
    options = ["--windows", "--stride", "14", "--iterations", "2", "--areas", ".1,.3"]
    assert run(long_video, tmp_path, *options) == 0
    tensors, _, result = read(tmp_path)

    clf = VideoClassifier.from_pretrained(CNN)
    pieces = list(io.iter_windows(long_video, 16, stride=14))
    clips = torch.cat([clf.preprocess(frames) for _, frames in pieces])
    answers = clf(clips).softmax(1).detach()
    target = int(answers.mean(0).argmax())
    method = SpatioTemporalPerturbation(clf)  # one by one: in a batch, each clip has a different shuffle
    each = [
        method.attribute_maps(clip[None], None, target, None, None, 8, areas=[0.1, 0.3], iterations=2) for clip in clips
    ]
    scores = {name: torch.cat([getattr(parts, name) for parts in each]) for name in PARTS}  # (3, 2)
    total, masks, count = torch.zeros(44, 48, 48), torch.zeros(2, 44, 48, 48), torch.zeros(44)
    for at, (start, _) in enumerate(pieces):
        total[start : start + 16] += answers[at, target] * each[at].joint[0]
        masks[:, start : start + 16] += each[at].masks[0]
        count[start : start + 16] += 1
    assert count.max() == 2 and answers[:, target].max() > 2 * answers[:, target].min()
    torch.testing.assert_close(tensors["attributions"], total / count[:, None, None], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(tensors["temporal"], tensors["attributions"].sum((1, 2)))
    torch.testing.assert_close(tensors["masks"], masks / count[:, None, None], rtol=1e-4, atol=1e-5)
    for name in PARTS:
        written = [[row[name] for row in window["perturbation"]["areas"]] for window in result["windows"]]
        torch.testing.assert_close(torch.tensor(written), scores[name])
        mean = [row[name] for row in result["perturbation"]["areas"]]
        assert mean == pytest.approx(scores[name].mean(0).tolist())
    assert result["perturbation"]["whole"] == pytest.approx(answers[:, target].mean().item(), rel=1e-3)
    assert f"on average over windows: {answers[:, target].mean():.1%} for the whole clip" in capsys.readouterr().out


@pytest.mark.usefixtures("without_pictures")
def test_report_warns_about_masks_that_have_not_reached_their_area(video, tmp_path, capsys):
    """The masks of the papers show the whole clip at first, and need hundreds of steps to shrink."""
    for preset, too_large in (("step", True), ("nested", False)):
        assert run(video, tmp_path, "--areas", ".1", "--iterations", "2", "--overwrite", method=METHOD[preset]) == 0
        assert ("have not reached the requested areas" in capsys.readouterr().out) == too_large
        (row,) = read(tmp_path)[2]["perturbation"]["areas"]
        assert (row["visible"] > 0.15) == too_large


def test_logit_scores_are_not_printed_as_probabilities(video, tmp_path):
    found = explain.explain(
        Options(video, CNN, tmp_path / "out", "STEP (nested)", method_options={"iterations": 1, "areas": [0.2]})
    )
    assert isinstance(found.masks, Masks)
    masks = dataclasses.replace(found.masks, scale="logit", whole=-3.25, kept=[12.5], removed=[-0.125])
    said = report(dataclasses.replace(found, masks=masks), 1)
    assert f"the output {found.subject}: -3.25 for the whole clip" in said
    (row,) = [line.split() for line in said.splitlines() if line.startswith(" ") and line.split()[0] == "0.2"]
    assert row[2:] == ["12.5", "-0.125"]


def test_memory_of_masks_is_checked_before_the_first_window(long_video, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(explain, "MOST", 2 * 4 * 44 * 48 * 48 * 3)  # a map and two masks
    monkeypatch.setattr(output, "draw", lambda *args, **options: None)
    options = ["--windows", "--iterations", "1", "--target", "0"]
    assert run(long_video, tmp_path / "three", *options, "--areas", ".1,.2,.3") == 2
    assert "got 44 frames of 48 x 48 pixels" in capsys.readouterr().err
    assert run(long_video, tmp_path / "two", *options, "--areas", ".1,.2") == 0


def interrupt_at(monkeypatch, step: int, clip: int = 0) -> None:
    """Send one real Ctrl-C during this optimization step of this clip."""
    original, seen = learning._slope, []

    def interrupted(problem, drawn, number, baseline_scores):
        if problem.config.objective == "dual" and number == step:  # the warm start has "preserve"
            seen.append(number)
            if len(seen) == clip + 1:
                signal.raise_signal(signal.SIGINT)
        return original(problem, drawn, number, baseline_scores)

    monkeypatch.setattr(learning, "_slope", interrupted)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.filterwarnings("always:interrupted at step")
def test_ctrl_c_keeps_the_best_masks_so_far(video, tmp_path, capsys, monkeypatch):
    interrupt_at(monkeypatch, 12)
    assert run(video, tmp_path, "--areas", ".1") == 130
    said = capsys.readouterr().err
    assert "captum_staa: warning: interrupted at step 12 of 14. The best masks so far are returned" in said
    assert "interrupted: the masks are the best of 10 steps out of 14" in said and "Traceback" not in said
    interrupt_at(monkeypatch, 12)
    with pytest.warns(UserWarning, match="interrupted at step 12"):
        parts, _ = by_hand(video, CNN, areas=[0.1])
    result = check_same(tmp_path, parts, [0.1])
    assert result["interrupted"] == "the masks are the best of 10 steps out of 14"
    assert result["perturbation"]["steps"] == 10


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.filterwarnings("always:interrupted at step")
def test_ctrl_c_in_a_later_window_keeps_the_finished_windows(long_video, tmp_path, capsys, monkeypatch):
    interrupt_at(monkeypatch, 1, clip=1)  # in the second window
    options = ["--windows", "--stride", "14", "--iterations", "3", "--areas", ".2", "--target", "0"]
    assert run(long_video, tmp_path, *options) == 130
    tensors, _, result = read(tmp_path)
    expected = "2 of 3 windows are done and kept, the others are missing; in the last of them, the masks are the best"
    assert result["interrupted"] == f"{expected} of 0 steps out of 3"
    assert [row["start"] for row in result["windows"]] == [0, 14]
    assert [row["perturbation"]["steps"] for row in result["windows"]] == [3, 0]
    assert result["perturbation"]["steps"] == 3
    assert len(tensors["masks"][0]) == len(result["frame_indices"]) == 30
    assert "2 of 3 windows" in capsys.readouterr().err


def test_ctrl_c_before_the_first_masks_writes_no_files(video, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(learning, "_evaluate", lambda *args: signal.raise_signal(signal.SIGINT))
    assert run(video, tmp_path / "out", "--iterations", "2") == 130
    assert "no partial files are left" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Terminal(io_module.StringIO):
    """Records the text, and claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("without_pictures")
def test_progress_bar_shows_the_kept_score(video, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run(video, tmp_path, "--iterations", "2") == 0
    kept = np.mean([row["kept"] for row in read(tmp_path)[2]["perturbation"]["areas"]])
    drawn = terminal.getvalue().split("\r")[-1]
    assert "STEP (nested)" in drawn and f"kept {kept:.3f}" in drawn and "100%" in drawn
    assert drawn.count("\n") == 1 and drawn.endswith("\n")  # the bar ends with a newline


@pytest.mark.usefixtures("without_pictures")
def test_progress_bars_of_windows_are_cleared(long_video, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run(long_video, tmp_path, "--windows", "--iterations", "2", "--areas", ".2", "--target", "0") == 0
    drawn = terminal.getvalue()
    assert drawn.count("STEP (nested)") >= 3 and not drawn.split("\r")[-2].strip()  # cleared
