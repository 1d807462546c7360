# Needs: cli.py, files.py, quickstart.py.
"""Find the best tau of the ensemble: sweep it for K = 2 to 7 on small long-tailed images.

The mean of K experts holds the prior n_j ** ((K - 1 - tau) / K): uniform at tau = K - 1. The script prints
accuracy on a balanced test set by tau / (K - 1), and how far the predictions lean to the head: the slope of
the log of a class's mean predicted probability over log n_j.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from cli import InputError, Parser, needs, number, shortened, start
from files import check_output, kind_of, write_whole
from torch import nn

RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, help=".npz of grey images of ten classes; by default scikit-learn's digits")
    add("--experts", type=number(int, 2, 11), nargs="+", default=[2, 3, 4, 5, 6, 7], metavar="K")
    add("--ratios", type=number(float, 0), nargs="+", default=list(RATIOS), metavar="TAU/(K-1)")
    add("--seeds", type=number(int, 1), default=5, help="number of seeds (default 5)")
    add("--epochs", type=number(int, 1), default=50, help="epochs per run (default 50)")
    add("--output", type=Path, default=Path("sweep_tau.json"), help="the record; a .png goes next to it")
    return parser


with needs("examples", make_parser, __name__):
    import matplotlib as mpl
    import numpy as np
    from quickstart import NUM_CLASSES, Split, fit, long_tailed_digits
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

    from lgla_losses import count_classes
    from lgla_losses.data import read_npz
    from lgla_losses.plot.style import LINES, MARKERS, METHODS

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap


def read_split(path: Path) -> Split:
    """Grey images of an .npz file of examples/make_data.py, at half the resolution."""
    halves = read_npz(path)
    images = {}
    for half, data in halves.items():
        classes, shape = sorted(set(data.targets)), getattr(data.images, "shape", ())
        if classes != list(range(NUM_CLASSES)):
            raise InputError(f"{path}: expected {half} labels of all classes 0..9, got {shortened(classes)}")
        if len(shape) != 3 or min(shape) < 2:
            raise InputError(f"{path}: expected grey {half}_images uint8 [N, H, W], got {list(shape)}")
        pixels = torch.from_numpy(np.asarray(data.images))[:, None]
        images[half] = nn.functional.avg_pool2d(pixels.float() / 255, 2)
    train, test = (torch.tensor(data.targets) for data in halves.values())
    return Split(images["train"], train, images["val"], test)


def measure(num_experts: int, tau: float, split: Split, epochs: int) -> dict[str, float]:
    """Accuracies in percent, and the slope, of one run."""
    counts = count_classes(split.train_labels, NUM_CLASSES)
    model = fit(num_experts, {"tau": tau}, split, counts.tolist(), epochs, lambda: None)
    with torch.no_grad():
        logits = model(split.test_images).ensemble()
    labels = split.test_labels
    right = (logits.argmax(1) == labels).double()
    recalls = torch.stack([right[labels == j].mean() for j in range(NUM_CLASSES)])
    predicted = logits.softmax(1).mean(0).log()
    slope = np.polyfit(counts.double().log(), predicted, 1)[0]
    rarest = counts.argsort()[:3]
    return {
        "balanced": 100 * float(recalls.mean()),
        "rarest": 100 * float(recalls[rarest].mean()),
        "slope": float(slope),
    }


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw accuracy and slope by tau / (K - 1), a line for each K: the larger, the darker."""
    figure, panels = plt.subplots(3, 1, figsize=(9, 10), sharex=True, layout="constrained")
    tones = LinearSegmentedColormap.from_list("LGLA", ["#BBAEE6", METHODS["LGLA"], "black"])
    shades = tones(np.linspace(0, 0.9, len(record["experts"])))
    titles = {
        "balanced": "balanced accuracy (%)",
        "rarest": "accuracy of the three rarest classes (%)",
        "slope": "lean to the head (slope over log n)",
    }
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        for k, num_experts in enumerate(record["experts"]):
            cells = [cell for cell in record["cells"] if cell["experts"] == num_experts]
            ratios = [cell["ratio"] for cell in cells]
            means = [statistics.mean(cell[column]) for cell in cells]
            look = {"linestyle": ["solid", *LINES][k % 6], "marker": MARKERS[k % len(MARKERS)]}
            axes.plot(ratios, means, color=shades[k], label=f"K = {num_experts}", **look)
        axes.set_title(title)
        axes.axvline(1.0, color="grey", linewidth=0.8, linestyle=":")
    panels[-1].set_xlabel("tau / (K - 1)")
    panels[0].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, handlelength=3.5)
    panels[2].axhline(0.0, color="grey", linewidth=0.8, linestyle=":")
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Sweep, print the table, write the record and the picture."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.data is not None and not options.data.is_file():
        parser.error(
            f"--data: expected an .npz file, got {kind_of(options.data)} at {options.data}; make one with "
            "examples/make_data.py fashion-mnist"
        )
    picture = options.output.with_suffix(".png")
    if options.output == picture:
        parser.error(
            f"--output: expected a .json file, got {picture}, the name of the picture next to it; choose "
            "another name"
        )
    try:
        given = options.data and read_split(options.data)
        check_output("--output", options.output)
        check_output("--output", picture)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    options.experts, options.ratios = sorted({*options.experts}), sorted({*options.ratios})

    cells: dict[tuple[int, float], dict[str, list[float]]] = {}
    runs = [
        (k, ratio, seed) for seed in range(options.seeds) for k in options.experts for ratio in options.ratios
    ]
    for num_experts, ratio, seed in tqdm(runs, mininterval=0.1 if sys.stderr.isatty() else 30.0):
        split = given or long_tailed_digits(50.0, seed, "cpu")
        torch.manual_seed(seed)
        results = measure(num_experts, ratio * (num_experts - 1), split, options.epochs)
        cell = cells.setdefault((num_experts, ratio), {column: [] for column in results})
        for column, value in results.items():
            cell[column].append(round(value, 4))
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "class_counts": count_classes(split.train_labels, NUM_CLASSES).tolist(),
        "test_samples": len(split.test_labels),
        "epochs": options.epochs,
        "experts": options.experts,
        "cells": [{"experts": k, "ratio": ratio, **columns} for (k, ratio), columns in cells.items()],
    }
    table = Table(title=f"Balanced accuracy (%), its deviation, slope; {options.seeds} seeds")
    for column in ("K", *(f"{ratio:g}" for ratio in options.ratios)):
        table.add_column(column, justify="right")
    for k in options.experts:
        row = [cells[k, ratio] for ratio in options.ratios]
        spreads = [statistics.stdev(c["balanced"]) if options.seeds > 1 else 0.0 for c in row]
        texts = [
            f"{statistics.mean(c['balanced']):.1f} ± {spread:.1f}, {statistics.mean(c['slope']):+.2f}"
            for c, spread in zip(row, spreads, strict=True)
        ]
        table.add_row(str(k), *texts)
    Console(width=140).print(table)
    content = json.dumps(record, indent=1) + "\n"
    write_whole(options.output, lambda file: file.write(content.encode()))
    draw(record, picture)
    print(f"record: {options.output}")


if __name__ == "__main__":
    start(main)
