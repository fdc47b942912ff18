"""Run the tests with the lowest and the newest versions that the package allows, and write the table in README.md.

    python .ci/matrix.py                                     # all rows, one after the other; takes hours and gigabytes
    python .ci/matrix.py --only lowest --args "-k grid"      # one row, some tests, and no table
    python .ci/matrix.py --write-only                        # the table only, from the existing results

Each row has a separate environment under --work, which later runs use again. If an interpreter is missing, its row says
so. The lowest versions are the lower bounds in pyproject.toml.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("torch", "captum", "transformers", "numpy")
PINNED = ["pyparsing==3.1.4"]  # later versions warn about calls of the lowest matplotlib, and warnings are errors
BEGIN, END = "<!-- versions:begin -->", "<!-- versions:end -->"


@dataclass(frozen=True)
class Row:
    """One environment: its interpreter, and the choice of versions."""

    name: str
    python: str
    versions: str  # "constraints", "lowest" or "newest"


ROWS = (
    Row("tested", "3.11", "constraints"),
    Row("lowest", "3.10", "lowest"),
    Row("newest, 3.12", "3.12", "newest"),
    Row("newest, 3.13", "3.13", "newest"),
)


def lowest() -> list[str]:
    """Return ``name==bound`` for every lower bound of the package and of the extras that the tests need."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    names = ("dependencies", "video", "supervoxels", "test")
    lists = [re.search(rf"^{name} = \[(.*?)\]", text, re.M | re.S) for name in names]
    bounds = [bound for found in lists if found for bound in re.findall(r'"([\w-]+)>=([\d.]+)"', found[1])]
    return [f"{name}=={version}" for name, version in bounds] + PINNED


def run(row: Row, work: Path, arguments: list[str]) -> dict[str, str]:
    """Build the environment of a row, run the tests in it, and return the versions and the result."""
    python = shutil.which(f"python{row.python}")
    if python is None:
        return {"result": f"python{row.python} is not on this machine"}
    folder = work / re.sub(r"\W+", "-", row.name)
    interpreter = folder / "bin" / "python"
    if not interpreter.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    install = [str(interpreter), "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}[test,video,supervoxels]"]
    tested = ["--constraint", str(ROOT / "constraints.txt")]
    chosen = {"constraints": tested, "lowest": lowest(), "newest": ["--upgrade"]}
    built = subprocess.run([*install, *chosen[row.versions]], capture_output=True, text=True)
    if built.returncode:
        return {"result": "could not be installed: " + built.stderr.strip().splitlines()[-1]}
    began = time.monotonic()
    marked = ["-m", "not slow"]  # with the tests marked captum, which depend on its version
    pytest = [str(interpreter), "-m", "pytest", "-q", "-p", "no:cacheprovider", *marked, *arguments]
    done = subprocess.run(pytest, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    (folder / "log.txt").write_text(done.stdout, encoding="utf-8")
    lines = done.stdout.strip().splitlines() or [f"pytest ended with {done.returncode} and no output"]
    last = lines[-1].strip("= ")
    found = {name: version_of(interpreter, name) for name in SHOWN}
    return {**found, "result": re.sub(r" in [\d.]+s.*", "", last), "minutes": f"{(time.monotonic() - began) / 60:.0f}"}


def read(results: Path) -> dict[str, dict[str, str]]:
    """Return the result of each row, by its name."""
    return json.loads(results.read_text()) if results.exists() else {}


def version_of(python: Path, name: str) -> str:
    """Return the version of an installed package, without the build suffix."""
    script = f"from importlib.metadata import version; print(version({name!r}))"
    output = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout
    return output.split("+")[0].strip()


def table(found: dict[str, dict[str, str]]) -> str:
    """Return a Markdown table with one line for each finished row."""
    lines = [f"| | Python | {' | '.join(SHOWN)} | tests |", "|---" * (len(SHOWN) + 3) + "|"]
    for row in ROWS:
        if row.name in found:
            cells = [found[row.name].get(name, "") for name in SHOWN]
            lines.append(f"| {row.name} | {row.python} | {' | '.join(cells)} | {found[row.name]['result']} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[row.name for row in ROWS], action="append")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "matrix")
    parser.add_argument("--args", default="", help="arguments for pytest; the table is not written then")
    parser.add_argument("--write-only", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results = options.work / "results.json"
    found = read(results)
    for row in () if options.write_only else ROWS:
        if options.only is None or row.name in options.only:
            print(f"{row.name}: Python {row.python}, versions: {row.versions}", flush=True)
            result = run(row, options.work, shlex.split(options.args))
            print("   ", result, flush=True)
            found = {**read(results), row.name: result}  # another process may have finished another row
            if not options.args:
                results.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    if not options.args:
        readme = ROOT / "README.md"
        text = readme.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        readme.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return int(any("failed" in row["result"] or "error" in row["result"] for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
