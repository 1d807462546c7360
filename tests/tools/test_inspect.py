"""``python -m lgla_losses inspect``: every source, figures in plain loops, warnings, pictures, refusals."""

import errno
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import reference
from rich.cells import cell_len
from scripts import ROOT
from typer.testing import CliRunner

import lgla_losses
from lgla_losses import ClassGrouper, LGLALoss, suggest
from lgla_losses.inspection import gini_coefficient, inspect_counts, read_class_counts
from lgla_losses.inspection.command import app
from lgla_losses.inspection.picture import draw_groups
from lgla_losses.inspection.table import number_ranges

COUNTS = [40, 300, 12, 150, 12, 19, 20, 100]
NAMES = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse"]
LABELS = np.repeat(np.arange(len(COUNTS)), COUNTS)


def run(*arguments, **options):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)], **options)


def record(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert not result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def counts_file(tmp_path):
    path = tmp_path / "counts.txt"
    path.write_text("\n".join(map(str, COUNTS)))
    return path


def write(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")
    return path


def image_folders(root, counts=COUNTS):
    for number, (name, count) in enumerate(zip(NAMES, counts, strict=True)):
        folder = root / f"{number}_{name}"
        (folder / "more").mkdir(parents=True)
        for i in range(count):
            (folder / ("more" if i % 2 else "") / f"{i}.{'JPG' if i % 3 else 'png'}").touch()
        (folder / "Thumbs.db").touch()
        (folder / "._0.png").touch()
    return root


def csv_text(delimiter=",", header=("class", "count"), rows=None):
    rows = zip(NAMES, COUNTS, strict=True) if rows is None else rows
    lines = [header, *rows] if header else rows
    return "\n".join(delimiter.join(map(str, line)) for line in lines) + "\n"


SHUFFLED = [(j, NAMES[j], COUNTS[j]) for j in (3, 1, 0, 2, 7, 5, 4, 6)]

#: File, content, options, whether it has names, and a word of what it is taken for.
TEXTS = [
    ("a.txt", "# samples per class\n\n" + "\n\n".join(f" {n}.0 # {j}" for j, n in enumerate(COUNTS)), [], False, "text"),
    ("a", "\ufeff" + "\r\n".join(map(str, COUNTS)), [], False, "text"),
    ("a.csv", csv_text(), [], True, "'count' and names in column 'class'"),
    ("a.csv", "# made today\n" + csv_text(header=None), [], True, "column '2' and names in column '1'"),
    ("a.txt", csv_text(";"), [], True, "CSV"),
    ("a.tsv", csv_text("\t"), [], True, "CSV"),
    ("a.csv", csv_text(header=("count",), rows=[[n] for n in COUNTS]), [], False, "CSV"),
    ("a.csv", csv_text(header=None, rows=enumerate(COUNTS)), [], False, "in the order of column '1'"),
    ("a.csv", csv_text(header=("label", "name", "n"), rows=SHUFFLED), [], True, "order of column 'label'"),
    ("a.csv", csv_text(header=("x", "y", "z"), rows=[(7, n, s) for s, n in zip(NAMES, COUNTS, strict=True)]),
     ["--count-column", "y", "--name-column", "3"], True, "'y'"),
    ("a.json", json.dumps(COUNTS), [], False, "list"),
    ("a.json", json.dumps(dict(zip(NAMES, COUNTS, strict=True)), indent=1), [], True, "names"),
    ("a.json", json.dumps({j + 1: n for j, _, n in SHUFFLED}), [], False, "numbers"),
    ("a", json.dumps([float(n) for n in COUNTS]), [], False, "JSON"),
    ("a.csv", "\n".join(map(str, COUNTS)), ["--kind", "text"], False, "text"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "options", "has_names", "taken_for"), TEXTS)
def test_every_text_gives_the_same_numbers(
    tmp_path, counts_file, name, content, options, has_names, taken_for
):
    path = write(tmp_path / name, content)
    found, expected = record(path, *options), record(counts_file)
    assert taken_for in found["source"]["description"]
    assert same_figures(found, expected)
    if has_names:
        assert found["largest"]["name"] == "car"


def same_figures(found, expected):
    """All but names and where they come from."""
    for one in (found, expected):
        one["suggestion"].pop("python")
    text = re.sub(r'"name": "[^"]*"', '"name": null', json.dumps({**found, "source": None, "shots": None}))
    return found["shots"] == expected["shots"] and text == json.dumps(
        {**expected, "source": None, "shots": None}
    )


def test_labels_and_images_give_the_same_numbers(tmp_path, counts_file):
    np.save(tmp_path / "labels.npy", LABELS.astype(np.uint8))
    np.savez(tmp_path / "paper.npz", train_labels=LABELS, val_labels=LABELS[:9], train_images=np.zeros(3))
    np.savez_compressed(tmp_path / "pack.npz", train_y=LABELS.astype(np.int16), test_y=LABELS[:9])
    np.savez(tmp_path / "other.npz", fine=LABELS, coarse=LABELS // 2)
    image_folders(tmp_path / "images" / "train")
    (tmp_path / "images" / "val" / "0_plane").mkdir(parents=True)
    expected = record(counts_file)
    for arguments, taken_for in (
        (["labels.npy"], "array of labels"),
        (["paper.npz"], "'train_labels'"),
        (["pack.npz"], "'train_y'"),
        (["other.npz", "--key", "fine"], "'fine'"),
        (["images"], "in train/"),
        (["images/train"], "a folder for each class"),
    ):
        found = record(tmp_path / arguments[0], *arguments[1:])
        assert taken_for in found["source"]["description"]
        assert same_figures(found, json.loads(json.dumps(expected)))


def test_a_class_may_be_called_train(tmp_path):
    for name in ("car", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").touch()
    assert record(tmp_path)["num_classes"] == 2


def test_the_figures_are_those_of_plain_loops(counts_file):
    found = record(counts_file, "--batch-size", 8, "--many", 120, "--few", 15)
    assert list(found) == [
        "schema", "source", "num_classes", "num_samples", "largest", "smallest", "imbalance_factor", "gini", "many",
        "few", "shots", "batch_size", "groupings", "zero_count_classes", "warnings", "suggestion", "imports",
    ]  # fmt: skip
    total = sum(COUNTS)
    assert (found["num_classes"], found["num_samples"]) == (8, total)
    assert found["largest"] == {"number": 1, "name": None, "count": 300}
    assert found["smallest"] == {"number": 2, "name": None, "count": 12}
    assert found["imbalance_factor"] == 25
    differences = sum(abs(a - b) for a, b in itertools.product(COUNTS, COUNTS))
    assert found["gini"] == pytest.approx(differences / (2 * len(COUNTS) * total), rel=1e-12)
    splits = {
        "many": [n for n in COUNTS if n > 120],
        "medium": [n for n in COUNTS if 15 <= n <= 120],
        "few": [n for n in COUNTS if n < 15],
    }
    for shot, (name, inside) in zip(found["shots"], splits.items(), strict=True):
        assert shot == {
            "name": name,
            "num_classes": len(inside),
            "class_share": len(inside) / 8,
            "num_samples": sum(inside),
            "sample_share": sum(inside) / total,
        }
    assert [grouping["num_experts"] for grouping in found["groupings"]] == [2, 3, 4, 5, 6, 7]
    for grouping in found["groupings"]:
        num_groups = grouping["num_experts"] - 1
        assert grouping["tau"] == 1.25 * num_groups
        index = reference.group_index(COUNTS, num_groups)
        for g, group in enumerate(grouping["groups"]):
            classes = [j for j in range(8) if index[j] == g]
            mass = sum(COUNTS[j] for j in classes)
            assert group["index"] == g
            assert group["classes"] == classes
            assert group["class_share"] == len(classes) / 8
            assert group["largest_count"] == max(COUNTS[j] for j in classes)
            assert group["smallest_count"] == min(COUNTS[j] for j in classes)
            assert (group["mass"], group["mass_share"]) == (mass, mass / total)
            assert group["miss_probability"] == pytest.approx((1 - mass / total) ** 8, rel=1e-12)
        for k, margin in enumerate(grouping["margins"]):
            of_pair = {
                (y, j): reference.margin(COUNTS, index, grouping["tau"], k, y, j)
                for y, j in itertools.permutations(range(8), 2)
            }
            assert margin["margin"] == pytest.approx(max(of_pair.values()), abs=1e-9)
            assert (margin["expert"], margin["is_global"]) == (k, k == num_groups)
            if margin["target"]:
                pair = margin["target"]["number"], margin["rival"]["number"]
                assert of_pair[pair] == pytest.approx(margin["margin"])
            else:
                assert margin["margin"] == 0


def test_known_figures_of_cifar_100_lt(tmp_path):
    counts = [int(500 * 100 ** (-j / 99)) for j in range(100)]
    found = record(write(tmp_path / "a.txt", "\n".join(map(str, counts))))
    assert (found["num_samples"], found["imbalance_factor"]) == (10_847, 100)
    assert [shot["num_classes"] for shot in found["shots"]] == [35, 35, 30]
    assert [len(group["classes"]) for group in found["groupings"][1]["groups"]] == [15, 85]
    assert [len(group["classes"]) for group in found["groupings"][2]["groups"]] == [9, 15, 76]
    assert found["warnings"] == []
    suggestion = found["suggestion"]
    assert (suggestion["num_experts"], suggestion["tau"], suggestion["uniform_tau"]) == (3, 2.5, 2)
    assert "as in the paper" in suggestion["reason"]
    assert suggest(3).reason in suggestion["reason"]
    assert "K - 1 = 2 suits linear heads, label smoothing" in suggestion["reason"]
    assert "3.8 suits long training" in suggestion["reason"]
    shown = run(tmp_path / "a.txt").stdout
    assert re.findall(r"(\d), (?:local|global)", shown) == ["1", "2", "3"]  # from 1, for people


def test_the_suggested_lines_run(tmp_path):
    path = write(tmp_path / "it's.csv", csv_text(rows=[("a", 50), ("b", 0), ("c", 9), ("d", 30), ("e", 30)]))
    found = record(path, "--count-column", "count")
    names = {}
    exec("\n".join([*found["imports"], found["suggestion"]["python"]]), names)
    criterion = names["criterion"]
    assert isinstance(criterion, LGLALoss)
    assert criterion.grouper.class_counts.tolist() == [50, 9, 30, 30]
    assert criterion.num_experts == found["suggestion"]["num_experts"]
    # The default.
    assert float(criterion.adjuster.tau) == 1.25 * (criterion.num_experts - 1)
    assert found["suggestion"]["python"] in run(path, "--count-column", "count").stdout


def codes(found):
    return [warning["code"] for warning in found["warnings"]]


def test_classes_without_samples_are_left_out_and_keep_their_numbers(tmp_path):
    rows = [("a", 0), ("b", 50), ("c", 0), *((f"x{j}", 40) for j in range(20))]
    path = write(tmp_path / "a.csv", csv_text(rows=rows))
    found = record(path)
    assert codes(found) == ["zero_count_classes"]
    assert found["warnings"][0]["cases"] == [{"class": 0, "name": "a"}, {"class": 2, "name": "c"}]
    assert "0 (a), 2 (c)" in found["warnings"][0]["message"]
    assert found["num_classes"] == 21
    assert found["largest"] == {"number": 1, "name": "b", "count": 50}
    assert found["groupings"][0]["groups"][0]["classes"] == [1, *range(3, 23)]
    images = record(image_folders(tmp_path / "images", [3, 4, 0, 5, 6, 7, 8, 9]))
    assert images["zero_count_classes"] == [{"number": 2, "name": "2_bird", "count": 0}]
    many_zeros = inspect_counts([5, 4, *[0] * 9])
    assert (
        "9 classes have no samples and are left out: 2, 3, 4, 5, 6 and 4 more."
        in many_zeros.warnings[0].message
    )


def test_groups_of_one_class_and_missed_groups_are_warned_of(tmp_path):
    path = write(tmp_path / "a.txt", "1085\n745\n620\n335\n12\n5\n1\n")
    found = record(path)
    assert codes(found) == ["single_class_groups", "missed_groups"]
    alone, missed = found["warnings"]
    assert alone["cases"][0] == {"num_experts": 3, "group": 0, "class": 0}
    assert "K = 3: group 1; K = 4: groups 1, 2;" in alone["message"]
    assert [(case["num_experts"], case["group"]) for case in missed["cases"]] == [(6, 4), (7, 4), (7, 5)]
    assert missed["cases"][0]["probability"] == pytest.approx((1 - 18 / 2803) ** 128)
    assert found["suggestion"]["num_experts"] == 2
    assert "group 1 would be class 0 alone" in found["suggestion"]["reason"]
    assert "tau = 1 with aaw=False is balanced softmax" in found["suggestion"]["reason"]
    larger = record(path, "--batch-size", 100_000)
    assert codes(larger) == ["single_class_groups"]
    shown = " ".join(run(path).stdout.split())
    assert all(warning["message"] in shown for warning in found["warnings"])
    small = inspect_counts([10] * 10, batch_size=4)
    assert small.suggestion.num_experts == 2
    assert "6% of the batches of 4 would miss group 1" in small.suggestion.reason


def test_few_and_equal_classes(tmp_path):
    one = record(write(tmp_path / "a.txt", "7\n"))
    assert codes(one) == ["one_class"]
    assert [grouping["num_experts"] for grouping in one["groupings"]] == [2]
    assert (one["gini"], one["suggestion"]["num_experts"]) == (0, 2)
    two = record(write(tmp_path / "a.txt", "7\n6\n"))
    assert [grouping["num_experts"] for grouping in two["groupings"]] == [2, 3]
    equal = inspect_counts([50] * 40)
    assert [notice.code for notice in equal.warnings] == ["balanced"]
    assert equal.groupings[0].margins[0].target is None
    assert "plain cross entropy" in equal.suggestion.reason
    assert run(tmp_path / "a.txt").exit_code == 0


def test_it_reads_well_at_80_columns(tmp_path):
    rows = [
        (f"a class with a [red]long\x1b[31m name, number {j}" * 2, 9_000_000 // (j + 1)) for j in range(3000)
    ]
    path = write(tmp_path / "a.csv", "\n".join(f'"{name}",{count}' for name, count in rows))
    result = run(path)
    assert result.exit_code == 0, result.stderr
    table, _, code = result.stdout.partition("from lgla_losses import")
    assert max(map(len, table.splitlines())) <= 80
    assert "\x1b" not in table
    assert "[red]" in table
    assert f"{sum(count for _, count in rows):,}" in table
    assert f"criterion = LGLALoss(read_class_counts({str(path)!r})" in code


WIDE = "긴이름" * 10
NUMBERS = [9_000_000, 6_400_000, 812_345, 4_096, 312, 101, 17]


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
@pytest.mark.parametrize("name", ["x" * 60, "a name of many words " * 3, WIDE], ids=["word", "words", "wide"])
def test_no_number_is_cut_or_broken_in_a_narrow_terminal(tmp_path, columns, name):
    """In a pipe too: names give way."""
    path = write(tmp_path / "a.csv", "\n".join(f"{name.strip()} {j},{n}" for j, n in enumerate(NUMBERS)))
    shown = run(path, env={"COLUMNS": str(columns)})
    assert shown.exit_code == 0, shown.stderr
    table = shown.stdout.partition("Warning:")[0].splitlines()
    found = inspect_counts(NUMBERS, [f"{name.strip()} {j}" for j in range(len(NUMBERS))])
    for grouping in found.groupings:
        for group in grouping.groups:
            numbers = [
                f"{n:,}" for n in (len(group.classes), group.largest_count, group.smallest_count, group.mass)
            ]
            numbers += [f"{group.mass_share:.1%}", number_ranges(group.classes).split()[0]]
            assert any(set(numbers) <= set(line.split()) for line in table), numbers
    for shot in found.shots:
        numbers = {f"{shot.num_samples:,}", f"{shot.class_share:.1%}", f"{shot.sample_share:.1%}", shot.name}
        assert any(numbers <= set(line.split()) for line in table), numbers
    chosen = next(one for one in found.groupings if one.num_experts == found.suggestion.num_experts)
    for margin in chosen.margins:
        if margin.target:
            pair = (margin.target, margin.rival)
            numbers = {f"{margin.margin:.2f}"} | {
                f"{x}" for one in pair for x in (one.number, f"{one.count:,}")
            }
            assert any(numbers <= set(line.split()) for line in table), numbers
    assert any(line.split()[:2] == ["largest", "9,000,000"] for line in table)
    for words in ("imbalance factor", "Gini coefficient", f"{sum(NUMBERS):,}", f"{found.gini:.3f}"):
        assert any(words in line for line in table), words
    margins = next(i for i, line in enumerate(table) if line.startswith("Largest margins"))
    if columns >= 60:
        assert max(map(cell_len, table[margins:])) <= columns
    if columns >= 80:
        assert max(map(cell_len, table)) <= columns
        assert any("…" in line for line in table)


def test_counts_beyond_float32_are_split_exactly():
    shots = inspect_counts([2**24 + 1, 2**24, 2**24 - 1], many=2**24, few=2**24).shots
    assert [shot.num_classes for shot in shots] == [1, 1, 1]


def test_number_ranges():
    assert number_ranges([4]) == "4"
    assert number_ranges([0, 2, 4]) == "0, 2, 4"
    assert number_ranges([0, 2, 4, 5, 9]) == "0, 2, 4-5, ..."


@pytest.mark.parametrize("counts", [COUNTS, [5], [3, 3], [10**6 // (j + 1) for j in range(999)]])
def test_a_picture_is_written(tmp_path, counts):
    path = write(tmp_path / "a$b$.txt", "\n".join(map(str, counts)))
    result = run(path, "--png", tmp_path / "picture", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["num_classes"] == len(counts)
    assert (tmp_path / "picture").read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_groups_and_shots():
    axes = draw_groups(ClassGrouper(COUNTS, 2), range(10, 18), 100, 11, "a$b$").axes[0]
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [text.partition(":")[0] for text in texts] == ["group 1", "group 2", "many-shot", "few-shot"]
    assert [line.get_ydata()[0] for line in axes.get_lines()] == [100, 11]
    assert axes.get_title() == r"a\$b\$"
    # COUNTS by frequency, in a source whose first ten classes have no samples.
    numbers = [int(text.get_text()) for text in axes.get_xticklabels()]
    assert numbers == [11, 13, 17, 10, 16, 15, 12, 14]


def test_the_picture_has_the_names_of_the_classes(tmp_path, monkeypatch):
    """A class whose name the font cannot write has its number; nothing is warned of."""
    drawn = {}
    real = draw_groups
    monkeypatch.setattr(
        "lgla_losses.inspection.command.draw_groups",
        lambda *arguments: drawn.setdefault("figure", real(*arguments)),
    )
    path = write(tmp_path / "a.csv", csv_text(rows=[("owl", 50), ("emu", 0), ("부엉이", 90), ("a rook", 4)]))
    result = run(path, "--png", tmp_path / "a.png")
    assert result.exit_code == 0, result.stderr
    labels = [text.get_text() for text in drawn["figure"].axes[0].get_xticklabels()]
    assert labels == ["2", "owl", "a rook"]


@pytest.mark.parametrize(
    ("families", "shown"),
    [
        (["cmr10"], ["owl", "1"]),
        (["cmr10", "DejaVu Sans"], ["owl", "сова"]),
        (["DejaVu Sans", "cmr10"], ["owl", "сова"]),
        (["No Such Font", "DejaVu Sans"], ["owl", "сова"]),
        (["No Such Font"], ["owl", "сова"]),  # matplotlib then takes DejaVu Sans
    ],
)
def test_the_picture_has_the_names_that_any_font_of_the_family_can_write(families, shown):
    with matplotlib.rc_context({"font.family": families, "axes.formatter.use_mathtext": True}):
        axes = draw_groups(ClassGrouper([90, 10], 2), [0, 1], 100, 11, "", ["owl", "сова"]).axes[0]
        axes.figure.savefig(io.BytesIO())  # a letter that no font has is a warning, which is an error
    assert [text.get_text() for text in axes.get_xticklabels()] == shown


def test_a_picture_that_cannot_be_drawn_is_refused(tmp_path, counts_file, monkeypatch):
    result = run(counts_file, "--png", tmp_path / "none" / "a.png")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--png: expected a file that can be written" in result.stderr
    for name in [name for name in sys.modules if name.startswith("lgla_losses.plot")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run(counts_file, "--png", tmp_path / "a.png")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "pip install matplotlib" in result.stderr


PRIORS = "0.5\n0.25\n0.25\n"

#: File, content, options, and words of the message in this order.
REFUSED = [
    ("a.txt", "5\n\nabc\n", [], "a.txt, line 3: expected a count, a whole number >= 0, got 'abc'; write one count per line"),
    ("a.txt", "5\n-3\n", [], "line 2: expected .* got '-3'; a class without samples has the count 0"),
    ("a.txt", "5\nnan\n", [], "line 2: expected .* got 'nan'"),
    ("a.txt", "inf\n", [], "line 1: expected .* got 'inf'"),
    ("a.txt", "5\n2.5\n", [], "line 2: expected .* got '2.5'; give the samples of every class"),
    ("a.txt", PRIORS, [], "line 1: .* got '0.5'; .* multiply priors by the number of samples"),
    ("a.txt", "5 7\n", [], "line 1: expected .* got '5 7'; .* CSV"),
    ("a.txt", "9" * 309 + "\n", [], "line 1: expected a count, .* got '9+...9+'; counts are below"),
    ("a.txt", "5\n-" + "9" * 5000, [], "line 2: expected a count, .* got '-9+...9+'; a class without"),
    ("a.json", f"[{'9' * 309}]", [], "entry 1: expected a count, .* got 9+...9+; counts are below"),
    ("a.json", f"[{'9' * 5000}]", [], "a.json: expected JSON, got what cannot be read .* 5000 digits"),
    ("a.txt", "1,000\n2,000\n3,500\n", [], "a.txt, line 1, column '2': expected a count, .* got '000'; write numbers without separators"),
    ("a.txt", "# made today\n1,500\n", [], "line 2: expected one column of counts, got 2 of numbers .* write 1000 for '1,000'"),
    ("a.txt", "1,500\n1,200\n", [], "line 1: expected one column of counts, got 2 of numbers .* write 1000 for '1,000'"),
    ("a.csv", "cat,1,000\ndog,2,500\n", [], "line 1, column '3': expected a count, .* got '000'; .* 1000 for '1,000'"),
    ("a.txt", "12;345\n13;400\n", [], "expected one column of counts, got 2 of numbers"),
    ("a.csv", 'name,count\ncat,"1,000"\ndog,5\nox,6\n', [], "line 2, column 'count': .* 1000 for '1,000'"),
    ("a.txt", "1.000\n2.500\n", [], "line 1: expected a count, .* got '1.000'; write numbers without separators"),
    ("a.txt", "1.000.000\n", [], "line 1: expected a count, .* write numbers without separators"),
    ("a.txt", "1,000\n", ["--kind", "text"], "line 1: expected a count, .* 1000 for '1,000'"),
    ("a.txt", "1e300\n", [], "line 1: expected .* got '1e300'; counts are below"),
    ("a.txt", f"{2**62}\n{2**62}\n", [], r"line 1: .* got '4611686018427387904'; counts are below 2\*\*63, and so is their sum"),
    ("a.txt", "", [], "a.txt: expected class counts, one per line, got an empty file"),
    ("a.txt", "# nothing\n\n", [], "got an empty file"),
    ("a.txt", "0\n0\n", [], "expected a class with samples, got 2 counts that are all 0"),
    ("a.txt", b"12\n5\xff\xfe\n", [], "a.txt, line 2: expected text in UTF-8, got binary data"),
    ("a.txt", b"12\n\n\0\0\0", [], "a.txt, line 3: expected text in UTF-8, got binary data"),
    ("a.csv", "", [], "got an empty file"),
    ("a.csv", ",\n,\n", [], "expected a CSV file with a row for each class, got an empty file"),
    ("a.csv", "name,count\n", [], "expected a row for each class below the header of line 1, got none"),
    ("a.csv", "# x\nname,count\ncat,5\ndog,x\n", [], "line 4, column 'count': expected a count, .* got 'x'"),
    ("a.csv", "cat,5\ndog,6\nox,\n", [], "line 3, column '2': expected a count, .* got ''"),
    ("a.csv", "name,count\ncat,5\ndog\n", [], "line 3: expected 2 columns as in line 1, got 1"),
    ("a.csv", "name,count\ncat,5\ncat,6\n", [], r"line 3: expected every class once, got 'cat' again \(line 2\)"),
    ("a.csv", "a,b\n5,5\n6,5\n", [], "line 1: expected one column of counts, got 2 of numbers .* 'a', 'b'; .*--count-column"),
    ("a.csv", "a,b\nx,y\n", [], "expected one column of counts, got none of numbers"),
    ("a.csv", "a,b\n5,5\n6,5\n", ["--count-column", "c"], "--count-column one of 'a', 'b', or a number 1..2, got 'c'"),
    ("a.csv", "5,5\n6,5\n", ["--name-column", "3", "--count-column", "1"], "for --name-column a number 1..2, got '3'"),
    ("a.csv", 'a,b\n"' + "x" * 200_000 + '",5\n', [], "line 2: expected a row of a CSV file, got field larger"),
    ("a.csv", "path,label\na.png,0\nb.png,1\n", [], "got one of labels among the columns 'path', 'label'; .* --label-column"),
    ("a.csv", "path,animal\na.png,cat\nb.png,cat\n", [], "none of numbers among .*; if a row is a sample, .* --label-column"),
    ("a.csv", "cat,5\ncat,6\n", ["--name-column", "1"], "got 'cat' again .* if a row is a sample, .* --label-column"),
    ("a.csv", "path,label\na.png,cat\nb.png,\n", ["--label-column", "label"], "line 3: expected labels that .* got ''; leave samples without a label out"),
    ("a.csv", "path,label\na.png,0\nb.png,1.5\n", ["--label-column", "label"], "line 3: expected labels that are class numbers, .* got '1.5'"),
    ("a.csv", "path,label\na.png,0\nb.png,cat\n", ["--label-column", "label"], "line 3: expected labels that are class numbers, .* got 'cat'"),
    ("a.csv", f"0\n{'9' * 400}\n", ["--label-column", "1"], "line 2: expected labels that are class numbers, .* got '9+...9+'"),
    ("a.csv", "path,label\na.png,-1\nb.png,0\n", ["--label-column", "2"], "expected labels >= 0, got -1 at line 2"),
    ("a.csv", "0\n500\n", ["--label-column", "1"], "got 500 at line 2 of 2 labels"),
    ("a.csv", "a,b\n1,2\n", ["--label-column", "c"], "for --label-column one of 'a', 'b', or a number 1..2, got 'c'"),
    ("a.csv", "a,b\n1,2\n", ["--label-column", "9" * 5000], "for --label-column a number 1..2, got '9+...9+'"),
    ("a.csv", "a,b\n1,2\n", ["--label-column", "a", "--count-column", "b"], "expected --label-column, or .* got both"),
    ("a.txt", "5\n", ["--label-column", "a"], "expected a source of kind csv with label-column='a'"),
    ("a.json", "", [], "got an empty file"),
    ("a.json", "[1,\n 2,\n", [], "a.json, line 3: expected JSON, got Expecting value"),
    ("a.json", "[5,\n 2.5, 1]", [], "line 2, entry 2: expected a count, .* got 2.5"),
    ("a.json", "[NaN]", [], "line 1, entry 1: expected a count, .* got nan; a class without"),
    ("a.json", "[true]", [], "entry 1: expected .* got True"),
    ("a.json", "[[1, 2]]", [], r"entry 1: expected .* got \[1, 2\]; give a list of counts"),
    ("a.json", '{"cat": 5,\n "dog":\n -1}', [], "line 3, entry 2: expected .* got -1"),
    ("a.json", '{"cat": 5,\n "cat": 6}', [], r"line 2, entry 2: expected every class once, got 'cat' again \(line 1"),
    ("a.json", "{}", [], "expected a JSON list or mapping of counts, got an empty one"),
    ("a.json", "[" * 900 + "]" * 900, [], "entry 1: expected a count, .* got ....* give a list of counts"),
    ("a.json", '"' + "x" * 9999 + '"', [], "mapping of counts, got 'x+...x+'; give"),
    ("a.json", "7", [], "expected a JSON list or mapping of counts, got 7"),
    ("a.json", "[" * 100_000, [], "expected JSON, got what cannot be read"),
    ("a.npy", b"not an array", [], "expected an array of labels, got another file or a damaged one"),
    ("a.npz", b"PK\x03\x04 cut off", [], "expected an array of labels, got another file or a damaged one"),
    ("a.txt", "5\n", ["--key", "y"], "expected a source of kind labels with key='y', got one of kind text"),
    ("a.txt", "5\n", ["--kind", "images"], "a.txt: expected a folder with a folder of images for each class, got a file"),
    ("a.txt", "5\n", ["--few", "200"], "expected 0 <= few <= many, finite, got few = 200 and many = 100"),
    ("a.txt", "5\n", ["--batch-size", "0"], "--batch-size"),
    ("a.txt", "5\n", ["--batch-size", "9" * 400], "--batch-size"),
    ("a.txt", "5\n", ["--kind", "words"], "--kind"),
]  # fmt: skip


def refused(result, words):
    assert result.exit_code == 2
    assert result.stdout == ""
    assert not isinstance(result.exception, Exception)
    assert re.search(words, " ".join(result.stderr.split())), result.stderr


@pytest.mark.parametrize(("name", "content", "options", "words"), REFUSED)
def test_what_cannot_be_read_is_refused_with_file_and_line(tmp_path, name, content, options, words):
    refused(run(write(tmp_path / name, content), "--json", *options), words)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.array([0, 1, -100, 1]), "a.npy: expected labels >= 0, got -100 at position 2; leave ignored"),
        (np.array([0.0, 1.0]), "expected integer labels, got float64; number the classes"),
        (np.array([True, False]), "expected integer labels, got bool"),
        (np.array(["cat", "dog"]), "expected integer labels, got <U3"),
        (np.zeros((3, 4), int), r"expected labels of shape \[N\], got \[3, 4\]; flatten"),
        (np.zeros(0, int), r"expected labels of shape \[N\], got \[0\]"),
        (np.array([500, 300, 100]), "got 500 at position 0 of 3 labels; .* if these are class counts"),
        (np.array([0, 2**62]), "got 4611686018427387904 at position 1 of 2 labels"),
        (np.array([{}, 1], dtype=object), "expected an array of labels, got another"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path, labels, words):
    np.save(tmp_path / "a.npy", labels)
    refused(run(tmp_path / "a.npy"), words)
    refused(
        run(tmp_path / "a.npy", "--key", "y"), "a.npy: expected an .npz file with --key y|expected an array"
    )


def npy(shape, content=b"", descr="|u1"):
    """An array as np.save writes it, but for its content."""
    file = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content


def npz(content, edit=lambda data, here, there: None):
    """An .npz of one array, in which a byte of both its headers may be changed."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train_labels.npy", content)
    data = bytearray(file.getvalue())
    edit(data, data.index(b"PK\x03\x04"), data.index(b"PK\x01\x02"))
    return bytes(data)


def encrypt(data, here, there):
    data[here + 6] |= 1
    data[there + 8] |= 1


def pack_otherwise(data, here, there):
    data[here + 8] = data[there + 10] = 99


DAMAGED = {
    "claims 1e13 labels": ("a.npy", lambda: npy((10**13,), bytes(9)), "10,000,000,000,000 bytes, but there are 9"),
    "claims 1e13 labels in an archive": ("a.npz", lambda: npz(npy((10**13,), bytes(9))), "10,000,000,000,000 bytes, but there are 9"),
    "300 MB of zeros": ("a.npz", lambda: npz(npy((300 * 2**20,), bytes(300 * 2**20))), "train_labels takes 314,572,928 bytes, compressed to"),
    "encrypted": ("a.npz", lambda: npz(npy((3,), b"abc"), encrypt), "is encrypted"),
    "unknown packing": ("a.npz", lambda: npz(npy((3,), b"abc"), pack_otherwise), "compression method"),
    "cut off": ("a.npz", lambda: npz(npy((3,), b"abc"))[:-30], "another file or a damaged one"),
    "cut off array": ("a.npy", lambda: npy((3,), b"ab"), "takes 3 bytes, but there are 2"),
    "negative size": ("a.npy", lambda: npy((-3,), b"ab"), "another file or a damaged one"),
    "later format": ("a.npy", lambda: npy((3,), b"abc").replace(b"NUMPY\x01", b"NUMPY\x03"), "format"),
    "another archive": ("a.npz", lambda: npz(b"no array"), "another file or a damaged one"),
}  # fmt: skip


@pytest.mark.parametrize("fault", DAMAGED)
def test_damaged_and_oversized_arrays_are_refused_before_they_are_read(tmp_path, fault):
    name, make, words = DAMAGED[fault]
    path = write(tmp_path / name, make())
    tracemalloc.start()
    try:
        refused(run(path), f"{name}: expected an array of labels, got .*{words}")
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def test_a_row_a_sample_gives_the_same_numbers(tmp_path, counts_file):
    rows = [(f"{i}.png", number, NAMES[number]) for i, number in enumerate(LABELS)]
    write(tmp_path / "a.csv", csv_text(header=("path", "label", "animal"), rows=rows))
    write(tmp_path / "b.csv", csv_text(";", header=None, rows=[(path, f"{n}.0") for path, n, _ in rows]))
    expected = record(counts_file)
    for name, column in (("a.csv", "label"), ("a.csv", "2"), ("b.csv", "2")):
        found = record(tmp_path / name, "--label-column", column)
        assert "a CSV file of samples with labels in column" in found["source"]["description"]
        assert same_figures(found, json.loads(json.dumps(expected)))
    named = read_class_counts(tmp_path / "a.csv", label_column="animal")
    assert named.names == sorted(NAMES)
    assert dict(zip(named.names, named.counts, strict=True)) == dict(zip(NAMES, COUNTS, strict=True))


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_samples_without_any_number_are_counted_by_name(tmp_path, delimiter):
    rows = [("a, b.png", "ox"), ("c.png", "cat"), ("d.png", "ox")]
    quoted = [(f'"{path}"' if delimiter == "," else path, label) for path, label in rows]
    path = write(tmp_path / "a.csv", csv_text(delimiter, ("path", "species"), quoted))
    found = read_class_counts(path, label_column="species")
    assert (found.names, found.counts) == (["cat", "ox"], [1, 2])


def test_arrays_of_unknown_names_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=LABELS, b=LABELS)
    refused(
        run(tmp_path / "a.npz"), "expected an array 'train_labels' or 'train_y', got 'a', 'b'; name the array"
    )
    refused(run(tmp_path / "a.npz", "--key", "y"), "expected an array 'y', got 'a', 'b'")


def test_missing_unreadable_and_empty_sources_are_refused(tmp_path, counts_file):
    refused(
        run(tmp_path / "none.txt"), "none.txt: expected a file or folder that can be read, got No such file"
    )
    refused(
        run(tmp_path / "none.npy"), "none.npy: expected a file or folder that can be read, got No such file"
    )
    refused(run(tmp_path / "none", "--kind", "images"), "got No such file")
    refused(run(tmp_path, "--kind", "csv"), "got Is a directory")
    refused(run(tmp_path), r"expected a folder of images \(.bmp, .* got 0 folders without images")
    (tmp_path / "cat").mkdir()
    refused(run(tmp_path), "got 1 folders without images")
    if os.geteuid() != 0:  # nothing is unreadable for root
        counts_file.chmod(0)
        refused(run(counts_file), "got Permission denied")


def test_the_function_refuses_as_well():
    reference.assert_raises(
        lambda: inspect_counts([5, -1]), ValueError, "counts", "expected", "got a least of -1"
    )
    reference.assert_raises(lambda: inspect_counts([0, 0]), ValueError, "counts", "got none above 0")
    reference.assert_raises(lambda: inspect_counts([]), ValueError, "counts", "got none above 0")
    reference.assert_raises(
        lambda: inspect_counts([0.5, 0.5]), TypeError, "counts", "expected integers", "float64"
    )
    reference.assert_raises(lambda: inspect_counts([5], ["a", "b"]), ValueError, "names", "1 classes, got 2")
    reference.assert_raises(lambda: inspect_counts([5], few=200), ValueError, "few", "0..many=100", "200")
    reference.assert_raises(lambda: inspect_counts([5], batch_size=0), ValueError, "batch_size", "got 0")


def test_gini_of_one_owner_of_all():
    assert gini_coefficient([0, 0, 0, 9]) == pytest.approx(0.75)
    assert math.isclose(gini_coefficient([4] * 7), 0, abs_tol=1e-12)


def test_zeros_stay_in_what_is_read(tmp_path):
    found = read_class_counts(write(tmp_path / "a.txt", "5\n0\n3\n"))
    assert (found.counts, found.positive, found.names, found.kind) == ([5, 0, 3], [5, 3], None, "text")


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, **options
    )


def test_it_runs_as_a_module(counts_file):
    result = python("-m", "lgla_losses", "inspect", counts_file, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["imbalance_factor"] == 25
    assert result.stderr == ""


def test_without_its_extra_it_says_what_to_install():
    code = """
import runpy, sys
sys.modules["typer"] = None
runpy.run_module("lgla_losses", run_name="__main__")
"""
    result = python("-c", code)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "python -m lgla_losses needs typer: pip install typer rich\n"


def test_the_computation_needs_no_extra():
    code = """
import sys
before = set(sys.modules)
from lgla_losses.inspection import inspect_counts
inspect_counts([5, 4, 3])
print({"typer", "rich", "matplotlib"} & (set(sys.modules) - before))
"""
    assert python("-c", code).stdout == "set()\n"


@pytest.mark.parametrize("name", ["pipe", "pipe.csv", "pipe.npz", "pipe.json"])
def test_a_pipe_is_not_looked_into(tmp_path, name):
    os.mkfifo(tmp_path / name)
    refused(
        run(tmp_path / name), "got a pipe or device, which can be read only once; give its kind by --kind"
    )
    refused(run(tmp_path / name, "--kind", "labels"), "it is a pipe or device, which can be read only once")


def test_a_pipe_in_a_folder_of_images_is_no_image(tmp_path):
    image_folders(tmp_path)
    os.mkfifo(tmp_path / "0_plane" / "pipe.png")
    (tmp_path / "0_plane" / "broken.png").symlink_to(tmp_path / "none")
    assert read_class_counts(tmp_path).counts == COUNTS


def test_a_picture_is_not_written_into_a_pipe(tmp_path, counts_file):
    os.mkfifo(tmp_path / "pipe.png")
    refused(run(counts_file, "--png", tmp_path / "pipe.png"), r"--png: .* \(it is a folder, pipe or device")
    refused(run(counts_file, "--png", tmp_path), r"--png: .* \(it is a folder, pipe or device")


def test_a_picture_that_fails_half_way_leaves_the_old_one(tmp_path, counts_file, monkeypatch):
    def full(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    picture = write(tmp_path / "a.png", b"old")
    monkeypatch.setattr(Path, "write_bytes", full)
    refused(
        run(counts_file, "--png", picture), r"--png: expected a file that can be written, .* \(No space left"
    )
    assert picture.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "counts.txt"]


def test_an_endless_text_is_refused():
    refused(
        run("/dev/zero", "--kind", "text"), "/dev/zero: expected text of at most 268,435,456 bytes, got more"
    )


def test_wrong_arguments_of_the_function_are_named(counts_file):
    reference.assert_raises(
        lambda: read_class_counts(counts_file, "xml"), ValueError, "kind", "'text', 'csv'", "got 'xml'"
    )
    reference.assert_raises(lambda: read_class_counts(counts_file, 3), TypeError, "kind", "got 3")
    reference.assert_raises(lambda: read_class_counts([3, 2]), TypeError, "source", "a path", "[3, 2]")
    reference.assert_raises(
        lambda: read_class_counts("a.csv", count_column=2),
        TypeError,
        "count_column",
        "a text or None",
        "got 2",
    )


def test_version_and_help():
    assert CliRunner().invoke(app, ["--version"]).stdout.strip() == lgla_losses.__version__
    assert "inspect" in CliRunner().invoke(app, ["--help"]).stdout
