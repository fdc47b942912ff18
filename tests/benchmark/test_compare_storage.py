"""Storage of a comparison on disk: complete entries, from one run only."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient, NoiseTunnel, Saliency

import captum_staa
from captum_staa import GradCAM, SpatioTemporalPerturbation, VideoClassifier
from captum_staa.benchmark import MetricOptions, PlantedClips, compare
from captum_staa.benchmark.clip_runner import Plan
from captum_staa.benchmark.methods import made
from captum_staa.benchmark.records import ALL, Entry, Storage, versions
from captum_staa.benchmark.runner import _settings
from captum_staa.models.preprocessing import Preprocessing

ENTRY = Entry(
    3, "a.mp4", "STAA", {"auroc": 0.1 + 0.2, "saco": math.nan, "signal_to_noise": math.inf}, {"insertion": [0.0, 1 / 3]}
)


@pytest.fixture
def storage(tmp_path) -> Storage:
    storage = Storage(tmp_path / "run")
    storage.open({"seed": 0}, resume=False)
    return storage


def test_an_entry_is_read_as_written(storage):
    maps = np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1)  # not contiguous
    storage.write(ENTRY, {"maps": maps})
    found = storage.read(3, "a.mp4", "STAA")
    assert found is not None and repr(found) == repr(ENTRY)
    assert (storage.maps(3, "STAA")["maps"] == maps).all()
    storage.write(Entry(3, "a.mp4", "STAA", error="RuntimeError: ü"))
    assert [entry.error for entry in storage.of(3)] == ["RuntimeError: ü"]
    storage.write(Entry(11, "b.mp4", ALL))
    assert storage.clips() == [3, 11] and storage.maps(11, ALL) == {}
    hidden = [path.name for path in storage.folder.rglob(".*")]
    assert hidden == []


def test_similar_names_have_separate_entries(storage):
    names = ["A b", "a-b", "A(b)", "ä", "*", "x" * 300, "x" * 299, "../../up"]
    for name in names:
        storage.write(Entry(0, "clip", name))
    assert sorted(entry.method for entry in storage.of(0)) == sorted(names)
    assert len(list((storage.folder / "rows" / "0000000").iterdir())) == len(names)
    assert sorted(path.name for path in storage.folder.iterdir()) == ["rows", "settings.json"]


@pytest.mark.parametrize("what", ["half", "empty", "one digit", "no checksum", "another's", "binary", "of a list"])
def test_damaged_entries_count_as_missing(storage, what):
    storage.write(ENTRY)
    (path,) = (storage.folder / "rows").rglob("*.json")
    text = path.read_text()
    if what == "half":
        path.write_text(text[: len(text) // 2])
    elif what == "empty":
        path.write_text("")
    elif what == "one digit":
        assert "0.30000000000000004" in text
        path.write_text(text.replace("0.30000000000000004", "0.90000000000000004"))
    elif what == "no checksum":
        path.write_text(json.dumps({"entry": json.loads(text)["entry"]}))
    elif what == "another's":
        storage.write(Entry(3, "a.mp4", "Saliency", {"auroc": 1.0}))
        (other,) = (each for each in path.parent.iterdir() if each != path)
        shutil.copy(other, path)
    elif what == "binary":
        path.write_bytes(bytes(range(256)))
    else:
        path.write_text("[1]")
    assert storage.read(3, "a.mp4", "STAA") is None
    assert [entry.method for entry in storage.of(3)] == (["Saliency"] if what == "another's" else [])
    storage.write(ENTRY)
    assert storage.read(3, "a.mp4", "STAA") is not None
    assert storage.read(3, "b.mp4", "STAA") is None  # the clip of this number is another


def test_a_folder_holds_one_run_only(storage, tmp_path):
    with pytest.raises(FileExistsError, match="earlier comparison"):
        storage.open({"seed": 0}, resume=False)
    storage.open({"seed": 0}, resume=True)
    with pytest.raises(ValueError, match="seed: recorded 0, now 1") as error:
        storage.open({"seed": 1, "steps": 4}, resume=True)
    assert "steps: recorded None, now 4" in str(error.value)
    (storage.folder / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        storage.open({"seed": 0}, resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=r"thesis\.tex"):
            Storage(tmp_path / "mine").open({}, resume=resume)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="got the file"):
        Storage(tmp_path / "file").open({}, resume=True)
    Storage(tmp_path / "new" / "folder").open({"seed": 0}, resume=True)  # nothing to resume: a beginning
    assert (tmp_path / "new" / "folder" / "settings.json").is_file()


def test_temporary_files_of_a_killed_writer_are_removed(storage):
    storage.write(ENTRY)
    (path,) = (storage.folder / "rows").rglob("*.json")
    left = path.with_name(".staa.0123.json")
    left.write_text('{"check')
    assert len(list(storage.of(3))) == 1
    storage.open({"seed": 0}, resume=True)
    assert not left.exists() and path.exists()


def test_settings_contain_only_what_changes_numbers():
    def settings_of(*methods, **options):
        resnet = VideoClassifier.from_pretrained("tiny-resnet3d-pattern")
        classifier = VideoClassifier(resnet.module, "BCTHW", **options)
        given = [make(classifier) for make in methods or [Saliency]]
        return _settings(Plan(classifier, made(given, classifier, 8), {}, MetricOptions(steps=4), 8, 0), [])

    def differing(first, second):
        return {key for key in {*first, *second} if first.get(key) != second.get(key)}

    plain = settings_of()
    assert plain["versions"] == versions() and plain["versions"]["captum_staa"] == captum_staa.__version__
    assert {"torch", "captum", "numpy", "python"} <= plain["versions"].keys()
    first, second = (Preprocessing(resize=48, mean=(m, m, m), std=(0.5, 0.5, 0.5)) for m in (0.5, 0.4))
    assert differing(settings_of(preprocessing=first), settings_of(preprocessing=second)) == {"preprocessing"}
    assert differing(settings_of(preprocessing=first), settings_of(preprocessing=first)) == set()

    def grad_cam(layer, **options):
        return lambda classifier: GradCAM(classifier, layer, **options)

    def noisy(kind):
        return lambda classifier: NoiseTunnel(kind(classifier))

    early, late = "stages.0", "stages.1"
    pairs = [
        (grad_cam(early), grad_cam(late)),
        (grad_cam(early), grad_cam(early, weighting="gradcam")),
        (noisy(Saliency), noisy(InputXGradient)),
        (partial(SpatioTemporalPerturbation, preset="step"), SpatioTemporalPerturbation),
    ]
    for one, other in pairs:
        assert differing(settings_of(one), settings_of(other)) == {"methods"}
        assert differing(settings_of(one), settings_of(one)) == set()
    assert f"layer={early}" in settings_of(grad_cam(early))["methods"]["GradCAM"]
    assert " at 0x" not in str(settings_of(*(pair[0] for pair in pairs[1:])))  # of no other process


def test_resume_computes_missing_entries_only(tmp_path):
    clf = VideoClassifier.from_pretrained("tiny-resnet3d-pattern")
    calls: list[int] = []
    healthy = False
    planted = PlantedClips(seed=12, n=4)

    def counted(clip, target):
        calls.append(target)
        if torch.equal(clip[0].transpose(0, 1), planted[0][0]) and not healthy:
            raise RuntimeError("out of memory")
        return clip.mean(1)

    def run(folder, **options):
        given = {"counted": counted, "SmoothGrad": "SmoothGrad"}
        return compare(clf, planted, given, ["auroc"], out=tmp_path / folder, show_progress=False, **options)

    first = run("run")
    # three runs of each clip but of the first, where the three controls that are made of its map have failed as well
    assert len(calls) == 1 + 3 * 3 and len(first.failures) == 4
    with pytest.raises(FileExistsError):
        run("run")
    healthy = True
    calls.clear()
    whole = run("run", resume=True)
    assert len(calls) == 3 and not whole.failures  # what failed is tried again
    calls.clear()
    assert run("run", resume=True).rows == whole.rows and calls == []
    entries = sorted((tmp_path / "run" / "rows").rglob("*.json"))
    damaged = [path for path in entries if path.name.startswith(("smoothgrad", "other-class", "random-weights"))][:3]
    damaged[0].unlink()
    damaged[1].write_text(damaged[1].read_text()[:-20])
    damaged[2].write_text("")
    assert run("run", resume=True).rows == whole.rows
    assert sorted((tmp_path / "run" / "rows").rglob("*.json")) == entries
    fresh = run("fresh")
    assert fresh.rows == whole.rows
    with torch.no_grad():
        next(clf.parameters())[0] += 1e-3
    with pytest.raises(ValueError, match="weights: recorded"):
        run("run", resume=True)
