"""An inspection for people, at 80 columns: ``pip install typer rich``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lgla_losses.inspection.report import ClassInfo, Grouping, Inspection, class_label

#: Ranges of class numbers that are shown; more follow as dots.
SHOWN_RANGES = 3


def print_inspection(console: Console, inspection: Inspection, title: str, imports: Sequence[str]) -> None:
    """Print an inspection.

    Args:
        console: where to.
        inspection: what.
        title: the source, and what it was taken for.
        imports: lines that the suggested line of Python needs before it.
    """
    console.print(Text(printable(title), style="bold"))
    console.print(_overview(inspection))

    suggested = next(
        one for one in inspection.groupings if one.num_experts == inspection.suggestion.num_experts
    )
    margins = f"Largest margins of the logits, at K = {suggested.num_experts} and tau = {suggested.tau:g}"

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
        console.print(table)

    for notice in inspection.warnings:
        console.print(Text.assemble(("Warning:", "bold yellow"), " ", printable(notice.message)), end="\n\n")
    reason = inspection.suggestion.reason
    console.print(Text.assemble(("Suggested start:", "bold green"), " ", printable(reason)), end="\n\n")

    # Whole lines, to be copied.
    for line in (*imports, inspection.suggestion.python):
        console.print(Text(line), soft_wrap=True)


def _overview(inspection: Inspection) -> Padding:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    for name, value in (
        ("classes", f"{inspection.num_classes:,}"),
        ("samples", f"{inspection.num_samples:,}"),
        ("largest", _counted(inspection.largest)),
        ("smallest", _counted(inspection.smallest)),
        ("imbalance factor", f"{inspection.imbalance_factor:,.6g}"),
        ("Gini coefficient", f"{inspection.gini:.3f}"),
    ):
        grid.add_row(name, Text(printable(value)))
    return Padding(grid, (1, 1))


def _table(*columns: tuple[str, bool], last: str | None = None) -> Table:
    """Begin a table; a column is a heading, and whether numbers stand below it.

    The column ``last`` has what room the others leave.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=last is not None)
    for heading, is_number in columns:
        table.add_column(heading, justify="right" if is_number else "left", no_wrap=True, overflow="ellipsis")
    if last is not None:
        table.add_column(last, no_wrap=True, overflow="ellipsis", ratio=1)
    return table


def _shots(inspection: Inspection) -> Table:
    rules = {
        "many": f"more than {inspection.many:g}",
        "medium": f"{inspection.few:g} to {inspection.many:g}",
        "few": f"fewer than {inspection.few:g}",
    }
    headings = [("shot", False), ("samples a class", False), ("classes", True), ("share", True)]
    table = _table(*headings, ("samples", True), ("share", True))
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
    headings = [("K", True), ("group", True), ("size", True), ("largest", True), ("smallest", True)]
    table = _table(*headings, ("samples", True), ("share", True), last="classes")
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
    table = _table(("expert", False), ("margin", True), ("class", False), ("must exceed class", False))
    for margin in grouping.margins:
        kind = "global" if margin.is_global else "local"
        pair = ("-", "-")
        if margin.target is not None and margin.rival is not None:
            pair = (_counted(margin.target), _counted(margin.rival))
        cells = (Text(printable(cell)) for cell in pair)
        table.add_row(f"{margin.expert + 1}, {kind}", f"{margin.margin:.2f}", *cells)
    return table


def _counted(one: ClassInfo) -> str:
    return f"{class_label(one)}: {one.count:,}"


def number_ranges(numbers: Sequence[int]) -> str:
    """Draw runs of ascending numbers together, as in ``0-3, 7, 9-12``, and dots after a few.

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
    """Replace what would move the cursor or colour the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
