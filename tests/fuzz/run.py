"""Run many random calls, in this process or in workers that are monitored for hangs and crashes."""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from .attributions import ENTRIES as _ATTRIBUTIONS
from .brought import ENTRIES as _BROUGHT
from .calls import CLEAR, RIGHT, WRONG, Call, judge
from .outer import ENTRIES as _OUTER
from .scores import ENTRIES as _SCORES
from .tensors import ENTRIES as _TENSORS
from .transformers import ENTRIES as _TRANSFORMERS

ENTRIES: dict[str, Callable[[Any], Call]] = {
    **_ATTRIBUTIONS,
    **_TRANSFORMERS,
    **_TENSORS,
    **_SCORES,
    **_OUTER,
    **_BROUGHT,
}
# Calls that learn, or run a transformer several times, take about ten times as long as the others.
SHARES = dict.fromkeys(ENTRIES, 4) | {"compare": 1, "AttentionBranch": 2, "STAA": 2, "SpatioTemporalPerturbation": 2}
SHARES |= {"sanity and usage": 2, "video files": 2, "PlantedClips": 2, "visualization": 2}
SHARES |= {"models as they come": 2, "discovered transformers": 2, "AnswerAttribution": 2, "attribute_answer": 1}
BATCH = 50  # calls per hypothesis run: in longer runs, hypothesis repeats more examples
HANGS = 120  # seconds after which a call counts as a hang
# A forked worker has all imports; a spawned worker imports everything again.
CONTEXT: Any = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")


def drawn(entry: str, count: int, start: int, each: Callable[[Call], None]) -> None:
    """Pass ``count`` random calls of an entry point to a function. The seed determines the calls."""

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: Any) -> None:
        each(ENTRIES[entry](data.draw))

    run()


def work(entry: str, count: int, start: int, parent: Connection) -> None:
    """Run calls in a worker. It sends a message before and after each call, so that the parent knows a failed call."""
    torch.set_num_threads(1)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)

    def each(call: Call) -> None:
        parent.send(call.description)
        parent.send(judge(call))

    for part in range(0, count, BATCH):
        drawn(entry, min(BATCH, count - part), start + part, each)


def watched(entry: str, count: int, start: int) -> tuple[Counter[str], list[str]]:
    """Run and count the calls of an entry point in a separate process. A new process replaces one that died."""
    found: Counter[str] = Counter()
    complaints: list[str] = []
    while (left := count - sum(found.values())) > 0:
        here, there = CONTEXT.Pipe(duplex=False)
        worker = CONTEXT.Process(target=work, args=(entry, left, start, there), daemon=True)
        worker.start()
        there.close()
        description, ended = "", ""
        while not ended:
            if not here.poll(HANGS):
                os.kill(worker.pid, signal.SIGUSR1)  # prints the stack of the hang
                time.sleep(1)
                worker.kill()
                ended = f"a hang: nothing for {HANGS} s"
            else:
                try:
                    message = here.recv()
                except EOFError:
                    worker.join()
                    ended = f"the end of its process, {worker.exitcode}"
                    break
                if isinstance(message, str):
                    description = message
                    continue
                found[message[0]] += 1
                complaints += [message[1]] * (message[0] == WRONG)
        worker.join()
        if worker.exitcode != 0:
            found[WRONG] += 1
            complaints.append(f"{description}: {ended}")
        start += left  # new calls for the rest, also if hypothesis found no more new calls
    return found, complaints


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=ENTRIES, help="entry points; all of them by default")
    args = parser.parse_args()
    entries = args.only or list(ENTRIES)
    total, wrong = Counter[str](), 0
    print(f"| {'entry point':26} |  calls | right | clear errors | wrong | seconds |\n|---|---|---|---|---|---|")
    for entry in entries:
        count = -(-args.calls * SHARES[entry] // sum(SHARES[name] for name in entries))
        begin = time.monotonic()
        found, complaints = watched(entry, count, args.seed)
        numbers = f"{sum(found.values()):6} | {found[RIGHT]:5} | {found[CLEAR]:12} | {found[WRONG]:5}"
        print(f"| {entry:26} | {numbers} | {time.monotonic() - begin:7.0f} |", flush=True)
        for kind, (times, example) in _kinds(complaints).items():
            print(f"    {times} x {kind}\n        {example}", file=sys.stderr, flush=True)
        total += found
        wrong += found[WRONG]
    numbers = f"{sum(total.values()):6} | {total[RIGHT]:5} | {total[CLEAR]:12} | {total[WRONG]:5}"
    print(f"| {'all':26} | {numbers} | {'':7} |")
    return int(wrong > 0)


def _kinds(complaints: list[str]) -> dict[str, tuple[int, str]]:
    """Group complaints by kind, with their count and the first example."""
    kinds: dict[str, tuple[int, str]] = {}
    for why in complaints:
        kind = why.split("): ", 1)[-1].split(", and gave")[0][:90]
        kinds[kind] = (kinds.get(kind, (0, ""))[0] + 1, kinds.get(kind, (0, why[:700]))[1])
    return kinds
