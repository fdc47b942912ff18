"""Atomic writing: a file is either complete or absent, also after an error, Ctrl-C or a full disk."""

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
    """Yield a temporary path to write to. It is renamed to ``path`` if the block succeeds, and removed if it fails.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic(folder / "note.txt") as partial:
        ...     _ = partial.write_text("complete")
        >>> [path.name for path in folder.iterdir()], (folder / "note.txt").read_text()
        (['note.txt'], 'complete')

    Args:
        path: the file to write. Its folder must exist.
        overwrite: whether an existing file may be replaced.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is False.
        FileNotFoundError: the folder of ``path`` does not exist.
        OSError: the file cannot be written. The error names ``path``, not the temporary file.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} already exists. Pass overwrite=True to replace it, or choose another name.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder of {target} does not exist. Create it first.")
    partial = target.with_name(f".{target.stem[:64]}.{uuid.uuid4().hex}{target.suffix}")
    try:
        yield partial
        os.replace(partial, target)
    except OSError as error:
        # For a full disk Python names no file. For a missing permission it names the temporary file, which users do
        # not know. Both errors are raised again with the path that the caller passed.
        if error.errno is None or error.filename not in (None, str(partial)):
            raise
        raise OSError(
            error.errno, f"{error.strerror}. The file was not written, and no partial file is left", str(target)
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_files(folder: FilePath, names: Sequence[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to write several files to. They are moved to ``folder`` if the block succeeds.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "out"
        >>> with atomic_files(folder, ["a.txt", "b.txt"]) as partial:
        ...     for name in ("a.txt", "b.txt"):
        ...         _ = (partial / name).write_text(name)
        >>> sorted(path.name for path in folder.iterdir())
        ['a.txt', 'b.txt']

    Args:
        folder: the folder of the files. It is created if it is missing, and then removed again if the block fails.
        names: names of the files that the block may write.
        overwrite: whether existing files with these names may be replaced.

    Raises:
        FileExistsError: one of the files exists and ``overwrite`` is False.
        IsADirectoryError: one of the names is an existing folder.
        OSError: the folder cannot be created or written to. No file is moved if the block fails.
    """
    target = Path(folder)
    if not overwrite and (existing := [name for name in names if (target / name).exists()]):
        raise FileExistsError(
            f"{target} already contains {existing}. Pass overwrite=True to replace them, or choose another folder."
        )
    if existing := [name for name in names if (target / name).is_dir()]:
        raise IsADirectoryError(
            f"{existing} must be files, got folders of these names in {target}. Choose another folder."
        )
    created = [parent for parent in (target, *target.parents) if not parent.exists()]
    partial = target / f".{uuid.uuid4().hex}"
    try:
        partial.mkdir(parents=True)
        yield partial
        for name in names:
            if (partial / name).exists():
                os.replace(partial / name, target / name)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in created:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise
    shutil.rmtree(partial)


def save_tensors(
    save: Callable[..., None], tensors: dict[str, Any], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Save tensors with safetensors. The file gets the usual permissions, and disk errors are raised as OSError.

    Args:
        save: ``save_file`` of safetensors.torch or safetensors.numpy.
        tensors: contiguous tensors by name.
        path: the new file.
        metadata: metadata of the file.

    Raises:
        OSError: the file cannot be written.
    """
    path.touch()
    # The mode comes from the user's umask. safetensors alone would make the file readable for its owner only.
    mode = path.stat().st_mode
    try:
        save(tensors, path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(mode)
