"""Break the library on purpose, in one place at a time, and see which test notices.

    python tests/_helpers/breakages.py                          # all breakages; takes hours
    python tests/_helpers/breakages.py --mirror --jobs 2        # only the tests of the same package
    python tests/_helpers/breakages.py --only attention/ io/    # breakages of some files
    python tests/_helpers/breakages.py --root ../old            # code and tests of another checkout

Each breakage is one small edit, listed in breakages.txt, in a copy of the repository. The tests of the same package run
first, and the whole suite only if these pass. The results are stored after each run, in the file of ``--out``, and
finished breakages are not run again. A breakage whose text is missing from the file, or is there more than once, is
reported and must be written again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby, zip_longest
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "build")
CONTEXT = multiprocessing.get_context("fork")
LARGE = ("torch", "captum.attr", "transformers", "matplotlib.pyplot")  # imported once, for all runs
TOO_LONG = 124  # exit code
LIMIT = 1800  # seconds; a test that never ends has noticed the breakage
# The tests of a package, if they are not in the folder of the same name.
MIRRORS = {
    "attr": ["attr", "conformance"],
    "baselines.py": ["baselines"],
    "grid.py": ["_utils", "conformance/test_results.py"],
    "layout.py": ["_utils", "conformance/test_results.py"],
    "masking": ["attr", "conformance", "metrics"],
    "result.py": ["_utils", "conformance/test_interface.py", "visualization"],
    "_utils": ["_utils", "conformance"],
    "attention": ["attention", "attr", "conformance"],
    "perturbation": ["perturbation", "conformance"],
}


class Breakage(NamedTuple):
    """One edit of one file of the package.

    Attributes:
        file: path inside ``captum_staa``.
        old: text that is in the file once.
        new: text that replaces it.
        what: what is wrong then.
    """

    file: str
    old: str
    new: str
    what: str

    @property
    def name(self) -> str:
        """Key of the result."""
        return f"{self.file}: {self.what}"


def read(text: str) -> list[Breakage]:
    """Parse breakages.txt: headings with files; below each, what is wrong, the text, and the text that replaces it."""
    found, file = [], ""
    for block in text.split("\n\n"):
        lines = block.strip().split("\n")
        if lines[0].startswith("# "):
            file = lines[0][2:]
        else:
            what, old, new = lines
            found.append(Breakage(file, old.removeprefix("- "), new.removeprefix("+ "), what))
    return found


BREAKAGES = read(Path(__file__).with_suffix(".txt").read_text(encoding="utf-8"))


def mirror(file: str) -> tuple[list[str], list[str]]:
    """Return the tests of one file, which notice most breakages within seconds, and those of its package."""
    package = file.split("/")[0]
    named = sorted((ROOT / "tests").glob(f"*/test_{Path(file).stem}*.py"))
    folders = [f"tests/{name}" for name in MIRRORS.get(package, [package])]
    return [f"captum_staa/{file}", *(str(path.relative_to(ROOT)) for path in named)], folders


@contextmanager
def broken(copy: Path, breakage: Breakage) -> Iterator[str]:
    """Edit the file inside the block. Yields an empty string, or why it cannot be edited."""
    path = copy / "captum_staa" / breakage.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    count = text.count(breakage.old)
    if count != 1:
        yield "file not found" if not path.is_file() else f"text found {count} times"
        return
    path.write_text(text.replace(breakage.old, breakage.new), encoding="utf-8")
    try:
        yield ""
    finally:
        path.write_text(text, encoding="utf-8")


class _FirstFailure:
    """A pytest plugin that remembers the first test, or file, that failed."""

    name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._note(report)

    def pytest_collectreport(self, report: Any) -> None:
        self._note(report)

    def _note(self, report: Any) -> None:
        if report.failed:
            self.name = self.name or report.nodeid


def first_failure(copy: Path, tests: list[str], *, write_bytecode: bool = False) -> str:
    """Run tests in this process until one fails. Returns the name of this test, or an empty string.

    With ``write_bytecode``, the compiled files are kept for later runs. A broken file must not leave its own: it can
    have the size and, to the second, the time of the file that replaces it.
    """
    os.chdir(copy)
    sys.path[0] = str(copy)  # instead of the folder of this file
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = not write_bytecode
    with open(os.devnull, "w") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
    failure = _FirstFailure()
    signal.signal(signal.SIGALRM, lambda *_: os._exit(TOO_LONG))
    signal.alarm(LIMIT)
    imported = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins that LARGE imports
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *imported, *tests], plugins=[failure])
    signal.alarm(0)
    return failure.name or (f"pytest ended with {code}" if code else "")


def in_a_process(copy: Path, tests: list[str], **options: bool) -> str:
    """Run :func:`first_failure` in a fork of this process, which has imported the large packages already."""
    here, there = CONTEXT.Pipe(duplex=False)
    worker = CONTEXT.Process(target=lambda: there.send(first_failure(copy, tests, **options)))
    worker.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        worker.join()
        if worker.exitcode != TOO_LONG:
            raise RuntimeError(f"the process of the tests ended with {worker.exitcode}") from None
        return f"no end after {LIMIT} s"
    finally:
        worker.join()


def judge(copy: Path, breakage: Breakage, stages: Sequence[list[str]], *, whole_suite: bool) -> dict[str, str]:
    """Return the verdict of tests about one breakage, as an entry of the results. Stages are tests that run in turn."""
    with broken(copy, breakage) as missing:
        if missing:
            return {"verdict": "not applied", "by": missing}
        for tests in stages:
            present = [name for name in tests if (copy / name).exists()]
            if present and (by := in_a_process(copy, present)):
                return {"verdict": "caught", "by": by}
        if not whole_suite:
            return {"verdict": "survived the mirror", "by": ""}
        by = in_a_process(copy, [])
        return {"verdict": "caught" if by else "survived", "by": by}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout whose code and tests are used")
    parser.add_argument("--out", type=Path, default=Path("breakages.json"), help="file of the results")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names of breakages")
    parser.add_argument("--tests", nargs="*", help="tests that run first, instead of those of the same package")
    parser.add_argument("--mirror", action="store_true", help="do not run the whole suite")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    results: dict[str, dict[str, str]] = json.loads(options.out.read_text()) if options.out.exists() else {}
    open_ends = {"not applied"} | (set() if options.mirror else {"survived the mirror"})
    wanted = [item for item in BREAKAGES if any(part in item.name for part in options.only)]
    todo = [item for item in wanted if results.get(item.name, {"verdict": "not applied"})["verdict"] in open_ends]
    by_file = [list(group) for _, group in groupby(todo, key=lambda item: item.file)]
    todo = [item for turn in zip_longest(*by_file) for item in turn if item]  # the first of every file, then the second
    for name in LARGE:
        importlib.import_module(name)
    copies: Queue[Path] = Queue()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        for number in range(options.jobs):
            copy = Path(folder) / str(number) / "repository"
            shutil.copytree(options.root, copy, symlinks=True, ignore=LEFT_OUT)
            in_a_process(copy, ["--collect-only"], write_bytecode=True)
            copies.put(copy)

        def run(breakage: Breakage) -> None:
            copy = copies.get()
            try:
                results[breakage.name] = judge(
                    copy,
                    breakage,
                    [options.tests] if options.tests else mirror(breakage.file),
                    whole_suite=not options.mirror,
                )
            finally:
                copies.put(copy)
            options.out.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
            print(f"{breakage.name}: {' by '.join(filter(None, results[breakage.name].values()))}", flush=True)

        list(pool.map(run, todo))
    verdicts = [results[item.name]["verdict"] for item in wanted]
    for verdict in sorted(set(verdicts)):
        print(f"{verdicts.count(verdict)} {verdict}")
    return int(any(verdict != "caught" for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
