"""A process of ``python -m captum_staa compare`` that kills itself once with SIGKILL; a test runs it under torchrun.

KILL_RANK and KILL_AFTER say which, and after how many entries it has written; only before the first restart.
"""

from __future__ import annotations

import os
import signal
import sys

from captum_staa.__main__ import main
from captum_staa.benchmark.records import Storage


def die_after(entries: int) -> None:
    """Kill this process after it has written a number of entries."""
    write, written = Storage.write, []

    def write_and_die(self, *entry):
        write(self, *entry)
        written.append(entry)
        if len(written) == entries:
            os.kill(os.getpid(), signal.SIGKILL)

    Storage.write = write_and_die


if __name__ == "__main__":
    if os.environ["RANK"] == os.environ.get("KILL_RANK") and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        die_after(int(os.environ["KILL_AFTER"]))
    sys.exit(main())
