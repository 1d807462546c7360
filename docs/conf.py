"""How Sphinx builds the site: ``make docs``."""

import os

import lgla_losses

project = "lgla-losses"
author = "The lgla-losses developers"
project_copyright = f"2026, {author}"
version = release = lgla_losses.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_autodoc_typehints",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build"]
nitpicky = True

html_theme = "furo"
html_title = f"lgla-losses {release}"

myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Cells are run with every build, by the library as it is; one that raises fails the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_show_tb = True
nb_merge_streams = True
nb_execution_in_temp = True
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pages are built side by side

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
always_use_bars_union = True
typehints_defaults = "comma"

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"

# The committed inventories stand in where there is no network; they hold what these pages refer to.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", (None, "inventories/python.inv")),
    "torch": ("https://docs.pytorch.org/docs/stable", (None, "inventories/torch.inv")),
}
