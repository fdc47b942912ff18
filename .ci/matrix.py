"""Run the tests with the lowest and the newest versions that the package allows, and write the table in README.md.

    python .ci/matrix.py                                     # all rows, one after the other; hours, and gigabytes
    python .ci/matrix.py --only lowest --args "-k grid"      # one row, some tests, and no table
    python .ci/matrix.py --write-only                        # the table again, from the rows at hand

Each row has an environment of its own under --work, which a second start uses again. A row whose interpreter is not on
this machine says so. The lowest versions are those that pyproject.toml names.
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
OF_THAT_TIME = ["pyparsing==3.1.4"]  # later ones warn of what the lowest matplotlib calls, and warnings are errors
BEGIN, END = "<!-- versions:begin -->", "<!-- versions:end -->"


@dataclass(frozen=True)
class Row:
    """One environment: its interpreter, and how its versions are chosen."""

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
    """``name==bound`` of every lower bound of the package and of the extras that the tests need."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    names = ("dependencies", "video", "supervoxels", "test")
    lists = [re.search(rf"^{name} = \[(.*?)\]", text, re.M | re.S) for name in names]
    bounds = [bound for found in lists if found for bound in re.findall(r'"([\w-]+)>=([\d.]+)"', found[1])]
    return [f"{name}=={version}" for name, version in bounds] + OF_THAT_TIME


def run(row: Row, work: Path, arguments: list[str]) -> dict[str, str]:
    """Build a row's environment, run the tests in it, and say what came out."""
    python = shutil.which(f"python{row.python}")
    if python is None:
        return {"result": f"python{row.python} is not on this machine"}
    folder = work / re.sub(r"\W+", "-", row.name)
    own = folder / "bin" / "python"
    if not own.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    install = [str(own), "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}[test,video,supervoxels]"]
    tested = ["--constraint", str(ROOT / "constraints.txt")]
    chosen = {"constraints": tested, "lowest": lowest(), "newest": ["--upgrade"]}
    built = subprocess.run([*install, *chosen[row.versions]], capture_output=True, text=True)
    if built.returncode:
        return {"result": "could not be installed: " + built.stderr.strip().splitlines()[-1]}
    began = time.monotonic()
    pytest = [str(own), "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(pytest, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    (folder / "log.txt").write_text(done.stdout, encoding="utf-8")
    said = done.stdout.strip().splitlines() or [f"pytest ended with {done.returncode} and said nothing"]
    last = said[-1].strip("= ")
    found = {name: version_of(own, name) for name in SHOWN}
    return {**found, "result": re.sub(r" in [\d.]+s.*", "", last), "minutes": f"{(time.monotonic() - began) / 60:.0f}"}


def read(results: Path) -> dict[str, dict[str, str]]:
    """What each row has come to, by its name."""
    return json.loads(results.read_text()) if results.exists() else {}


def version_of(python: Path, name: str) -> str:
    """Of an installed package, without what says how it was built."""
    script = f"from importlib.metadata import version; print(version({name!r}))"
    told = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout
    return told.split("+")[0].strip()


def table(found: dict[str, dict[str, str]]) -> str:
    """Markdown, a line for each row that has been run."""
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
    parser.add_argument("--args", default="", help="for pytest; the table is left alone then")
    parser.add_argument("--write-only", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results = options.work / "results.json"
    found = read(results)
    for row in () if options.write_only else ROWS:
        if options.only is None or row.name in options.only:
            print(f"{row.name}: Python {row.python}, versions: {row.versions}", flush=True)
            came = run(row, options.work, shlex.split(options.args))
            print("   ", came, flush=True)
            found = {**read(results), row.name: came}  # another row may have come meanwhile, from another process
            if not options.args:
                results.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    if not options.args:
        readme = ROOT / "README.md"
        text = readme.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        readme.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return int(any("failed" in own["result"] or "error" in own["result"] for own in found.values()))


if __name__ == "__main__":
    sys.exit(main())
