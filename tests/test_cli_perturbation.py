"""``--method perturbation`` on the command line: what it writes is what the library says, and Ctrl-C keeps the best."""

from __future__ import annotations

import dataclasses
import io as io_module
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tqdm.auto
from safetensors import safe_open

from captum_staa import SpatioTemporalPerturbation, VideoClassifier, io
from captum_staa.__main__ import main
from captum_staa.benchmark import PlantedClips
from captum_staa.cli import demo, explain, output, windows
from captum_staa.cli.explanation import Masks, Options, report
from captum_staa.cli.methods import copies_of
from captum_staa.perturbation import learning
from captum_staa.perturbation.settings import SETTINGS

av = pytest.importorskip("av")

CNN, TRANSFORMER = "tiny-resnet3d-pattern", "tiny-videomae-pattern"
PARTS = ("kept", "deleted", "visible")


def write_video(path: Path, clips: PlantedClips) -> Path:
    return io.write_video(path, demo.enlarged(clips.frames(0), 3), 8.0, crf=6)


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "planted.mp4", PlantedClips(seed=demo.SEED, n=4))


@pytest.fixture(scope="module")
def long_video(tmp_path_factory) -> Path:
    clips = PlantedClips(seed=1, n=1, num_frames=44)
    return write_video(tmp_path_factory.mktemp("videos") / "long.mp4", clips)


@pytest.fixture
def without_pictures(monkeypatch):
    """Numbers alone, where pictures are not what is tested; they take most of the time."""
    monkeypatch.setattr(output, "draw", lambda *args, **options: None)


@pytest.fixture(autouse=True)
def ctrl_c_reaches_python():
    """A shell starts its background jobs with Ctrl-C ignored, and programs they start inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(path: Path, out: Path, *options: str, model: str = CNN) -> int:
    return main(["explain", str(path), "--model", model, "--method", "perturbation", "--out", str(out), *options])


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str], dict]:
    with safe_open(folder / "attributions.safetensors", "pt") as file:
        tensors, described = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    return tensors, described, json.loads((folder / "result.json").read_text(encoding="utf-8"))


def by_hand(path: Path, model: str, setting: str = "nested", target: int | None = None, **options):
    """The library's own call, and the target."""
    clf = VideoClassifier.from_pretrained(model)
    clip = clf.preprocess(io.read_video(path, 16).frames)
    target = int(clf(clip).argmax()) if target is None else target
    method = SpatioTemporalPerturbation(clf, setting=setting)
    return method.attribute_parts(clip, target=target, perturbations_per_eval=8, **options), target


def check_same(folder: Path, parts, areas: list[float]) -> dict:
    """All numbers of all files are those of one clip's parts."""
    tensors, described, result = read(folder)
    for name, part in (("attributions", "joint"), ("temporal", "temporal"), ("spatial", "spatial"), ("masks", "masks")):
        torch.testing.assert_close(tensors[name], getattr(parts, part)[0])
    assert "masks ATHW" in described["axes"] and json.loads(described["areas"]) == areas
    learnt = result["perturbation"]
    assert [row["area"] for row in learnt["areas"]] == areas
    for name in PARTS:
        got = [row[name] for row in learnt["areas"]]
        assert got == pytest.approx(getattr(parts, name)[0].tolist(), rel=1e-3, abs=1e-5), name
    assert learnt["whole"] == pytest.approx(parts.whole.item(), rel=1e-4)
    assert learnt["steps"] == int(parts.history.steps[-1])
    return result


def test_the_files_say_what_the_library_says_of_a_3d_cnn(video, tmp_path, capsys):
    """Which has no attention; and pictures are drawn of it."""
    assert run(video, tmp_path, "--iterations", "4") == 0
    parts, target = by_hand(video, CNN, iterations=4)
    result = check_same(tmp_path, parts, [0.05, 0.1, 0.15, 0.5])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(output.FILES)
    assert (result["target"]["index"], result["target"]["class_specific"]) == (target, True)
    assert result["method"] == "SpatioTemporalPerturbation(setting='nested').attribute(iterations=4)"
    told = {name: result["perturbation"][name] for name in ("setting", "objective", "smoothness", "scale")}
    assert told == {"setting": "nested", "objective": "dual", "smoothness": "none", "scale": "odds"}
    frames = [row["frame"] for row in result["key_frames"]]
    assert min(abs(a - b) for a in frames for b in frames if a != b) >= 2  # a cell of the mask

    said = capsys.readouterr().out
    assert result["method"] in said
    assert f"{parts.whole.item():.1%} of the whole" in said and "masks after 4 steps" in said
    rows = [line.split() for line in said.splitlines()]
    for at, area in enumerate(("0.05", "0.1", "0.15", "0.5")):
        (row,) = [row for row in rows if row[:1] == [area]]
        assert float(row[1]) == pytest.approx(parts.visible[0, at].item(), rel=1e-2)
        shown = [float(cell.removesuffix("%")) / 100 for cell in row[2:]]
        assert shown == pytest.approx([parts.kept[0, at].item(), parts.deleted[0, at].item()], abs=2e-3)


@pytest.mark.parametrize(
    ("options", "setting", "given", "model"),
    [
        (["--setting", "step", "--areas", ".1,.4"], "step", {"areas": [0.1, 0.4]}, CNN),
        (["--setting", "3d-ep", "--smoothness", "tv"], "3d-ep", {"smoothness": "tv"}, CNN),
        (["--setting", "2d-ep", "--target", "VERTICAL"], "2d-ep", {}, CNN),
        (["--objective", "delete", "--areas", ".2"], "nested", {"areas": [0.2], "objective": "delete"}, TRANSFORMER),
    ],
)
@pytest.mark.usefixtures("without_pictures")
def test_options_reach_the_method(video, tmp_path, options, setting, given, model):
    assert run(video, tmp_path, "--iterations", "3", *options, model=model) == 0
    asked = VideoClassifier.from_pretrained(model).target("vertical") if "--target" in options else None
    parts, target = by_hand(video, model, setting, asked, iterations=3, **given)
    own = SETTINGS[setting]
    result = check_same(tmp_path, parts, given.get("areas", list(own.areas)))
    assert result["target"]["index"] == target and result["target"]["given"] == (asked is not None)
    told = result["perturbation"]
    assert (told["setting"], told["iterations"]) == (setting, 3)
    assert told["objective"] == given.get("objective", own.objective.aim)
    assert told["smoothness"] == given.get("smoothness", "ellipsoid" if setting == "step" else "none")
    assert told["scale"] == own.objective.scale
    call = ", ".join(f"{name}={given[name]!r}" for name in ("areas", "objective", "smoothness") if name in given)
    assert result["method"] == (
        f"SpatioTemporalPerturbation(setting={setting!r}).attribute({call}{', ' if call else ''}iterations=3)"
    )


@pytest.mark.usefixtures("without_pictures")
def test_without_options_it_is_the_setting_itself(video, tmp_path, monkeypatch):
    seen = []

    def attribute_parts(self, clip, **options):
        seen.append((self.setting, options))
        raise OSError("enough")

    monkeypatch.setattr(SpatioTemporalPerturbation, "attribute_parts", attribute_parts)
    assert run(video, tmp_path / "a") == 2
    assert run(video, tmp_path / "b", "--setting", "step") == 2
    assert [setting for setting, _ in seen] == [SETTINGS["nested"], SETTINGS["step"]]
    assert {options["perturbations_per_eval"] for _, options in seen} == {8}


def test_larger_clips_go_through_the_model_in_fewer_copies():
    copies = [copies_of(torch.empty(1, 16, 3, side, side, device="meta")) for side in (48, 64, 112, 224, 1024)]
    assert copies == [8, 8, 3, 1, 1]


def test_an_explanation_by_attention_has_no_masks(video, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "draw", lambda *args, **options: None)
    assert main(["explain", str(video), "--model", TRANSFORMER, "--out", str(tmp_path)]) == 0
    tensors, described, result = read(tmp_path)
    assert "masks" not in tensors and "areas" not in described and result["perturbation"] is None


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("staa", ["--setting", "step"], "of --method perturbation: --setting; but --method staa came; drop it"),
        ("staa", ["--areas", ".1"], "--areas; but --method staa"),
        ("staa", ["--objective", "dual"], "--objective; but --method staa"),
        ("staa", ["--smoothness", "none"], "--smoothness; but --method staa"),
        ("staa", ["--iterations", "1"], "--iterations; but --method staa"),
        ("staa", ["--iterations", "1", "--areas", ".1"], "--areas, --iterations; but --method staa came; drop them"),
        ("perturbation", ["--mode", "relevance"], "of --method staa: --mode; but --method perturbation came"),
        ("perturbation", ["--rule", "product"], "--rule; but --method perturbation"),
        ("perturbation", ["--layers", "-1"], "--layers; but --method perturbation"),
        ("perturbation", ["--layers", "all"], "--layers; but --method perturbation"),
        ("perturbation", ["--focus"], "--focus; but --method perturbation"),
    ],
)
def test_options_of_the_other_method_are_refused(video, tmp_path, capsys, monkeypatch, method, options, message):
    monkeypatch.setattr(explain, "load", lambda *args: pytest.fail("refuse before loading a model"))
    arguments = ["explain", str(video), "--model", TRANSFORMER, "--method", method, "--out", str(tmp_path / "out")]
    assert main([*arguments, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and f"pass --method {'staa' if method == 'perturbation' else 'perturbation'}" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--areas", "1"], "takes parts of the volume in (0, 1), such as .1 or .05,.5, but '1' came"),
        (["--areas", ".1,0"], "but '.1,0' came"),
        (["--areas", ".1;.2"], "but '.1;.2' came"),
        (["--areas", ""], "but '' came"),
        (["--areas", "nan"], "but 'nan' came"),
        (["--iterations", "0"], "at least 1, but '0' came"),
        (["--setting", "4d"], "invalid choice"),
        (["--objective", "keep"], "invalid choice"),
        (["--smoothness", "silk"], "invalid choice"),
    ],
)
def test_arguments_that_cannot_be_read(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["explain", "a.mp4", "--model", CNN, "--method", "perturbation", *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("without_pictures")
def test_windows_count_by_the_probability_of_the_class_in_them(long_video, tmp_path, capsys):
    options = ["--windows", "--stride", "14", "--iterations", "2", "--areas", ".1,.3"]
    assert run(long_video, tmp_path, *options) == 0
    tensors, _, result = read(tmp_path)

    clf = VideoClassifier.from_pretrained(CNN)
    pieces = list(io.iter_windows(long_video, 16, stride=14))
    clips = torch.cat([clf.preprocess(frames) for _, frames in pieces])
    answers = clf(clips).softmax(1).detach()
    target = int(answers.mean(0).argmax())
    method = SpatioTemporalPerturbation(clf)  # one by one: in a batch, each clip has a shuffle of its own
    each = [
        method.attribute_parts(clip[None], None, target, None, None, 8, areas=[0.1, 0.3], iterations=2)
        for clip in clips
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
        told = [[row[name] for row in window["perturbation"]["areas"]] for window in result["windows"]]
        torch.testing.assert_close(torch.tensor(told), scores[name])
        mean = [row[name] for row in result["perturbation"]["areas"]]
        assert mean == pytest.approx(scores[name].mean(0).tolist())
    assert result["perturbation"]["whole"] == pytest.approx(answers[:, target].mean().item(), rel=1e-3)
    assert f"on average over windows: {answers[:, target].mean():.1%} of the whole" in capsys.readouterr().out


def interrupt_at(monkeypatch, step: int, clip: int = 0) -> None:
    """A real Ctrl-C, once, while this step of learning is under way for this clip."""
    original, seen = learning._slope, []

    def interrupted(task, drawn, number, floors):
        if task.objective.aim == "dual" and number == step:  # and no hint, which preserves
            seen.append(number)
            if len(seen) == clip + 1:
                signal.raise_signal(signal.SIGINT)
        return original(task, drawn, number, floors)

    monkeypatch.setattr(learning, "_slope", interrupted)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.filterwarnings("always:interrupted at step")
def test_ctrl_c_keeps_the_best_masks_so_far(video, tmp_path, capsys, monkeypatch):
    interrupt_at(monkeypatch, 12)
    assert run(video, tmp_path, "--areas", ".1") == 130
    said = capsys.readouterr().err
    assert "captum_staa: warning: interrupted at step 12 of 60; the best masks so far are returned" in said
    assert "interrupted: the masks are the best of 10 steps, and 60 were asked" in said and "Traceback" not in said
    interrupt_at(monkeypatch, 12)
    with pytest.warns(UserWarning, match="interrupted at step 12"):
        parts, _ = by_hand(video, CNN, areas=[0.1])
    result = check_same(tmp_path, parts, [0.1])
    assert result["interrupted"] == "the masks are the best of 10 steps, and 60 were asked"
    assert result["perturbation"]["steps"] == 10


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.filterwarnings("always:interrupted at step")
def test_ctrl_c_in_a_later_window_keeps_all_until_then(long_video, tmp_path, capsys, monkeypatch):
    interrupt_at(monkeypatch, 1, clip=1)  # in the second window
    options = ["--windows", "--stride", "14", "--iterations", "3", "--areas", ".2", "--target", "0"]
    assert run(long_video, tmp_path, *options) == 130
    tensors, _, result = read(tmp_path)
    expected = "2 of 3 windows are done and kept, the others are missing; in the last of them, the masks are the best"
    assert result["interrupted"] == f"{expected} of 0 steps, and 3 were asked"
    assert [row["start"] for row in result["windows"]] == [0, 14]
    assert [row["perturbation"]["steps"] for row in result["windows"]] == [3, 0]
    assert result["perturbation"]["steps"] == 3
    assert len(tensors["masks"][0]) == len(result["frame_indices"]) == 30
    assert "2 of 3 windows" in capsys.readouterr().err


def test_ctrl_c_before_the_first_masks_leaves_nothing(video, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(learning, "_check", lambda *args: signal.raise_signal(signal.SIGINT))
    assert run(video, tmp_path / "out", "--iterations", "2") == 130
    assert "nothing is left half-written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Terminal(io_module.StringIO):
    """Keeps what is drawn."""

    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("slow", [False, True])
def test_the_bar_shows_what_is_kept_where_learning_takes_long_and_is_gone_afterwards(
    video, tmp_path, monkeypatch, slow
):
    """Time is the tests' own: each call of the model takes none, or a second and a half."""
    clock, terminal, original = [1000.0], Terminal(), learning._scores

    def scores(*args):
        clock[0] += 1.5 * slow
        return original(*args)

    monkeypatch.setattr(learning, "_scores", scores)
    monkeypatch.setattr(tqdm.std, "time", lambda: clock[0])
    monkeypatch.setattr(sys, "stderr", terminal)
    before = dict(vars(tqdm.auto.tqdm))
    assert run(video, tmp_path, "--iterations", "2") == 0
    assert dict(vars(tqdm.auto.tqdm)) == before
    drawn = terminal.getvalue()
    if not slow:
        assert "perturbation" not in drawn
        return
    kept = np.mean([row["kept"] for row in read(tmp_path)[2]["perturbation"]["areas"]])
    assert "Spatio-temporal perturbation" in drawn and f"kept {kept:.3f}" in drawn
    assert drawn.endswith("\r") and not drawn.split("\r")[-2].strip()  # wiped
    assert "\n" not in drawn  # one bar at a time


@pytest.mark.usefixtures("without_pictures")
def test_masks_that_are_not_of_the_area_asked_are_pointed_out(video, tmp_path, capsys):
    """The papers' masks begin with all shown, and need hundreds of steps to shrink."""
    for setting, too_large in (("step", True), ("nested", False)):
        assert run(video, tmp_path, "--setting", setting, "--areas", ".1", "--iterations", "2", "--overwrite") == 0
        assert ("not of the areas asked yet" in capsys.readouterr().out) == too_large
        (row,) = read(tmp_path)[2]["perturbation"]["areas"]
        assert (row["visible"] > 0.15) == too_large


def test_scores_of_a_model_with_one_output_are_not_printed_as_probabilities(video, tmp_path):
    found = explain.explain(
        Options(video=video, model=CNN, out=tmp_path / "out", method="perturbation", iterations=1, areas=[0.2])
    )
    assert isinstance(found.masks, Masks)
    masks = dataclasses.replace(found.masks, scale="logit", whole=-3.25, kept=[12.5], deleted=[-0.125])
    said = report(dataclasses.replace(found, masks=masks), 1)
    assert "the output checkerboard: -3.25 of the whole" in said
    (row,) = [line.split() for line in said.splitlines() if line.startswith(" ") and line.split()[0] == "0.2"]
    assert row[2:] == ["12.5", "-0.125"]


def test_memory_of_masks_is_counted_before_the_first_window(long_video, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(windows, "MOST", 2 * 4 * 44 * 48 * 48 * 3)  # a map and two masks
    monkeypatch.setattr(output, "draw", lambda *args, **options: None)
    options = ["--windows", "--iterations", "1", "--target", "0"]
    assert run(long_video, tmp_path / "three", *options, "--areas", ".1,.2,.3") == 2
    assert "frames of 48 x 48 pixels need" in capsys.readouterr().err
    assert run(long_video, tmp_path / "two", *options, "--areas", ".1,.2") == 0
