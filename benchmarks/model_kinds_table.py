"""Run every method and metric on each kind of video model, and write the table in docs/results_models.md.

    pip download --no-deps torchvision timm peft accelerate psutil einops pytorchvideo fvcore iopath parameterized \
        yacs portalocker tabulate termcolor vit-pytorch timesformer-pytorch perceiver-pytorch -d wheels
    for wheel in wheels/*.whl; do unzip -q -o $wheel -d peers; done
    for source in wheels/*.tar.gz; do tar -xzf $source -C peers --strip-components 1; done
    python benchmarks/model_kinds_table.py --peers peers                  # a quarter of an hour on one core
    python benchmarks/model_kinds_table.py --peers peers --records found.jsonl   # continues an interrupted run
    python benchmarks/model_kinds_table.py --only SlowFast --columns GradCAM     # prints these cells only

The peers need not be installed. MODEL_KINDS_PEERS can name their folder as well. Rows whose package is missing are left
out, and the page says so. The program fails if a cell is a fault: a wrong number, or an error that is not this
library's.

The parts are in kinds/: networks.py, subjects.py and libraries.py have the models, each with the same model by hand;
checks.py has the calls of methods and what they should give.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from evidence import write_between
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results_models.md"
sys.path.append(str(ROOT / "tests" / "_helpers"))  # tiny models, slow formulas, the state of a model

STATE = "state unchanged"
PEERS = ("torchvision", "timm", "peft", "pytorchvideo", "vit-pytorch", "timesformer-pytorch", "perceiver-pytorch")
ROUNDING, HALF = 1e-3, 0.05  # largest differences that count as rounding, as shares of the largest magnitude
AFTER_EVAL = "after `clf.eval()`: Captum's own methods run a model in the mode in which it is"


@dataclass(frozen=True)
class Cell:
    """One result.

    Attributes:
        kind: name of the row.
        column: name of the column.
        label: ``"right"``, ``"error"``, ``"FAULT"``, or ``"–"`` for a row without this column.
        note: footnote: the first sentence of the error, or what to know about a right value.
        difference: largest difference from the reference, as a share of its largest magnitude.
        seconds: of the call and its reference.
    """

    kind: str
    column: str
    label: str
    note: str | None = None
    difference: float | None = None
    seconds: float = 0.0


def compare(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest magnitude; infinity if the tensors do not fit."""
    if found.shape != expected.shape or not bool(found.isfinite().all()) or not found.is_contiguous():
        return float("inf")
    top = expected.abs().max().double()
    if expected.numel() > 8 and bool(expected.double().std() < 0.01 * top):
        raise RuntimeError("the expected map is flat, and would agree with anything")
    return float((found.double() - expected.double()).abs().max() / top)


def error_of(error: Exception) -> tuple[str, str]:
    """Return the label of an error, and its class and first sentence."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = f"{os.sep}captum_staa{os.sep}" in frames[-1].filename
    clear = ours and isinstance(error, (ValueError, TypeError))
    sentence = re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(str(error).split()))[0]
    return ("error" if clear else "FAULT"), f"`{type(error).__name__}: {sentence.replace('`', '')}`"


def one(kind: str, subject: Any, column: str) -> tuple[Cell, list[str]]:
    """Return a cell, and what the call changed in the model."""
    from kinds.checks import CAPTUMS, COLUMNS, ROUNDED
    from tiny_models import changes, snapshot

    call, by_hand = COLUMNS[column]
    captums = column in CAPTUMS
    tolerance = HALF if subject.half and column in ROUNDED else ROUNDING
    start, note = time.perf_counter(), None
    before = snapshot(subject.clf)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:  # dropout in train mode draws random numbers in Captum's own methods
                with torch.random.fork_rng() if captums else nullcontext():
                    found = call(subject)
            finally:
                changed = changes(before, snapshot(subject.clf))
            expected = by_hand(subject)
            difference = compare(found, expected)
            if captums and difference > tolerance and subject.clf.training:
                with _eval(subject.clf):
                    difference, note = compare(call(subject), expected), AFTER_EVAL
    except Exception as error:
        label, note = error_of(error)
        if label == "FAULT":
            tqdm.write("".join(traceback.format_exception(error)[-4:]))
        return Cell(kind, column, label, note, None, time.perf_counter() - start), changed
    label = "right" if difference <= tolerance else "FAULT"
    if label == "FAULT":
        note = f"differs by {difference:.1e} of the largest magnitude"
    return Cell(kind, column, label, note, difference, time.perf_counter() - start), changed


@contextmanager
def _eval(module: torch.nn.Module) -> Any:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def row(kind: Any, columns: Sequence[str]) -> list[Cell]:
    """Return the cells of a row. Subjects are made once, so that a call that changes the model affects the next."""
    torch.manual_seed(0)
    subject = kind.make()
    with torch.no_grad():
        shown, hidden = (subject.reference(clip) for clip in (subject.clip, torch.zeros_like(subject.clip)))
    if float((shown - hidden).abs().max()) < 0.01 * float(shown.abs().max()):
        raise RuntimeError(f"the outputs of {kind.name} hardly depend on the clip: every map would be rounding errors")
    cells, changes = [], []
    for column in columns:
        cell, changed = one(kind.name, subject, column)
        cells.append(cell)
        if changed:
            changes.append(f"{column} changes {', '.join(changed[:3])}")
    cells.append(Cell(kind.name, STATE, "FAULT" if changes else "right", "; ".join(changes) or None))
    return cells


def table(cells: Sequence[Cell], columns: Sequence[str], left_out: dict[str, list[str]]) -> str:
    """Return the Markdown of the table, its footnotes and the rows that are left out."""
    numbers: dict[str, int] = {}
    by_place = {(cell.kind, cell.column): cell for cell in cells}
    everything = [*columns, STATE]
    always = [name for name in everything if all(c.label == "right" and not c.note for c in cells if c.column == name)]
    names = [name for name in everything if name not in always]
    lines = [f"| model | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for kind in dict.fromkeys(cell.kind for cell in cells):
        texts = []
        for column in names:
            cell = by_place[kind, column]
            number = "" if cell.note is None else f" [^{numbers.setdefault(cell.note, len(numbers) + 1)}]"
            texts.append(cell.label + number)
        lines.append(f"| {kind} | {' | '.join(texts)} |")
    known = [cell for cell in cells if cell.difference is not None]
    largest = {False: 0.0, True: 0.0}
    for cell in known:
        half = "bfloat16" in cell.kind
        largest[half] = max(largest[half], cell.difference or 0.0)
    counts = {label: sum(cell.label == label for cell in cells) for label in ("right", "error", "FAULT")}
    lines += [
        "",
        f"Right for every model: {', '.join(always)}.",
        "",
        f"{counts['right']} cells are right, {counts['error']} are errors, and {counts['FAULT']} are faults. The "
        f"largest difference of a right cell is {largest[False]:.0e}, and {largest[True]:.0e} in bfloat16.",
        "",
    ]
    if left_out:
        rows = "; ".join(f"{kind} (needs {', '.join(names)})" for kind, names in left_out.items())
        lines += [f"Rows that were left out because a package was not found: {rows}.", ""]
    versions = {name: version(name).split("+")[0] for name in ("captum", "torch", "transformers")}
    versions |= {name: found for name in PEERS if (found := _version(name))}
    lines += ["Made with " + ", ".join(f"{name} {number}" for name, number in versions.items()) + " by", ""]
    lines += ["```console", "python benchmarks/model_kinds_table.py --peers peers", "```", ""]
    lines += [
        f"[^{number}]: {note[0].upper()}{note[1:]}.".replace("..", ".") + "\n" for note, number in numbers.items()
    ]
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return version(name).split("+")[0]
    except ImportError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=os.environ.get("MODEL_KINDS_PEERS"), help="folder of packages")
    parser.add_argument("--records", type=Path, help="file of finished rows, which are not run again")
    parser.add_argument("--only", action="append", metavar="TEXT", help="print rows that contain this; may be repeated")
    parser.add_argument("--columns", action="append", metavar="TEXT", help="print these columns only; may be repeated")
    options = parser.parse_args()
    torch.set_num_threads(1)
    from kinds.subjects import missing, use_peers

    use_peers(options.peers and Path(options.peers))
    from kinds import libraries, subjects
    from kinds.checks import COLUMNS

    columns = [name for name in COLUMNS if not options.columns or any(text in name for text in options.columns)]
    kinds = [*subjects.KINDS, *libraries.KINDS]
    kinds = [kind for kind in kinds if not options.only or any(text in kind.name for text in options.only)]
    left_out = {kind.name: names for kind in kinds if (names := missing(kind))}
    kinds = [kind for kind in kinds if kind.name not in left_out]
    for name, needs in left_out.items():
        print(f"{name} | left out, needs {', '.join(needs)}", flush=True)
    whole = not (options.only or options.columns)
    cells: list[Cell] = []
    if options.records and options.records.exists():
        cells = [Cell(**json.loads(line)) for line in options.records.read_text("utf-8").splitlines()]
    done = {cell.kind for cell in cells}
    for kind in tqdm(kinds, desc="kinds"):
        if kind.name in done:
            continue
        found = row(kind, columns)
        cells += found
        if options.records:
            with options.records.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(cell)) + "\n" for cell in found)
        if not whole:
            for cell in found:
                difference = "" if cell.difference is None else f"{cell.difference:.1e}"
                print(" | ".join((cell.kind, cell.column, cell.label, difference, cell.note or "")), flush=True)
    order = [kind.name for kind in kinds]
    cells = sorted((cell for cell in cells if cell.kind in order), key=lambda cell: order.index(cell.kind))
    if whole:
        write_between(PAGE, "model_kinds_table", table(cells, columns, left_out))
    faults = [f"{cell.kind}, {cell.column}: {cell.note}" for cell in cells if cell.label == "FAULT"]
    sys.exit("\n".join(["faults:", *faults]) if faults else None)


if __name__ == "__main__":
    main()
