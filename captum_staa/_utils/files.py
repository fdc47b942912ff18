"""Files that appear whole or not at all, whatever ends the writing: an error, Ctrl-C, a full disk."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

FilePath = str | os.PathLike[str]


@contextmanager
def atomic(path: FilePath, overwrite: bool = False) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` if the block ends well, and is removed if it does not.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic(folder / "note.txt") as partial:
        ...     _ = partial.write_text("whole")
        >>> [path.name for path in folder.iterdir()], (folder / "note.txt").read_text()
        (['note.txt'], 'whole')

    Args:
        path: where to; its folder must be there.
        overwrite: whether an existing file may be replaced.

    Raises:
        FileExistsError, FileNotFoundError: the file exists and ``overwrite`` is False; the folder does not exist.
        OSError: it cannot be written, by the name that was asked for.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; pass overwrite=True to replace it, or choose another name")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder of {target} does not exist; create it first")
    partial = target.with_name(f".{target.stem[:64]}.{uuid.uuid4().hex}{target.suffix}")
    try:
        yield partial
        os.replace(partial, target)
    except OSError as error:
        # of a full disk Python names no file, and of a forbidden one the name that nobody knows
        if error.errno is None or error.filename not in (None, str(partial)):
            raise
        raise OSError(
            error.errno, f"{error.strerror}; it is not written, and nothing of it is left", str(target)
        ) from (error)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def together(folder: FilePath, names: Sequence[str], overwrite: bool = False) -> Iterator[Path]:
    """A folder to write several files to, which move to ``folder`` one after the other if the block ends well.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "out"
        >>> with together(folder, ["a.txt", "b.txt"]) as partial:
        ...     for name in ("a.txt", "b.txt"):
        ...         _ = (partial / name).write_text(name)
        >>> sorted(path.name for path in folder.iterdir())
        ['a.txt', 'b.txt']

    Args:
        folder: is created where it is missing, and removed again where the block fails.
        names: of the files that the block may write.
        overwrite: whether existing files of these names may be replaced.

    Raises:
        FileExistsError: a file is there and ``overwrite`` is False.
        OSError: the folder cannot be created or written to; where the block fails, no file is there.
    """
    target = Path(folder)
    if not overwrite and (held := [name for name in names if (target / name).exists()]):
        raise FileExistsError(f"{target} holds {held}; pass overwrite=True to replace them, or choose another folder")
    if held := [name for name in names if (target / name).is_dir()]:
        raise IsADirectoryError(f"{target} holds folders named {held}, which no file replaces; choose another folder")
    created = [place for place in (target, *target.parents) if not place.exists()]
    partial = target / f".{uuid.uuid4().hex}"
    try:
        partial.mkdir(parents=True)
        yield partial
        for name in names:
            if (partial / name).exists():
                os.replace(partial / name, target / name)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for place in created:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()
        raise
    shutil.rmtree(partial)


def save_tensors(
    save: Callable[..., None], tensors: dict[str, Any], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """``safetensors``' own ``save_file``, with the mode of any new file, and with errors of the disk as OSError.

    Args:
        save: ``save_file`` of safetensors.torch or safetensors.numpy.
        tensors: by name, contiguous.
        path: of a new file.
        metadata: of the file.

    Raises:
        OSError: the file cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode  # what the user's umask says; safetensors would leave the file to its owner alone
    try:
        save(tensors, path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(mode)
