"""A process of ``python -m captum_staa compare`` that ends itself by SIGKILL once: the test runs it under torchrun.

KILL_RANK and KILL_AFTER say which, and after how many entries it has written; only before the first restart.
"""

from __future__ import annotations

import os
import signal
import sys

from captum_staa.__main__ import main
from captum_staa.benchmark.ledger import Ledger

if os.environ.get("RANK") == os.environ.get("KILL_RANK") and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    left = int(os.environ["KILL_AFTER"])
    write = Ledger.write

    def write_and_die(self, *entry):
        global left
        write(self, *entry)
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    Ledger.write = write_and_die

if __name__ == "__main__":
    sys.exit(main())
