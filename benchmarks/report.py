"""What a record of the losses' benchmark says: its check, its tables and its picture."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peers import CLONE, PLAIN, PRODUCTS
from rich.table import Table
from tables import grid, machine

Row = dict[str, Any]
Record = dict[str, Any]

SCHEMA = 1
FLOOR = "floor"
PHASES = ("forward", "forward + backward")
#: On a GPU only.
DEVICE, GRAPH = "device time", "CUDA graph"
#: The columns that stand for this library where it is compared with its peers.
DEFAULTS = (
    *("LGLALoss", "LinearLGLALoss"),
    *("BalancedSoftmaxLoss", "FocalLoss", "ClassBalancedLoss", "LDAMLoss"),
)
#: Sizes that only compare what the kernels may do: the fastest peers are missing, so nothing is won there.
APART = ("iNaturalist 4096 x 3 x 8192",)

_NUMBER = (int, float)
_HEAD: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "date": (str,),
    "command": (str,),
    "kind": (str,),
    "device": (str,),
    "cpu": (str,),
    "threads": (int,),
    "torch": (str,),
    "triton": (str, type(None)),
    "python": (str,),
    "commit": (str, type(None)),
    "seed": (int,),
    "copy_gb_per_s": _NUMBER,
    "seconds": _NUMBER,
    "rows": (list,),
}
#: What may be missing, as older records lack it.
_MORE_HEAD: dict[str, tuple[type, ...]] = {"problems": (list,), "left_out": (list,), "note": (str,)}
ROW_FIELDS: dict[str, tuple[type, ...]] = {
    "suite": (str,),
    "shape": (str,),
    "dtype": (str,),
    "column": (str,),
    "ours": (bool,),
    "equal": (bool,),
    "phase": (str,),
    "median_ms": (*_NUMBER, type(None)),
    "q1_ms": (*_NUMBER, type(None)),
    "q3_ms": (*_NUMBER, type(None)),
    "repetitions": (int,),
    "ratio_to_plain": (*_NUMBER, type(None)),
    "peak_mb": (*_NUMBER, type(None)),
    "launches": (int, type(None)),
    "first_step_s": (*_NUMBER, type(None)),
    "note": (str,),
}
#: What may be missing, as older records lack it or it says nothing.
MORE_ROW_FIELDS: dict[str, tuple[type, ...]] = {
    "ratio_q1": _NUMBER,
    "ratio_q3": _NUMBER,
    "share_of_limit": _NUMBER,
}
_CHOICES = {
    "suite": ("logits", "linear"),
    "dtype": ("float32", "bfloat16"),
    "phase": (*PHASES, DEVICE, GRAPH),
}


def faults(record: Record) -> list[str]:
    """Where a record breaks the contract of README.md; an empty list if nowhere."""
    found = _wrong_fields("record", record, _HEAD, _MORE_HEAD)
    if record.get("schema") != SCHEMA:
        found.append(f"schema: expected {SCHEMA}")
    seen = set()
    for number, row in enumerate(record.get("rows", [])):
        where = f"row {number}"
        wrong = _wrong_fields(where, row, ROW_FIELDS, MORE_ROW_FIELDS)
        found += wrong
        if wrong:
            continue
        found += [f"{where}: {key} {row[key]!r}" for key, known in _CHOICES.items() if row[key] not in known]
        key = tuple(row[field] for field in ("shape", "dtype", "column", "phase"))
        if key in seen:
            found.append(f"{where}: twice {key}")
        seen.add(key)
        if row["median_ms"] is None:
            if not row["note"]:
                found.append(f"{where}: no time and no note")
        elif row["column"] == FLOOR:
            if row["median_ms"] <= 0:
                found.append(f"{where}: no time")
        elif row["repetitions"] < 2 or not 0 < row["q1_ms"] <= row["median_ms"] <= row["q3_ms"]:
            found.append(f"{where}: quartiles or repetitions")
        if row["column"] == PLAIN and row["median_ms"] is not None and row["ratio_to_plain"] != 1:
            found.append(f"{where}: the plain loop is its own yardstick")
        ratio = row["ratio_to_plain"]
        if ratio is not None and not 0 < row.get("ratio_q1", ratio) <= ratio <= row.get("ratio_q3", ratio):
            found.append(f"{where}: quartiles of the ratio")
        if row.get("share_of_limit", 1) <= 0:
            found.append(f"{where}: share_of_limit")
    if not record.get("rows"):
        found.append("rows: none")
    return found


def _wrong_fields(
    where: str, values: Row, fields: dict[str, tuple[type, ...]], optional: dict[str, tuple[type, ...]]
) -> list[str]:
    known = fields | optional
    found = [f"{where}: unknown {key}" for key in values if key not in known]
    for key, types in known.items():
        if key not in values:
            found += [f"{where}: no {key}"] if key in fields else []
        elif not isinstance(values[key], types) or (isinstance(values[key], bool) and bool not in types):
            found.append(f"{where}: {key} is {values[key]!r}")
        elif isinstance(values[key], float) and not math.isfinite(values[key]):
            found.append(f"{where}: {key} is not finite")
    return found


def _cells(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by suite, shape and dtype, as recorded."""
    cells: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["suite"], row["shape"], row["dtype"]), []).append(row)
    return cells


def kind_of(row: Row) -> str:
    """The kind of input that a row of a loss of logits names; empty for stacked logits and indices."""
    return str(row["shape"]).partition(", ")[2] if row["suite"] == "logits" else ""


def _rivals(rows: list[Row], row: Row) -> list[Row]:
    """What others than this library computes the whole loss, in the phase of a row."""
    return [
        other
        for other in rows
        if other["phase"] == row["phase"] and other["equal"] and not other["ours"] and other["median_ms"]
    ]


def _quantity_of_time(rows: list[Row]) -> str:
    """What to compare: the ratios to the plain loop where times include the host's, if all rows have one.

    Compiled columns may come from another process, whose host is faster or slower; so is its plain loop.
    """
    by_ratio = all(row["phase"] in PHASES and row["ratio_to_plain"] is not None for row in rows)
    return "ratio_to_plain" if by_ratio else "median_ms"


def verdict(rows: list[Row], row: Row) -> str:
    """How a way of ours stands against the fastest peer of its cell and phase, in one word or two."""
    rivals = [] if row["shape"] in APART else _rivals(rows, row)
    if not row["ours"] or not rivals or row["median_ms"] is None:
        return ""
    quantity = _quantity_of_time([row, *rivals])
    best = min(rivals, key=lambda other: float(other[quantity]))
    factor = row[quantity] / best[quantity]
    if factor > 1:
        return f"LOSES to {best['column']}, x {factor:.2f}"
    return f"wins, x {factor:.2f} of {best['column']}"


def balance(record: Record) -> list[str]:
    """Wins and losses of the default criteria against the fastest peer, every loss by name."""
    lines, wins = [], 0
    for (_, shape, dtype), rows in _cells(record["rows"]).items():
        for row in rows:
            if row["column"] in DEFAULTS and row["phase"] in (*PHASES, DEVICE):
                said = verdict(rows, row)
                wins += said.startswith("wins")
                if said.startswith("LOSES"):
                    lines.append(f"{shape}, {dtype}, {row['phase']}: {row['column']} {said}")
    summary = f"against the fastest peer that computes the same loss: {wins} wins, {len(lines)} losses"
    return [summary + (":" if lines else ""), *lines]


def _figure(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


def terminal_table(record: Record) -> Table:
    """Every way a line, ours coloured by whether they win or lose."""
    table = Table(
        title=f"Losses on {record['device']}, threads: {record['threads']}: milliseconds (times plain loop)"
    )
    measured = {row["phase"] for row in record["rows"]}
    on_gpu = [phase for phase in (DEVICE, GRAPH) if phase in measured]
    numbers = [*PHASES, *on_gpu, *(["limit"] if on_gpu else []), "MB", "launches"]
    for name in ("size", "way", *numbers, "against the fastest peer, forward + backward"):
        table.add_column(name, justify="right" if name in numbers else "left")
    for (_, shape, dtype), rows in _cells(record["rows"]).items():
        title = [shape, dtype]
        for column in dict.fromkeys(row["column"] for row in rows):
            phases = {row["phase"]: row for row in rows if row["column"] == column}
            last = phases.get(PHASES[1]) or phases[GRAPH]
            said = verdict(rows, last) or last["note"]
            style = "red" if said.startswith("LOSES") else "green" if said.startswith("wins") else ""
            limit = phases.get(DEVICE, last).get("share_of_limit")
            table.add_row(
                title.pop(0) if title else "",
                column,
                *(_time_and_ratio(phases.get(phase)) for phase in (*PHASES, *on_gpu)),
                *([_percent(limit)] if on_gpu else []),
                _figure(last["peak_mb"]),
                "" if last["launches"] is None else str(last["launches"]),
                said,
                style=style,
            )
        table.add_section()
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _time_and_ratio(row: Row | None) -> str:
    if row is None or row["median_ms"] is None:
        return ""
    ratio = row["ratio_to_plain"]
    return _figure(row["median_ms"]) + ("" if ratio is None else f" ({_figure(ratio)})")


def markdown(record: Record) -> dict[str, str]:
    """Tables by title: of both suites the times, the share of the limit, and the memory; the kinds of input.

    Times are medians in milliseconds, with their ratio to the plain loop; the fastest (or the least
    memory) of the ways that compute the whole loss is bold, ours or not.
    """
    titles = {
        f"{suite}: {phase}, ms (times plain loop)": (suite, phase, "median_ms")
        for suite in _CHOICES["suite"]
        for phase in _CHOICES["phase"]
    }
    titles |= {
        f"logits: share of the limit, {phase}": ("logits", phase, "share_of_limit")
        for phase in (PHASES[1], DEVICE)
    }
    titles |= {
        f"{suite}: peak memory of forward + backward, MB": (suite, PHASES[1], "peak_mb")
        for suite in _CHOICES["suite"]
    }
    tables = {}
    for title, (suite, phase, quantity) in titles.items():
        rows = [row for row in record["rows"] if (row["suite"], row["phase"]) == (suite, phase)]
        rows = [row for row in rows if not kind_of(row)]  # these have tables of their own
        if any(row.get(quantity) for row in rows):
            tables[title] = _markdown_table(rows, quantity)

    for phase in _CHOICES["phase"]:
        table = _kinds_table([row for row in record["rows"] if row["phase"] == phase])
        if table:
            tables[f"kinds of input: {phase}, times the plain loop"] = table
    return tables


def _kinds_table(rows: list[Row]) -> str:
    """The ratios with their quartiles and the milliseconds: a row a kind of input, a column a size."""
    ours = [row for row in rows if row["suite"] == "logits" and row["column"] in DEFAULTS]
    sizes = list(dict.fromkeys(_size(row) for row in ours if kind_of(row)))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in ours:
        if _size(row) in sizes and row["dtype"] == "float32":
            line = lines.setdefault((kind_of(row) or "stacked logits", row["column"]), {})
            line[_size(row)] = _ratio_and_spread(row)
    texts = [[*names, *(line.get(size, "") for size in sizes)] for names, line in lines.items()]
    return grid(["input", "loss", *sizes], texts, texts=2) if sizes else ""


def _size(row: Row) -> str:
    """Samples and classes, which all kinds of input of a size have in common."""
    return re.sub(r".* (\d+) x \d+ x (\d+).*", r"\1 x \2", row["shape"])


def _ratio_and_spread(row: Row) -> str:
    if row["ratio_to_plain"] is None:
        return ""
    spread = f" ({row['ratio_q1']:.2f} to {row['ratio_q3']:.2f})" if "ratio_q1" in row else ""
    return f"{row['ratio_to_plain']:.2f}{spread}, {_figure(row['median_ms'])} ms"


def balance_text(record: Record) -> str:
    """Wins and losses as text for a page, whose reader opens the list of the losses."""
    first, *lost = balance(record)
    summary = f"{first[0].upper()}{first[1:].rstrip(':')}."
    if not lost:
        return summary
    return "\n".join(
        [summary, "", ":::{dropdown} Every loss by name", *(f"- {line}" for line in lost), ":::"]
    )


def page(record: Record) -> str:
    """All that a record says, as text for a page: where, wins and losses, what is missing, every table."""
    lines = [f"Measured on: {machine(record)}.", balance_text(record)]
    for title, told in (("Failed", record.get("problems")), ("Not measured", _by_columns(record))):
        if told:
            lines.append("\n".join([f"{title}:", "", *(f"- {line}" for line in told)]))
    lines += [f"**{title}**\n\n{table}" for title, table in markdown(record).items()]
    return "\n\n".join(lines)


def _by_columns(record: Record) -> list[str]:
    """What is missing, the sizes that lack the same columns in one line."""
    sizes: dict[str, list[str]] = {}
    for line in dict.fromkeys(record.get("left_out", ())):
        size, _, columns = line.rpartition(", ")
        key, text = (columns, size) if columns.endswith(" columns") else (line, "")
        sizes.setdefault(key, []).append(text)
    return [f"{key}: {'; '.join(texts)}" if any(texts) else key for key, texts in sizes.items()]


def _markdown_table(rows: list[Row], quantity: str) -> str:
    """A table a type: a row a way, a column a size."""
    cells = {key: cell for key, cell in _cells(rows).items() if any(row.get(quantity) for row in cell)}
    return "\n\n".join(
        _table_of_type(
            dtype, {shape: cell for (_, shape, own), cell in cells.items() if own == dtype}, quantity
        )
        for dtype in dict.fromkeys(own for _, _, own in cells)
    )


def _table_of_type(dtype: str, sizes: dict[str, list[Row]], quantity: str) -> str:
    """The ways by size; the best of those that compute the whole loss is bold."""
    lines: dict[str, list[str]] = {}
    better = max if quantity == "share_of_limit" else min
    for place, cell in enumerate(sizes.values()):
        measured = [row for row in cell if row.get(quantity) is not None]
        whole = [row for row in measured if row["equal"] and row["shape"] not in APART]
        compared = _quantity_of_time(whole) if quantity == "median_ms" else quantity
        best = better((row[compared] for row in whole), default=None)
        for row in measured:
            text = _text(row, quantity)
            bold = row in whole and row[compared] == best
            line = lines.setdefault(row["column"], [""] * len(sizes))
            line[place] = f"**{text}**" if bold else text
    return grid([dtype, *sizes], ([way, *texts] for way, texts in lines.items()))


def _text(row: Row, quantity: str) -> str:
    if quantity == "median_ms":
        return _time_and_ratio(row)
    return _percent(row[quantity]) if quantity == "share_of_limit" else _figure(row[quantity])


#: Hatches of the bars, first of ours, then of others. All bars of a picture have another colour or hatch.
_OURS = {
    "LGLALoss": "",
    "LinearLGLALoss": "",
    "LGLALoss, compiled": "///",
    "LinearLGLALoss, compiled": "///",
    "LGLALoss, reference": "...",
    "head + LGLALoss": "...",
    "LGLALoss, fused": "xxx",
}
_OTHERS = {
    "plain loop, compiled": "///",
    "paper's formula": "...",
    "F.linear_cross_entropy": "...",
    "liger-kernel": "xxx",
    "cut-cross-entropy": "---",
    CLONE: "",
}


def rows_to_draw(record: Record) -> list[Row]:
    """Training steps of logits as they are mostly given, beside the plain loop; of a GPU without the host."""
    # Tables have the others.
    rows = [row for row in record["rows"] if not kind_of(row) and row["shape"] not in APART]
    if record["kind"] != "cuda":
        return [row for row in rows if row["phase"] == PHASES[1] and row["ratio_to_plain"]]
    steps = [row for row in rows if row["phase"] == DEVICE and row["ratio_to_plain"]]
    plain = {(row["shape"], row["dtype"]): row["median_ms"] for row in steps if row["column"] == PLAIN}
    floors = [row for row in rows if row["phase"] == PHASES[1] and row["column"] == FLOOR]
    return steps + [
        {**row, "ratio_to_plain": row["median_ms"] / plain[row["shape"], row["dtype"]]}
        for row in floors
        if (row["shape"], row["dtype"]) in plain
    ]


def plot(record: Record, path: Path) -> None:
    """Forward + backward beside the plain loop: a panel a suite and dtype, down is faster."""
    import matplotlib as mpl

    from lgla_losses.plot.style import METHODS, REFERENCE

    mpl.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rows = rows_to_draw(record)
    where = " on the device" if record["kind"] == "cuda" else ""
    panels = list(dict.fromkeys((row["suite"], row["dtype"]) for row in rows))
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 4.6 * len(panels)), layout="constrained", squeeze=False
    )
    for axis, (suite, dtype) in zip(axes[:, 0], panels, strict=True):
        here = [row for row in rows if (row["suite"], row["dtype"]) == (suite, dtype)]
        shapes = list(dict.fromkeys(row["shape"] for row in here))
        names = [name for name in _OURS | _OTHERS if any(row["column"] == name for row in here)]
        width = 0.84 / len(names)
        for place, name in enumerate(names):
            of_shape = {row["shape"]: row["ratio_to_plain"] for row in here if row["column"] == name}
            x = [i - 0.42 + width * (place + 0.5) for i, shape in enumerate(shapes) if shape in of_shape]
            bars = axis.bar(
                x,
                [ratio - 1 for ratio in of_shape.values()],
                width=0.92 * width,
                bottom=1,
                color=METHODS["LGLA"] if name in _OURS else REFERENCE,
                hatch=(_OURS | _OTHERS)[name],
                edgecolor="white",
                linewidth=0,
                label=name,
            )
            for bar, ratio in zip(bars, of_shape.values(), strict=True):
                axis.annotate(
                    f"{ratio:.2f}",
                    (bar.get_x() + bar.get_width() / 2, ratio),
                    xytext=(0, 2 if ratio >= 1 else -2),
                    textcoords="offset points",
                    ha="center",
                    va="bottom" if ratio >= 1 else "top",
                    rotation=90,
                    fontsize=8,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
                )
        floors = [
            (shapes.index(row["shape"]), row["ratio_to_plain"])
            for row in here
            if row["column"] in (FLOOR, PRODUCTS)
        ]
        axis.hlines(
            [ratio for _, ratio in floors],
            [i - 0.46 for i, _ in floors],
            [i + 0.46 for i, _ in floors],
            colors="black",
            linestyles="dashed",
            linewidth=1.2,
            label="floor: the matrix products alone"
            if suite == "linear"
            else "floor: bytes / copy bandwidth",
        )
        axis.axhline(1, color="black", linewidth=1)
        axis.set_yscale("log")
        axis.margins(y=0.16)
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xticks(range(len(shapes)), [shape.replace(" ", "\n", 1) for shape in shapes])
        axis.set_xlabel("size: samples x experts x classes")
        axis.set_ylabel("time / time of the plain loop")
        axis.set_title(f"{suite}, {dtype}: forward + backward{where}, lower is faster")
        axis.legend(fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.24), frameon=False)
    figure.suptitle(f"{record['device']}, threads: {record['threads']}, torch {record['torch']}")
    figure.savefig(path, dpi=130)
    plt.close(figure)
