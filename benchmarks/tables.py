"""The committed records as tables of Markdown, for README and docs (report.py has the losses' in full)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Record = dict[str, Any]


class Markdown(str):
    """Text that a notebook shows as Markdown."""

    __slots__ = ()

    def _repr_markdown_(self) -> str:
        return str(self)


def read(name: str) -> Record:
    """The committed record of this name."""
    record: Record = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return record


def has(name: str) -> bool:
    """Whether there is a committed record of this name."""
    return (RESULTS / f"{name}.json").exists()


def machine(record: Record) -> str:
    """Where, with what and when a record was made, as far as it says so; its commit stays in the record."""
    facts = [record.get("device")]
    facts += [f"{record[key]} {key}" for key in ("threads", "cores") if key in record]
    facts += [
        f"{name} {record[name.lower()]}" for name in ("Python", "torch", "Triton") if name.lower() in record
    ]
    facts += [record["date"][:10]] if "date" in record else []
    return ", ".join(fact for fact in facts if fact)


def grid(header: Sequence[str], rows: Iterable[Sequence[object]], texts: int = 1) -> str:
    """A table whose first columns are text, the others numbers."""
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (header, rule, *rows))


def layouts(record: Record) -> str:
    """Speed and memory of the experts: a row a network and way of running it."""
    rows = []
    for row in record["rows"]:
        if row["images_per_second_quartiles"] is None:
            rows.append([row["network"], row["layout"], row["batch"], row["note"], ""])
            continue
        low, median, high = row["images_per_second_quartiles"]
        rate, memory = f"{_rate(median)} ({_rate(low)} to {_rate(high)})", row["peak_mib_median"]
        rows.append(
            [row["network"], row["layout"], row["batch"], rate, "" if memory is None else f"{memory:.0f}"]
        )
    return grid(["network", "way", "batch", "images a second", "MiB"], rows, texts=2)


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.1f}"


def kernels(record: Record) -> str:
    """What the compiled kernels need at most: a row a GPU and type."""
    rows = []
    found: dict[tuple[str, str], list[Record]] = {}
    for row in record["rows"]:
        found.setdefault((row["target"], row["configuration"]["dtype"]), []).append(row)
    for (target, dtype), same in found.items():
        most = [max(row[need] for row in same) for need in ("registers", "spill_bytes", "shared_bytes")]
        rows.append([target, dtype, len(same), *most])
    header = ["GPU", "type", "kernels", "registers", "bytes spilled", "bytes shared"]
    return grid(header, rows, texts=2)


def checks(record: Record) -> str:
    """What gpu_check.py found: a row a kind of check and type, with the largest error beside its bound."""
    rows = []
    for row in record["rows"]:
        errors = [f"{row[key]:.2g}" if key in row else "" for key in ("largest_error", "bound")]
        rows.append([row["what"], row["dtype"], row["check"], row["passed"], row["failed"], *errors])
    return grid(["what", "type", "check", "passed", "failed", "largest error", "bound"], rows, texts=3)


def tests(record: Record) -> str:
    """How the tests on a GPU ended, and each that failed with its cause."""
    counts = f"{record['passed']:,} passed, {record['failed']} failed, {record['cut_off']} were cut off."
    rows = [[f"`{row['test']}`", row["cause"], row["cases"]] for row in record["failures"]]
    return f"{counts}\n\n{grid(['failed', 'cause', 'cases'], rows, texts=2)}" if rows else counts


def forms(record: Record) -> str:
    """How long a step of stacked training takes: a row a form, the fastest first."""
    times = {
        name: found["milliseconds_per_step"]
        for name, found in record["forms"].items()
        if isinstance(found, dict)
    }
    rows = [[f"`{name}`", f"{times[name]:.2f}"] for name in sorted(times, key=lambda name: times[name])]
    missing = [f"`{name}`" for name in record["forms"] if name not in times]
    table = grid(["form", "ms a step"], rows)
    return f"{table}\n\nNot measured: {', '.join(missing)}." if missing else table


#: What README compares the loss with.
WAYS = ("LGLALoss", "plain loop, compiled", "plain loop", "paper's formula")


def brief(record: Record) -> str:
    """README's selection of the losses' record: training steps in float32, the fastest in bold."""
    wanted = {"suite": "logits", "dtype": "float32", "phase": "forward + backward"}
    chosen = [row for row in record["rows"] if all(row[key] == value for key, value in wanted.items())]
    rows = []
    for shape in dict.fromkeys(row["shape"] for row in chosen):
        cells = {row["column"]: row for row in chosen if row["shape"] == shape and row["median_ms"]}
        if not set(WAYS) <= set(cells):
            continue  # another kind of input, or a size with fewer ways
        times = [cells[way]["median_ms"] for way in WAYS]
        texts = [f"**{ms:.3g}**" if ms == min(times) else f"{ms:.3g}" for ms in times]
        rows.append([shape, *texts, *(f"{cells[way]['peak_mb']:.3g}" for way in (WAYS[0], WAYS[2]))])
    return grid(["samples x experts x classes", *WAYS, f"MB: {WAYS[0]}", WAYS[2]], rows)
