"""What the loss costs: this library beside the plain loop, its compiled form, the paper's formula and peers.

Measures forward, and forward + backward, of the losses from logits and of the losses from features and
class weights, with peak memory and, on a GPU, the number of kernel launches. README.md beside this file
says what is measured and how to read the record.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import measure
import peers
import report
import torch
from arguments import record_file
from peers import Shape
from report import Record, Row
from rich.console import Console

RESULTS = Path(__file__).parent / "results"


_F32 = (torch.float32,)
_BOTH = (torch.float32, torch.bfloat16)


class Cell(NamedTuple):
    """A shape, its types, and the columns that are left out as they take too much."""

    shape: Shape
    dtypes: tuple[torch.dtype, ...] = _BOTH
    without: tuple[str, ...] = ()


LOGITS = [
    Shape("CIFAR", 128, 3, 100),
    Shape("ImageNet-LT", 256, 3, 1000),
    Shape("iNaturalist", 256, 3, 8142),
    Shape("iNaturalist", 1024, 3, 8142),
    Shape("words", 256, 3, 50_000),
]
#: What is left out on a CPU for the sake of time.
_COMPILED_LINEAR = ("LinearLGLALoss, compiled", "plain loop, compiled")
SUITES = {
    "cpu": [
        *(Cell(shape, _F32 if shape in LOGITS[1:3] else _BOTH) for shape in LOGITS),
        Cell(
            Shape("words", 256, 3, 50_000, 256), _F32, ("LinearLGLALoss, compiled", "F.linear_cross_entropy")
        ),
        Cell(Shape("items", 128, 3, 100_000, 64), _F32, _COMPILED_LINEAR),
        Cell(
            Shape("items", 32, 3, 1_000_000, 32),
            _F32,
            (*_COMPILED_LINEAR, "head + LGLALoss", "F.linear_cross_entropy"),
        ),
    ],
    "cuda": [
        *map(Cell, LOGITS),
        Cell(Shape("iNaturalist", 4096, 3, 8142)),
        Cell(Shape("words", 256, 3, 50_000, 256)),
        Cell(Shape("items", 1024, 3, 100_000, 512), (torch.bfloat16,)),
        Cell(Shape("items", 1024, 3, 1_000_000, 128), (torch.bfloat16,)),
    ],
}
QUICK = [
    Cell(Shape("tiny", 16, 3, 20)),
    Cell(Shape("tiny", 16, 3, 20, 8), _F32, _COMPILED_LINEAR),
]
EFFORT = {"cpu": measure.Effort(4.0, 5, 100), "cuda": measure.Effort(4.0, 20, 200)}
QUICK_EFFORT = measure.Effort(0.0, 2, 2)


def measure_cell(
    cell: Cell, dtype: torch.dtype, device: str, effort: measure.Effort, compiler: str, bandwidth: float
) -> list[Row]:
    """The rows of a shape and a type."""
    torch.compiler.reset()
    shape, cuda = cell.shape, torch.device(device).type == "cuda"
    columns = [c for c in peers.columns_for(shape, device, compiler) if c.name not in cell.without]
    found = measure.time_columns(columns, shape, dtype, device, effort)
    plain = found[peers.PLAIN].milliseconds
    like = {
        "suite": "logits" if shape.features is None else "linear",
        "shape": shape.label,
        "dtype": str(dtype).removeprefix("torch."),
    }
    rows = []
    for column in columns:
        times, first_step, failure = found[column.name]
        common = {
            **like,
            "column": column.name,
            "ours": column.ours,
            "equal": column.equal,
            "first_step_s": first_step,
            "note": "; ".join(filter(None, (column.note, failure))),
        }
        if not times:
            rows.append(_row(**common, phase=measure.TRAIN))
            continue
        if cuda:
            peaks = measure.peaks_on_gpu(column, shape, dtype, device)
            (batch,) = peers.make_batches(shape, dtype, device)
            launches = measure.launches(column.make(shape, device), batch)
        elif column.name in (peers.CLONE, peers.PRODUCTS) or (
            # A process that compiles anew, some seconds each: for one type, where memory is worth a look.
            column.compiled and (dtype != torch.float32 or shape.classes < 8000)
        ):
            peaks, launches = {}, None
        else:
            peaks, launches = measure.peaks_on_cpu(column, shape, dtype, compiler), None
        for phase, samples in times.items():
            low, median, high = measure.quartiles(samples)
            rows.append(
                _row(
                    **common,
                    phase=phase,
                    median_ms=median,
                    q1_ms=low,
                    q3_ms=high,
                    repetitions=len(samples),
                    ratio_to_plain=_ratio(samples, plain.get(phase)),
                    peak_mb=peaks[phase] / 1e6 if phase in peaks else None,
                    launches=launches if phase == measure.TRAIN else None,
                )
            )
    if shape.features is None:
        size = shape.samples * shape.experts * shape.classes * dtype.itemsize
        for phase, passes in ((measure.FORWARD, 1), (measure.TRAIN, 2)):
            floor = 1e3 * passes * size / bandwidth
            ratio = floor / statistics.median(plain[phase]) if plain else None
            note = "bytes that must move / copy bandwidth"
            rows.append(
                _row(
                    **like, column=report.FLOOR, phase=phase, median_ms=floor, ratio_to_plain=ratio, note=note
                )
            )
    if cuda and shape == LOGITS[0]:
        rows += _graph_rows(like, shape, dtype, device, effort)
    return rows


def _row(**values: object) -> Row:
    empty = dict.fromkeys(
        ("median_ms", "q1_ms", "q3_ms", "ratio_to_plain", "peak_mb", "launches", "first_step_s")
    )
    row: Row = {"ours": False, "equal": False, **empty, "repetitions": 0, **values}
    order = list(report.ROW_FIELDS)
    return {key: _rounded(row[key]) for key in sorted(row, key=order.index)}


def _rounded(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _ratio(samples: list[float], plain: list[float] | None) -> float | None:
    """The median of the ratios within the rounds, which drift of the machine leaves alone."""
    if not plain:
        return None
    return statistics.median(mine / theirs for mine, theirs in zip(samples, plain, strict=True))


def _graph_rows(
    like: dict[str, str], shape: Shape, dtype: torch.dtype, device: str, effort: measure.Effort
) -> list[Row]:
    """The step where launches are most of it, without the host."""
    (batch,) = peers.make_batches(shape, dtype, device)
    step = peers.step_of(peers.lgla(shape, device))
    launches = measure.launches(step, batch)
    rows = []
    for name, samples in measure.graph_times(step, batch, launches, effort).items():
        low, median, high = measure.quartiles(samples)
        rows.append(
            _row(
                **like,
                column=name,
                ours=name.startswith("LGLALoss"),
                phase=report.GRAPH,
                median_ms=median,
                q1_ms=low,
                q3_ms=high,
                repetitions=len(samples),
                launches=launches,
                note="as many launches" if name.startswith("empty") else "a training step",
            )
        )
    return rows


def run(device: str, quick: bool, only: str, console: Console) -> Record:
    """Measure everything, or the shapes whose labels hold ``only``."""
    start = time.perf_counter()
    kind = torch.device(device).type
    cells = [cell for cell in (QUICK if quick else SUITES[kind]) if only in cell.shape.label]
    effort = QUICK_EFFORT if quick else EFFORT[kind]
    compiler = "eager" if quick else "inductor"
    if kind == "cuda":
        torch.cuda.set_device(device)
    bandwidth = measure.copy_bandwidth(device, 8 if quick else 256)
    rows: list[Row] = []
    # A cache of this run's own: the seconds of first steps are those of compiling, run after run.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for cell in cells:
            for dtype in cell.dtypes:
                begin = time.perf_counter()
                rows += measure_cell(cell, dtype, device, effort, compiler, bandwidth)
                name = f"{cell.shape.label}, {str(dtype).removeprefix('torch.')}"
                console.print(f"{name}: {time.perf_counter() - begin:.0f} s", style="dim", highlight=False)
    return {
        "schema": report.SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/losses.py", *sys.argv[1:]]),
        "kind": kind,
        "device": measure.device_name(device),
        "cpu": measure.cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": measure.commit(),
        "seed": 0,
        "copy_gb_per_s": _rounded(bandwidth / 1e9),
        "seconds": _rounded(time.perf_counter() - start),
        "rows": rows,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(record: Record, path: Path) -> None:
    """The record, a row a line."""
    rows = ",\n".join(f"    {json.dumps(row)}" for row in record["rows"])
    head = json.dumps({**record, "rows": []}, indent=2)
    path.write_text(head.removesuffix("[]\n}") + f"[\n{rows}\n  ]\n}}\n")


def main() -> None:
    """Measure and report, or report what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--out", type=record_file, help="default: results/losses_DEVICE.json; the picture goes beside it"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two repetitions: does it run?")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="print a record as markdown tables, and end"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only the sizes whose names hold TEXT")
    options = parser.parse_args()
    if options.table is not None:
        record = json.loads(options.table.read_text())
        for title, table in report.markdown(record).items():
            print(f"{title}\n\n{table}\n")
        print("\n".join(f"- {line}" for line in report.balance(record)))
        return
    kind = torch.device(options.device).type
    if kind not in SUITES:
        parser.error(f"--device: expected cpu or cuda, got {options.device}")
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device")
    path = options.out or RESULTS / f"losses_{kind}.json"
    console = Console(width=150)
    record = run(options.device, options.quick, options.only, console)
    write(record, path)
    picture = path.with_suffix(".png")
    report.plot(record, picture)
    console.print(report.terminal_table(record))
    for line in report.balance(record):
        console.print(line, highlight=False)
    print(f"record: {path}\npicture: {picture}")


if __name__ == "__main__":
    main()
