"""The gallery's notebooks open by themselves; the index shows each one.

The site's build runs them, where an assertion that fails stops it.
"""

import ast
import json
import re
import sys
from types import SimpleNamespace

import pytest
from commands import check_commands
from scripts import ROOT

GALLERY = ROOT / "docs" / "gallery"
NOTEBOOKS = sorted(GALLERY.glob("*.ipynb"))
INDEX = (GALLERY / "index.md").read_text(encoding="utf-8")
#: What the lines at the top of the notebooks install; pillow comes with matplotlib.
INSTALLED = {"lgla_losses", "matplotlib", "numpy", "PIL", "torch"}

of_each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def code(path):
    return ["".join(cell["source"]) for cell in cells(path, "code")]


def text(path):
    return "\n\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))


def test_the_index_shows_every_page_with_a_picture():
    pages = [path.stem for path in NOTEBOOKS]
    assert len(pages) == 6
    cards = re.findall(r":link: (\w+)\n:link-type: doc\n:img-top: (\S+)\n", INDEX)
    assert sorted(cards) == [(page, f"../images/gallery_{page}.png") for page in pages]
    for _, picture in cards:
        assert (GALLERY / picture).read_bytes().startswith(b"\x89PNG")
    toctree = INDEX.partition("```{toctree}\n")[2].partition("```")[0].split("\n\n")[1]
    assert toctree.split() == [page for page, _ in cards]


@of_each_notebook
def test_a_page_says_what_you_learn_and_what_it_needs_and_has_a_download(path):
    top = "".join(cells(path, "markdown")[0]["source"])
    assert top.startswith("# ")
    assert "**You learn** " in top
    assert f"[{path.name}](path:{path.name})" in top
    (command,) = re.findall(r"```sh\n(.*?)```", top, re.DOTALL)
    check_commands(SimpleNamespace(parsed=command))
    assert "\n## For your own data\n" in text(path)


@of_each_notebook
def test_a_notebook_needs_what_its_top_installs_and_no_other_file(path):
    extra = re.search(r'pip install "\.\[(\w+)\]"', text(path))[1]
    installed = INSTALLED | ({"sklearn"} if extra == "examples" else set())
    tree = ast.parse("\n".join(code(path)))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert imported - sys.stdlib_module_names <= installed
    called = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not called & {"open", "__file__", "get_ipython"}


@of_each_notebook
def test_a_notebook_is_kept_without_outputs_and_checks_its_text_in_the_end(path):
    for cell in cells(path, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
    *shown, last = cells(path, "code")
    assert last["metadata"]["tags"] == ["remove-cell"]
    assert "assert " in "".join(last["source"])
    assert not any("assert " in "".join(cell["source"]) for cell in shown)
    assert sum("thumbnail" in cell["metadata"].get("tags", []) for cell in shown) == 1


@of_each_notebook
def test_links_lead_to_pages(path):
    links = re.findall(r"\]\(([^)\s]+)\)", text(path))
    assert [link for link in links if not (GALLERY / link.removeprefix("path:")).is_file()] == []


@of_each_notebook
def test_training_clips_its_gradients_and_code_fits_its_column(path):
    for cell in code(path):
        assert ("optimizer.step()" in cell) == ("clip_grad_norm_(" in cell)
    lines = "\n".join(code(path)[:-1]).splitlines()
    assert [line for line in lines if len(line) > 86] == []
