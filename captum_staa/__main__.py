"""Entry point of ``python -m captum_staa``; the command line itself is :mod:`captum_staa.cli.parser`."""

import sys

from captum_staa.cli.parser import main

if __name__ == "__main__":
    sys.exit(main())
