"""Class counts from what people have: a text, CSV or JSON file, an array of labels, a folder of images."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lgla_losses._checks import describe, one_of
from lgla_losses._labels import count_classes
from lgla_losses.data.arrays import array_names, read_array
from lgla_losses.data.text import read_lines

#: Endings of what counts as an image in a folder.
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}

#: Arrays of an .npz that are taken for the labels where none is named.
LABEL_KEYS = ("train_labels", "train_y")

#: Headings, in lower case, that say what a column of a CSV file holds; of several names the first wins.
COUNT_HEADINGS = ("count", "counts", "num_samples", "samples", "num_images", "images", "frequency", "freq")
NAME_HEADINGS = ("name", "class_name", "classname", "class", "category", "label")

#: Headings of what is a label or a class number and no count, though it may be the only column of numbers.
LABEL_HEADINGS = (*NAME_HEADINGS, "labels", "target", "targets", "y", "class_id", "category_id", "label_id")

#: Tried in this order; the one that leaves most cells numbers is the file's.
DELIMITERS = ",\t;"

ZERO_WAY_OUT = "a class without samples has the count 0"
SAMPLES_WAY_OUT = "with one row a sample, --label-column says which column holds the labels"
THOUSANDS_WAY_OUT = "write numbers without separators, 1000 for '1,000'"

#: Numbers with a mark after the thousands.
SEPARATED = re.compile(r"\d{1,3}([,.' \u00a0\u2009\u202f]\d{3})+")

#: Labels that are counted at once.
BLOCK = 1 << 24


class SourceError(ValueError):
    """What was given as class counts cannot be read as such; the message says where and why."""


class Kind(StrEnum):
    """What a source is."""

    TEXT = "text"
    CSV = "csv"
    JSON = "json"
    LABELS = "labels"
    IMAGES = "images"


@dataclass(frozen=True)
class ClassCounts:
    """Samples per class, zeros included, and how they were found."""

    counts: list[int]
    names: list[str] | None
    kind: Kind
    description: str

    @property
    def positive(self) -> list[int]:
        """The counts without those of classes that have no samples, as the losses take them."""
        return [count for count in self.counts if count > 0]


def read_class_counts(
    source: str | os.PathLike[str],
    kind: str | None = None,
    *,
    key: str | None = None,
    count_column: str | None = None,
    name_column: str | None = None,
    label_column: str | None = None,
) -> ClassCounts:
    """Read class counts.

    Args:
        source: a text file with one count a line (``#`` begins a comment); a CSV file with a row a class, a
            column of counts and perhaps one of names, or with a row a sample and a column of labels; a JSON
            list of counts or mapping of names to counts; an ``.npy`` or ``.npz`` file of integer labels; a
            folder with one folder of images a class, or with ``train/`` that has them.
        kind: ``"text"``, ``"csv"``, ``"json"``, ``"labels"`` or ``"images"``; None goes by the ending and the
            content.
        key: the array of labels in an ``.npz``; None takes ``train_labels``, ``train_y`` or the only array.
        count_column: heading of the counts in a CSV file, or its number from 1; None finds it.
        name_column: heading of the names, or its number from 1; None finds it if there is one.
        label_column: heading of the labels in a CSV file with a row a sample, or its number from 1. Whole
            numbers are classes counted from 0; other labels name them, in sorted order.

    Raises:
        SourceError: a ``ValueError`` that names file, line, what was expected, what came and the way out.
        TypeError: ``source`` is no path, or ``kind`` no text.
        ValueError: ``kind`` is another word.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source: expected a path, got {describe(source)}; LGLALoss takes counts as they are")
    path = Path(source)
    if kind is not None:
        kind = one_of("kind", kind, [str(one) for one in Kind])
    try:
        found = detect_kind(path) if kind is None else Kind(kind)
        columns = {"count_column": count_column, "name_column": name_column, "label_column": label_column}
        _check_options(path, found, key=key, **columns)
        match found:
            case Kind.TEXT:
                return _read_text(path)
            case Kind.CSV:
                return _read_csv(path, **columns)
            case Kind.JSON:
                return _read_json(path)
            case Kind.LABELS:
                return _read_labels(path, key)
            case Kind.IMAGES:
                return _read_images(path)
    except OSError as error:
        raise SourceError(
            f"{error.filename or path}: expected a file or folder that can be read, got "
            f"{error.strerror or error}; check the path and its permissions"
        ) from error


def detect_kind(path: Path) -> Kind:
    """What a source is, by its ending, else by its content."""
    if path.is_dir():
        return Kind.IMAGES
    if path.exists() and not path.is_file():
        raise SourceError(
            f"{path}: expected a file or folder, got a pipe or device, which can be read only once; say by "
            "--kind what it holds"
        )
    by_suffix = {
        ".csv": Kind.CSV, ".tsv": Kind.CSV, ".json": Kind.JSON, ".npy": Kind.LABELS, ".npz": Kind.LABELS
    }  # fmt: skip
    if path.suffix.lower() in by_suffix:
        return by_suffix[path.suffix.lower()]
    with path.open("rb") as file:
        begin = file.read(1 << 16)
    if begin.startswith((b"\x93NUMPY", b"PK\x03\x04")):
        return Kind.LABELS
    lines = (line.split(b"#")[0].strip() for line in begin.removeprefix(b"\xef\xbb\xbf").splitlines())
    first = next(filter(None, lines), b"")
    if first.startswith((b"[", b"{")):
        return Kind.JSON
    return Kind.CSV if any(mark.encode() in first for mark in DELIMITERS) else Kind.TEXT


def _check_options(path: Path, kind: Kind, **options: str | None) -> None:
    """Refuse options that say nothing about this kind, as they show a misunderstanding."""
    for name, value in options.items():
        of_kind = Kind.LABELS if name == "key" else Kind.CSV
        option = name.replace("_", "-")
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name}: expected a text or None, got {describe(value)}")
        if value is not None and kind != of_kind:
            raise SourceError(
                f"{path}: expected a source of kind {of_kind} with {option}={value!r}, got one of kind "
                f"{kind}; leave {option} out, or say kind={of_kind}"
            )


def _read_text(path: Path) -> ClassCounts:
    cells = []
    for number, line in enumerate(_lines(path), start=1):
        content = line.partition("#")[0].strip()
        if content:
            cells.append((number, content))
    if not cells:
        raise SourceError(f"{path}: expected class counts, one a line, got an empty file")
    counts = _whole_numbers(
        path,
        [content for _, content in cells],
        lambda entry: f"line {cells[entry][0]}",
        "one count a line; # begins a comment, and names with counts go into a CSV file",
    )
    return ClassCounts(counts, None, Kind.TEXT, "a text file of class counts, one a line")


@dataclass(frozen=True)
class _Table:
    """The cells of a CSV file by column, its headings if there are any, and the line of every row."""

    columns: list[list[str]]
    header: list[str] | None
    lines: list[int]
    begin: int
    delimiter: str

    @property
    def shown(self) -> list[str]:
        """What the columns are called."""
        return self.header or [str(number) for number in range(1, len(self.columns) + 1)]


def _read_csv(
    path: Path, *, count_column: str | None, name_column: str | None, label_column: str | None
) -> ClassCounts:
    if label_column is not None:
        if count_column is not None or name_column is not None:
            raise SourceError(
                f"{path}: expected --label-column, or --count-column and --name-column, got both; a row is "
                "either a sample or a class"
            )
        return _read_samples(path, label_column)

    def is_header(row: list[str]) -> bool:
        asked = (column for column in (count_column, name_column) if not (column or "0").isdecimal())
        return any(column in row for column in asked) or not any(map(_is_number, row))

    table = _csv_table(path, is_header)
    count = _count_column(path, table, count_column)
    name = _name_column(path, table, name_column, count)
    names = None if name is None else table.columns[name]

    counts = _whole_numbers(
        path,
        table.columns[count],
        lambda entry: f"line {table.lines[entry]}, column {table.shown[count]!r}",
        f"say by --count-column which column holds the counts; {SAMPLES_WAY_OUT}",
    )
    if names is not None:
        way_out = f"add the counts up, or name another column by --name-column; {SAMPLES_WAY_OUT}"
        _check_unique(path, names, lambda entry: f"line {table.lines[entry]}", way_out)
    description = f"a CSV file with counts in column {table.shown[count]!r}"
    if name is not None:
        description += f" and names in column {table.shown[name]!r}"

    numbering = [c for c, cells in enumerate(table.columns) if c != count and _class_order(cells)]
    if len(numbering) == 1:
        description += f", classes in the order of column {table.shown[numbering[0]]!r}"
        order = _class_order(table.columns[numbering[0]])
        counts, names = [counts[row] for row in order], names and [names[row] for row in order]
    return ClassCounts(counts, names, Kind.CSV, description)


def _read_samples(path: Path, label_column: str) -> ClassCounts:
    def is_header(row: list[str]) -> bool:
        if not label_column.isdecimal():
            return True
        label = row[_asked_column(path, "label-column", label_column, None, len(row))]
        return label.lower() in LABEL_HEADINGS

    table = _csv_table(path, is_header)
    column = _asked_column(path, "label-column", label_column, table.header, len(table.columns))
    labels = table.columns[column]
    description = f"a CSV file of samples with labels in column {table.shown[column]!r}"

    def where(entry: int) -> str:
        return f"line {table.lines[entry]}"

    if "" in labels:
        raise SourceError(
            f"{path}, {where(labels.index(''))}: expected a label in column {table.shown[column]!r}, got an "
            "empty cell; leave samples without a label out"
        )
    numbers = [_number(label) for label in labels]
    if not any(number is not None for number in numbers):
        found = Counter(labels)
        names = sorted(found)
        return ClassCounts([found[name] for name in names], names, Kind.CSV, description)
    for entry, number in enumerate(numbers):
        if number is None or not abs(number) < 2**63 or number != int(number):
            raise SourceError(
                f"{path}, {where(entry)}: expected labels that are class numbers, or all of them names, got "
                f"{reprlib.repr(labels[entry])}"
            )
    array = np.array([int(number) for number in numbers if number is not None])
    return ClassCounts(_count_labels(f"{path}", array, where), None, Kind.CSV, description)


def _csv_table(path: Path, is_header: Callable[[list[str]], bool]) -> _Table:
    delimiter, rows = _csv_rows(path)
    begin, header = rows[0][0], None
    if is_header(rows[0][1]):
        header = rows.pop(0)[1]
    if not rows:
        raise SourceError(f"{path}: expected a row a class below the header of line {begin}, got none")
    columns = [list(column) for column in zip(*(cells for _, cells in rows), strict=True)]
    return _Table(columns, header, [line for line, _ in rows], begin, delimiter)


def _count_column(path: Path, table: _Table, asked: str | None) -> int:
    if asked is not None:
        return _asked_column(path, "count-column", asked, table.header, len(table.columns))
    if table.header is None and table.delimiter == "," and _has_separators(table.columns):
        raise SourceError(
            f"{path}, line {table.begin}: expected counts, got what looks like numbers with a comma after "
            f"the thousands; {THOUSANDS_WAY_OUT}, or say by --count-column which column holds the counts"
        )
    numeric = [c for c, cells in enumerate(table.columns) if 2 * sum(map(_is_number, cells)) > len(cells)]
    labels = _headed(table.header, LABEL_HEADINGS)
    candidates = _headed(table.header, COUNT_HEADINGS) or [c for c in numeric if c not in labels]
    if len(candidates) > 1:
        candidates = [c for c in candidates if not _class_order(table.columns[c])]
    if len(candidates) != 1:
        got = f"{len(numeric)} of numbers among " if len(numeric) > 1 else "none of numbers among "
        if len(numeric) == 1:
            got = "one of labels among "
        raise SourceError(
            f"{path}, line {table.begin}: expected one column of counts, got {got}the columns "
            f"{', '.join(map(repr, table.shown))}; say which it is by --count-column; {SAMPLES_WAY_OUT}"
        )
    return candidates[0]


def _name_column(path: Path, table: _Table, asked: str | None, count: int) -> int | None:
    if asked is not None:
        return _asked_column(path, "name-column", asked, table.header, len(table.columns))
    headed = [c for c in _headed(table.header, NAME_HEADINGS) if c != count]
    unnamed = [
        c
        for c, cells in enumerate(table.columns)
        if c != count and len(set(cells)) == len(cells) and 2 * sum(map(_is_number, cells)) <= len(cells)
    ]
    candidates = headed[:1] or unnamed
    return candidates[0] if len(candidates) == 1 else None


def _has_separators(columns: Sequence[Sequence[str]]) -> bool:
    """Whether two columns without headings are one of numbers such as 1,000, and no class with its count."""
    for first, rest in pairwise(columns):
        if not all(cell.isdecimal() and len(cell) <= 3 for cell in first):
            continue
        three_digits = all(cell.isdecimal() and len(cell) == 3 for cell in rest)
        filled = any(cell.startswith("0") for cell in rest)
        numbered = len(first) > 1 and bool(_class_order(first))
        if three_digits and (filled or not numbered):
            return True
    return False


def _csv_rows(path: Path) -> tuple[str, list[tuple[int, list[str]]]]:
    """The delimiter, and the rows that are not blank with the line of each; comments may stand before."""
    lines = _lines(path)
    skipped = 0
    for line in lines:
        if line.strip() and not line.lstrip().startswith("#"):
            break
        skipped += 1

    def parse(delimiter: str) -> Iterable[tuple[int, list[str]]]:
        reader = csv.reader(lines[skipped:], delimiter=delimiter)
        try:
            for row in reader:
                cells = [cell.strip() for cell in row]
                if any(cells):
                    yield skipped + reader.line_num, cells
        except csv.Error as error:
            raise SourceError(
                f"{path}, line {skipped + reader.line_num}: expected a row of a CSV file, got {error}; "
                "check its quotes"
            ) from error

    delimiter = max(DELIMITERS, key=lambda mark: sum(_is_number(c) for _, row in parse(mark) for c in row))
    rows = list(parse(delimiter))
    if not rows:
        raise SourceError(f"{path}: expected a CSV file with a row a class, got an empty file")
    begin, width = rows[0][0], len(rows[0][1])
    for number, row in rows:
        if len(row) != width:
            raise SourceError(
                f"{path}, line {number}: expected {width} columns as in line {begin}, got {len(row)}; "
                f"fill empty cells, and quote names that hold {delimiter!r}"
            )
    return delimiter, rows


def _headed(header: list[str] | None, headings: Sequence[str]) -> list[int]:
    """The columns with such a heading, in the order of the headings."""
    lower = [heading.lower() for heading in header or []]
    return [c for heading in headings for c, cell in enumerate(lower) if cell == heading]


def _asked_column(path: Path, option: str, asked: str, header: list[str] | None, width: int) -> int:
    if header is not None and header.count(asked) == 1:
        return header.index(asked)
    # Python refuses to read numbers of thousands of digits.
    if asked.isdecimal() and len(asked) < 9 and 1 <= int(asked) <= width:
        return int(asked) - 1
    headings = f"one of {', '.join(map(repr, header))}, or " if header else ""
    raise SourceError(
        f"{path}: expected for --{option} {headings}a number 1..{width}, got {reprlib.repr(asked)}"
    )


def _read_json(path: Path) -> ClassCounts:
    text = "".join(_lines(path))
    if not text.strip():
        raise SourceError(f"{path}: expected a JSON list or mapping of counts, got an empty file")
    way_out = "give a list of counts or a mapping of names to counts"
    try:
        # Pairs as tuples keep names that are given twice.
        content = json.loads(text, object_pairs_hook=tuple)
    except json.JSONDecodeError as error:
        raise SourceError(
            f"{path}, line {error.lineno}: expected JSON, got {error.msg}; {way_out}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: expected JSON, got what cannot be read ({error}); {way_out}") from error
    if not isinstance(content, list | tuple) or not content:
        got = "an empty one" if content in ([], ()) else reprlib.repr(content)
        raise SourceError(f"{path}: expected a JSON list or mapping of counts, got {got}; {way_out}")

    def where(entry: int) -> str:
        return f"line {_json_line(text, entry, isinstance(content, tuple))}, entry {entry + 1}"

    if isinstance(content, list):
        counts = _whole_numbers(path, content, where, way_out)
        return ClassCounts(counts, None, Kind.JSON, "a JSON list of class counts")
    names = [key for key, _ in content]
    _check_unique(path, names, where, "add the counts up")
    counts = _whole_numbers(path, [value for _, value in content], where, way_out)
    order = _class_order(names)
    description = "a JSON mapping of class names to counts"
    if order:
        description = "a JSON mapping of class numbers to counts"
        counts, names = [counts[entry] for entry in order], [names[entry] for entry in order]
    return ClassCounts(counts, names, Kind.JSON, description)


def _json_line(text: str, entry: int, is_mapping: bool) -> int:
    """The line of an entry's value; the parser of the standard library does not keep it."""
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,:]*")

    def skip(position: int) -> int:
        gap = between.match(text, position)
        return gap.end() if gap else position

    position = skip(re.search(r"[\[{]", text).end())  # type: ignore[union-attr]  # it was parsed
    values = entry * (1 + is_mapping) + is_mapping
    for _ in range(values):
        _, end = decoder.raw_decode(text, position)
        position = skip(end)
    return text.count("\n", 0, position) + 1


def _read_labels(path: Path, key: str | None) -> ClassCounts:
    try:
        keys = array_names(path)
        if keys is not None:
            key = _label_key(path, keys, key)
        elif key is not None:
            raise SourceError(f"{path}: expected an .npz file with --key {key}, got a single array")
        loaded = read_array(path, key)
    except SourceError:
        raise
    except ValueError as error:
        raise SourceError(
            f"{path}: expected an array of labels, got another or a damaged file ({error}); "
            "save integer labels [N] by np.save or np.savez"
        ) from error
    described = f"{path}" if key is None else f"{path}, array {key!r}"
    if not np.issubdtype(loaded.dtype, np.integer):
        raise SourceError(
            f"{described}: expected integer labels, got {loaded.dtype}; number the classes, as by "
            "np.unique(labels, return_inverse=True)[1]; class counts go into a text file, one a line"
        )
    if loaded.ndim != 1 or loaded.size == 0:
        raise SourceError(
            f"{described}: expected labels of shape [N], got {list(loaded.shape)}; flatten them, or take "
            "the argmax(axis=1) of one-hot rows"
        )
    counts = _count_labels(described, loaded, lambda position: f"position {position}")
    what = "an array of labels" if key is None else f"the labels in the array {key!r}"
    return ClassCounts(counts, None, Kind.LABELS, what)


def _count_labels(
    described: str, labels: npt.NDArray[np.integer[Any]], where: Callable[[int], str]
) -> list[int]:
    """The samples of every class ``0..max`` from their class numbers ``[N]``."""
    low, high = int(labels.argmin()), int(labels.argmax())
    if labels[low] < 0:
        raise SourceError(
            f"{described}: expected labels >= 0, got {labels[low]} at {where(low)}; leave ignored samples "
            "out, as by labels[labels >= 0]"
        )
    if labels[high] >= labels.size and labels[high] > 0:
        raise SourceError(
            f"{described}: expected labels of classes with a sample each or more on average, got "
            f"{labels[high]} at {where(high)} of {labels.size} labels; leave ignored samples out, or, if "
            "these are class counts, write them into a text file, one a line"
        )
    num_classes = int(labels[high]) + 1
    counts = np.zeros(num_classes, np.int64)
    # Small integers would be copied to large ones all at once.
    size = max(BLOCK, num_classes)
    for start in range(0, labels.size, size):
        counts += count_classes(labels[start : start + size].astype(np.int64), num_classes).numpy()
    found: list[int] = counts.tolist()
    return found


def _label_key(path: Path, keys: list[str], key: str | None) -> str:
    if key is not None and key in keys:
        return key
    known = [name for name in LABEL_KEYS if name in keys] or (keys if len(keys) == 1 else [])
    if key is None and known:
        return known[0]
    wanted = " or ".join(map(repr, LABEL_KEYS)) if key is None else repr(key)
    raise SourceError(
        f"{path}: expected an array {wanted}, got {', '.join(map(repr, keys)) or 'none'}; "
        "say by --key which array holds the labels"
    )


def _read_images(root: Path) -> ClassCounts:
    if not root.is_dir():
        os.stat(root)  # says what is wrong with the path
        raise SourceError(f"{root}: expected a folder with one folder of images a class, got a file")
    # A class may be called train too: its folder holds images, not folders.
    train = root / "train"
    folder = train if train.is_dir() and _class_folders(train) else root
    classes = _class_folders(folder)
    counts = [sum(1 for _ in _images_below(one)) for one in classes]
    if not any(counts):
        raise SourceError(
            f"{folder}: expected one folder of images ({', '.join(sorted(IMAGE_SUFFIXES))}) a class, got "
            f"{len(classes)} folders without images; give the folder that holds those of the classes, "
            "or the one with train/ in it"
        )
    what = "a folder of images, a folder a class" + (", in train/" if folder == train else "")
    return ClassCounts(counts, [one.name for one in classes], Kind.IMAGES, what)


def _class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images_below(folder: Path) -> Iterable[str]:
    folders = [os.fspath(folder)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for one in entries:
                is_named = os.path.splitext(one.name)[1].lower() in IMAGE_SUFFIXES and one.name[0] != "."
                if one.is_dir(follow_symlinks=False):
                    folders.append(one.path)
                elif is_named and one.is_file():  # and no pipe or broken link
                    yield one.name


def _lines(path: Path) -> list[str]:
    try:
        return read_lines(path)
    except ValueError as error:
        raise SourceError(str(error)) from error


def _number(raw: Any) -> int | float | None:
    """A number of a file, in full precision where it is whole; None if it is none."""
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        return None
    for kind in (int, float):
        try:
            return kind(raw) if isinstance(raw, str) else raw
        except ValueError:
            continue
    return None


def _is_number(cell: str) -> bool:
    return _number(cell) is not None


def _whole_numbers(path: Path, raw: Sequence[Any], where: Callable[[int], str], way_out: str) -> list[int]:
    """The counts, or an error about the first that is none."""
    numbers = [_number(value) for value in raw]
    for entry, number in enumerate(numbers):
        if number is None:
            separated = isinstance(raw[entry], str) and SEPARATED.fullmatch(raw[entry])
            problem, advice = "", THOUSANDS_WAY_OUT if separated else way_out
        elif number >= 2**63:
            problem, advice = "", "counts are below 2**63"
        elif number < 0 or not math.isfinite(number):
            problem, advice = "", ZERO_WAY_OUT
        elif number != int(number):
            valid = [n for n in numbers if n is not None and 0 <= n <= 1]
            is_prior = len(valid) == len(numbers) and math.isclose(math.fsum(valid), 1, abs_tol=1e-3)
            problem = " (the numbers sum to 1, as priors do)" if is_prior else ""
            advice = (
                "multiply priors by the number of samples and round: shots and batches need counts"
                if is_prior
                else "give the samples of every class before any weighting"
            )
        else:
            continue
        raise SourceError(
            f"{path}, {where(entry)}: expected a count, a whole number >= 0, got "
            f"{reprlib.repr(raw[entry])}{problem}; {advice}"
        )
    counts = [int(number) for number in numbers if number is not None]
    if not any(counts):
        raise SourceError(f"{path}: expected a class with samples, got {len(counts)} counts that are all 0")
    if sum(counts) >= 2**63:
        raise SourceError(
            f"{path}: expected counts whose sum is below 2**63, got {sum(counts):.3g}; "
            "divide all by one number"
        )
    return counts


def _class_order(cells: Sequence[str]) -> list[int]:
    """How to sort entries by class numbers that are 0..C-1 or 1..C in any order; others give nothing."""
    if not all(cell.isdecimal() and len(cell) < 19 for cell in cells):
        return []
    numbers = [int(cell) for cell in cells]
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    start = numbers[order[0]]
    consecutive = all(numbers[entry] == start + place for place, entry in enumerate(order))
    return order if consecutive and start in (0, 1) else []


def _check_unique(path: Path, names: Sequence[str], where: Callable[[int], str], way_out: str) -> None:
    first: dict[str, int] = {}
    for entry, name in enumerate(names):
        if name in first:
            raise SourceError(
                f"{path}, {where(entry)}: expected every class once, got {name!r} again "
                f"({where(first[name])}); {way_out}"
            )
        first[name] = entry
