"""Failed writing: a full disk, an invalid folder. The error names the requested file, and no partial file is left."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_files import noise, quartered
from safetensors.numpy import save_file

from captum_staa import io
from captum_staa.__main__ import main
from captum_staa._utils import files
from captum_staa.benchmark.records import Entry, Storage
from captum_staa.cli import output
from captum_staa.io import writing
from captum_staa.models import STABN
from captum_staa.models.resnet3d import ResNet3D

MODEL = "tiny-videomae-pattern"
Write = Callable[[Path], Any]


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """Limit the size of files, which simulates a disk that is full in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tensors(path: Path) -> None:
    with files.atomic(path) as partial:
        files.save_tensors(save_file, {"a": np.zeros(2000)}, partial)


def text(path: Path) -> None:
    with files.atomic(path) as partial:
        partial.write_text("x" * 20_000)


def clip(path: Path) -> None:
    io.write_video(path, noise(12), fps=10)


WRITERS: dict[str, Write] = {
    "tensors.safetensors": tensors,
    "note.txt": text,
    **dict.fromkeys(["clip.mp4", "clip.mkv", "clip.avi", "clip.webm"], clip),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_no_partial_file(tmp_path, name):
    """The disk is full at the beginning, in the middle, or one byte before the end. With one more byte, writing works.

    For videos the margin is 1000 bytes, because x264, which uses threads, sometimes produces another size.
    """
    whole = tmp_path / "whole" / name
    whole.parent.mkdir()
    WRITERS[name](whole)
    size = whole.stat().st_size
    slack = 1000 if name.startswith("clip") else 0
    assert size > 10_000
    path = tmp_path / "full" / name
    path.parent.mkdir()
    for limit in (0, 1, 4096, size // 2, size - 1 - slack):
        with (
            full_after(limit),
            pytest.raises(OSError, match=r"The file was not written, and no partial file is left") as caught,
        ):
            WRITERS[name](path)
        # FFmpeg reports no error if the disk is full when it closes a file
        assert caught.value.errno in (errno.EFBIG, errno.EIO) and caught.value.filename == str(path)
        assert os.listdir(path.parent) == [], limit
    with full_after(size + slack):
        WRITERS[name](path)
    assert abs(path.stat().st_size - size) <= slack and os.listdir(path.parent) == [name]


def test_a_full_disk_keeps_the_existing_file(tmp_path):
    path = io.write_video(tmp_path / "clip.mp4", quartered(3), fps=10)
    before = path.read_bytes()
    with full_after(4096), pytest.raises(OSError, match=r"clip\.mp4"):
        io.write_video(path, noise(12), fps=10, overwrite=True)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["clip.mp4"]


def test_a_full_disk_raises_the_error_of_the_system(tmp_path):
    """Writing to /dev/full always fails."""

    def fill() -> None:
        with files.atomic(tmp_path / "note.txt") as partial:
            partial.symlink_to("/dev/full")
            partial.write_text("x")

    with pytest.raises(OSError, match="No space left on device") as caught:
        fill()
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "note.txt")
    assert os.listdir(tmp_path) == []


def test_errors_about_other_files_are_not_changed(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, files.atomic(tmp_path / "note.txt") as partial:
        partial.write_text((tmp_path / "missing.txt").read_text())
    assert caught.value.filename == str(tmp_path / "missing.txt")
    assert os.listdir(tmp_path) == []


@pytest.fixture(params=["a file", "a system's own", "read-only"])
def unwritable(request: Any, tmp_path: Path) -> Iterator[Path]:
    """A path at which no folder can be created."""
    if request.param == "a file":
        (tmp_path / "out").write_text("precious")
        yield tmp_path / "out"
    elif request.param == "a system's own":
        yield Path("/proc/out")
    elif os.getuid() == 0:
        pytest.skip("root has permission to write everywhere")
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
        yield tmp_path / "locked" / "out"


@pytest.fixture(scope="module")
def video(tmp_path_factory: Any) -> Path:
    return io.write_video(tmp_path_factory.mktemp("video") / "clip.mp4", quartered(20, 64, 64), fps=10)


def test_explain_to_an_invalid_folder(video, unwritable, capsys):
    held = unwritable.read_text() if unwritable.is_file() else None
    assert main(["explain", str(video), "--model", MODEL, "--out", str(unwritable)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]  # slow machines show a progress bar before it
    assert said.startswith("captum_staa: ") and str(unwritable) in said
    assert (unwritable.read_text() if unwritable.is_file() else None) == held


@pytest.mark.parametrize("limit", [1000, 100_000])
def test_explain_on_a_full_disk(video, tmp_path, capsys, limit):
    """Writing fails at the first file, or at a picture. No file and no new folder is left."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").write_text("precious")
    for out in ("new/inner", "old"):
        with full_after(limit):
            assert main(["explain", str(video), "--model", MODEL, "--out", str(tmp_path / out)]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("captum_staa: ") and "File too large" in said
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["notes.txt", "old"]


def test_explain_replaces_all_files_or_none(video, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(output, "draw", lambda explanation, *paths, **options: [p.write_text("new") for p in paths])
    arguments = ["explain", str(video), "--model", MODEL, "--out", str(tmp_path), "--overwrite"]
    assert main(arguments) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == sorted(output.FILES)

    def fail(explanation: Any, *paths: Path, **options: Any) -> None:
        paths[0].write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "draw", fail)
    assert main([*arguments, "--target", "1"]) == 130
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    capsys.readouterr()


def test_storage_continues_after_a_full_disk(tmp_path):
    entry = Entry(3, "a.mp4", "STAA", {"auroc": 0.9}, curves={"points": [0.1] * 2000})
    with Storage(tmp_path / "run") as storage:
        storage.open({"seed": 0}, resume=False)
        for maps, limit in (({"map": np.zeros(4000)}, 2000), (None, 2000)):
            with full_after(limit), pytest.raises(OSError, match="File too large"):
                storage.write(entry, maps)
            assert list(storage.entries()) == [] and storage.maps(3, "STAA") == {}
            assert (tmp_path / "run" / "entries" / "00000.jsonl").stat().st_size == 0
        storage.write(entry, {"map": np.ones(4000)})
        assert list(storage.entries()) == [entry] and storage.maps(3, "STAA")["map"].sum() == 4000


@pytest.mark.parametrize("limit", [100, 1000, 20_000])
def test_save_pretrained_on_a_full_disk_leaves_no_files(tmp_path, limit):
    st_abn = STABN(4, ResNet3D(4, width=4, num_frames=4, image_size=12), body="light")
    with full_after(limit), pytest.raises(OSError, match=r"too large"):
        st_abn.save_pretrained(tmp_path / "model")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    st_abn.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "st_abn"
    own = st_abn.state_dict()
    assert all(
        torch.equal(value, own[name]) for name, value in STABN.from_pretrained(tmp_path / "model").state_dict().items()
    )


def test_a_folder_with_the_name_of_a_file_is_rejected(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "b.txt").mkdir()
    with (
        pytest.raises(IsADirectoryError, match=r"b\.txt"),
        files.atomic_files(tmp_path, ["a.txt", "b.txt"], overwrite=True),
    ):
        pytest.fail("the block must not run")
    assert (tmp_path / "a.txt").read_text() == "old" and sorted(os.listdir(tmp_path)) == ["a.txt", "b.txt"]


def test_a_file_with_fewer_frames_than_were_written_is_an_error(tmp_path):
    path = io.write_video(tmp_path / "clip.mp4", quartered(5), fps=10)
    writing._check_whole(path, 5)
    with pytest.raises(OSError, match="only 5 of 6 frames were written"):
        writing._check_whole(path, 6)
