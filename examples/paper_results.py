# Needs: ../benchmarks/tables.py, cli.py, files.py.
"""Make tables and figures of the records of train_paper.py and sweep_tau.py.

A page says what it shows: between ``<!-- KIND: NAME NAME -->`` and ``<!-- end -->`` goes a table of the
records of these names; ``<!-- bars: NAME NAME -->`` stands before an image that is drawn of them. A page
that is not there begins with all records. With --runs, what needs test logits is computed first.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from cli import InputError, Parser, needs, start
from files import check_output, make_folder, write_whole
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "docs" / name for name in ("results.md", "results-details.md")]


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(description=__doc__)
    parser.add_argument("--records", type=Path, default=ROOT / "benchmarks" / "results" / "paper")
    parser.add_argument("--page", type=Path, nargs="+", default=PAGES, help="the pages to fill")
    parser.add_argument(
        "--runs", type=Path, help="folder of train_paper.py's runs, whose names are the records'"
    )
    return parser


with needs("plot", make_parser, __name__):
    import matplotlib as mpl
    import numpy as np
    from matplotlib.figure import Figure

    from lgla_losses import suggest
    from lgla_losses.data import long_tailed_counts, long_tailed_indices
    from lgla_losses.label_shift import estimate_prior, shift_prior
    from lgla_losses.plot import fusion_sweep, plot_fusion_sweep, plot_weight_norms
    from lgla_losses.plot.style import METHODS

    mpl.use("Agg")

    sys.path.append(str(ROOT / "benchmarks"))
    from tables import grid

TABLE = re.compile(r"(<!-- (cells|shift|tau|scripts): (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
BARS = re.compile(r"<!-- bars: (.*?) -->\s*!\[(.*?)\]\((.*?)\)")
SMOOTHING = 3.0  # of the prior that is fitted to a test set
SPLITS = ("all", "many", "medium", "few")
#: Their names in a record.
COLUMNS = ("balanced", *SPLITS[1:])
#: Colors by the first word of a method; CLA is LGLA without its weights.
COLORS = {
    "Softmax": METHODS["softmax"],
    "BALMS": METHODS["balanced softmax"],
    "CLA": METHODS["LGLA"],
    "LGLA": METHODS["LGLA"],
    "Ours": METHODS["LGLA"],
}
#: They tell the bars of one color apart, and all bars without color.
METHOD_HATCHES = {
    "BALMS x1": "---",
    "BALMS x3": "...",
    "BALMS x3 + AAW": "///",
    "CLA": "\\\\\\",
    "LGLA": "xxx",
    "LGLA, tau = K - 1": "|||",
}


def cell_text(score: dict[str, float | None] | None) -> str:
    """``mean ± deviation``, which no line break divides, or a dash where a split has no classes."""
    if score is None:
        return "-"
    deviation = score["deviation"]
    return f"{score['mean']:.1f}" + ("" if deviation is None else f"\u00a0±\u00a0{deviation:.1f}")


def labels(records: list[dict[str, Any]]) -> list[str]:
    """The methods, and what else distinguishes the cells: tau where there are several."""
    taus = [tau_of(record) for record in records]
    several = len({*taus} - {None}) > 1
    return [
        f"{record['row']}, {record['column']}"
        if record["column"] not in (None, "accuracy")
        else f"{record['row']}, tau = {tau:g}"
        if several and tau is not None
        else record["row"]
        for record, tau in zip(records, taus, strict=True)
    ]


def tau_of(record: dict[str, Any]) -> float | None:
    """The tau of LGLA and CLA; None for other methods."""
    said = record["configuration"]
    if said["adjustment"] != "lgla":
        return None
    tau: float | None = said["tau"]
    return suggest(said["num_experts"]).tau if tau is None else tau


def hatch(record: dict[str, Any]) -> str:
    """The hatch of a method's bars, the same in every picture."""
    tau = tau_of(record)
    uniform = tau is not None and tau == record["configuration"]["num_experts"] - 1
    return METHOD_HATCHES.get(record["row"] + (", tau = K - 1" if uniform else ""), "")


def cells_table(records: list[dict[str, Any]]) -> str:
    """A row a record: accuracies after the last epoch, and the paper's number where there is one."""
    scores = [[record["summary"]["final"].get(column) for column in COLUMNS] for record in records]
    best = [cell_text(record["summary"]["best"]["balanced"]) for record in records]
    columns = {
        "method": labels(records),
        **dict(
            zip(SPLITS, ([cell_text(s) for s in column] for column in zip(*scores, strict=True)), strict=True)
        ),
        "best epoch": best,
        "paper, with RandAug": [paper_text(record) for record in records],
    }
    if set(columns["few"]) == {"-"}:
        del columns["few"]
    if best == columns["all"]:  # evaluated at the end only, or best there
        del columns["best epoch"]
    if set(columns["paper, with RandAug"]) == {"-"}:
        del columns["paper, with RandAug"]
    seeds = seeds_text(records)
    told = "One seed." if seeds == "1" else f"Mean ± standard deviation over {seeds} seeds."
    table = grid(list(columns), zip(*columns.values(), strict=True))
    return f"{table}\n\n{' '.join([told, *protocol_text(records)])}"


def paper_text(record: dict[str, Any]) -> str:
    """The paper's number. It trains with RandAugment, but for a column of Table 4 and for Places-LT."""
    if record["paper"] is None:
        return "-"
    without = record["column"] == "w/o RandAug" or "Places-LT" in record["protocol"]
    return f"{record['paper']}{' (without)' if without else ''}"


def protocol_text(records: list[dict[str, Any]]) -> list[str]:
    """What the paper's numbers are of, in a sentence if there are any."""
    found: dict[str, list[str]] = {}
    for record in records:
        if record["paper"] is not None:
            (name,) = labels([record])  # the paper's number is of the paper's tau
            found.setdefault(record["protocol"], []).append(name)
    told = [
        f"{', '.join(rows)}: {protocol}" if i else protocol
        for i, (protocol, rows) in enumerate(found.items())
    ]
    return [f"The paper's numbers: {'; '.join(told)}."] if told else []


def seeds_text(records: list[dict[str, Any]]) -> str:
    """How many runs a number is of, at least and at most."""
    numbers = [len(record["runs"]) for record in records]
    return " to ".join(map(str, dict.fromkeys((min(numbers), max(numbers)))))


def shift_table(records: list[dict[str, Any]]) -> str:
    """A row a test distribution, averaged over the seeds of one record."""
    columns = {name: name for name in ("as it is", "uniform", "fitted")} | {"fitted, smoothed": "smoothed"}
    columns |= {"true": "true"}
    distances = {"distance, fitted": "distance: fitted", "distance, fitted, smoothed": "smoothed"}
    rows: list[list[object]] = []
    for same in zip(*records[0]["label_shift"], strict=True):
        factor = same[0]["imbalance"]
        name = "uniform" if factor == 1 else f"{'head' if factor > 0 else 'tail'} first, IF {abs(factor)}"
        accuracies = [f"{statistics.mean(row[column] for row in same):.1f}" for column in columns]
        away = [f"{statistics.mean(row[column] for row in same):.2f}" for column in distances]
        rows.append([name, same[0]["samples"], *accuracies, *away])
    return grid(["test set", "samples", *columns.values(), *distances.values()], rows)


def tau_table(records: list[dict[str, Any]]) -> str:
    """A row a K by tau / (K - 1): a table of balanced accuracy, and one of the lean to the head."""
    cells = {(cell["experts"], cell["ratio"]): cell for cell in records[0]["cells"]}
    ratios = sorted({ratio for _, ratio in cells})
    accuracies: list[list[object]] = []
    slopes: list[list[object]] = []
    for k in records[0]["experts"]:
        of_k = [cells[k, ratio] for ratio in ratios]
        accuracies.append([f"K = {k}", *(spread_text(cell["balanced"]) for cell in of_k)])
        slopes.append([f"K = {k}", *(f"{statistics.mean(cell['slope']):+.2f}" for cell in of_k)])
    header = [f"{ratio:g}" for ratio in ratios]
    return (
        f"{grid(['accuracy at tau / (K - 1) =', *header], accuracies)}\n\n"
        f"{grid(['lean at tau / (K - 1) =', *header], slopes)}"
    )


def spread_text(values: list[float]) -> str:
    """Mean and standard deviation of some values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return cell_text({"mean": statistics.mean(values), "deviation": deviation})


def scripts_table(records: list[dict[str, Any]]) -> str:
    """A row a run of the training scripts, and where they ran."""
    rows: list[list[object]] = []
    for run in records[0]["runs"]:
        scores = run["final"]["scores"]["ensemble"]
        cells = [f"{100 * scores[split]:.1f}" for split in ("balanced", "many", "medium", "few")]
        rows.append([f"{run['data']}, {run['method']}", *cells, f"{run['seconds'] / 60:.1f}"])
    torches = {run["versions"]["torch"].partition("+")[0] for run in records[0]["runs"]}
    ran = f"Run on: {records[0]['device']}, torch {', '.join(sorted(torches))}."
    return f"{grid(['run', *SPLITS, 'minutes'], rows)}\n\n{ran}"


TABLES = {"cells": cells_table, "shift": shift_table, "tau": tau_table, "scripts": scripts_table}


def read_records(names: str, folder: Path) -> list[dict[str, Any]]:
    """The records of these names."""
    return [read_record(folder / f"{name}.json") for name in names.split()]


def read_record(path: Path) -> dict[str, Any]:
    """What train_paper.py or sweep_tau.py wrote."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a record in JSON, got {error}") from error
    return record


def fill(page: str, folder: Path) -> str:
    """The page with every table made anew."""

    def make(found: re.Match[str]) -> str:
        return f"{found[1]}\n{TABLES[found[2]](read_records(found[3], folder))}\n\n{found[4]}"

    return TABLE.sub(make, page)


def pooled(seeds: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets and counts; the seeds share a test set, so a recall of all is the mean of theirs."""
    logits, target = (torch.cat([outputs[name] for outputs in seeds]) for name in ("logits", "target"))
    return logits.float(), target, seeds[0]["class_counts"]


def fusion_rows(seeds: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Figure 6: the accuracy of every split as the weight of one local expert grows from 0.1 to 0.9."""
    weights = [i / 10 for i in range(1, 10)]
    return [
        {"expert": k, "weight": weight}
        | {split: round(100 * float(value), 2) for split, value in zip(SPLITS, scores, strict=True)}
        for k, expert in enumerate(fusion_sweep(*pooled(seeds), weights))
        for weight, scores in zip(weights, expert, strict=True)
    ]


def label_shift(outputs: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Top-1 accuracy on test sets of other priors: as it is, and with priors assumed, fitted and true."""
    ensemble, target = outputs["logits"].float().mean(dim=1), outputs["target"]
    prior, num_classes = outputs["implied_prior"], outputs["logits"].shape[2]
    by_frequency = outputs["class_counts"].argsort(descending=True, stable=True)
    available = int(target.bincount(minlength=num_classes).min())
    rows = []
    for factor in (
        50,
        10,
        2,
        1,
        -2,
        -10,
        -50,
    ):  # below 0 the rare classes of training are frequent in the test
        order = by_frequency if factor > 0 else by_frequency.flip(0)
        counts = torch.empty(num_classes, dtype=torch.int64)
        counts[order] = long_tailed_counts(available, num_classes, abs(factor))
        chosen = long_tailed_indices(target, counts)
        logits, labels, true = ensemble[chosen].double(), target[chosen], counts / counts.sum()
        priors = {
            "as it is": prior,
            "uniform": torch.full_like(prior, 1 / num_classes),
            "fitted": estimate_prior(logits, prior, smoothing=0.0),
            "fitted, smoothed": estimate_prior(logits, prior, smoothing=SMOOTHING),
            "true": true,
        }
        choices = {name: shift_prior(logits, prior, assumed) for name, assumed in priors.items()}
        accuracy = {
            name: round(100 * float((v.argmax(1) == labels).double().mean()), 2)
            for name, v in choices.items()
        }
        distances = {
            name: float((priors[name] - true).abs().sum() / 2) for name in ("fitted", "fitted, smoothed")
        }
        rounded = {f"distance, {name}": round(distance, 4) for name, distance in distances.items()}
        rows.append({"imbalance": factor, "samples": len(labels), **accuracy, **rounded})
    return rows


def read_outputs(path: Path) -> dict[str, Tensor]:
    """What train_paper.py kept of a run."""
    try:
        with np.load(path) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: expected the outputs of a run, got another file ({error})") from error


def analyse(seeds: list[dict[str, Tensor]], by_shots: bool) -> dict[str, Any]:
    """What the test logits of a run's seeds say: fusion, label shift, norms of the class weights."""
    return {
        "label_shift": [label_shift(outputs) for outputs in seeds],
        "fusion": fusion_rows(seeds) if by_shots else None,
        "norms": [
            [round(float(v), 4) for v in expert]
            for expert in torch.stack([outputs["norms"] for outputs in seeds]).mean(dim=0)
        ],
        "class_counts": seeds[0]["class_counts"].tolist(),
    }


def draw_fusion(seeds: list[dict[str, Tensor]], path: Path) -> None:
    """Figure 6, of experts for many-, medium- and few-shot classes."""
    figure = plot_fusion_sweep(*pooled(seeds))
    for axes, name in zip(figure.axes, SPLITS[1:], strict=True):
        axes.set_title(f"weight of the {name}-shot expert")
    figure.savefig(path, dpi=110)


def draw_norms(analysis: dict[str, Any], path: Path) -> None:
    """The norms of the class weights in Figure 3; a vector of one number has that as its norm."""
    norms = torch.tensor(analysis["norms"])[:, :, None]
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axes = plot_weight_norms(norms, analysis["class_counts"], ax=figure.add_subplot())
    axes.set_title("Norms of the class weights of linear heads")
    figure.savefig(path, dpi=110)


def draw_cells(records: list[dict[str, Any]], title: str, path: Path) -> None:
    """Accuracy by split: a group of bars a split, with a bar a record."""
    finals = [record["summary"]["final"] for record in records]
    splits = {
        column: name
        for column, name in zip(COLUMNS, SPLITS, strict=True)
        if any(f.get(column) for f in finals)
    }
    figure = Figure(figsize=(8.5, 4.2), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    width = 0.85 / len(records)
    for i, (record, label, final) in enumerate(zip(records, labels(records), finals, strict=True)):
        scores = [final.get(column) or {"mean": 0.0, "deviation": None} for column in splits]
        places = np.arange(len(splits)) + width * (i - (len(records) - 1) / 2)
        axes.bar(
            places,
            [score["mean"] for score in scores],
            width,
            label=label,
            color=COLORS[record["row"].split()[0]],
            hatch=hatch(record),
            edgecolor="white",
            linewidth=0.5,
        )
        if len(record["runs"]) > 1:
            deviations = [score["deviation"] or 0.0 for score in scores]
            heights = [score["mean"] for score in scores]
            axes.errorbar(places, heights, deviations, fmt="none", ecolor="black", capsize=2, linewidth=1)
    names = ["all classes" if name == "all" else f"{name}-shot classes" for name in splits.values()]
    axes.set_xticks(np.arange(len(splits)), names)
    axes.set(title=title, ylabel="accuracy (%)")
    axes.spines[["top", "right"]].set_visible(False)
    seeds = seeds_text(records)
    axes.set_xlabel(
        "one seed" if seeds == "1" else f"bars: mean, error bars: standard deviation, over {seeds} seeds"
    )
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)


def write_analyses(options: argparse.Namespace) -> None:
    """What the test logits in the folders of the runs say, as JSON and pictures beside the records."""
    for path in sorted(options.records.glob("*.json")):
        kept = sorted(options.runs.glob(f"{path.stem}/seed*/outputs.npz"))
        if not kept:
            continue
        seeds = [read_outputs(outputs) for outputs in kept]
        configuration = read_record(path)["configuration"]
        analysis = analyse(seeds, configuration["groups"] == "shots")
        make_folder("--records", options.records / "analyses")
        write_text(options.records / "analyses" / path.name, json.dumps(analysis) + "\n")
        if analysis["fusion"]:
            draw_fusion(seeds, options.records / f"{path.stem}_fusion.png")
        if configuration["classifier"] == "linear":
            draw_norms(analysis, options.records / f"{path.stem}_norms.png")


def first_page(folder: Path) -> str:
    """A page with all records of a folder, its tables yet to be filled."""
    names = " ".join(path.stem for path in sorted(folder.glob("*.json")))
    bars = f"<!-- bars: {names} -->\n![Accuracy](accuracy.png)\n"
    return f"# Results\n\n{bars}\n<!-- cells: {names} -->\n<!-- end -->\n"


def write_text(path: Path, text: str) -> None:
    """In UTF-8, whole or not at all."""
    write_whole(path, lambda file: file.write(text.encode()))


def main(arguments: list[str] | None = None) -> None:
    """Fill the page; with --runs write the analyses and the figures first."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        for path in options.page:
            check_output("--page", path)
        if not any(options.records.glob("*.json")):
            raise InputError(f"--records: expected a folder of records, got none in {options.records}")
        if options.runs:
            write_analyses(options)
        for path in options.page:
            page = path.read_text(encoding="utf-8") if path.exists() else first_page(options.records)
            filled = fill(page, options.records)
            for names, title, picture in BARS.findall(page):
                draw_cells(read_records(names, options.records), title, path.parent / picture)
            write_text(path, filled)
            print(f"page: {path}")
    except InputError as error:
        parser.error(str(error))
    except KeyError as error:
        parser.error(
            f"{options.records}: expected records of train_paper.py or sweep_tau.py, got one without {error}"
        )


if __name__ == "__main__":
    start(main)
