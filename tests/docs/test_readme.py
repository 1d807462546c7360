"""README: its ladder gains, its output is that of its commands, its figures are those of the records.

That the Python blocks run and that commands exist is tested by conftest.py at the root.
"""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import report
import tables
import torch
from commands import TARGETS
from matplotlib import image
from scripts import ROOT, load

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS_PAGES = "\n".join(
    (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("results.md", "results-details.md")
)
PAGES = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"]
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def blocks(text, language):
    return [code for kind, code in BLOCK.findall(text) if kind == language]


def section(title):
    found = README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert found, title
    return found


def test_the_front_page_stays_short():
    assert len(README.splitlines()) <= 230


def accuracies(text):
    """Lists of the accuracy of three classes, as the ladder prints them."""
    return np.array(
        [[int(number) for number in found.split(",")] for found in re.findall(r"\[(\d+, \d+, \d+)\]", text)]
    )


def test_each_step_of_the_ladder_is_short_and_gains_on_rare_classes_about_what_is_said(capsys):
    code = blocks(section("From one line to three experts"), "python")
    assert all(len(step.strip().splitlines()) <= 6 for step in code[1:])
    names = {}
    for step in code:
        exec(compile(step, "README.md", "exec"), names)

    said, printed = accuracies("\n".join(code)), accuracies(capsys.readouterr().out)
    assert said.shape == printed.shape == (4, 3)
    assert np.abs(said.mean(axis=1) - printed.mean(axis=1)).max() < 8
    softmax, balanced, heads, experts = printed.mean(axis=1)
    assert min(balanced, heads) > softmax + 10
    assert experts > balanced + 3

    test, probabilities = names["test"], names["probabilities"]
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(len(test)))
    assert (probabilities.argmax(dim=1) == names["labels"])[test].double().mean() > 0.8


def test_the_pytorch_to_install_is_the_tested_one():
    (commands,) = blocks(section("Install"), "sh")
    installed = re.search(r"torch==[\d.]+", commands)[0]
    assert installed in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert installed in (ROOT / "docs" / "install.md").read_text(encoding="utf-8")


def test_the_commands_print_what_is_shown(tmp_path):
    found = section("Look at your own class counts")
    (commands,), (shown,) = blocks(found, "sh"), blocks(found, "text")
    lines = [line for line in commands.splitlines() if not line.startswith("pip install ")]
    assert len(lines) == 2
    result = subprocess.run(
        ["bash", "-e", "-c", "\n".join(['python() { "$PYTHON" "$@"; }', *lines])],
        cwd=tmp_path,
        env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "groups.png").read_bytes().startswith(b"\x89PNG")
    printed, position = [line.rstrip() for line in result.stdout.splitlines()], 0
    for line in shown.splitlines():
        if line != "...":
            assert line in printed[position:], f"{line!r} is not printed there:\n{result.stdout}"
            position = printed.index(line, position) + 1


def test_every_make_command_is_a_target():
    spoken = "\n".join(path.read_text() for path in (ROOT / "docs").rglob("*.md")) + "\n".join(
        (ROOT / page).read_text() for page in PAGES
    )
    commands = re.findall(r"(?:^|`)make ([\w-]+)", spoken, re.MULTILINE)
    assert {"demo", "test", "docs", "bench"} <= set(commands)
    assert set(commands) <= TARGETS


def slug(heading):
    """The anchor that code hosts and MyST make of a heading."""
    plain = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w -]", "", plain).replace(" ", "-")


def anchors(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if link.startswith("https://"):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


def test_readme_leads_to_every_page():
    own = [path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts]
    pages = {str(path.relative_to(ROOT)) for path in own if path.name != "index.md"}
    wrappers = {f"docs/{name}.md" for name in ("bibliography", "changelog", "contributing")}
    in_reference = {page for page in pages if page.startswith("docs/reference/")}
    assert [page for page in sorted(pages - wrappers - in_reference) if f"]({page}" not in README] == []


def test_the_demos_table_is_the_recorded_one_and_the_text_says_the_same():
    table = (ROOT / "benchmarks" / "results" / "quickstart_cpu.txt").read_text(encoding="utf-8").strip()
    assert table in README
    rows = {
        cells[0]: cells[1:] for cells in (re.findall(r"[^│]+", line) for line in table.splitlines()[4:-1])
    }
    mean = {name.strip(): [float(cell.split("±")[0]) for cell in cells] for name, cells in rows.items()}
    softmax, one, balanced, lgla = (mean[name] for name in ("Softmax", "BALMS x1", "BALMS x3", "LGLA"))
    (gain, rare), (gain_of_one, rare_of_one) = (
        (f"{of[0] - softmax[0]:.0f}", f"{of[4] - softmax[4]:.0f}") for of in (lgla, one)
    )
    text = " ".join(README.split())
    assert f"gains {gain_of_one} of LGLA's {gain} points of balanced accuracy over softmax" in text
    assert f"and {rare_of_one} of its {rare} on the three rarest digits" in text
    assert f"the {lgla[0] - balanced[0]:.1f} points between them" in text


def test_the_accuracies_of_the_training_scripts_are_told_as_they_are_recorded():
    """The table itself is tested with the other tables of the page."""
    runs = tables.read("examples_cpu")["runs"]
    scores = [100 * run["final"]["scores"]["ensemble"]["balanced"] for run in runs]
    methods = ["Softmax", "BALMS x3", "LGLA"]
    assert [(run["data"], run["method"]) for run in runs] == [
        (data, method) for data in ("Fashion-MNIST", "docstrings") for method in methods
    ]
    more, gain, more_texts, gain_texts = (f"{scores[i] - scores[i // 3 * 3]:.1f}" for i in (1, 2, 4, 5))
    text = " ".join(RESULTS_PAGES.split())
    assert (
        f"LGLA gains {gain} points of balanced accuracy over softmax on the images and {gain_texts} on the "
        f"texts; three balanced-softmax experts gain more here, {more} and {more_texts}."
    ) in text


def test_the_results_in_brief_are_those_of_the_records():
    def mean(name):
        path = ROOT / "benchmarks" / "results" / "paper" / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8"))["summary"]["final"]["balanced"]

    gains = [
        mean(f"{data}_table5_lgla")["mean"] - mean(f"{data}_table5_softmax")["mean"]
        for data in ("cifar10_cpu", "tiny_cpu")
    ]
    said = f"gains {gains[0]:.0f} points over softmax on CIFAR-10-LT and {gains[1]:.0f} on Tiny-ImageNet-LT"
    assert said in " ".join(RESULTS_PAGES.split())
    uniform, balanced = mean("cifar10_cpu_tau_uniform"), mean("cifar10_cpu_table5_balms")
    assert abs(uniform["mean"] - balanced["mean"]) < max(uniform["deviation"], balanced["deviation"])
    for data in ("cifar10_cpu", "tiny_cpu"):
        assert mean(f"{data}_table5_lgla")["mean"] < mean(f"{data}_table5_balms")["mean"]


def test_the_cost_of_the_losses_is_the_recorded_one():
    record = tables.read("losses_cpu")
    assert tables.brief(record) in README
    assert f"2 cores of an {record['device']}, torch 2.13" in " ".join(section("Speed").split())
    first, *lost = report.balance(record)
    text = " ".join(section("Speed").split())
    assert re.search(r"\d+ wins, \d+ losses", first)[0].replace(",", " and") in text
    assert lost
    for line in lost:
        step_of_experts = " x 3 x " in line and ", forward + backward: LGLALoss" in line
        assert not step_of_experts, line


def test_the_first_picture_shows_the_record():
    """Its bars are the means of docs/methods.md, over all seeds and data sets."""
    hero = load("docs/images/hero.py")
    results = hero.Results(tables.read("methods"))
    assert (len(results.sets), len(results.seeds), results.epochs) == (6, 5, 8)
    for method, _, _ in hero.ROWS:
        for score in hero.SCORES:
            seeds = hero.scores_of(results, method, score)
            assert len(seeds) == 5
            mean = results.mean(hero.BUDGET, method, score, "plain")
            assert sum(seeds) / 5 == pytest.approx(mean), (method, score)


def test_the_first_picture_is_what_the_library_draws(tmp_path):
    """As near as versions of matplotlib and fonts let it be."""
    hero = load("docs/images/hero.py")
    hero.draw(tmp_path / "hero.png")
    drawn = image.imread(tmp_path / "hero.png")
    committed = image.imread(ROOT / "docs" / "images" / "hero.png")
    assert drawn.shape == committed.shape
    height, width = (size // 18 for size in drawn.shape[:2])
    apart = (drawn - committed)[: 18 * height, : 18 * width].reshape(height, 18, width, 18, -1)
    assert np.abs(apart.mean(axis=(1, 3))).max() < 0.35  # 0.5 for another tau or another class
