"""Records of a comparison: entries, tidy rows, means, and the names that they share."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from captum_staa._utils.files import atomic, save_tensors

# Their versions are in the record of a run, because its numbers depend on them.
DEPENDENCIES = ("captum", "torch", "numpy", "transformers", "scikit-learn", "pillow", "av")
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
    return kind if kind in (RANDOM_WEIGHTS, OTHER_CLASS) else None


@dataclass(frozen=True)
class Entry:
    """Results of one method on one clip.

    Attributes:
        index: index of the clip.
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

    @property
    def complete(self) -> bool:
        """Whether nothing failed. The next run tries others again, because the cause may be fixed by then."""
        return not self.error and not self.reasons


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


SETTINGS, ENTRIES, SHEET, LOCK = "settings.json", "entries", "sheet.safetensors", ".lock"
DIGITS = 16  # of a checksum
HEAD, MIDDLE, TAIL = b'{"checksum":"', b'","entry":', b"}\n"
START = len(HEAD) + DIGITS + len(MIDDLE)  # where the entry begins in a line
LOCKED = (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)


# --- storage ----------------------------------------------------------------------------------------------------------


class Done:
    """Which entries are complete, by the index of the clip and the method; one int per clip.

    Example:
        >>> done = Done(["STAA", "random"])
        >>> done.add(7, "random")
        >>> (7, "random") in done, (7, "STAA") in done, (8, "random") in done
        (True, False, False)

    Args:
        methods: all methods; entries of others are ignored.
    """

    def __init__(self, methods: Sequence[str] = ()) -> None:
        self._bits = {method: 1 << at for at, method in enumerate(methods)}
        self._by_clip: dict[int, int] = {}

    def add(self, index: int, method: str) -> None:
        """Mark an entry as complete."""
        self._by_clip[index] = self._by_clip.get(index, 0) | self._bits.get(method, 0)

    def __contains__(self, key: tuple[int, str]) -> bool:
        return bool(self._by_clip.get(key[0], 0) & self._bits.get(key[1], 0))


class Storage:
    """The entries of a comparison in a folder. Every process appends to a separate file.

    Each line holds a checksum and an entry. A damaged or incomplete line counts as missing, and its entry is computed
    again. A line is never changed. If there are several complete entries of one clip and method, the first one counts.

    Example:
        >>> import tempfile
        >>> with Storage(Path(tempfile.mkdtemp()) / "run") as storage:
        ...     storage.open({"seed": 0}, resume=False)
        ...     storage.write(Entry(3, "a.mp4", "STAA", {"auroc": 0.9}))
        ...     [entry.values for entry in storage.entries()]
        [{'auroc': 0.9}]

    Args:
        folder: folder of the whole run.
        rank: number of this process.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder, self.rank = folder, rank
        self.done = Done()
        self._lock: int | None = None  # file descriptors
        self._file: int | None = None

    def __enter__(self) -> Storage:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def open(self, settings: dict[str, Any], *, resume: bool) -> None:
        """Start a run, or resume an earlier one, and keep other processes from starting one here until :meth:`close`.

        Args:
            settings: all settings that determine the numbers. The first run records them; later runs compare them.
            resume: whether an earlier run may be resumed. Without an earlier run, a new one starts.

        Raises:
            FileExistsError: the folder holds other files, or another process runs a comparison in it, or it holds an
                earlier run and ``resume`` is False.
            ValueError: the earlier run had other settings (the message lists the differences), or its settings cannot
                be read.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"out must be a folder, got the file {self.folder}. Choose another name.")
        existing = [path.name for path in self.folder.glob("*") if not path.name.startswith(".")]
        if existing and not (self.folder / SETTINGS).is_file():
            raise FileExistsError(
                f"out must be a new or empty folder, or hold an earlier comparison, got {self.folder} with "
                f"{existing[:3]}. Choose another folder."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = self._locked(self.folder / LOCK)
            os.ftruncate(self._lock, 0)
            os.write(self._lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            self._check_settings(settings, resume)
        except BaseException:  # also after Ctrl-C: the lock must not remain
            self.close()
            raise
        for temporary in self.folder.glob(".*.*"):  # from a process that was killed while it wrote
            temporary.unlink()

    def claim(self) -> None:
        """Open the file of this process.

        Raises:
            FileExistsError: another process writes to it.
        """
        if self._file is not None:
            return
        folder = self.folder / ENTRIES
        folder.mkdir(exist_ok=True)
        self._file = self._locked(self._path)
        size = os.lseek(self._file, 0, os.SEEK_END)
        with self._path.open("rb") as file:
            file.seek(max(size - 1, 0))
            if file.read(1) not in (b"", b"\n"):  # a killed process left an incomplete line
                os.write(self._file, b"\n")

    def release(self) -> None:
        """Write everything to the disk, and close the file of this process."""
        if self._file is not None:
            os.fsync(self._file)  # on a network disk, other machines see it from now on
            os.close(self._file)
            self._file = None

    def close(self) -> None:
        """Release the file of this process and the folder."""
        self.release()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write(self, entry: Entry, maps: dict[str, np.ndarray[Any, Any]] | None = None) -> None:
        """Append an entry. Its maps for figures are stored first, so a complete entry has its maps.

        Raises:
            OSError: the disk is full, or the file cannot be written. No part of the entry is left.
        """
        self.claim()
        if maps is not None:
            # for an array that is not contiguous, safetensors would write its memory in the wrong order
            more = {_key(entry.index, entry.method, k): np.ascontiguousarray(array) for k, array in maps.items()}
            with atomic(self.folder / SHEET, overwrite=True) as partial:
                save_tensors(save_file, self._sheet() | more, partial)
        values = {name: value if np.isfinite(value) else str(value) for name, value in entry.values.items()}
        content = json.dumps({**vars(entry), "values": values}, ensure_ascii=False, allow_nan=False).encode()
        self._append(HEAD + _checksum(content) + MIDDLE + content + TAIL)

    def entries(self) -> Iterator[Entry]:
        """Yield all undamaged entries of all processes, in one pass over their files."""
        for path in sorted((self.folder / ENTRIES).glob("*.jsonl")):
            with path.open("rb") as file:
                for line in file:
                    if (entry := _entry(line)) is not None:
                        yield entry

    def read_done(self, methods: Sequence[str], name_of: Callable[[int], str]) -> Done:
        """Return which entries are complete.

        Args:
            methods: all methods.
            name_of: returns the name of the clip of an index. Entries of another clip are ignored.
        """
        done = Done(methods)
        for entry in self.entries():
            if entry.complete and entry.clip == name_of(entry.index):
                done.add(entry.index, entry.method)
        return done

    def maps(self, index: int, method: str) -> dict[str, np.ndarray[Any, Any]]:
        """Return the arrays that were stored with an entry for figures; empty if there are none."""
        start = _key(index, method, "")
        return {name.removeprefix(start): array for name, array in self._sheet().items() if name.startswith(start)}

    @property
    def _path(self) -> Path:
        return self.folder / ENTRIES / f"{self.rank:05d}.jsonl"

    def _sheet(self) -> dict[str, np.ndarray[Any, Any]]:
        try:
            return load_file(self.folder / SHEET)
        except (FileNotFoundError, SafetensorError):  # pictures only; without them there is no contact sheet
            return {}

    def _append(self, line: bytes) -> None:
        assert self._file is not None
        start, rest = os.lseek(self._file, 0, os.SEEK_END), memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except BaseException as error:  # also after Ctrl-C: half a line must not remain
            os.ftruncate(self._file, start)
            if not isinstance(error, OSError):
                raise
            raise OSError(
                error.errno,
                f"{error.strerror}. The results before this one are complete; free space on the disk and resume",
                str(self._path),
            ) from error

    def _check_settings(self, settings: dict[str, Any], resume: bool) -> None:
        """Record the settings of a new run, or raise unless an earlier run may be resumed with them."""
        path = self.folder / SETTINGS
        text = json.dumps(settings, indent=1, sort_keys=True, ensure_ascii=False)
        if not path.is_file():
            with atomic(path) as partial:
                partial.write_text(text + "\n", encoding="utf-8")
            return
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

    def _locked(self, path: Path) -> int:
        """Open a file for appending and lock it. The lock ends with this process, however it ends."""
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        try:
            _lock(file)
        except OSError as error:
            if error.errno in LOCKED:
                os.close(file)
                try:
                    user = (self.folder / LOCK).read_text(encoding="utf-8").strip()
                except OSError:  # Windows does not let others read a locked file
                    user = ""
                raise FileExistsError(
                    f"out must be a folder that no other run uses, got {self.folder}, in which "
                    f"{user or 'another process'} runs a comparison. Wait until it ends, end it, or choose another "
                    f"folder."
                ) from None
            warnings.warn(
                f"{path} cannot be locked ({error.strerror}), so a second start in {self.folder} would not be noticed. "
                f"Start one comparison per folder.",
                stacklevel=2,
            )
        return file


def _lock(file: int) -> None:
    """Lock a file until it is closed; raise OSError if another process has locked it."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _key(index: int, method: str, name: str) -> str:
    return f"{index}/{method}/{name}"


def _entry(line: bytes) -> Entry | None:
    """Return the entry of a line; None if the line is damaged or incomplete."""
    content = line[START : -len(TAIL)]
    if line != HEAD + _checksum(content) + MIDDLE + content + TAIL:
        return None
    try:
        fields = json.loads(content)
        return Entry(**{**fields, "values": {name: float(value) for name, value in fields["values"].items()}})
    except (ValueError, TypeError, KeyError):  # a complete line of something else
        return None


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:DIGITS].encode()
