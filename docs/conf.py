"""How Sphinx builds the site: ``make docs``."""

import importlib.util
import os
import sys
import typing
import warnings
from pathlib import Path

import numpy as np
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.deprecation import RemovedInNextVersionWarning
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx_autodoc_typehints import format_annotation

import lgla_losses
from lgla_losses._counts import ArrayLike

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
if importlib.util.find_spec("torchvision"):  # which torchmetrics then imports
    import torchvision_shim  # noqa: F401
from public import public_values, undocumented

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
nitpick_ignore = [
    # PyTorch's pages call it an opaque handle and describe it nowhere.
    ("py:class", "torch.distributed.ProcessGroup"),
    ("py:class", "torch.distributed.distributed_c10d.ProcessGroup"),
    # What all losses have in common; create_loss returns one of them.
    ("py:class", "lgla_losses.losses._base.Loss"),
]
suppress_warnings = ["config.cache"]  # of the two functions below, which cannot be pickled
# Of sphinx_autodoc_typehints, a line each time; not errors, as this is Python's warning.
warnings.filterwarnings("ignore", category=RemovedInNextVersionWarning)

html_theme = "furo"
html_title = f"lgla-losses {release}"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
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
autodoc_default_options = {"exclude-members": "extra_repr"}
napoleon_use_ivar = True  # attributes as a list, beside the properties that have an entry
napoleon_custom_sections = ["Shape"]
always_use_bars_union = True
always_document_param_types = True
typehints_defaults = "comma"
typehints_use_rtype = False  # the type with what is returned
typehints_document_rtype_none = False

copybutton_exclude = ".linenos, .gp, .go"  # prompts, and what they print

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"

# Where there is no network the committed inventories stand in. They hold what these pages refer to, a line
# each, in the plain text of Sphinx's inventory version 1: name, kind, page; the anchor is the name.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", (None, "inventories/python.inv")),
    "torch": ("https://docs.pytorch.org/docs/stable", (None, "inventories/torch.inv")),
    "numpy": ("https://numpy.org/doc/stable", (None, "inventories/numpy.inv")),
    "matplotlib": ("https://matplotlib.org/stable", (None, "inventories/matplotlib.inv")),
}

# Types are defined in other modules than their pages say.
PAGES_OF_MODULES = {
    "matplotlib.axes._axes": "matplotlib.axes",
    "torch.distributed.distributed_c10d": "torch.distributed",
    "torch.fx.graph": "torch.fx",
    "torch.nn.modules.module": "torch.nn",
    "torch.nn.modules.linear": "torch.nn",
    "torch.utils.data.dataset": "torch.utils.data",
}


def typehints_fixup_module_name(module: str) -> str:
    """The module under which a type has a page."""
    return PAGES_OF_MODULES.get(module, module)


def typehints_formatter(annotation: object, config: Config) -> str | None:
    """Aliases by their names, keywords as such; None for other types."""
    if typing.get_origin(annotation) is typing.Unpack:
        return "keyword arguments"
    aliased, alternatives = typing.get_args(ArrayLike), typing.get_args(annotation)
    if alternatives[: len(aliased)] == aliased:
        others = [format_annotation(other, config) for other in alternatives[len(aliased) :]]
        return " | ".join([":py:data:`ArrayLike`", *others])
    if typing.get_origin(annotation) is np.ndarray:  # NDArray[...] is ndarray[tuple[...], dtype[...]]
        scalar = typing.get_args(typing.get_args(annotation)[1])[0]
        inner = "Any" if scalar is typing.Any else scalar.__name__
        return rf":py:data:`~numpy.typing.NDArray`\ [{inner}]"
    return None


def require_documentation(_app: Sphinx, env: BuildEnvironment) -> None:
    """Warn, which fails the build, of every public name without an entry or without a docstring."""
    warning = logging.getLogger(__name__).warning
    entries = env.domains.python_domain.objects
    for name, value in public_values():
        for missing in {name.rpartition(".")[0], name} - set(entries):
            warning("%s is public, but on no page", missing)
        for missing in undocumented(name, value):
            warning("%s is public, but has no docstring", missing)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("env-check-consistency", require_documentation)
