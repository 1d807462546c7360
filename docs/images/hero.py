"""Draw hero.png, README's first picture: what LGLA gains on rare classes, and how it works.

The left half comes from the record of `make bench-methods`, the right half from the library. `make hero`
draws it again. The background is white on every page.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from lgla_losses import CLALogitAdjuster, LGLALoss
from lgla_losses.data import long_tailed_counts
from lgla_losses.plot import plot_groups, plot_table
from lgla_losses.plot.style import METHODS, color

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import tables
from methods_tables import Results

#: Heads, and how many times the epochs: cosine heads, 8 epochs.
BUDGET = ("cosine", 1)
#: Name in the record, name in the picture, and colour.
ROWS = (
    ("softmax", "softmax", METHODS["softmax"]),
    ("balanced softmax", "balanced softmax", METHODS["balanced softmax"]),
    ("softmax x3", "softmax", METHODS["softmax"]),
    ("balanced softmax x3", "balanced softmax", METHODS["balanced softmax"]),
    ("LGLA", "LGLA", METHODS["LGLA"]),
)
#: Places of the bars from the top, with a gap between one model and three experts.
PLACES = (0.0, 1.0, 2.7, 3.7, 4.7)
SCORES = {"tail": "rarest third\nof the classes", "accuracy": "all classes"}
SIZE = (9.6, 4.7)  # inches
DPI = 180


def scores_of(results: Results, method: str, score: str) -> list[float]:
    """A score of each seed, in percent: the mean over the data sets."""
    of_set = [results.of(BUDGET, method, data, score, "plain") for data in results.sets]
    return [statistics.mean(scores[seed] for scores in of_set) for seed in results.seeds]


def draw(path: Path) -> None:
    """Draw the gain on the left and the idea on the right."""
    style = {"font.size": 10, "axes.titlesize": 10.5, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(mpl.rcParamsDefault | style):
        figure = Figure(figsize=SIZE, layout=ConstrainedLayoutEngine(rect=(0.01, 0.015, 0.98, 0.97)))
        left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1), wspace=0.05)
        results = Results(tables.read("methods"))
        left.suptitle("The gain: accuracy on rare classes", fontsize=12.5, fontweight="bold")
        panels = left.subplots(1, 2, sharey=True)
        for axes, (score, title) in zip(panels, SCORES.items(), strict=True):
            _bars(axes, results, score)
            axes.set_title(title)
        for place, text in ((-0.72, "one model"), (1.98, "three experts")):
            panels[0].text(1, place, text, va="center", fontstyle="italic")
        left.supxlabel("accuracy (%), mean over six data sets", fontsize=10)

        adjuster = LGLALoss(long_tailed_counts(500, num_classes=100, imbalance_factor=100)).adjuster
        right.suptitle("The idea: an expert for each part", fontsize=12.5, fontweight="bold")
        upper, lower = right.subplots(2, 1, sharex=True)
        _groups(upper, adjuster)
        _adjustments(lower, adjuster)
        figure.savefig(path, dpi=DPI)


def _bars(axes: Axes, results: Results, score: str) -> None:
    """A bar for each method: the mean over the seeds, and a line from the lowest seed to the highest."""
    for place, (method, _, fill) in zip(PLACES, ROWS, strict=True):
        seeds = scores_of(results, method, score)
        mean = statistics.mean(seeds)
        axes.barh(place, mean, height=0.8, color=fill)
        axes.plot([min(seeds), max(seeds)], [place, place], color="black", linewidth=1.4, marker="|")
        axes.text(max(seeds) + 2, place, f"{mean:.0f}", va="center")
    axes.set_yticks(PLACES, [name for _, name, _ in ROWS])
    axes.set(xlim=(0, 80), ylim=(PLACES[-1] + 0.6, -1.0))
    axes.set_xticks([0, 20, 40, 60])
    axes.tick_params(axis="y", length=0)


def _groups(axes: Axes, adjuster: CLALogitAdjuster) -> None:
    plot_groups(adjuster.grouper, ax=axes)
    axes.get_legend().remove()
    for text in list(axes.texts):
        text.remove()
    sizes = adjuster.grouper.group_sizes.tolist()
    axes.set(xlabel="", ylabel="samples", title="Classes in two groups with equally many samples")
    axes.text(17.5, 330, f"← group 1: {sizes[0]} classes", color=color(0), fontweight="bold")
    axes.text(45, 90, f"group 2: {sizes[1]} classes", color="#8F6200", fontweight="bold")


def _adjustments(axes: Axes, adjuster: CLALogitAdjuster) -> None:
    plot_table(adjuster, ax=axes)
    axes.get_legend().remove()
    for text in list(axes.texts):
        text.remove()
    axes.set(ylabel="adjustment", title="What training adds to the logits of each expert")
    axes.set_yticks([0, -4, -8, -12])
    axes.set_xlabel("classes, from frequent to rare")
    for place, text, ink in (
        ((42, 0.5), "local expert 1: group 1", color(0)),
        ((68.5, -7.05), "local expert 2:\ngroup 2", "#8F6200"),
        ((4, -9.5), "global expert:\nall classes", "black"),
    ):
        axes.text(*place, text, color=ink, fontweight="bold", fontsize=9.5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("hero.png"))
    draw(parser.parse_args().output)
