"""How Sphinx builds the site: ``make docs``."""

import html
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
import tomllib
import typing
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.deprecation import RemovedInNextVersionWarning
from sphinx.environment import BuildEnvironment
from sphinx.errors import PycodeError
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator
from sphinx_autodoc_typehints import format_annotation

import lgla_losses
from lgla_losses._counts import ArrayLike

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
if importlib.util.find_spec("torchvision"):  # torchmetrics imports it where it is installed
    import torchvision_shim  # noqa: F401
from public import public_values, undocumented

project = "lgla-losses"
author = "The lgla-losses developers"
project_copyright = f"2026, {author}"
version = release = lgla_losses.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.githubpages",  # writes .nojekyll
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
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
    # The private base of all losses; create_loss returns one of them.
    ("py:class", "lgla_losses.losses._base.Loss"),
]
suppress_warnings = ["config.cache"]  # Sphinx cannot pickle the two functions for type hints below
# sphinx_autodoc_typehints gives one for each entry. It is a warning of Python, so it does not fail the build.
warnings.filterwarnings("ignore", category=RemovedInNextVersionWarning)

html_theme = "furo"
html_title = f"lgla-losses {release}"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
templates_path = ["_templates"]
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/version.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
# pyproject.toml gives the address of the site, for canonical links; without an address there are none.
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
PROJECT = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
html_baseurl = PROJECT.get("urls", {}).get("Documentation", "")
html_math_renderer = "mathml"  # browsers show MathML without a script

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Every build runs the cells again; a cell that raises fails the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_show_tb = True
nb_merge_streams = True
nb_execution_in_temp = True
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several pages run at the same time

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"exclude-members": "extra_repr"}
napoleon_use_ivar = True  # attributes in a list; properties have entries
napoleon_custom_sections = ["Shape"]
always_use_bars_union = True
always_document_param_types = True
typehints_defaults = "comma"
typehints_use_rtype = False  # the type stands in the line of the returned value
typehints_document_rtype_none = False

copybutton_exclude = ".linenos, .gp, .go"  # copies neither prompts nor output

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"

# Without a network, Sphinx reads the committed inventories. They hold what these pages refer to, one a line,
# as plain text of Sphinx's inventory version 1: name, kind, page. The anchor is the name.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", (None, "inventories/python.inv")),
    "torch": ("https://docs.pytorch.org/docs/stable", (None, "inventories/torch.inv")),
    "numpy": ("https://numpy.org/doc/stable", (None, "inventories/numpy.inv")),
    "matplotlib": ("https://matplotlib.org/stable", (None, "inventories/matplotlib.inv")),
}

# The module that defines a type, and the module that its page names.
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
    """Names of aliases, the choices of type variables, and keywords; None for other types."""
    if typing.get_origin(annotation) is typing.Unpack:
        return "keyword arguments"
    if isinstance(annotation, typing.TypeVar) and annotation.__constraints__:
        return " | ".join(format_annotation(choice, config) for choice in annotation.__constraints__)
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
    """Warn about each public name without an entry or a docstring; a warning fails the build."""
    warning = logging.getLogger(__name__).warning
    entries = env.domains.python_domain.objects
    for name, value in public_values():
        for missing in {name.rpartition(".")[0], name} - set(entries):
            warning("%s is public, but on no page", missing)
        for missing in undocumented(name, value):
            warning("%s is public, but has no docstring", missing)


MATHML = LatexToMathML()


def mathml(latex: str, node: nodes.Element, *, display: bool) -> str:
    """A formula as MathML; a warning, which fails the build, where it cannot be read."""
    try:
        return MATHML.convert_with_local_state(latex, displaystyle=display)
    except LatexError as error:
        logging.getLogger(__name__).warning("%s: %s", latex, error, location=node)
        return html.escape(latex)


def visit_math(translator: HTML5Translator, node: nodes.math) -> None:
    r"""Write a formula within a line."""
    translator.body.append(mathml(node.astext(), node, display=False))
    raise nodes.SkipNode


def visit_math_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    r"""Write a formula on its own line. It may break at ``\qquad``, as MathML itself breaks nowhere."""
    parts = re.split(r"\\qquad(?![a-z])", node.astext())
    parts = [mathml(part, node, display=True) for part in parts]
    number = f"<span>({get_node_equation_number(translator, node)})</span>" if node["number"] else ""
    translator.body.append(translator.starttag(node, "div", CLASS="math"))
    translator.body.append("".join([*parts, number, "</div>"]))
    raise nodes.SkipNode


def describe_page(_app: Sphinx, _name: str, _template: str, context: dict, doctree: nodes.document) -> None:
    """Give a page the description that search engines and link previews show: its first plain paragraph."""
    if not doctree:  # a page that Sphinx makes, such as the index
        return
    plain = (par.astext() for par in doctree.findall(nodes.paragraph) if not any(par.findall(nodes.math)))
    first = " ".join(next(plain, PROJECT["description"]).split())
    description = first if len(first) <= 200 else first[:200].rsplit(" ", 1)[0] + " ..."
    tags = {
        'name="description"': description,
        'property="og:title"': re.sub("<[^>]+>", "", context["title"]),
        'property="og:description"': description,
        'property="og:site_name"': project,
        'property="og:type"': "website",
    }
    for name, content in tags.items():
        context["metatags"] += f'<meta {name} content="{html.escape(html.unescape(content))}">\n'


def module_of_property(_app: Sphinx, module: str, name: str) -> str | None:
    """The module that defines a property; None for other names, which viewcode finds itself."""
    with suppress(AttributeError, ImportError, ValueError):
        value = pkgutil.resolve_name(f"{module}:{name}")
        return value.fget.__module__ if isinstance(value, property) else None
    return None


def source_with_inherited(_app: Sphinx, module: str) -> tuple[str, dict] | None:
    """The code of a module, and the lines of its names; members also under the names of subclasses."""
    try:
        analyzer = ModuleAnalyzer.for_module(module)
        analyzer.find_tags()
    except PycodeError:
        return None
    lines = dict(analyzer.tags)
    for _, value in public_values():
        for base in inspect.getmro(value)[1:] if inspect.isclass(value) else ():
            for name in vars(base) if base.__module__ == module else ():
                if f"{base.__qualname__}.{name}" in lines:
                    lines.setdefault(f"{value.__qualname__}.{name}", lines[f"{base.__qualname__}.{name}"])
    return analyzer.code, lines


def mend_source_page(app: Sphinx, name: str, _template: str, context: dict, _doctree: object) -> None:
    """Leave out links from source code to missing entries: viewcode knows one name for each file."""
    if name.startswith("_modules/"):
        entries = app.env.domains.python_domain.objects
        link = re.compile(r'<a class="viewcode-back" href="[^"#]*#([^"]+)">.*?</a>')
        context["body"] = link.sub(lambda found: found[0] if found[1] in entries else "", context["body"])


def setup(app: Sphinx) -> None:
    """Connect the functions above; Sphinx calls this."""
    app.connect("env-check-consistency", require_documentation)
    app.connect("html-page-context", describe_page)
    app.connect("html-page-context", mend_source_page)
    app.connect("viewcode-follow-imported", module_of_property)
    app.connect("viewcode-find-source", source_with_inherited)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
