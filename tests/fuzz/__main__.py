"""The long run: ``python -m tests.fuzz --calls 10000 --seed 0``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_helpers"))  # the folder of the shared test helpers

from .run import main

if __name__ == "__main__":
    sys.exit(main())
