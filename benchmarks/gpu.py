"""Check, measure and train on a machine with a GPU, in one command: ``make gpu``.

Needs PyTorch and what the sections use of an image's packages; no network, no installation, no compiler.
Every section has a time limit of its own, and one that fails or is cut off does not stop the next. What there
is lies under --out at any time: a log of each section, their records, gpu.json with how they ended, and all
of it in gpu.tar.gz. With --device cpu it is a dry run: short, and of nothing but whether all runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
#: Every section, and its share of the time: seconds of ten minutes.
SHARES = {"check": 120, "bench": 120, "layouts": 45, "train": 315}
#: Seconds in which a process may write what it has, from the first signal on.
GRACE = 5.0
#: Larger checkpoints, in bytes, stay out of the archive.
LARGEST_CHECKPOINT = 4_000_000
ARCHIVE = "gpu.tar.gz"
#: Folders that hold nothing of interest.
CACHES = {"__pycache__", ".pytest_cache", ".hypothesis"}
#: Lets torchvision as PyPI has it, built for CUDA, import beside a PyTorch for CPUs alone.
SHIM = "tests/helpers/torchvision_shim.py"
#: More processes of tests than these wait for one GPU.
MOST_PROCESSES = 16


class Part(NamedTuple):
    """A process of a section.

    Attributes:
        command: what Python runs; ``{seconds}`` stands for the time that it may plan with.
        share: of the section's time that is left.
        stop: the signal at the limit, upon which the process writes what it has.
        grace: seconds that it may take for this, beyond GRACE within the limit.
        threads: of a process on the CPU; None leaves it to PyTorch.
    """

    command: list[str]
    share: float = 1.0
    stop: signal.Signals = signal.SIGTERM
    grace: float = GRACE
    threads: int | None = None


@dataclass
class Section:
    """A section and how it ended.

    Attributes:
        seconds_given: its time limit, where the user gave one.
    """

    name: str
    seconds_given: float | None = None
    outcome: str = "not run"
    seconds: float = 0.0
    limit: float = 0.0
    parts: list[dict[str, str | float]] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether the exit status tells of it."""
        return not self.outcome.startswith(("passed", "skipped"))


class Runner:
    """Runs sections after one another, and keeps their record and archive in ``options.out``."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out
        self.sections: list[Section] = options.sections
        self.end = time.monotonic() + less_margin(options.seconds)
        self.stopped_by: str | None = None

    def run(self) -> bool:
        """Run all sections; whether none failed."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._note)
        for index, section in enumerate(self.sections):
            reason = self._reason_to_skip(section)
            if self.stopped_by is not None:
                break
            if reason:
                section.outcome = f"skipped: {reason}"
                echo(f"== {section.name}: {section.outcome}")
            else:
                section.limit = self._limit(index)
                self._run_section(section)
            self._keep()
        self._keep()
        echo(table(self.sections))
        echo(f"all of it: {self.out / ARCHIVE}")
        return not any(section.failed for section in self.sections)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal: the process that runs is ended, then what there is is kept."""
        self.stopped_by = signal.Signals(number).name

    def _reason_to_skip(self, section: Section) -> str:
        needs_data = section.name == "train" and not is_dry(self.options)
        return "no data given, as by DATA=FILE.npz" if needs_data and self.options.data is None else ""

    def _limit(self, index: int) -> float:
        """Seconds of a section: what it was given, or its share, so that what others leave over is used."""
        left = max(self.end - time.monotonic(), 0.0)
        section, *later = (s for s in self.sections[index:] if not self._reason_to_skip(s))
        if section.seconds_given is not None:
            return min(section.seconds_given, left)
        left = max(left - sum(s.seconds_given or 0.0 for s in later), 0.0)
        shares = [SHARES[s.name] for s in (section, *later) if s.seconds_given is None]
        return left * shares[0] / sum(shares)

    def _run_section(self, section: Section) -> None:
        echo(f"== {section.name}: at most {section.limit:.0f} s")
        begun = time.monotonic()
        log = self.out / f"{section.name}.log"
        try:
            with log.open("wb") as file:
                for part in parts_of(section.name, self.options):
                    left = section.limit - (time.monotonic() - begun)
                    section.parts.append(self._run_part(part, part.share * left, file))
                    if self.stopped_by is not None:
                        break
            outcomes = [str(part["outcome"]) for part in section.parts]
            section.outcome = next((o for o in outcomes if o != "passed"), "passed")
        except OSError as error:
            section.outcome = f"failed: {error}"
        section.seconds = round(time.monotonic() - begun, 1)

    def _run_part(self, part: Part, limit: float, log: IO[bytes]) -> dict[str, str | float]:
        """Run a process to its end or its limit, then end all that it started."""
        limit = max(limit - (part.grace - GRACE), 0.0)
        words = [word.replace("{seconds}", f"{less_margin(limit):.0f}") for word in part.command]
        command = shlex.join(["python", *words])
        program = next(word for word in words if word not in ("-m", SHIM)).rpartition("/")[2]
        copy(f"$ {command}\n".encode(), log)
        printed_from = log.tell()
        begun = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment(part.threads),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        reader = threading.Thread(target=read, args=(process.stdout, log), daemon=True)
        reader.start()
        while process.poll() is None and self.stopped_by is None and time.monotonic() - begun < limit:
            time.sleep(0.05)
        outcome = "passed" if process.returncode == 0 else f"{program}: exit status {process.returncode}"
        if process.returncode is None:
            why = f"stopped by {self.stopped_by}" if self.stopped_by else f"cut off after {limit:.0f} s"
            outcome = f"{program}: {why}"
        end_all(process, part.stop, part.grace)
        reader.join(GRACE)
        if outcome != "passed":
            echo(f"\n{outcome}")
        return {
            "command": command,
            "outcome": outcome,
            "seconds": round(time.monotonic() - begun, 1),
            "last_line": last_line(Path(log.name).read_bytes()[printed_from:]),
        }

    def _keep(self) -> None:
        """Write the record, and the archive of what there is; a full disk does not stop the sections."""
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "python": platform.python_version(),
            "device": self.options.device,
            "seconds": self.options.seconds,
            "sections": [asdict(section) for section in self.sections],
        }
        try:
            (self.out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
            archive(self.out)
        except OSError as error:
            echo(f"not kept: {error}")


def parts_of(section: str, options: argparse.Namespace) -> Iterator[Part]:
    """The processes of a section; those of a dry run are short."""
    out, device, dry = options.out, ["--device", options.device], is_dry(options)
    quick = ["--quick"] if dry else []
    if section == "check":
        yield Part(["benchmarks/gpu_check.py", *device, "--out", f"{out}/check.json"], share=0.5)
        yield tests(out, dry)
    elif section == "bench":
        record = ["--out", f"{out}/losses.json", "--seconds", "{seconds}"]
        yield Part(["benchmarks/losses.py", *device, *record, *quick])
    elif section == "layouts":
        record = ["--output", f"{out}/expert_layouts.json", "--seconds", "{seconds}"]
        yield Part(["benchmarks/expert_layouts.py", *device, *record, *quick])
    else:
        data = options.data or out / "random_images.npz"
        if options.data is None:
            yield Part(["benchmarks/random_images.py", str(data)])
        trained = out / "train"
        if dry:  # its checkpoints are in nobody's way
            trained = out / "train-dry"
            shutil.rmtree(trained, ignore_errors=True)
        record = ["--data", str(data), "--out", str(trained), "--seconds", "{seconds}"]
        script = [SHIM, "examples/train_stacked.py"] if dry else ["examples/train_stacked.py"]
        yield Part([*script, *device, *record, *quick])


def tests(out: Path, dry: bool) -> Part:
    """The tests that need CUDA, in parallel where pytest-xdist is there; in a dry run those of one file."""
    words = ["-m", "pytest", "-q", f"--junitxml={out}/tests.xml"]
    words += ["-p", "no:cacheprovider", "-p", "no:benchmark"]  # which warns that it does not run in parallel
    if dry:
        words += ["tests/losses/test_grouping.py"]
    else:
        # Others do not run on CUDA, and may need packages that are not there.
        named = (path for path in sorted((ROOT / "tests").rglob("test_*.py")) if names_a_device(path))
        words += ["-m", "cuda and not slow", "--maxfail=50", "--continue-on-collection-errors"]
        words += [str(path.relative_to(ROOT)) for path in named]
        if importlib.util.find_spec("xdist"):
            words += ["-n", str(min(os.cpu_count() or 1, MOST_PROCESSES)), "--dist", "worksteal"]
    # Upon Ctrl-C pytest reports what it has found so far, after 10 seconds in which its workers may end.
    return Part(words, stop=signal.SIGINT, grace=GRACE if dry else 13.0, threads=1)


def names_a_device(path: Path) -> bool:
    """Whether a file of tests may run some on CUDA."""
    return (
        re.search(r"\b(cuda|device|DEVICES?|from engines import)\b", path.read_text(encoding="utf-8"))
        is not None
    )


def is_dry(options: argparse.Namespace) -> bool:
    """Whether this run only shows that all runs."""
    return str(options.device).startswith("cpu")


def less_margin(seconds: float) -> float:
    """A time to plan with: what comes after it, as an archive, takes time as well."""
    return seconds - min(10.0, seconds / 10)


def environment(threads: int | None) -> dict[str, str]:
    """The environment of a process: the package of this checkout, and output as it comes."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    limited = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return {
        **os.environ,
        **limited,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "MPLBACKEND": "agg",
    }


def end_all(process: subprocess.Popen[bytes], stop: signal.Signals, grace: float) -> None:
    """Ask a process to end, then kill whatever is left of its group."""
    if process.poll() is None:
        process.send_signal(stop)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read(output: IO[bytes], log: IO[bytes]) -> None:
    """Copy what a process prints until nobody can print any more."""
    with suppress(OSError, ValueError):  # the log is closed where a process escaped from its group
        while block := os.read(output.fileno(), 1 << 16):
            copy(block, log)


def copy(text: bytes, log: IO[bytes]) -> None:
    """Write bytes into the log at once, and to the terminal."""
    log.write(text)
    log.flush()
    to_terminal(text)


def echo(line: str) -> None:
    """Show a line on the terminal."""
    to_terminal(f"{line}\n".encode())


def to_terminal(text: bytes) -> None:
    """Show bytes; a terminal that is gone does not stop the sections."""
    try:
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def last_line(printed: bytes) -> str:
    """The last line that says something."""
    lines = re.split(r"[\r\n]", printed.decode(errors="replace"))
    return next((line.strip("= ")[:80] for line in reversed(lines) if line.strip("= ")), "")


def archive(out: Path) -> None:
    """Pack all files but caches and large checkpoints, whole or not at all."""
    path = out / ARCHIVE
    temporary = path.with_suffix(".part")
    with tarfile.open(temporary, "w:gz") as packed:
        for file in sorted(out.rglob("*")):
            name = file.relative_to(out)
            heavy = file.suffix == ".pt" and file.stat().st_size > LARGEST_CHECKPOINT
            own = file in (path, temporary)
            if file.is_file() and not heavy and not own and CACHES.isdisjoint(name.parts):
                packed.add(file, name, recursive=False)
    temporary.replace(path)


def table(sections: list[Section]) -> str:
    """How the sections ended, a line each."""
    rows = [("section", "outcome", "seconds", "limit", "last line of each process")]
    for section in sections:
        times = (f"{section.seconds:.1f}", f"{section.limit:.0f}")
        last = " | ".join(str(part["last_line"]) for part in section.parts)
        rows.append((section.name, section.outcome, *times, last))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def section_name(text: str) -> Section:
    """A section of the command line: ``NAME`` or ``NAME=SECONDS``."""
    name, equals, seconds = text.partition("=")
    if name not in SHARES:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(SHARES)}, got {name!r}")
    return Section(name, positive_seconds(seconds) if equals else None)


def positive_seconds(text: str) -> float:
    """A time."""
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected seconds above 0 and below a million, got {text}")
    return value


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run (default: cuda)")
    parser.add_argument("--out", type=Path, default=Path("runs", "gpu"), help="(default: runs/gpu)")
    parser.add_argument(
        "--sections",
        type=section_name,
        nargs="+",
        default=[Section(name) for name in SHARES],
        metavar="NAME[=SECONDS]",
        help=f"some of {', '.join(SHARES)}, in the order given; without =SECONDS each has its share",
    )
    parser.add_argument("--seconds", type=positive_seconds, default=600.0, help="for all (default: 600)")
    parser.add_argument("--data", type=Path, help="images to train on: an .npz as train_stacked.py reads")
    options = parser.parse_args(arguments)
    names = [section.name for section in options.sections]
    if len(set(names)) < len(names):
        parser.error(f"argument --sections: expected each but once, got {' '.join(names)}")
    if options.data is not None and not options.data.is_file():
        parser.error(f"argument --data: expected a file, got {options.data}")
    options.data = options.data and options.data.resolve()
    options.out = options.out.resolve()
    earlier = sorted(options.out.glob("train/seed*.pt"))
    if "train" in names and options.data is not None and not is_dry(options) and earlier:
        parser.error(f"argument --out: {earlier[0]} is of an earlier run; take another folder")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: expected a folder to write into: {error}")
    return options


if __name__ == "__main__":
    raise SystemExit(0 if Runner(parse_options()).run() else 1)
