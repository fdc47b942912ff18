"""Records of a comparison: entries and their storage in a folder, tidy rows, means, and the names that they share."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from captum_staa._utils.files import atomic, save_tensors

# Their versions are in the record of a run, because its numbers depend on them.
DEPENDENCIES = ("captum", "torch", "numpy", "transformers", "scikit-learn", "pillow", "av")
SETTINGS, ROWS = "settings.json", "rows"  # in the folder of a comparison
MODEL_FREE, INVERTED = "model-free", "inverted"
RANDOM_WEIGHTS, OTHER_CLASS = "random weights", "other class"  # these two run a method again
CONTROLS = ("random", "uniform", "center", MODEL_FREE, INVERTED, RANDOM_WEIGHTS, OTHER_CLASS)
# Values of Row.metric for rows that hold a reason instead of a number.
ERROR, LEFT_OUT, NOT_APPLICABLE = "error", "left out", "does not apply"
GRID = np.linspace(0, 1, 101)  # fractions of a clip to which all curves are interpolated
ALL = "*"  # the clip or the method of a record that holds for all, such as the entry of the clip itself


def control_of(name: str) -> str | None:
    """Return which of ``CONTROLS`` a name is; None for the name of a method.

    Example:
        >>> control_of("random"), control_of("STAA, random weights"), control_of("STAA")
        ('random', 'random weights', None)
    """
    if name in CONTROLS:
        return name
    kind = name.rpartition(", ")[2]
    return kind if kind != name and kind in (RANDOM_WEIGHTS, OTHER_CLASS) else None


@dataclass(frozen=True)
class Entry:
    """Results of one method on one clip.

    Attributes:
        index: index of the clip, which is also the name of its folder.
        clip: name of the clip.
        method: name of the method or control; ``"*"`` for the entry of the clip itself.
        values: numbers by metric, which may be nan or infinite.
        curves: data for figures, such as the points of the insertion curve.
        reasons: by metric, why its value is missing.
        error: why the whole entry failed; empty if it did not.
        left_out: why the method does not apply to this clip, which is not a failure; empty if it applies.
    """

    index: int
    clip: str
    method: str
    values: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    error: str = ""
    left_out: str = ""


class Row(NamedTuple):
    """One number, or one reason why a number is missing.

    Attributes:
        clip: name of the clip; ``"*"`` for all clips.
        method: name of the method or control; ``"*"`` for all.
        metric: name of the metric; or ``"error"``, ``"left out"``, ``"does not apply"``.
        value: the number; nan if the metric is undefined, and in rows that hold a reason.
        reason: why the number is missing; empty in rows that hold one.
    """

    clip: str
    method: str
    metric: str
    value: float
    reason: str = ""


class Mean(NamedTuple):
    """Mean over clips; for costs, the median over clips.

    Attributes:
        value: the mean or median; nan if no clip has a number.
        low: lower end of the 95 % interval, from a bootstrap over clips for means, from order statistics for medians.
        high: upper end of the 95 % interval.
        clips: number of clips that have a number.
    """

    value: float
    low: float
    high: float
    clips: int


class Sheet(NamedTuple):
    """Data of a contact sheet of one clip."""

    clip: str
    frames: NDArray[np.uint8]  # (T, H, W, 3)
    truth: NDArray[np.bool_] | None  # (T, H, W)
    maps: dict[str, NDArray[np.floating]]  # by method, (T, H, W)


class Storage:
    """The entries in a folder.

    An entry is first written under another name and then renamed, so a killed process leaves no partial entry. Each
    entry has a checksum of its content. A damaged or edited entry counts as missing and is computed again.

    Example:
        >>> import tempfile
        >>> storage = Storage(Path(tempfile.mkdtemp()) / "run")
        >>> storage.open({"seed": 0}, resume=False)
        >>> storage.write(Entry(3, "a.mp4", "STAA", {"auroc": 0.9}))
        >>> storage.read(3, "a.mp4", "STAA").values, storage.read(4, "b.mp4", "STAA")
        ({'auroc': 0.9}, None)

    Args:
        folder: folder of the whole run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, settings: dict[str, Any], *, resume: bool) -> None:
        """Start a run, or resume an earlier one.

        Args:
            settings: all settings that determine the numbers. The first run records them; later runs compare them.
            resume: whether an earlier run may be resumed. Without an earlier run, a new one starts.

        Raises:
            FileExistsError: the folder holds other files, or it holds an earlier run and ``resume`` is False.
            ValueError: the earlier run had other settings (the message lists the differences), or its settings cannot
                be read.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"out must be a folder, got the file {self.folder}. Choose another name.")
        existing = [path.name for path in self.folder.glob("*") if not path.name.startswith(".")]
        path = self.folder / SETTINGS
        text = json.dumps(settings, indent=1, sort_keys=True, ensure_ascii=False)
        if not existing:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic(path) as partial:
                partial.write_text(text + "\n", encoding="utf-8")
            return
        if not path.is_file():
            raise FileExistsError(
                f"out must be a new or empty folder, or hold an earlier comparison, got {self.folder} with "
                f"{existing[:3]}. Choose another folder."
            )
        if not resume:
            raise FileExistsError(
                f"out must be a new or empty folder, got {self.folder}, which holds an earlier comparison. Resume it "
                f"with resume=True or --resume, or choose another folder with out= or --out."
            )
        try:
            recorded = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path} must hold the settings of the earlier comparison, got a file that cannot be read: {error}. "
                f"Start a new comparison in another folder."
            ) from error
        current = json.loads(text)
        if differing := sorted(key for key in {*recorded, *current} if recorded.get(key) != current.get(key)):
            differences = "; ".join(f"{key}: recorded {recorded.get(key)}, now {current.get(key)}" for key in differing)
            raise ValueError(
                f"the settings must equal those of the earlier comparison in {self.folder}, whose numbers would not be "
                f"comparable otherwise, got other settings: {differences}. Use the same settings, or choose another "
                f"folder."
            )
        for temporary in (self.folder / ROWS).glob("*/.*"):  # from a process that was killed while it wrote
            temporary.unlink()

    def write(self, entry: Entry, maps: dict[str, np.ndarray[Any, Any]] | None = None) -> None:
        """Write an entry, and its maps for figures; this replaces an earlier entry."""
        path = self._path(entry.index, entry.method)
        path.parent.mkdir(parents=True, exist_ok=True)
        if maps is not None:
            with atomic(path.with_suffix(".safetensors"), overwrite=True) as partial:
                # for an array that is not contiguous, safetensors would write its memory in the wrong order
                save_tensors(save_file, {name: np.ascontiguousarray(array) for name, array in maps.items()}, partial)
        fields = asdict(entry)
        fields["values"] = {name: value if np.isfinite(value) else str(value) for name, value in entry.values.items()}
        content = json.dumps(fields, ensure_ascii=False, allow_nan=False)
        line = json.dumps({"checksum": _checksum(content), "entry": content}, ensure_ascii=False)
        with atomic(path, overwrite=True) as partial:
            partial.write_text(line + "\n", encoding="utf-8")

    def read(self, index: int, clip: str, method: str) -> Entry | None:
        """Return an entry; None if it is missing, damaged, or belongs to another clip or method."""
        entry = _entry(self._path(index, method))
        return entry if entry is not None and (entry.index, entry.clip, entry.method) == (index, clip, method) else None

    def maps(self, index: int, method: str) -> dict[str, np.ndarray[Any, Any]]:
        """Return the arrays that were stored with an entry for figures; empty if there are none."""
        path = self._path(index, method).with_suffix(".safetensors")
        return load_file(path) if path.is_file() else {}

    def clips(self) -> list[int]:
        """Return the indices of all clips with stored entries, in order."""
        return sorted(int(path.name) for path in (self.folder / ROWS).glob("*") if path.name.isdecimal())

    def of(self, index: int) -> Iterator[Entry]:
        """Yield all undamaged entries of a clip."""
        for path in sorted((self.folder / ROWS / f"{index:07d}").glob("[!.]*.json")):
            entry = _entry(path)
            if entry is not None and path == self._path(index, entry.method) and entry.index == index:
                yield entry

    def _path(self, index: int, method: str) -> Path:
        plain = re.sub(r"[^a-z0-9]+", "-", method.casefold()).strip("-")[:48]
        name = f"{plain}-{hashlib.sha256(method.encode()).hexdigest()[:8]}"  # similar names get different files
        return self.folder / ROWS / f"{index:07d}" / f"{name.strip('-')}.json"


def _entry(path: Path) -> Entry | None:
    """Return the entry in a file; None if it cannot be read or is damaged."""
    try:
        line = json.loads(path.read_text(encoding="utf-8"))
        content = line["entry"]
        if line["checksum"] != _checksum(content):
            return None
        fields = json.loads(content)
        return Entry(**{**fields, "values": {name: float(value) for name, value in fields["values"].items()}})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _checksum(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return the version of Python, of this library and of its installed dependencies, by name.

    Example:
        >>> import captum_staa
        >>> versions()["captum_staa"] == captum_staa.__version__
        True
    """
    installed = {"python": platform.python_version(), "captum_staa": sys.modules["captum_staa"].__version__}
    for name in DEPENDENCIES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed
