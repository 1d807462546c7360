"""Class counts of a CSV file: its cells, the columns that matter, the counts in them."""

from __future__ import annotations

import csv
import reprlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path

import numpy as np

from lgla_losses.inspection import _entries as entries
from lgla_losses.inspection._entries import Found, SourceError, to_number

#: Headings, in lower case, of columns of counts and of names; the first that is found wins.
COUNT_HEADINGS = ("count", "counts", "num_samples", "samples", "num_images", "images", "frequency", "freq")
NAME_HEADINGS = ("name", "class_name", "classname", "class", "category", "label")

#: Headings of labels and class numbers, which are not counts even in the only column of numbers.
LABEL_HEADINGS = (*NAME_HEADINGS, "labels", "target", "targets", "y", "class_id", "category_id", "label_id")

SAMPLES_WAY_OUT = "if a row is a sample, name the column of the labels by --label-column"


@dataclass(frozen=True, eq=False)
class Column:
    """Hold the cells of a column; without a header its heading is its number from 1."""

    number: str
    heading: str
    cells: tuple[str, ...]

    @property
    def is_numeric(self) -> bool:
        """Tell whether most cells are numbers."""
        return 2 * _count_numbers(self.cells) > len(self.cells)

    @cached_property
    def order(self) -> list[int]:
        """Sort the rows by the cells, if these are class numbers."""
        return entries.class_order(self.cells)


@dataclass(frozen=True)
class Table:
    """Hold a CSV file by column; ``lines`` are the line numbers of the rows, a header's included."""

    path: Path
    columns: list[Column]
    lines: list[int]

    def where(self, row: int) -> str:
        """Give the line of a row of cells."""
        return f"line {self.lines[row - len(self.columns[0].cells)]}"

    def headed(self, headings: Sequence[str]) -> list[Column]:
        """Find the columns with one of these headings, in the order of the headings."""
        return [column for one in headings for column in self.columns if column.heading.lower() == one]

    def asked(self, option: str, name: str) -> Column:
        """Find the column of a heading, or of a number from 1."""
        found = [column for column in self.columns if column.heading == name]
        found = found or [column for column in self.columns if column.number == name]
        if len(found) == 1:
            return found[0]
        headings = ", ".join(repr(one.heading) for one in self.columns if one.heading != one.number)
        choice = f"one of {headings}, or " if headings else ""
        raise SourceError(
            f"{self.path}: expected for --{option} {choice}a number 1..{len(self.columns)}, got "
            f"{reprlib.repr(name)}"
        )


def read_csv(
    path: Path, *, count_column: str | None, name_column: str | None, label_column: str | None
) -> Found:
    """Read class counts from a row for each class, or count the labels of a row for each sample.

    Raises:
        OSError: the file cannot be read.
        SourceError: the file is no such table, or it is not clear which column is meant.
    """
    asked = [name for name in (count_column, name_column) if name is not None]
    if label_column is None:
        return _read_classes(_read_table(path, asked), count_column, name_column)
    if not asked:
        return _read_samples(_read_table(path, [label_column], of_samples=True), label_column)
    raise SourceError(
        f"{path}: expected --label-column, or --count-column and --name-column, got both; a row is "
        "either a sample or a class"
    )


def _read_table(path: Path, asked: Sequence[str], of_samples: bool = False) -> Table:
    lines = entries.text_lines(path)
    above = len(list(takewhile(lambda line: not line.strip() or line.lstrip().startswith("#"), lines)))
    lines[:above] = ["\n"] * above  # comments
    rows = _split(path, lines, _delimiter("".join(lines[above : above + 1])))
    if not rows:
        raise SourceError(f"{path}: expected a CSV file with a row for each class, got an empty file")

    begin, first = rows[0]
    for line, row in rows:
        if len(row) != len(first):
            raise SourceError(
                f"{path}, line {line}: expected {len(first)} columns as in line {begin}, got {len(row)}; "
                "fill empty cells, and quote names that contain the delimiter"
            )

    has_header = _is_header(first, asked, of_samples)
    if len(rows) == has_header:
        raise SourceError(f"{path}: expected a row for each class below the header of line {begin}, got none")
    numbers = [str(number) for number in range(1, len(first) + 1)]
    cells = zip(*(row for _, row in rows[has_header:]), strict=True)
    columns = list(map(Column, numbers, first if has_header else numbers, cells))
    return Table(path, columns, [line for line, _ in rows])


def _delimiter(line: str) -> str:
    """Guess the delimiter: names may contain commas, but no tabs."""
    return "\t" if "\t" in line else max(";,", key=line.count)


def _split(path: Path, lines: Sequence[str], delimiter: str) -> list[tuple[int, list[str]]]:
    """Give the rows that are not blank, each with its line number."""
    reader = csv.reader(lines, delimiter=delimiter)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise SourceError(
            f"{path}, line {reader.line_num}: expected a row of a CSV file, got {error}; check its quotes"
        ) from error
    return [(line, row) for line, row in rows if any(row)]


def _is_header(row: Sequence[str], asked: Sequence[str], of_samples: bool) -> bool:
    if of_samples and asked[0].isdecimal():
        # Labels may be words, so only a known heading is a header.
        return any(cell.lower() in LABEL_HEADINGS for n, cell in enumerate(row, 1) if str(n) == asked[0])
    return any(name in row and not name.isdecimal() for name in asked) or not _count_numbers(row)


def _read_classes(table: Table, count_column: str | None, name_column: str | None) -> Found:
    count = _count_column(table) if count_column is None else table.asked("count-column", count_column)
    name = _name_column(table, count) if name_column is None else table.asked("name-column", name_column)

    counts = entries.whole_numbers(
        table.path,
        count.cells,
        lambda row: f"{table.where(row)}, column {count.heading!r}",
        f"name the column of the counts by --count-column; {SAMPLES_WAY_OUT}",
    )
    description = f"a CSV file with counts in column {count.heading!r}"

    names = None
    if name is not None:
        names = list(name.cells)
        way_out = f"add up their counts, or name another column by --name-column; {SAMPLES_WAY_OUT}"
        entries.check_unique(table.path, names, table.where, way_out)
        description += f" and names in column {name.heading!r}"

    numbering = [column for column in table.columns if column is not count and column.order]
    if len(numbering) == 1:
        order = numbering[0].order
        counts, names = [counts[row] for row in order], names and [names[row] for row in order]
        description += f", classes in the order of column {numbering[0].heading!r}"
    return counts, names, description


def _count_column(table: Table) -> Column:
    """Find the column of counts: by its heading, else the only column of numbers that are not labels."""
    numeric = [column for column in table.columns if column.is_numeric]
    unlabelled = [column for column in numeric if column.heading.lower() not in LABEL_HEADINGS]
    candidates = table.headed(COUNT_HEADINGS) or unlabelled
    if len(candidates) > 1:
        candidates = [column for column in candidates if not column.order]
    if len(candidates) == 1:
        return candidates[0]

    got = {0: "none of numbers", 1: "one of labels"}.get(len(numeric), f"{len(numeric)} of numbers")
    raise SourceError(
        f"{table.path}, line {table.lines[0]}: expected one column of counts, got {got} among the columns "
        f"{', '.join(repr(column.heading) for column in table.columns)}; name it by --count-column, "
        f"and write 1000 for '1,000'; {SAMPLES_WAY_OUT}"
    )


def _name_column(table: Table, count: Column) -> Column | None:
    """Find the column of names: by its heading, else the only column of different texts."""
    headed = [column for column in table.headed(NAME_HEADINGS) if column is not count]
    others = [column for column in table.columns if column is not count and not column.is_numeric]
    candidates = headed[:1] or [one for one in others if len(set(one.cells)) == len(one.cells)]
    return candidates[0] if len(candidates) == 1 else None


def _read_samples(table: Table, label_column: str) -> Found:
    column = table.asked("label-column", label_column)
    description = f"a CSV file of samples with labels in column {column.heading!r}"

    are_names = _count_numbers(column.cells) == 0
    for row, label in enumerate(column.cells):
        number = to_number(label)
        is_class = number is not None and abs(number) < 2**63 and number == int(number)
        if not (label if are_names else is_class):
            raise SourceError(
                f"{table.path}, {table.where(row)}: expected labels that are class numbers, or all of them "
                f"names, got {reprlib.repr(label)}; leave samples without a label out"
            )

    if are_names:
        names = sorted(set(column.cells))
        found = Counter(column.cells)
        return [found[name] for name in names], names, description
    labels = np.array([to_number(label) for label in column.cells], np.int64)
    return entries.count_labels(f"{table.path}", labels, table.where), None, description


def _count_numbers(cells: Sequence[str]) -> int:
    return sum(to_number(cell) is not None for cell in cells)
