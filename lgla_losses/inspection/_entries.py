"""Counts, names and labels, entry by entry: shared by text, CSV, JSON and arrays."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lgla_losses._labels import count_classes
from lgla_losses.data.text import read_lines

#: The content of a source: samples per class, the names of the classes if any, what the source was taken for.
Found: TypeAlias = tuple[list[int], list[str] | None, str]

#: Numbers with a separator of thousands, or the part that remains where a comma ended the cell.
SEPARATED = re.compile(r"\d{1,3}([,.' \u00a0\u2009\u202f]\d{3})+|0\d+")


class SourceError(ValueError):
    """Say where and why a source of class counts cannot be read."""


def text_lines(path: Path) -> list[str]:
    """Read the lines of a text file; other files raise a :class:`SourceError`."""
    try:
        return read_lines(path)
    except ValueError as error:
        raise SourceError(str(error)) from error


def to_number(raw: Any) -> int | float | None:
    """Give the number in a cell or a JSON value, None if there is none."""
    if isinstance(raw, str):
        with suppress(ValueError):
            return float(raw)
    return raw if type(raw) in (int, float) else None


def whole_numbers(path: Path, raw: Sequence[Any], where: Callable[[int], str], way_out: str) -> list[int]:
    """Give the counts in cells or JSON values; ``where`` gives the place of an entry.

    Raises:
        SourceError: an entry is no count, with ``way_out`` if it is no number; or no class has samples.
    """
    numbers = [to_number(value) for value in raw]
    for entry, number in enumerate(numbers):
        if isinstance(raw[entry], str) and SEPARATED.fullmatch(raw[entry]):
            advice = "write numbers without separators, 1000 for '1,000'"
        elif number is None:
            advice = way_out
        elif number >= 2**63 / len(numbers):
            advice = "counts are below 2**63, and so is their sum"
        elif not number >= 0:  # NaN is neither
            advice = "a class without samples has the count 0"
        elif number != int(number):
            advice = (
                "give the samples of every class before weighting; multiply priors by the number of "
                "samples and round"
            )
        else:
            continue
        raise SourceError(
            f"{path}, {where(entry)}: expected a count, a whole number >= 0, got "
            f"{reprlib.repr(raw[entry])}; {advice}"
        )

    if not any(numbers):
        raise SourceError(f"{path}: expected a class with samples, got {len(numbers)} counts that are all 0")
    return [int(number) for number in numbers if number is not None]


def count_labels(
    described: str, labels: npt.NDArray[np.integer[Any]], where: Callable[[int], str]
) -> list[int]:
    """Count the samples of every class ``0..max`` from their class numbers ``[N]``.

    Raises:
        SourceError: a class number is negative, or too large for so few labels.
    """
    low, high = int(labels.argmin()), int(labels.argmax())
    if labels[low] < 0:
        raise SourceError(
            f"{described}: expected labels >= 0, got {labels[low]} at {where(low)}; leave ignored samples "
            "out, by labels[labels >= 0]"
        )
    if labels[high] >= max(labels.size, 1):
        raise SourceError(
            f"{described}: expected labels with at least one sample per class on average, got "
            f"{labels[high]} at {where(high)} of {labels.size} labels; leave ignored samples out; if "
            "these are class counts, write them into a text file, one per line"
        )
    counts: list[int] = count_classes(labels, int(labels[high]) + 1).tolist()
    return counts


def class_order(cells: Sequence[str]) -> list[int]:
    """Sort entries by class numbers, 0..C-1 or 1..C in any order; for other cells give nothing."""
    if len(cells) < 2 or not all(cell.isdecimal() and len(cell) < 19 for cell in cells):
        return []
    numbers = list(map(int, cells))
    start = min(numbers)
    is_numbering = start < 2 and sorted(numbers) == list(range(start, start + len(numbers)))
    return sorted(range(len(numbers)), key=numbers.__getitem__) if is_numbering else []


def check_unique(path: Path, names: Sequence[str], where: Callable[[int], str], way_out: str) -> None:
    """Raise a :class:`SourceError` where a class is named twice."""
    first: dict[str, int] = {}
    for entry, name in enumerate(names):
        if first.setdefault(name, entry) != entry:
            raise SourceError(
                f"{path}, {where(entry)}: expected every class once, got {name!r} again "
                f"({where(first[name])}); {way_out}"
            )
