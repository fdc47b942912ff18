"""Which versions gave a number: this library's own, and those of the libraries whose numbers it relays."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

RELAYED = ("captum", "torch", "numpy", "transformers", "scikit-learn", "pillow", "av")


def versions() -> dict[str, str]:
    """For the record of a run; a library that is not installed is left out.

    Example:
        >>> import captum_staa
        >>> versions()["captum_staa"] == captum_staa.__version__
        True
    """
    found = {"python": platform.python_version(), "captum_staa": sys.modules["captum_staa"].__version__}
    for name in RELAYED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
