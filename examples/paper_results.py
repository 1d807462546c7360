"""Make tables and figures of the records of train_paper.py and sweep_tau.py.

A page says what it shows: between ``<!-- KIND: NAME NAME -->`` and ``<!-- end -->`` goes a table of the
records of these names; ``<!-- bars: NAME NAME -->`` stands before an image that is drawn of them. A page
that is not there is begun with all records. With --runs what needs test logits is computed first.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from cli import library
from torch import Tensor

from lgla_losses.data import long_tailed_counts, long_tailed_indices
from lgla_losses.label_shift import estimate_prior, shift_prior

mpl.use("Agg")
from matplotlib import pyplot as plt

ShotAccuracy = library("lgla_losses.metrics").ShotAccuracy  # which imports torchvision where there is one

COLORS = [
    "#000000",
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
]  # Okabe and Ito, colour-blind safe
ROOT = Path(__file__).resolve().parents[1]
TABLE = re.compile(r"(<!-- (cells|shift|tau): (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
BARS = re.compile(r"<!-- bars: (.*?) -->\s*!\[(.*?)\]\((.*?)\)")
SMOOTHING = 3.0  # of the prior that is fitted to a test set
SPLITS = ("all", "many", "medium", "few")


def cell_text(score: dict[str, float | None] | None) -> str:
    """``mean ± deviation``, or a dash where a split has no classes."""
    if score is None:
        return "-"
    deviation = score["deviation"]
    return f"{score['mean']:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def grid(header: list[str], rows: list[list[object]]) -> str:
    """A table of Markdown, whose first column is text."""
    lines: list[list[object]] = [[*header], ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def label(record: dict[str, Any]) -> str:
    """The method, and what else distinguishes the cell."""
    return record["row"] if record["column"] in (None, "accuracy") else f"{record['row']}, {record['column']}"


def cells_table(records: list[dict[str, Any]]) -> str:
    """A row a record: last epoch, best epoch beside it, time, and the paper's number."""
    rows: list[list[object]] = []
    for record in records:
        final, best = record["summary"]["final"], record["summary"]["best"]
        cells = [cell_text(final.get(split)) for split in ("balanced", "many", "medium", "few")]
        minutes = statistics.median(run["seconds"] for run in record["runs"]) / 60
        paper = "-" if record["paper"] is None else f"{record['paper']} ({record['protocol']})"
        rows.append(
            [label(record), *cells, cell_text(best["balanced"]), len(record["runs"]), f"{minutes:.1f}", paper]
        )
    header = ["method", *SPLITS, "best epoch, all", "seeds", "minutes a run", "paper, all"]
    return grid(header, rows)


def shift_table(records: list[dict[str, Any]]) -> str:
    """A row a test distribution, averaged over the seeds of one record."""
    columns = ("as it is", "uniform", "fitted", "fitted, smoothed", "true")
    distances = ("distance, fitted", "distance, fitted, smoothed")
    rows: list[list[object]] = []
    for same in zip(*records[0]["label_shift"], strict=True):
        factor = same[0]["imbalance"]
        name = "uniform" if factor == 1 else f"{'head' if factor > 0 else 'tail'} first, IF {abs(factor)}"
        accuracies = [f"{statistics.mean(row[column] for row in same):.1f}" for column in columns]
        away = [f"{statistics.mean(row[column] for row in same):.2f}" for column in distances]
        rows.append([name, same[0]["samples"], *accuracies, *away])
    return grid(["test set", "samples", *columns, *distances], rows)


def tau_table(records: list[dict[str, Any]]) -> str:
    """A row a K: balanced accuracy and lean to the head by tau / (K - 1)."""
    cells = {(cell["experts"], cell["ratio"]): cell for cell in records[0]["cells"]}
    ratios = sorted({ratio for _, ratio in cells})
    rows: list[list[object]] = []
    for k in records[0]["experts"]:
        texts = []
        for ratio in ratios:
            values = cells[k, ratio]["balanced"]
            deviation = statistics.stdev(values) if len(values) > 1 else None
            score = {"mean": statistics.mean(values), "deviation": deviation}
            texts.append(f"{cell_text(score)} ({statistics.mean(cells[k, ratio]['slope']):+.2f})")
        rows.append([f"K = {k}", *texts])
    return grid(["tau / (K - 1)", *(f"{ratio:g}" for ratio in ratios)], rows)


TABLES = {"cells": cells_table, "shift": shift_table, "tau": tau_table}


def read_records(names: str, folder: Path) -> list[dict[str, Any]]:
    """The records of these names."""
    return [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names.split()]


def fill(page: str, folder: Path) -> str:
    """The page with every table made anew."""

    def make(found: re.Match[str]) -> str:
        return f"{found[1]}\n{TABLES[found[2]](read_records(found[3], folder))}\n{found[4]}"

    return TABLE.sub(make, page)


def accuracies(scores: Tensor, target: Tensor, class_counts: Tensor) -> dict[str, float]:
    """Of all, many, medium and few, in percent."""
    metric = ShotAccuracy(class_counts)
    metric.update(scores, target)
    return {split: round(100 * float(value), 2) for split, value in metric.compute().items()}


def fusion_sweep(outputs: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Figure 6: the accuracy of every split as the weight of one local expert grows from 0.1 to 0.9."""
    logits, counts = outputs["logits"].float(), outputs["class_counts"]
    num_experts = logits.shape[1]
    rows = []
    for expert in range(num_experts - 1):
        for weight in np.linspace(0.1, 0.9, 9):
            fusion = torch.full((num_experts,), float(1 - weight) / (num_experts - 2))
            # The global expert's weight is fixed, at the share it has in the mean.
            fusion[expert], fusion[-1] = float(weight), 1 / (num_experts - 1)
            fused = torch.einsum("nkc,k->nc", logits, fusion / fusion.sum())
            scores = accuracies(fused, outputs["target"], counts)
            rows.append({"expert": expert, "weight": round(float(weight), 2), **scores})
    return rows


def mean_of_seeds(sweeps: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of a fusion sweep, with the accuracies averaged over the seeds."""
    return [
        same[0] | {split: round(statistics.mean(row[split] for row in same), 2) for split in SPLITS}
        for same in zip(*sweeps, strict=True)
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
            "fitted": estimate_prior(logits, prior),
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
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def analyse(folder: Path, by_shots: bool) -> dict[str, Any]:
    """What the test logits of a run's seeds say: fusion, label shift, norms of the class weights."""
    seeds = [read_outputs(path) for path in sorted(folder.glob("seed*/outputs.npz"))]
    return {
        "label_shift": [label_shift(outputs) for outputs in seeds],
        "fusion": mean_of_seeds([fusion_sweep(outputs) for outputs in seeds]) if by_shots else None,
        "norms": [
            [round(float(v), 4) for v in expert]
            for expert in torch.stack([outputs["norms"] for outputs in seeds]).mean(dim=0)
        ],
        "class_counts": seeds[0]["class_counts"].tolist(),
    }


def draw_fusion(analysis: dict[str, Any], path: Path) -> None:
    """Figure 6."""
    names = ("many-shot", "medium-shot", "few-shot")
    figure, panels = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for k, axes in enumerate(panels):
        rows = [row for row in analysis["fusion"] if row["expert"] == k]
        for split, color in zip(SPLITS, COLORS, strict=False):
            axes.plot(
                [row["weight"] for row in rows], [row[split] for row in rows], "o-", color=color, label=split
            )
        axes.set(title=f"weight of the {names[k]} expert", xlabel="fusion weight", ylabel="accuracy (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", title="accuracy of")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_norms(analysis: dict[str, Any], path: Path) -> None:
    """The norms of the class weights in Figure 3."""
    norms = np.array(analysis["norms"])
    order = np.argsort(-np.array(analysis["class_counts"]), kind="stable")
    names = [
        *(f"local expert {k + 1}" for k in range(len(norms) - 1)),
        "global expert",
        "mean of the experts",
    ]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for row, name, color in zip(
        [*norms, norms.mean(0)], names, [*COLORS[1 : len(norms) + 1], COLORS[0]], strict=True
    ):
        axes.plot(row[order], color=color, label=name, linewidth=1)
    axes.set(
        title="Norms of the class weights of linear heads",
        xlabel="class, from the most to the least frequent",
    )
    axes.set_ylabel("L2 norm")
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_cells(records: list[dict[str, Any]], title: str, path: Path) -> None:
    """Accuracy by split, a group of bars a record."""
    figure, axes = plt.subplots(figsize=(2 + 1.5 * len(records), 4), layout="constrained")
    columns = {"balanced": "all", "many": "many", "medium": "medium", "few": "few"}
    for i, (column, name) in enumerate(columns.items()):
        scores = [record["summary"]["final"].get(column) for record in records]
        if not any(scores):  # a split without classes
            continue
        place = np.arange(len(records)) + 0.2 * i - 0.3
        heights = [score["mean"] if score else 0.0 for score in scores]
        deviations = [score["deviation"] or 0.0 if score else 0.0 for score in scores]
        axes.bar(place, heights, 0.2, yerr=deviations, color=COLORS[i], label=name, capsize=2)
    axes.set_xticks(np.arange(len(records)), [label(record) for record in records])
    axes.set(title=title, ylabel="accuracy (%)")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Fill the page; with --runs write the analyses and the figures first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=Path, default=ROOT / "benchmarks" / "results" / "paper")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument(
        "--runs", type=Path, help="folder of train_paper.py's runs, whose names are the records'"
    )
    options = parser.parse_args(arguments)
    for path in sorted(options.records.glob("*.json")) if options.runs else []:
        if not list(options.runs.glob(f"{path.stem}/seed*/outputs.npz")):
            continue
        configuration = json.loads(path.read_text(encoding="utf-8"))["configuration"]
        analysis = analyse(options.runs / path.stem, configuration["groups"] == "shots")
        (options.records / "analyses").mkdir(exist_ok=True)
        (options.records / "analyses" / path.name).write_text(json.dumps(analysis) + "\n", encoding="utf-8")
        if analysis["fusion"]:
            draw_fusion(analysis, options.records / f"{path.stem}_fusion.png")
        if configuration["classifier"] == "linear":
            draw_norms(analysis, options.records / f"{path.stem}_norms.png")
    if not options.page.exists():
        names = " ".join(path.stem for path in sorted(options.records.glob("*.json")))
        begun = (
            f"<!-- bars: {names} -->\n![Accuracy](accuracy.png)\n\n<!-- cells: {names} -->\n<!-- end -->\n"
        )
        options.page.write_text(f"# Results\n\n{begun}", encoding="utf-8")
    page = options.page.read_text(encoding="utf-8")
    for names, title, picture in BARS.findall(page):
        draw_cells(read_records(names, options.records), title, options.page.parent / picture)
    options.page.write_text(fill(page, options.records), encoding="utf-8")
    print(f"page: {options.page}")


if __name__ == "__main__":
    main()
