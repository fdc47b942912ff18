"""Versions of this library and of the libraries that its numbers depend on."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

DEPENDENCIES = ("captum", "torch", "numpy", "transformers", "scikit-learn", "pillow", "av")


def versions() -> dict[str, str]:
    """Return the version of Python, of this library and of its installed dependencies, by name.

    Example:
        >>> import captum_staa
        >>> versions()["captum_staa"] == captum_staa.__version__
        True
    """
    installed = {"python": platform.python_version(), "captum_staa": sys.modules["captum_staa"].__version__}
    for name in DEPENDENCIES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed
