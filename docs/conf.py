"""Sphinx settings. `make docs` builds with warnings as errors, and without a network."""

import os
import re
import sys
from pathlib import Path

import captum_staa

sys.path.insert(0, str(Path(__file__).parent))

project = "captum_staa"
author = copyright = "captum_staa developers"
version = release = captum_staa.__version__

extensions = [
    "formulas",  # beside this file
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "_templates", "jupyter_execute", "tutorials/README.md"]
templates_path = ["_templates"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = f"captum_staa {release}"

nb_execution_mode = "off"  # notebooks are committed with their outputs
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# A page for every class and function, in api/. File names must differ where upper and lower case do not matter.
autosummary_filename_map = {
    f"captum_staa.metrics.{name}": f"captum_staa.metrics.{name}_result"
    for name in ("Reliability", "Smoothness")
}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_rtype = False  # "Like ``inputs``: contiguous" is a description, not a type

html_math_renderer = "drawings"  # of formulas.py

# Links to pages of other projects need their inventories. The folder inventories/ has one for Captum, which publishes
# none, and a part of torch's. The complete inventories need a network: CAPTUM_STAA_INTERSPHINX=1 make docs
intersphinx_mapping = {
    "captum": ("https://captum.ai/api", "inventories/captum.inv"),
    "torch": ("https://docs.pytorch.org/docs/stable", "inventories/torch.inv"),
}
if os.environ.get("CAPTUM_STAA_INTERSPHINX"):
    intersphinx_mapping |= {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "torch": (
            "https://docs.pytorch.org/docs/stable",
            (None, "inventories/torch.inv"),
        ),
    }


def _links_of_tutorials(app, docname, source):
    """Convert links that work in tutorials/ to links between pages, which are in another folder."""
    if docname.startswith("tutorials/"):
        pages = re.sub(
            r"\[([^][\n]+)\]\(\.\./docs/(\w+)\.md\)", r"{doc}`\1 </\2>`", source[0]
        )
        source[0] = re.sub(
            r"\[([^][\n]+)\]\((\w+)\.ipynb\)", r"{doc}`\1 </tutorials/\2>`", pages
        )


def _skip_fields(app, what, name, member, skip, options):
    """Leave out what the section Attributes of a class describes: fields of tuples, dataclasses, and properties."""
    if type(member).__name__ in ("_tuplegetter", "member_descriptor"):
        return True
    function = getattr(member, "fget", None) or getattr(member, "func", None)
    owner = getattr(
        sys.modules.get(getattr(function, "__module__", "")),
        getattr(function, "__qualname__", "").split(".")[0],
        None,
    )
    _, _, attributes = (getattr(owner, "__doc__", None) or "").partition("Attributes:")
    return True if re.search(rf"^\s+{name}\b.*:", attributes, re.MULTILINE) else None


def setup(app):
    tutorials = Path(__file__).parent / "tutorials"
    if not tutorials.is_dir():  # a source distribution has no symbolic links
        tutorials.symlink_to(Path("..") / "tutorials")
    app.connect("source-read", _links_of_tutorials)
    app.connect("autodoc-skip-member", _skip_fields)
