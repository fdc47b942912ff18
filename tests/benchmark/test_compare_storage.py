"""Storage of a comparison on disk: complete entries, from one run only."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient, NoiseTunnel, Saliency
from comparison_cases import entry_files
from covering import in_one_case

import captum_staa
import captum_staa.benchmark.records as storage_module
from captum_staa import GradCAM, SpatioTemporalPerturbation, VideoClassifier
from captum_staa.benchmark import MetricOptions, PlantedClips, compare
from captum_staa.benchmark.clip_runner import Plan
from captum_staa.benchmark.methods import made
from captum_staa.benchmark.records import ALL, Entry, Row, Storage, versions
from captum_staa.benchmark.runner import _settings
from captum_staa.benchmark.table import Table, TableBuilder
from captum_staa.models.preprocessing import Preprocessing

ENTRY = Entry(
    3, "a.mp4", "STAA", {"auroc": 0.1 + 0.2, "saco": math.nan, "signal_to_noise": math.inf}, {"insertion": [0.0, 1 / 3]}
)


@pytest.fixture
def storage(tmp_path) -> Iterator[Storage]:
    with Storage(tmp_path / "run") as storage:
        storage.open({"seed": 0}, resume=False)
        yield storage


def test_an_entry_is_read_as_written(storage):
    maps = np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1)  # not contiguous
    storage.write(ENTRY, {"maps": maps})
    storage.write(Entry(11, "b.mp4", ALL, error="RuntimeError: ü\n"))
    found = list(storage.entries())
    assert repr(found) == repr([ENTRY, Entry(11, "b.mp4", ALL, error="RuntimeError: ü\n")])
    assert (storage.maps(3, "STAA")["maps"] == maps).all() and storage.maps(11, ALL) == {}
    storage.write(ENTRY, {"maps": maps + 1})
    storage.write(replace(ENTRY, method="STAA, random weights"), {"maps": maps - 1})
    assert (storage.maps(3, "STAA")["maps"] == maps + 1).all()
    assert sorted(path.name for path in storage.folder.rglob("*") if path.is_file()) == [
        ".lock",
        "00000.jsonl",
        "settings.json",
        "sheet.safetensors",
    ]


def test_a_line_is_json_with_a_checksum_of_its_entry(storage):
    storage.write(ENTRY)
    (line,) = entry_files(storage.folder)[0].read_bytes().splitlines()
    fields = json.loads(line)
    content = line[line.index(b'"entry":') + len('"entry":') : -1]
    assert fields["checksum"] == hashlib.sha256(content).hexdigest()[:16]
    assert fields["entry"]["values"] == {"auroc": 0.1 + 0.2, "saco": "nan", "signal_to_noise": "inf"}


@in_one_case()
@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[: len(line) // 2],
        lambda line: line.replace(b"0.30000000000000004", b"0.90000000000000004"),
        lambda line: b'{"entry":' + json.dumps(json.loads(line)["entry"]).encode() + b"}",
        lambda line: bytes(range(256)),
        lambda line: b"[1]",
        lambda line: b"",
        lambda line: b"\0" * len(line),
        lambda line: line + b" ",
    ],
)
def test_a_damaged_line_counts_as_missing_and_hides_no_other(tmp_path, damage):
    folder = tmp_path / uuid.uuid4().hex
    with Storage(folder) as storage:
        storage.open({}, resume=False)
        for method in ("before", "STAA", "after"):
            storage.write(replace(ENTRY, method=method))
        (path,) = entry_files(folder)
        lines = path.read_bytes().splitlines()
        path.write_bytes(b"\n".join([lines[0], damage(lines[1]), lines[2], b""]))
        assert [entry.method for entry in storage.entries()] == ["before", "after"]
        storage.write(ENTRY)
        assert [entry.method for entry in storage.entries()] == ["before", "after", "STAA"]


def test_a_file_that_ends_at_any_byte_is_continued(storage):
    """Of a process that is killed while it appends, any number of bytes may be on the disk."""
    for index in range(3):
        storage.write(Entry(index, "a.mp4", "STAA", {"auroc": 0.5}))
    storage.release()
    (path,) = entry_files(storage.folder)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        storage.write(Entry(7, "b.mp4", "STAA"))
        complete = whole[: size + 1].count(b"\n") if whole[size : size + 1] == b"\n" else whole[:size].count(b"\n")
        assert [entry.index for entry in storage.entries()] == [*range(complete), 7], size
        storage.release()


def test_a_full_disk_leaves_no_part_of_an_entry(storage, monkeypatch):
    storage.write(ENTRY)
    before = entry_files(storage.folder)[0].read_bytes()
    real, calls = os.write, []

    def full(file: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data[: len(data) // 2])  # a disk writes a part before it is full

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"No space left on device.*free space on the disk and resume.*00000\.jsonl"):
        storage.write(replace(ENTRY, index=4))
    monkeypatch.undo()
    assert entry_files(storage.folder)[0].read_bytes() == before
    storage.write(replace(ENTRY, index=4))
    assert [entry.index for entry in storage.entries()] == [3, 4]


def test_done_are_complete_entries_of_the_same_clip(storage):
    storage.write(ENTRY)
    storage.write(replace(ENTRY, method="GradCAM", error="RuntimeError"))
    storage.write(replace(ENTRY, method="Saliency", reasons={"auroc": "ValueError"}))
    storage.write(replace(ENTRY, method="RISE", left_out="needs two classes"))
    names = ["STAA", "GradCAM", "Saliency", "RISE"]
    done = storage.read_done(names, lambda index: "a.mp4")
    assert [(3, name) in done for name in names] == [True, False, False, True]
    assert (4, "STAA") not in done and (3, ALL) not in done
    assert (3, "STAA") not in storage.read_done(names, lambda index: "b.mp4")


def test_a_folder_is_used_by_one_run_at_a_time(storage):
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=f"no other run uses.*process {os.getpid()} on .* runs a comparison"):
            Storage(storage.folder).open({"seed": 0}, resume=resume)
    storage.claim()
    with pytest.raises(FileExistsError, match="no other run uses"):  # left over from a start whose first process died
        Storage(storage.folder).claim()
    with Storage(storage.folder, rank=1) as other:
        other.claim()
    storage.close()
    with Storage(storage.folder) as other:
        other.open({"seed": 0}, resume=True)
        other.claim()


def test_a_disk_without_locks_warns(tmp_path, monkeypatch):
    def unable(file: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(storage_module, "_lock", unable)
    with Storage(tmp_path / "run") as storage:
        with pytest.warns(UserWarning, match="cannot be locked .Function not implemented."):
            storage.open({}, resume=False)
        with pytest.warns(UserWarning, match="one comparison per folder"):
            storage.write(ENTRY)
        assert len(list(storage.entries())) == 1


def test_a_table_does_not_depend_on_the_order_of_entries():
    entries = [
        Entry(index, f"{index}.mp4", method, {"auroc": index / 8, "memory": index + 1.0}, reasons=reasons)
        for index in (0, 1, 3)
        for method, reasons in (("A", {}), ("B", {"saco": "ValueError: flat"} if index == 1 else {}))
    ]
    entries.append(Entry(1, "1.mp4", ALL, {"target": 0.0}))
    failed = [Entry(3, "3.mp4", "A", error="RuntimeError: out of memory"), Entry(4, "4.mp4", ALL, error="no such file")]

    def table(given: list[Entry]) -> Table:
        builder = TableBuilder(["A", "B", "C"], ["auroc", "saco", "memory"], lambda index: f"{index}.mp4", count=2)
        for entry in given:
            builder.add(entry)
        builder.leave_out(1, "no truth")
        builder.keep_first("memory")
        return builder.table([Row(ALL, "C", "does not apply", math.nan, "no attention")])

    expected = [
        ("0.mp4", "A", "auroc", 0.0),
        ("0.mp4", "A", "memory", 1.0),
        ("0.mp4", "B", "auroc", 0.0),
        ("0.mp4", "B", "memory", 1.0),
        ("1.mp4", ALL, "left out", "no truth"),
        ("1.mp4", "A", "auroc", 0.125),
        ("1.mp4", "B", "error", "saco: ValueError: flat"),
        ("1.mp4", "B", "auroc", 0.125),
        ("3.mp4", "A", "auroc", 0.375),
        ("3.mp4", "B", "auroc", 0.375),
        ("4.mp4", ALL, "error", "no such file"),
        (ALL, "C", "does not apply", "no attention"),
    ]
    for given in (failed + entries, entries + failed, [*failed, *entries[::-1], *entries[:3]]):
        found = table(given)
        assert [(*row[:3], row.reason or row.value) for row in found] == expected
        assert len(found) == len(expected) and found[-3:] == list(found)[-3:] and found[5] == list(found)[5]
        assert found.clips == ["0.mp4", "1.mp4", "3.mp4", "4.mp4"] and len(found.reasons) == 4
        assert list(Table.of(found, found.methods, found.metrics)) == list(found)


def test_a_folder_holds_one_run_only(storage, tmp_path):
    storage.close()
    with pytest.raises(FileExistsError, match="earlier comparison"):
        storage.open({"seed": 0}, resume=False)
    storage.open({"seed": 0}, resume=True)
    storage.close()
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
    storage.close()
    left = storage.folder / ".sheet.0123.safetensors"
    left.write_bytes(b"half")
    storage.open({"seed": 0}, resume=True)
    assert not left.exists() and len(list(storage.entries())) == 1


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
        changed = differing(settings_of(one), settings_of(other))
        assert {"methods"} <= changed <= {"methods", "inverted"}  # the name of the first method, whose map is inverted
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
    (path,) = entry_files(tmp_path / "run")
    lines = path.read_bytes().splitlines(keepends=True)
    complete = [at for at, line in enumerate(lines) if not json.loads(line)["entry"]["error"]]
    lines[complete[3]] = lines[complete[3]][:-20]  # joins the next line, so both are lost
    del lines[complete[-1]]
    path.write_bytes(b"".join(lines))
    assert run("run", resume=True).rows == whole.rows
    fresh = run("fresh")
    assert fresh.rows == whole.rows
    with torch.no_grad():
        next(clf.parameters())[0] += 1e-3
    with pytest.raises(ValueError, match="weights: recorded"):
        run("run", resume=True)
