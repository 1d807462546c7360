"""An inspection for people: ``pip install typer rich``.

No number is ever cut: in a narrow terminal the names of classes are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from lgla_losses.inspection.report import ClassInfo, Grouping, Inspection, class_label

#: Ranges of class numbers that are shown; dots stand for the others.
SHOWN_RANGES = 3


def print_inspection(console: Console, inspection: Inspection, title: str, imports: Sequence[str]) -> None:
    """Print an inspection.

    Args:
        console: where to print.
        inspection: what to print.
        title: the source, and what it was taken for.
        imports: lines that the suggested line of Python needs before it.
    """
    console.print(Text(printable(title), style="bold"))
    _print_table(console, _overview(inspection))

    suggested = next(
        one for one in inspection.groupings if one.num_experts == inspection.suggestion.num_experts
    )
    margins = (
        "Largest margins: how far the logit of a class must exceed that of its rival, "
        f"at K = {suggested.num_experts} and tau = {suggested.tau:g}"
    )

    for heading, table in (
        ("Shot split", _shots(inspection)),
        (
            "Groups of the local experts, by the number of experts K (group 1 is the head)",
            _groups(inspection),
        ),
        (margins, _margins(suggested)),
    ):
        # A title of the table itself would be broken at the table's width.
        console.print(Text(heading, style="bold"))
        _print_table(console, table)

    for notice in inspection.warnings:
        console.print(Text.assemble(("Warning:", "bold yellow"), " ", printable(notice.message)), end="\n\n")
    reason = inspection.suggestion.reason
    console.print(Text.assemble(("Suggested start:", "bold green"), " ", printable(reason)), end="\n\n")

    # Whole lines, to be copied.
    for line in (*imports, inspection.suggestion.python):
        console.print(Text(line), soft_wrap=True)


def _overview(inspection: Inspection) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, show_header=False, padding=(0, 1))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for name, value in (
        ("classes", f"{inspection.num_classes:,}"),
        ("samples", f"{inspection.num_samples:,}"),
        ("largest", _counted(inspection.largest)),
        ("smallest", _counted(inspection.smallest)),
        ("imbalance factor", f"{inspection.imbalance_factor:,.6g}"),
        ("Gini coefficient", f"{inspection.gini:.3f}"),
    ):
        grid.add_row(name, _one_line(value))
    return grid


def _counted(one: ClassInfo) -> str:
    return f"{one.count:,} in class {class_label(one)}"


def _one_line(text: str) -> Text:
    """Give a cell that is cut at its end where the room does not suffice."""
    return Text(printable(text), no_wrap=True, overflow="ellipsis")


def _table(*columns: tuple[str, str]) -> Table:
    """Begin a table; a column is its heading, and whether it holds numbers, words, names or ranges.

    Names are cut and ranges are broken where the room does not suffice.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading, kind in columns:
        justify: JustifyMethod = "right" if kind == "numbers" else "left"
        table.add_column(heading, justify=justify, no_wrap=kind in ("numbers", "words"))
    return table


def _print_table(console: Console, table: Table) -> None:
    """Print a table whose numbers are whole, beyond the width of the terminal if need be."""
    for column in table.columns:
        column.min_width = max(map(_least_width, (column.header, *column.cells)))
    needed = sum((column.min_width or 0) + 2 for column in table.columns) + 1
    if needed > console.width:
        table.width = needed
    console.print(table, crop=False)


def _least_width(cell: Any) -> int:
    """Give the room that a cell needs at least: of a name, that of the number before it."""
    if not isinstance(cell, Text):
        return cell_len(cell)
    words = [len(word) for word in cell.plain.split()]
    return words[0] + 2 if cell.no_wrap else max(words)


def _shots(inspection: Inspection) -> Table:
    rules = {
        "many": f"more than {inspection.many:g}",
        "medium": f"{inspection.few:g} to {inspection.many:g}",
        "few": f"fewer than {inspection.few:g}",
    }
    table = _table(
        ("shot", "words"),
        ("samples per class", "words"),
        ("classes", "numbers"),
        ("share", "numbers"),
        ("samples", "numbers"),
        ("share", "numbers"),
    )
    for shot in inspection.shots:
        table.add_row(
            shot.name,
            rules[shot.name],
            f"{shot.num_classes:,}",
            f"{shot.class_share:.1%}",
            f"{shot.num_samples:,}",
            f"{shot.sample_share:.1%}",
        )
    return table


def _groups(inspection: Inspection) -> Table:
    headings = ["K", "group", "size", "largest", "smallest", "samples", "share"]
    table = _table(*((heading, "numbers") for heading in headings), ("classes", "ranges"))
    for grouping in inspection.groupings:
        last = len(grouping.groups) - 1
        for group in grouping.groups:
            table.add_row(
                "" if group.index else str(grouping.num_experts),
                str(group.index + 1),
                f"{len(group.classes):,}",
                f"{group.largest_count:,}",
                f"{group.smallest_count:,}",
                f"{group.mass:,}",
                f"{group.mass_share:.1%}",
                Text(number_ranges(group.classes)),
                style="yellow" if len(group.classes) == 1 else None,
                end_section=group.index == last,
            )
    return table


def _margins(grouping: Grouping) -> Table:
    table = _table(
        ("expert", "words"),
        ("margin", "numbers"),
        ("class", "names"),
        ("samples", "numbers"),
        ("rival", "names"),
        ("samples", "numbers"),
    )
    for margin in grouping.margins:
        kind = "global" if margin.is_global else "local"
        cells: list[str | Text] = [f"{margin.expert + 1}, {kind}", f"{margin.margin:.2f}"]
        for one in (margin.target, margin.rival):
            cells += ["-", "-"] if one is None else [_one_line(class_label(one)), f"{one.count:,}"]
        table.add_row(*cells)
    return table


def number_ranges(numbers: Sequence[int]) -> str:
    """Write runs of ascending numbers as ranges, ``0-3, 7, 9-12``; dots stand for all but the first few.

    Example:
        >>> number_ranges([0, 1, 2, 5, 8, 9])
        '0-2, 5, 8-9'
    """
    runs: list[str] = []
    for _, places in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        if len(runs) == SHOWN_RANGES:
            runs.append("...")
            break
        run = [number for _, number in places]
        runs.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
    return ", ".join(runs)


def printable(text: str) -> str:
    """Replace letters that would move the cursor or colour the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
