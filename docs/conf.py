"""Sphinx settings. `make docs` builds with warnings as errors, and without a network."""

import os

import captum_staa

project = "captum_staa"
author = copyright = "captum_staa developers"
version = release = captum_staa.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "jupyter_execute"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = f"captum_staa {release}"

nb_execution_mode = "off"  # notebooks are committed with their outputs
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False

# Links into other projects' pages need their inventories, that is, a network: CAPTUM_STAA_INTERSPHINX=1 make docs
if os.environ.get("CAPTUM_STAA_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }
