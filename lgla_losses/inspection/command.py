"""The command line around an inspection: ``pip install typer rich``."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

import lgla_losses
from lgla_losses.grouping import ClassGrouper
from lgla_losses.inspection._entries import SourceError
from lgla_losses.inspection.picture import draw_groups
from lgla_losses.inspection.report import Inspection, inspect_counts
from lgla_losses.inspection.sources import ClassCounts, Kind, read_class_counts
from lgla_losses.inspection.table import print_inspection

#: Version of the JSON that --json writes; it rises when a key is removed or changes its meaning.
SCHEMA_VERSION = 1

IMPORTS = (
    "from lgla_losses import LGLALoss",
    "from lgla_losses.inspection import read_class_counts",
)

app = typer.Typer(
    help="Local and Global Logit Adjustments for long-tailed learning.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(lgla_losses.__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Local and Global Logit Adjustments for long-tailed learning."""


@app.command()
def inspect(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Class counts as a text file (one per line), CSV or JSON; labels as .npy or .npz, or as CSV "
            "with --label-column; or a folder with a folder of images for each class, perhaps in train/.",
            show_default=False,
        ),
    ],
    kind: Annotated[
        Kind | None,
        typer.Option(help="Kind of SOURCE, if its ending and content mislead.", show_default=False),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            help="Array of labels in an .npz; default: train_labels or train_y.", show_default=False
        ),
    ] = None,
    count_column: Annotated[
        str | None,
        typer.Option(help="Heading of the counts in a CSV file, or number from 1.", show_default=False),
    ] = None,
    name_column: Annotated[
        str | None,
        typer.Option(help="Heading of the class names in a CSV file, or number from 1.", show_default=False),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            help="Heading of the labels in a CSV file with a row for each sample, or number from 1.",
            show_default=False,
        ),
    ] = None,
    many: Annotated[float, typer.Option(min=0, help="Many-shot classes have more samples.")] = 100,
    few: Annotated[float, typer.Option(min=0, help="Few-shot classes have fewer samples.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, max=2**63 - 1, help="Samples per batch.")] = 128,
    png: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a picture of the groups to FILE.", show_default=False),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON for programs: groups and experts count from 0.")
    ] = False,
) -> None:
    """Show what class counts mean for LGLA: imbalance, groups and margins for K = 2..7, where to start."""
    if not few <= many < float("inf"):
        _refuse(f"--few, --many: expected 0 <= few <= many, finite, got few = {few:g} and many = {many:g}")
    options = {
        "key": key,
        "count_column": count_column,
        "name_column": name_column,
        "label_column": label_column,
    }

    try:
        found = read_class_counts(source, kind, **options)
    except SourceError as error:
        _refuse(str(error))

    given = {"kind": kind and str(kind), **options}
    arguments = "".join(f", {name}={value!r}" for name, value in given.items() if value is not None)
    inspection = inspect_counts(
        found.counts,
        found.names,
        many=many,
        few=few,
        batch_size=batch_size,
        expression=f"read_class_counts({str(source)!r}{arguments}).positive",
    )

    if png is not None:
        _write_picture(png, source, found, inspection)

    if as_json:
        described = {"path": str(source), "kind": str(found.kind), "description": found.description}
        record = {"schema": SCHEMA_VERSION, "source": described, **asdict(inspection), "imports": IMPORTS}
        typer.echo(json.dumps(record, allow_nan=False))
        return

    if hasattr(sys.stdout, "reconfigure"):
        # A class name may have letters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="replace")
    title = f"{source}: {found.description}"
    print_inspection(Console(), inspection, title, IMPORTS)
    if png is not None:
        typer.echo(f"Picture: {png}", err=True)


def _write_picture(png: Path, source: Path, found: ClassCounts, inspection: Inspection) -> None:
    num_experts = inspection.suggestion.num_experts
    grouper = ClassGrouper(found.positive, num_experts - 1)
    numbers = [number for number, count in enumerate(found.counts) if count]
    names = found.names and [found.names[number] for number in numbers]
    title = f"{source.name}: groups of {num_experts} experts"

    try:
        figure = draw_groups(grouper, numbers, inspection.many, inspection.few, title, names)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=150)
        _write_whole(png.resolve(), drawn.getvalue())
    except ImportError as error:
        _refuse(f"--png: {error}")
    except OSError as error:
        _refuse(f"--png: expected a file that can be written, got {png} ({error.strerror or error})")


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all: the old one stays if the disk is full."""
    if path.exists() and not path.is_file():
        raise OSError("it is a folder, pipe or device")
    temporary = path.with_name(f".{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _refuse(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(2)
