"""What the documentation is checked by finds what is wrong; the map and the reference are whole."""

import ast
import builtins
import pkgutil
import re
import runpy
from collections import Counter
from types import SimpleNamespace

import pytest
from commands import check_commands
from public import public_values
from scripts import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in path.parts),
]
REFERENCE = "\n".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
CHECKS = runpy.run_path(str(ROOT / "docs" / "check_links.py"))
INVENTORIES = sorted((ROOT / "docs" / "inventories").glob("*.inv"))


def test_the_map_names_every_file():
    """Once each, but for the files of folders that it names as a whole."""
    table = PAGE.partition("| file |")[2].partition("\n\n")[0]
    named = Counter(
        name
        for row in table.splitlines()
        if row[:2] == "| "
        for name in re.findall(r"`([^`]+)`", row.split("|")[1])
    )
    package = ROOT / "lgla_losses"
    folders = tuple(name for name in named if name[-1] == "/" and (package / name).is_dir())
    files = {str(path.relative_to(package)) for end in ("py", "c", "h") for path in package.rglob(f"*.{end}")}
    files = {name for name in files if not name.startswith(folders) and not name.endswith("__init__.py")}
    assert named == Counter([*files, *folders])


def test_tables_in_docstrings_are_aligned():
    """Three equal borders, and every row is blank between the columns; Sphinx needs minutes to say so."""
    sources = [path.read_text() for path in (ROOT / "lgla_losses").rglob("*.py")]
    tables = [t for source in sources for t in re.findall(r"(?:^ *=.*\n)(?:.*\S.*\n)*", source, re.MULTILINE)]
    assert len(tables) > 1
    for table in tables:
        lines = table.splitlines()
        gaps = [match.start() for match in re.finditer("(?<==) ", lines[0])]
        assert gaps, table
        assert [line for line in lines if "====" in line] == lines[:1] * 3, table
        assert lines[-1] == lines[0], table
        assert not any(line[gap : gap + 1].strip() for line in lines for gap in gaps), table


def test_the_architecture_page_names_what_there_is():
    diagram = PAGE.partition("```text\n")[2].partition("```")[0]
    named = {*re.findall(r"`([\w./]+)`", PAGE), *re.findall(r"[A-Za-z_][\w./]*\w", diagram)}
    files = {name for name in named if re.search(r"\.(py|c|h|toml)$", name)} - {"kernels/NAME.py"}
    places = (ROOT, ROOT / "lgla_losses")
    assert [name for name in files if not any((place / name).is_file() for place in places)] == []

    sources = [path for path in ROOT.glob("*/**/*.py") if path.relative_to(ROOT).parts[0][0] != "."]
    words = {word for path in sources for word in re.findall(r"\w+", path.read_text())}
    names = {name for name in named - files if re.fullmatch(r"[\w.]*[A-Z_][\w.]*", name)}
    records = {name for name in names if name.endswith((".json", ".txt"))}
    assert [name for name in names - records if not words.issuperset(name.split("."))] == []


def test_every_public_name_has_one_entry():
    """Sphinx says so too, but takes minutes: ``make docs``."""
    entries = Counter(re.findall(r"^\.\. auto\w+:: ([\w.]+)", REFERENCE, re.MULTILINE))
    names = {name for name, _ in public_values()}
    modules = {name.rpartition(".")[0] for name in names}
    assert names | modules <= set(entries)
    assert max(entries.values()) == 1


@pytest.mark.parametrize("path", INVENTORIES, ids=lambda path: path.stem)
def test_inventories_of_other_projects_name_what_they_have(path):
    first, _, _, *lines = path.read_text().splitlines()
    assert first == "# Sphinx inventory version 1"
    for line in lines:
        name, kind, page = line.split()
        assert kind in {"class", "data", "exception", "function", "method", "mod"}, line
        assert page.endswith(".html"), line
        if "." in name:
            pkgutil.resolve_name(name)
        else:
            assert name == "None" or hasattr(builtins, name), line


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<a id="x"><a href="sub/b.html#y"><a href="#x"><a href="https://a.b/c">')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.html").write_text(
        '<p id="y"><a href="../a.html"><a href="../a.html#z"><img src="no.png">'
    )
    broken_links = CHECKS["broken_links"]
    assert sorted(broken_links(tmp_path)) == ["sub/b.html: ../a.html#z", "sub/b.html: no.png"]


def test_files_of_other_sites_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<link rel="canonical" href="https://a.b/a.html"><a href="https://a.b/c"><link href="https://a.b/c.css">'
        '<script src="https://a.b/c.js"></script><script src="c.js"></script><img src="//a.b/c.png">'
    )
    (tmp_path / "a.css").write_text(
        '@import "https://a.b/d.css"; @font-face { src: url(https://a.b/c.woff2) }'
    )
    assert sorted(CHECKS["outside_files"](tmp_path)) == [
        "a.css: https://a.b/c.woff2",
        "a.css: https://a.b/d.css",
        "a.html: //a.b/c.png",
        "a.html: https://a.b/c.css",
        "a.html: https://a.b/c.js",
    ]


def returns_read_as_a_type(docstring):
    """The first line of a Returns section where Sphinx takes what stands before a colon for a type."""
    line = re.search(r"^(?:Returns|Yields):\n +(.*)", docstring, re.MULTILINE)
    text = re.sub(r"(:[\w:]+:)?`+[^`]*`+", "", line[1]) if line else ""
    return line[1] if ":" in text else None


def test_no_prose_reads_as_a_type():
    assert (
        returns_read_as_a_type("Do.\n\nReturns:\n    What ``a:b`` is: a tensor.")
        == "What ``a:b`` is: a tensor."
    )
    found = []
    for path in (ROOT / "lgla_losses").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.append(returns_read_as_a_type(ast.get_docstring(node) or ""))
    assert [line for line in found if line] == []


@pytest.mark.parametrize(
    "line",
    [
        "make test PYTHON=python3",
        'pip install "lgla-losses[cli,plot]"',
        "python examples/train_images.py DATA --split-at layer3 \\\n --no-aaw",
        "OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/train_ddp.py --fsdp",
        "python -m lgla_losses inspect counts.txt --png FILE",
        "python -c 'print(1); print(2)' > FILE   # a comment",
        "cd FOLDER && python examples/train_paper.py --options | tensorboard",
    ],
)
def test_commands_that_exist_pass(line):
    check_commands(SimpleNamespace(parsed=line))


@pytest.mark.parametrize(
    "line",
    [
        "make tests",
        'pip install "lgla-losses[all]"',
        "python examples/train_image.py DATA",
        "python examples/train_images.py DATA --splitat layer3",
        "torchrun examples/train_ddp.py --fsdp3",
        "python -m lgla_losses inspect counts.txt --pdf FILE",
        "python -m lgla_losses.inspect counts.txt",
        "python -m lgla_losses look counts.txt",
        "python -m lgla_losses inspect counts.txt --no-json",
        "python examples/train_images.py DATA --import",
        "python examples/train_paper.py examples/paper/table9.toml",
        "cd examples && make tests",
        "pip freeze",
        "conda install lgla-losses",
    ],
)
def test_commands_that_do_not_exist_fail(line):
    with pytest.raises(AssertionError):
        check_commands(SimpleNamespace(parsed=line))


def test_nobody_is_told_to_install_a_name_that_is_not_on_pypi():
    assert {"README.md", "frameworks.md", "index.md"} <= {page.name for page in PAGES}
    told = re.compile(r"pip install [^\n`]*lgla[-_]losses")
    assert [str(page.relative_to(ROOT)) for page in PAGES if told.search(page.read_text())] == []


def test_every_loop_that_trains_experts_clips_its_gradients():
    """But for the page that shows the paper's training as it is."""
    loops = re.compile(r"```(?:python|\{code-cell\} python)\n(.*?)```", re.DOTALL)
    plain = ("nn.CrossEntropyLoss()\noptimizer", "LDAMLoss(")  # of one model
    found = Counter()
    for page in PAGES:
        for loop in loops.findall(page.read_text()):
            steps = re.search(r"optimizer\.step\(\)|scaler\.step\(", loop)  # LBFGS, of a closure, searches
            if steps and not any(text in loop for text in plain):
                found[page.name, "clip_grad_norm_(" in loop] += 1
    assert [name for name, clips in found if not clips] == ["hard-samples.md"]
    assert sum(found.values()) >= 6


def test_python_of_a_command_is_python():
    with pytest.raises(SyntaxError):
        check_commands(SimpleNamespace(parsed="python -c 'print 1'"))
