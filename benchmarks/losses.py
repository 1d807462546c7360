"""What the loss costs: this library beside the plain loop, its compiled form, the paper's formula and peers.

Measures forward, and forward + backward, of the losses from logits, with every kind of input, and of the
losses from features and class weights, with peak memory and, on a GPU, the number of kernel launches. Every
size runs in a process of its own, and the record is written after each. README.md beside this file says what
is measured and how to read the record.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import kinds
import measure
import peers
import report
import torch
from arguments import record_file
from peers import Column, Shape, Step
from recording import leave_on_sigterm, write_whole
from report import Record, Row
from rich.console import Console

RESULTS = Path(__file__).parent / "results"


_F32 = (torch.float32,)
_BF16 = (torch.bfloat16,)
_BOTH = (torch.float32, torch.bfloat16)


class Cell(NamedTuple):
    """A shape, its types, and the columns that are left out as they take too much."""

    shape: Shape
    dtypes: tuple[torch.dtype, ...] = _BOTH
    without: tuple[str, ...] = ()
    #: Whether launches are counted and steps recorded in CUDA graphs: where launches are most of the time.
    launches: bool = False


#: Which columns a process measures: a compiler takes more time than all other columns together.
ALL, EAGER, COMPILED = "all columns", "uncompiled columns", "compiled columns"


class Job(NamedTuple):
    """What one process measures."""

    cells: tuple[Cell, ...]
    part: str = ALL

    @property
    def label(self) -> str:
        """The first size, how many others, the type where it is one, and which columns."""
        others = f" and {len(self.cells) - 1} kinds of input" if len(self.cells) > 1 else ""
        types = {dtype for cell in self.cells for dtype in cell.dtypes}
        only = f", {_name(*types)}" if len(types) == 1 else ""
        return f"{self.cells[0].shape.label}{others}{only}, {self.part}"


LOGITS = [
    Shape("CIFAR", 128, 3, 100),
    Shape("ImageNet-LT", 256, 3, 1000),
    Shape("iNaturalist", 256, 3, 8142),
    Shape("iNaturalist", 1024, 3, 8142),
    Shape("words", 256, 3, 50_000),
]
LARGE = Shape("iNaturalist", 4096, 3, 8142)
#: The same with aligned rows, to see what unaligned ones cost. In bfloat16 the plan "wide" passes its table
#: through shared memory here, with 16 more barriers a row.
ALIGNED = Shape("iNaturalist", 4096, 3, 8192)
#: What is left out for the sake of time.
_COMPILED_LINEAR = ("LinearLGLALoss, compiled", "plain loop, compiled")
_SLOW = ("LGLALoss, reference", "LGLALoss, compiled", "paper's formula")
#: Beside it, what is not needed to compare the default, its plans, the plain loop and a copy.
_BUT_PLANS = (*_SLOW, "LGLALoss, fused", *peers.SCALED_CHOICES, "liger-kernel")


def _kinds_of(shape: Shape) -> tuple[Cell, ...]:
    """The same size with every other kind of input."""
    return tuple(Cell(other, _F32, launches=True) for other in kinds.shapes_of(shape))


def _on_cuda() -> list[Job]:
    """Most wanted first, as time may run out."""
    # A type each, as there are many kernels to compile.
    large, words = ([Cell(shape, types, _SLOW) for types in (_F32, _BF16)] for shape in (LARGE, LOGITS[4]))
    aligned = Cell(ALIGNED, _BOTH, _BUT_PLANS)
    small = [Cell(LOGITS[0], launches=True), *_kinds_of(LOGITS[0])]
    thousand = Cell(LOGITS[1])
    items = Cell(Shape("items", 1024, 3, 100_000, 512), _BF16, _COMPILED_LINEAR[:1])
    others = [
        Cell(LOGITS[2], _BOTH, _SLOW),
        Cell(LOGITS[3], _BOTH, _SLOW),
        Cell(Shape("words", 256, 3, 50_000, 256)),
    ]
    wanted = [Job((cell,), EAGER) for cell in (*large, aligned, *small, *words, items, thousand)]
    wanted += [Job((cell,), COMPILED) for cell in (*small, items, *large, thousand, *words)]
    return wanted + [Job((cell,), part) for part in (EAGER, COMPILED) for cell in others]


SUITES = {
    "cpu": [
        *(Job((Cell(shape, _F32 if shape in LOGITS[1:3] else _BOTH),)) for shape in LOGITS),
        *(Job(_kinds_of(shape), EAGER) for shape in LOGITS[:3]),
        Job(
            (
                Cell(
                    Shape("words", 256, 3, 50_000, 256),
                    _F32,
                    ("LinearLGLALoss, compiled", "F.linear_cross_entropy"),
                ),
            )
        ),
        Job((Cell(Shape("items", 128, 3, 100_000, 64), _F32, _COMPILED_LINEAR),)),
        Job(
            (
                Cell(
                    Shape("items", 32, 3, 1_000_000, 32),
                    _F32,
                    (*_COMPILED_LINEAR, "head + LGLALoss", "F.linear_cross_entropy"),
                ),
            )
        ),
    ],
    "cuda": _on_cuda(),
}
TINY = Cell(Shape("tiny", 16, 3, 20), launches=True)
QUICK = [
    Job((TINY, *_kinds_of(TINY.shape)), EAGER),
    Job((TINY,), COMPILED),
    Job((Cell(Shape("tiny", 16, 3, 20, 8), _F32, _COMPILED_LINEAR),)),
]
EFFORT = {"cpu": measure.Effort(4.0, 5, 100), "cuda": measure.Effort(0.6, 20, 50)}
QUICK_EFFORT = measure.Effort(0.0, 2, 2)


# One process


class Setting(NamedTuple):
    """What all sizes of a run have in common."""

    device: str
    effort: measure.Effort
    compiler: str
    bandwidth: float

    @property
    def on_gpu(self) -> bool:
        """Whether the device is one."""
        return peers.on_gpu(self.device)


class Found(NamedTuple):
    """What a process found out so far, for the record."""

    machine: dict[str, Any]
    rows: list[Row]
    problems: list[str]

    def save(self, path: Path) -> None:
        """Keep it, whatever happens next."""
        write_whole(path, json.dumps(self._asdict()))


class Prepared(NamedTuple):
    """Columns of a shape and a type that have run once."""

    cell: Cell
    dtype: torch.dtype
    columns: list[Column]
    batches: list[peers.Batch]
    found: dict[str, measure.Measured]
    steps: dict[str, Step]


def prepare(job: Job, device: str, compiler: str, problems: list[str]) -> Iterator[Prepared]:
    """Compile and run once, a type of a shape after another; what fails leaves the rest alone."""
    for cell in job.cells:
        columns, shape = _columns(cell, job.part, device, compiler), cell.shape
        if job.part == COMPILED and len(columns) < 2:
            continue
        for dtype in cell.dtypes:
            try:
                sets = measure.number_of_sets(shape, dtype, device)
                batches = kinds.make_batches(shape, dtype, device, sets)
                found, steps = measure.warm_up(columns, batches[0], shape, device)
            except Exception as error:
                problems.append(_told(error, f"{shape.label}, {_name(dtype)}"))
            else:
                yield Prepared(cell, dtype, columns, batches, found, steps)


def measure_job(
    job: Job, ready: Iterable[Prepared], setting: Setting, found: Found, save: Callable[[], None]
) -> None:
    """Add the rows of a job, a type after another; what fails leaves the rest alone."""
    for prepared in ready:
        try:
            found.rows.extend(measure_cell(prepared, job.part, setting, found.problems))
        except Exception as error:
            found.problems.append(_told(error, f"{prepared.cell.shape.label}, {_name(prepared.dtype)}"))
        save()
    if not setting.on_gpu or job.part == COMPILED:
        return

    # Last, as a profiler slows down every launch that follows.
    for cell in job.cells:
        if cell.launches:
            try:
                found.rows.extend(_graph_rows(cell, cell.dtypes[0], setting, found))
            except Exception as error:
                found.problems.append(_told(error, f"{cell.shape.label}, launches"))
            save()


def _told(error: Exception, where: str) -> str:
    print(f"{where}:", file=sys.stderr)
    traceback.print_exception(error)
    return f"{where}: {measure.reason(error)}"


def _columns(cell: Cell, part: str, device: str, compiler: str) -> list[Column]:
    """The columns of a part; compiled ones beside the plain loop, their yardstick."""
    columns = kinds.columns_for(cell.shape, device, compiler)
    columns = [column for column in columns if column.name not in cell.without]
    if part == EAGER:
        return [column for column in columns if not column.compiled]
    if part == COMPILED:
        return [column for column in columns if column.compiled or column.name == peers.PLAIN]
    return columns


def measure_cell(prepared: Prepared, part: str, setting: Setting, problems: list[str]) -> list[Row]:
    """The rows of a shape and a type."""
    cell, dtype, columns, batches, found, steps = prepared
    shape = cell.shape
    measure.time_columns(found, steps, batches, setting.device, setting.effort)
    plain = found[peers.PLAIN].milliseconds
    like = _like(shape, dtype)
    rows = []
    for column in columns:
        if part == COMPILED and column.name == peers.PLAIN:
            continue  # the uncompiled part has it
        times, first_step, failure, failed = found[column.name]
        common = {
            **like,
            "column": column.name,
            "ours": column.ours,
            "equal": column.equal,
            "first_step_s": first_step,
            "note": "; ".join(filter(None, (column.note, failure))),
        }
        if failed:
            problems.append(f"{shape.label}, {_name(dtype)}, {column.name}: {failure}")
        if not times:
            rows.append(_row(**common, phase=measure.TRAIN))
            continue
        peaks = _peaks(column, steps[column.name], batches[0], shape, dtype, setting)
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
                    **_ratios(samples, plain.get(phase)),
                    peak_mb=peaks[phase] / 1e6 if phase in peaks else None,
                    share_of_limit=_share(shape, dtype, phase, median, setting),
                )
            )
    return rows if part == COMPILED else rows + _floors(shape, dtype, plain, setting)


def _peaks(
    column: Column, step: Step, batch: peers.Batch, shape: Shape, dtype: torch.dtype, setting: Setting
) -> dict[str, float]:
    """Peak memory of a column by phase, where it can be had."""
    if setting.on_gpu:
        return measure.peaks_on_gpu(step, batch)
    if (
        shape.kind
        or column.name in (peers.CLONE, peers.PRODUCTS)
        or (
            # A process that compiles anew, some seconds each: for one type, where memory is worth a look.
            column.compiled and (dtype != torch.float32 or shape.classes < 8000)
        )
    ):
        return {}
    return measure.peaks_on_cpu(column, shape, dtype, setting.compiler)


def _floor(shape: Shape, dtype: torch.dtype, phase: str, setting: Setting) -> float | None:
    """Milliseconds in which the bytes move that must; None for what is no loss of stacked logits."""
    if shape.features is not None or shape.kind:
        return None
    passes = 1 if phase == measure.FORWARD else 2
    size = shape.samples * shape.experts * shape.classes * dtype.itemsize
    return 1e3 * passes * size / setting.bandwidth


def _share(shape: Shape, dtype: torch.dtype, phase: str, median: float, setting: Setting) -> float | None:
    floor = _floor(shape, dtype, phase, setting)
    return None if floor is None else floor / median


def _floors(shape: Shape, dtype: torch.dtype, plain: dict[str, list[float]], setting: Setting) -> list[Row]:
    rows = []
    for phase in (measure.FORWARD, measure.TRAIN):
        floor = _floor(shape, dtype, phase, setting)
        if floor is not None:
            ratio = floor / statistics.median(plain[phase]) if plain else None
            note = "bytes that must move / copy bandwidth"
            values = {"median_ms": floor, "ratio_to_plain": ratio, "note": note}
            rows.append(_row(**_like(shape, dtype), column=report.FLOOR, phase=phase, **values))
    return rows


def _like(shape: Shape, dtype: torch.dtype) -> dict[str, str]:
    suite = "logits" if shape.features is None else "linear"
    return {"suite": suite, "shape": shape.label, "dtype": _name(dtype)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _row(**values: object) -> Row:
    empty = dict.fromkeys(
        ("median_ms", "q1_ms", "q3_ms", "ratio_to_plain", "peak_mb", "launches", "first_step_s")
    )
    row: Row = {"ours": False, "equal": False, **empty, "repetitions": 0, **values}
    order = [*report.ROW_FIELDS, *(key for key in report.MORE_ROW_FIELDS if row.get(key) is not None)]
    return {key: _rounded(row[key]) for key in order}


def _rounded(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _ratios(samples: list[float], plain: list[float] | None) -> dict[str, float]:
    """Median and quartiles of the ratios within the rounds, which drift of the machine leaves alone."""
    if not plain:
        return {}
    low, median, high = measure.quartiles([mine / other for mine, other in zip(samples, plain, strict=True)])
    return {"ratio_to_plain": median, "ratio_q1": low, "ratio_q3": high}


def _graph_rows(cell: Cell, dtype: torch.dtype, setting: Setting, found: Found) -> list[Row]:
    """Steps in CUDA graphs, without the host, beside as many empty kernels; launches go into the rows."""
    like = _like(cell.shape, dtype)
    (batch,) = kinds.make_batches(cell.shape, dtype, setting.device)
    dot = torch.zeros((), device=setting.device)
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    steps: dict[str, Step] = {}  # what the graphs read must stay where it is
    numbers: dict[str, int | None] = {}
    wanted = (*report.DEFAULTS, peers.PLAIN)
    columns = _columns(cell, EAGER, setting.device, setting.compiler)
    columns = [column for column in columns if column.name in wanted]
    for column in columns:
        try:
            steps[column.name] = step = column.make(cell.shape, setting.device)
            numbers[column.name] = number = measure.launches(step, batch)
            _add_launches(found.rows, like, column.name, number)
            graphs[column.name] = measure.recorded(_training_step(step, batch))
            if number is not None and _chain(number) not in graphs:
                graphs[_chain(number)] = measure.chain_of_empty_kernels(dot, number)
        except Exception as error:
            found.problems.append(_told(error, f"{cell.shape.label}, {column.name}, launches and graph"))
        measure.without_gradients(batch)

    times = measure.graph_times(graphs, setting.effort.at_most)
    plain = times.get(peers.PLAIN)
    ours = {column.name for column in columns if column.ours}
    whole = {column.name for column in columns if column.equal}
    rows = []
    for name, samples in times.items():
        low, median, high = measure.quartiles(samples)
        rows.append(
            _row(
                **like,
                column=name,
                ours=name in ours,
                equal=name in whole,
                phase=report.GRAPH,
                median_ms=median,
                q1_ms=low,
                q3_ms=high,
                repetitions=len(samples),
                **_ratios(samples, plain),
                launches=numbers.get(name),
                note="a training step" if name in numbers else "no loss at all",
            )
        )
    return rows


def _training_step(step: Step, batch: peers.Batch) -> Callable[[], object]:
    return lambda: step.train(measure.without_gradients(batch))


def _chain(number: int) -> str:
    return f"{number} empty kernels"


def _add_launches(rows: list[Row], like: dict[str, str], column: str, number: int | None) -> None:
    for row in rows:
        same = all(row[key] == value for key, value in like.items())
        if same and row["column"] == column and row["phase"] == measure.TRAIN:
            row["launches"] = number


def work(job: Job, options: argparse.Namespace) -> int:
    """Measure one job, in a process of its own, and keep what it finds in a file."""
    kind = torch.device(options.device).type
    if kind == "cuda":
        torch.cuda.set_device(torch.device(options.device).index or 0)
    compiler = "eager" if options.quick else "inductor"
    found = Found({}, [], [])
    ready: Iterable[Prepared] = prepare(job, options.device, compiler, found.problems)
    if _is_ahead(options):
        ready = list(ready)
        if kind == "cuda":
            torch.cuda.empty_cache()  # others need it
    _ready_file(options.rows).touch()
    word = sys.stdin.readline()
    if not word:
        return 1  # whoever started this is gone

    start = time.perf_counter()
    bandwidth = float(word) or _bandwidth(options.device, options.quick)
    found.machine.update(device=measure.device_name(options.device), copy_gb_per_s=_rounded(bandwidth / 1e9))
    effort = QUICK_EFFORT if options.quick else EFFORT[kind]
    setting = Setting(options.device, effort, compiler, bandwidth)
    measure_job(job, ready, setting, found, lambda: found.save(options.rows))
    print(f"{job.label}: {time.perf_counter() - start:.0f} s", flush=True)
    return 0


def _is_ahead(options: argparse.Namespace) -> bool:
    """Whether processes compile side by side, then measure in turn; on a CPU that would disturb."""
    return bool(options.quick) or torch.device(options.device).type == "cuda"


def _wave(number: int, jobs: int) -> range:
    """The jobs that compile beside a job: so many at a time as there are processors."""
    size = os.cpu_count() or 1
    first = number - number % size
    return range(first, min(first + size, jobs))


def _ready_file(rows: Path) -> Path:
    """The file that a process makes when it only waits for its turn."""
    return rows.with_suffix(".ready")


def _bandwidth(device: str, quick: bool) -> float:
    if quick:
        return measure.copy_bandwidth(device, 8, 3)
    if torch.device(device).type == "cuda":
        return measure.copy_bandwidth(device, 2000, 20)
    return measure.copy_bandwidth(device)


# All of them


def run(options: argparse.Namespace, path: Path, console: Console) -> Record:
    """Measure every size in a process of its own; the record is written after each."""
    start = time.perf_counter()
    record, jobs = _empty_record(options), _jobs(options)
    took: list[float] = []
    # A cache of this run's own: the seconds of first steps are those of compiling, run after run.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        files = [Path(folder) / f"{number}.json" for number in range(len(jobs))]
        commands = [_command(number, file, options) for number, file in enumerate(files)]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "PYTHONUNBUFFERED": "1"}
        if _is_ahead(options):
            environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # there are processes enough
        with Workers(commands, environment) as workers:
            for number, job in enumerate(jobs):
                begin = time.perf_counter()
                left = start + options.seconds - begin
                if took and left < statistics.median(took[-3:]):
                    record["left_out"].append(job.label)
                    continue
                if _is_ahead(options):
                    wave = _wave(number, len(jobs))
                    workers.prepare({n: _ready_file(files[n]) for n in wave}, left / 2)
                    left = start + options.seconds - time.perf_counter()
                try:
                    ended = workers.run(number, f"{1e9 * record['copy_gb_per_s']}", left)
                finally:
                    # Also where a signal ends this process.
                    _take(record, files[number])
                    record["seconds"] = _rounded(time.perf_counter() - start)
                    write(record, path)
                if ended:
                    record["left_out" if ended == _NO_TIME else "problems"].append(f"{job.label}: {ended}")
                    console.print(f"{job.label}: {ended}", style="red", highlight=False)
                took.append(time.perf_counter() - begin)
    write(record, path)
    return record


class Workers:
    """Processes that run one after another; they may get ready together, and then wait for their turns."""

    def __init__(self, commands: list[list[str]], environment: dict[str, str]) -> None:
        self.commands, self.environment = commands, environment
        self.processes: dict[int, subprocess.Popen[str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            _stop(process)

    def prepare(self, ready: dict[int, Path], seconds: float) -> None:
        """Start some, and wait so many seconds at most until each has made its file or has ended."""
        until = time.perf_counter() + seconds
        waiting = [(self._started(number), file) for number, file in ready.items()]
        while waiting and time.perf_counter() < until:
            waiting = [(process, file) for process, file in waiting if process.poll() is None]
            waiting = [(process, file) for process, file in waiting if not file.exists()]
            time.sleep(0.05)

    def run(self, number: int, word: str, seconds: float) -> str:
        """Tell a process to begin; how it ended, if not well. It is stopped when time is up."""
        process = self._started(number)
        assert process.stdin is not None
        try:
            with suppress(BrokenPipeError):  # it has ended already, and its status says how
                process.stdin.write(f"{word}\n")
                process.stdin.flush()
            status = process.wait(None if seconds == float("inf") else max(1.0, seconds))
        except subprocess.TimeoutExpired:
            return _NO_TIME
        finally:
            _stop(process)
        return f"ended with status {status}" if status else ""

    def _started(self, number: int) -> subprocess.Popen[str]:
        if number not in self.processes:
            self.processes[number] = subprocess.Popen(
                self.commands[number], env=self.environment, stdin=subprocess.PIPE, text=True
            )
        return self.processes[number]


_NO_TIME = "cut off, as time was up"


def _jobs(options: argparse.Namespace) -> list[Job]:
    """The jobs, or those cells whose labels hold one of the texts of ``--only``."""
    jobs = QUICK if options.quick else SUITES[torch.device(options.device).type]

    def is_wanted(cell: Cell) -> bool:
        return any(text in cell.shape.label for text in options.only)

    chosen = (job._replace(cells=tuple(filter(is_wanted, job.cells))) for job in jobs)
    return [job for job in chosen if job.cells]


def _command(number: int, rows: Path, options: argparse.Namespace) -> list[str]:
    command = [sys.executable, __file__, "--device", options.device, "--only", *options.only]
    return command + ["--job", str(number), "--rows", str(rows)] + ["--quick"] * options.quick


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()
    try:
        process.wait(3)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _take(record: Record, rows: Path) -> None:
    """Add what a process found; that of the machine once."""
    if not rows.exists():
        return
    found = Found(**json.loads(rows.read_text()))
    if not record["copy_gb_per_s"]:
        record.update(found.machine)
    record["rows"] += found.rows
    record["problems"] += found.problems


def _empty_record(options: argparse.Namespace) -> Record:
    return {
        "schema": report.SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/losses.py", *sys.argv[1:]]),
        "kind": torch.device(options.device).type,
        "device": "",
        "cpu": measure.cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": measure.commit(),
        "seed": 0,
        "copy_gb_per_s": 0.0,
        "seconds": 0.0,
        "problems": [],
        "left_out": [],
        "rows": [],
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
    write_whole(path, head.removesuffix("[]\n}") + f"[\n{rows}\n  ]\n}}\n")


def _arguments() -> argparse.ArgumentParser:
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
    parser.add_argument(
        "--only", default=[""], nargs="+", metavar="TEXT", help="only the sizes whose names hold a TEXT"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        metavar="N",
        help="begin no size that would take longer, and stop after N seconds",
    )
    # How this script calls itself.
    parser.add_argument("--job", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    """Measure and report, or report what was measured."""
    parser = _arguments()
    options = parser.parse_args()
    if options.table is not None:
        record = json.loads(options.table.read_text())
        for title, table in report.markdown(record).items():
            print(f"{title}\n\n{table}\n")
        print("\n".join(f"- {line}" for line in report.balance(record)))
        return 0
    kind = torch.device(options.device).type
    if kind not in SUITES:
        parser.error(f"--device: expected cpu or cuda, got {options.device}")
    if options.job is not None:
        return work(_jobs(options)[options.job], options)
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device")
    if not _jobs(options):
        parser.error(f"--only: expected a part of the name of a size, got {' '.join(options.only)}")

    path = options.out or RESULTS / f"losses_{kind}.json"
    leave_on_sigterm()
    console = Console(width=150)
    record = run(options, path, console)
    _show(record, path, console)
    return 1 if record["problems"] else 0


def _show(record: Record, path: Path, console: Console) -> None:
    console.print(report.terminal_table(record))
    for line in (*report.balance(record), *(f"problem: {line}" for line in record["problems"])):
        console.print(line, highlight=False)
    for line in record["left_out"]:
        console.print(f"not measured: {line}", highlight=False)
    print(f"record: {path}")
    if report.rows_to_draw(record):
        picture = path.with_suffix(".png")
        report.plot(record, picture)
        print(f"picture: {picture}")


if __name__ == "__main__":
    sys.exit(main())
