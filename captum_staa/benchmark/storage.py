"""What a comparison has found so far, on disk: one small file per clip and method, each whole or not at all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from captum_staa._utils.files import atomic, save_tensors

PRESETS, ROWS = "settings.json", "rows"
WHOLE = "*"  # the method of an entry that is about a clip as a whole


@dataclass(frozen=True)
class Entry:
    """What came out for one clip and one method.

    Attributes:
        index: the clip's number, which names its folder.
        clip: its name.
        method: name, or ``"*"`` where the clip itself could not be had.
        values: by metric; nan and infinity are values, too.
        curves: what pictures need, such as the points of insertion.
        reasons: by metric, why it has no value.
        error: what went wrong with all of it; empty where nothing did.
        left_out: why the method says nothing of this clip, which is no failure; empty where it does.
    """

    index: int
    clip: str
    method: str
    values: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    error: str = ""
    left_out: str = ""


class Storage:
    """The entries in a folder.

    An entry is written under another name and renamed, so it is there or it is not, whenever a process is killed. Each
    carries a checksum over its content: what a broken disk, a full one or a curious editor has left counts as missing,
    and is done again.

    Example:
        >>> import tempfile
        >>> storage = Storage(Path(tempfile.mkdtemp()) / "run")
        >>> storage.open({"seed": 0}, resume=False)
        >>> storage.write(Entry(3, "a.mp4", "STAA", {"auroc": 0.9}))
        >>> storage.read(3, "a.mp4", "STAA").values, storage.read(4, "b.mp4", "STAA")
        ({'auroc': 0.9}, None)

    Args:
        folder: of the whole run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, settings: dict[str, Any], *, resume: bool) -> None:
        """Begin a run, or go on with one.

        Args:
            settings: whatever fixes the numbers; recorded by the first run, and compared by later ones.
            resume: whether an earlier run may be gone on with. Where there is none, one begins.

        Raises:
            FileExistsError: the folder holds something else, or an earlier run and ``resume`` is False.
            ValueError: the earlier run had other settings; the text names those that differ.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"results go into a folder, but {self.folder} is a file; choose another name")
        held = [path.name for path in self.folder.glob("*") if not path.name.startswith(".")]
        path = self.folder / PRESETS
        text = json.dumps(settings, indent=1, sort_keys=True, ensure_ascii=False)
        if not held:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic(path) as partial:
                partial.write_text(text + "\n", encoding="utf-8")
            return
        if not path.is_file():
            raise FileExistsError(f"{self.folder} holds {held[:3]}, but no comparison; choose an empty or a new folder")
        if not resume:
            raise FileExistsError(
                f"{self.folder} holds an earlier comparison; resume=True or --resume goes on with it, out= or --out "
                f"names another folder"
            )
        try:
            recorded = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read ({error}); nothing says what this run was: begin anew") from error
        asked = json.loads(text)
        if differing := sorted(key for key in {*recorded, *asked} if recorded.get(key) != asked.get(key)):
            said = "; ".join(f"{key}: recorded {recorded.get(key)}, now {asked.get(key)}" for key in differing)
            raise ValueError(
                f"{self.folder} holds a comparison with other settings, whose numbers would not go together. {said}. "
                f"Ask for the same, or choose another folder"
            )
        for left in (self.folder / ROWS).glob("*/.*"):  # by a process that was killed while it wrote
            left.unlink()

    def write(self, entry: Entry, maps: dict[str, np.ndarray[Any, Any]] | None = None) -> None:
        """Put an entry down, in place of an earlier one; maps of it, for pictures, come first."""
        path = self._path(entry.index, entry.method)
        path.parent.mkdir(parents=True, exist_ok=True)
        if maps is not None:
            with atomic(path.with_suffix(".safetensors"), overwrite=True) as partial:
                # of an array that is not contiguous, safetensors writes the memory and not the values
                save_tensors(save_file, {name: np.ascontiguousarray(array) for name, array in maps.items()}, partial)
        told = asdict(entry)
        told["values"] = {name: value if np.isfinite(value) else str(value) for name, value in entry.values.items()}
        content = json.dumps(told, ensure_ascii=False, allow_nan=False)
        line = json.dumps({"checksum": _checksum(content), "entry": content}, ensure_ascii=False)
        with atomic(path, overwrite=True) as partial:
            partial.write_text(line + "\n", encoding="utf-8")

    def read(self, index: int, clip: str, method: str) -> Entry | None:
        """The entry; None where there is none, or none that is whole and its own."""
        entry = _entry(self._path(index, method))
        return entry if entry is not None and (entry.index, entry.clip, entry.method) == (index, clip, method) else None

    def maps(self, index: int, method: str) -> dict[str, np.ndarray[Any, Any]]:
        """What was put down with an entry for pictures; empty where nothing was."""
        path = self._path(index, method).with_suffix(".safetensors")
        return load_file(path) if path.is_file() else {}

    def clips(self) -> list[int]:
        """The numbers of all clips of which anything is there, in order."""
        return sorted(int(path.name) for path in (self.folder / ROWS).glob("*") if path.name.isdecimal())

    def of(self, index: int) -> Iterator[Entry]:
        """All whole entries of a clip."""
        for path in sorted((self.folder / ROWS / f"{index:07d}").glob("[!.]*.json")):
            entry = _entry(path)
            if entry is not None and path == self._path(index, entry.method) and entry.index == index:
                yield entry

    def _path(self, index: int, method: str) -> Path:
        plain = re.sub(r"[^a-z0-9]+", "-", method.casefold()).strip("-")[:48]
        name = f"{plain}-{hashlib.sha256(method.encode()).hexdigest()[:8]}"  # of two that look alike, two files
        return self.folder / ROWS / f"{index:07d}" / f"{name.strip('-')}.json"


def _entry(path: Path) -> Entry | None:
    """What a file holds; None unless it is whole."""
    try:
        line = json.loads(path.read_text(encoding="utf-8"))
        content = line["entry"]
        if line["checksum"] != _checksum(content):
            return None
        told = json.loads(content)
        return Entry(**{**told, "values": {name: float(value) for name, value in told["values"].items()}})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _checksum(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()
